"""What the outputs for the elements of an orbit say together, and the measures as functions of these sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lie_metric.functional.sums import MOMENTS, Sums, defined, moments, spread, totals
from lie_metric.orbits import Element
from lie_metric.representations import Representation
from lie_metric.representations.composite import present
from lie_metric.resampling import coordinate_dtype

__all__ = ["STATISTICS", "SUMS", "Loss", "OrbitSums", "finite_transforms_compute", "of_frames", "spreads"]

Loss = Callable[[Tensor, Any], Tensor]

SUMS = ("violation", "distance", "agreement", "pairs", "variance", "loss", "parameter")
"""Names of the sums that hold one number for each orbit."""


class OrbitSums:
    """What the elements of an orbit say together, one element after the other, for each image."""

    def __init__(self, f: Tensor, representation: Representation, count: int, complete: bool) -> None:
        self.f, self.representation, self.count, self.complete = f, representation, count, complete
        self.wide = coordinate_dtype(f.device)
        self.zero = torch.zeros(len(f), dtype=self.wide, device=f.device)
        self.violation, self.distance, self.agreement, self.loss = (self.zero.clone() for _ in range(4))
        # Differences from f, so that what is common to all cancels before it is squared.
        self.first, self.second = torch.zeros_like(f), torch.zeros_like(f)
        self.valid = torch.ones_like(f)
        self.there = present(representation, f)
        # Of each sample, without what fills up a batch.
        kept = self.valid if self.there is None else self.there.expand_as(f)
        self.entries = kept.reshape(len(f), -1).sum(1).to(self.wide)
        self.classes: list[Tensor] = []

    def add(self, returned: Tensor, element: Element, loss: Loss | None, targets: Any) -> None:
        """Takes the output for an element, which is brought back, and its loss."""
        f = self.f
        z = element.on(self.representation, returned, -1)
        valid = element.valid(self.representation, f)
        if self.there is not None:
            z, valid = torch.where(self.there, z, f), torch.where(self.there, valid, 0.0)
        difference = z - f
        square = self._mean(difference.square(), valid) * self.entries
        self.violation += square / self.count
        self.distance += square.sqrt() / self.count
        self.first += difference / self.count
        self.second += difference.square() / self.count
        self.valid *= valid
        mine, theirs, weight = (self._scores(tensor) for tensor in (f, z, valid))
        self.classes.append(theirs.argmax(-1))
        same = self.classes[-1] == mine.argmax(-1)
        share = self._share(same, weight[..., 0], mine.shape[-1])
        # The largest of what is not finite is no class.
        self.agreement += torch.where(torch.isfinite(square), share, torch.nan) / self.count
        if loss is not None:
            found = loss(z, targets)
            if not isinstance(found, Tensor) or found.shape != self.zero.shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"`loss` must return one number for each of the {len(f)} images, got {got}. Use e.g. "
                    "`torch.nn.CrossEntropyLoss(reduction='none')`."
                )
            self.loss += found.to(self.wide) / self.count

    def rows(self) -> dict[str, Tensor]:
        """For each image what the elements say together, by the names of ``SUMS`` but the parameter."""
        classes = self._scores(self.f).shape[-1]
        # Of one element there is neither; it is refused before where they are asked for.
        pairs, variance = self.zero, self.zero
        if self.count > 1:
            weight = self._scores(self.valid)[..., 0]
            total = self.zero.clone()
            for i, one in enumerate(self.classes):
                for other in self.classes[:i]:
                    total += self._share(one == other, weight, classes)
            pairs = total / (self.count * (self.count - 1) / 2)
            pairs = torch.where(torch.isfinite(self.violation), pairs, torch.nan)
            # A sample of K elements sees K - 1 of K parts of the variance; a whole group sees all.
            correction = 1.0 if self.complete else self.count / (self.count - 1)
            about_mean = self._mean(self.second - self.first.square(), self.valid)
            variance = about_mean.clamp(min=0) * self.entries * correction
        found = (self.violation, self.distance, self.agreement, pairs, variance, self.loss)
        return dict(zip(SUMS[:-1], found, strict=True))

    def _mean(self, values: Tensor, valid: Tensor) -> Tensor:
        """The mean over the valid entries of each image; NaN if there is none."""
        kept, count = ((part.reshape(len(part), -1).to(self.wide)).sum(1) for part in (values * valid, valid))
        return kept / count

    def _scores(self, tensor: Tensor) -> Tensor:
        """Shape (B, positions, classes); no classes where no numbers stand for themselves, as of vectors."""
        blocks = self.representation.components(tensor)
        return blocks[-1] if blocks else tensor.reshape(len(tensor), -1, 1)

    def _share(self, same: Tensor, weight: Tensor, classes: int) -> Tensor:
        if classes < 2:
            return self.zero + torch.nan
        weight = weight.to(self.wide)
        return (same.to(self.wide) * weight).sum(1) / weight.sum(1)


def of_frames(outputs: Sequence[Tensor | None], f: Tensor, representation: Representation) -> dict[str, Tensor]:
    """Moments of the outputs for parts of the images, by orbit; zeros for orbits that are compared with the whole."""
    found = [None if output is None else moments(output, representation) for output in outputs]
    known = next((each for each in found if each is not None), None)
    wide, device = coordinate_dtype(f.device), f.device
    width = 1 if known is None else known["total"].shape[1]
    nothing = {
        name: torch.zeros(len(f), *([width] if shape else []), dtype=wide, device=device)
        for name, shape in MOMENTS.items()
    }
    return {f"frame_{name}": torch.stack([(each or nothing)[name] for each in found], 1) for name in nothing}


def spreads(sums: Sums) -> Tensor:
    """For each orbit the spread of the outputs that it is compared with."""
    own = {name: sums[f"frame_{name}"] for name in MOMENTS}
    found = spread(own | {"rounding": sums["rounding"], "images": sums["images"][..., None]})
    return torch.where(own["entries"] > 0, found, spread(sums)[..., None])


def _finite_error(sums: Sums) -> Tensor:
    return (sums["violation"] / (2 * spreads(sums))).sqrt()


def _agreement(sums: Sums) -> Tensor:
    return sums["agreement"] / sums["images"][..., None]


def _pairs(sums: Sums) -> Tensor:
    return sums["pairs"] / sums["images"][..., None]


def _variance(sums: Sums) -> Tensor:
    return sums["variance"] / sums["images"][..., None]


def _share_of_loss(sums: Sums) -> Tensor:
    return sums["variance"] / sums["loss"]


def _relaxed(sums: Sums) -> Tensor:
    return sums["distance"] / sums["images"][..., None]


def _relaxed_normalised(sums: Sums) -> Tensor:
    return sums["distance"] / sums["size"][..., None]


STATISTICS: dict[str, tuple[Callable[[Sums], Tensor], str]] = {
    "finite_equivariance_error": (
        _finite_error,
        "the output does not vary over the images (one alone never does), or nothing stays inside",
    ),
    "lattice_equivariance_error": (_finite_error, "the output does not vary over the images (one alone never does)"),
    "prediction_consistency": (_agreement, "the output has fewer than two classes, or nothing stays inside the frame"),
    "pairwise_consistency": (_pairs, "the output has fewer than two classes, or the orbit fewer than two elements"),
    "orbit_variance": (_variance, "no position stays inside the frame under all elements"),
    "orbit_variance_share": (_share_of_loss, "the loss is zero or was not given"),
    "relaxed_equivariance_error": (_relaxed, "nothing stays inside the frame"),
    "relaxed_equivariance_error_normalised": (_relaxed_normalised, "the output is zero, or nothing stays inside"),
}
"""Each measure as a function of the sums, and why it may be undefined."""


def finite_transforms_compute(sums: Sums, measure: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The measure of each orbit from the sums."""
    statistic, reason = STATISTICS[measure]
    total = totals(sums)
    if not bool(torch.isfinite(total["square"])):
        reason = "the model's outputs are not finite"
    value = defined(statistic(total), measure, names, reason, total)
    return dict(zip(names, value.unbind(), strict=True))
