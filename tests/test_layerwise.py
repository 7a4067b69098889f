"""Attribution by operation: completeness, the reference values, the granularities, and what it does to the model."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from cases import ImageToImage, OldSquare, TokensOut, cnn, images, vit
from references import filled, waves
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lie_metric as lm
from lie_metric import layerwise
from lie_metric import representations as R
from lie_metric.attribution import flows as flows_
from lie_metric.lie import linearise
from lie_metric.options import Options

pytestmark = pytest.mark.filterwarnings("ignore:Shares of")

TWO = ("rotation", "translation_x", "scale")


class Detaches(nn.Module):
    def forward(self, x):
        return x * x.detach()


class Tricky(nn.Module):
    """In-place operations, a module called twice, several outputs, views, functional calls, a shared tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.position = nn.Parameter(torch.randn(1, 4, 16, 16))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = self.conv(x)
        y += self.position
        shortcut = y = self.act(y)
        y = self.twice(self.act(self.twice(y)))
        y += shortcut
        a, b = y.chunk(2, dim=1)
        y = torch.cat([a * b.sigmoid(), b], dim=1)
        y = F.max_pool2d(F.pad(y, (1, 1, 1, 1), value=-torch.inf), 3, 2)
        windows = y.reshape(len(x), 4, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 4, 4)
        y = (windows - windows.mean((2, 3), keepdim=True)).reshape(len(x), 2, 2, 4, 4, 4).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(len(x), 4, 8, 8)
        values, _ = y.flatten(2).topk(2)
        return self.head(values.flatten(1))


MODELS = {
    "cnn": lambda: cnn(4),
    "vit": vit,
    "tricky": lambda: Tricky().double(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_contributions_add_up_to_the_vector(name, batch):
    if name == "vit":
        pytest.importorskip("timm")
    model, x = MODELS[name](), images(batch)
    report = lm.layerwise_equivariance_error(model, x, TWO, probes="exact")
    L = lm.lie_derivative(model, x, TWO, method="double_backward")
    for k, generator in enumerate(TWO):
        found = report.vectors.sum(0)[k]
        torch.testing.assert_close(found, L[generator].flatten().detach(), rtol=1e-9, atol=1e-11)
    assert max(report.residual.values()) < 1e-11


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: ImageToImage().double(), {}),
        (lambda: TokensOut().double(), {}),
        (lambda: nn.Conv2d(3, 4, 3, padding=1).double(), {"output_representation": R.Invariant()}),
        (lambda: lambda x: F.gelu(x.permute(0, 2, 3, 1)), {"output_representation": R.ChannelsLast()}),
    ],
)
def test_outputs_that_move(make, options):
    report = lm.layerwise_equivariance_error(make(), images(2), TWO, probes=3, **options)
    assert max(report.residual.values()) < 1e-10


def test_dense_output_exactly():
    report = lm.layerwise_equivariance_error(
        nn.Conv2d(3, 1, 3, padding=1).double(), images(1, 6), "rotation", probes="exact"
    )
    L = lm.lie_derivative(nn.Conv2d(3, 1, 3).double(), images(1, 6), "rotation")["rotation"]
    assert report.vectors.shape == (3, 1, 36)
    assert report.by("module")[0].squared_norm > 0.01 * L.square().mean()


REFERENCE = json.loads((Path(__file__).parent / "reference_values.json").read_text())["layerwise"]


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case["model"])
def test_values_of_modules_computed_independently(case):
    timm = pytest.importorskip("timm")
    torch.set_default_dtype(torch.float64)
    try:
        model = filled(timm.create_model(case["model"], num_classes=10, **case["kwargs"]).double())
    finally:
        torch.set_default_dtype(torch.float32)
    generator = {"translation": "translation_x"}.get(case["transform"], case["transform"])
    report = lm.layerwise_equivariance_error(
        model,
        waves(case["batch"], case["size"]),
        generator,
        probes="exact",
        output="probabilities",
        resampling=lm.PAPER,
    )
    found = {row.name: row.squared_norm * report.dimension for row in report.by("module")}
    for path, wanted in case["squared_norm"].items():
        assert found[path] == pytest.approx(wanted, rel=1e-8), path
    assert report.residual[generator] < 1e-12


def test_contribution_of_a_module_by_hand():
    """Of a chain h∘g∘f the middle part adds J_h · L g (f)."""
    torch.manual_seed(0)
    f, g = nn.Conv2d(3, 4, 3, padding=1).double(), nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Tanh()).double()
    h = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).double()
    model, x = nn.Sequential(f, g, h), images(1)
    report = lm.layerwise_equivariance_error(model, x, "rotation", probes="exact")
    y = f(x).detach()
    local = lm.lie_derivative(g, y, "rotation")["rotation"].detach()
    _, wanted = torch.func.jvp(h, (g(y).detach(),), (local,))
    row = next(row for row in report.by("module") if row.name == "1")
    assert row.squared_norm == pytest.approx(wanted.square().mean().item(), rel=1e-10)
    total = lm.lie_derivative(model, x, "rotation")["rotation"]
    assert row.share == pytest.approx(((wanted * total).sum() / total.square().sum()).item(), rel=1e-9)


def test_granularities():
    model = Tricky().double()
    report = lm.layerwise_equivariance_error(model, images(2), ("rotation", "scale"), probes="exact")
    for rows in (report.by("op"), report.by("type"), report.by("module", depth=0), report.by("module", depth=1)):
        for generator in report.names:
            assert sum(row.share for row in rows if row.generator == generator) == pytest.approx(1, abs=1e-9)
        assert sum(row.calls for row in rows) == 2 * len(report.operations)
    modules = {row.name: row for row in report.by("module") if row.generator == "rotation"}
    assert set(modules) == {"", "conv", "twice", "act", "head"}
    assert modules["twice"].calls == 4  # each pads, and convolves
    assert modules["act"].calls == 2
    L = lm.lie_derivative(model, images(2), "rotation")["rotation"]
    assert modules[""].squared_norm == pytest.approx(L.square().mean().item(), rel=1e-9)
    assert modules[""].share == pytest.approx(1)
    kinds = {row.name for row in report.by("type")}
    assert {
        "padding",
        "convolution",
        "activation",
        "addition of a constant",
        "residual addition",
        "down-sampling",
        "head",
    } <= kinds
    assert "completeness error" in str(report)


def test_random_probes_agree_with_exact_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(196, 40)).double()
    x = images(1)
    exact = {row.name: row for row in lm.layerwise_equivariance_error(model, x, "rotation", probes="exact").by("op")}
    random = lm.layerwise_equivariance_error(model, x, "rotation", probes=30, seed=1)
    assert not random.exact
    for row in random.by("op"):
        wanted = exact[row.name]
        assert abs(row.squared_norm - wanted.squared_norm) <= 4 * row.standard_error + 1e-20
        assert row.share == pytest.approx(wanted.share, rel=1e-11, abs=1e-13)  # no matter of probes
    other = lm.layerwise_equivariance_error(model, x, "rotation", probes=30, seed=2)
    assert not torch.equal(other.vectors, random.vectors)
    torch.testing.assert_close(other.products, random.products, rtol=1e-12, atol=1e-14)


SMALL = {
    "cnn": lambda: cnn(12),
    "tricky": lambda: Tricky().double(),
    "down": lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU()] * 3, nn.Flatten(), nn.Linear(12, 7)).double(),
}


@pytest.mark.parametrize("name", SMALL)
def test_shares_are_those_of_one_hot_cotangents(name):
    """One cotangent for each generator gives what one for each element of the output gives."""
    torch.manual_seed(1)
    model, x = SMALL[name](), images(4)
    some = "rotation", "translation_x"
    alone, exact = (lm.layerwise_equivariance_error(model, x, some, probes=p) for p in (None, "exact"))
    assert alone.vectors is None
    assert not alone.exact
    for one, other in zip(alone.by("op"), exact.by("op"), strict=True):
        assert one.share == pytest.approx(other.share, rel=1e-12, abs=1e-12)
        assert one.share_standard_error == pytest.approx(other.share_standard_error, rel=1e-9, abs=1e-12)
        assert (one.squared_norm, one.standard_error) == (None, None)
    L = lm.lie_derivative(model, x, some)
    whole = torch.stack([L[generator].flatten(1) for generator in some])
    torch.testing.assert_close(alone.squares, whole.square().sum(2), rtol=1e-11, atol=0)
    by_image = (exact.vectors.reshape(-1, *whole.shape) * whole).sum(3)
    torch.testing.assert_close(alone.products, by_image, rtol=1e-10, atol=1e-13)


def test_few_outputs_are_taken_one_by_one():
    """As many backward passes as there are elements give everything, and cost no more."""
    model, x = cnn(3), images(2)
    for generators, probes, exact in (
        (TWO, None, True),
        (TWO[:2], None, False),
        (TWO[:1], 2, True),
        (TWO[:1], 1, False),
    ):
        report = lm.layerwise_equivariance_error(model, x, generators, probes=probes)
        assert report.exact == exact
        assert (report.vectors is None) == (not exact and probes is None)


@pytest.mark.parametrize("count", [5, 70])
def test_standard_errors_of_shares_by_a_loop(count):
    """Leave out each group of images in turn: image i is in group i mod 64, and groups are of two sizes."""
    report = lm.layerwise_equivariance_error(cnn(5), images(count, 8), ("rotation", "scale"))
    groups = [[i for i in range(count) if i % 64 == g] for g in range(min(count, 64))]
    for row in report.by("type"):
        k = report.names.index(row.generator)
        chosen = [i for i, operation in enumerate(report.operations) if operation.kind == row.name]
        part, whole = report.products[chosen].sum(0)[k].tolist(), report.squares[k].tolist()
        share = sum(part) / sum(whole)
        assert row.share == pytest.approx(share, rel=1e-10, abs=1e-15)
        variance = 0.0
        pseudo = []
        for group in groups:
            h = count / len(group)
            kept = [i for i in range(count) if i not in group]
            pseudo.append((h, h * share - (h - 1) * sum(part[i] for i in kept) / sum(whole[i] for i in kept)))
        mean = sum(value for _, value in pseudo) / len(groups)
        variance = sum((value - mean) ** 2 / (h - 1) for h, value in pseudo) / len(groups)
        assert row.share_standard_error == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-14)


class Shuffles(nn.Module):
    """Images do not influence one another, but inside they do not come first: windows do."""

    def forward(self, x):
        y = x.unflatten(3, (2, -1)).permute(3, 0, 1, 2, 4).flatten(0, 1)  # (windows · images, C, H, W / 2)
        y = (y.sin() * 3).tanh().unflatten(0, (2, -1)).permute(1, 2, 3, 0, 4).flatten(3)
        return y.mean((2, 3)).cos()


class Mixes(nn.Module):
    """The images of a batch influence one another."""

    def forward(self, x):
        return (x * (1 + x.sin().mean(0, keepdim=True))).flatten(1)[:, :5]


class NoSplit(nn.Module):
    """A tensor that holds all images and cannot be split into them."""

    def forward(self, x):
        y = torch.cat([x.sin(), x.new_zeros(1, *x.shape[1:])])
        return (y * 2).exp()[: len(x)].flatten(1)[:, 100:105]


@pytest.mark.parametrize("make", [Shuffles, Mixes, NoSplit, lambda: cnn(5)])
def test_images_are_measured_together_only_where_that_is_the_same(make, monkeypatch):
    model, x = make(), images(3)
    many = lm.layerwise_equivariance_error(model, x, "rotation")
    monkeypatch.setattr(layerwise, "_TOGETHER", 1)
    one = lm.layerwise_equivariance_error(model, x, "rotation")
    torch.testing.assert_close(many.products, one.products, rtol=1e-9, atol=1e-12 * float(one.squares.max()))
    torch.testing.assert_close(many.squares, one.squares, rtol=1e-9, atol=0)
    assert max(many.residual.values()) < 1e-11


@pytest.mark.parametrize("count", [1, 29, 30])
def test_few_images_are_told_of(count):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lm.layerwise_equivariance_error(cnn(5), images(count, 8), "rotation")
    told = [str(warning.message) for warning in seen if "Shares of" in str(warning.message)]
    assert len(told) == (count < 30)
    assert all(f"Shares of {count} image" in message and "51 to 201 %" in message for message in told)


@pytest.mark.parametrize("probes", [None, 2, "exact"])
def test_the_residual_sees_a_flow_that_is_lost(probes, monkeypatch):
    """Half of what flows into the first calls is left out: shares no longer add up to 1, and by so much."""
    model, x = Tricky().double(), images(3)
    true = lm.layerwise_equivariance_error(model, x, "rotation", probes=probes)
    right = flows_._gradients

    def halved(flows, *rest):
        found = right(flows, *rest)
        return {flow: gradient / (2 if flow.variable.producer is None else 1) for flow, gradient in found.items()}

    monkeypatch.setattr(flows_, "_gradients", halved)
    with pytest.warns(UserWarning, match=r"The contributions miss .* Shares do not add up to 1"):
        report = lm.layerwise_equivariance_error(model, x, "rotation", probes=probes)
    assert true.residual["rotation"] < 1e-11
    # All that flows in comes from the image: Df[X·x] = L f, for an output that is invariant.
    assert sum(row.share for row in report.by("op")) == pytest.approx(0.5, abs=1e-9)
    assert report.residual["rotation"] == pytest.approx(0.5, abs=1e-9)


class TwoSteps(nn.Module):
    """A padding and a convolution without, written by hand."""

    def __init__(self, conv, mode):
        super().__init__()
        self.conv, self.mode = conv, mode

    def forward(self, x):
        padded = F.pad(x, (2, 2, 1, 1), mode=self.mode)
        return F.conv2d(padded, self.conv.weight, self.conv.bias, self.conv.stride)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_told_apart(mode, stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, (3, 5), stride, (1, 2), padding_mode=mode).double()
    tail, x = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(4 * (16 // stride) ** 2, 6)).double(), images(2)
    one = lm.layerwise_equivariance_error(nn.Sequential(conv, tail), x, TWO)
    two = lm.layerwise_equivariance_error(
        nn.Sequential(TwoSteps(conv, {"zeros": "constant"}.get(mode, mode)), tail), x, TWO
    )
    names = [operation.function for operation in one.operations]
    assert names == [operation.function for operation in two.operations]
    assert [operation.kind for operation in one.operations[:2]] == [
        "padding", "convolution" if stride == 1 else "strided convolution"
    ]  # fmt: skip
    torch.testing.assert_close(one.products, two.products, rtol=1e-10, atol=1e-12)
    assert max(one.residual.values()) < 1e-12


def test_same_padding_of_even_kernels():
    conv = nn.Conv2d(3, 4, 4, padding="same", dilation=(1, 2)).double()
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(1024, 6).double())
    report = lm.layerwise_equivariance_error(model, images(1), TWO)
    assert report.operations[0].representation == repr(R.Padded(R.Image(), (3, 3, 1, 2)))
    assert max(report.residual.values()) < 1e-12


def test_a_padding_moves_with_the_image_but_at_the_border():
    """An image that is zero near its edges moves alike with a border of zeros: its padding adds nothing."""
    x = torch.zeros(1, 3, 24, 24, dtype=torch.float64)
    x[:, :, 8:16, 8:16] = images(1, 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 24**2, 6)).double()
    report = lm.layerwise_equivariance_error(model, x, ("translation_x", "rotation", "scale"))
    shares = {row.name: row.share for row in report.by("type") if row.generator == "rotation"}
    assert abs(shares["padding"]) < 1e-3  # the spline's tail, 0.27 a pixel
    full = lm.layerwise_equivariance_error(model, images(1, 24), "rotation")
    assert abs(next(row.share for row in full.by("type") if row.name == "padding")) > 1e-2


def test_borders_go_with_the_windows_that_they_were_made_for():
    class Padded(nn.Module):
        def forward(self, x):
            y = F.pad(x, (0, 2, 0, 2)).permute(0, 2, 3, 1)
            y = F.pad(F.pad(x, (2, 2, 2, 2)).relu() + 1, (1, 1, 1, 1))  # 22 pixels, 3 of them around
            y = F.max_pool2d(F.avg_pool2d(y, 3, 1), kernel_size=3, stride=1)  # 18
            return F.interpolate(y, size=(16, 16)).flatten(1)[:, 130:136]

    report = lm.layerwise_equivariance_error(Padded(), images(1), "rotation")
    made = [(operation.function, operation.representation) for operation in report.operations]
    around = lambda n: repr(R.Padded(R.Image(), (n,) * 4))  # noqa: E731
    assert made[:1] == [("pad", repr(R.Padded(R.Image(), (0, 2, 0, 2))))]
    assert made[2:7] == [
        ("pad", around(2)),
        ("relu", around(2)),
        ("add", around(2)),
        ("pad", around(3)),
        ("avg_pool2d", around(2.0)),
    ]
    assert [name for _, name in made[7:9]] == [around(1.0), "Image()"]


def test_chunks_and_float32():
    model, x = MODELS["cnn"](), images(2)
    wanted = lm.layerwise_equivariance_error(model, x, probes=3)
    chunked = lm.layerwise_equivariance_error(model, x, probes=3, chunk_size=2)
    torch.testing.assert_close(chunked.vectors, wanted.vectors, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(chunked.products, wanted.products, rtol=1e-9, atol=1e-12)
    single = lm.layerwise_equivariance_error(model.float(), x.float())
    assert max(single.residual.values()) < 1e-3


def test_actions_of_hidden_tensors_are_shown_and_can_be_given():
    model = cnn(3)
    x = images(1)
    assumed = lm.layerwise_equivariance_error(model, x, "rotation", probes="exact")
    assert assumed.assumed["Image()"] >= 6
    assert assumed.assumed["Invariant()"] >= 2
    given = lm.layerwise_equivariance_error(model, x, "rotation", probes="exact", representations={"0": R.Invariant()})
    assert given.operations[0].representation == "Invariant()"
    assert given.residual["rotation"] < 1e-11
    first = [report.by("module", 1)[0].squared_norm for report in (assumed, given)]
    assert first[0] != pytest.approx(first[1], rel=1e-3)


def test_a_position_embedding_is_seen():
    """It is no module: an addition of a constant that does not move with the image."""
    pytest.importorskip("timm")
    rows = lm.layerwise_equivariance_error(vit(), images(1), "translation_x").by("op")
    row = next(row for row in rows if row.name.endswith(":model:add"))
    assert row.share != 0


def test_the_model_is_left_as_it_was():
    model = cnn().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            self.body(x)
            raise RuntimeError("planted")

    lm.layerwise_equivariance_error(model, images(), "rotation", probes=2)
    with pytest.raises(RuntimeError, match="planted"):
        lm.layerwise_equivariance_error(Fails(), images(), "rotation", probes=2)
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


class SinCos(torch.autograd.Function):
    """No torch function: nothing but its node in autograd's graph is seen, with two outputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, g, h):
        x = ctx.saved_tensors[0]
        return g * x.cos() - h * x.sin()


def _by_hand(f, g, x, generator="rotation"):
    """J_g · L f, the contribution of f in g(f(x)), with images between them."""
    local = lm.lie_derivative(f, x, generator, output_representation=R.Image(), method="double_backward")[generator]
    return torch.func.jvp(g, (f(x).detach(),), (local.detach(),))[1].flatten()


def _vector(report, function):
    (index,) = [i for i, operation in enumerate(report.operations) if operation.function == function]
    return report.vectors[index, 0]


@pytest.mark.filterwarnings("ignore:Method")
def test_what_is_no_torch_function_is_an_operation_as_well():
    conv = nn.Conv2d(3, 2, 3, 2).double()
    head = lambda y: conv(y).flatten(1)[:, :4]  # noqa: E731
    x = images(1)
    report = lm.layerwise_equivariance_error(lambda x: head(OldSquare.apply(x)), x, "rotation", probes="exact")
    torch.testing.assert_close(_vector(report, "OldSquare"), _by_hand(OldSquare.apply, head, x), rtol=1e-9, atol=1e-12)
    assert report.residual["rotation"] < 1e-11

    def both(x):
        sine, cosine = SinCos.apply(x)
        return head(sine * 2) + head(cosine.exp())

    report = lm.layerwise_equivariance_error(both, x, "rotation", probes="exact")
    assert report.residual["rotation"] < 1e-11
    stacked = lambda x: torch.cat(SinCos.apply(x), 1)  # noqa: E731
    rest = lambda y: head(y[:, :3] * 2) + head(y[:, 3:].exp())  # noqa: E731
    torch.testing.assert_close(_vector(report, "SinCos"), _by_hand(stacked, rest, x), rtol=1e-9, atol=1e-12)


class Squares(nn.Module):
    def forward(self, x):
        return OldSquare.apply(x)


@pytest.mark.filterwarnings("ignore:Method", "ignore:`torch.jit")
def test_where_an_operation_without_a_torch_function_was_made():
    torch.manual_seed(0)
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(3 * 256, 3)).double()
    x = images(2)
    made = [(op.path, op.function) for op in _operations(nn.Sequential(Squares(), head), x)]
    assert made[:2] == [("0", "OldSquare"), ("1.0", "relu")]
    scripted = torch.jit.script(nn.Sequential(nn.Tanh(), nn.Softplus()).double())
    made = [(op.path, op.function) for op in _operations(nn.Sequential(scripted, head), x)]
    assert made[:2] == [("", "Softplus"), ("1.0", "relu")]  # scripted modules do not say that they are called


def _operations(model, x):
    report = lm.layerwise_equivariance_error(model, x, "rotation")
    assert report.residual["rotation"] < 1e-11
    return report.operations


def test_flows_that_follow_from_others(monkeypatch):
    """Kirchhoff's law spares computations: the contributions are those of computing everything."""
    model, x = Tricky().double(), images(2)
    spared = lm.layerwise_equivariance_error(model, x, TWO, probes=2)
    counts = []

    def all_of_them(flows, conserving):
        counts.append((len(flows), len(layerwise_independent(flows, conserving)[0])))
        return list(flows), []

    layerwise_independent = flows_._independent
    monkeypatch.setattr(flows_, "_independent", all_of_them)
    wanted = lm.layerwise_equivariance_error(model, x, TWO, probes=2)
    assert counts[0][1] < counts[0][0]
    torch.testing.assert_close(spared.vectors, wanted.vectors, rtol=1e-9, atol=1e-12)
    commuting = [index for index, operation in enumerate(spared.operations) if operation.commutes]
    assert commuting
    assert spared.vectors[commuting].abs().max() == 0


def test_tensors_changed_through_views():
    def model(x):
        y = x.tanh() * 2
        y[:, 0].mul_(3)
        y[:, :2, 1:] += x[:, :2, 1:]
        z = y.flatten(2)
        torch.ops.aten.add_.Scalar(z, -1)
        F.relu(input=z, inplace=True)
        return (y * z.reshape(y.shape)).flatten(1)[:, 20:24]

    x = images(1)
    report = lm.layerwise_equivariance_error(model, x, TWO)
    assert max(report.residual.values()) < 1e-12
    assert sum(row.share for row in report.by("op") if row.generator == "rotation") == pytest.approx(1)


def test_a_change_behind_the_graph_is_refused(monkeypatch):
    def model(x):
        y = (x + 1).exp() + 2
        y.detach().mul_(2)
        return y.flatten(1)[:, :3]

    # Whatever the Lie derivative is, contributions would be those of another function.
    found = linearise(lambda x: model(x.clone()), images(1), lm.generators("rotation"), Options(method="difference"))
    monkeypatch.setattr(layerwise, "linearise", lambda *args, **kwargs: found)
    with pytest.raises(RuntimeError, match=r"`model` changes a tensor in place .* after Operation.*'add'"):
        lm.layerwise_equivariance_error(model, images(1), "rotation", probes=1)


def test_parameters_of_a_function_are_constants():
    conv = nn.Conv2d(3, 8, 3, padding=1).double()
    report = lm.layerwise_equivariance_error(
        lambda x: F.conv2d(x, conv.weight * 2, conv.bias).flatten(1)[:, :3], images(1), "rotation"
    )
    assert [operation.function for operation in report.operations] == ["conv2d", "flatten", "getitem", "output"]
    assert conv.weight.grad is None


class Ungraded(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            factor = x * 2
        return x * factor


class Item(nn.Module):
    def forward(self, x):
        return x * x.mean().item()


def test_what_is_missed_is_said():
    tail = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).double()
    with pytest.warns(UserWarning, match=r"contributions miss .*without gradients, such as \['mul in 0'\]"):
        report = lm.layerwise_equivariance_error(nn.Sequential(Ungraded(), tail), images(1), "rotation")
    assert report.residual["rotation"] > 1e-3
    with pytest.warns(UserWarning, match=r"contributions miss .*detaches tensors.*'detach in 0'"):
        lm.layerwise_equivariance_error(nn.Sequential(Detaches(), cnn()), images(1), "rotation", probes=1)
    # Nothing follows a number that left torch, so that there is no Lie derivative to take apart.
    with pytest.raises(RuntimeError, match="derivative that agrees with its own central differences"):
        lm.layerwise_equivariance_error(nn.Sequential(Item(), cnn()), images(1), "rotation", probes=1)


@pytest.mark.parametrize(("status", "told"), [("agrees", 0), ("inconclusive", 1)])
def test_a_cut_that_misses_nothing_is_told_of_where_nothing_was_checked(monkeypatch, status, told):
    """Where no check was conclusive the Lie derivative may miss what the contributions miss."""
    model = lambda x: x.flatten(1)[:, :3] + 0 * x.detach().sum()  # noqa: E731
    found = linearise(model, images(1), lm.generators("rotation"))
    check = dataclasses.replace(found.check, status=status)
    monkeypatch.setattr(layerwise, "linearise", lambda *args, **kwargs: dataclasses.replace(found, check=check))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lm.layerwise_equivariance_error(model, images(1), "rotation")
    assert sum("detaches tensors" in str(warning.message) for warning in seen) == told


def test_a_view_of_a_tensor_that_changes():
    def model(x):
        y = x * 2
        view = y[:, :1]
        y.mul_(3)  # changes the view behind its back
        return (view * y).flatten(1)[:, :3]

    assert lm.layerwise_equivariance_error(model, images(1), "rotation").residual["rotation"] < 1e-12


def test_a_zero_derivative_has_an_absolute_residual():
    with pytest.warns(UserWarning, match=r"zero or rounding \(rotation\), so that shares of it are NaN"):
        report = lm.layerwise_equivariance_error(lambda x: x.flatten(1)[:, :2] * 0, images(1), "rotation")
    assert report.residual["rotation"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probes", ["exact", 3])
def test_no_shares_of_rounding(dtype, probes):
    """A model that is equivariant exactly along one generator has shares along the other alone."""
    torch.manual_seed(0)
    periodic = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(periodic, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).to(dtype)
    both, stencil = ("translation_x", "saturation"), lm.Resampling("fourier")
    with pytest.warns(UserWarning, match=r"zero or rounding \(translation_x\), so that") as told:
        report = lm.layerwise_equivariance_error(
            model, images(2).to(dtype), both, probes=probes, resampling=stencil, representations={"": R.Invariant()}
        )
    assert [entry.filename for entry in told] == [__file__] * 2
    assert report.residual["translation_x"] < 1e4 * torch.finfo(dtype).eps  # the absolute one
    shares = {(row.name, row.generator): row.share for row in report.by("module")}
    assert all(math.isnan(shares[name, "translation_x"]) for name in ("", "0", "3"))
    assert shares["", "saturation"] == pytest.approx(1, abs=1e-5)
    assert report.rounding.shape == (2,)
    assert "nan" in str(report)


def test_a_small_derivative_is_no_rounding():
    """Shares stand as long as most digits of the whole do."""
    model = lambda x: x.flatten(1)[:, :2] * 1e-9 + 1  # noqa: E731
    report = lm.layerwise_equivariance_error(model, images(1), "rotation")
    assert sum(row.share for row in report.by("op")) == pytest.approx(1, abs=1e-9)


class Frozen(nn.Module):
    """A backbone that is not trained, as feature extractors are written."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 1)))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))

    def forward(self, x):
        with torch.no_grad():
            y = self.backbone(x)
        return self.head(x + y)


def test_a_backbone_without_gradients_is_named():
    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match=r"contributions miss .* such as \['conv2d in backbone'\]\. Shares do not add up to 1"
    ):
        report = lm.layerwise_equivariance_error(Frozen().double(), images(1), "rotation")
    assert report.residual["rotation"] > 1e-2
    assert abs(sum(row.share for row in report.by("op")) - 1) == pytest.approx(report.residual["rotation"], rel=1e-9)


class Cuts(nn.Module):
    """A straight-through estimator's detached branch: the function moves where gradients do not see it."""

    def forward(self, x):
        return x + (x.sin() * 3).detach()


def test_a_detached_branch_is_missed():
    """The Lie derivative is that of the function; gradients do not see what is detached."""
    model = nn.Sequential(Cuts(), cnn())
    with pytest.warns(UserWarning, match=r"contributions miss .*detaches tensors.*'detach in 0'.* do not add up to 1"):
        report = lm.layerwise_equivariance_error(model, images(1), "rotation")
    assert report.residual["rotation"] > 1e-2


def test_what_gives_no_number_is_the_worst():
    """A gradient that is NaN is told of, whatever the other generators have."""

    def model(x):
        nothing = x.mean((2, 3)) * 0
        # Backwards the slope of the root at zero is taken times zero; forwards it is left out.
        y = torch.where(nothing > 0, nothing.sqrt(), 0.0)
        return x.flatten(1)[:, :2] + y[:, :2]

    with pytest.warns(UserWarning, match=r"contributions miss nan"):
        report = lm.layerwise_equivariance_error(model, images(1), "rotation", probes=1)
    assert math.isnan(report.residual["rotation"])


class Reentrant(nn.Module):
    def forward(self, x):
        return checkpoint(torch.tanh, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpoints_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), Reentrant(), nn.Flatten(), nn.Linear(392, 2)).double()
    with pytest.raises(RuntimeError, match=r"`use_reentrant=False`, got reentrant checkpointing in 1"):
        lm.layerwise_equivariance_error(model, images(1), "rotation")


def test_checkpoints_that_are_not_reentrant():
    model = lambda x: checkpoint(lambda y: y.tanh().flatten(1)[:, :3], x.sin(), use_reentrant=False)  # noqa: E731
    assert lm.layerwise_equivariance_error(model, images(1), "rotation").residual["rotation"] < 1e-12


class Anything(R.Invariant):
    """A representation that any tensor has."""


def test_nothing_to_measure():
    with pytest.raises(ValueError, match=r"`output` must be non-empty, got shape \(1, 0\).*nothing is measured"):
        lm.layerwise_equivariance_error(lambda x: x.flatten(1)[:, :0], images(2), "rotation")
    for given in (None, Anything()):
        with pytest.raises(ValueError, match=r"`inputs` must be non-empty, got shape \(0, 3, 16, 16\)"):
            lm.layerwise_equivariance_error(cnn(), images(2)[:0], "rotation", input_representation=given)


class Encoder(nn.Module):
    """A module that is used by a method; it has no forward."""

    def __init__(self):
        super().__init__()
        self.body = cnn(3)

    def encode(self, x):
        return self.body(x)


@pytest.mark.parametrize("function", ["encode", lambda model, x: model.encode(x)])
def test_another_function_than_forward(function):
    model, x = Encoder(), images(1)
    report = lm.layerwise_equivariance_error(model, x, "rotation", function=function)
    wanted = lm.layerwise_equivariance_error(model.body, x, "rotation")
    torch.testing.assert_close(report.products, wanted.products, rtol=1e-12, atol=0)
    assert [op.path for op in report.operations[:3]] == ["body.0", "body.0", "body.1"]


def test_calls_that_depend_on_the_image(monkeypatch):
    monkeypatch.setattr(layerwise, "_TOGETHER", 1)

    def model(x):
        return (x.sin() if x.mean() > 0 else x).flatten(1)[:, :3]

    x = images(2)
    x = torch.cat([x[:1] - x[:1].mean() + 1, x[1:] - x[1:].mean() - 1])
    with pytest.raises(RuntimeError, match="`model` must call the same functions for every image"):
        lm.layerwise_equivariance_error(model, x, "rotation")


class Ten(nn.Module):
    """Names of modules one of which begins as another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer1, self.layer10 = (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(768, 2)

    def forward(self, x):
        return self.head(self.layer10(self.layer1(x)).flatten(1))


def test_representations_go_by_whole_names():
    def carried(representations):
        report = lm.layerwise_equivariance_error(Ten().double(), images(1), "rotation", representations=representations)
        return {op.path: op.representation for op in report.operations if op.path}

    assert carried({"layer1": R.Invariant()}) == {
        "layer1.0": "Invariant()",
        "layer1.1": "Invariant()",
        "layer10.0": "Image()",
        "layer10.1": "Image()",
        "head": "Invariant()",
    }
    inner = {"": R.Invariant(), "layer1.1": R.Image(), "layer1": R.Invariant()}
    wanted = {"layer1.0": "Invariant()", "layer1.1": "Image()", "layer10.0": "Invariant()"}
    assert carried(inner).items() >= wanted.items()  # the innermost, in whatever order
    assert carried({"layer10": R.Tokens((2, 2))}) == carried(None)  # where they fit


class Shared(nn.Module):
    """One block in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        self.first, self.second = nn.Sequential(block), nn.Sequential(block, nn.Conv2d(3, 3, 1))
        self.head = self.alias = nn.Linear(768, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)).flatten(1))


def test_a_module_in_two_places():
    """Calls belong to the place from which they come, so that rows of modules nest."""
    report = lm.layerwise_equivariance_error(Shared().double(), images(1), "rotation")
    calls = {row.name: row.calls for row in report.by("module")}
    assert calls == {
        "": 10,
        "first": 3,
        "first.0": 3,
        "first.0.0": 2,
        "first.0.1": 1,
        "second": 4,
        "second.0": 3,
        "second.0.0": 2,
        "second.0.1": 1,
        "second.1": 1,
        "head": 1,
    }
    rows = report.by("module", depth=1)
    assert sum(row.calls for row in rows) == 10
    given = lm.layerwise_equivariance_error(
        Shared().double(), images(1), "rotation", representations={"second.0": R.Invariant()}
    )
    made = {op.path: op.representation for op in given.operations}
    assert (made["first.0.1"], made["second.0.1"]) == ("Image()", "Invariant()")


def _noisy(x):
    y = F.dropout(x.sin(), 0.5, training=True) * torch.rand_like(x)
    return F.gumbel_softmax(y.flatten(1)[:, :4] + 0 * y.sum(), dim=1)


@pytest.mark.parametrize("probes", ["exact", 2])
def test_random_operations_draw_the_same_for_values_and_contributions(probes):
    state = torch.get_rng_state()
    report = lm.layerwise_equivariance_error(_noisy, images(2), TWO, probes=probes)
    assert max(report.residual.values()) < 1e-12
    assert torch.equal(torch.get_rng_state(), state)


MASK = torch.ones(16, 16, dtype=torch.bool).tril()
MASK[3] = False  # a query that sees nothing


def _masked(x, value):
    """Scores that are taken for maps, masked before the softmax."""
    tokens = F.avg_pool2d(x, 4).flatten(2).mT[:, None] * 3
    scores = (tokens @ tokens.mT).expand(-1, 2, -1, -1).masked_fill(~MASK, value)
    return (scores[:, :, 4:].softmax(-1) @ tokens).flatten(1)[:, ::19]


def _attends(x):
    tokens = F.avg_pool2d(x, 4).flatten(2).mT[:, None]
    return F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=MASK).flatten(1)[:, 4:16]


MASKED = {
    "minus infinity": lambda x: _masked(x, -torch.inf),
    "lowest": lambda x: _masked(x, torch.finfo(x.dtype).min),
    "boolean": _attends,
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_attention(name, dtype):
    """Masks carry no action; a query that is masked everywhere attends to nothing, and moves nothing."""
    x = images(1).to(dtype)
    report = lm.layerwise_equivariance_error(MASKED[name], x, TWO, probes="exact")
    found = report.vectors.sum(0)
    wanted = _whole(MASKED[name], x)
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-12)


def _whole(model, x, generators=TWO):
    """The Lie derivative of a model whose output is invariant, by its Jacobian in reverse mode: shape (K, B·n)."""
    rows = []
    for image in x.split(1):
        tangents = R.Image().tangents(image, lm.generators(*generators), lm.Resampling()).flatten(1)
        jacobian = torch.autograd.functional.jacobian(lambda y: model(y).flatten(), image).flatten(1)
        rows.append(tangents.double() @ jacobian.double().mT)
    return torch.cat(rows, 1)


@torch.library.custom_op("lie_metric_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_autograd(
    lambda ctx, g: 2 * ctx.saved_tensors[0] * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def _changes_in_place(y):
    y = y * 2
    y[0].mul_(3)
    return y.add_(1).sin()


def _complex_views(x):
    z = torch.fft.fft2(x)
    z.real.mul_(3)
    z.mul_(1 + 2j)
    z[:, 0] += z[:, 1].conj()
    z.conj_physical_()
    return torch.fft.ifft2(z).real


FILTER = torch.randn(3, 16, 9, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
CONSTRUCTS = {
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * FILTER),
    "ifft of a phase": lambda x: torch.fft.ifft2(torch.fft.fft2(x) * torch.exp(1j * x)).real,
    "complex views": _complex_views,
    "imaginary part": lambda x: torch.fft.fft2(x).imag,
    "parts of spectrum": lambda x: torch.view_as_real(torch.fft.fft2(x)).sum(-1).tanh(),
    "complex numbers": lambda x: (torch.complex(x, x.sin()).pow(2) @ (x + 2j * x)).imag,
    "vmap": lambda x: torch.vmap(lambda y: y * y.sin())(x.tanh()),
    "vmap in place": lambda x: torch.vmap(_changes_in_place)(x.tanh()),
    "gradient": lambda x: torch.func.grad(lambda y: (y.sin() * y * x).sum())(x.tanh()),
    "hessian": lambda x: torch.vmap(torch.func.hessian(lambda y: (y**3).sum()))(x[:, :, :2, :2].flatten(1)).sum((1, 2))[
        :, None, None, None
    ],
    "jvp": lambda x: torch.func.jvp(lambda y: (y * y).sin(), (x.tanh(),), (x,))[1],
    "custom operation": lambda x: square(x.tanh()),
    "subclass": lambda x: x.tanh().as_subclass(torch.Tensor),
    "gradient by autograd": lambda x: _inner_gradient(x),
}


def _inner_gradient(x):
    with torch.enable_grad():
        y = x.tanh() if x.requires_grad else x.tanh().requires_grad_()
        return torch.autograd.grad((y.sin() * y).sum(), y, create_graph=True)[0]


def _beside_a_residual(construct):
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 3, 3, padding=1).double(), nn.Linear(48, 3).double()
    return lambda x: head(F.adaptive_avg_pool2d((x + construct(conv(x))).sin(), 4).flatten(1))


@pytest.mark.filterwarnings("ignore:The contributions miss", "ignore:Method")
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_contributions_of_what_torch_functions_hide(name):
    model, x = _beside_a_residual(CONSTRUCTS[name]), images(2)
    report = lm.layerwise_equivariance_error(model, x, TWO, probes="exact")
    torch.testing.assert_close(report.vectors.sum(0), _whole(model, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_residuals_of_what_torch_functions_hide(name):
    report = lm.layerwise_equivariance_error(_beside_a_residual(CONSTRUCTS[name]), images(2), TWO)
    assert max(report.residual.values()) < 1e-10


def test_complex_tensors_are_invariant_unless_told():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x)

    whole = nn.Sequential(Spectrum(), Magnitude()).double()
    x = images(1)
    free = lm.layerwise_equivariance_error(whole, x, "rotation", probes="exact")
    assert free.operations[0].representation == "Invariant()"
    told = lm.layerwise_equivariance_error(whole, x, "rotation", probes="exact", representations={"0": R.Image()})
    assert told.operations[0].representation == "Image()"
    moved = R.Image().tangents(x, lm.generators("rotation"), lm.Resampling())[0]
    z = torch.fft.fft2(x)
    acted = [R.Image().tangents(part, lm.generators("rotation"), lm.Resampling())[0] for part in (z.real, z.imag)]
    local = torch.fft.fft2(moved) - torch.complex(*acted)
    wanted = (2 * (z.conj() * local).real).flatten(1)[0, 1:4]
    torch.testing.assert_close(told.vectors[0, 0], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(told.vectors.sum(0), free.vectors.sum(0), rtol=1e-10, atol=1e-10)


class Magnitude(nn.Module):
    def forward(self, z):
        return (z * z.conj()).real.flatten(1)[:, 1:4]


@pytest.mark.parametrize("probes", ["exact", 5])
def test_norms_and_standard_errors_by_hand(probes):
    """Means and their standard errors over images of the rows of vectors; over probes for one image."""
    torch.manual_seed(0)
    model, names = nn.Sequential(nn.Conv2d(3, 2, 3, 2), nn.Tanh(), nn.Flatten()).double(), ("rotation", "scale")
    report = lm.layerwise_equivariance_error(model, images(3), names, probes=probes)
    for row in report.by("type"):
        chosen = [i for i, operation in enumerate(report.operations) if operation.kind == row.name]
        sums = report.vectors[chosen].sum(0)[report.names.index(row.generator)].reshape(3, -1)
        samples = sums.square().mean(1) / (98 if probes == 5 else 1)
        assert row.squared_norm == pytest.approx(float(samples.mean()), rel=1e-12, abs=1e-30)
        error = float(samples.std()) / math.sqrt(3)
        assert row.standard_error == pytest.approx(error, rel=1e-12, abs=1e-30)
    one = lm.layerwise_equivariance_error(model, images(1), "rotation", probes=probes)
    for row in one.by("op"):
        samples = one.vectors[int(row.name.split(":")[0]), 0].square() / 98
        wanted = math.nan if probes == "exact" else float(samples.std()) / math.sqrt(5)
        assert row.standard_error == pytest.approx(wanted, nan_ok=True)
        assert math.isnan(row.share_standard_error)


def test_frame_and_plot(tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    report = lm.layerwise_equivariance_error(cnn(), images(2), ("rotation", "scale"), probes=2)
    frame = report.to_frame("type")
    assert list(frame.columns) == [
        "name", "generator", "squared_norm", "share", "calls", "standard_error", "share_standard_error"
    ]  # fmt: skip
    assert frame.groupby("generator")["share"].sum().tolist() == pytest.approx([1, 1])
    figure = report.plot()
    line = figure.axes[1].get_lines()[0].get_ydata()
    assert line[-1] == pytest.approx(1)
    first = next(row for row in report.by("op") if row.generator == "rotation")
    assert line[0] == pytest.approx(first.share)
    figure.savefig(tmp_path / "layers.png")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"probes": 0}, ValueError, r"`probes` must be None \(shares alone\), a positive integer .* or 'exact', got 0"),
        ({"probes": "all"}, ValueError, "`probes` must be"),
        ({"seed": -1}, ValueError, "`seed` must be"),
        (
            {"representations": {"9": R.Image()}},
            ValueError,
            r"`representations` must name modules of the model, got '9'",
        ),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        ({"generators": "turn"}, ValueError, "got 'turn'"),
    ],
)
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        lm.layerwise_equivariance_error(cnn(), images(), **options)
    report = lm.layerwise_equivariance_error(cnn(), images(1), "rotation", probes=1)
    with pytest.raises(ValueError, match="`granularity` must be"):
        report.by("layer")
    with pytest.raises(ValueError, match="`depth` must be"):
        report.by("type", depth=1)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda x: x.permute(0, 2, 3, 1), R.ChannelsLast()),
        (lambda x: x.repeat(1, 1, 2, 2), R.Image()),
        (lambda x: x.repeat(1, 1, 3, 3), R.Invariant()),  # more than a map of this image would have
        (lambda x: x[:, :, :1, :1], R.Invariant()),
        (lambda x: x[:, :, :8, :8].repeat(1, 6, 1, 1).permute(0, 2, 3, 1), R.ChannelsLast()),
        (lambda x: x[:, :, :8], R.Invariant()),  # not the proportions of the image
        (lambda x: x.repeat(1, 6, 1, 1)[:, :16], R.Image()),  # both layouts fit: channels come first
        (lambda x: x.flatten(2).mT, R.Tokens((16, 16))),
        (lambda x: x.flatten(2)[:, :, :17].mT, R.Tokens((4, 4), 1)),
        (lambda x: x.flatten(2)[:, :, :18].mT, R.Tokens((4, 4), 2)),
        (lambda x: x.flatten(2)[:, :, :19].mT, R.Invariant()),
        (lambda x: x.flatten(2)[:, :, :7].mT, R.Invariant()),
        (lambda x: x.flatten(2)[:, :, :16].mT.repeat(2, 1, 1), R.Invariant()),  # not one sequence for each image
    ],
)
def test_actions_that_layouts_suggest(make, wanted):
    x = images(1)
    report = lm.layerwise_equivariance_error(lambda x: make(x).flatten()[:3][None] * 1, x, "rotation")
    made = [operation.representation for operation in report.operations if operation.shape == tuple(make(x).shape)]
    assert made[-1] == repr(wanted)


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 3, 2, 2)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x):
        y = F.conv2d(self.patch_embed(x), self.kernel)
        y = F.conv2d(y, self.kernel, None, 2) + F.conv2d(y, self.kernel, stride=(1, 2))[:, :, ::2]
        y = self.norm(F.relu(y) - 1)
        y = F.interpolate(y, scale_factor=2) * F.conv_transpose2d(y, self.kernel, stride=2, output_padding=1)
        return self.head(F.linear(y.mean((2, 3)), self.kernel[:, :, 0, 0]).softmax(1).cumsum(1))


def test_kinds_of_operations():
    report = lm.layerwise_equivariance_error(Kinds().double(), images(1), "rotation", probes=2)
    assert [op.kind for op in report.operations] == [
        "patch embedding",
        "convolution",
        "strided convolution",
        "strided convolution",
        "layout",
        "residual addition",
        "activation",
        "addition of a constant",
        "normalisation",
        "up-sampling",
        "up-sampling",
        "other",
        "down-sampling",
        "linear",
        "attention",
        "other",
        "head",
        "output",
    ]
    rows = {row.name: row for row in report.by("module")}
    assert (rows["unused"].calls, rows["unused"].squared_norm, rows["unused"].share) == (0, 0, 0)


def test_the_worst_of_what_is_missed_is_told(monkeypatch):
    model, x = cnn(3), images(1)
    found = linearise(model, x, lm.generators("rotation", "scale", "translation_x"))
    for factors, worst in (
        ((3, math.nan, 2), r"miss nan .*\(scale\)"),
        ((1, 2, 5), r"miss 8.0e-01 .*\(translation_x\)"),
    ):
        scaled = found.lie_derivatives * torch.tensor(factors)[:, None, None]
        changed = dataclasses.replace(found, lie_derivatives=scaled)
        monkeypatch.setattr(layerwise, "linearise", lambda *args, changed=changed, **kwargs: changed)
        with pytest.warns(UserWarning, match=worst):
            lm.layerwise_equivariance_error(model, x, ("rotation", "scale", "translation_x"))


class TestPoints:
    """Networks on points: hidden vectors are vectors where they are declared, and everything else is invariant."""

    class VectorNeurons(nn.Module):
        """Linear maps of channels of vectors, and a nonlinearity of their lengths; one planted tanh of components."""

        def __init__(self, planted):
            super().__init__()
            torch.manual_seed(0)
            self.lift, self.mix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))
            self.planted = nn.Tanh() if planted else nn.Identity()
            self.read = nn.Linear(4, 2)

        def forward(self, points):
            centred = points - points.mean(1, keepdim=True)
            vectors = torch.einsum("c,bnk->bnck", self.lift, centred)
            vectors = vectors / (1 + torch.linalg.vecdot(vectors, vectors)[..., None])
            vectors = self.planted(vectors)
            vectors = torch.einsum("dc,bnck->bndk", self.mix, vectors)
            return self.read(torch.linalg.vecdot(vectors, vectors)).mean(1)

    @staticmethod
    def report(planted, declared):
        points = torch.randn(40, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lm.layerwise_equivariance_error(
                TestPoints.VectorNeurons(planted).double(), points, "rotation",
                input_representation=R.Points(3), output_representation=R.Invariant(),
                representations={"": R.Vectors(3)} if declared else None,
            )  # fmt: skip

    def test_a_planted_nonlinearity_has_the_whole_share(self):
        report = self.report(planted=True, declared=True)
        assert max(report.residual.values()) < 1e-12
        shares = {row.name: row.share for row in report.by("op") if row.generator == "rotation_x"}
        (name,) = (name for name in shares if "tanh" in name)
        assert shares[name] == pytest.approx(1, abs=1e-10)
        assert max(abs(share) for other, share in shares.items() if other != name) < 1e-10

    def test_undeclared_vectors_spread_the_error_over_what_passes_them_on(self):
        report = self.report(planted=True, declared=False)
        assert max(report.residual.values()) < 1e-12
        shares = {row.name: row.share for row in report.by("op") if row.generator == "rotation_x"}
        (name,) = (name for name in shares if "tanh" in name)
        assert abs(shares[name] - 1) > 0.05

    def test_an_equivariant_network_has_no_shares(self):
        report = self.report(planted=False, declared=True)
        assert all(math.isnan(row.share) for row in report.by("op"))


def test_images_that_do_not_fill_the_last_part():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).double()
    x = torch.rand(5, 3, 128, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert 1 < layerwise._TOGETHER // x[0].numel() < 5
    report = layerwise.attributed(net, x, "rotation", probes=2)
    shares = torch.stack([layerwise.attributed(net, one[None], "rotation").products[:, :, 0] for one in x], 2)
    torch.testing.assert_close(report.products, shares)
