"""Where the images are in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["IMAGE_KEYS", "describe", "images_of", "why_no_images"]

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
        source = "found in" if images is None else f"selected by images={images!r} from"
        raise TypeError(
            f"The images must be a tensor with a batch axis, got {describe(found)}, {source} {describe(batch)}. "
            f"Pass a key, an index or a callable, e.g. `{owner}(images=lambda batch: batch[0])`."
        )
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
            f"The images must be one tensor, got a list of {len(value)} single images at {where}, as detection models "
            f"take. If they are of one size, pass `{owner}(images=lambda batch: torch.stack(list({where})), "
            "function=lambda module, images: ...)` with a function that calls the model and returns one tensor, with a "
            "row for each image."
        )
    if isinstance(value[0], Tensor) and len(tensors) == 1:
        return value[0]
    raise TypeError(
        f"`images` must be given for a batch that holds {describe(value)} at {where}. Pass e.g. "
        f"`{owner}(images=lambda batch: {where}[0])`."
    )


def why_no_images(batch: Any, found: Tensor, images: Selector | None, representation: object, owner: str) -> str:
    """What to do about a tensor that cannot be measured as images.

    Args:
        batch: The batch.
        found: The tensor.
        images: How it was selected.
        representation: How it is said to carry the action.
        owner: Whose arguments are named.

    Returns:
        A sentence.
    """
    entries = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if _is_sequence(batch) else ()
    others = [key for key, entry in entries if _like_images(entry) and entry is not found]
    if images is None and not _like_images(found) and others:
        return f"Pass `{owner}(images={others[0]!r})` if the images are batch[{others[0]!r}]."
    if not found.is_floating_point():
        return (
            f"Pass `{owner}(images=...)`, a callable that makes of a batch what the model takes, e.g. "
            "`lambda batch: batch[0].float() / 255`."
        )
    given = "" if representation is None else ", which was given,"
    return (
        f"Pass `{owner}(images=...)`, a key, an index or a callable, if these are not the images, or "
        f"`{owner}(input_representation=...)`{given} if they have another layout."
    )


def _is_sequence(batch: Any) -> bool:
    return isinstance(batch, (tuple, list))


def _like_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


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
