"""How a tensor carries the action of a generator: as an image, as tokens, not at all, or in a way of the user's own."""

from lie_metric.representations.affine import DirectSum, Linear
from lie_metric.representations.composite import Masked, Packed, Parts
from lie_metric.representations.fields import Field, Image
from lie_metric.representations.flow import Flow
from lie_metric.representations.grids import (
    ChannelsLast,
    Invariant,
    Padded,
    Tokens,
    grid_size,
    map_grid,
    map_samples,
    planar_size,
    refuse_own_action,
    scalar_fields,
)
from lie_metric.representations.inference import declared_grid, infer_output_representation
from lie_metric.representations.irreps import Irreps
from lie_metric.representations.photographs import Photograph
from lie_metric.representations.points import Boxes, Covectors, Points, Tensors, Vectors, Velocities
from lie_metric.representations.protocol import Representation

__all__ = [
    "Boxes",
    "ChannelsLast",
    "Covectors",
    "DirectSum",
    "Field",
    "Flow",
    "Image",
    "Invariant",
    "Irreps",
    "Linear",
    "Masked",
    "Packed",
    "Padded",
    "Parts",
    "Photograph",
    "Points",
    "Representation",
    "Tensors",
    "Tokens",
    "Vectors",
    "Velocities",
    "declared_grid",
    "grid_size",
    "infer_output_representation",
    "map_grid",
    "map_samples",
    "planar_size",
    "refuse_own_action",
    "scalar_fields",
]
