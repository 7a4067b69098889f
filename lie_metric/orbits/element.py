"""One finite transform of each image of a batch, and named sets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lie_metric.representations import Representation, map_grid, scalar_fields
from lie_metric.resampling import Resampling

__all__ = ["Element", "Frame", "Orbit"]


class Frame(NamedTuple):
    """A part of an image, signal or volume, in samples.

    Attributes:
        start: The first index along each axis: row and column of an image.
        size: How many samples it has along each axis.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, image: Tensor) -> Tensor:
        """That part of images (..., H, W)."""
        for axis, (first, count) in enumerate(zip(self.start, self.size, strict=True), start=-len(self.size)):
            image = image.narrow(axis, first, count)
        return image


@dataclass(frozen=True)
class Element:
    """One transform of each image of a batch, and how an output is brought back from it.

    Args:
        forward: From images (B, C, H, W) to the transformed images.
        backward: From maps (B, C, h, w) on the output's grid to maps transformed by the inverse.
        inside: From maps on the output's grid, and the distances between its samples, to booleans (B or 1, h, w): what
            of the inverse was read in the frame.
        act: From a representation with an action of its own, a tensor, and 1 or -1 for the inverse, to the tensor
            transformed by that action; None where there are images alone to go by.
        frame: What of an image the transformed one is compared with, where it shows another part of the image as large;
            None for the whole image.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    inside: Callable[[Tensor, tuple[float, ...]], Tensor]
    act: Callable[[Representation, Tensor, int], Tensor] | None = None
    frame: Frame | None = None

    @classmethod
    def of_action(cls, act: Callable[[Representation, Tensor, int], Tensor]) -> Element:
        """An element that moves no images, but what has an action of its own.

        Args:
            act: From a representation, a tensor, and 1 or -1 for the inverse, to the transformed tensor.

        Returns:
            The element.
        """

        def refused(image: Tensor, spacing: tuple[float, ...] = ()) -> Tensor:
            raise TypeError(
                "`transforms` must act on images, got maps of points. Pass `input_representation=Points(...)` if the "
                "inputs are points, or lattice transforms such as 'D4' for images."
            )

        return cls(refused, refused, refused, act)

    def on(self, representation: Representation, tensor: Tensor, direction: int = 1) -> Tensor:
        """The transform of whatever a representation says the tensor is.

        Args:
            representation: How the tensor carries the action.
            tensor: One entry for each image on its first axis.
            direction: 1, or -1 for the inverse.

        Returns:
            The transformed tensor, of the same shape.
        """
        if self.act is not None and not scalar_fields(representation):
            return self.act(representation, tensor, direction)
        return map_grid(representation, tensor, self.forward if direction > 0 else self.backward)

    def valid(self, representation: Representation, tensor: Tensor) -> Tensor:
        """Ones for the entries that the inverse read in the frame, zeros elsewhere.

        Args:
            representation: How the tensor carries the action.
            tensor: One entry for each image on its first axis.

        Returns:
            A tensor of the same shape; ones if the representation has no ``map``, and so no frame.
        """
        ones = torch.ones_like(tensor)
        if not callable(getattr(representation, "map", None)):
            return ones
        spacing = getattr(representation, "spacing", ())
        return map_grid(
            representation, ones, lambda image: self.inside(image, spacing)[:, None].expand_as(image).to(image.dtype)
        )


@runtime_checkable
class Orbit(Protocol):
    """A named set of finite transforms.

    Attributes:
        name: Under which results are reported.
        complete: Whether the elements are all of a finite group, so that a mean over them has no error of sampling.
    """

    @property
    def name(self) -> str:
        """Under which results are reported."""

    @property
    def complete(self) -> bool:
        """Whether the elements are all of a group."""

    def __len__(self) -> int:
        """The number of elements."""

    def draw(self, indices: Sequence[int], size: tuple[int, ...], seed: int, resampling: Resampling) -> list[Element]:
        """The elements for images of the given running numbers and size, height and width."""
