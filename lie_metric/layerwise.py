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

from lie_metric.algebra import Generator, simplest_basis
from lie_metric.algebra import generators as resolve
from lie_metric.lie import Generators, linearise
from lie_metric.measured import Function, Output, function_of, validate_inputs, validate_options
from lie_metric.randomness import validate_seed
from lie_metric.recording import Flow, Operation, Recorder, Variable, recorded
from lie_metric.representations import Image, Invariant, Representation
from lie_metric.resampling import Resampling, working_precision
from lie_metric.running import isolated
from lie_metric.warning import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Contribution", "LayerwiseReport", "layerwise_equivariance_error"]

Granularity = Literal["op", "module", "type"]


@dataclass(frozen=True)
class Contribution:
    """What a part of a model adds to the Lie derivative of its output.

    Attributes:
        name: The op, module path or type.
        generator: The generator's name.
        squared_norm: ‖c‖² / dim of the part's vector c, mean over images; squared output units per squared unit of t.
            Operations are added up before squaring, and squared norms of parts do not add up.
        share: ⟨c, Σc⟩ / ‖Σc‖², signed; shares of a partition add up to 1. NaN where Σc is nothing but rounding.
        calls: How many recorded torch function calls the part holds.
        standard_error: Of ``squared_norm``, over images (exact probes) or over probes (random ones); NaN for one.
    """

    name: str
    generator: str
    squared_norm: float
    share: float
    calls: int
    standard_error: float


@dataclass(frozen=True)
class LayerwiseReport:
    """The Lie derivative of a model's output, taken apart into the operations it comes from.

    Attributes:
        names: The K generators.
        operations: The recorded calls, in order; the last one, "output", holds the action on the model's output where
            it differs from the one assumed for the tensor.
        vectors: Shape (operations, K, probes), float64. With exact probes entry p is element p of the flattened output
            of all images, so that ``vectors.sum(0)`` is the Lie derivative itself; otherwise it is the product with
            random probe p.
        total: Shape (K, probes): the same of the model's Lie derivative, computed without taking it apart.
        rounding: Shape (K,): norms of sums of ``vectors``, and of ``total``, up to this one may be rounding.
        modules: Paths of the model's modules.
        exact: Whether probes are the output's elements.
        images: Number of images.
        dimension: Number of output elements of one image.
        stencil: The stencil.
    """

    names: tuple[str, ...]
    operations: tuple[Operation, ...]
    vectors: Tensor
    total: Tensor
    rounding: Tensor
    modules: tuple[str, ...]
    exact: bool
    images: int
    dimension: int
    stencil: Resampling

    @property
    def residual(self) -> dict[str, float]:
        """The completeness error ‖Σc - L f‖ / ‖L f‖ of each generator; the absolute one where L f is rounding."""
        left = (self.vectors.sum(0) - self.total).norm(dim=1)
        size = self.total.norm(dim=1)
        relative = left / size.where(size > self.rounding, torch.ones_like(size))
        return dict(zip(self.names, relative.tolist(), strict=True))

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
        if depth is not None and (granularity != "module" or depth < 0):
            raise ValueError(f"`depth` must be a non-negative integer given with 'module', got {depth!r}.")
        groups: dict[str, list[int]] = {}
        if granularity == "module" and depth is None:
            groups = {path: [] for path in self.modules}
        for index, operation in enumerate(self.operations):
            for name in self._parts(index, operation, granularity, depth):
                groups.setdefault(name, []).append(index)
        whole = self.vectors.sum(0)
        rows = []
        for name, indices in groups.items():
            part = self.vectors[indices].sum(0)
            squares = part.square()
            if self.exact:
                squares = squares.reshape(len(self.names), self.images, -1).sum(2)
                samples = squares / self.dimension
            else:
                samples = squares / (self.dimension * self.images)
            count = samples.shape[1]
            error = samples.std(1) / math.sqrt(count) if count > 1 else torch.full((len(samples),), torch.nan)
            share = (part * whole).sum(1) / whole.square().sum(1)
            share = share.where(whole.norm(dim=1) > self.rounding, torch.nan)
            for k, generator in enumerate(self.names):
                row = (float(samples[k].mean()), float(share[k]), len(indices), float(error[k]))
                rows.append(Contribution(name, generator, *row))
        return rows

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
        """Bars by type, and the norm of the sum of all contributions up to each operation, for every generator.

        Returns:
            A figure, see :func:`lie_metric.figures.layerwise`.
        """
        from lie_metric import figures

        scale = self.dimension * self.images if self.exact else self.dimension * self.images * self.vectors.shape[2]
        along = (self.vectors.cumsum(0).square().sum(2) / scale).sqrt()
        bars = {
            generator: {row.name: row.squared_norm for row in self.by("type") if row.generator == generator}
            for generator in self.names
        }
        curves = dict(zip(self.names, along.T.tolist(), strict=True))
        residual = max(self.residual.values())
        caption = f"Stencil: {self.stencil}. {len(self.operations)} operations; completeness error {residual:.1e}."
        return figures.layerwise(bars, curves, caption=caption)

    def __str__(self) -> str:
        lines = [f"{'type':24}{'generator':>20}{'squared norm':>16}{'share':>9}{'calls':>7}"]
        for row in self.by("type"):
            norm = f"{row.squared_norm:16.3e}{100 * row.share:8.1f}%{row.calls:7d}"
            lines.append(f"{row.name:24}{row.generator:>20}{norm}")
        lines.append("completeness error: " + ", ".join(f"{name} {value:.1e}" for name, value in self.residual.items()))
        return "\n".join(lines)


def layerwise_equivariance_error(
    model: Callable[..., Any],
    inputs: Tensor,
    generators: Generators = "affine",
    *,
    probes: Literal["exact"] | int = "exact",
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

    over every torch function call i (Gruver et al. 2023, Section 4, for modules of a chain; here any graph). The sum is
    exact whatever action hidden tensors are given, and the report holds what is left of it. How a sum splits does
    depend on those actions: they are assumed from the layout, (B, C, H, W), (B, H, W, C) or tokens on a grid, and named
    in the report; every other tensor counts as invariant. A contribution is no proof that a hidden feature "violates"
    anything.

    Convention:
        As in :func:`lie_metric.lie_derivative`. Hidden maps have the same units: half of their shorter side.

    Args:
        model: As in :func:`lie_metric.lie_derivative`; names of modules need an :class:`torch.nn.Module`.
        inputs: Shape (B, C, H, W).
        generators: K generators, by name or as given. They share one forward pass and all backward passes.
        probes: ``"exact"``: one backward pass for each output element of each image, images one by one; for outputs of
            up to some hundred elements. A number n: n Gaussian probes of the whole batch, with standard errors; for
            each image they are independent, so that cross terms vanish in expectation.
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
        UserWarning: If the contributions do not add up to the Lie derivative, with what may be missing; or if the Lie
            derivative is zero or rounding, so that there are no shares of it.

    Example:
        >>> import torch, lie_metric as lm
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten()).double()
        >>> report = lm.layerwise_equivariance_error(net, torch.rand(1, 1, 5, 5).double(), "rotation")
        >>> [row.name for row in report.by("module", depth=1)]
        ['0', '1', '2', '']
        >>> report.residual["rotation"] < 1e-12
        True
    """
    resampling = resampling or Resampling()
    validate_options(output, input_representation, output_representation, resampling, "auto", chunk_size, function)
    validate_inputs(model, inputs, input_representation, function)
    asked = resolve(generators)
    if probes != "exact" and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1):
        raise ValueError(f"`probes` must be 'exact' or a positive integer, got {probes!r}.")
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
    basis, matrix = simplest_basis(asked)
    parts: list[Tensor] = []
    levels: list[Tensor] = []
    totals: list[Tensor] = []
    operations: tuple[Operation, ...] = ()
    cut: set[str] = set()
    ungraded: set[str] = set()
    method = "auto"
    # Exactly, one image at a time: windows and shuffles inside a model may mix images, so that a batch of one-hot
    # probes would need one pass for each image anyhow.
    batches = inputs.split(1) if probes == "exact" else (inputs,)
    for images in batches:
        with torch.no_grad():
            whole = linearise(
                model,
                images,
                asked,
                output=output,
                function=function,
                input_representation=input_representation,
                output_representation=output_representation,
                resampling=resampling,
                method=method,
                chunk_size=chunk_size,
                verify=not parts,
            )
        if not parts:
            # The others are measured by what was found right for the first.
            method = whole.method
            checked = whole.check is not None and whole.check.status == "agrees"
        cotangents = _cotangents(whole.output, probes, seed)
        with isolated(model), torch.enable_grad():
            leaf = working_precision(images).detach().clone().requires_grad_()
            recorder = Recorder(leaf, input_representation or Image(), modules, overrides)
            measured = function_of(model, output, function, frozen=True)
            with recorded(recorder, modules):
                result = measured(recorder.start)
            end = recorder.end(result, whole.representation)
            part, level = _contributions(
                recorder, leaf, result, end, cotangents, whole.representation, basis, resampling, chunk_size
            )
        if operations and [(op.path, op.function) for op in operations] != [
            (op.path, op.function) for op in recorder.operations
        ]:
            raise RuntimeError(
                "`model` must call the same functions for every image, but calls others for one image than for the "
                "one before it. Measure such images one by one."
            )
        operations = tuple(recorder.operations)
        cut |= recorder.cut
        ungraded |= recorder.ungraded
        parts.append(part)
        levels.append(level)
        totals.append(whole.lie_derivatives.flatten(1).double() @ cotangents.flatten(1).double().mT)
    along_basis = torch.cat(parts, dim=2)
    matrix = matrix.to(along_basis.device)
    vectors = torch.einsum("kr,orp->okp", matrix, along_basis)
    report = LayerwiseReport(
        tuple(generator.name for generator in asked),
        operations,
        vectors,
        torch.cat(totals, dim=1),
        _ROUNDINGS * matrix.abs() @ torch.stack(levels).square().sum(0).sqrt(),
        _visited(modules, operations),
        probes == "exact",
        len(inputs),
        whole.output[0].numel(),
        resampling,
    )
    _warn_of_gaps(report, 1e-6 if whole.output.dtype == torch.float64 else 1e-2, cut, ungraded, checked)
    return report


def _warn_of_gaps(report: LayerwiseReport, bound: float, cut: set[str], ungraded: set[str], checked: bool) -> None:
    """Says where contributions are missing, and where there is nothing that they could have a share of."""
    size, left = report.total.norm(dim=1), (report.vectors.sum(0) - report.total).norm(dim=1)
    missed = ~(left <= torch.maximum(bound * size, report.rounding))
    cuts = f"The model detaches tensors that depend on its input, or takes them out of torch, in {sorted(cut)[:4]}"
    if missed.any():
        errors = [math.inf if not error <= math.inf else error for error in report.residual.values()]
        worst = max(zip(missed.tolist(), errors, report.names, strict=True))[2]
        reasons = [f"It computes without gradients, such as {sorted(ungraded)[:4]}."] if ungraded else []
        reasons += [f"{cuts}."] if cut else []
        reasons += [] if reasons else ["Perhaps a `torch.autograd.Function` has a backward pass of another function."]
        warn(
            f"The contributions miss {report.residual[worst]:.1e} of the Lie derivative ({worst}): gradients do not "
            f"follow all that the model computes. {' '.join(reasons)} Shares are of the part that was found.",
        )
    elif cut and not checked:
        warn(f"{cuts}: no contribution follows them, and perhaps no derivative of the model.")
    whole = report.vectors.sum(0).norm(dim=1)
    nothing = [name for name, alike in zip(report.names, (whole <= report.rounding).tolist(), strict=True) if alike]
    if nothing:
        warn(
            f"All contributions together are zero or rounding ({', '.join(nothing)}), so that their shares are NaN.",
        )


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


def _cotangents(f: Tensor, probes: Literal["exact"] | int, seed: int) -> Tensor:
    """The cotangents of an output: shape (probes, *f.shape)."""
    if probes == "exact":
        return torch.eye(f.numel(), dtype=f.dtype, device=f.device).reshape(-1, *f.shape)
    source = torch.Generator().manual_seed(seed)
    return torch.randn(probes, *f.shape, generator=source, dtype=torch.float64).to(f)


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
    """The products of all contributions with the cotangents, and how precise they are.

    Shapes are (operations, generators, probes) and (generators,); the latter is the norm over probes of one rounding of
    all that flows.

    What a cotangent u makes of an operation's contribution is ⟨uJ, Df[X·in]⟩ - ⟨uJ, X·out⟩: what flows in, the
    products of X·in with the gradient through the operation, less what flows out, which flows into later operations.
    """
    balance = torch.zeros(
        len(recorder.operations), len(basis), len(cotangents), dtype=torch.float64, device=result.device
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
                    amount[:, part] = (action.to(precise) @ gradient.mH).real.double()
                    level += _rounding(action, gradient, variable.value)
                book(flow, amount)
    wanted = representation.tangents(end.value, basis, resampling).flatten(1)
    balance[-1] -= (wanted @ cotangents.flatten(1).mT).double()
    level += _rounding(wanted, cotangents.flatten(1), end.value)
    for flow, operation in implied:
        book(flow, -balance[operation] if flow.operation == operation else balance[operation].clone())
    return balance, level.sqrt()


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
