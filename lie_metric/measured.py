"""What is measured: the map from inputs to one tensor that a model and the options of a measurement define."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from lie_metric.jacobian import Method
from lie_metric.representations import Image, Representation, infer_output_representation
from lie_metric.resampling import Resampling

__all__ = ["Output", "evaluated", "function_of", "select_output", "validate_inputs", "validate_options"]

Output = Literal["logits", "probabilities"] | Callable[[Any], Tensor]

_TENSOR_KEYS = ("logits", "out", "output")


def validate_inputs(model: object, inputs: object, input_representation: Representation | None) -> None:
    """Refuses a model or images that cannot be measured, before any work is done.

    Args:
        model: As in :func:`lie_derivative`.
        inputs: As in :func:`lie_derivative`.
        input_representation: As in :func:`lie_derivative`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the images have the wrong shape or are not finite.
    """
    if not callable(model):
        raise TypeError(f"`model` must be callable, got {type(model).__name__}. Pass a module or a function.")
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"`inputs` must be a tensor, got {type(inputs).__name__}. Pass the images alone, without labels."
        )
    if not inputs.is_floating_point():
        raise TypeError(
            f"`inputs` must have a floating-point dtype, got {inputs.dtype}. Convert and scale the images, e.g. "
            "`images.float() / 255`."
        )
    (input_representation or Image()).check(inputs, "inputs")
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError("`inputs` must be finite, got NaN or infinite entries. Check the normalisation of the images.")


def validate_options(
    output: Output,
    input_representation: Representation | None,
    output_representation: Representation | None,
    resampling: Resampling | None,
    method: str,
    chunk_size: int | None,
) -> None:
    """Refuses options of a measurement that have no meaning; they can be checked before there is a model.

    Args:
        output: As in :func:`lie_derivative`.
        input_representation: As in :func:`lie_derivative`.
        output_representation: As in :func:`lie_derivative`.
        resampling: As in :func:`lie_derivative`.
        method: As in :func:`lie_derivative`.
        chunk_size: As in :func:`lie_derivative`.

    Raises:
        TypeError: If an option is of the wrong kind.
        ValueError: If an option is out of range.
    """
    if not callable(output) and output not in {"logits", "probabilities"}:
        raise ValueError(f"`output` must be 'logits', 'probabilities' or a callable, got {output!r}.")
    for name, value in (
        ("input_representation", input_representation),
        ("output_representation", output_representation),
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
        raise TypeError(
            f"`output` must select a floating-point tensor, got {found.dtype}. Classes picked by argmax have no "
            "derivative: return scores."
        )
    return found.softmax(-1) if output == "probabilities" else found


def _unwrap(returned: Any) -> Tensor:
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping):
        keys = [key for key in _TENSOR_KEYS if isinstance(returned.get(key), Tensor)]
        if keys:
            return cast(Tensor, returned[keys[0]])
    elif isinstance(getattr(returned, "logits", None), Tensor):
        return cast(Tensor, returned.logits)
    elif isinstance(returned, (tuple, list)) and returned and isinstance(returned[0], Tensor):
        return returned[0]
    kind = f"a mapping with keys {list(returned)}" if isinstance(returned, Mapping) else type(returned).__name__
    raise TypeError(
        f"`output` must say which tensor of the model's output is measured, got {kind}. Pass a callable, e.g. "
        "`output=lambda returned: returned['scores']`."
    )


def function_of(
    model: Callable[..., Any], output: Output, frozen: bool = False, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """The map from inputs to the measured tensor, with half-precision weights raised to float32.

    Args:
        model: As in :func:`lie_derivative`.
        output: As in :func:`lie_derivative`.
        frozen: Whether parameters are taken as constants.

    Returns:
        The map.
    """
    half = {torch.float16, torch.bfloat16}
    if isinstance(model, nn.Module):
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        if dtype is not None:
            wide = {name: v.detach().to(dtype) if v.is_floating_point() else v for name, v in state.items()}
            return lambda x: select_output(torch.func.functional_call(model, wide, (x,)), output)
        if frozen or any(value.dtype in half for value in state.values()):
            raised = {name: value.float() if value.dtype in half else value for name, value in state.items()}
            raised = {name: value.detach() for name, value in raised.items()} if frozen else raised
            module = model
            return lambda x: select_output(torch.func.functional_call(module, raised, (x,)), output)
    return lambda x: select_output(model(x), output)


def evaluated(
    model: Callable[..., Any],
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    output_representation: Representation | None,
) -> tuple[Tensor, Representation]:
    """The output of images, and how it carries the action.

    Args:
        model: The model, which may declare the grid of its tokens.
        function: The map from images to the measured tensor, see :func:`function_of`.
        images: B images.
        output_representation: As in :func:`lie_derivative`.

    Returns:
        The output, shape (B, ...), and its representation.

    Raises:
        ValueError: If there is not one row for each image, or the representation does not fit.
    """
    f = function(images)
    if f.shape[:1] != images.shape[:1]:
        raise ValueError(
            f"`output` must have one entry for each of the {len(images)} images on its first axis, got shape "
            f"{tuple(f.shape)}. Select or reshape it with `output=`."
        )
    representation = output_representation or infer_output_representation(f, images, model)
    representation.check(f, "output")
    return f, representation
