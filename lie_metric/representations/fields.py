"""Fields of scalars, vectors or tensors on grids of one, two or three dimensions, images among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lie_metric import transforms
from lie_metric.algebra import PERSPECTIVE, Generator, refuse_perspective
from lie_metric.representations.protocol import Representation, check_axes, transformed
from lie_metric.resampling import Resampling, coordinate_dtype, working_precision

__all__ = ["Field", "Image", "Mapped"]


class Mapped:
    """The finite action of a generator, for every layout that says where its images are."""

    dimension: int | None = 2
    charges: frozenset[str] = frozenset({"intensity", *PERSPECTIVE})

    def map(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The tensor with a function applied to its images."""
        raise NotImplementedError

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor, of the same shape; what stands on no grid stays.

        Raises:
            ValueError: If the generator is of another dimension.
        """
        self._check_generators([generator])
        return self.map(tensor, lambda image: transforms.apply(image, generator, t, resampling))

    def _check_generators(self, generators: Sequence[Generator]) -> None:
        if getattr(self, "fibre", None) is not None:
            refuse_perspective(generators, self, "Measure scalars made of it, such as its norm at every place.")
        for generator in generators:
            if self.dimension not in {None, generator.dimension}:
                raise ValueError(
                    f"`generators` must be of dimension {self.dimension} to move {self!r}, got {generator.name!r} with "
                    f"a matrix of {generator.dimension} rows. Take them by name, `generators(..., "
                    f"dimension={self.dimension})`, or give a `Field({generator.dimension})`."
                )


@dataclass(frozen=True)
class Field(Mapped):
    r"""Fields (B, C, *grid) of one, two or three dimensions: signals (B, C, T), images, volumes (B, C, D, H, W).

    Each channel is a scalar field, moved by the transform. With a fibre, channels that belong together also turn at
    their place, as a vector does:

    .. math:: X \cdot f = \nabla f \cdot A \tilde p + s f + X \cdot_{\text{fibre}} f

    Scalars in the plane also move by projective generators, under which a fibre would turn at every place otherwise.

    Convention:
        x runs along the last axis, y along the one before, z along the one before that, and components of vectors are
        in the order x, y, z. The unit of length is half of the shortest side, the origin the centre of the grid.

    Args:
        dimension: How many axes the grid has: 1, 2 or 3.
        spacing: Distances between samples along x, y, z, the last axis first, where they differ: volumes (B, C, D, H,
            W) with slices 3 mm apart and pixels of 1 mm have ``(1, 1, 3)``. The shortest side is then the shortest in
            these, and rotations turn in physical space. Components of a fibre are along the axes, in lengths of
            physical space.
        fibre: How the n numbers at one place move, e.g. ``Vectors(2)`` for flow fields, ``Covectors(2)`` for gradients,
            ``Tensors(3, 2)``, ``Irreps("1x0e+1x1o")``; channels are any number of times n. None for scalars.

    Raises:
        ValueError: If the dimension is another, the spacing does not fit it, or the fibre is of another dimension.
        TypeError: If the fibre does not say how many numbers move together.

    Example:
        >>> import torch, lie_metric as lm
        >>> from lie_metric.representations import Vectors
        >>> turning = lm.generators("rotation_z", dimension=3)
        >>> Field(3).tangents(torch.rand(2, 1, 6, 6, 6), turning, lm.Resampling()).shape
        torch.Size([1, 2, 1, 6, 6, 6])
        >>> right = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 4, 4)  # everywhere the same vector
        >>> flow = Field(2, fibre=Vectors(2))
        >>> flow.tangents(right, lm.generators("rotation"), lm.Resampling())[0, 0, :, 0, 0].tolist()
        [0.0, 1.0]
    """

    dimension: int = field()
    spacing: tuple[float, ...] = ()
    fibre: Representation | None = None

    def __post_init__(self) -> None:
        if isinstance(self.dimension, bool) or self.dimension not in {1, 2, 3}:
            raise ValueError(
                f"`dimension` must be 1 for signals, 2 for images or 3 for volumes, got {self.dimension!r}."
            )
        transforms.check_spacing(self.spacing, self.dimension)
        object.__setattr__(self, "spacing", tuple(float(step) for step in self.spacing))
        if self.fibre is None:
            return
        size, own = getattr(self.fibre, "size", None), getattr(self.fibre, "dimension", None)
        if not isinstance(size, int) or not isinstance(self.fibre, Representation):
            raise TypeError(
                f"`fibre` must be a representation with a `size`, the number of channels that move together, got "
                f"{self.fibre!r}. Pass e.g. `Vectors({self.dimension})` or `Covectors({self.dimension})`, or None for "
                "scalars."
            )
        if own not in {None, self.dimension}:
            raise ValueError(
                f"`fibre` must be of dimension {self.dimension}, that of the field, got {self.fibre!r} of dimension "
                f"{own}. The same generators move places and what is there."
            )

    @property
    def charges(self) -> frozenset[str]:  # type: ignore[override]
        """Intensities, perspectives of scalars in the plane, and what the fibre reads."""
        if self.fibre is None:
            return Mapped.charges if self.dimension == 2 else frozenset({"intensity"})
        return frozenset({"intensity"}) | (getattr(self.fibre, "charges", None) or frozenset())

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts (B, C, *grid).

        Raises:
            ValueError: If the tensor has another number of axes or is empty, or its channels are no multiple of the
                fibre's size.
        """
        other = _AXES.get(tensor.ndim - 2)
        if other and tensor.ndim != self.dimension + 2:
            raise ValueError(
                f"`{name}` must be non-empty with axes (B, C, {_AXES[self.dimension]}) to move as {self!r}, got shape "
                f"{tuple(tensor.shape)}. Pass `lie_metric.representations.Field({tensor.ndim - 2})` if they are "
                f"(B, C, {other}), or another representation that fits."
            )
        check_axes(tensor, name, f"(B, C, {_AXES[self.dimension]})", self.dimension + 2)
        size = getattr(self.fibre, "size", 1)
        if tensor.shape[1] % size:
            raise ValueError(
                f"`{name}` must have a multiple of {size} channels for {self!r}, got shape {tuple(tensor.shape)}. "
                f"Select those that move together, or give the fibre that fits."
            )

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, B, C, *grid).

        Raises:
            ValueError: If a generator is of another dimension.
        """
        self._check_generators(generators)
        if self.fibre is None or not generators:
            return transforms.tangents(tensor, generators, resampling, spacing=self.spacing)
        wide = working_precision(tensor)
        moved = transforms.tangents(wide, generators, resampling, spacing=self.spacing)
        turned = self.fibre.tangents(self._places(wide), generators, resampling)
        return (moved + torch.stack([self._channels(each, wide) for each in turned])).to(tensor.dtype)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor: read at other places, and turned there.

        Raises:
            ValueError: If the generator is of another dimension.
        """
        self._check_generators([generator])

        def apply(image: Tensor) -> Tensor:
            return transforms.apply(image, generator, t, resampling, spacing=self.spacing)

        if self.fibre is None:
            return self.map(tensor, apply)
        moved = self.map(working_precision(tensor), apply)
        return self._channels(self.fibre.act(self._places(moved), generator, t, resampling), moved).to(tensor.dtype)

    def transform(self, tensor: Tensor, maps: Tensor) -> Tensor:
        """The tensor after maps of space, by the usual stencil. Maps of samples to samples interpolate nothing.

        Args:
            tensor: The tensor, (B, C, *grid).
            maps: Where points go, shape (B or 1, d, d + 1): a matrix and a step in units of the grid.

        Returns:
            The tensor, of the same shape.
        """
        wide = maps.to(tensor.device, coordinate_dtype(tensor.device))
        back = torch.linalg.inv(wide[..., :-1])
        back = torch.cat([back, -back @ wide[..., -1:]], dim=-1)
        return self.turned(transforms.move(tensor, back, Resampling(), self.spacing), maps)

    def turned(self, tensor: Tensor, maps: Tensor) -> Tensor:
        """What stands at each place after maps of space, the places left as they are.

        Args:
            tensor: The tensor, (B, C, *grid).
            maps: As in :meth:`transform`.

        Returns:
            The tensor, of the same shape.
        """
        if self.fibre is None:
            return tensor
        return self._channels(transformed(self.fibre, self._places(tensor), maps), tensor)

    def map(self, tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The function of the field."""
        return function(tensor)

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One block (B, places, C) of scalars; of a fibre its own blocks, for each group of channels."""
        if self.fibre is None:
            return (tensor.flatten(2).mT,)
        groups = self._places(tensor).unbind(1)
        return tuple(block for group in groups for block in self.fibre.components(group))

    def _places(self, tensor: Tensor) -> Tensor:
        """Channels that move together at the end: shape (B, groups, *grid, ...), as the fibre takes them."""
        size, axes = getattr(self.fibre, "size", 1), getattr(self.fibre, "axes", 1)
        last = tensor.unflatten(1, (-1, size)).movedim(2, -1)
        return last if axes == 1 else last.reshape(*last.shape[:-1], *[self.dimension] * axes)

    def _channels(self, places: Tensor, tensor: Tensor) -> Tensor:
        """The tensor of what the fibre gives."""
        last = places.reshape(*places.shape[: 2 + self.dimension], -1)
        return last.movedim(-1, 2).reshape(tensor.shape)


_AXES = {1: "T", 2: "H, W", 3: "D, H, W"}


@dataclass(frozen=True, init=False, repr=False)
class Image(Field):
    """Images or feature maps (B, C, H, W); every channel is a scalar field, moved by the transform.

    Example:
        >>> import torch, lie_metric as lm
        >>> Image().tangents(torch.rand(2, 3, 8, 8), lm.generators("rotation"), lm.Resampling()).shape
        torch.Size([1, 2, 3, 8, 8])
    """

    def __init__(self) -> None:
        super().__init__(2)

    def __repr__(self) -> str:
        return "Image()"
