"""Where the images are in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["IMAGE_KEYS", "images_of"]

IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input", "inputs")
"""Keys under which images are looked for in a batch that is a mapping."""


def images_of(batch: Any, images: Callable[[Any], Any] | int | str | None = None) -> Tensor:
    """The images of a batch.

    Args:
        batch: What a loader gives.
        images: A callable from the batch to the tensor, a key or index, or None for the usual forms.

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
                f"`images` must be a key or index of the batch, got {images!r} for {_describe(batch)}."
            ) from error
    else:
        found = _find_images(batch)
    if not isinstance(found, Tensor) or found.ndim == 0:
        source = "found in" if images is None else f"selected by images={images!r} from"
        raise TypeError(
            f"The images must be a tensor with a batch axis, got {_describe(found)}, {source} {_describe(batch)}. "
            "Pass a key, an index or a callable, e.g. `EquivarianceMonitor(images=lambda batch: batch[0])`."
        )
    return found


def _find_images(batch: Any) -> Any:
    """The images of a batch in one of the usual forms, or the batch itself, which then is not a tensor."""
    if isinstance(batch, Mapping):
        keys = [key for key in IMAGE_KEYS if key in batch]
        if len(keys) > 1:
            raise ValueError(
                f"`images` must be given for a batch with several keys that usually hold images, got {keys}. "
                f"Pass e.g. `EquivarianceMonitor(images={keys[0]!r})`."
            )
        return batch[keys[0]] if keys else batch
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0] if isinstance(batch[0], Tensor) else _find_images(batch[0])
    return batch


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {[type(entry).__name__ for entry in value]}"
    return f"a {type(value).__name__}"
