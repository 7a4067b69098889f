"""Modules sharded by FSDP on two processes (gloo, CPU): values of one process, training unchanged, no waiting."""

import itertools
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from processes import one_of_two
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric.callbacks import gathered
from lie_metric.callbacks.baseline import Untrained

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]

IMAGES = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
KINDS = ("fsdp2", "fsdp1", "flat")
# Lightning's FSDP1 trains in float32 whatever is asked for.
WHOLE = {"fsdp2": "ddp", "fsdp1": "ddp float32", "flat": "ddp float32"}
COUNTS = (1, 3, 11)


class OnProcessors(FSDPStrategy):
    """Lightning has FSDP1 on GPUs alone; torch has it on processors as well."""

    def _setup_model(self, model):
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def strategy(kind):
    if kind == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return OnProcessors(use_orig_params=kind == "fsdp1", auto_wrap_policy={nn.Linear})


class Classifier(LightningModule):
    def __init__(self, kind="", fails_on=None):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.net = nn.Sequential(
            nn.GELU(), nn.Sequential(nn.Flatten(), nn.Linear(256, 5)), nn.Dropout(0.1), nn.Linear(5, 3)
        )
        self.to(torch.float64 if kind in {"", "ddp", "fsdp2"} else torch.float32)
        self.kind, self.fails_on, self.losses, self.stepping = kind, fails_on, [], False

    def configure_model(self):
        if self.kind == "fsdp2" and not isinstance(self.stem.weight, torch.distributed.tensor.DTensor):
            mesh = self.device_mesh["data_parallel"]
            for module in (self.net[1], self):
                torch.distributed.fsdp.fully_shard(module, mesh=mesh)

    def forward(self, x):
        if self.fails_on == self.global_rank and not self.stepping:
            raise RuntimeError("planted")
        return self.net(self.stem(x))

    def loss(self, batch):
        self.stepping = True
        try:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])
        finally:
            self.stepping = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Beginning(Logger):
    """Keeps what is logged of the untrained model."""

    name = version = "beginning"

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values |= metrics if step == 0 else {}

    def log_hyperparams(self, *args, **kwargs):
        pass


def counted(kind):
    """What is logged of a run without sanity check, of its beginning, and how often weights were gathered."""
    count, gather = [0], gathered.gather

    def counting(*args):
        count[0] += 1
        return gather(*args)

    gathered.gather, logger = counting, Beginning()
    callbacks = [lm.EquivarianceMonitor("rotation", 11, 2, on_error="raise"), lm.LayerwiseMonitor("rotation", 11, 2)]
    try:
        values, _, told = run("fit", kind, callbacks, num_sanity_val_steps=0, logger=logger, max_epochs=3)
    finally:
        gathered.gather = gather
    return values, logger.values, count[0], told


def run(how, kind, callbacks, fails_on=None, **settings):
    """The monitors' values, the losses of all steps, and what was warned of."""
    seed_everything(0)
    module = Classifier(kind, fails_on)
    options = {"strategy": strategy(kind) if kind in KINDS else "ddp", "devices": 2} if kind else {"devices": 1}
    settings = {"max_epochs": 2, "logger": False} | settings
    trainer = Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, **options, **settings
    )  # fmt: skip
    loader = DataLoader(TensorDataset(IMAGES.to(module.stem.weight.dtype), torch.arange(11) % 3), 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "fit":
            trainer.fit(module, loader, loader)
        else:
            trainer.validate(module, loader, verbose=False)
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name != "val_loss"}
    return values, module.losses, [str(entry.message) for entry in caught]


def monitors(count=11, on_error="raise"):
    common = {"num_images": count, "on_error": on_error}
    return [lm.EquivarianceMonitor(("rotation", "scale"), **common), lm.LayerwiseMonitor("rotation", **common)]


def network(tied=False):
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    if tied:
        second.weight = first.weight
    return nn.Sequential(nn.Flatten(), first, nn.GELU(), nn.Sequential(second, nn.GELU()), nn.Linear(64, 3)).double()


class Passing(nn.Module):
    """Gives the module inside what is set on it, as Lightning Fabric's wrapper does."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __setattr__(self, name, value):
        inside = self.__dict__.get("_modules", {}).get("inside", self)
        super().__setattr__(name, value) if inside is self else setattr(inside, name, value)

    def forward(self, x):
        return self.inside(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def encode(self, x):
        return self.net(x)


def sharded(model, kind):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if kind == "fsdp2":
        fully_shard(model[3])
        return fully_shard(model)
    options = {"device_id": torch.device("cpu"), "use_orig_params": kind == "fsdp1"}
    model[3] = FullyShardedDataParallel(model[3], **options)
    return FullyShardedDataParallel(model, **options)


def directly(kind, rank):
    """Measuring in a loop of one's own: each process as often as it likes."""
    found, expected = {}, lm.lie_derivative(network(), IMAGES, "rotation")["rotation"]
    model = sharded(network(), kind)
    before = [type(module) for module in model.modules()]
    with torch.no_grad():
        value = model(IMAGES)
    try:
        lm.lie_derivative(model, IMAGES, "rotation")
    except RuntimeError as error:
        found["refused"] = str(error)
    with lm.unsharded(model) as whole:
        for _ in range(rank + 1):
            derivative = lm.lie_derivative(whole, IMAGES, "rotation", method=("forward", "reverse")[rank])["rotation"]
        found["kinds"] = {type(module) for module in whole.modules()}
        found["norms"] = [parameter.norm().item() for parameter in whole.parameters()]
    found["apart"] = float((derivative - expected).norm() / expected.norm())
    found["as it was"] = before == [type(module) for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IMAGES).square().sum().backward()
    found["gradients"] = (
        sum(parameter.grad is not None for parameter in model.parameters()) == len(list(model.parameters()))
        or kind != "fsdp2"
    )
    optimizer.step()
    with torch.no_grad():
        found["trains"] = not torch.equal(model(IMAGES), value)
    recorder = lm.Recorder(IMAGES, "rotation", on_error="raise")
    found["recorder"] = recorder.measure(model, step=0)
    return found


def others(rank):
    """What can be neither gathered nor guessed, and what else FSDP leaves on modules."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FullyShardedDataParallel,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found, mesh = {}, init_device_mesh("cpu", (2,))
    parallel = parallelize_module(network(), mesh, {"1": ColwiseParallel(), "3.0": RowwiseParallel()})
    inner = network()
    FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    for name, ask in (
        ("tensor parallel", lambda: lm.unsharded(parallel).__enter__()),
        ("tensor parallel, direct", lambda: lm.lie_derivative(parallel, IMAGES, "rotation")),
        ("inner", lambda: lm.unsharded(inner).__enter__()),
        ("inner, flat", lambda: lm.unsharded(flat.module).__enter__()),
        ("inner, flat, direct", lambda: lm.lie_derivative(flat.module[3], IMAGES, "rotation")),
    ):
        try:
            ask()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    normed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double().eval()
    fully_shard(normed)
    normed[1].running_mean.fill_(rank + 1)
    with lm.unsharded(normed) as whole:
        found["statistics"] = [whole[1].running_mean.tolist()]
    found["statistics"].append(normed[1].running_mean.tolist())
    encoder = Encoder().double()
    fully_shard(encoder)
    register_fsdp_forward_method(encoder, "encode")
    expected = lm.lie_derivative(network(), IMAGES, "rotation")["rotation"]
    with lm.unsharded(encoder) as whole:
        derivative = lm.lie_derivative(whole, IMAGES, "rotation", function="encode")["rotation"]
    found["method"] = float((derivative - expected).norm() / expected.norm())
    found["method is there"] = "encode" in vars(encoder)
    tied = network(tied=True)
    fully_shard([tied[1], tied[3][0]])
    fully_shard(tied)
    with lm.unsharded(tied) as whole:
        found["tied"] = whole[1].weight is whole[3][0].weight and whole[1].weight.shape == (64, 64)

    def asked(*shape, **options):
        """What is asked for whole weights, and that it is not there."""
        if options.get("dtype") is torch.uint8:
            found["room"] = shape[0]
            if rank:
                raise torch.OutOfMemoryError("planted")
        return make(*shape, **options)

    strategy = torch.distributed.fsdp.ShardingStrategy.NO_SHARD
    for name, model in (
        ("no room", tied),
        ("no room, whole", FullyShardedDataParallel(network(), None, strategy, device_id=torch.device("cpu"))),
    ):
        torch.empty, make = asked, torch.empty
        try:
            lm.unsharded(model).__enter__()
        except RuntimeError as error:
            found[name] = str(error), found["room"]
        finally:
            torch.empty = make
    for name, model in unusual():
        derivative = "never"
        with lm.unsharded(model) as whole:
            derivative = lm.lie_derivative(whole, IMAGES, "rotation")["rotation"]
        with torch.no_grad():
            found["unusual", name] = (
                float((derivative - expected).norm() / expected.norm()),
                float((model(IMAGES) - network()(IMAGES)).norm()),
            )
    narrow = fully_shard(network().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    narrow[1].weight.requires_grad_(False)
    with torch.no_grad():
        narrow(IMAGES.float())
    with lm.unsharded(narrow) as whole:
        found["kept"] = [(p.dtype, p.requires_grad) for p in whole.parameters()]
    for when, on_error, kind in itertools.product(("first", "later"), ("raise", "warn"), (RuntimeError, ValueError)):
        found["recorder", when, on_error, kind] = recorded(rank, when, on_error, kind)
    return found


def unusual():
    """Modules that FSDP leaves as they are among those that it deals out, and what is put around its wrappers."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    scripted, wrapped = network(), network()
    scripted[2] = torch.jit.script(nn.GELU())
    yield "scripted", sharded(scripted, "fsdp2")
    for kind in KINDS:
        yield f"compiled {kind}", torch.compile(sharded(network(), kind), backend="eager")
    wrapped[3] = torch.compile(FullyShardedDataParallel(wrapped[3], device_id=torch.device("cpu")), backend="eager")
    yield "compiled inside", FullyShardedDataParallel(wrapped, device_id=torch.device("cpu"))
    wrapped = network()
    wrapped[3] = checkpoint_wrapper(FullyShardedDataParallel(wrapped[3], device_id=torch.device("cpu")))
    yield "inner wrapper alone", wrapped
    group = network()
    fully_shard([group[1], group[4]], reshard_after_forward=False)
    yield "group", fully_shard(group)
    for kind in KINDS:
        yield f"passing {kind}", Passing(sharded(network(), kind))


def recorded(rank, when, on_error, kind):
    """What a recorder says if the model fails on one process."""
    model = sharded(network(), "fsdp2")
    recorder = lm.Recorder(IMAGES, "rotation", on_error=on_error)
    if when == "later":
        recorder.measure(model, step=0)

    def fail(module, inputs):
        raise kind("planted")

    if rank:
        model[4].register_forward_pre_hook(fail)
    try:
        return recorder.measure(model, step=1)["equivariance/rotation"]
    except Exception as error:
        return type(error), str(error)


def failing():
    raise RuntimeError("planted")


def scenarios(rank):
    found = {}
    for kind in ("ddp", "ddp float32", *KINDS):
        for count in COUNTS:
            found[kind, count] = run("validate", kind, monitors(count))
        found[kind, "without"] = run("fit", kind, [])
        found[kind, "fit"] = run("fit", kind, monitors())
        found[kind, "counted"] = counted(kind)
        found[kind, "fails"] = run("fit", kind, monitors(on_error="warn"), fails_on=1)
        if kind in KINDS:
            found[kind, "direct"] = directly(kind, rank)
    keep = Untrained.keep
    Untrained.keep = lambda self, module: failing() if rank else keep(self, module)
    found["fsdp2", "not kept"] = run("fit", "fsdp2", monitors())
    Untrained.keep = keep
    found["others"] = others(rank)
    return found


def _worker(rank, directory):
    with one_of_two(rank, directory), open(f"{directory}/{rank}.pickle", "wb") as file:
        pickle.dump(scenarios(rank), file)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found."""
    directory = tmp_path_factory.mktemp("sharded")
    context = torch.multiprocessing.start_processes(
        _worker, (str(directory),), 2, join=False, start_method="forkserver"
    )
    while not context.join(timeout=300):
        pass
    return [pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_values_of_one(results, kind, count):
    single, _, _ = run("validate", "", monitors(count)[:1])
    assert single
    for found in results:
        values = found[kind, count][0]
        rounding = 1e-6 if kind == "fsdp2" else 1e-5
        assert {name: values[name] for name in single} == pytest.approx(single, rel=rounding, nan_ok=True)
        assert values == pytest.approx(found[WHOLE[kind], count][0], rel=1e-6, nan_ok=True)  # layers of both processes


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_unchanged_and_its_curve_is_that_of_whole_models(results, kind):
    for found in results:
        (values, losses, _), (_, without, _) = found[kind, "fit"], found[kind, "without"]
        assert losses == without
        assert len(losses) == 4
        assert values == pytest.approx(found[WHOLE[kind], "fit"][0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_on_one_process_is_nan_on_all_and_training_goes_on(results, kind):
    for rank, found in enumerate(results):
        values, losses, told = found[kind, "fails"]
        assert all(value != value for value in values.values())
        assert losses == found[kind, "without"][1]
        assert any(("planted" if rank else "on another process") in message for message in told)


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_measures_a_plain_model_as_often_as_it_likes(results, kind):
    whole = [parameter.norm().item() for parameter in network().parameters()]
    for found in (each[kind, "direct"] for each in results):
        assert "Measure inside `with lie_metric.unsharded(model) as whole:`" in found["refused"]
        assert found["apart"] < 1e-12
        assert found["kinds"] == {type(module) for module in network().modules()}
        assert found["norms"] == pytest.approx(whole, rel=1e-12)
        assert found["as it was"]
        assert found["gradients"]
        assert found["trains"]
    one, other = (each[kind, "direct"]["recorder"] for each in results)
    assert one == pytest.approx(other, rel=0)
    assert one["equivariance/rotation"] > 0


def test_what_cannot_be_gathered_is_refused(results):
    for found in (each["others"] for each in results):
        assert "which is tensor parallel" in found["tensor parallel"]
        assert "dealt out over processes" in found["tensor parallel, direct"]
        assert "must be the outermost wrapper of FSDP" in found["inner"]
        assert "must be the outermost wrapper of FSDP" in found["inner, flat"]
        assert "dealt out over processes" in found["inner, flat, direct"]


def test_running_statistics_are_those_of_the_first_process(results):
    for rank, found in enumerate(each["others"] for each in results):
        assert found["statistics"] == [[1.0, 1.0], [rank + 1.0, rank + 1.0]]


def test_methods_and_ties_survive(results):
    for found in (each["others"] for each in results):
        assert found["method"] < 1e-12
        assert found["method is there"]
        assert found["tied"]


def test_a_process_without_room_is_known_on_all(results):
    sizes = {
        name: 8 * sum(parameter.numel() for parameter in network(tied).parameters())
        for name, tied in (("no room", True), ("no room, whole", False))
    }
    for found in (each["others"] for each in results):
        for name, size in sizes.items():
            told, asked = found[name]
            assert "1 of 2 processes without room" in told
            assert asked == size


def test_what_is_around_and_among_sharded_modules(results):
    for found in (each["others"] for each in results):
        unusual = {key[1]: value for key, value in found.items() if key[0] == "unusual"}
        assert len(unusual) == 10
        for derivative, output in unusual.values():
            assert derivative < 1e-12
            assert output < 1e-12


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_recorder_that_fails_on_one_process_tells_all(results, when, kind):
    misuse = when == "first" and kind is ValueError
    for rank, found in enumerate(each["others"] for each in results):
        raised, told = found["recorder", when, "raise", kind]
        assert raised is (ValueError if misuse else RuntimeError)
        assert ("planted" if rank else "another process") in told
        warned = found["recorder", when, "warn", kind]
        assert warned == (raised, told) if misuse else warned != warned


def test_weights_are_those_that_are_trained_and_frozen_ones_stay_so(results):
    for found in (each["others"] for each in results):
        assert found["kept"] == [(torch.float32, index > 0) for index in range(6)]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_gathered_once_an_epoch_that_is_measured(results, kind):
    for found in results:
        values, start, count, _ = found[kind, "counted"]
        whole, whole_start, none, _ = found[WHOLE[kind], "counted"]
        assert values == pytest.approx(whole, rel=1e-6)
        assert start == pytest.approx(whole_start, rel=1e-6)
        assert "equivariance/rotation" in start
        # Twice before training, where each monitor rehearses; for the first epoch's baseline; for the second epoch.
        assert (count, none) == (4, 0)


def test_a_baseline_that_one_process_cannot_keep_is_given_up_by_all(results):
    for rank, found in enumerate(results):
        values, losses, told = found["fsdp2", "not kept"]
        assert values == found["fsdp2", "fit"][0]
        assert losses == found["fsdp2", "without"][1]
        assert any(("planted" if rank else "another process could not keep it") in message for message in told)


def test_models_that_are_not_sharded_are_yielded():
    model = network()
    with lm.unsharded(model) as whole:
        assert whole is model
