"""How a tensor carries the action of a generator: as an image, as tokens, not at all, or in a way of the user's own."""

from lie_metric.representations.grids import (
    ChannelsLast,
    Image,
    Invariant,
    Padded,
    Tokens,
    grid_size,
    map_grid,
    refuse_own_action,
    scalar_fields,
)
from lie_metric.representations.inference import declared_grid, infer_output_representation
from lie_metric.representations.protocol import Representation

__all__ = [
    "ChannelsLast",
    "Image",
    "Invariant",
    "Padded",
    "Representation",
    "Tokens",
    "declared_grid",
    "grid_size",
    "infer_output_representation",
    "map_grid",
    "refuse_own_action",
    "scalar_fields",
]
