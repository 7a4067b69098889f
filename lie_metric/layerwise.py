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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lie_metric.algebra import simplest_basis, spanning_set
from lie_metric.attribution.flows import contributions
from lie_metric.attribution.graph import Operation
from lie_metric.attribution.recording import Recorder, recorded
from lie_metric.attribution.report import Contribution, LayerwiseReport, share
from lie_metric.binding import on_grid, resolve_for
from lie_metric.lie import Generators, linearise
from lie_metric.measured import function_of, validate_inputs
from lie_metric.options import Function, Options, Output
from lie_metric.randomness import noise, validate_seed
from lie_metric.representations import Representation
from lie_metric.resampling import Resampling, working_precision
from lie_metric.running import isolated
from lie_metric.warning import warn

__all__ = [
    "Contribution",
    "LayerwiseReport",
    "Probes",
    "attributed",
    "layerwise_equivariance_error",
    "share",
    "validate_probes",
]
Probes = Literal["exact"] | int | None

FEW = 30
"""Shares of fewer images than this warn: those of single images of one network ran from 51 to 201 % for one type."""


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
            drawn = noise(derivative.new_zeros(len(images), count, dimension), range(start, start + len(images)), seed)
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
            along_basis, level = contributions(
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


_TINY = 1e-300

# How many numbers the images have that are measured together: 42 images of 32 pixels, or one of 224.
_TOGETHER = 2**17

# Up to how many times the rounding of all that flows a sum of contributions is taken for rounding.
_ROUNDINGS = 1e3
