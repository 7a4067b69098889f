"""The representation of a model's output, where its shape leaves one possibility only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lie_metric.representations.fields import Field, Image
from lie_metric.representations.grids import Invariant, Tokens, images_within
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
    """Whether an output of this height and width has the input's proportions, to within a pixel of rounding.

    One axis has no proportions: there the lengths have to be equal.
    """
    if len(size) != len(reference):
        return False
    if len(size) == 1:
        return size[0] == reference[0]
    pairs = itertools.combinations(zip(size, reference, strict=True), 2)
    return all(abs(h * width - w * height) <= max(height, width) for (h, height), (w, width) in pairs)


def infer_output_representation(
    output: Tensor, inputs: Tensor, model: object, input_representation: Representation | None = None
) -> Representation:
    """The representation of a model's output, where its shape leaves one possibility only.

    One or two axes (B,), (B, C) are invariant, unless they are as many numbers as points have from which they come,
    which may be a vector. Four axes are an image (B, C, H, W) if H × W has the proportions of the
    input and the layout (B, H, W, C) does not fit as well, and if it is not two channels from images of another number,
    which may be a field of vectors. Outputs of volumes are told alike, and have their spacing; those of signals have
    their length. Three axes from images are tokens if the model, or one of its direct children, declares the
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
        >>> infer_output_representation(torch.rand(2, 10, 4, 4, 6), torch.rand(2, 1, 8, 8, 12), None, Field(3))
        Field(dimension=3, spacing=(), fibre=None)
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
    layout = input_representation or Image()
    if input_representation is not None or inputs.ndim == 4:
        for channels, *size in images_within(layout, inputs):
            if output.ndim == 2 + len(size) and _same_layout(shape[2:], size) and not _same_layout(shape[1:-1], size):
                return _field(shape, channels, layout)
    if output.ndim == 3 and (getattr(layout, "dimension", None) or 2) == 2:
        owners: list[Any] = [model, *(model.children() if isinstance(model, nn.Module) else ())]
        grids = {grid for grid in map(declared_grid, owners) if grid is not None}
        fitting = [grid for grid in grids if grid.prefix + grid.grid_size[0] * grid.grid_size[1] == shape[1]]
        if len(fitting) == 1:
            return fitting[0]
    raise ValueError(
        f"`output_representation` must be given for an output of shape {shape}: how it transforms cannot be told from "
        "its shape. Pass one of `lie_metric.representations`: Invariant() (nothing acts), Image() for (B, C, H, W), "
        "ChannelsLast() for (B, H, W, C), Tokens(grid_size, prefix) for (B, N, C), Field(1) for signals (B, C, T), "
        "Field(3) for volumes (B, C, D, H, W), Field(2, fibre=Vectors(2)) for fields of vectors, or an object of your "
        "own."
    )


def _field(shape: tuple[int, ...], channels: int, layout: Representation) -> Representation:
    """The field of an output in the input's proportions, if it is one of scalars beyond doubt."""
    dimension = len(shape) - 2
    size = getattr(getattr(layout, "fibre", None), "size", 0)
    # What a field of vectors gives may be one too. On a line the component of a vector is taken for a scalar.
    if (size and shape[1] % size == 0 and shape[1] > 1) or (1 < shape[1] == dimension != channels):
        kind, name = ("volumes", f"Field({dimension})") if dimension == 3 else ("images", "Image()")
        number = {2: "two", 3: "three"}.get(shape[1], str(shape[1]))
        raise ValueError(
            f"`output_representation` must be given for an output of shape {shape} from {kind} of {channels} channels: "
            f"{number} scalars, which move with the image, or the {number} components of vectors, which turn with it "
            f"too? Pass `lie_metric.representations.{name}` for scalars such as class scores, "
            f"`Field({dimension}, fibre=Vectors({dimension}))` for vectors such as a flow, or "
            f"`Field({dimension}, fibre=Covectors({dimension}))` for gradients."
        )
    spacing = getattr(layout, "spacing", ())
    return Image() if dimension == 2 and not spacing else Field(dimension, spacing)
