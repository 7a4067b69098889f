"""Places in space, and what turns with them: boxes, vectors, gradients, velocities, tensors of a rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from lie_metric.algebra import (
    PERSPECTIVE,
    Generator,
    check_horizon,
    flow_rows,
    horizon,
    matrix_exponential,
    projective_step,
    refuse_perspective,
    velocity,
)
from lie_metric.representations.affine import Affine, without_step
from lie_metric.resampling import Resampling

__all__ = ["Boxes", "Covectors", "Points", "Tensors", "Vectors", "Velocities"]


def _parts(generator: Generator, owner: Affine) -> tuple[Tensor, Tensor]:
    """The square part of a generator's matrix and its last column."""
    remedy = "Measure places, as a part of their own: `Points(2)`, or of images `Points.of_image(height, width)`."
    refuse_perspective([generator], owner, remedy)
    width = generator.dimension + 1
    matrix = torch.tensor(generator.matrix, dtype=torch.float64).reshape(-1, width)
    return matrix[:, :-1], matrix[:, -1:]


@dataclass(frozen=True)
class Points(Affine):
    """Places (B, ..., d) in space: point clouds, atoms, keypoints. They move as the content of an image does.

    X · p = -(A p + b), with p in units of ``unit`` about ``origin``. For keypoints of an image in pixels these are half
    of its shorter side and its centre, see :meth:`of_image`; a translation of a point cloud is one of its own units.
    In the plane they read the charges of perspective: X · p = -(A p + b) + (w · p) p.

    Args:
        dimension: d.
        unit: The unit of length of the generators, in those of the tensor.
        origin: The place about which they turn, d numbers; the default is 0.

    Raises:
        ValueError: If the dimension or the unit is not positive, or the origin has other than d numbers.

    Example:
        >>> import torch, lie_metric as lm
        >>> rotation = lm.generators("rotation_z", dimension=3)
        >>> Points(3).tangents(torch.tensor([[1.0, 0, 0]]), rotation, lm.Resampling())[0, 0].abs().tolist()
        [0.0, 1.0, 0.0]
    """

    dimension: int
    unit: float = 1.0
    origin: tuple[float, ...] = ()
    _aligned: bool | None = field(default=None, init=False, repr=False)
    """Whether the unit is that of images with corners aligned; None of places that are in no image."""

    def __post_init__(self) -> None:
        _check_dimension(self.dimension)
        if not self.unit > 0 or math.isinf(self.unit):
            raise ValueError(f"`unit` must be a positive length, got {self.unit!r}. It is 1 for most point clouds.")
        origin = tuple(float(entry) for entry in self.origin) or (0.0,) * self.dimension
        if len(origin) != self.dimension:
            raise ValueError(f"`origin` must hold {self.dimension} numbers, got {self.origin!r}.")
        object.__setattr__(self, "origin", origin)

    @classmethod
    def of_image(cls, height: int, width: int, align_corners: bool = False) -> Points:
        """Keypoints (x, y) of images of a size, in pixels, with 0 at the centre of the first pixel.

        Args:
            height: Rows of pixels.
            width: Columns of pixels.
            align_corners: As of the :class:`~lie_metric.Resampling` by which the images move: True for
                :data:`lie_metric.PAPER`. It fixes the unit of length, half of the shorter side, which is from the
                centre of the first pixel to that of the last then.

        Returns:
            The representation: it moves points as the generators move the image's content. Together with a stencil
            of the other kind it is refused.

        Example:
            >>> Points.of_image(4, 8)
            Points(dimension=2, unit=2.0, origin=(3.5, 1.5))
        """
        made = cls(2, (min(height, width) - int(align_corners)) / 2, ((width - 1) / 2, (height - 1) / 2))
        object.__setattr__(made, "_aligned", bool(align_corners))
        return made

    def _check_unit(self, resampling: Resampling) -> None:
        """Refuses keypoints that a stencil would move in another unit of length than the image."""
        if self._aligned is None or self._aligned == resampling.align_corners:
            return
        width, height = (int(2 * centre + 1) for centre in self.origin)
        kind = f"{type(self).__name__}.of_image({height}, {width}"
        raise ValueError(
            f"`resampling` must have the unit of length of the places, got {resampling} for `{kind}, "
            f"align_corners={self._aligned})`, whose unit is {self.unit:g} pixels. Pass `{kind}, "
            f"align_corners={resampling.align_corners})`."
        )

    @property
    def charges(self) -> frozenset[str]:  # type: ignore[override]
        """In the plane perspectives."""
        return frozenset(PERSPECTIVE) if self.dimension == 2 else frozenset()

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, *tensor.shape).

        Raises:
            ValueError: If the places are those of an image, and the stencil moves images in another unit of length.
        """
        self._check_unit(resampling)
        if not any(horizon(generator) for generator in generators):
            return super().tangents(tensor, generators, resampling)
        ones = torch.nn.functional.pad(tensor, (0, 1), value=1.0)
        found = []
        for generator in generators:
            if horizon(generator):
                found.append(-velocity(self._homogeneous(generator).to(tensor), ones))
            else:
                found.append(super().tangents(tensor, [generator], resampling)[0])
        return torch.stack(found)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor, by the exponential of the action; t is a number, or one for each of B.

        Raises:
            ValueError: If a point is on the horizon of a projective map or beyond it; or if the places are those of an
                image, and the stencil moves images in another unit of length.
        """
        self._check_unit(resampling)
        if not horizon(generator):
            return super().act(tensor, generator, t, resampling)
        steps = -torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1)
        maps = matrix_exponential(steps * self._homogeneous(generator)).to(tensor)[:, None]
        points = torch.nn.functional.pad(tensor.reshape(len(tensor), -1, self.dimension), (0, 1), value=1.0)
        last = (maps[..., -1, :] * points).sum(-1)
        check_horizon(last, f"the points of {self!r}", "Take a smaller t, or leave out points far from the origin.")
        step = projective_step(maps - torch.eye(maps.shape[-1]).to(maps), points)
        return (points[..., :-1] + step).reshape(tensor.shape)

    def _homogeneous(self, generator: Generator) -> Tensor:
        """M of a projective generator in the tensor's units and about its origin, float64."""
        units = torch.eye(self.dimension + 1, dtype=torch.float64)
        units[:-1] *= self.unit
        units[:-1, -1] = torch.tensor(self.origin, dtype=torch.float64)
        return units @ torch.tensor(flow_rows(generator), dtype=torch.float64) @ torch.linalg.inv(units)

    def matrix(self, generator: Generator) -> Tensor:
        """A, in the tensor's units and about its origin."""
        square, step = _parts(generator, self)
        about = torch.tensor(self.origin, dtype=torch.float64)[:, None]
        return torch.cat([square, self.unit * step - square @ about], dim=1)

    def element(self, maps: Tensor) -> Tensor:
        """The maps, in the tensor's units and about its origin."""
        about = torch.tensor(self.origin, dtype=maps.dtype, device=maps.device)[:, None]
        square, step = maps[..., :-1], maps[..., -1:]
        return torch.cat([square, self.unit * step + about - square @ about], dim=-1)

    def invariants(self) -> Tensor:
        """All directions: spreads are about the centre of all points."""
        return torch.eye(self.dimension, dtype=torch.float64)


@dataclass(frozen=True)
class Boxes(Points):
    """Boxes (B, ..., 2 d) with axes parallel to those of space, as (x1, y1, x2, y2): two opposite corners.

    Generators that would turn or slant a box are refused: there is no box afterwards.

    Example:
        >>> import torch, lie_metric as lm
        >>> larger = lm.generators("scale")[0]
        >>> Boxes(2).act(torch.tensor([[-1.0, -1, 1, 1]]), larger, 0.5, lm.Resampling())[0, 2].exp().item() > 5
        True
    """

    @property
    def size(self) -> int:
        """Twice the dimension."""
        return 2 * self.dimension

    @property
    def charges(self) -> frozenset[str]:  # type: ignore[override]
        """None: a perspective slants the sides."""
        return frozenset()

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, *tensor.shape)."""
        self._check_unit(resampling)
        return Affine.tangents(self, tensor, generators, resampling)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor, by the exponential of the action; t is a number, or one for each of B."""
        self._check_unit(resampling)
        return Affine.act(self, tensor, generator, t, resampling)

    def matrix(self, generator: Generator) -> Tensor:
        """A for each corner.

        Raises:
            ValueError: If the generator does not keep axes parallel.
        """
        refuse_perspective([generator], self, "Measure the corners as `Points`.")
        one = super().matrix(generator)
        if bool((one[:, :-1] - one[:, :-1].diagonal().diag()).any()):
            raise ValueError(
                f"`generators` must keep the sides of boxes parallel to the axes, got {generator.name!r}, after which "
                "a box is none. Choose translations, scale and stretches, or measure the corners as `Points`."
            )
        return _twice(one)

    def element(self, maps: Tensor) -> Tensor:
        """The maps for each corner.

        Raises:
            ValueError: If a map does not keep axes parallel.
        """
        square = maps[..., :-1]
        if bool((square - torch.diag_embed(square.diagonal(dim1=-2, dim2=-1))).any()):
            raise ValueError("`maps` must keep the sides of boxes parallel to the axes. Measure corners as `Points`.")
        return _twice(super().element(maps))

    def invariants(self) -> Tensor:
        """All directions."""
        return torch.eye(self.size, dtype=torch.float64)


def _twice(one: Tensor) -> Tensor:
    none = torch.zeros_like(one[..., :-1])
    square, step = one[..., :-1], one[..., -1:]
    upper, lower = torch.cat([square, none, step], dim=-1), torch.cat([none, square, step], dim=-1)
    return torch.cat([upper, lower], dim=-2)


@dataclass(frozen=True)
class Vectors(Affine):
    """Differences of places (B, ..., d), such as displacements, dipoles and cell vectors: X · v = -A v, no step.

    Forces are vectors for rotations; under scale and shear a gradient is one of :class:`Covectors`.

    Args:
        dimension: d.

    Example:
        >>> import torch, lie_metric as lm
        >>> moving = lm.generators("translation_x", dimension=3)
        >>> bool(Vectors(3).tangents(torch.ones(1, 5, 3), moving, lm.Resampling()).any())
        False
    """

    dimension: int

    def __post_init__(self) -> None:
        _check_dimension(self.dimension)

    def matrix(self, generator: Generator) -> Tensor:
        """A without its step."""
        return without_step(_parts(generator, self)[0])

    def element(self, maps: Tensor) -> Tensor:
        """The maps without their steps."""
        return without_step(maps[..., :-1])


@dataclass(frozen=True)
class Covectors(Vectors):
    """Gradients and momenta (B, ..., d): X · c = Aᵀ c, so that c · v stays as it is for vectors v.

    Example:
        >>> import torch, lie_metric as lm
        >>> scale, c = lm.generators("scale", dimension=3), torch.ones(1, 3)
        >>> [round(kind(3).act(c, scale[0], 0.5, lm.Resampling())[0, 0].item(), 4) for kind in (Vectors, Covectors)]
        [1.6487, 0.6065]
    """

    def matrix(self, generator: Generator) -> Tensor:
        """-Aᵀ without a step."""
        return without_step(-_parts(generator, self)[0].mT)

    def element(self, maps: Tensor) -> Tensor:
        """The inverse transposes of the maps."""
        return without_step(torch.linalg.inv(maps[..., :-1]).mT)


@dataclass(frozen=True)
class Velocities(Vectors):
    """Velocities (B, ..., d): vectors to which the boosts b of the Galilean group are added, X · v = -(A v + b).

    Example:
        >>> import torch, lie_metric as lm
        >>> boost = lm.generators("boost_x", dimension=2)
        >>> Velocities(2).tangents(torch.zeros(1, 2), boost, lm.Resampling())[0, 0].tolist()
        [-1.0, 0.0]
    """

    @property
    def charges(self) -> frozenset[str]:  # type: ignore[override]
        """The boosts along the axes."""
        return frozenset(f"boost_{axis}" for axis in "xyz"[: self.dimension])

    def matrix(self, generator: Generator) -> Tensor:
        """A, with the boost for its step."""
        boost = [generator.charges.get(f"boost_{axis}", 0.0) for axis in "xyz"[: self.dimension]]
        boost += [0.0] * (self.dimension - len(boost))
        return torch.cat([_parts(generator, self)[0], torch.tensor(boost, dtype=torch.float64)[:, None]], dim=1)


@dataclass(frozen=True)
class Tensors(Affine):
    """Tensors of a rank (B, ..., d, ..., d), each of whose last axes moves as a vector: stress, polarisability.

    Args:
        dimension: d.
        rank: How many axes; 0 for scalars, 1 for vectors.

    Example:
        >>> import torch, lie_metric as lm
        >>> turning = lm.generators("rotation", dimension=3)
        >>> bool(Tensors(3, 2).tangents(torch.eye(3)[None], turning, lm.Resampling()).any())  # isotropic
        False
    """

    dimension: int
    rank: int = 2

    def __post_init__(self) -> None:
        _check_dimension(self.dimension)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 0 <= self.rank <= 4:
            raise ValueError(f"`rank` must be an integer from 0 to 4, got {self.rank!r}. A matrix has rank 2.")

    @property
    def axes(self) -> int:  # type: ignore[override]
        """The rank."""
        return self.rank

    @property
    def size(self) -> int:
        """How many entries a tensor has."""
        return self.dimension**self.rank

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts (B, ..., d, ..., d).

        Raises:
            ValueError: If the last axes are of other lengths, there is no batch axis, or the tensor is empty.
        """
        wanted = (self.dimension,) * self.rank
        if tensor.ndim <= self.rank or tuple(tensor.shape[tensor.ndim - self.rank :]) != wanted or not tensor.numel():
            raise ValueError(
                f"`{name}` must be non-empty with axes {('B', '...', *wanted)} to move as {self!r}, got shape "
                f"{tuple(tensor.shape)}. Reshape it, or give the representation that fits."
            )

    def matrix(self, generator: Generator) -> Tensor:
        """The sum of A over the axes."""
        square = _parts(generator, self)[0]
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        for axis in range(self.rank):
            before, after = (torch.eye(self.dimension**n, dtype=torch.float64) for n in (axis, self.rank - 1 - axis))
            total = total + torch.kron(torch.kron(before, square), after)
        return without_step(total)

    def element(self, maps: Tensor) -> Tensor:
        """The products of the maps over the axes."""
        total = torch.ones(*maps.shape[:-2], 1, 1, dtype=maps.dtype, device=maps.device)
        for _ in range(self.rank):
            total = torch.einsum("...ij,...kl->...ikjl", total, maps[..., :-1]).flatten(-2).flatten(-3, -2)
        return without_step(total)

    def invariants(self) -> Tensor:
        """What all rotations and reflections leave: of matrices, the trace."""
        return _isotropic(self.dimension, self.rank)


@lru_cache(maxsize=32)
def _isotropic(dimension: int, rank: int) -> Tensor:
    kind = Tensors(dimension, rank)
    turns = []
    for i in range(dimension):
        for j in range(i):
            rows = torch.zeros(dimension, dimension + 1)
            rows[i, j], rows[j, i] = 1, -1
            turns.append(kind.matrix(Generator.affine("turn", rows))[:, :-1])
    mirror = torch.eye(dimension, dimension + 1, dtype=torch.float64)
    mirror[0, 0] = -1
    mirrored = kind.element(mirror)[:, :-1] - torch.eye(kind.size, dtype=torch.float64)
    _, values, rows = torch.linalg.svd(torch.cat([*turns, mirrored]))
    return rows[torch.nn.functional.pad(values, (0, len(rows) - len(values))) < 1e-9]


def _check_dimension(dimension: object) -> None:
    if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1:
        raise ValueError(f"`dimension` must be a positive integer, got {dimension!r}. Points in space have 3.")
