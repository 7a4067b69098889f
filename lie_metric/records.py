"""A measure of a model with all that a comparison needs: replicates, settings, and which images it is of.

Two of them can be compared, or it is said what keeps them from it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lie_metric.functional.sums import Replicates, Sums
from lie_metric.resampling import Resampling

__all__ = [
    "FREE",
    "IMAGES",
    "SIZES",
    "VERSION",
    "Record",
    "decibels_to_ratios",
    "differences",
    "of_images",
    "plain",
    "refuse_different",
]

VERSION = 1
"""Of the files that hold records; one that is higher is refused."""

FREE = frozenset({"function", "input_representation", "output_representation", "loss"})
"""Settings that may differ between models that are compared: how a model is called, and what was said of its output."""


@dataclass(frozen=True, eq=False)
class Record:
    """A measure of a model, as :meth:`lie_metric.LocalEquivarianceError.record` takes it or a file holds it.

    Args:
        metric: The metric's class.
        measure: Which measure.
        names: The generators, orbits or kinds; K of them.
        units: For each the unit of its parameter; empty where a value has none.
        replicates: Of K values.
        settings: On what the values depend besides model and images.
        fingerprint: Of the images and their groups; two that differ are of other images.
        input_shape: Shape of one image; None if it is not known.
        spread: Mean variance of the output, over its entries; NaN where the metric does not keep it.
        decibels: Whether the values are decibels, of which differences count, rather than ratios.
        origin: Where it was read, in words; empty for a metric.
    """

    metric: str
    measure: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    replicates: Replicates
    settings: Mapping[str, Any]
    fingerprint: str
    input_shape: tuple[int, ...] | None
    spread: float
    decibels: bool = False
    origin: str = ""

    @property
    def images(self) -> int:
        """How many images were measured."""
        return int(self.replicates.images.sum())

    def ratios(self) -> Replicates:
        """The replicates on a scale of which ratios have a meaning: decibels as mean squares over that of the peak."""
        return self.replicates.map(decibels_to_ratios) if self.decibels else self.replicates

    def by_part(self) -> list[tuple[str, Record]]:
        """The parts of an output with named parts, whose values are of ``part/generator``.

        Returns:
            For each part its name and its record; this one without a name if there are no parts.
        """
        named = [name.rpartition("/")[::2] for name in self.names]
        found = []
        for part in dict.fromkeys(part for part, _ in named):
            rows = [row for row, (owner, _) in enumerate(named) if owner == part]
            kept = self.replicates
            own = replace(
                self,
                names=tuple(named[row][1] for row in rows),
                units=tuple(self.units[row] for row in rows),
                replicates=Replicates(kept.value[rows], kept.left_out[:, rows], kept.images),
            )
            found.append((part, own))
        return found

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes: numbers with twelve digits, None for what is not finite."""
        kept = self.replicates
        used = kept.images > 0
        left = kept.left_out[used]
        return {
            "metric": self.metric,
            "measure": self.measure,
            "names": list(self.names),
            "units": list(self.units),
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "spread": _short(self.spread),
            "decibels": self.decibels,
            "groups": [int(count) for count in kept.images.tolist()],
            "values": [_short(value) for value in kept.value.tolist()],
            "left_out": [[_short(value) for value in column] for column in left.mT.tolist()],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], origin: str = "") -> Record:
        """A record from what :meth:`to_json` returns.

        Args:
            found: The entries.
            origin: Where they are from, for messages.

        Returns:
            The record.

        Example:
            >>> import lie_metric as lm
            >>> metric = lm.LocalEquivarianceError("saturation")
            >>> metric.update(lambda x: x.mean((2, 3)), torch.rand(4, 1, 8, 8))
            >>> record = Record.from_json(metric.record().to_json())
            >>> record.names, record.images, record.input_shape
            (('saturation',), 4, (1, 8, 8))
        """
        images = torch.tensor(found["groups"], dtype=torch.float64)
        value = torch.tensor([_number(one) for one in found["values"]], dtype=torch.float64)
        left = value.expand(len(images), -1).clone()
        rows = [[_number(one) for one in column] for column in found["left_out"]]
        left[images > 0] = torch.tensor(rows, dtype=torch.float64).reshape(len(value), -1).mT
        shape = found["input_shape"]
        return cls(
            found["metric"],
            found["measure"],
            tuple(found["names"]),
            tuple(found["units"]),
            Replicates(value, left, images),
            dict(found["settings"]),
            found["fingerprint"],
            None if shape is None else tuple(shape),
            _number(found["spread"]),
            bool(found["decibels"]),
            origin,
        )


def _short(value: float) -> float | None:
    return float(f"{value:.12g}") if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def decibels_to_ratios(values: Tensor) -> Tensor:
    """Mean squares over that of the peak, from peak signal-to-noise ratios in decibels.

    Args:
        values: Any shape.

    Returns:
        The same shape.

    Example:
        >>> decibels_to_ratios(torch.tensor([10.0, 20.0])).tolist()
        [0.10000000149011612, 0.009999999776482582]
    """
    return torch.pow(10, -values / 10)


def plain(value: Any) -> Any:
    """An option as a file keeps it: what is plain as it is, a stencil and all else as text.

    Args:
        value: The option.

    Returns:
        A number, a text, a truth value or None.

    Example:
        >>> plain(0.5), plain(Resampling()), plain(len)
        (0.5, 'bspline, reflection, pixel areas', 'callable len')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Resampling):
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(one)}" for key, one in value.items())
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return f"callable {getattr(value, '__qualname__', type(value).__name__)}"
    return type(value).__name__


def of_images(sums: Sums) -> str:
    """The fingerprint of measured images: for each group how many they are and the sum of their own fingerprints.

    Args:
        sums: Sums by group, over all processes.

    Returns:
        32 hexadecimal digits, whatever the order of images, their batches, and the processes that measured them.
    """
    told = torch.stack([sums["images"], sums["hash"]]).to("cpu", torch.int64)
    return hashlib.blake2b(repr(told.tolist()).encode(), digest_size=16).hexdigest()


def refuse_different(one: Record, other: Record) -> None:
    """Refuses two records of which no ratio can be taken.

    Args:
        one: A record.
        other: Another.

    Raises:
        ValueError: If measure, names, units, options or images differ.
    """
    for what, first, second, advice in differences(one, other):
        where = f" (in {one.origin} and {other.origin})" if one.origin or other.origin else ""
        raise ValueError(f"`a` and `b` must have the same {what}, got {first} and {second}{where}. {advice}")


def differences(one: Record, other: Record) -> list[tuple[str, str, str, str]]:
    """What keeps two records from being compared.

    Args:
        one: A record.
        other: Another.

    Returns:
        For each reason what differs, how it is in one and in the other, and what to do.
    """
    found = []

    def note(what: str, first: Any, second: Any, advice: str) -> None:
        if first != second:
            found.append((what, str(first), str(second), advice))

    note("class", one.metric, other.metric, "Measure both with one class of metric.")
    note("measure", one.measure, other.measure, "Pass `measure=`, or the records of one measure.")
    note("generators", one.names, other.names, "Measure both with the same generators or transforms, in one order.")
    note("units", one.units, other.units, "Measure both in the same units.")
    for name in dict.fromkeys((*one.settings, *other.settings)):
        first, second = one.settings.get(name), other.settings.get(name)
        called = any(isinstance(value, str) and value.startswith("callable ") for value in (first, second))
        if name not in FREE and not (called and first is not None and second is not None):
            what = "stencil" if name == "resampling" else f"option `{name}`"
            note(what, first, second, f"Measure both with the same `{name}=`.")
    if None not in {one.input_shape, other.input_shape}:
        note("size of images", one.input_shape, other.input_shape, SIZES)
    if one.fingerprint != other.fingerprint:
        counts = f"{one.images} images", f"{other.images} images"
        if counts[0] == counts[1]:
            counts = f"{one.images} images", "as many others, or the same in other groups"
        found.append(("images", *counts, IMAGES))
    return found


IMAGES = (
    "Pairing needs the same images in the same groups: measure both on one loader that does not shuffle, with one "
    "normalisation and one `num_images`."
)
SIZES = "Errors per half side or radian are of other sizes in pixels there: measure both at one size."
