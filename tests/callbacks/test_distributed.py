"""Two processes (gloo, CPU) give the values of one over the same images, agree on failures, and never wait in vain."""

import pickle
import types
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import one_of_two
from test_named_parts import PACKED, Molecules, Potential, collate
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lie_metric.callbacks import EquivarianceMonitor
from lie_metric.callbacks.selection import Gathering, Share
from lie_metric.curves import spread
from lie_metric.metrics import LatticeEquivarianceError, OrbitVariance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IMAGES = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MEASURES = ("relative", "lee", "sensitivity")


class Classifier(LightningModule):
    def __init__(self, fails_on):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(256, 3),
        )
        self.fails_on = fails_on

    def forward(self, x):
        if self.fails_on == self.global_rank:
            raise RuntimeError("planted")
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Lame(OrbitVariance):
    """Fails on one process."""

    def __init__(self, rank=-1):
        super().__init__()
        self.fails_on = rank

    def update(self, model, images, targets=None):
        if model.global_rank == self.fails_on and not model.trainer.sanity_checking:
            raise RuntimeError("planted")
        super().update(model, images, targets)


class Dealt(IterableDataset):
    """Images that the data set itself deals out to the processes."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world

    def __iter__(self):
        return iter([(image, 0) for image in IMAGES[self.rank :: self.world]])


def images(count=11, batch_size=3):
    return DataLoader(TensorDataset(IMAGES[:count], torch.arange(count) % 3), batch_size)


def run(how, monitor, val=None, callbacks=(), world=1, fails_on=None, **options):
    """The equivariance values of a run, and its final weights."""
    seed_everything(0)
    module = Classifier(fails_on)
    options |= {"strategy": "ddp", "devices": world} if world > 1 else {}
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=bool(callbacks), enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*([monitor] if monitor else []), *callbacks], **options
    )  # fmt: skip
    val = images() if val is None else val
    if how in {"validate", "test"}:
        getattr(trainer, how)(module, val, verbose=False)
    else:
        trainer.fit(module, images(), val)
    values = {key: value.item() for key, value in trainer.callback_metrics.items() if "equivariance" in key}
    return values, {name: value.clone() for name, value in module.state_dict().items()}


def of_graphs(world):
    """The values of all graphs of a validation set, of which batches hold several."""
    seed_everything(0)
    options = {"strategy": "ddp", "devices": world} if world > 1 else {}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[EquivarianceMonitor(("translation", "rotation"), on_error="raise", **PACKED)], **options
    )  # fmt: skip
    trainer.validate(Potential(), DataLoader(Molecules(19, 1), 4, collate_fn=collate), verbose=False)
    found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("equivariance")}
    return (found,)


def scenarios(world, rank, directory):
    """Everything that is run by one process, and by each of two."""

    def monitor(**options):
        companions = (OrbitVariance(), LatticeEquivarianceError("flips"))
        return EquivarianceMonitor(("rotation", "scale"), **{"measures": MEASURES, "metrics": companions, **options})

    found = {}
    for count in (1, 4, 7, 11, 100):
        found[f"{count} images"] = run("validate", monitor(num_images=count), world=world)
    pair = [images(), images(8, 5)]
    found["two loaders"] = run("validate", monitor(num_images=7), val=pair, world=world)
    found["not dealt out"] = run("validate", monitor(num_images=7), world=world, use_distributed_sampler=False)
    stream = DataLoader(Dealt(rank, world), 2)
    found["graphs"] = of_graphs(world)
    found["test"] = run("test", monitor(num_images=7, test=True), world=world)
    found["iterable"] = run("validate", monitor(num_images=7), val=stream, world=world)
    best = ModelCheckpoint(directory, monitor="equivariance/rotation")
    found["fit"] = run("fit", monitor(), callbacks=[best], world=world)
    found["best"] = best.best_model_score.item()
    found["fit without"] = run("fit", None, world=world)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["one fails"] = run("fit", monitor(), fails_on=world - 1, world=world)
    messages = [str(entry.message) for entry in caught]
    lame = {"bad": Lame(world - 1), "good": LatticeEquivarianceError("flips")}
    found["a companion fails"] = run("fit", monitor(metrics=lame), world=world)
    try:
        run("fit", monitor(images=lambda batch: batch[1] if rank == world - 1 else batch[0]), world=world)
    except (TypeError, ValueError) as error:
        found["misused"] = str(error)
    found["warnings"] = [message for message in messages if "could not be measured" in message]
    try:
        run("fit", monitor(on_error="raise"), fails_on=world - 1, world=world)
    except RuntimeError as error:
        found["raised"] = str(error)
    return found


def _worker(rank, directory):
    with one_of_two(rank, directory), open(f"{directory}/{rank}.pickle", "wb") as file:
        pickle.dump(scenarios(2, rank, f"{directory}/checkpoints"), file)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process found, and what each of two found."""
    directory = tmp_path_factory.mktemp("distributed")
    context = torch.multiprocessing.start_processes(
        _worker, (str(directory),), 2, join=False, start_method="forkserver"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    single = scenarios(1, 0, directory / "single")
    torch.set_num_threads(threads)
    while not context.join(timeout=120):
        pass
    return single, *(pickle.loads((directory / f"{rank}.pickle").read_bytes()) for rank in range(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(f"{count} images" for count in (1, 4, 7, 11, 100)),
        "two loaders",
        "not dealt out",
        "iterable",
        "graphs",
        "test",
    ],
)
def test_two_processes_give_the_values_of_one(results, case):
    """Each image counts once: the padding that evens out two processes is left out; so is nothing else."""
    single, *pair = (found[case][0] for found in results)
    assert single
    for values in pair:
        assert values == pytest.approx(single, rel=1e-4, nan_ok=True)
    assert pair[0] == pytest.approx(pair[1], rel=0, nan_ok=True)


@pytest.mark.slow
def test_training_is_unchanged(results):
    for found in results:
        weights, without = found["fit"][1], found["fit without"][1]
        assert all(torch.equal(weights[name], without[name]) for name in weights)


@pytest.mark.slow
def test_checkpoints_agree(results):
    _, *pair = results
    assert pair[0]["best"] == pair[1]["best"]
    assert torch.isfinite(torch.tensor(pair[0]["best"]))


@pytest.mark.slow
def test_failure_on_one_process_is_known_on_all(results):
    single, *pair = results
    for found in (single, *pair):
        values, weights = found["one fails"]
        assert all(value != value for value in values.values())
        assert len(values) == 2 * (2 * (len(MEASURES) + 3) + 2 + 2)  # three stand beside by default
        assert all(torch.equal(weights[name], found["fit without"][1][name]) for name in weights)
    assert "failed on another process" in pair[0]["warnings"][0]
    assert "planted" in pair[1]["warnings"][0]
    assert "planted" in single["raised"]
    assert "on another process" in pair[0]["raised"]
    assert "planted" in pair[1]["raised"]


def loaders_of(kind, processes, batch_size):
    """The loader of each process over 11 images, dealt out with the padding of a sampler or shown to all."""
    data = TensorDataset(torch.arange(11))
    for rank in range(processes):
        state = types.SimpleNamespace(fn="validate")
        trainer = types.SimpleNamespace(world_size=processes, global_rank=rank, state=state)
        sampler = DistributedSampler(data, processes, rank, shuffle=False) if kind == "dealt" else None
        loader = DataLoader(Dealt(rank, processes) if kind == "stream" else data, batch_size, sampler=sampler)
        trainer.num_val_batches = [float("inf") if kind == "stream" else len(loader)]
        shown = list(range(rank, 11, processes)) if kind == "stream" else [int(i) for b in loader for i in b[0]]
        yield loader, trainer, [shown[start : start + batch_size] for start in range(0, len(shown), batch_size)]


@pytest.mark.slow
def test_a_companion_that_fails_on_one_process_is_nan_on_all_and_alone(results):
    for found in results:
        values, weights = found["a companion fails"]
        bad = {key for key, value in values.items() if value != value}
        assert bad == {key for key in values if key.startswith("equivariance_bad")} != set()
        assert all(torch.equal(weights[name], found["fit without"][1][name]) for name in weights)
    one, other = (found["a companion fails"][0] for found in results[1:])
    assert one == pytest.approx(other, rel=0, nan_ok=True)


@pytest.mark.slow
def test_a_misuse_on_one_process_is_raised_on_all(results):
    single, *pair = results
    assert "torch.int64" in single["misused"]
    assert "as another process found" in pair[0]["misused"]
    assert "torch.int64" in pair[1]["misused"]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["dealt", "replicated", "stream"])
@pytest.mark.parametrize("count", [1, 4, 7, 11, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_shares_partition_the_chosen_images(processes, kind, count, batch_size):
    """Each chosen image counts once, under its number, in full batches as long as there are any."""
    wanted = range(min(count, 11)) if kind == "stream" else spread(count, 11)
    measured, by_process = {}, []
    for loader, trainer, batches in loaders_of(kind, processes, batch_size):
        gathering = Gathering(Share.of(loader, trainer, 0, count, len(batches[0])), len(batches[0]))
        sizes = []
        for index, batch in enumerate(batches):
            for images, numbers in gathering.add(torch.tensor(batch)[:, None], index == len(batches) - 1):
                sizes.append(len(images))
                for image, number in zip(images[:, 0].tolist(), numbers, strict=True):
                    assert number not in measured
                    measured[number] = image
            if gathering.is_complete:
                break
        if kind != "stream":
            assert all(size == len(batches[0]) for size in sizes[:-1])
        by_process.append(sum(sizes))
    assert [measured[number] for number in sorted(measured)] == list(wanted)
    if kind == "replicated":
        assert max(by_process) - min(by_process) <= 1


@pytest.mark.parametrize(("count", "total"), [(1, 1), (4, 14), (256, 10_000), (256, 2560), (7, 9), (64, 64), (64, 50)])
def test_chosen_positions_are_spread(count, total):
    found = spread(count, total)
    parts = min(count, total)
    assert len(found) == parts
    assert all(part * total // parts <= place < (part + 1) * total // parts for part, place in enumerate(found))
    if total >= 8 * count > 256:  # sets whose classes take turns, and processes to which images are dealt in turn
        for period in (2, 3, 4, 10):
            shares = torch.bincount(torch.tensor(found) % period, minlength=period) / parts
            assert (shares - 1 / period).abs().max() < 0.05
