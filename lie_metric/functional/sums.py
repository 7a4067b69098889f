"""Sums over images, kept for groups of them, so that any function of the sums has a standard error (the jackknife)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lie_metric.functional.student import quantile
from lie_metric.representations import Representation
from lie_metric.representations.composite import rows_at_once, samples
from lie_metric.resampling import coordinate_dtype
from lie_metric.warning import warn

__all__ = [
    "GROUPS",
    "MOMENTS",
    "Indices",
    "Replicates",
    "Sums",
    "defined",
    "fingerprints",
    "grouped",
    "moments",
    "spread",
    "standard_error",
    "totals",
]

Sums = Mapping[str, Tensor]

GROUPS = 64
"""Groups of images that the jackknife leaves out in turn; fewer images make groups of one."""

# A spread below this many roundings of the output cannot be told from rounding. The second number is where the
# subtraction of two float64 sums ends.
ROUNDINGS, _CANCELLATION = 8.0, 1e-13


class Indices(list[int]):
    """The running numbers of the images of a batch, which fix their noise and transforms, and groups if they have any.

    Args:
        numbers: The running numbers.
        groups: For each image the number of its group; None where each image stands for itself.

    Example:
        >>> grouped({"x": torch.ones(2)}, Indices([3, 4], [0, 0]))["x"][:2].tolist()
        [2.0, 0.0]
    """

    def __init__(self, numbers: Iterable[int], groups: Sequence[int] | None = None) -> None:
        super().__init__(numbers)
        self.groups = groups


def grouped(rows: Mapping[str, Tensor], indices: Sequence[int]) -> dict[str, Tensor]:
    """Adds up rows by the group of their image.

    Args:
        rows: For each name a tensor of shape (B, ...).
        indices: The running numbers of the B images, which fix their groups, unless they are :class:`Indices` with
            groups of their own. Rows of negative numbers are left out.

    Returns:
        For each name a tensor of shape (GROUPS, ...), and under ``"images"`` the number of images, shape (GROUPS,).

    Example:
        >>> sums = grouped({"square": torch.ones(3, 2)}, [0, 1, 64])
        >>> sums["square"][0].tolist(), sums["images"][:2].tolist()
        ([2.0, 2.0], [2.0, 1.0])
    """
    sums = {}
    device = next(iter(rows.values())).device
    numbers = indices.groups if isinstance(indices, Indices) and indices.groups is not None else indices
    counted = [row for row, index in enumerate(indices) if index >= 0]
    # Made once, because each copy from the host has an accelerator wait.
    group = torch.as_tensor([numbers[row] % GROUPS for row in counted], dtype=torch.int64).to(device)
    chosen = None if len(counted) == len(indices) else torch.as_tensor(counted, dtype=torch.int64).to(device)
    ones = torch.ones(len(indices), dtype=coordinate_dtype(device), device=device)
    for name, values in {"images": ones, **rows}.items():
        some = values if chosen is None else values[chosen]
        sums[name] = some.new_zeros((GROUPS, *some.shape[1:])).index_add(0, group, some)
    return sums


MOMENTS: dict[str, tuple[int, ...]] = {"square": (), "projected": (), "entries": (), "total": (1,), "weight": (1,)}
"""What :func:`moments` gives for each sample, and its shape; a width that is not known yet is 1, which broadcasts."""


def moments(output: Tensor, representation: Representation) -> dict[str, Tensor]:
    r"""What the spread of an output needs, for each sample.

    The mean is taken off in the blocks of :meth:`~lie_metric.representations.Representation.components` alone, which
    hold the directions P that the action leaves at rest: all of scores, the channels of images, the trace of matrices,
    nothing of vectors.

    Args:
        output: Shape (B, ...).
        representation: How it transforms; positions of one block share a mean.

    Returns:
        Rows ``"square"`` ‖f‖², ``"projected"`` ‖Pf‖² and ``"entries"``, shape (B,); the sums of P f by element,
        ``"total"``, and how many positions each is of, ``"weight"``, (B, elements); in the dtype of coordinates.

    Example:
        >>> from lie_metric.representations import Image
        >>> rows = moments(torch.ones(1, 2, 4, 4), Image())
        >>> rows["total"].tolist(), rows["weight"].tolist()
        ([[16.0, 16.0]], [[16.0, 16.0]])
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in MOMENTS}
    for some, blocks in _samples_with_blocks(output, representation):
        count, entries = len(some), math.prod(some.shape[1:])
        square = some.reshape(count, entries).square().sum(1)
        blocks = [block.to(square.dtype) for block in blocks]
        covered = sum(block.numel() for block in blocks) == some.numel()
        none = square.new_zeros(count, 0)
        rows["square"].append(square)
        rows["projected"].append(
            square if covered else sum((block.square().sum((1, 2)) for block in blocks), 0 * square)
        )
        rows["entries"].append(torch.full_like(square, entries))
        rows["total"].append(torch.cat([none, *(block.sum(1) for block in blocks)], 1))
        weights = [block.new_full((count, block.shape[2]), block.shape[1]) for block in blocks]
        rows["weight"].append(torch.cat([none, *weights], 1))
    return {name: torch.cat(values) for name, values in rows.items()}


def _samples_with_blocks(output: Tensor, representation: Representation) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Samples in float64, and their blocks (samples, positions, elements).

    Yields:
        Tensors of one sample, or of several that are of one size.
    """
    wide = coordinate_dtype(output.device)
    if callable(getattr(representation, "samples", None)):
        for sample in samples(representation, output):
            yield sample.to(wide), representation.components(sample)
    else:
        # Squares are taken in float64, of a few samples at a time: large outputs would fill the memory twice.
        blocks, count = representation.components(output), rows_at_once(output[:1])
        for start in range(0, len(output), count):
            some = slice(start, start + count)
            yield output[some].to(wide), [block[some] for block in blocks]


def spread(sums: Sums) -> Tensor:
    r"""The spread Σ‖f - Pf‖² + n / (n - 1) Σ‖Pf - E Pf‖² over n samples, see :func:`moments`; positions are pooled.

    The factor makes it an unbiased estimate of n times the variance, from few samples as from many.

    Args:
        sums: Those of :func:`moments`, the number of ``images``, and ``rounding``, the output's precision.

    Returns:
        The spread, without the trailing axis of ``total``; NaN at rounding level, and for a single sample whose mean is
        taken off.

    Example:
        >>> values = torch.tensor([[1.0], [3.0]]).double()
        >>> two = torch.tensor(2.0).double()
        >>> parts = {"square": values.square().sum(), "total": values.sum(0), "weight": two[None], "images": two}
        >>> parts |= {"projected": parts["square"], "rounding": torch.tensor(1e-16)}
        >>> spread(parts).item()  # 2 · (1 + 1) / 1
        4.0
    """
    square, projected, images = sums["square"], sums["projected"], sums["images"]
    images = images.reshape((*images.shape, *[1] * (square.ndim - images.ndim)))
    mean_part = torch.where(sums["weight"] > 0, sums["total"].square() / sums["weight"].clamp(min=1), 0.0).sum(-1)
    about, rest = projected - mean_part, square - projected
    floor = square * ((ROUNDINGS * sums["rounding"]) ** 2).clamp(min=_CANCELLATION)
    known = (about + rest > floor) & ((images > 1) | (projected == 0))
    return torch.where(known, rest + about * images / (images - 1).clamp(min=1), torch.nan)


def totals(sums: Sums) -> dict[str, Tensor]:
    """The sums over all groups.

    Args:
        sums: Of shape (GROUPS, ...), or without axes, as a maximum over images.

    Returns:
        The same without the axis of groups.

    Example:
        >>> totals({"square": torch.ones(GROUPS, 2)})["square"].tolist()
        [64.0, 64.0]
    """
    return {name: value if value.ndim == 0 else value.sum(0) for name, value in sums.items()}


@dataclass(frozen=True, eq=False)
class Replicates:
    """A value and what it is without each group of images: all that an error or a comparison over images needs.

    Args:
        value: Shape (...).
        left_out: Shape (groups, ...): the value without each group; without one that holds no image it is the value.
        images: Shape (groups,): how many images each group holds.

    Example:
        >>> sums = grouped({"x": torch.tensor([1.0, 2.0, 6.0]).double()}, range(3))
        >>> mean = Replicates.of(sums, lambda s: s["x"] / s["images"])
        >>> mean.value.item(), mean.left_out[:4].tolist(), mean.groups
        (3.0, [4.0, 3.5, 1.5, 3.0], 3)
    """

    value: Tensor
    left_out: Tensor
    images: Tensor

    @classmethod
    def of(cls, sums: Sums, statistic: Callable[[Sums], Tensor]) -> Replicates:
        """The replicates of a statistic.

        Args:
            sums: Sums by group, among them ``images``.
            statistic: A function of the sums, for any leading axes.

        Returns:
            The replicates.
        """
        total = totals(sums)
        left = {name: value if value.ndim == 0 else total[name] - value for name, value in sums.items()}
        value = statistic(total)
        used = (sums["images"] > 0).reshape(-1, *[1] * value.ndim)
        # Sums without the only group are zero.
        return cls(value, torch.where(used, statistic(left), value), sums["images"])

    @property
    def groups(self) -> int:
        """How many groups hold images."""
        return int((self.images > 0).sum())

    def map(self, function: Callable[[Tensor], Tensor]) -> Replicates:
        """The replicates of a function of the value, taken entry by entry.

        Args:
            function: From a tensor to one of the same shape.

        Returns:
            The replicates.
        """
        return Replicates(function(self.value), function(self.left_out), self.images)

    def standard_error(self) -> Tensor:
        r"""The grouped jackknife with groups of unequal size (Busing, Meijer & van der Leeden 1999, Eq. 2.3).

        .. math:: \hat\sigma^2 = \frac1G \sum_j \frac{(\tilde\theta_j - \bar\theta)^2}{h_j - 1}, \qquad
            \tilde\theta_j = h_j \hat\theta - (h_j - 1)\,\hat\theta_{(j)}, \quad h_j = n / n_j

        Returns:
            The standard error over images, of the value's shape; NaN for fewer than two groups.
        """
        if self.groups < 2:
            return torch.full_like(self.value, torch.nan)
        used = self.images > 0
        share = self.images.sum(0) / self.images[used]
        share = share.reshape(-1, *[1] * self.value.ndim)
        pseudo = share * self.value - (share - 1) * self.left_out[used]
        return ((pseudo - pseudo.mean(0)).square() / (share - 1)).mean(0).sqrt()

    def interval(self, level: float = 0.95, *, logarithmic: bool = True) -> tuple[Tensor, Tensor]:
        r"""A confidence interval over images, on the scale of logarithms.

        .. math:: \exp(\log v \pm q\,\mathrm{se} / v)

        with q of Student's t with as many degrees of freedom as groups of images, less one.

        Args:
            level: Its probability.
            logarithmic: Whether the value is a positive one, of which ratios have a meaning; otherwise v ± q se.

        Returns:
            The ends, of the value's shape; NaN where a positive value is wanted and there is none.

        Raises:
            ValueError: If the level is no probability.
        """
        margin = quantile(validated_level(level), self.groups - 1) * self.standard_error()
        if not logarithmic:
            return self.value - margin, self.value + margin
        factor = (margin / torch.where(self.value > 0, self.value, torch.nan)).exp()
        return self.value / factor, self.value * factor


def standard_error(sums: Sums, statistic: Callable[[Sums], Tensor]) -> Tensor:
    r"""The grouped jackknife with groups of unequal size, see :meth:`Replicates.standard_error`.

    With one image in each group and a mean as the statistic it is the usual :math:`s / \sqrt n`.

    Args:
        sums: Sums by group, among them ``images``.
        statistic: A function of the sums, for any leading axes.

    Returns:
        The standard error over images, of the statistic's shape; NaN for fewer than two groups.

    Example:
        >>> sums = grouped({"x": torch.tensor([1.0, 2.0, 3.0, 4.0]).double()}, range(4))
        >>> round(standard_error(sums, lambda s: s["x"] / s["images"]).item() ** 2, 6)  # (5 / 3) / 4
        0.416667
    """
    return Replicates.of(sums, statistic).standard_error()


def validated_level(level: float) -> float:
    """A level of confidence, if it is one.

    Args:
        level: What was given.

    Returns:
        The level.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, got {level!r}. 0.95 is usual.")
    return float(level)


_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64, as signed numbers


def _scrambled(numbers: Tensor) -> Tensor:
    """int64 numbers through the finaliser of splitmix64 (Steele, Lea & Flood 2014), in arithmetic modulo 2^64."""
    numbers = numbers ^ ((numbers >> 30) & 0x3FFFFFFFF)
    numbers = numbers * _MULTIPLIERS[1]
    numbers = numbers ^ ((numbers >> 27) & 0x1FFFFFFFFF)
    numbers = numbers * _MULTIPLIERS[2]
    return numbers ^ ((numbers >> 31) & 0x1FFFFFFFF)


_AT_ONCE = 2**15
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def fingerprints(images: Tensor) -> Tensor:
    r"""A number for each image that its bytes fix, and that hardly any other image has.

    .. math:: h(x) = s(\textstyle\sum_i w_i x_i + w_0) \bmod 2^{32}

    over words x_i of at most 32 bits with pseudo-random w_i of 64 bits, in arithmetic modulo 2^64 (multilinear hashing,
    of which two images share the upper bits with probability 2^-32; Dietzfelbinger 1996), scrambled by s so that sums
    over images do not depend on sums of pixels alone.

    Args:
        images: Shape (B, ...).

    Returns:
        Whole numbers below 2^32, shape (B,), in the dtype of coordinates: sums of two million are exact in float64, in
        any order.

    Example:
        >>> one, other = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
        >>> other[1, 0, 0, 0] = 1e-30
        >>> (fingerprints(one) == fingerprints(other)).tolist()
        [True, False]
    """
    rows = images.detach().reshape(len(images), math.prod(images.shape[1:])).contiguous()
    words = rows.view(_WORDS.get(rows.element_size(), torch.uint8)) if rows.shape[1] else rows.to(torch.uint8)
    places = torch.arange(words.shape[1] + 1, device=words.device)
    weights = _scrambled(places * _MULTIPLIERS[0])
    # A few images at a time: words are widened to 64 bits.
    parts = words.split(max(1, _AT_ONCE // max(1, words.shape[1])))
    hashes = torch.cat([places[:0], *((part.long() * weights[1:]).sum(1) + weights[0] for part in parts)])
    hashes = (_scrambled(hashes) >> 16) & 0xFFFFFFFF
    if hashes.device.type == "mps":  # has no float64
        hashes = hashes.cpu()
    return hashes.to(torch.float64)


def defined(value: Tensor, measure: str, names: Sequence[str], reason: str, total: Sums) -> Tensor:
    """The values with NaN, and a warning that names them, where they are not defined.

    Args:
        value: A measure, with the names along its last axis.
        measure: Its name.
        names: What it is of.
        reason: Why a value may be undefined although there are images.
        total: The sums it was made of, among them ``images``.

    Returns:
        The values; infinite ones are NaN.

    Warns:
        UserWarning: If a value is NaN.

    Example:
        >>> defined(torch.tensor([1.0]), "lee", ["rotation"], "it is not finite", {"images": torch.tensor(3)}).tolist()
        [1.0]
    """
    undefined = ~torch.isfinite(value)
    if bool(undefined.any()):
        which = [name for name, bad in zip(names, undefined.flatten().tolist(), strict=False) if bad]
        warn(f"`{measure}` is NaN for {which}: {reason if bool(total['images']) else NOTHING}.")
        value = torch.where(undefined, torch.nan, value)
    return value


NOTHING = "no image was measured; call `update` with the model and images first"
