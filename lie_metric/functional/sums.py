"""Sums over images, kept for groups of them, so that any function of the sums has a standard error (the jackknife)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lie_metric.representations import Representation
from lie_metric.resampling import coordinate_dtype
from lie_metric.warning import warn

__all__ = ["GROUPS", "Sums", "defined", "grouped", "moments", "spread", "standard_error", "totals"]

Sums = Mapping[str, Tensor]

GROUPS = 64
"""Groups of images that the jackknife leaves out in turn; fewer images make groups of one."""

# A spread below this many roundings of the output cannot be told from rounding. The second number is where the
# subtraction of two float64 sums ends.
ROUNDINGS, _CANCELLATION = 8.0, 1e-13


def grouped(rows: Mapping[str, Tensor], indices: Sequence[int]) -> dict[str, Tensor]:
    """Adds up rows by the group of their image.

    Args:
        rows: For each name a tensor of shape (B, ...).
        indices: The running numbers of the B images, which fix their groups.

    Returns:
        For each name a tensor of shape (GROUPS, ...), and under ``"images"`` the number of images, shape (GROUPS,).

    Example:
        >>> sums = grouped({"square": torch.ones(3, 2)}, [0, 1, 64])
        >>> sums["square"][0].tolist(), sums["images"][:2].tolist()
        ([2.0, 2.0], [2.0, 1.0])
    """
    sums = {}
    for name, values in {"images": None, **rows}.items():
        if values is None:
            some = next(iter(rows.values()))
            values = torch.ones(len(indices), dtype=coordinate_dtype(some.device), device=some.device)
        group = torch.as_tensor(indices, device=values.device) % GROUPS
        sums[name] = values.new_zeros((GROUPS, *values.shape[1:])).index_add(0, group, values)
    return sums


def moments(output: Tensor, representation: Representation) -> dict[str, Tensor]:
    """What the spread of an output needs, for each image: its square, its sums by element, and how many each is of.

    Args:
        output: Shape (B, ...).
        representation: How it transforms; positions of one channel share a mean.

    Returns:
        Rows ``"square"`` (B,), ``"total"`` and ``"weight"`` (B, elements), in the dtype of coordinates.

    Example:
        >>> from lie_metric.representations import Image
        >>> rows = moments(torch.ones(1, 2, 4, 4), Image())
        >>> rows["total"].tolist(), rows["weight"].tolist()
        ([[16.0, 16.0]], [[16.0, 16.0]])
    """
    wide = coordinate_dtype(output.device)
    rows: dict[str, list[Tensor]] = {"square": [], "total": [], "weight": []}
    blocks = representation.components(output)
    for image in range(len(output)):
        # Squares are taken in float64, one image at a time: large outputs would fill the memory twice.
        rows["square"].append(output[image].to(wide).square().sum())
        rows["total"].append(torch.cat([block[image].to(wide).sum(0) for block in blocks]))
        rows["weight"].append(
            torch.cat([torch.full(b.shape[2:], b.shape[1], dtype=wide, device=output.device) for b in blocks])
        )
    return {name: torch.stack(values) for name, values in rows.items()}


def spread(sums: Sums) -> Tensor:
    r"""n / (n - 1) Σ‖f - E f‖² over n images, each element about its own mean, positions of an image pooled.

    The factor makes it an unbiased estimate of n times the variance, from few images as from many.

    Args:
        sums: ``square``, ``total`` and ``weight`` as in :func:`moments`, the number of ``images``, and ``rounding``, the
            output's precision.

    Returns:
        The spread, without the trailing axis of ``total``; NaN at rounding level and for a single image.

    Example:
        >>> values = torch.tensor([[1.0], [3.0]]).double()
        >>> two = torch.tensor(2.0).double()
        >>> parts = {"square": values.square().sum(), "total": values.sum(0), "weight": two[None], "images": two}
        >>> spread(parts | {"rounding": torch.tensor(1e-16)}).item()  # 2 · (1 + 1) / 1
        4.0
    """
    square, images = sums["square"], sums["images"]
    mean_part = torch.where(sums["weight"] > 0, sums["total"].square() / sums["weight"].clamp(min=1), 0.0).sum(-1)
    found = square - mean_part
    floor = square * ((ROUNDINGS * sums["rounding"]) ** 2).clamp(min=_CANCELLATION)
    return torch.where((found > floor) & (images > 1), found * images / (images - 1), torch.nan)


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


def standard_error(sums: Sums, statistic: Callable[[Sums], Tensor]) -> Tensor:
    r"""The grouped jackknife with groups of unequal size (Busing, Meijer & van der Leeden 1999, Eq. 2.3).

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
    total = totals(sums)
    used = sums["images"] > 0
    groups = int(used.sum())
    whole = statistic(total)
    if groups < 2:
        return torch.full_like(whole, torch.nan)
    left = {name: value if value.ndim == 0 else total[name] - value[used] for name, value in sums.items()}
    share = total["images"] / sums["images"][used]
    share = share.reshape(-1, *[1] * whole.ndim)
    pseudo = share * whole - (share - 1) * statistic(left)
    return ((pseudo - pseudo.mean(0)).square() / (share - 1)).mean(0).sqrt()


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
