"""The calls of a model as a graph: which tensor goes into which call, by the torch functions and by autograd's graph.

Torch functions tell names, modules and values; autograd's graph tells what depends on what, and misses nothing that a
derivative can follow: tensors that come from elsewhere (a `torch.autograd.Function`, scripted code, a view of a tensor
that was changed) are calls as well, under the names of their nodes.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lie_metric.representations import (
    ChannelsLast,
    Field,
    Image,
    Invariant,
    Padded,
    Representation,
    Tokens,
    declared_grid,
    grid_size,
)

__all__ = ["Flow", "Operation", "Recorder", "Variable", "recorded"]


@dataclass(frozen=True)
class Operation:
    """One recorded torch function call.

    Attributes:
        path: Path of the innermost module it was called in; "" is the model itself.
        function: Name of the torch function.
        kind: Its type in the sense of ``by("type")``.
        shape: Shape of its (first) output.
        representation: The action its output was assumed to carry.
        commutes: Whether it is one that moves with its input, so that its Lie derivative is zero by construction.
    """

    path: str
    function: str
    kind: str
    shape: tuple[int, ...]
    representation: str
    commutes: bool = False


@dataclass(eq=False)
class Variable:
    """A tensor of the forward pass that depends on the input.

    Attributes:
        value: The tensor as it was then, even if it was written to later.
        representation: The action it is assumed to carry.
        producer: Index of the operation it comes from; None for the input.
        version: How often the memory of ``value`` had been written to.
    """

    value: Tensor
    representation: Representation
    producer: int | None
    version: int


@dataclass(eq=False)
class Flow:
    """A tensor's way into one operation.

    Attributes:
        variable: The tensor.
        operation: Index of the operation.
        sockets: Nodes of autograd's graph and the places of their ``next_functions`` by which the tensor enters; the
            gradients that leave there add up to the tensor's gradient through this operation alone.
    """

    variable: Variable
    operation: int
    sockets: list[tuple[Any, int]] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Records every call that depends on the input; to be entered by :func:`recorded`.

    A convolution of maps that pads them is run, and recorded, as a padding and a convolution without.

    Args:
        inputs: The images, shape (B, C, H, W), a leaf that requires gradients.
        representation: The action they carry.
        modules: Paths of the modules of the model; a module that stands in several places has several.
        overrides: Actions for tensors made inside the modules with these paths, where they fit; the innermost counts.

    Attributes:
        start: The images as the model is to be given them: a tensor that may be changed in place.
        operations: What was recorded, in order.
        cut: Where tensors that depend on the input are detached, or leave torch.
        ungraded: What was called on them without gradients.

    Raises:
        RuntimeError: While it records, if the model checkpoints in a way that gradients cannot be asked for.
    """

    def __init__(
        self,
        inputs: Tensor,
        representation: Representation,
        modules: Mapping[nn.Module, Sequence[str]],
        overrides: Mapping[str, Representation],
    ) -> None:
        super().__init__()
        # Of points nothing tells a table of pairs (B, N, N, C) from an image: what moves has to be declared.
        self.on_grid = callable(getattr(representation, "map", None)) or not hasattr(representation, "dimension")
        self.size = tuple(inputs.shape[-2:])
        self.layout = representation
        self.images = len(inputs)
        self.overrides = sorted(overrides.items(), key=lambda item: len(item[0]), reverse=True)
        self.grids = [grid for grid in map(declared_grid, modules) if grid is not None]
        self.stack: list[tuple[str, str | None]] = []
        self.operations: list[Operation] = []
        self.cut: set[str] = set()
        self.ungraded: set[str] = set()
        self._flows: dict[tuple[int, int], Flow] = {}
        self._variables: dict[tuple[int, int], Variable | None] = {}
        self._owners: dict[int, int] = {}
        self._sharing: dict[int, list[Variable]] = {}
        # Edges are known by the identity of their nodes, which must therefore live.
        self._nodes: list[Any] = []
        self.start = inputs.clone()
        self._keep(self.start, representation, None)

    @property
    def flows(self) -> list[Flow]:
        """The ways of tensors into operations."""
        return list(self._flows.values())

    def enter(self, paths: Sequence[str], inputs: Any) -> None:
        """A module is called; what comes to it from no torch function was made outside.

        Args:
            paths: The module's paths; the one within the module that calls counts.
            inputs: What it is given.
        """
        self._notice(inputs)
        path = paths[0]
        for caller in [caller for caller, _ in reversed(self.stack)] if len(paths) > 1 else ():
            inside = [place for place in paths if not caller or place.startswith(f"{caller}.")]
            if inside:
                path = inside[0]
                break
        closed = self.stack[-1][1] if self.stack else None
        self.stack.append((path, path if closed is None and not torch.is_grad_enabled() else closed))

    def leave(self, outputs: Any) -> None:
        """A module is left; what goes from it and comes from no torch function was made inside.

        Args:
            outputs: What it returns; None if it fails.
        """
        self._notice(outputs)
        if self.stack:
            self.stack.pop()

    def _notice(self, value: Any) -> None:
        if _transforms():
            return
        with torch._C.DisableTorchFunction():
            for tensor in _tensors(value):
                if tensor.requires_grad:
                    self._variable(tensor)

    def end(self, result: Tensor, representation: Representation) -> Variable | None:
        """Records the model's output as taken by a last operation, "output".

        Args:
            result: The output.
            representation: The action that it carries.

        Returns:
            The output; None if it does not depend on the input.
        """
        variable = self._variable(result)
        index = self._operation("output", "output", result, representation)
        if variable is not None:
            self._flow(variable, index)
        return variable

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        moving = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        if not moving or _transforms():
            return func(*args, **kwargs)
        name = _name(func)
        given = [variable for variable in map(self._variable, moving) if variable is not None]
        if not given:
            return func(*args, **kwargs)
        if name == "conv2d" and torch.is_grad_enabled() and isinstance(given[0].representation, (Image, Padded)):
            split = _padding(args, kwargs)
            if split is not None:
                padding, (image, *rest) = split
                padded = self.__torch_function__(F.pad, types, (image, padding))
                return self.__torch_function__(func, types, (padded, *rest))
        written = _written(func, name, args, kwargs)
        if written is not None:
            self._copy_before_change(written)
        result = func(*args, **kwargs)
        outputs = [value for value in _tensors(result if written is None else written) if _moves(value)]
        if name in _CUTS:
            self.cut.add(f"{name} in {self._path() or 'the model'}")
        elif outputs and not torch.is_grad_enabled():
            outermost = self.stack[-1][1] if self.stack else None
            self.ungraded.add(f"{name} in {outermost or self._path() or 'the model'}")
        outputs = [value for value in outputs if value.requires_grad]
        if not outputs:
            return result
        index = self._operation(name, _kind(name, self._path(), args, kwargs), outputs[0])
        # The tensor that a view belongs to changes with it.
        base = None if written is None else written._base
        border = _border(name, args, kwargs, given)
        made = [self._made(value, index, border) for value in ([base, *outputs] if base is not None else outputs)]
        first = next((variable for variable in made[-len(outputs) :] if variable is not None), given[0])
        same = all(
            variable is None or variable.representation == given[0].representation for variable in (*given, *made)
        )
        self.operations[index] = replace(
            self.operations[index],
            representation=repr(first.representation),
            commutes=same and base is None and _commutes(name, given[0].representation, len(given), args, outputs[0]),
        )
        return result

    def _path(self) -> str:
        return self.stack[-1][0] if self.stack else ""

    def _operation(self, name: str, kind: str, value: Tensor, representation: Representation | None = None) -> int:
        path = "" if name == "output" else self._path()
        self.operations.append(Operation(path, name, kind, tuple(value.shape), repr(representation)))
        return len(self.operations) - 1

    def _flow(self, variable: Variable, operation: int) -> Flow:
        return self._flows.setdefault((id(variable), operation), Flow(variable, operation))

    def _variable(self, tensor: Tensor) -> Variable | None:
        """The variable that a tensor is; None if it does not depend on the input."""
        edge = get_gradient_edge(tensor)
        key = id(edge.node), edge.output_nr
        return self._variables[key] if key in self._variables else self._made(tensor, None)

    def _made(self, tensor: Tensor, operation: int | None, border: Border | None = None) -> Variable | None:
        """A tensor as the output of an operation; of one of its own, if it is None."""
        edge = get_gradient_edge(tensor)
        key = id(edge.node), edge.output_nr
        if key in self._variables:  # handed on, as by dropout in evaluation mode
            return self._variables[key]
        nodes, sockets, owner = self._trace(edge.node)
        if operation is None:
            operation = owner
        if not sockets and owner is None:
            self._nodes.append(edge.node)
            self._variables[key] = None
            return None
        if operation is None:
            name = re.sub(r"Backward\d*$", "", edge.node.name())
            operation = self._operation(name, _kind(name, self._path(), (), {}), tensor)
        self._nodes += nodes
        self._owners |= {id(node): operation for node in nodes}
        for variable, node, place in sockets:
            self._flow(variable, operation).sockets.append((node, place))
        return self._keep(tensor, None, operation, border)

    def _trace(self, node: Any) -> tuple[list[Any], list[tuple[Variable, Any, int]], int | None]:
        """The nodes between a tensor and the nearest variables, where those enter, and an operation met on the way."""
        nodes, sockets, owner, seen, ahead = [], [], None, set(), [node]
        while ahead:
            node = ahead.pop()
            if id(node) in self._owners:
                owner = self._owners[id(node)]
                continue
            if id(node) in seen:
                continue
            seen.add(id(node))
            nodes.append(node)
            if node.name() == "CheckpointFunctionBackward":
                raise RuntimeError(
                    "`model` must checkpoint with `use_reentrant=False`, got reentrant checkpointing in "
                    f"{self._path() or 'the model'}, through which no gradients can be asked for. Call "
                    "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`, or `gradient_checkpointing_enable("
                    "{'use_reentrant': False})` of a model of transformers."
                )
            for place, (following, number) in enumerate(node.next_functions):
                if following is None:
                    continue
                key = id(following), number
                variable = self._variables.get(key)
                if variable is not None:
                    sockets.append((variable, node, place))
                elif key not in self._variables:
                    ahead.append(following)
        return nodes, sockets, owner

    def _keep(
        self,
        tensor: Tensor,
        representation: Representation | None,
        operation: int | None,
        border: Border | None = None,
    ) -> Variable:
        edge = get_gradient_edge(tensor)
        value = tensor.detach()
        representation = representation or self._override(value)
        if representation is None:
            assumed = self._assume(value)
            representation = assumed if border is None else border(value, assumed)
        variable = Variable(value, representation, operation, value._version)
        self._nodes.append(edge.node)
        self._variables[id(edge.node), edge.output_nr] = variable
        self._sharing.setdefault(value.untyped_storage().data_ptr(), []).append(variable)
        return variable

    def _copy_before_change(self, tensor: Tensor) -> None:
        for variable in self._sharing.pop(tensor.untyped_storage().data_ptr(), []):
            variable.value = variable.value.clone()
            variable.version = variable.value._version

    def _override(self, tensor: Tensor) -> Representation | None:
        path = self._path()
        for name, representation in self.overrides:
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
        if tensor.is_complex() or not self.on_grid:
            return Invariant()
        dimension = getattr(self.layout, "dimension", None) or 2
        if dimension != 2:
            return self._assume_field(tensor, dimension)
        if tensor.ndim == 4:
            first, last = self._is_map(shape[2:]), self._is_map(shape[1:3])
            if first and not (last and shape[3] > shape[1] == shape[2]):
                return Image()
            if last:
                return ChannelsLast()
        if tensor.ndim == 3 and shape[0] == self.images:
            return self._tokens(shape[1]) or Invariant()
        return Invariant()

    def _assume_field(self, tensor: Tensor, dimension: int) -> Representation:
        """Signals and volumes of the inputs' proportions, with channels first; anything else is taken as invariant."""
        size, whole = tensor.shape[2:], self.start.shape[2:]
        if len(size) != dimension or dimension not in {1, 3} or len(whole) != dimension or min(size) < 2:
            return Invariant()
        ratios = [own / full for own, full in zip(size, whole, strict=True)]
        # To within a sample of rounding, along the axis where it counts most.
        alike = max(ratios) - min(ratios) < 1 / min(whole) and max(ratios) <= 2
        return Field(dimension, getattr(self.layout, "spacing", ())) if alike else Invariant()

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


@contextmanager
def recorded(recorder: Recorder, modules: Mapping[nn.Module, Sequence[str]]) -> Iterator[None]:
    """Records what is called inside, and lets the recorder know in which module it is.

    Args:
        recorder: The recorder.
        modules: Paths of the modules of the model, see :class:`Recorder`.

    Yields:
        Nothing.
    """
    handles = []
    try:
        for module, paths in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            handles.append(module.register_forward_pre_hook(lambda _, args, paths=paths: recorder.enter(paths, args)))
            handles.append(module.register_forward_hook(lambda *call: recorder.leave(call[2]), always_call=True))
        with recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among the arguments of a torch function, or among what it returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return _tensors(list(value.values())) if isinstance(value, dict) else []


def _transforms() -> bool:
    """Whether `torch.vmap`, `torch.func.grad` or the like is at work: their tensors have graphs of their own.

    What comes out of them is an operation like any other that no torch function made.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def _moves(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _name(func: Any) -> str:
    """The name by which a torch function is known here; of a getter, the name of what it gets behind "get"."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        return f"get {getattr(func.__self__, '__name__', '')}"
    # A function of the user's own that happens to bear a name of the tables below is none of them.
    module = getattr(func, "__module__", None) or ""
    if module and not module.startswith("torch") and module != "builtins":
        return f"{module}.{name}"
    return _SYNONYMS.get(name, name)


_SYNONYMS = {
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add_",
    "__sub__": "sub",
    "__isub__": "sub_",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul_",
    "multiply": "mul",
    "__truediv__": "div",
    "__div__": "div",
    "true_divide": "div",
    "__itruediv__": "div_",
    "__idiv__": "div_",
    "__matmul__": "matmul",
    "__neg__": "neg",
    "__getitem__": "getitem",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
}


Border = Callable[[Tensor, Representation], Representation]
"""From an output and the action that its layout suggests to the one that it is assumed to carry."""


_ARGUMENTS = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation"),
    "avg_pool2d": ("input", "kernel_size"),
}


def _padding(args: tuple, kwargs: dict) -> tuple[list[int], tuple] | None:
    """What a convolution pads its maps by, as `F.pad` takes it, and its arguments without; None if it does not."""
    names = _ARGUMENTS["conv2d"]
    call: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    call |= dict(zip(names, args, strict=False)) | kwargs
    image, weight, _, _, padding, dilation, _ = without = [call[name] for name in names]
    if padding == "valid" or not image.requires_grad or image.ndim != 4:
        return None
    if padding == "same":
        added = [(size - 1) * step for size, step in zip(weight.shape[2:], _pair(dilation), strict=True)]
        rows, columns = ((extent // 2, extent - extent // 2) for extent in added)
    else:
        rows, columns = ((extent, extent) for extent in _pair(padding))
    without[4] = 0
    return ([*columns, *rows], tuple(without)) if any((*columns, *rows)) else None


def _pair(value: Any) -> tuple[int, int]:
    """What torch takes for height and width: one number for both, or one for each."""
    return (value[0], value[-1]) if isinstance(value, (tuple, list)) else (value, value)


def _border(name: str, args: tuple, kwargs: dict, given: Sequence[Variable]) -> Border | None:
    """What becomes of borders around maps: a padding adds to them, and windows that reach over them take them away.

    Padded maps would otherwise be taken for maps of the whole image, and their padding for a change of scale.
    """
    first = given[0].representation
    if name == "pad" and isinstance(first, (Image, ChannelsLast, Padded)):
        layout, sides = (first.carrier, first.sides) if isinstance(first, Padded) else (first, (0, 0, 0, 0))
        pads = [*(args[1] if len(args) > 1 else kwargs["pad"]), 0, 0, 0, 0, 0, 0]
        pads = pads[2:6] if isinstance(layout, ChannelsLast) else pads[:4]
        widened = _within(layout, [side + pad for side, pad in zip(sides, pads, strict=True)])
        return lambda value, assumed: widened
    borders = {
        grid_size(variable.representation.carrier, variable.value): variable.representation
        for variable in given
        if isinstance(variable.representation, Padded)
    }
    if not borders:
        return None

    def follow(value: Tensor, assumed: Representation) -> Representation:
        if not isinstance(assumed, (Image, ChannelsLast)):
            return assumed
        same = borders.get(grid_size(assumed, value))
        if same is not None:
            return _within(assumed, same.sides)
        if isinstance(first, Padded) and name in _ARGUMENTS:
            # Padding goes with the windows that it was made for; what they leave of it is in pixels of the output.
            call = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
            kernel = _pair(call["weight"].shape[2:] if name == "conv2d" else call["kernel_size"])
            down, across = ((n - 1) * step / 2 for n, step in zip(kernel, _pair(call.get("dilation", 1)), strict=True))
            stride = (grid_size(first.carrier, given[0].value)[0] - 2 * down) / grid_size(assumed, value)[0]
            reaches = (across, across, down, down)
            left = [max(side - reach, 0) / stride for side, reach in zip(first.sides, reaches, strict=True)]
            return _within(assumed, left)
        return assumed

    return follow


def _within(layout: Representation, sides: Sequence[float]) -> Representation:
    """The action of maps with borders, if they have any."""
    left, right, top, bottom = sides
    return Padded(layout, (left, right, top, bottom)) if any(sides) else layout


def _commutes(name: str, carrier: Representation, given: int, args: tuple, output: Tensor) -> bool:
    """Whether a call on fields of one kind moves with them, so that its Lie derivative is zero by construction.

    Sums of fields do, and maps of the channels that are the same at every place. (A constant moves as well, but not its
    intensity, and not over an edge to zeros: see where this is used.)
    """
    carrier = carrier.carrier if isinstance(carrier, Padded) else carrier
    if not isinstance(carrier, (Image, ChannelsLast, Tokens)):
        return False
    if name in {"add", "add_", "sub", "sub_"}:
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        return len(tensors) == given and all(arg.shape == output.shape for arg in tensors)
    if name == "conv2d":
        image, weight = args[0], args[1] if len(args) > 1 else None
        return weight is not None and tuple(weight.shape[2:]) == (1, 1) and image.shape[2:] == output.shape[2:]
    if name == "linear":
        return isinstance(carrier, (Tokens, ChannelsLast)) and given == 1
    return name == "batch_norm" and isinstance(carrier, Image)


# Values that go on where no derivative follows.
_CUTS = {"detach", "get data", "item", "tolist", "numpy"}


def _written(func: Any, name: str, args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor that a function changes, its first argument; None if it does not."""
    # Only functions written in Python have an argument `inplace`.
    code = getattr(inspect.unwrap(func), "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    inplace = kwargs.get("inplace") or ("inplace" in names and any(args[names.index("inplace") :][:1]))
    name = name.split(".")[0]  # that of an overload is behind a dot
    if not inplace and name != "__setitem__" and (not name.endswith("_") or name.endswith("__")):
        return None
    first = args[0] if args else kwargs.get("input")
    return first if isinstance(first, Tensor) else None


_KINDS = {
    "padding": ("pad", "constant_pad", "reflection_pad", "replication_pad"),
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
        "unbind", "squeeze", "expand", "roll", "flip", "movedim", "cat", "stack", "clone", "to", "select",
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
