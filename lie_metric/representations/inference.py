"""The representation of a model's output, where its shape leaves one possibility only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lie_metric.representations.grids import Image, Invariant, Tokens, images_within
from lie_metric.representations.protocol import Representation

__all__ = ["declared_grid", "infer_output_representation"]


def declared_grid(model: object) -> Tokens | None:
    """The token grid that a vision transformer declares by ``patch_embed.grid_size`` and ``num_prefix_tokens``.

    Args:
        model: Any object.

    Returns:
        The representation, or None if the model declares no grid.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(grid, Sequence) or len(grid) != 2:
        return None
    prefix = getattr(model, "num_prefix_tokens", 0)
    return Tokens((int(grid[0]), int(grid[1])), prefix if isinstance(prefix, int) else 0)


def _same_layout(size: Sequence[int], reference: Sequence[int]) -> bool:
    """Whether an output of this height and width has the input's proportions, to within a pixel of rounding."""
    (h, w), (height, width) = size, reference
    return abs(h * width - w * height) <= max(height, width)


def infer_output_representation(
    output: Tensor, inputs: Tensor, model: object, input_representation: Representation | None = None
) -> Representation:
    """The representation of a model's output, where its shape leaves one possibility only.

    One or two axes (B,), (B, C) are invariant, unless they are as many numbers as points have from which they come,
    which may be a vector. Four axes are an image (B, C, H, W) if H × W has the proportions of the
    input and the layout (B, H, W, C) does not fit as well, and if it is not two channels from images of another number,
    which may be a field of vectors. Three axes are tokens if the model, or one of its direct children, declares the
    grid (``patch_embed.grid_size``, ``num_prefix_tokens``) and the number of tokens fits.

    Args:
        output: The model's output.
        inputs: The images it came from.
        model: The model.
        input_representation: How the images are laid out; the default is (B, C, H, W).

    Returns:
        The representation.

    Raises:
        ValueError: If the shape leaves more than one possibility, or none.

    Example:
        >>> import torch
        >>> infer_output_representation(torch.rand(2, 10), torch.rand(2, 3, 8, 8), None)
        Invariant()
        >>> infer_output_representation(torch.rand(2, 10, 4, 4), torch.rand(2, 3, 8, 8), None)
        Image()
    """
    shape = tuple(output.shape)
    if output.ndim in {1, 2}:
        dimension = getattr(input_representation, "dimension", None)
        on_grid = input_representation is None or callable(getattr(input_representation, "map", None))
        if not on_grid and output.ndim == 2 and shape[1] == dimension != 1:
            raise ValueError(
                f"`output_representation` must be given for an output of shape {shape} from {input_representation!r}: "
                f"numbers on which nothing acts, or the components of a vector? Pass `Invariant()`, "
                f"`Vectors({dimension})` or `Points({dimension})`."
            )
        return Invariant()
    if output.ndim == 4 and (input_representation is not None or inputs.ndim == 4):
        for channels, *size in images_within(input_representation or Image(), inputs):
            if _same_layout(shape[2:], size) and not _same_layout(shape[1:3], size):
                if shape[1] == 2 != channels:
                    raise ValueError(
                        f"`output_representation` must be given for an output of shape {shape} from images of "
                        f"{channels} channels: two scalars, which move with the image, or the two components of "
                        "vectors, which turn with it too? Pass `lie_metric.representations.Image()` for scalars such "
                        "as class scores. There is no representation of vectors yet: pass an object of your own (see "
                        "`lie_metric.representations.Representation`), or measure their length, e.g. "
                        "`output=lambda field: field.norm(dim=1, keepdim=True)`."
                    )
                return Image()
    if output.ndim == 3:
        owners: list[Any] = [model, *(model.children() if isinstance(model, nn.Module) else ())]
        grids = {grid for grid in map(declared_grid, owners) if grid is not None}
        fitting = [grid for grid in grids if grid.prefix + grid.grid_size[0] * grid.grid_size[1] == shape[1]]
        if len(fitting) == 1:
            return fitting[0]
    raise ValueError(
        f"`output_representation` must be given for an output of shape {shape}: how it transforms cannot be told from "
        "its shape. Pass one of `lie_metric.representations`: Invariant() (nothing acts), Image() for (B, C, H, W), "
        "ChannelsLast() for (B, H, W, C), Tokens(grid_size, prefix) for (B, N, C), or an object of your own."
    )
