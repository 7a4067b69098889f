"""What of a model is run, and which tensor of what it returns is measured."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from lie_metric.options import Function, Output

__all__ = ["bare", "call_of", "called_name", "casting", "name_of", "part_of", "select_output", "uncast"]

_TENSOR_KEYS = ("logits", "out", "output")


def select_output(returned: Any, output: Output) -> Tensor:
    """The tensor that is measured, from what a model returned.

    Args:
        returned: A tensor; a mapping or object with ``logits`` (or, of a mapping, ``out`` or ``output``); a tuple or
            list, of which the first entry counts.
        output: As in :func:`lie_derivative`.

    Returns:
        The tensor.

    Raises:
        TypeError: If there is no such tensor.
    """
    if callable(output):
        found = output(returned)
        if not isinstance(found, Tensor):
            raise TypeError(f"`output` must return a tensor, got {type(found).__name__}.")
    else:
        found = _unwrap(returned)
    if not found.is_floating_point():
        advice = (
            "Choose its modulus or its parts, e.g. `output=lambda y: torch.view_as_real(y).flatten(-2)`."
            if found.is_complex()
            else "Classes picked by argmax have no derivative: return scores."
        )
        raise TypeError(f"`output` must select a floating-point tensor, got {found.dtype}. {advice}")
    return found.softmax(-1) if output == "probabilities" else found


def _unwrap(returned: Any) -> Tensor:
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping):
        keys = [key for key in _TENSOR_KEYS if isinstance(returned.get(key), Tensor)]
        if keys:
            return cast(Tensor, returned[keys[0]])
        parts, kind, access = dict(returned), "a mapping with keys", "returned[{!r}]"
    elif isinstance(getattr(returned, "logits", None), Tensor):
        return cast(Tensor, returned.logits)
    elif isinstance(returned, (tuple, list)) and returned and isinstance(returned[0], Tensor):
        return returned[0]
    elif isinstance(returned, (tuple, list)) and returned and all(isinstance(one, Mapping) for one in returned):
        raise TypeError(
            f"`output` must say which tensor of the model's output is measured, got a {type(returned).__name__} of "
            f"mappings with keys {list(returned[0])}, one for each image, as detection models return. Which boxes are "
            "kept is no smooth function of the images: measure what comes before, e.g. "
            "`function=lambda model, images: model.backbone(images)['0']`."
        )
    elif isinstance(returned, (tuple, list)):
        parts, kind, access = dict(enumerate(returned)), f"a {type(returned).__name__} of length", "returned[{!r}]"
    else:
        fields = [one.name for one in dataclasses.fields(returned)] if dataclasses.is_dataclass(returned) else []
        parts = {name: getattr(returned, name) for name in fields or getattr(returned, "__dict__", {})}
        kind, access = f"{type(returned).__name__} with attributes", "returned.{}"
    tensors = [key for key, value in parts.items() if isinstance(value, Tensor)]
    held: Any = len(parts) if isinstance(returned, (tuple, list)) else list(parts)
    got = f"{kind} {held}" if parts else type(returned).__name__
    found = f", e.g. `output=lambda returned: {access.format(tensors[0])}`" if tensors else " that returns one"
    raise TypeError(
        f"`output` must say which tensor of the model's output is measured, got {got}. Pass a callable{found}."
    )


def bare(model: Any) -> Any:
    """A model without the wrapper of data parallelism, compiled or not.

    The wrapper of several processes may wait at each call for all of them, which measure different numbers of images,
    and prepares for a backward pass that never comes.

    Args:
        model: Any model.

    Returns:
        The module inside; the model itself if it has no such wrapper.

    Example:
        >>> inside = nn.Linear(2, 2)
        >>> bare(nn.DataParallel(inside)) is inside, bare(inside) is inside
        (True, True)
    """
    inner = getattr(model, "_orig_mod", None) if type(model).__name__ == "OptimizedModule" else model
    return bare(inner.module) if isinstance(inner, _PARALLEL) else model


_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def casting(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that accelerate has prepared for mixed precision: their ``forward`` switches autocast on by itself.

    Args:
        modules: Modules.

    Returns:
        Those of them.
    """
    return [
        module
        for module in modules
        if "_original_forward" in vars(module)
        and str(getattr(vars(module).get("forward"), "__module__", "")).startswith("accelerate.")
    ]


@contextmanager
def uncast(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives modules the ``forward`` that they had before accelerate prepared them.

    Derivatives in half precision hold to a few hundredths alone, see :func:`casting`.

    Args:
        modules: Those that :func:`casting` found.

    Yields:
        Nothing.
    """
    kept = [(vars(module), vars(module)["forward"]) for module in modules]
    try:
        for attributes, _ in kept:
            attributes["forward"] = attributes["_original_forward"]
        yield
    finally:
        for attributes, forward in kept:
            attributes["forward"] = forward


def call_of(model: Any, function: Function | None, arguments: int = 1) -> Callable[..., Any]:
    """What of a model is run: the model itself, a method of it, or a function of it and the images.

    Wrappers of data parallelism are taken off, see :func:`bare`.

    Args:
        model: As in :func:`lie_derivative`.
        function: As in :func:`lie_derivative`.
        arguments: With how many arguments it is called.

    Returns:
        From images to what is returned.

    Raises:
        TypeError: If what is to be run cannot be called with images alone.
        ValueError: If the model has no such method.
    """
    model = bare(model)
    if isinstance(function, str):
        found = getattr(model, function, None)
        if not callable(found):
            near = difflib.get_close_matches(function, [name for name in dir(model) if not name.startswith("_")])
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else " Pass the name of one, or a callable."
            raise ValueError(f"`function` must name a method of {type(model).__name__}, got {function!r}.{hint}")
        return cast(Callable[..., Any], found)
    if function is not None:
        given = function
        return lambda *x: given(model, *x)
    if not callable(model):
        raise TypeError(
            f"`model` must be callable, got {type(model).__name__}. Pass a module or a function, or say what of it is "
            "measured, e.g. `function='encode'`."
        )
    target: Any = getattr(model, "forward", model) if isinstance(model, nn.Module) else model
    # That of `LightningModule` calls the one of `nn.Module`.
    if isinstance(model, nn.Module) and getattr(target, "__qualname__", "") in _UNFORWARDED:
        raise TypeError(
            f"`model` must have a `forward`, got {name_of(model)}, which has none. Say what of it is measured, e.g. "
            f"`function=lambda model, images: {part_of(model, 'model')}(images)`, or the name of a method."
        )
    if not getattr(model, "_forward_pre_hooks", None):  # these may bring the missing arguments
        try:
            needed = inspect.signature(target)
        except (TypeError, ValueError):  # a scripted or built-in function does not say
            return cast(Callable[..., Any], model)
        try:
            needed.bind(*[None] * arguments)
        except TypeError as error:
            raise TypeError(
                f"`model` must be callable with {'the images alone' if arguments == 1 else f'{arguments} arguments'}, "
                f"got {name_of(model)}{needed}. Say how it is called, e.g. "
                f"`function=lambda model, images: model(images{_further(needed)})`."
            ) from error
    return cast(Callable[..., Any], model)


_UNFORWARDED = {"_forward_unimplemented", "LightningModule.forward"}


def part_of(model: object, name: str = "module") -> str:
    """The part of a module that is most likely meant where the module itself cannot be called, as an expression.

    Args:
        model: The module.
        name: What it is called.

    Returns:
        That of the child with the most weights.

    Example:
        >>> part_of(nn.ModuleDict({"net": nn.Linear(2, 2), "loss": nn.MSELoss()}))
        'module.net'
    """
    children = dict(model.named_children()) if isinstance(model, nn.Module) else {}
    sizes = {path: sum(weight.numel() for weight in child.parameters()) for path, child in children.items()}
    return f"{name}.{max(sizes, key=lambda path: sizes[path])}" if sizes else f"{name}.encode"


def _further(signature: inspect.Signature) -> str:
    """The arguments beside the first that have to be given."""
    needed = [
        one.name
        for one in signature.parameters.values()
        if one.default is one.empty and one.kind not in {one.VAR_POSITIONAL, one.VAR_KEYWORD}
    ]
    return "".join(f", {name}=..." for name in needed[1:])


def name_of(model: object) -> str:
    """What a model is called in messages, without wrappers of data parallelism."""
    inside = bare(model)
    return str(getattr(inside, "__qualname__", type(inside).__name__))


def called_name(model: object, function: Function | None) -> str:
    """What of a model is run, in messages.

    Args:
        model: As in :func:`lie_derivative`.
        function: As in :func:`lie_derivative`.

    Returns:
        The name of the function, or of the model and its method.

    Example:
        >>> called_name(nn.Flatten(), "forward"), called_name(nn.Flatten(), None), called_name(None, len)
        ('Flatten.forward', 'Flatten', 'len')
    """
    if callable(function):
        return str(getattr(function, "__qualname__", repr(function)))
    return f"{name_of(model)}.{function}" if function else name_of(model)
