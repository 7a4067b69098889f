"""Point clouds, graphs and several inputs in the monitor: whole batches, curves for each part, training unchanged."""

import json
from collections import namedtuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lie_metric as lm
from lie_metric.callbacks.selection import Share, WholeBatches
from lie_metric.curves import spread
from lie_metric.curves.batches import inputs_of
from lie_metric.curves.keys import Keys
from lie_metric.representations import Invariant, Packed, Points, Vectors, Velocities

PACKED = {
    "input_representation": {"pos": Packed(Points(3), "batch")},
    "output_representation": {"energy": Invariant(), "forces": Packed(Vectors(3), "batch")},
}


class Molecules(Dataset):
    """Some atoms each, with an energy that turns do not change."""

    def __init__(self, count, seed):
        source = torch.Generator().manual_seed(seed)
        self.pos = [torch.randn(3 + k % 3, 3, generator=source) for k in range(count)]

    def __len__(self):
        return len(self.pos)

    def __getitem__(self, index):
        return self.pos[index]


def collate(molecules):
    pos = torch.cat(molecules)
    sizes = torch.tensor(list(map(len, molecules)))
    energy = torch.stack([one.square().sum().sqrt() for one in molecules])
    return {"pos": pos, "batch": torch.repeat_interleave(torch.arange(len(sizes)), sizes), "energy": energy[:, None]}


class Potential(LightningModule):
    """Sums over atoms of a network on their places; not equivariant."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 4))
        self.losses = []

    def forward(self, graphs):
        out = self.net(graphs["pos"])
        energy = out.new_zeros(int(graphs["batch"].max()) + 1, 1).index_add(0, graphs["batch"], out[:, :1])
        return {"energy": energy, "forces": out[:, 1:]}

    def training_step(self, batch, _):
        loss = (self(batch)["energy"] - batch["energy"]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", (self(batch)["energy"] - batch["energy"]).square().mean(), batch_size=len(batch["energy"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(callbacks, module=None, logger=False, val=20, **options):
    seed_everything(0, verbose=False)
    module = module or Potential()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, callbacks=callbacks, logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    loaders = [
        DataLoader(Molecules(count, seed), 4, shuffle=seed == 0, collate_fn=collate)
        for seed, count in enumerate((24, val))
    ]
    trainer.fit(module, *loaders)
    return trainer, module


def test_each_part_has_its_curves(tmp_path):
    logger = CSVLogger(tmp_path, version="")
    measures = ("relative", "lee", "rms")
    monitor = lm.EquivarianceMonitor(
        ("translation", "rotation"), num_images=8, measures=measures, on_error="raise", **PACKED
    )
    trainer, module = fit([monitor], logger=logger)
    found = trainer.callback_metrics
    keys = [f"equivariance{part}{kind}/{name}" for part in ("_energy", "_forces")
            for kind in ("", "_se", "_lee", "_rms", "_rms_se")
            for name in ("translation_x", "rotation_z")]  # fmt: skip
    assert all(torch.isfinite(found[key]) and found[key] > 0 for key in keys)
    assert not any(key.startswith(("equivariance_finite", "equivariance_floor", "equivariance/")) for key in found)
    # The same as the metric over the two chosen batches of five.
    metric = lm.LocalEquivarianceError(("translation", "rotation"), **PACKED)
    batches = list(DataLoader(Molecules(20, 1), 4, collate_fn=collate))
    for index in spread(2, 5):
        metric.update(module, batches[index])
    for name, value in metric.relative().items():
        part, generator = name.split("/")
        assert found[f"equivariance_{part}/{generator}"].item() == pytest.approx(value.item(), rel=1e-5)
    for name, value in metric.rms().items():
        part, generator = name.split("/")
        assert found[f"equivariance_{part}_rms/{generator}"].item() == pytest.approx(value.item(), rel=1e-5)

    lines = [json.loads(line) for line in (tmp_path / "lightning_logs" / "equivariance.jsonl").read_text().splitlines()]
    records = [record for line in lines[1:] for record in line["records"]]
    assert {record["key"] for record in records} == {
        f"equivariance_{part}{kind}" for part in ("energy", "forces") for kind in ("", "_lee", "_rms")
    }  # fmt: skip
    kept = lm.read_record(tmp_path / "lightning_logs", "equivariance_forces")
    assert kept.names[-1] == "rotation_z"
    assert kept.images == 8
    assert kept.replicates.value[-1].item() == pytest.approx(metric.relative()["forces/rotation_z"].item(), rel=1e-5)
    frame = lm.read_runs(tmp_path)
    assert {"equivariance_forces", "equivariance_energy"} <= set(frame["key"])


def test_titles_say_what_part_and_how_far():
    beside = {"finite": lm.StencilError("rotation"), "own_pair": lm.PredictionConsistency("flips")}
    about = (lm.generators("rotation"), PACKED["output_representation"], beside, frozenset({"finite"}))
    found = Keys("p", ("relative", "rms"), *about, 2.5).families()
    assert {title: family for title, (family, _) in found.items()} == {
        "relative error: output standard deviations per unit of t: energy": "p_energy",
        "relative error: output standard deviations per unit of t: forces": "p_forces",
        "root mean square of the Lie derivative, in units of the output: energy": "p_energy_rms",
        "root mean square of the Lie derivative, in units of the output: forces": "p_forces_rms",
        "finite error at 2.5 px: 1 = as far as another image": "p_finite",
        "own pair": "p_own_pair",
    }
    assert found["own pair"][1] == beside["own_pair"].names


def test_training_is_unchanged():
    _, plain = fit([])
    monitor = lm.EquivarianceMonitor(("rotation",), num_images=8, on_error="raise", **PACKED)
    _, watched = fit([monitor])
    assert plain.losses == watched.losses
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


class Cloud(Potential):
    """Point clouds (B, N, 3) as one tensor."""

    def forward(self, points):
        return self.net(points).sum(1)

    def training_step(self, batch, _):
        return self(batch.to(self.net[0].weight.dtype)).square().mean()

    def validation_step(self, batch, _):
        self.log("val_loss", self(batch.to(self.net[0].weight.dtype)).square().mean())


def quiet(monitor, **options):
    """A trainer of one epoch that says and keeps nothing."""
    return Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[monitor], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


class Pairs(Potential):
    """Positions and velocities as two arguments."""

    def forward(self, pos, vel):
        return self.net(pos).sum(1)[:, :3] + vel.mean(1)

    def loss(self, batch):
        pos, vel, target = batch
        return (self(pos, vel) - target).square().mean()

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.log("val_loss", self.loss(batch))


def pairs(count, seed):
    source = torch.Generator().manual_seed(seed)
    rows = [torch.randn(5, 3, generator=source) for _ in range(2 * count)]
    return [(rows[2 * k], rows[2 * k + 1], rows[2 * k + 1].mean(0)) for k in range(count)]


def test_several_arguments():
    layout = {
        "input_representation": {"0": Points(3), "1": Velocities(3)},
        "output_representation": Velocities(3),
    }
    seed_everything(0, verbose=False)
    module, val = Pairs(), DataLoader(pairs(12, 1), 4)

    def run(**options):
        monitor = lm.EquivarianceMonitor("galilean", num_images=12, on_error="raise", **layout, **options)
        trainer = quiet(monitor)
        trainer.fit(module, DataLoader(pairs(8, 0), 4), val)
        return trainer.callback_metrics

    with pytest.raises(TypeError, match=r"must be told what the module takes of a batch.*inputs=\.\.\."):
        run()
    found = run(inputs=lambda batch: tuple(batch[:2]))
    assert found["equivariance/boost_x"] == pytest.approx(0, abs=1e-6)
    assert found["equivariance/rotation_x"] > 0.01


def test_point_clouds_as_one_tensor_are_taken_row_by_row():
    seed_everything(0, verbose=False)
    data = torch.randn(30, 5, 3, generator=torch.Generator().manual_seed(0))
    monitor = lm.EquivarianceMonitor(
        "rotation", num_images=8, on_error="raise", input_representation=Points(3), output_representation=Invariant()
    )
    trainer = quiet(monitor)
    module = Cloud()
    trainer.fit(module, DataLoader(data, 6), DataLoader(data, 6))
    metric = lm.LocalEquivarianceError("rotation", input_representation=Points(3), output_representation=Invariant())
    metric.update(module, data[spread(8, 30)])
    for name, value in metric.compute().items():
        assert trainer.callback_metrics[f"equivariance/{name}"].item() == pytest.approx(value.item(), rel=1e-5)


def test_layers_of_point_clouds():
    seed_everything(0, verbose=False)
    data = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0))
    options = {"input_representation": Points(3), "output_representation": Invariant()}
    monitor = lm.LayerwiseMonitor("rotation", on_error="raise", **options)
    trainer = quiet(monitor)
    trainer.fit(Cloud(), DataLoader(data, 6), DataLoader(data, 6))
    found = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("layerwise_rotation_x/")}
    assert sum(found.values()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(TypeError, match="one representation for layers"):
        lm.LayerwiseMonitor("rotation", input_representation={"pos": Points(3)})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"images": 0, "inputs": 0}, ValueError, "two names of one argument"),
        ({"generators": "scale_x"}, ValueError, "known generators of space, got 'scale_x'"),
        ({"generators": "saturation"}, ValueError, r"got 'saturation' with \['intensity'\]"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        lm.EquivarianceMonitor(**{"generators": "rotation"} | PACKED | options)


def test_batches_with_names_are_taken_whole():
    batch = namedtuple("Batch", "pos energy")(torch.zeros(4, 5, 3), torch.zeros(4))
    assert inputs_of(batch, None, {"0": Points(3)}) is batch
    assert inputs_of([{"pos": batch.pos}, batch.energy], None, {"pos": Points(3)}) == {"pos": batch.pos}


def test_a_part_that_is_not_there():
    monitor = lm.EquivarianceMonitor("rotation", input_representation={"positions": Points(3)})
    with pytest.raises(TypeError, match=r"with keys \['pos', 'batch', 'energy'\], in which the parts"):
        fit([monitor])
    options = {**PACKED, "output_representation": {"dipole": Vectors(3)}}
    with pytest.raises(Exception, match="must have a part 'dipole'"):
        fit([lm.EquivarianceMonitor("rotation", on_error="raise", **options)])


@pytest.mark.parametrize("replicated", [True, False])
@pytest.mark.parametrize(("samples", "batches"), [(1, 5), (8, 5), (100, 5), (8, float("inf"))])
def test_whole_batches_are_measured_once(replicated, samples, batches):
    world, seen = 2, []
    for rank in range(world):
        chosen = WholeBatches(Share({}, world, rank, replicated), 4, batches, samples)
        for batch in range(5):
            for _, numbers in chosen.add(f"batch {batch}", 4):
                seen += numbers
    assert len(seen) == len(set(seen)) >= min(samples, 20)
    assert len(seen) <= max(8, samples + 4, 1) or len(seen) == 40


def test_what_a_sampler_gives_twice_is_not_counted():
    # Seven samples over two processes: the sampler repeats the first one to fill up.
    share = Share({}, 2, 1, False, 7)
    chosen = WholeBatches(share, 4, 1, 100)
    ((_, numbers),) = chosen.add("batch", 4)
    assert numbers == [1, 3, 5, -1]
    metric = lm.LocalEquivarianceError("rotation", **PACKED)
    batch = collate([Molecules(7, 1)[index] for index in (1, 3, 5, 0)])
    metric.numbers = numbers
    module = Potential()
    metric.update(module, batch)
    wanted = lm.LocalEquivarianceError("rotation", **PACKED)
    wanted.update(module, collate([Molecules(7, 1)[index] for index in (1, 3, 5)]))
    assert metric.sum_images.sum() == 3
    for name, value in wanted.compute().items():
        torch.testing.assert_close(metric.compute()[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision):
    seed_everything(0, verbose=False)

    data = torch.randn(12, 5, 3, generator=torch.Generator().manual_seed(0))
    monitor = lm.EquivarianceMonitor(
        "rotation", on_error="raise", input_representation=Points(3), output_representation=Invariant()
    )
    trainer = quiet(monitor, precision=precision)
    trainer.fit(Cloud(), DataLoader(data, 6), DataLoader(data, 6))
    assert trainer.callback_metrics["equivariance/rotation_x"] > 0.1
