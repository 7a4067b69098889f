"""The Lie derivative of a model's output by operations, modules and types: rows, shares, tables and pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lie_metric.attribution.graph import Operation
from lie_metric.functional.sums import Sums, grouped, standard_error, totals
from lie_metric.resampling import Resampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Contribution", "Granularity", "LayerwiseReport", "share"]


Granularity = Literal["op", "module", "type"]


@dataclass(frozen=True)
class Contribution:
    """What a part of a model adds to the Lie derivative of its output.

    Attributes:
        name: The op, module path or type.
        generator: The generator's name.
        squared_norm: ‖c‖² / dim of the part's vector c, mean over images; squared output units per squared unit of t.
            Operations are added up before squaring, and squared norms of parts do not add up. None without probes.
        share: Σ⟨c, L f⟩ / Σ‖L f‖², sums over images, signed; shares of a partition add up to 1, but for the residual.
            NaN where L f is nothing but rounding.
        calls: How many recorded torch function calls the part holds.
        standard_error: Of ``squared_norm``, over images; for one image over random probes, or NaN. None without probes.
        share_standard_error: Of ``share``, over images, by the jackknife; NaN for one image.
    """

    name: str
    generator: str
    squared_norm: float | None
    share: float
    calls: int
    standard_error: float | None
    share_standard_error: float


@dataclass(frozen=True)
class LayerwiseReport:
    """The Lie derivative of a model's output, taken apart into the operations it comes from.

    Attributes:
        names: The K generators.
        operations: The recorded calls, in order; the last one, "output", holds the action on the model's output where
            it differs from the one assumed for the tensor.
        products: Shape (operations, K, B), float64: ⟨c, L f⟩ of each operation, generator and image.
        squares: Shape (K, B): ‖L f‖², computed without taking it apart.
        vectors: Shape (operations, K, B · P), float64, or None where nothing but shares was asked for: the products of
            c with P cotangents for each image. With exact probes these are its elements, so that ``vectors.sum(0)`` is
            the flattened Lie derivative itself; otherwise P random ones.
        total: Shape (K, B · P): the same of the model's Lie derivative, computed without taking it apart; or None.
        rounding: Shape (K,): norms of the sum of all c, and of L f, up to this one may be rounding.
        modules: Paths of the model's modules.
        exact: Whether probes are the output's elements.
        images: Number of images, B.
        dimension: Number of output elements of one image.
        stencil: The stencil.
    """

    names: tuple[str, ...]
    operations: tuple[Operation, ...]
    products: Tensor
    squares: Tensor
    vectors: Tensor | None
    total: Tensor | None
    rounding: Tensor
    modules: tuple[str, ...]
    exact: bool
    images: int
    dimension: int
    stencil: Resampling

    @property
    def residual(self) -> dict[str, float]:
        """The completeness error of each generator.

        By how much the shares of each image fail to add up to 1, as a root mean square over images with weights ‖L f‖⁴:
        it sees what of Σc - L f points along L f. Where there are probes, the larger one of it and
        ‖Σc - L f‖ / ‖L f‖, which sees all of it. Where L f is rounding, both times ‖L f‖.
        """
        return dict(zip(self.names, (self.missed / self._sizes.where(self.measurable, 1)).tolist(), strict=True))

    @property
    def measurable(self) -> Tensor:
        """Shape (K,): whether L f is more than rounding, so that there are shares of it."""
        return ~(self._sizes <= self.rounding)

    @property
    def missed(self) -> Tensor:
        """Shape (K,): the absolute completeness error, a norm as ‖L f‖ over all images, see ``residual``."""
        left = (self.products.sum(0) - self.squares).norm(dim=1)
        squares = self.squares.norm(dim=1)
        missed = left / squares.where(squares > 0, 1) * self._sizes
        if self.vectors is None or self.total is None:
            return missed
        errors = self.vectors.sum(0) - self.total
        return torch.maximum(missed, errors.norm(dim=1) / (1 if self.exact else self._probes**0.5))

    @property
    def _sizes(self) -> Tensor:
        return self.squares.sum(1).sqrt()

    @property
    def _probes(self) -> int:
        """Cotangents for each image."""
        return 0 if self.vectors is None else self.vectors.shape[2] // self.images

    @property
    def assumed(self) -> dict[str, int]:
        """How many outputs of operations were assumed to carry which action."""
        return dict(Counter(operation.representation for operation in self.operations))

    def by(self, granularity: Granularity, depth: int | None = None) -> list[Contribution]:
        """The contributions of parts of the model.

        Args:
            granularity: ``"op"``: every call. ``"module"``: every module by its path, the sum of all operations inside
                it, so that rows nest and "" is the whole model. ``"type"``: convolution, activation, ...
            depth: With ``"module"``: the partition into modules of at most this depth, which adds up.

        Returns:
            A row for each part and generator, in the order of the model.

        Raises:
            ValueError: If the granularity is unknown, the depth negative, or given without modules.
        """
        groups = self._groups(granularity, depth)
        sums = self._sums([self.products[indices].sum(0) for indices in groups.values()], 0)
        shares, errors = share(totals(sums)), standard_error(sums, share)
        rows = []
        for part, (name, indices) in enumerate(groups.items()):
            norms = self._squared_norms(indices)
            for k, generator in enumerate(self.names):
                norm, error = (None, None) if norms is None else (float(norms[0][k]), float(norms[1][k]))
                found = float(shares[part, k]), len(indices), error, float(errors[part, k])
                rows.append(Contribution(name, generator, norm, *found))
        return rows

    def sums(self, granularity: Granularity, first: int = 0) -> tuple[list[str], dict[str, Tensor]]:
        """What the shares of parts are made of, to be added up over batches or processes.

        Args:
            granularity: See :meth:`by`.
            first: Running number of the first image; numbers fix the groups of the jackknife.

        Returns:
            Names of the parts, and sums by group of images for :func:`share`.
        """
        groups = self._groups(granularity, None)
        return list(groups), self._sums([self.products[indices].sum(0) for indices in groups.values()], first)

    def _sums(self, parts: Sequence[Tensor], first: int) -> dict[str, Tensor]:
        rounding = (self.rounding.square() / self.images).expand(self.images, -1)
        rows = {"part": torch.stack(list(parts)).permute(2, 0, 1), "whole": self.squares.T, "rounding": rounding}
        return grouped(rows, range(first, first + self.images))

    def _squared_norms(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """‖c‖² / dim of the sum of operations, and its standard error, for each generator."""
        if self.vectors is None:
            return None
        squares = self.vectors[indices].sum(0).square().reshape(len(self.names), self.images, -1) / self.dimension
        samples = squares.sum(2) if self.exact else squares.mean(2)
        scattering = squares[:, 0] if self.images == 1 and not self.exact else samples
        count = scattering.shape[1]
        error = scattering.std(1) / math.sqrt(count) if count > 1 else torch.full((len(samples),), torch.nan)
        return samples.mean(1), error

    def _groups(self, granularity: Granularity, depth: int | None) -> dict[str, list[int]]:
        """The operations of each part."""
        if depth is not None and (granularity != "module" or depth < 0):
            raise ValueError(f"`depth` must be a non-negative integer given with 'module', got {depth!r}.")
        groups: dict[str, list[int]] = {}
        if granularity == "module" and depth is None:
            groups = {path: [] for path in self.modules}
        for index, operation in enumerate(self.operations):
            for name in self._parts(index, operation, granularity, depth):
                groups.setdefault(name, []).append(index)
        return groups

    def _parts(self, index: int, operation: Operation, granularity: str, depth: int | None) -> Iterator[str]:
        if granularity == "op":
            yield f"{index}:{operation.path or 'model'}:{operation.function}"
        elif granularity == "type":
            yield operation.kind
        elif granularity == "module":
            steps = operation.path.split(".") if operation.path else []
            if depth is not None:
                yield ".".join(steps[:depth])
            else:
                yield from (".".join(steps[:end]) for end in range(len(steps) + 1))
        else:
            raise ValueError(f"`granularity` must be 'op', 'module' or 'type', got {granularity!r}.")

    def to_frame(self, granularity: Granularity = "module", depth: int | None = None) -> DataFrame:
        """The rows of :meth:`by` as a pandas DataFrame.

        Args:
            granularity: See :meth:`by`.
            depth: See :meth:`by`.

        Returns:
            A DataFrame with a column for each attribute of :class:`Contribution`.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Frames need pandas, which is not installed. Run `pip install 'lie_metric[examples]'`."
            ) from error
        return pandas.DataFrame([vars(row) for row in self.by(granularity, depth)])

    def plot(self) -> Figure:
        """Shares by type with their standard errors, and how shares add up along the network, for every generator.

        Returns:
            A figure, see :func:`lie_metric.figures.layerwise`.
        """
        from lie_metric import figures

        rows = self.by("type")
        bars = {
            generator: {row.name: (row.share, row.share_standard_error) for row in rows if row.generator == generator}
            for generator in self.names
        }
        along = self.products.sum(2).cumsum(0) / self.squares.sum(1).where(self.measurable, torch.nan)
        curves = dict(zip(self.names, along.T.tolist(), strict=True))
        residual = max(self.residual.values())
        measured = f"{self.images} images, {len(self.operations)} operations; completeness error {residual:.1e}"
        caption = f"Stencil: {self.stencil}. {measured}."
        return figures.layerwise(bars, curves, caption=caption)

    def __str__(self) -> str:
        lines = [f"{'type':24}{'generator':>20}{'share':>9}{'±':>8}{'squared norm':>16}{'calls':>7}"]
        for row in self.by("type"):
            norm = "" if row.squared_norm is None else f"{row.squared_norm:.3e}"
            shares = f"{100 * row.share:8.1f}%{100 * row.share_standard_error:7.1f}%"
            lines.append(f"{row.name:24}{row.generator:>20}{shares}{norm:>16}{row.calls:7d}")
        lines.append("completeness error: " + ", ".join(f"{name} {value:.1e}" for name, value in self.residual.items()))
        return "\n".join(lines)


def share(sums: Sums) -> Tensor:
    """Σ⟨c, L f⟩ / Σ‖L f‖², the shares of parts in the Lie derivative.

    Args:
        sums: ``part`` (..., parts, K), ``whole`` and ``rounding`` (..., K), see :meth:`LayerwiseReport.sums`.

    Returns:
        Shape (..., parts, K); NaN where the whole is rounding.

    Example:
        >>> part, whole = torch.tensor([[1.0], [3.0]]), torch.tensor([4.0])
        >>> share({"part": part, "whole": whole, "rounding": torch.tensor([1e-9])}).flatten().tolist()
        [0.25, 0.75]
    """
    whole = sums["whole"].where(~(sums["whole"] <= sums["rounding"]), torch.nan)
    return sums["part"] / whole[..., None, :]
