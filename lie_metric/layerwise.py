r"""Where the equivariance error comes from: every torch function call of a model, and what it adds to the error.

Give every tensor inside a model an infinitesimal action, whichever. Each call then has a local Lie derivative
:math:`L f_i = D f_i [X \cdot in] - X \cdot out`, and pulled to the output by the rest of the model these add up to that
of the model, :math:`L f = \sum_i J_{out \leftarrow i}\, L f_i`, because what one call subtracts the next one adds.
Nothing is missed as long as every call is recorded; the difference that is left is reported.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lie_metric import dual
from lie_metric.algebra import Generator, spanning_set
from lie_metric.algebra import generators as resolve
from lie_metric.derivative import (
    Generators,
    Linearisation,
    Output,
    function_of,
    linearise,
    validate_inputs,
    validate_options,
)
from lie_metric.isolation import isolated
from lie_metric.representations import ChannelsLast, Image, Invariant, Representation, Tokens, declared_grid
from lie_metric.resampling import Resampling

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
        share: ⟨c, Σc⟩ / ‖Σc‖², signed; shares of a partition add up to 1.
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
class Operation:
    """One recorded torch function call.

    Attributes:
        path: Path of the innermost module it was called in; "" is the model itself.
        function: Name of the torch function.
        kind: Its type in the sense of ``by("type")``.
        shape: Shape of its (first) output.
        representation: The action its output was assumed to carry.
    """

    path: str
    function: str
    kind: str
    shape: tuple[int, ...]
    representation: str


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
    modules: tuple[str, ...]
    exact: bool
    images: int
    dimension: int
    stencil: Resampling

    @property
    def residual(self) -> dict[str, float]:
        """The completeness error ‖Σc - L f‖ / ‖L f‖ of each generator; the absolute one where L f is zero."""
        left = (self.vectors.sum(0) - self.total).norm(dim=1)
        size = self.total.norm(dim=1)
        relative = torch.where(size > 0, left / size.where(size > 0, torch.ones_like(size)), left)
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
        input_representation: As in :func:`lie_metric.lie_derivative`.
        output_representation: As in :func:`lie_metric.lie_derivative`.
        resampling: The stencil; the default is ``Resampling()``.
        representations: Actions for tensors made inside the modules with these paths, where they fit.
        chunk_size: How many tangents are kept at a time; the memory is that of so many times the activations.
        seed: Seed of random probes.

    Returns:
        The report.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``probes`` or ``seed`` is out of range, or a path of ``representations`` is unknown.

    Warns:
        UserWarning: If the contributions do not add up to the Lie derivative, with what may be missing.

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
    validate_options(output, input_representation, output_representation, resampling, "auto", chunk_size)
    validate_inputs(model, inputs, input_representation)
    asked = resolve(generators)
    if probes != "exact" and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 1):
        raise ValueError(f"`probes` must be 'exact' or a positive integer, got {probes!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer, got {seed!r}.")
    overrides = dict(representations or {})
    paths = _paths(model)
    for path in overrides:
        if path not in paths.values():
            close = difflib.get_close_matches(path, list(paths.values()), 1)
            raise ValueError(
                f"`representations` must name modules of the model, got {path!r}."
                + (f" Did you mean {close[0]!r}?" if close else " See `model.named_modules()`.")
            )
    with torch.no_grad():
        whole = linearise(
            model,
            inputs,
            asked,
            output=output,
            input_representation=input_representation,
            output_representation=output_representation,
            resampling=resampling,
            chunk_size=chunk_size,
        )
    basis, matrix = spanning_set(asked)
    settings = _Settings(
        output, input_representation or Image(), whole.representation, resampling, overrides, tuple(basis), paths
    )
    dimension = whole.output[0].numel()
    probing = _probes(whole, probes, seed)
    parts = []
    operations: tuple[Operation, ...] = ()
    cut: set[str] = set()
    for rows, cotangents in probing:
        values = []
        for chunk in _chunks(basis, chunk_size):
            operations, found, left = _attribute(model, inputs[rows], cotangents, chunk, settings)
            cut |= left
            values.append(found)
        parts.append(torch.cat(values, dim=1))
    along_basis = torch.cat(parts, dim=2)
    vectors = torch.einsum("kr,orp->okp", matrix.to(along_basis.device), along_basis)
    derivatives = whole.lie_derivatives.double()
    total = torch.cat(
        [
            torch.einsum("k...,p...->kp", derivatives[:, rows].flatten(1), cotangents.flatten(1).double())
            for rows, cotangents in probing
        ],
        dim=1,
    )
    report = LayerwiseReport(
        tuple(generator.name for generator in asked),
        operations,
        vectors,
        total,
        tuple(paths.values()),
        probes == "exact",
        len(inputs),
        dimension,
        resampling,
    )
    bound = 1e-6 if whole.output.dtype == torch.float64 else 1e-2
    worst = max(report.residual, key=lambda name: report.residual[name])
    if not report.residual[worst] <= bound:
        warnings.warn(
            f"The contributions miss {report.residual[worst]:.1e} of the Lie derivative ({worst}): the model has an "
            "operation that is no torch function (a `torch.autograd.Function`, compiled or scripted code). Shares are "
            "of the part that was found.",
            stacklevel=2,
        )
    if cut:
        warnings.warn(
            f"The model detaches tensors that depend on its input, in {sorted(cut)[:4]}: no derivative, of the model "
            "or of its parts, follows them.",
            stacklevel=2,
        )
    return report


@dataclass(frozen=True)
class _Settings:
    output: Output
    input_representation: Representation
    output_representation: Representation
    resampling: Resampling
    overrides: Mapping[str, Representation]
    basis: tuple[Generator, ...]
    paths: Mapping[nn.Module, str]


def _paths(model: object) -> dict[nn.Module, str]:
    """The path of every module; one that stands in several places has the first of its paths."""
    return {module: path for path, module in model.named_modules()} if isinstance(model, nn.Module) else {}


def _chunks(basis: Sequence[Generator], size: int | None) -> list[tuple[Generator, ...]]:
    size = size or max(len(basis), 1)
    return [tuple(basis[start : start + size]) for start in range(0, len(basis), size)]


def _probes(whole: Linearisation, probes: Literal["exact"] | int, seed: int) -> list[tuple[slice, Tensor]]:
    """Which images are taken together, and the cotangents of their outputs: shape (probes, images, ...)."""
    f = whole.output
    if probes == "exact":
        # One image at a time: windows and shuffles inside a model may mix images, so that a batch of one-hot probes
        # would need one pass for each image anyhow.
        one = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device).reshape(-1, 1, *f.shape[1:])
        return [(slice(index, index + 1), one) for index in range(len(f))]
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(probes, *f.shape, generator=source, dtype=torch.float64)
    return [(slice(None), drawn.to(f))]


def _attribute(
    model: Callable[..., Any],
    inputs: Tensor,
    cotangents: Tensor,
    basis: Sequence[Generator],
    settings: _Settings,
) -> tuple[tuple[Operation, ...], Tensor, set[str]]:
    """The recorded operations, the products of their contributions with cotangents, and where tensors are detached."""
    with isolated(model), torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_()
        recorder = _Recorder(basis, settings, inputs)
        function = function_of(model, settings.output, frozen=True)
        with _tracked(settings.paths, recorder), recorder:
            start = recorder.begin(leaf)
            result = function(start)
        recorder.end(result)
        records = recorder.records
        edges = [edge for record in records for edge, _ in record.outputs]
        columns = []
        # Local derivatives are K times the activations, and reading them once for each probe took a third of the time:
        # gradients of as many probes as there are tangents are kept, which at most doubles the memory.
        for part in cotangents.split(max(len(basis), 1)):
            pulled = [
                torch.autograd.grad(result, edges, cotangent, retain_graph=True, allow_unused=True)
                for cotangent in part
            ]
            gradients = zip(*pulled, strict=True)
            column = []
            for record in records:
                value = torch.zeros(len(basis), len(part), dtype=torch.float64, device=inputs.device)
                for _, local in record.outputs:
                    found = next(gradients)
                    if local is not None and found[0] is not None:
                        stacked = torch.stack([gradient.reshape(-1) for gradient in found])
                        value += (local.reshape(len(basis), -1) @ stacked.mT).double()
                column.append(value)
            columns.append(torch.stack(column))
    return tuple(record.operation for record in records), torch.cat(columns, dim=-1), recorder.cut


@contextmanager
def _tracked(paths: Mapping[nn.Module, str], recorder: _Recorder) -> Iterator[None]:
    """Lets the recorder know in which module it is."""
    handles = []
    try:
        for module, path in paths.items():
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: recorder.stack.append(path)))
            handles.append(module.register_forward_hook(lambda *_: recorder.leave(), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Record:
    operation: Operation
    outputs: list[tuple[Any, Tensor | None]] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Records every call that depends on the input, with the local Lie derivative of its outputs."""

    def __init__(self, basis: Sequence[Generator], settings: _Settings, inputs: Tensor) -> None:
        super().__init__()
        self.basis, self.settings = basis, settings
        self.size = tuple(inputs.shape[-2:])
        self.images = len(inputs)
        self.stack: list[str] = []
        self.records: list[_Record] = []
        self.cut: set[str] = set()
        self.carriers: dict[tuple[int, int], Representation] = {}
        self.recent: dict[tuple[int, int], Tensor] = {}
        # Edges are known by the identity of their nodes, which must therefore live.
        self.nodes: list[Any] = []
        self.grids = [grid for grid in map(declared_grid, settings.paths) if grid is not None]

    def leave(self) -> None:
        if self.stack:
            self.stack.pop()

    def begin(self, leaf: Tensor) -> Tensor:
        """The input as a tensor that may be changed in place, with its own action."""
        with torch._C.DisableTorchFunction():
            start = leaf.clone()
        self._set(start, self.settings.input_representation)
        return start

    def end(self, result: Tensor) -> None:
        """Puts the output's own action in the place of the one assumed for the tensor."""
        if not result.requires_grad:
            return
        plain = result.detach()
        wanted = self.settings.output_representation.tangents(plain, self.basis, self.settings.resampling)
        change = self._act(plain, self._carrier(result)) - wanted
        operation = Operation("", "output", "output", tuple(result.shape), repr(self.settings.output_representation))
        self.records.append(_Record(operation, [(get_gradient_edge(result), change)]))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = dual._name(func)
        path = self.stack[-1] if self.stack else ""
        if name in {"detach", "get data"}:
            self.cut.add(f"{name} in {path or 'the model'}")
        written = _writes(func, name, args, kwargs)
        given = [self._carrier(leaves[i]) for i in places]
        # Values are taken before the call, which may change them.
        before = [
            leaf.detach().clone() if written and i == 0 and isinstance(leaf, Tensor) else
            leaf.detach() if isinstance(leaf, Tensor) else leaf
            for i, leaf in enumerate(leaves)
        ]  # fmt: skip
        actions = {i: self._action(leaves[i]) for i in places} if written else {}
        result = func(*args, **kwargs)
        target = args[0] if written else result
        outputs = [value for value in tree_flatten(target)[0] if isinstance(value, Tensor)]
        if not any(value.requires_grad and value.is_floating_point() for value in outputs):
            return result
        carriers = [self._set(value, None, path) if value.requires_grad else None for value in outputs]
        record = _Record(
            Operation(path, name, _kind(name, path, args, kwargs), tuple(outputs[0].shape), repr(carriers[0]))
        )
        if not self._commutes(name, given, carriers, args, outputs):
            with torch.no_grad():
                actions = actions or {i: self._action(leaves[i]) for i in places}
                moved = self._push(func, name, before, structure, actions, written)
                for value, carrier, tangents in zip(outputs, carriers, moved, strict=True):
                    if carrier is not None:
                        action = self._action(value)
                        local = -action if tangents is None else tangents - action
                        record.outputs.append((get_gradient_edge(value), local))
        self.records.append(record)
        return result

    def _commutes(
        self,
        name: str,
        given: Sequence[Representation],
        carriers: Sequence[Representation | None],
        args: tuple,
        outputs: Sequence[Tensor],
    ) -> bool:
        """Whether a call's Lie derivative is zero by construction, so that nothing has to be computed."""
        if all(isinstance(carrier, (Invariant, type(None))) for carrier in (*given, *carriers)):
            return True
        # Scalar fields on one grid: sums of fields, and maps of the channels at every place, move with them. A constant
        # moves too, but not its intensity, and not over an edge to zeros.
        same = all(carrier == given[0] for carrier in (*given[1:], *carriers)) and isinstance(given[0], _FIELDS)
        if not same or self.settings.resampling.padding == "zeros" or any(g.intensity for g in self.basis):
            return False
        if name in {"add", "add_", "sub", "sub_"}:
            tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
            return len(tensors) == len(given) and all(arg.shape == outputs[0].shape for arg in tensors)
        if name == "conv2d":
            image, weight = args[0], args[1] if len(args) > 1 else None
            return weight is not None and tuple(weight.shape[2:]) == (1, 1) and image.shape[2:] == outputs[0].shape[2:]
        if name == "linear":
            return isinstance(given[0], (Tokens, ChannelsLast)) and len(given) == 1
        return name == "batch_norm" and isinstance(given[0], Image)

    def _push(
        self, func: Any, name: str, leaves: list[Any], structure: Any, actions: Mapping[int, Tensor], written: bool
    ) -> list[Tensor | None]:
        """The derivative of one call along the actions of its inputs, for each tensor it returns."""
        moving = list(leaves)
        for index, action in actions.items():
            moving[index] = dual.Dual.wrap(leaves[index], action)
        if written and not isinstance(moving[0], dual.Dual):
            still = leaves[0].new_zeros(1).expand(len(self.basis), *leaves[0].shape)
            moving[0] = dual.Dual.wrap(leaves[0], still)
        args, kwargs = tree_unflatten(moving, structure)
        with torch._C.DisableTorchFunctionSubclass():
            if written:

                def out_of_place(first: Tensor, *rest: Any, **named: Any) -> Tensor:
                    changed = first.clone()
                    func(changed, *rest, **named)
                    return changed

                result = dual._any_function(out_of_place, args, kwargs)
            else:
                result = dual._evaluate(func, name, args, kwargs)
        values = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        return [value.tangents if isinstance(value, dual.Dual) else None for value in values]

    def _key(self, tensor: Tensor) -> tuple[int, int]:
        edge = get_gradient_edge(tensor)
        self.nodes.append(edge.node)
        return id(edge.node), edge.output_nr

    def _set(self, tensor: Tensor, carrier: Representation | None, path: str = "") -> Representation:
        """Gives a new tensor its action; one that is only handed on keeps its own."""
        key = self._key(tensor)
        if key not in self.carriers:
            self.carriers[key] = carrier or self._override(tensor, path) or self._assume(tensor)
        return self.carriers[key]

    def _carrier(self, tensor: Tensor) -> Representation:
        return self.carriers.get(self._key(tensor)) or self._assume(tensor)

    def _override(self, tensor: Tensor, path: str) -> Representation | None:
        for name, representation in self.settings.overrides.items():
            if path == name or path.startswith(f"{name}.") or not name:
                try:
                    representation.check(tensor, "tensor")
                except ValueError:
                    continue
                return representation
        return None

    def _assume(self, tensor: Tensor) -> Representation:
        """The action that the layout suggests; nothing else in the sum depends on whether it is the right one."""
        shape = tuple(tensor.shape)
        if tensor.ndim == 4 and tensor.is_floating_point():
            first, last = self._is_map(shape[2:]), self._is_map(shape[1:3])
            if first and not (last and shape[3] > shape[1] == shape[2]):
                return Image()
            if last:
                return ChannelsLast()
        if tensor.ndim == 3 and shape[0] == self.images:
            return self._tokens(shape[1]) or Invariant()
        return Invariant()

    def _is_map(self, size: Sequence[int]) -> bool:
        (h, w), (height, width) = size, self.size
        return min(h, w) > 1 and abs(h * width - w * height) < max(height, width) and h <= 2 * height

    def _tokens(self, count: int) -> Tokens | None:
        for grid in self.grids:
            if grid.prefix + grid.grid_size[0] * grid.grid_size[1] == count:
                return grid
        height, width = self.size
        for prefix in (0, 1, 2):
            rows = round(math.sqrt((count - prefix) * height / width)) if count > prefix else 0
            if rows > 1 and (count - prefix) % rows == 0 and self._is_map((rows, (count - prefix) // rows)):
                return Tokens((rows, (count - prefix) // rows), prefix)
        return None

    def _action(self, tensor: Tensor) -> Tensor:
        """The action on a tensor; those of the last few are kept, because the next call takes what this one gave."""
        key = self._key(tensor)
        if key not in self.recent:
            self.recent[key] = self._act(tensor.detach(), self._carrier(tensor))
            if len(self.recent) > 4:
                self.recent.pop(next(iter(self.recent)))
        return self.recent[key]

    def _act(self, tensor: Tensor, carrier: Representation) -> Tensor:
        with torch.no_grad():
            if isinstance(carrier, Invariant):
                return tensor.new_zeros(1).expand(len(self.basis), *tensor.shape)
            moved = carrier.tangents(tensor, self.basis, self.settings.resampling)
            if bool(torch.isfinite(tensor).all()):
                return moved
            # Padding by -inf ahead of a maximum leaves slopes that are no numbers: such entries carry no action.
            return torch.where(torch.isfinite(moved), moved, 0.0)


_FIELDS = (Image, ChannelsLast, Tokens)


def _writes(func: Any, name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a function changes its first argument."""
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return True
    position = dual._inplace_position(func)
    return bool(kwargs.get("inplace")) or (position is not None and len(args) > position and bool(args[position]))


_KINDS = {
    "normalisation": ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize", "local_resp"),
    "attention": ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax", "matmul", "bmm", "einsum"),
    "activation": (
        "relu", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu", "softplus", "mish", "hardtanh",
        "leaky_relu", "prelu", "exp", "clamp",
    ),
    "down-sampling": ("max_pool", "avg_pool", "mean", "adaptive", "pixel_unshuffle"),
    "up-sampling": ("interpolate", "upsample", "pixel_shuffle", "conv_transpose", "grid_sample"),
    "layout": (
        "view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "getitem", "chunk", "split",
        "unbind", "squeeze", "expand", "roll", "flip", "movedim", "cat", "stack", "clone", "to", "pad", "select",
        "narrow", "get t", "get m", "get h", "repeat", "float", "type",
    ),
}  # fmt: skip


def _kind(name: str, path: str, args: tuple, kwargs: dict) -> str:
    if any(step in {"head", "fc", "classifier", "head_dist"} for step in path.split(".")):
        return "head"
    if "patch_embed" in path.split(".") and name.startswith("conv"):
        return "patch embedding"
    if name.startswith("conv") and not name.startswith("conv_transpose"):
        stride = kwargs.get("stride", args[3] if len(args) > 3 else 1)
        largest = max(stride) if isinstance(stride, (tuple, list)) else stride
        return "strided convolution" if largest > 1 else "convolution"
    if name in {"add", "add_", "sub", "sub_"}:
        others = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        return "residual addition" if sum(arg.requires_grad for arg in others) == 2 else "addition of a constant"
    if name == "linear":
        return "linear"
    plain = name.lower().rstrip("_")
    for kind, prefixes in _KINDS.items():
        if plain.startswith(prefixes):
            return kind
    return "other"
