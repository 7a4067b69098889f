"""What is measured: the map from inputs to one tensor that a model and the options of a measurement define."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lie_metric.jacobian import Method
from lie_metric.representations import (
    ChannelsLast,
    Image,
    Invariant,
    Parts,
    Representation,
    Tokens,
    infer_output_representation,
)
from lie_metric.resampling import Resampling
from lie_metric.running import found_modules, gradients_as_needed, same_draws
from lie_metric.warning import warn

__all__ = [
    "Function",
    "Layout",
    "Output",
    "call_of",
    "carried",
    "described",
    "evaluated",
    "function_of",
    "part_of",
    "row_by_row",
    "select_output",
    "tell_of_rest",
    "validate_inputs",
    "validate_options",
]

Output = Literal["logits", "probabilities"] | Callable[[Any], Tensor]
Function = str | Callable[..., Any]
Layout = Representation | Mapping[str, Representation]

_TENSOR_KEYS = ("logits", "out", "output")


def validate_inputs(
    model: object, inputs: object, input_representation: Representation | None, function: Function | None = None
) -> None:
    """Refuses a model or images that cannot be measured, before any work is done.

    Args:
        model: As in :func:`lie_derivative`.
        inputs: As in :func:`lie_derivative`.
        input_representation: As in :func:`lie_derivative`.
        function: As in :func:`lie_derivative`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the images have the wrong shape or are not finite, or the function is no method of the model.
    """
    call_of(model, function)
    if isinstance(input_representation, Mapping):
        raise TypeError(
            f"`input_representation` must be one representation for this measure, got the parts "
            f"{list(input_representation)}. Measure Lie derivatives of inputs with named parts, or wrap the model in "
            "one that takes a single tensor."
        )
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"`inputs` must be a tensor, got {type(inputs).__name__}. Pass the images alone, without labels, or name "
            "the parts that move, e.g. `input_representation={'pos': lie_metric.representations.Points(3)}`."
        )
    if not inputs.is_floating_point():
        raise TypeError(
            f"`inputs` must have a floating-point dtype, got {inputs.dtype}. Convert and scale the images, e.g. "
            "`images.float() / 255`."
        )
    if inputs.ndim and not len(inputs):
        raise ValueError(
            f"`inputs` must be non-empty, got shape {tuple(inputs.shape)}: there is no image to measure. Check what "
            "was selected, and leave empty batches out."
        )
    (input_representation or Image()).check(inputs, "inputs")
    if input_representation is None and min(inputs.shape[1:3]) > 4 and inputs.shape[3] in {1, 3, 4}:
        raise ValueError(
            f"`inputs` must have axes (B, C, H, W), got shape {tuple(inputs.shape)}, which looks like (B, H, W, C). "
            "Pass `input_representation=lie_metric.representations.ChannelsLast()` if the model takes that layout, "
            "`images.movedim(-1, 1)` if it does not, or `input_representation=Image()` if the shape is meant so."
        )
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError("`inputs` must be finite, got NaN or infinite entries. Check the normalisation of the images.")


def validate_options(
    output: Output,
    input_representation: Layout | None,
    output_representation: Layout | None,
    resampling: Resampling | None,
    method: str,
    chunk_size: int | None,
    function: Function | None = None,
) -> None:
    """Refuses options of a measurement that have no meaning; they can be checked before there is a model.

    Args:
        output: As in :func:`lie_derivative`.
        input_representation: As in :func:`lie_derivative`.
        output_representation: As in :func:`lie_derivative`.
        resampling: As in :func:`lie_derivative`.
        method: As in :func:`lie_derivative`.
        chunk_size: As in :func:`lie_derivative`.
        function: As in :func:`lie_derivative`.

    Raises:
        TypeError: If an option is of the wrong kind.
        ValueError: If an option is out of range.
    """
    if not callable(output) and output not in {"logits", "probabilities"}:
        raise ValueError(f"`output` must be 'logits', 'probabilities' or a callable, got {output!r}.")
    if function is not None and not callable(function) and not (isinstance(function, str) and function):
        raise TypeError(
            f"`function` must be the name of a method, a callable or None, got {function!r}. Pass e.g. 'encode', or "
            "`lambda model, images: model(images, steps=4)`."
        )
    for name, value in (
        *_parts_of("input_representation", input_representation),
        *_parts_of("output_representation", output_representation),
    ):
        if value is not None and (isinstance(value, type) or not isinstance(value, Representation)):
            raise TypeError(
                f"`{name}` must be a representation, got {value!r}. Pass an instance such as "
                "`lie_metric.representations.Image()`."
            )
    if resampling is not None and not isinstance(resampling, Resampling):
        raise TypeError(f"`resampling` must be a `Resampling`, got {resampling!r}. Pass e.g. Resampling('bspline').")
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {get_args(Method)}, got {method!r}.")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int)):
        raise TypeError(f"`chunk_size` must be an integer or None, got {chunk_size!r}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}. None chooses.")


def _parts_of(name: str, layout: Any) -> list[tuple[str, Any]]:
    """A representation, or those of named parts, by what they are called."""
    if isinstance(layout, Mapping):
        wrong = [key for key in layout if not isinstance(key, str) or not key or "/" in key]
        if wrong:
            raise ValueError(
                f"`{name}` must have names without '/', by which results are reported, got {wrong}. An entry of a "
                "tuple is named by its index, e.g. '0', and a deeper one with dots."
            )
        return [(f"{name}[{key!r}]", value) for key, value in layout.items()]
    return [(name, layout)]


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


def call_of(model: Any, function: Function | None, arguments: int = 1) -> Callable[..., Any]:
    """What of a model is run: the model itself, a method of it, or a function of it and the images.

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
            f"`model` must have a `forward`, got {_name(model)}, which has none. Say what of it is measured, e.g. "
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
                f"got {_name(model)}{needed}. Say how it is called, e.g. "
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


def function_of(
    model: Callable[..., Any],
    output: Output,
    function: Function | None = None,
    frozen: bool = False,
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor], Tensor]:
    """The map from inputs to the measured tensor, with half-precision weights raised to float32.

    Each of its calls sees the same random draws, those that follow the state in which it is made.

    Args:
        model: As in :func:`lie_derivative`.
        output: As in :func:`lie_derivative`.
        function: As in :func:`lie_derivative`.
        frozen: Whether parameters are taken as constants.
        dtype: That of floating-point parameters and buffers while the model runs, float64 say; inputs have to come in
            the same. None raises half types alone.

    Returns:
        The map.
    """
    call = call_of(model, function)
    modules = [module for root in found_modules(call).roots for module in root.modules()]
    raised: dict[int, tuple[Tensor, Tensor]] = {}
    for places in _places(modules):
        for tensor in filter(torch.is_tensor, places.values()):
            working = _working(tensor, dtype)
            if frozen and working.requires_grad:
                working = working.detach()
            if working is not tensor:
                raised[id(tensor)] = tensor, working
    if not raised:
        return gradients_as_needed(same_draws(lambda x: select_output(call(x), output)))

    def measured(x: Tensor) -> Tensor:
        with _exchanged(modules, raised):
            return select_output(call(x), output)

    return gradients_as_needed(same_draws(measured))


def _places(modules: Sequence[nn.Module]) -> Iterator[dict[str, Any]]:
    for module in modules:
        yield module._parameters
        yield module._buffers


def _working(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if dtype is not None:
        return tensor.to(dtype)
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


@contextmanager
def _exchanged(modules: Sequence[nn.Module], others: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Puts other tensors in the places of parameters and buffers, whichever way the model is then called.

    :func:`torch.func.functional_call` does it for the call of a module alone, and tied weights stay tied here because
    a place is known by the tensor in it.
    """
    undo: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for places in _places(modules):
            undo += [(places, name, tensor) for name, tensor in places.items() if id(tensor) in others]
        for places, name, tensor in undo:
            places[name] = others[id(tensor)][1]
        yield
    finally:
        for places, name, tensor in undo:
            places[name] = tensor


def carried(
    f: Tensor,
    images: Tensor,
    model: object,
    output_representation: Representation | None,
    input_representation: Representation | None = None,
) -> Representation:
    """How the output of images carries the action.

    Args:
        f: The output.
        images: The images.
        model: The model, which may declare the grid of its tokens.
        output_representation: As in :func:`lie_derivative`.
        input_representation: As in :func:`lie_derivative`.

    Returns:
        The representation that was declared, or the one inferred.

    Raises:
        ValueError: If the output is empty, or the representation does not fit or has to be given.

    Warns:
        UserWarning: If an output of two, four, six or eight numbers, or from points in space of six or nine, is taken
            as invariant, once for each model.
    """
    if not f.numel():
        raise ValueError(
            f"`output` must be non-empty, got shape {tuple(f.shape)} from {len(images)} images: nothing is measured. "
            "Select a tensor with entries, e.g. `output=lambda returned: returned[0]`."
        )
    if output_representation is not None:
        output_representation.check(f, "output")
        return output_representation
    found = infer_output_representation(f, images, model, input_representation)
    found.check(f, "output")
    dimension = getattr(input_representation, "dimension", 2)
    on_grid = input_representation is None or callable(getattr(input_representation, "map", None))
    # Of points the components of one vector are refused where the representation is inferred.
    doubtful = {2, 4, 6, 8} if on_grid else {2 * dimension, dimension**2} - {dimension}
    if f.ndim == 2 and f.shape[1] in doubtful and isinstance(found, Invariant) and _first_time(model, _GUESSED):
        example = "Points.of_image(height, width)"
        if not on_grid:
            vector = f"Vectors({dimension})"
            example = f"DirectSum(({', '.join([f'lie_metric.representations.{vector}'] * (f.shape[1] // dimension))}))"
        warn(
            f"The output of {_name(model)} of shape (B, {f.shape[1]}) is taken as invariant, as class scores are. If "
            f"these are coordinates, boxes or vectors, they move with the {'image' if on_grid else 'points'} and the "
            f"measure is wrong: pass e.g. `output_representation=lie_metric.representations.{example}`. Say so with "
            "`output_representation=lie_metric.representations.Invariant()` if they are scores."
        )
    return found


_GUESSED: WeakSet[Any] = WeakSet()
_AT_REST: WeakSet[Any] = WeakSet()
"""The models of which something was told already."""


def _first_time(model: object, told: WeakSet[Any]) -> bool:
    try:
        first = model not in told
        told.add(model)
    except TypeError:  # neither hashed nor referred to weakly
        return True
    return first


def tell_of_rest(model: object, moved: Tensor, products: Tensor, method: str, responds: Callable[[], bool]) -> None:
    """Says that an output does not respond to inputs at all: zeros to the last bit are then no sign of symmetry.

    Args:
        model: The model.
        moved: Tangents of the images.
        products: What the model makes of them.
        method: By which method.
        responds: Whether the output moves along a direction that is none of a generator's, asked where all else is 0.

    Warns:
        UserWarning: If all products are exactly zero where inputs move, once for each model.
    """
    if not products.numel() or bool(products.any()) or not bool(moved.any()):
        return
    if responds() or not _first_time(model, _AT_REST):
        return
    finite = "" if method == "difference" else " `method='difference'` measures changes over a finite step instead."
    warn(
        f"The output of {_name(model)} does not move: its derivative is exactly zero along every generator for each of "
        f"{moved.shape[1]} images. Either it does not depend on the images (weights that are zero, as in an untrained "
        "head, or an output that is kept), or it is constant almost everywhere (it rounds, quantises or picks by "
        f"argmax). Such zeros say nothing about symmetry.{finite}"
    )


def _name(model: object) -> str:
    return str(getattr(model, "__qualname__", type(model).__name__))


def described(f: Tensor, representation: Representation, declared: Layout | None, output: Output) -> str:
    """What is measured, in words: the output's shape, how it transforms, and why that is thought.

    Args:
        f: The output.
        representation: How it transforms.
        declared: The representation that was given, or None if it was inferred.
        output: As in :func:`lie_derivative`.

    Returns:
        One line.

    Example:
        >>> described(torch.zeros(8, 10), Invariant(), None, "logits")
        '(B, 10): invariant, class scores'
        >>> described(torch.zeros(8, 2, 4, 4), Image(), Image(), "logits")
        '(B, 2, 4, 4): image, as declared'
    """
    if isinstance(representation, Parts):
        split = zip(representation.names, representation.representations.values(), representation.split(f), strict=True)
        return "; ".join(f"{name} {described(part, one, one, output)}".strip() for name, one, part in split)
    shape = ", ".join(["B", *map(str, f.shape[1:])]) + ("," if f.ndim == 1 else "")
    if declared is not None:
        reason = "as declared"
    elif isinstance(representation, Tokens):
        reason = "the grid that the model declares"
    elif isinstance(representation, Invariant) and f.ndim == 1:
        reason = "one number for each image"
    elif isinstance(representation, Invariant):
        reason = "class probabilities" if output == "probabilities" else "class scores"
    else:
        reason = "in the proportions of the input"
    return f"({shape}): {_WORDS.get(type(representation), repr(representation))}, {reason}"


_WORDS: dict[type, str] = {Invariant: "invariant", Image: "image", ChannelsLast: "image with channels last"}


def evaluated(
    model: Callable[..., Any],
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    output_representation: Representation | None,
    input_representation: Representation | None = None,
) -> tuple[Tensor, Representation]:
    """The output of images, and how it carries the action.

    Args:
        model: The model, which may declare the grid of its tokens.
        function: The map from images to the measured tensor, see :func:`function_of`.
        images: B images.
        output_representation: As in :func:`lie_derivative`.
        input_representation: As in :func:`lie_derivative`.

    Returns:
        The output, shape (B, ...), and its representation.

    Raises:
        ValueError: If there is not one row for each image, or the representation does not fit.
    """
    f = row_by_row(function, images)
    return f, carried(f, images, model, output_representation, input_representation)


def row_by_row(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The output of images, if there is a row for each.

    Args:
        function: The map from images to the measured tensor, see :func:`function_of`.
        images: B images.

    Returns:
        The output, shape (B, ...).

    Raises:
        ValueError: If there is not one row for each image.
    """
    f = function(images.clone())  # it may write into them
    if f.shape[:1] != images.shape[:1]:
        raise ValueError(
            f"`output` must have one entry for each of the {len(images)} images on its first axis, got shape "
            f"{tuple(f.shape)}. Select or reshape it with `output=`."
        )
    return f
