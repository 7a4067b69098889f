"""The public names as a program uses them. It is read by a type checker in its strictest mode, and never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import MetricCollection
from typing_extensions import assert_type

import lie_metric as lm
from lie_metric.compare import Compared, Comparison
from lie_metric.records import Record
from lie_metric.representations import Representation
from lie_metric.study import ModelSpec, Settings, read_records, read_rows, run_study

Values = dict[str, Tensor]


def metrics(model: nn.Module, images: Tensor) -> None:
    metric = lm.LocalEquivarianceError(("translation", lm.Generator.combination("turn", [], [])), method="forward")
    metric.update(model, images, groups=[0, 0, 1])
    assert_type(metric.compute(), Values)
    assert_type(metric.relative(units="pixel"), Values)
    assert_type(metric.lee(), Values)
    assert_type(metric.rms(), Values)
    assert_type(metric.sensitivity(), Values)
    assert_type(metric.standard_error("lee"), Values)
    assert_type(metric.measures(), dict[str, Values])
    assert_type(metric.principal_directions("input"), tuple[Tensor, Tensor])
    assert_type(metric.directional([1.0, 0.0]), Tensor)
    assert_type(metric.gram, Tensor)
    assert_type(metric.names, tuple[str, ...])
    assert_type(metric.interval(level=0.9), dict[str, tuple[Tensor, Tensor]])
    assert_type(metric.record(), Record)
    assert_type(metric.input_shape, tuple[int, ...] | None)
    assert_type(metric.method_used, str | None)
    assert_type(metric.generators, tuple[lm.Generator, ...])
    assert_type(metric.inheriting(output="probabilities"), lm.LocalEquivarianceError)
    assert_type(metric.to("cpu"), lm.LocalEquivarianceError)

    finite = lm.FiniteEquivarianceError(lm.orbits.displaced(("rotation",), pixels=(1, 2)))
    finite.update(model, images)
    assert_type(finite.linearity(metric), tuple[Values, Values])
    assert_type(finite.curves(), dict[str, lm.figures.Curve])
    others = [
        lm.LatticeEquivarianceError(("D4", lm.lattice.Roll(1, 0))),
        lm.PredictionConsistency(lm.orbits.uniform("translation", 0.1), reference="pairs"),
        lm.OrbitVariance(),
        lm.RelaxedEquivarianceError(normalise=True),
        lm.BandLimitedEquivariance(1.0, ("eq_t",)),
        lm.RelativeStability(),
        lm.StencilError("affine", resampling=lm.PAPER),
        lm.ConservationError({"momentum": lambda states: states[:, 2]}),
    ]
    MetricCollection({"relative": metric, "finite": finite})
    for other in others:
        assert_type(other.forward(model, images), Values)
        assert_type(other.plot(), tuple[Figure, Axes])


def functions(model: nn.Module, images: Tensor) -> Tensor:
    assert_type(lm.functional.relative(model, images, "rotation", chunk_size=3), Values)
    assert_type(lm.functional.gram(model, images), Tensor)
    assert_type(lm.functional.principal_directions(model, images), tuple[Tensor, Tensor])
    assert_type(lm.functional.eq_t(model, images, data_range=1.0), Tensor)
    floors = lm.functional.stencil_error(model, images)
    assert_type(lm.functional.below_floor(lm.functional.noise_floor(images), floors), dict[str, bool])
    assert_type(lm.lie_derivative(model, images, ("rotation", "scale")), Values)
    assert_type(lm.transforms.rotate(images, 0.1), Tensor)
    assert_type(lm.generators("rigid", dimension=3), tuple[lm.Generator, ...])
    assert_type(lm.testing.equivariance_violation(model, images), Values)
    lm.testing.assert_equivariant(model, images, "translation", resampling=lm.Resampling("fourier"))
    report = lm.layerwise_equivariance_error(model, images, "rotation")
    assert_type(report, lm.LayerwiseReport)
    assert_type(report.residual, dict[str, float])
    assert_type([row.share for row in report.by("type")], list[float])
    return torch.zeros(()) + lm.equivariance_penalty(model, images, ("rotation",), normalise="spread")


class Spinors:
    """A representation of one's own: four methods."""

    def check(self, tensor: Tensor, name: str) -> None:
        if tensor.shape[-1] != 2:
            raise ValueError(name)

    def tangents(self, tensor: Tensor, generators: Sequence[lm.Generator], resampling: lm.Resampling) -> Tensor:
        return torch.stack([generator.matrix[0][1] * tensor for generator in generators])

    def act(self, tensor: Tensor, generator: lm.Generator, t: float | Tensor, resampling: lm.Resampling) -> Tensor:
        return tensor * t

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.flatten(1, -2),)


def representations() -> None:
    space = lm.representations
    spoken: list[Representation] = [
        space.Invariant(),
        space.Image(),
        space.ChannelsLast(),
        space.Tokens((4, 4), 1),
        space.Photograph(),
        space.Points(3),
        space.Vectors(3),
        space.Covectors(2),
        space.Tensors(3, 2),
        space.Irreps("2x0e+1x1o"),
        space.Field(2, fibre=space.Vectors(2)),
        space.DirectSum((space.Points(2), space.Covectors(2))),
        space.Masked(space.Points(3), "mask"),
        space.Packed(space.Points(3), "batch"),
        space.Points.of_image(8, 8),
        space.Boxes.of_image(8, 8),
        Spinors(),
    ]
    parts: Mapping[str, Representation] = {"pos": spoken[5], "cell": spoken[6]}
    lm.LocalEquivarianceError("rigid", input_representation=parts, output_representation=space.Invariant())
    lm.LocalEquivarianceError("rigid", input_representation=spoken[-1], function=lambda model, x: model(x, 1.0))


def trainings(model: nn.Module, images: Tensor) -> None:
    Trainer(
        callbacks=[
            lm.EquivarianceMonitor(("translation", "rotation"), num_images=64, metrics=[lm.PredictionConsistency()]),
            lm.LayerwiseMonitor("rotation", num_images=30),
        ]
    )

    def told(values: dict[str, float]) -> None:
        del values

    recorder = lm.Recorder(images, "rotation", folder=Path("runs"), log=told, measures=("relative", "rms"))
    assert_type(recorder.measure(model, 3, epoch=0.5), dict[str, float])


def comparisons(one: lm.LocalEquivarianceError, other: lm.LocalEquivarianceError) -> str:
    found = lm.compare(one, other)
    assert_type(found, Comparison)
    assert_type(found["rotation"], Compared)
    assert_type([row.ratio for row in found], list[float])
    lm.compare([lm.read_record("runs/a")], [lm.read_record(Path("runs/b"), epoch=3)], level=0.9)
    found.to_frame()
    lm.read_runs("runs", by="augmentation")
    return found["rotation"].verdict


def studies(build: type[nn.Module]) -> None:
    assert_type(run_study(["resnet18", ModelSpec("own", build)], "study", Settings("digits")), dict[str, int])
    assert_type(read_records("study"), dict[str, dict[str, Record]])
    for row in read_rows(Path("study")):
        row["relative"]
