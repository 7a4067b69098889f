"""What is measured: the map from inputs to one tensor that a model and the options of a measurement define."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lie_metric.calling import bare, call_of, casting, name_of, select_output, uncast
from lie_metric.options import Function, Layout, Options, Output
from lie_metric.representations import (
    ChannelsLast,
    Image,
    Invariant,
    Parts,
    Representation,
    Tokens,
    infer_output_representation,
)
from lie_metric.running import found_modules, gradients_as_needed, same_draws
from lie_metric.warning import warn

__all__ = [
    "carried",
    "described",
    "evaluated",
    "function_of",
    "row_by_row",
    "tell_of_rest",
    "validate_inputs",
]


def validate_inputs(
    model: object, inputs: object, input_representation: Layout | None, function: Function | None = None
) -> Representation:
    """Refuses a model or images that cannot be measured, before any work is done.

    Args:
        model: As in :func:`lie_derivative`.
        inputs: As in :func:`lie_derivative`.
        input_representation: As in :func:`lie_derivative`.
        function: As in :func:`lie_derivative`.

    Returns:
        How the images move.

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
    carrier = input_representation or Image()
    carrier.check(inputs, "inputs")
    if input_representation is None and min(inputs.shape[1:3]) > 4 and inputs.shape[3] in {1, 3, 4}:
        raise ValueError(
            f"`inputs` must have axes (B, C, H, W), got shape {tuple(inputs.shape)}, which looks like (B, H, W, C). "
            "Pass `input_representation=lie_metric.representations.ChannelsLast()` if the model takes that layout, "
            "`images.movedim(-1, 1)` if it does not, or `input_representation=Image()` if the shape is meant so."
        )
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError("`inputs` must be finite, got NaN or infinite entries. Check the normalisation of the images.")
    return carrier


def function_of(
    model: Callable[..., Any],
    output: Output,
    function: Function | None = None,
    frozen: bool = False,
    dtype: torch.dtype | None = None,
) -> Callable[[Tensor], Tensor]:
    """The map from inputs to the measured tensor, with half-precision weights raised to float32 and no casts between.

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
    cast_again = casting(modules)
    if not raised and not cast_again:
        return gradients_as_needed(same_draws(lambda x: select_output(call(x), output)))

    def measured(x: Tensor) -> Tensor:
        with _exchanged(modules, raised), uncast(cast_again):
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
    found = infer_output_representation(f, images, bare(model), input_representation)
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
            f"The output of {name_of(model)} of shape (B, {f.shape[1]}) is taken as invariant, as class scores are. If "
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
        f"The output of {name_of(model)} does not move: its derivative is exactly zero along every generator for each "
        f"of {moved.shape[1]} images. Either it does not depend on the images (weights that are zero, as in an "
        "untrained head, or an output that is kept), or it is constant almost everywhere (it rounds, quantises or "
        f"picks by argmax). Such zeros say nothing about symmetry.{finite}"
    )


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
    options: Options,
) -> tuple[Tensor, Representation]:
    """The output of images, and how it carries the action.

    Args:
        model: The model, which may declare the grid of its tokens.
        function: The map from images to the measured tensor, see :func:`function_of`.
        images: B images.
        options: How images and output are said to move; one representation each.

    Returns:
        The output, shape (B, ...), and its representation.

    Raises:
        ValueError: If there is not one row for each image, or the representation does not fit.
    """
    f = row_by_row(function, images)
    given = cast("Representation | None", options.input_representation)
    return f, carried(f, images, model, options.whole_output, given)


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
