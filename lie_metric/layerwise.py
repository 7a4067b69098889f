r"""Where the equivariance error comes from: every torch function call of a model, and what it adds to the error.

Give every tensor inside a model an infinitesimal action, whichever. Each call then has a local Lie derivative
:math:`L f_i = D f_i [X \cdot in] - X \cdot out`, and pulled to the output by the rest of the model these add up to that
of the model, :math:`L f = \sum_i J_{out \leftarrow i}\, L f_i`, because what one call subtracts the next one adds. The
same holds for each product with a cotangent, and there the terms are numbers that flow along autograd's graph: no call
is differentiated forwards, and none can be missed on which a derivative of the model depends.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lie_metric.algebra import Generator, simplest_basis, spanning_set
from lie_metric.binding import on_grid, resolve_for
from lie_metric.functional.sums import Sums, grouped, standard_error, totals
from lie_metric.lie import Generators, linearise
from lie_metric.measured import function_of, validate_inputs
from lie_metric.options import Function, Options, Output
from lie_metric.randomness import noise, validate_seed
from lie_metric.recording import Flow, Operation, Recorder, Variable, recorded
from lie_metric.representations import Invariant, Representation
from lie_metric.resampling import Resampling, working_precision
from lie_metric.running import isolated
from lie_metric.warning import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Contribution", "LayerwiseReport", "layerwise_equivariance_error"]

Granularity = Literal["op", "module", "type"]
Probes = Literal["exact"] | int | None

FEW = 30
"""Shares of fewer images than this warn: those of single images of one network ran from 51 to 201 % for one type."""


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

    def to_frame(self, granularity: Granularity = "module", depth: int | None = None) -> Any:
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


def layerwise_equivariance_error(
    model: Callable[..., Any],
    inputs: Tensor,
    generators: Generators = "affine",
    *,
    probes: Probes = None,
    output: Output = "logits",
    function: Function | None = None,
    input_representation: Representation | None = None,
    output_representation: Representation | None = None,
    resampling: Resampling | None = None,
    representations: Mapping[str, Representation] | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
) -> LayerwiseReport:
    r"""Attributes the Lie derivative of a model to its operations, modules and types of operation.

    .. math:: L_X f = \sum_i c_i, \qquad c_i = J_{out \leftarrow i} \left( D f_i [X \cdot in] - X \cdot out \right)

    over every torch function call i (Gruver et al. 2023, Section 4, for modules of a chain; here any graph). The sum
    is exact whatever action hidden tensors are given, and the report holds what is left of it. The share of an
    operation is

    .. math:: \sum_x \langle c_i, L_X f \rangle \Big/ \sum_x \| L_X f \|^2

    over images x, with a standard error by the jackknife. Every image is measured as it is alone, also by a model in
    which the images of a batch influence one another. How a sum splits does depend on those actions: they are assumed
    from the layout, (B, C, H, W), (B, H, W, C) or tokens on a grid, and named in the report; every other tensor counts
    as invariant. Padded maps move as what they were padded around, so that the border that a padding makes up is a
    contribution of its own, of type "padding"; a convolution of maps that pads them is taken apart into both. Padding
    of pooling and of transposed convolutions stays in their own types. A contribution is no proof that a hidden feature
    "violates" anything.

    Convention:
        As in :func:`lie_metric.lie_derivative`. Hidden maps have the same units: half of their shorter side.

    Args:
        model: As in :func:`lie_metric.lie_derivative`; names of modules need an :class:`torch.nn.Module`.
        inputs: Shape (B, C, H, W).
        generators: K generators, by name or as given. For each image they share one forward pass.
        probes: None: the shares alone, exact up to rounding, by one backward pass for each generator and image, with
            L f as the cotangent. A number n: squared norms as well, estimated with n Gaussian probes for each image,
            one more backward pass each. ``"exact"``: all of it exactly, by one backward pass for each element of the
            output, which is also done where there are no more elements than there would be passes.
        output: As in :func:`lie_metric.lie_derivative`.
        function: As in :func:`lie_metric.lie_derivative`.
        input_representation: As in :func:`lie_metric.lie_derivative`.
        output_representation: As in :func:`lie_metric.lie_derivative`.
        resampling: The stencil; the default is ``Resampling()``.
        representations: Actions for tensors made inside the modules with these paths, where they fit; of modules that
            stand in one another the innermost counts. Complex tensors are invariant unless one is given here.
        chunk_size: How many tangents, and gradients of probes, are kept at a time; the memory is that of so many times
            the activations. By default all tangents, and 16 gradients.
        seed: Seed of random probes.

    Returns:
        The report.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``probes`` or ``seed`` is out of range, a path of ``representations`` is unknown, or there is
            nothing to measure.
        RuntimeError: If the model has no derivative, changes tensors where torch functions do not show it, calls
            other functions for one image than for another, or checkpoints reentrantly.

    Warns:
        UserWarning: If the contributions do not add up to the Lie derivative, with what may be missing; if the Lie
            derivative is zero or rounding, so that there are no shares of it; or if there are fewer than 30 images.

    Example:
        >>> import torch, lie_metric as lm
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten()).double()
        >>> report = lm.layerwise_equivariance_error(net, torch.rand(30, 1, 5, 5).double(), "rotation")
        >>> [row.name for row in report.by("module", depth=1)]
        ['0', '1', '2', '']
        >>> round(sum(row.share for row in report.by("type")), 9), report.residual["rotation"] < 1e-12
        (1.0, True)
    """
    options = Options(output, function, input_representation, output_representation, resampling, chunk_size=chunk_size)
    report = attributed(model, inputs, generators, options, probes=probes, representations=representations, seed=seed)
    if report.images < FEW:
        warn(
            f"Shares of {report.images} image{'s' * (report.images > 1)} scatter: measure {FEW} or more, and read them "
            "with their `share_standard_error`. Of one network the share of one type ran from 51 to 201 % over single "
            "images."
        )
    return report


def attributed(
    model: Callable[..., Any],
    inputs: Tensor,
    generators: Generators = "affine",
    options: Options | None = None,
    *,
    probes: Probes = None,
    representations: Mapping[str, Representation] | None = None,
    seed: int = 0,
) -> LayerwiseReport:
    """:func:`layerwise_equivariance_error` for those who log standard errors: no warning of few images.

    Args:
        model: The model.
        inputs: Images.
        generators: Generators.
        options: What is measured and how.
        probes: Probes.
        representations: Actions for hidden tensors by module path.
        seed: Seed of random probes.

    Returns:
        The report.
    """
    options = options or Options()
    resampling, chunk_size = options.stencil, options.chunk_size
    carrier = validate_inputs(model, inputs, options.input_representation, options.function)
    asked = resolve_for(generators, carrier)
    validate_probes(probes)
    validate_seed(seed)
    overrides = dict(representations or {})
    modules = _modules(model)
    paths = [path for places in modules.values() for path in places]
    for path in overrides:
        if path not in paths:
            close = difflib.get_close_matches(path, paths, 1)
            raise ValueError(
                f"`representations` must name modules of the model, got {path!r}."
                + (f" Did you mean {close[0]!r}?" if close else " See `model.named_modules()`.")
            )
    # Single numbers of a matrix make cheap tangents of images; what turns with space need not have an action for them.
    basis, matrix = (simplest_basis if on_grid(carrier) else spanning_set)(asked)
    matrix = matrix.to(inputs.device)
    count = probes if isinstance(probes, int) else 0
    method, checked = "auto", False

    def part(start: int, stop: int) -> _Part:
        nonlocal method, checked
        images = inputs[start:stop]
        with torch.no_grad():
            known = None if method == "auto" else method
            whole = linearise(model, images, asked, options, known=known, verify=known is None)
        if method == "auto":
            # The others are measured by what was found right for the first.
            method = whole.method
            checked = whole.check is not None and whole.check.status == "agrees"
        dimension = whole.output[0].numel()
        exact = probes == "exact" or dimension <= len(asked) + count
        derivative = whole.lie_derivatives.flatten(2).double()
        size = derivative.norm(dim=2)
        if exact:
            unit = torch.eye(dimension, dtype=torch.float64, device=size.device)
            cotangents = unit[:, None].expand(-1, len(images), -1)
        else:
            drawn = noise(derivative.new_zeros(len(images), count, dimension), range(start, stop), seed)
            along = derivative / size.where(size > 0, 1)[..., None]
            cotangents = torch.cat([along, drawn.transpose(0, 1)])
        cotangents = cotangents.to(whole.output)
        with isolated(model), torch.enable_grad():
            leaf = working_precision(images).detach().clone().requires_grad_()
            recorder = Recorder(leaf, carrier, modules, overrides)
            measured = function_of(model, options.output, options.function, frozen=True)
            with recorded(recorder, modules):
                result = measured(recorder.start)
            end = recorder.end(result, whole.representation)
            along_basis, level = _contributions(
                recorder,
                leaf,
                result,
                end,
                cotangents.reshape(-1, *result.shape),
                whole.representation,
                basis,
                resampling,
                chunk_size,
            )
        found = torch.einsum("kr,orbp->okbp", matrix, along_basis)
        total = torch.einsum("kbc,pbc->kbp", derivative, cotangents.double())
        if exact:
            products = (found * total).sum(3)
        else:
            own = range(len(asked))
            products = found[:, own, :, own].permute(1, 0, 2) * size
            found, total = found[..., len(asked) :], total[..., len(asked) :]
        # Of the output as a whole: a cotangent sees of its rounding what the cotangent's length makes of it.
        level *= dimension * len(images) / cotangents.double().square().sum().clamp(min=_TINY)
        return _Part(
            tuple(recorder.operations),
            products,
            size.square(),
            found,
            total,
            _ROUNDINGS * matrix.abs() @ level.sqrt(),
            exact,
            dimension,
            1e-6 if whole.output.dtype == torch.float64 else 1e-2,
            recorder.cut,
            recorder.ungraded,
        )

    # Small images are measured together, which is faster, if the first has the contributions that it has alone: a model
    # may mix images, and its tensors may not begin with an axis of images.
    first = part(0, 1)
    together = min(len(inputs), max(1, _TOGETHER // inputs[0].numel()))
    if together > 1:
        several = part(0, together)
        first, together = (several, together) if several.begins_with(first) else (first, 1)
    parts = [first, *(part(start, start + together) for start in range(together, len(inputs), together))]
    if any(other.calls != first.calls for other in parts):
        raise RuntimeError(
            "`model` must call the same functions for every image, but calls others for one image than for the "
            "one before it. Measure such images one by one."
        )
    report = LayerwiseReport(
        tuple(generator.name for generator in asked),
        first.operations,
        torch.cat([one.products for one in parts], 2),
        torch.cat([one.squares for one in parts], 1),
        torch.cat([one.vectors for one in parts], 2).flatten(2) if first.exact or count else None,
        torch.cat([one.total for one in parts], 1).flatten(1) if first.exact or count else None,
        torch.stack([one.rounding for one in parts]).square().sum(0).sqrt(),
        _visited(modules, first.operations),
        first.exact,
        len(inputs),
        first.dimension,
        resampling,
    )
    cut, ungraded = (set().union(*sets) for sets in zip(*((one.cut, one.ungraded) for one in parts), strict=True))
    _warn_of_gaps(report, first.bound, cut, ungraded, checked)
    return report


@dataclass(frozen=True)
class _Part:
    """What is found for B images that were measured together; shapes as in the report, with images and probes apart."""

    operations: tuple[Operation, ...]
    products: Tensor
    squares: Tensor
    vectors: Tensor
    total: Tensor
    rounding: Tensor
    exact: bool
    dimension: int
    bound: float
    cut: set[str]
    ungraded: set[str]

    @property
    def calls(self) -> list[tuple[str, str]]:
        return [(operation.path, operation.function) for operation in self.operations]

    def begins_with(self, alone: _Part) -> bool:
        """Whether the first image has the contributions that it has alone."""
        if self.calls != alone.calls:
            return False
        error = (self.products[:, :, 0] - alone.products[:, :, 0]).abs().amax(0)
        square = alone.squares[:, 0]
        return bool((error < torch.maximum(self.bound * square, alone.rounding * square.sqrt())).all())


def validate_probes(probes: object) -> None:
    """Refuses what is no number of probes.

    Args:
        probes: What was given.

    Raises:
        ValueError: If it is none of None, ``"exact"`` and a positive integer.
    """
    if probes not in (None, "exact") and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1):
        raise ValueError(
            "`probes` must be None (shares alone), a positive integer (squared norms as well) or 'exact', got "
            f"{probes!r}."
        )


def _warn_of_gaps(report: LayerwiseReport, bound: float, cut: set[str], ungraded: set[str], checked: bool) -> None:
    """Says where contributions are missing, and where there is nothing that they could have a share of."""
    sizes, left = report.squares.sum(1).sqrt(), report.missed
    missed = ~(left <= torch.maximum(bound * sizes, report.rounding))
    cuts = f"The model detaches tensors that depend on its input, or takes them out of torch, in {sorted(cut)[:4]}"
    if missed.any():
        errors = [math.inf if not error <= math.inf else error for error in report.residual.values()]
        worst = max(zip(missed.tolist(), errors, report.names, strict=True))[2]
        reasons = [f"It computes without gradients, such as {sorted(ungraded)[:4]}."] if ungraded else []
        reasons += [f"{cuts}."] if cut else []
        reasons += [] if reasons else ["Perhaps a `torch.autograd.Function` has a backward pass of another function."]
        warn(
            f"The contributions miss {report.residual[worst]:.1e} of the Lie derivative ({worst}): gradients do not "
            f"follow all that the model computes. {' '.join(reasons)} Shares do not add up to 1.",
        )
    elif cut and not checked:
        warn(f"{cuts}: no contribution follows them, and perhaps no derivative of the model.")
    nothing = [name for name, more in zip(report.names, report.measurable.tolist(), strict=True) if not more]
    if nothing:
        warn(f"The Lie derivative is zero or rounding ({', '.join(nothing)}), so that shares of it are NaN.")


def _modules(model: object) -> dict[nn.Module, list[str]]:
    """The paths of every module, in the order of the model; one that stands in several places has several."""
    modules: dict[nn.Module, list[str]] = {}
    if isinstance(model, nn.Module):
        for path, module in model.named_modules(remove_duplicate=False):
            modules.setdefault(module, []).append(path)
    return modules


def _visited(modules: Mapping[nn.Module, Sequence[str]], operations: Sequence[Operation]) -> tuple[str, ...]:
    """The paths of modules: of each the first, and those of the others from which it was called."""
    called = {operation.path for operation in operations}
    return tuple(
        path
        for places in modules.values()
        for path in places
        if path == places[0] or any(name == path or name.startswith(f"{path}.") for name in called)
    )


def _contributions(
    recorder: Recorder,
    leaf: Tensor,
    result: Tensor,
    end: Variable | None,
    cotangents: Tensor,
    representation: Representation,
    basis: Sequence[Generator],
    resampling: Resampling,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The products of all contributions with the cotangents, by image, and how precise they are.

    Shapes are (operations, generators, images, probes) and (generators,); the latter is the sum over images and probes
    of the square of one rounding of all that flows. Products are NaN where a tensor cannot be split into images.

    What a cotangent u makes of an operation's contribution is ⟨uJ, Df[X·in]⟩ - ⟨uJ, X·out⟩: what flows in, the
    products of X·in with the gradient through the operation, less what flows out, which flows into later operations.
    """
    images, probes = recorder.images, len(cotangents)
    balance = torch.zeros(
        len(recorder.operations), len(basis), images, probes, dtype=torch.float64, device=result.device
    )
    level = balance.new_zeros(len(basis))
    if end is None or not basis:
        return balance, level
    plain = resampling.padding != "zeros" and not any(generator.intensity for generator in basis)
    conserving = {index for index, operation in enumerate(recorder.operations) if operation.commutes and plain}
    flows = [flow for flow in recorder.flows if _acts(flow.variable)]
    known, implied = _independent(flows, conserving)

    def book(flow: Flow, amount: Tensor) -> None:
        balance[flow.operation] += amount
        if flow.variable.producer is not None:
            balance[flow.variable.producer] -= amount

    by_variable: dict[Variable, list[Flow]] = {}
    for flow in known:
        by_variable.setdefault(flow.variable, []).append(flow)
    size = chunk_size or _PROBES
    for start in range(0, len(cotangents), size):
        part = slice(start, start + size)
        gradients = _gradients(known, end, leaf, result, cotangents[part])
        for variable, leaving in by_variable.items():
            if variable.value._version != variable.version:
                made = "the input" if variable.producer is None else repr(recorder.operations[variable.producer])
                raise RuntimeError(
                    f"`model` changes a tensor in place where autograd does not follow, after {made} made it, so that "
                    "its action is not known. Let it make a new tensor."
                )
            action = _act(variable.value, variable.representation, basis, resampling).flatten(1)
            precise = torch.promote_types(action.dtype, torch.float32)
            for flow in leaving:
                amount = torch.zeros_like(balance[0])
                if flow in gradients:
                    # For complex tensors autograd's gradient is that of the real inner product.
                    gradient = gradients.pop(flow).to(precise)
                    amount[..., part] = _by_image(action.to(precise), gradient, images)
                    level += _rounding(action, gradient, variable.value)
                book(flow, amount)
    wanted = representation.tangents(end.value, basis, resampling).flatten(1)
    balance[-1] -= _by_image(wanted, cotangents.flatten(1), images)
    level += _rounding(wanted, cotangents.flatten(1), end.value)
    for flow, operation in implied:
        book(flow, -balance[operation] if flow.operation == operation else balance[operation].clone())
    return balance, level


def _by_image(actions: Tensor, gradients: Tensor, images: int) -> Tensor:
    """Inner products of what each image makes of two tensors: (R, n) and (P, n) to (R, images, P)."""
    if actions.shape[1] % images:
        return actions.new_full((len(actions), images, len(gradients)), torch.nan, dtype=torch.float64)
    first, second = (one.reshape(len(one), images, -1).transpose(0, 1) for one in (actions, gradients))
    return (first @ second.mH).real.transpose(0, 1).double()


_TINY = 1e-300

# How many numbers the images have that are measured together: 42 images of 32 pixels, or one of 224.
_TOGETHER = 2**17

# Up to how many times the rounding of all that flows a sum of contributions is taken for rounding.
_ROUNDINGS = 1e3


def _rounding(action: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """The square of one rounding of products of actions with gradients, summed over gradients: shape (generators,).

    Products of n elements, each off by a rounding of its own, are off by that times the norm of what is summed, which
    is that of the factors over √n.
    """
    sizes = torch.linalg.vector_norm(action, dim=1).double() * torch.linalg.vector_norm(gradient).double()
    precision = torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
    return (precision * sizes).square() / action.shape[1]


def _acts(variable: Variable) -> bool:
    return variable.value.numel() > 0 and not isinstance(variable.representation, Invariant)


# How many probes' gradients are kept at a time: all actions are computed anew for each such part.
_PROBES = 16


def _independent(flows: Sequence[Flow], conserving: set[int]) -> tuple[list[Flow], list[tuple[Flow, int]]]:
    """Which flows are to be computed, and which follow from them, in this order, as the balance of which operation.

    As much flows into an operation that commutes with the action as flows out: Kirchhoff's law, with all others as one
    ground. The flows along a spanning tree follow from the rest; the tree of the largest tensors leaves least to do.
    """
    ground = -1
    parents = {operation: operation for operation in (*conserving, ground)}

    def root(operation: int) -> int:
        while parents[operation] != operation:
            parents[operation] = operation = parents[parents[operation]]
        return operation

    known: list[Flow] = []
    tree: dict[int, list[tuple[int, Flow]]] = {operation: [] for operation in parents}
    for flow in sorted(flows, key=lambda flow: -flow.variable.value.numel()):
        producer = -1 if flow.variable.producer is None else flow.variable.producer
        ends = [operation if operation in conserving else ground for operation in (producer, flow.operation)]
        first, second = map(root, ends)
        if first == second:
            known.append(flow)
        else:
            parents[first] = second
            for here, there in (ends, ends[::-1]):
                tree[here].append((there, flow))
    implied, ahead, seen = [], [ground], {ground}
    while ahead:
        for operation, flow in tree[ahead.pop()]:
            if operation not in seen:
                seen.add(operation)
                ahead.append(operation)
                implied.append((flow, operation))
    return known, implied[::-1]


def _gradients(
    flows: Sequence[Flow], end: Variable, leaf: Tensor, result: Tensor, cotangents: Tensor
) -> dict[Flow, Tensor]:
    """The gradients by which tensors flow into operations, shape (n, elements), where there are any."""
    wanted: dict[Any, list[tuple[Flow, int]]] = {}
    for flow in flows:
        for node, place in flow.sockets:
            wanted.setdefault(node, []).append((flow, place))
    # An output that is the model's result has no gradient but the cotangent.
    found = {flow: cotangents.flatten(1) for flow in flows if flow.variable is end and not flow.sockets}
    arrived: dict[Flow, Tensor] = {}

    def listen(here: list[tuple[Flow, int]], gradients: tuple[Tensor | None, ...]) -> None:
        for flow, place in here:
            gradient = gradients[place]
            if gradient is not None:
                arrived[flow] = arrived[flow] + gradient if flow in arrived else gradient

    handles = [
        node.register_hook(lambda gradients, _, here=here: listen(here, gradients)) for node, here in wanted.items()
    ]
    try:
        for probe, cotangent in enumerate(cotangents):
            torch.autograd.grad(result, leaf, cotangent, retain_graph=True)
            while arrived:
                flow, gradient = arrived.popitem()
                if flow not in found:
                    found[flow] = gradient.new_zeros(len(cotangents), gradient.numel())
                found[flow][probe] = gradient.reshape(-1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _act(tensor: Tensor, carrier: Representation, basis: Sequence[Generator], resampling: Resampling) -> Tensor:
    with torch.no_grad():
        if tensor.is_complex():
            parts = [_act(part, carrier, basis, resampling) for part in (tensor.real, tensor.imag)]
            return torch.complex(*parts)
        moved = carrier.tangents(tensor, basis, resampling)
        # Padding by -inf ahead of a maximum, and masks of attention by -inf or the lowest of all numbers, leave slopes
        # that mean nothing: such entries carry no action.
        limit = torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).max ** 0.5
        if tensor.abs().amax() <= limit:
            return moved
        return torch.where(moved.abs() <= limit, moved, 0.0)
