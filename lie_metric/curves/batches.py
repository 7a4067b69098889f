"""Where the images are in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lie_metric.binding import moved_parts
from lie_metric.options import Layout

__all__ = ["IMAGE_KEYS", "describe", "images_of", "inputs_of", "refusal"]

IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs")
"""Keys under which images are looked for in a batch that is a mapping."""

Selector = Callable[[Any], Any] | int | str


def images_of(batch: Any, images: Selector | None = None, owner: str = "EquivarianceMonitor") -> Tensor:
    """The images of a batch.

    Args:
        batch: What a loader gives.
        images: A callable from the batch to the tensor, a key or index, or None for the usual forms.
        owner: Whose argument ``images`` is, for messages.

    Returns:
        The images.

    Raises:
        TypeError: If there is no tensor with a batch axis.
        ValueError: If the key or index is not in the batch, or several usual keys are.
    """
    if callable(images):
        found = images(batch)
    elif images is not None:
        try:
            found = batch[images]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"`images` must be a key or index of the batch, got {images!r} for {describe(batch)}."
            ) from error
    else:
        found = _find_images(batch, owner)
    if not isinstance(found, Tensor) or found.ndim == 0:
        what = describe(found) if found is batch else f"{describe(found)}, {_source(images)} {describe(batch)}"
        raise TypeError(f"`{owner}` must be told where the images are in a batch, got {what}. {_advice(batch, owner)}")
    return found


def inputs_of(batch: Any, inputs: Selector | None, layout: Layout | None, owner: str = "EquivarianceMonitor") -> Any:
    """What the model takes of a batch: images, or what holds the named parts.

    Args:
        batch: What a loader gives.
        inputs: A callable from the batch, a key or index, or None for the usual forms.
        layout: How inputs move.
        owner: Whose arguments these are, for messages.

    Returns:
        The images as by :func:`images_of`; of inputs with named parts the batch itself if it holds them all under
        names, or else its first entry.

    Raises:
        TypeError: If the parts are not found.
        ValueError: If a key or index is not in the batch.
    """
    if not isinstance(layout, Mapping):
        return images_of(batch, inputs, owner)
    if callable(inputs):
        return inputs(batch)
    if inputs is not None:
        try:
            return batch[inputs]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"`inputs` must be a key or index of the batch, got {inputs!r} for {describe(batch)}."
            ) from error
    sequence = isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")
    found = batch[0] if sequence and batch else batch
    try:
        moved_parts(found, layout)
    except (KeyError, TypeError) as error:
        raise TypeError(
            f"`{owner}` must be told what the module takes of a batch, got {describe(batch)}, in which the parts "
            f"{list(layout)} are not found. Pass `{owner}(inputs=...)`, a callable from the batch to what holds them, "
            "a mapping, an object, or a tuple of the arguments of the module, e.g. `lambda batch: batch[:2]`."
        ) from error
    return found


def _find_images(batch: Any, owner: str) -> Any:
    """The images of a batch in one of the usual forms, or the batch itself, which then is not a tensor."""
    if isinstance(batch, Mapping):
        keys = [key for key in IMAGE_KEYS if key in batch]
        if len(keys) > 1:
            raise ValueError(
                f"`images` must be given for a batch with several keys that usually hold images, got {keys}. "
                f"Pass e.g. `{owner}(images={keys[0]!r})`."
            )
        return _one_tensor(batch[keys[0]], f"batch[{keys[0]!r}]", owner) if keys else batch
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0] if isinstance(batch[0], Tensor) else _one_tensor(batch[0], "batch[0]", owner)
    return batch


def _one_tensor(value: Any, where: str, owner: str) -> Any:
    """The images of what stands where images usually do; several tensors there are no batch."""
    if not isinstance(value, (tuple, list)) or not value:
        return _find_images(value, owner) if isinstance(value, Mapping) else value
    if len(value) == 1 and not (isinstance(value[0], Tensor) and value[0].ndim == 3):
        return _one_tensor(value[0], f"{where}[0]", owner) if not isinstance(value[0], Tensor) else value[0]
    tensors = [entry for entry in value if isinstance(entry, Tensor)]
    if len(tensors) == len(value) and all(entry.ndim == 3 for entry in tensors):
        raise TypeError(
            f"`{owner}` must be given one tensor of images, got a list of {len(value)} single images at {where}, as "
            f"detection models take. Pass `{owner}(images=lambda batch: torch.stack(list({where})), "
            "function=lambda module, images: module.model.backbone(images)['0'])`, where the function takes one tensor "
            "and returns one with a row for each image; that one gives features of torchvision's detectors."
        )
    if isinstance(value[0], Tensor) and len(tensors) == 1:
        return value[0]
    raise TypeError(
        f"`images` must be given for a batch that holds {describe(value)} at {where}. Pass e.g. "
        f"`{owner}(images=lambda batch: {where}[0])`."
    )


def refusal(
    batch: Any, found: Tensor, images: Selector | None, representation: object, owner: str, error: Exception
) -> str:
    """Why a tensor cannot be measured as images, and what to do about it.

    Args:
        batch: The batch.
        found: The tensor.
        images: How it was selected.
        representation: How it is said to carry the action.
        owner: Whose arguments are named.
        error: Why it cannot be measured.

    Returns:
        Sentences.
    """
    got = describe(found) + ("" if found is batch else f", {_source(images)} {describe(batch)}")
    if representation is not None:
        return (
            f"`{owner}` cannot measure {got}: {error} Pass `{owner}(images=...)`, a key, an index or a callable, if "
            f"these are not the images, or `{owner}(input_representation=...)`, which was given, if their layout is "
            "another."
        )
    if found.ndim == 3:
        where = next((where for where, value in _entries(batch) if value is found), "batch")
        advice = f"Pass `{owner}(images=lambda batch: {where}[:, None])` if there is no axis of channels."
        if isinstance(batch, (tuple, list)) and all(isinstance(one, Tensor) and one.ndim == 3 for one in batch):
            advice = f"Pass `{owner}(images=torch.stack)` if each tensor is one image. {advice}"
    elif found.ndim == 4 and found.is_floating_point():
        return f"`{owner}` cannot measure {got}: {error}"
    else:
        advice = _advice(batch, owner, found)
    kind = "floating-point images" if found.ndim == 4 else "images of shape (B, C, H, W)"
    return f"`{owner}` must be given {kind}, got {got}. {advice}"


def _source(images: Selector | None) -> str:
    return "found in" if images is None else f"selected by images={images!r} from"


def _entries(batch: Any, where: str = "batch", depth: int = 3) -> Iterator[tuple[str, Any]]:
    """What a batch holds, each with the expression that leads to it.

    Yields:
        Expressions and objects.
    """
    yield where, batch
    if depth and isinstance(batch, (Mapping, tuple, list)):
        for key, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch[:8]):
            yield from _entries(value, f"{where}[{key!r}]", depth - 1)


def _advice(batch: Any, owner: str, refused: Tensor | None = None) -> str:
    """What to pass, by what looks most like images in a batch."""
    # Numbers of another kind come last: masks may have the shape of images.
    found = [(where, value) for where, value in _entries(batch) if isinstance(value, Tensor) and value.ndim == 4]
    found.sort(key=lambda entry: not entry[1].is_floating_point())
    if not found:
        example = next((where for where, _ in _entries(batch) if where != "batch"), "batch[0]")
        return (
            f"Pass `{owner}(images=...)`, a callable that makes of a batch a tensor of shape (B, C, H, W), e.g. "
            f"`lambda batch: {example}`, or a key or index; `inputs=` is its other name, for what is no image."
        )
    where, value = found[0]
    selector = f"lambda batch: {where}"
    if not value.is_floating_point():
        selector += ".float() / 255"
    elif where.count("[") == 1:
        selector = where.removeprefix("batch[").removesuffix("]")
    condition = "" if value is refused else f" if the images are {describe(value)} at {where}"
    return f"Pass `{owner}(images={selector})`{condition}."


def describe(value: Any) -> str:
    """What something is, without its contents.

    Args:
        value: Any object.

    Returns:
        A few words.

    Example:
        >>> describe((1, "two"))
        "a tuple of ['int', 'str']"
    """
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" and {value.dtype}"
        return f"a tensor of shape {tuple(value.shape)}{kind}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        kinds = [type(entry).__name__ for entry in value[:8]]
        return f"a {type(value).__name__} of {kinds}" + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return f"a {type(value).__name__}"
