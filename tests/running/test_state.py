"""What a model holds is given back, whichever way it keeps things and whatever happens meanwhile."""

import array
import collections
import copy
import dataclasses
import types
import warnings

import numpy as np
import pytest
import torch
from cases import images
from lightning.pytorch import Trainer
from running_models import SILENT, TOLD, BuildsFilters, Keeps, held, same
from torch import nn

import lie_metric as lm
from lie_metric.measured import function_of
from lie_metric.running import evaluation, isolated


def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", SILENT + TOLD)
def test_what_a_model_keeps_is_given_back(kind, mode):
    model = Keeps(kind).train(mode)
    before = held(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with isolated(model):
            model(x()), model(x())
            assert same(before, held(model)) == (kind == "nothing" and not mode)
    assert same(before, held(model))
    told = [str(entry.message) for entry in caught]
    assert len(told) == (kind in TOLD)
    assert all("changed its buffers ['center']" in text for text in told)


@pytest.mark.parametrize("kind", [*SILENT, *TOLD])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_measurement_leaves_nothing_behind(kind):
    if kind in {"parameter", "frozen", "memory by data", "parameter by data", "hook", "new module"}:
        pytest.skip("changes what is differentiated while it is")
    model = nn.Sequential(Keeps(kind).double()).train()
    before = held(model)
    with torch.no_grad():
        lm.lie_derivative(model, images(2, 8), "rotation")
    assert same(before, held(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", ["feature", "memory", "parameter"])
def test_whatever_is_raised(kind, error):
    class Raises(Keeps):
        def forward(self, x):
            super().forward(x)
            raise error("planted")

    model = Raises(kind)
    before = held(model)
    with pytest.raises(error, match="planted"), isolated(model):
        model(x())
    assert same(before, held(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_eval_itself(error):
    class Raises(nn.Module):
        def train(self, mode=True):
            super().train(mode)
            if not mode:
                raise error("planted")
            return self

    model = nn.Sequential(nn.BatchNorm2d(3), Raises())
    before, fast = held(model), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(error, match="planted"), isolated(model):
        pass
    assert same(before, held(model))
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_an_interrupt_while_things_are_given_back():
    from lie_metric.running import isolation

    model, whole, calls = Keeps("feature"), isolation.State.restore, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(self)

    before = held(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolation.State, "restore", interrupted)
        with pytest.raises(KeyboardInterrupt), isolated(model):
            model(x())
    assert len(calls) == 2
    assert same(before, held(model))


def test_gradients_stay():
    model = Keeps("nothing")
    model(x()).sum().backward()

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            with torch.enable_grad():
                self.inner(x).sum().backward()
            return self.inner(x)

    before = [parameter.grad.clone() for parameter in model.parameters()]
    with pytest.warns(UserWarning, match=r"wrote to \['inner.scale.grad'"), isolated(Backwards()):
        Backwards()(x())
    model.zero_grad(set_to_none=True)
    with isolated(model):
        model(x()).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(before) == len(list(model.parameters()))


def test_what_scripted_code_writes_beneath_is_told():
    """Out of sight of every function mode, but counted."""

    def write(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(1)

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.write = torch.zeros(2), torch.jit.trace(write, torch.zeros(2))

        def forward(self, x):
            self.write(self.memory)
            return x.flatten(1)

    model = Writes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with isolated(model), torch.no_grad():
            model(x())
    assert model.memory.eq(0).all() or any("wrote to ['memory']" in str(entry.message) for entry in caught)


@pytest.mark.parametrize("around", ["train", "eval"])
def test_filters_that_eval_builds(around):
    model = BuildsFilters().double()
    with torch.no_grad():
        model.train(around == "train")
        other = copy.deepcopy(model).eval()
    before = held(model)
    found = lm.lie_derivative(model, images(2, 8), "rotation")["rotation"]
    assert same(before, held(model))
    assert hasattr(model, "filter") == (around == "eval")
    torch.testing.assert_close(found, lm.lie_derivative(lambda v: other(v), images(2, 8), "rotation")["rotation"])
    # Weights have moved since: neither an earlier filter nor that of the last measurement is used.
    with torch.no_grad():
        model.train().weights.mul_(2)
        other = copy.deepcopy(model).eval()
    moved = lm.lie_derivative(model, images(2, 8), "rotation")["rotation"]
    torch.testing.assert_close(moved, lm.lie_derivative(lambda v: other(v), images(2, 8), "rotation")["rotation"])
    assert (moved - found).norm() > 0.1 * found.norm()
    assert not hasattr(model, "filter")
    assert model.training


def test_filters_of_a_penalty_carry_gradients_to_the_weights():
    model = BuildsFilters().double()
    lm.lie_derivative(model, images(2, 8), "rotation")["rotation"].square().sum().backward()
    assert model.weights.grad.abs().sum() > 0


def test_modes_are_each_modules_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), BuildsFilters(channels=4)))
    model.train()
    model[1].eval()
    model[2][1].eval()
    modes, filters = [module.training for module in model.modules()], model[2][1].filter
    with isolated(model):
        assert not any(module.training for module in model.modules())
        assert model[2][1].filter is not filters
    assert [module.training for module in model.modules()] == modes
    assert model[2][1].filter is filters


def test_dropout_that_stays_active_in_evaluation_does_so_here():
    class MonteCarlo(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].train()
            return self

    model = MonteCarlo(nn.Dropout(0.5), nn.Flatten()).eval()
    with isolated(model):
        assert model[0].training
        assert model(torch.ones(1, 1, 8, 8)).eq(0).any()


def test_tensors_made_in_inference_mode():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.inference_mode():
                self.register_buffer("table", torch.full((3, 1, 1), 2.0, dtype=torch.float64))
                self.factor = torch.full((), 3.0, dtype=torch.float64)

        def forward(self, x):
            return (x * self.table * self.factor * x).flatten(1)

    model, other = Caches(), lambda v: (v * 6 * v).flatten(1)
    before = held(model)
    for method in ("auto", "reverse", "double_backward"):
        if method != "reverse":
            found = lm.lie_derivative(model, images(2, 8), "rotation", method=method)["rotation"]
            torch.testing.assert_close(found, lm.lie_derivative(other, images(2, 8), "rotation")["rotation"])
    assert same(before, held(model))
    assert model.table.is_inference()


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lambda x: model(x)])
def test_lazy_layers_are_refused_and_stay_lazy(wrap):
    model = Layers()
    with pytest.raises(RuntimeError, match=r"lazy layer 'body.1' \(LazyLinear\).*Run one batch through the model"):
        lm.lie_derivative(wrap(model), images(2, 8), "rotation")
    assert isinstance(model.body[1].weight, nn.UninitializedParameter)
    with pytest.raises(RuntimeError, match="lazy layer"), evaluation(model):
        pass


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, lambda size: nn.InstanceNorm2d(size, track_running_stats=True)])
@pytest.mark.parametrize("own", [False, True])
def test_batch_norm_that_runs_in_training_mode_is_told_and_given_back(own, kind):
    """One that hides where nothing finds it, and one that a model keeps in training mode itself."""

    class Norm(nn.Sequential):
        def train(self, mode=True):
            return super().train(mode or own)

    class Hidden:
        __slots__ = ()

        def __call__(self, x):
            return REGISTRY[0]()(x)

    model = Norm(kind(3))
    REGISTRY[:] = [lambda: model]
    before = held(model)
    place = r"\['0'\]" if own else r"\['a module of 3 channels that is out of sight'\]"
    with (
        pytest.warns(UserWarning, match=f"Batch norm ran in training mode in {place}") as told,
        isolated(model if own else Hidden()),
    ):
        model(x())
    assert len(told) == 1, "that its statistics changed is part of it"
    assert same(before, held(model))


REGISTRY = []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore::DeprecationWarning")
def test_scripted_modules():
    model = torch.jit.script(Scripted())
    before = model.n, model.h, model.calls.clone(), [module.training for module in model.modules()]

    def measure():
        with isolated(model):
            assert not any(module.training for module in model.modules())
            model(x())

    with pytest.warns(UserWarning, match=r"changed its buffers \['calls'"):
        measure()
    assert model.n == before[0]
    assert torch.equal(model.h, before[1])
    assert torch.equal(model.calls, before[2])
    assert [module.training for module in model.modules()] == before[3]


class Scripted(nn.Module):
    n: int

    def __init__(self):
        super().__init__()
        self.n, self.h, self.norm = 0, torch.zeros(2), nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.n = self.n + 1
        self.h = x.sum() * torch.ones(2)
        self.calls = self.calls + 1
        return self.norm(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: torch.compile(module, backend="eager"),
        nn.DataParallel,
        lambda module: nn.Sequential(nn.utils.parametrizations.spectral_norm(module[0]), *module[1:]),
        lambda module: nn.Sequential(nn.utils.parametrizations.weight_norm(module[0]), *module[1:]),
        lambda module: nn.Sequential(nn.utils.parametrizations.orthogonal(module[0]), *module[1:]),
        lambda module: nn.Sequential(nn.utils.spectral_norm(module[0]), *module[1:]),
        torch.fx.symbolic_trace,
    ],
    ids=["compiled", "data parallel", "spectral norm", "weight norm", "orthogonal", "old spectral norm", "traced"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_wrapped_modules(wrap):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2)).double()
    model = wrap(plain).train()
    model(images(2, 8))
    before = held(model)
    lm.lie_derivative(model, images(2, 8), "rotation")
    assert same(before, held(model))
    with torch.no_grad():
        found = lm.lie_derivative(model, images(2, 8), "rotation")["rotation"]
    assert same(before, held(model))
    torch.testing.assert_close(found, lm.lie_derivative(model.eval(), images(2, 8), "rotation")["rotation"])


def test_metrics_that_forward_updates_are_as_they_were():
    from torchmetrics import MeanMetric

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.conv = MeanMetric(), nn.Conv2d(3, 2, 8)

        def forward(self, x):
            self.mean.update(x.detach().mean())
            return self.conv(x).flatten(1)

    model = Counts()
    model.mean.update(4.0)
    with isolated(model):
        model(x())
    assert model.mean.compute() == 4
    assert model.mean.update_count == 1


class _Captures(nn.Module):
    """Collects outputs of its layers by hooks that it adds once, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        if not getattr(self, "installed", False):
            for layer in self.layers:
                layer.register_forward_hook(lambda module, inputs, output: self.seen.append(output))
            self.installed = True
        self.seen = []
        for layer in self.layers:
            x = layer(x).tanh()
        return torch.stack(self.seen).sum(0)


def test_hooks_that_a_call_adds_are_added_once():
    model, x = _Captures(), torch.randn(2, 4)
    with torch.no_grad():
        wanted = model.layers[0](x) + model.layers[1](model.layers[0](x).tanh())
    outside = model.layers[0].register_forward_hook(lambda *args: None)
    with torch.no_grad(), isolated(model):
        function = function_of(model, "logits")
        inside = model.layers[1].register_forward_hook(lambda *args: None)
        for _ in range(3):
            torch.testing.assert_close(function(x), wanted)
        assert inside.id in model.layers[1]._forward_hooks
    assert list(model.layers[0]._forward_hooks) == [outside.id]
    assert not model.layers[1]._forward_hooks


# What modules keep beside tensors -------------------------------------------------------------------------------------


class Note:
    def __init__(self):
        self.count, self.values = 0, np.zeros(2)


class Slots:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


@dataclasses.dataclass
class Entry:
    count: int = 0


class Counts(nn.Module):
    """Counts its calls in every way that is not a tensor of its own."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 192, generator=torch.Generator().manual_seed(0)))
        self.array, self.row, self.data = np.zeros(1), array.array("i", [0]), bytearray(2)
        self.counter, self.default = collections.Counter(other=5), collections.defaultdict(int)
        self.ordered = collections.OrderedDict(a=0, b=0)
        self.note, self.slots, self.entry, self.space = Note(), Slots(), Entry(), types.SimpleNamespace(count=0)
        self.held, self.pair, self.deep = [torch.zeros(2)], (Note(), [0]), {"one": {"two": Note()}}

    def forward(self, v):
        type(self).calls += 1
        self.array += 1
        self.row[0] += 1
        self.row.append(1)
        self.data[0] += 1
        self.counter["calls"] += 1
        self.default["calls"] += 1
        self.ordered.move_to_end("a")
        for counted in (self.note, self.slots, self.entry, self.space, self.pair[0], self.deep["one"]["two"]):
            counted.count += 1
        self.note.values += 1
        self.pair[1][0] += 1
        out = v.flatten(1) @ self.weight.T.to(v)
        self.held[0].add_(1)
        return out

    def told(self):
        return (
            *(type(self).calls, self.array.tolist(), self.row.tolist(), bytes(self.data), dict(self.counter)),
            *(dict(self.default), list(self.ordered), self.note.count, self.note.values.tolist(), self.slots.count),
            *(self.entry.count, self.space.count, self.held[0].tolist(), self.pair[0].count, self.pair[1]),
            self.deep["one"]["two"].count,
        )


@pytest.mark.parametrize("method", ["auto", "double_backward", "difference"])
def test_counts_of_any_kind_are_given_back(method):
    model = Counts()
    model(x())
    before, kept = copy.deepcopy(model.told()), model.held[0]
    with torch.no_grad():
        lm.lie_derivative(model, x(), "rotation", method=method, output_representation=lm.representations.Invariant())
    assert model.told() == before
    assert model.held[0] is kept


def test_a_tensor_that_autograd_took_note_of_is_free_of_it():
    """A copy of what moves leaves a graph behind, and such a tensor cannot be copied with its model."""

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = [torch.zeros(2, 3)]

        def forward(self, v):
            out = v.mean((2, 3))
            self.held[0].copy_(out)
            return out

    model = Holds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm.lie_derivative(model, x(), "rotation", method="double_backward")
    assert model.held[0].grad_fn is None
    assert not model.held[0].any()
    copy.deepcopy(model)


def test_a_trainer_and_what_it_logs_to_live_on():
    """Objects of other libraries are no part of the model."""

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")

        def forward(self, v):
            self.trainer.told = True
            return v.mean((2, 3))

    model = Holds()
    lm.lie_derivative(model, x(), "rotation")
    assert model.trainer.told


def test_arrays_that_grow_or_cannot_be_written_to():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.grows, self.shown = np.zeros(2), np.broadcast_to(elsewhere[0], 3)
            self.named, self.large = np.array([["a"]], dtype=object), np.zeros(2**24 + 1, dtype=np.uint8)

        def forward(self, v):
            self.grows.resize(len(self.grows) + 1, refcheck=False)
            elsewhere[0] += 1
            self.named[0, 0], self.large[0] = "b", 1
            return v.mean((2, 3))

    elsewhere = [np.zeros(())]
    model = Holds()
    lm.lie_derivative(model, x(), "rotation")
    assert model.grows.tolist() == [0, 0]
    assert model.shown.all(), "it is no array of the model's own"
    assert model.named.tolist() == [["a"]]
    assert model.large[0] == 1, "so much is not copied"


def test_what_stands_deep_inside_is_left_alone():
    """Deeper than is kept, a container must not be taken for one that was empty."""

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = [[[[[[1, 2]]]], {"a": {"b": {"c": {"d": [3]}}}}]]
            self.objects = {"note": Note()}
            self.objects["note"].tree = [[[[4]]], ()]

        def forward(self, v):
            return v.mean((2, 3))

    model = Holds()
    lm.lie_derivative(model, x(), "rotation")
    assert model.deep == [[[[[[1, 2]]]], {"a": {"b": {"c": {"d": [3]}}}}]]
    assert model.objects["note"].tree == [[[[4]]], ()]


def test_objects_are_given_back_to_the_same_depth_as_containers():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.note = Note()
            self.note.tree = [[0]]
            self.tree = [[[0]]]

        def forward(self, v):
            self.note.tree[0][0] += 1
            self.tree[0][0][0] += 1
            return v.mean((2, 3))

    model = Holds()
    lm.lie_derivative(model, x(), "rotation")
    assert model.note.tree == [[0]]
    assert model.tree == [[[0]]]


def test_containers_that_hold_one_another():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.tree = {"children": [], "calls": 0}
            self.tree["children"].append({"parent": self.tree})

        def forward(self, v):
            self.tree["calls"] += 1
            return v.mean((2, 3))

    model = Holds()
    lm.lie_derivative(model, x(), "rotation")
    assert model.tree["calls"] == 0
    assert model.tree["children"][0]["parent"] is model.tree


def test_what_nothing_writes_to_is_not_copied():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.table = torch.zeros(()), torch.zeros(1).expand(2**60)  # no memory would hold a copy

        def forward(self, v):
            self.calls.add_(1)
            return v.mean((2, 3)) + self.table[0]

    model = Holds()
    with torch.no_grad():
        lm.lie_derivative(model, x(), "rotation")
    assert model.calls == 0


# From call to call of one measurement ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        *("buffer", "buffer by data", "buffer anew", "buffer of another size", "buffer in other memory"),
        *("tensor in a dictionary", "number"),
    ],
)
@pytest.mark.filterwarnings("ignore:The model changed its buffers")
def test_every_call_begins_with_the_state_that_eval_left(kind):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.ones(2))
            self.held, self.calls = {"last": torch.zeros(())}, 0

        def train(self, mode=True):
            self.last.fill_(1 if mode else 2)
            return super().train(mode)

        def forward(self, v):
            found = v.mean((2, 3)) + self.last.sum() + self.held["last"] + self.calls
            if kind == "buffer":
                self.last.add_(1)
            elif kind == "buffer by data":
                self.last.data.add_(1)
            elif kind == "buffer anew":
                self.last = self.last + 1
            elif kind == "buffer of another size":
                self.last.resize_(1)
            elif kind == "buffer in other memory":
                self.last.data = self.last + 1
            elif kind == "tensor in a dictionary":
                self.held["last"] = self.held["last"] + 1
            else:
                self.calls += 1
            return found

    model = Remembers()
    with isolated(model), torch.no_grad():
        function = function_of(model, "logits")
        for _ in range(3):
            assert torch.equal(function(x()), x().mean((2, 3)) + 4)
    assert model.last.tolist() == [1, 1]
    assert model.held["last"] == model.calls == 0


def test_what_eval_writes_into_a_buffer_is_no_change():
    class Marks(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mode", torch.ones(()))

        def train(self, mode=True):
            self.mode.fill_(mode)
            return super().train(mode)

        def forward(self, v):
            return v.mean((2, 3)) * (1 + self.mode)

    model = Marks()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lm.lie_derivative(model, x(), "rotation")["rotation"]
    torch.testing.assert_close(found, lm.lie_derivative(lambda v: v.mean((2, 3)), x(), "rotation")["rotation"])
    assert model.mode == 1


def test_buffers_that_keep_their_values_are_not_told():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.still, self.anew = (nn.Buffer(torch.tensor([1.0, torch.nan])) for _ in range(3))

        def forward(self, v):
            self.calls[0] = torch.nan
            self.anew = self.anew.clone()
            return v.mean((2, 3))

    model = Holds()
    anew = model.anew
    with torch.no_grad(), pytest.warns(UserWarning, match=r"changed its buffers \['calls'\]"):
        lm.lie_derivative(model, x(), "rotation")
    assert model.anew is anew
    assert model.calls[0] == 1


@pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros(3, dtype=torch.float64)], ids=["shape", "type"])
def test_a_buffer_of_the_same_numbers_may_be_another(other):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Buffer(torch.zeros(3))

        def forward(self, v):
            self.last = other.clone()
            return v

    model = Holds()
    with pytest.warns(UserWarning, match=r"changed its buffers \['last'\]"), isolated(model):
        model(x())
    assert model.last.dtype == torch.float32
    assert model.last.shape == (3,)


def test_a_buffer_that_a_transform_leaves_behind_is_told():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Buffer(torch.zeros(3))

        def forward(self, v):
            self.last = v.mean((-2, -1))
            return self.last

    model = Holds()
    last = model.last
    with pytest.warns(UserWarning, match=r"changed its buffers \['last'\]"), isolated(model):
        torch.vmap(model)(x())
    assert model.last is last


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("changes", [False, True])
def test_sparse_tensors(changes, buffer):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            links = torch.eye(3).to_sparse()
            self.links = nn.Buffer(links) if buffer else links

        def forward(self, v):
            if changes:
                self.links.mul_(2)
            return v.mean((2, 3))

    model = Holds()
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        lm.lie_derivative(model, x(), "rotation")
    assert ["changed its buffers ['links']" in str(entry.message) for entry in told] == [True] * (changes and buffer)
    assert torch.equal(model.links.to_dense(), torch.eye(3))
