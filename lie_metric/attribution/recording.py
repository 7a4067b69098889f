"""Which tensor goes into which call of a model, by the torch functions and by autograd's graph.

Torch functions tell names, modules and values; autograd's graph tells what depends on what, and misses nothing that a
derivative can follow: tensors that come from elsewhere (a `torch.autograd.Function`, scripted code, a view of a tensor
that was changed) are calls as well, under the names of their nodes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lie_metric.attribution.graph import Flow, Operation, Variable
from lie_metric.attribution.layout import Actions, Border, border, commutes, padding_of
from lie_metric.representations import Image, Padded, Representation

__all__ = ["Recorder", "recorded"]


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
        self.images = len(inputs)
        self.stack: list[tuple[str, str | None]] = []
        self.operations: list[Operation] = []
        self.cut: set[str] = set()
        self.ungraded: set[str] = set()
        self._flows: dict[tuple[int, int], Flow] = {}
        self._variables: dict[tuple[int, int], Variable | None] = {}
        self._owners: dict[int, int] = {}
        self._sharing: dict[int, list[Variable]] = {}
        self._actions = Actions(inputs, representation, modules, overrides)
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
        if _transforms():
            return func(*args, **kwargs)
        # Other modes need not know of what is written down, of which there is more than of the model.
        with torch._C.DisableTorchFunction():
            moving = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
            given = [variable for variable in map(self._variable, moving) if variable is not None]
        if not given:
            return func(*args, **kwargs)
        name = _name(func)
        if name == "conv2d" and torch.is_grad_enabled() and isinstance(given[0].representation, (Image, Padded)):
            split = padding_of(args, kwargs)
            if split is not None:
                padding, (image, *rest) = split
                padded = self.__torch_function__(F.pad, types, (image, padding))
                return self.__torch_function__(func, types, (padded, *rest))
        written = _written(func, name, args, kwargs)
        if written is not None:
            self._copy_before_change(written)
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            self._record(name, args, kwargs, given, result, written)
        return result

    def _record(
        self, name: str, args: tuple, kwargs: dict, given: Sequence[Variable], result: Any, written: Tensor | None
    ) -> None:
        """Writes down a call: what went in, what comes out or was written into."""
        outputs = [value for value in _tensors(result if written is None else written) if _moves(value)]
        if name in _CUTS:
            self.cut.add(f"{name} in {self._path() or 'the model'}")
        elif outputs and not torch.is_grad_enabled():
            outermost = self.stack[-1][1] if self.stack else None
            self.ungraded.add(f"{name} in {outermost or self._path() or 'the model'}")
        outputs = [value for value in outputs if value.requires_grad]
        if not outputs:
            return
        index = self._operation(name, _kind(name, self._path(), args, kwargs), outputs[0])
        # The tensor that a view belongs to changes with it.
        base = None if written is None else written._base
        follow = border(name, args, kwargs, given)
        made = [self._made(value, index, follow) for value in ([base, *outputs] if base is not None else outputs)]
        first = next((variable for variable in made[-len(outputs) :] if variable is not None), given[0])
        same = all(
            variable is None or variable.representation == given[0].representation for variable in (*given, *made)
        )
        self.operations[index] = replace(
            self.operations[index],
            representation=repr(first.representation),
            commutes=same and base is None and commutes(name, given[0].representation, len(given), args, outputs[0]),
        )

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

    def _made(self, tensor: Tensor, operation: int | None, follow: Border | None = None) -> Variable | None:
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
        return self._keep(tensor, None, operation, follow)

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
        follow: Border | None = None,
    ) -> Variable:
        edge = get_gradient_edge(tensor)
        value = tensor.detach()
        representation = representation or self._actions.given(value, self._path())
        if representation is None:
            suggested = self._actions.suggested(value)
            representation = suggested if follow is None else follow(value, suggested)
        variable = Variable(value, representation, operation, value._version)
        self._nodes.append(edge.node)
        self._variables[id(edge.node), edge.output_nr] = variable
        self._sharing.setdefault(value.untyped_storage().data_ptr(), []).append(variable)
        return variable

    def _copy_before_change(self, tensor: Tensor) -> None:
        for variable in self._sharing.pop(tensor.untyped_storage().data_ptr(), []):
            variable.value = variable.value.clone()
            variable.version = variable.value._version


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
