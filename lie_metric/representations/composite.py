"""Representations made of others: several tensors as one, samples packed in one axis, and entries that do not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lie_metric.algebra import Generator
from lie_metric.representations.affine import Affine
from lie_metric.representations.grids import Invariant
from lie_metric.representations.protocol import Representation, transformed
from lie_metric.resampling import Resampling

__all__ = ["Masked", "Packed", "Parts", "rows_at_once", "samples"]


def samples(representation: Representation, tensor: Tensor) -> Iterator[Tensor]:
    """Each sample of a tensor by itself, with a batch axis of one.

    Args:
        representation: How the tensor is laid out. Without a method ``samples`` of its own the first axis counts.
        tensor: The tensor.

    Yields:
        The samples, which need not be of one size.

    Example:
        >>> from lie_metric.representations import Points
        >>> graphs = Packed(Points(2), torch.tensor([0, 0, 1]))
        >>> [tuple(one.shape) for one in samples(graphs, torch.zeros(3, 2))]
        [(1, 2, 2), (1, 1, 2)]
    """
    own = getattr(representation, "samples", None)
    yield from own(tensor) if callable(own) else (tensor[row : row + 1] for row in range(len(tensor)))


# Entries that are widened to float64 at a time: 8 MiB.
_AT_ONCE = 2**20


def rows_at_once(row: Tensor) -> int:
    """How many rows of a tensor are widened at a time: one after the other they take a call each, together memory.

    Args:
        row: One row.

    Returns:
        The number, at least one.

    Example:
        >>> rows_at_once(torch.zeros(1, 1000)), rows_at_once(torch.zeros(1, 3, 1024, 1024))
        (1048, 1)
    """
    return max(1, _AT_ONCE // max(1, row.numel()))


class _Wrapped:
    """What a representation around another takes from it."""

    of: Representation

    @property
    def dimension(self) -> int | None:
        """That of the other."""
        return getattr(self.of, "dimension", None)

    @property
    def charges(self) -> frozenset[str] | None:
        """Those of the other."""
        return getattr(self.of, "charges", None)


@dataclass(frozen=True, eq=False)
class Masked(_Wrapped):
    """Samples (B, N, ...) padded to one length: entries where the mask is False do not move and do not count.

    Args:
        of: How a sample moves.
        mask: Booleans (B, N), True for what is there; or the name of the part of the input that holds them.

    Example:
        >>> import torch, lie_metric as lm
        >>> from lie_metric.representations import Points
        >>> atoms = Masked(Points(3), torch.tensor([[True, False]]))
        >>> atoms.tangents(torch.ones(1, 2, 3), lm.generators("scale", dimension=3), lm.Resampling())[0, 0].tolist()
        [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """

    of: Representation
    mask: Tensor | str

    def _there(self, tensor: Tensor) -> Tensor:
        if isinstance(self.mask, str):
            raise TypeError(
                f"`mask` must be booleans here, got the name {self.mask!r}. Names are read from inputs and outputs "
                "with named parts: pass `input_representation={...}`."
            )
        return self.mask.to(tensor.device)

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts what the other does, with a mask of its first two axes.

        Raises:
            ValueError: If the mask is of other lengths.
        """
        there = self._there(tensor)
        if there.dtype != torch.bool or there.shape != tensor.shape[:2]:
            raise ValueError(
                f"`mask` must be booleans of shape {tuple(tensor.shape[:2])}, got {tuple(there.shape)} of "
                f"{there.dtype}. True marks the entries that are there."
            )
        self.of.check(tensor, name)

    def there(self, tensor: Tensor) -> Tensor:
        """The mask, with as many axes as the tensor."""
        found = self._there(tensor)
        return found.reshape(*found.shape, *[1] * (tensor.ndim - found.ndim))

    def _kept(self, moved: Tensor, else_: Tensor | None = None) -> Tensor:
        return torch.where(self.there(moved), moved, moved.new_zeros(()) if else_ is None else else_)

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, *tensor.shape); zero where nothing is."""
        moved = self.of.tangents(tensor, generators, resampling)
        return torch.stack([self._kept(each) for each in moved]) if len(moved) else moved

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor; what is not there stays."""
        # Numbers that stand for nothing need not have a place where the transform puts them.
        return self._kept(self.of.act(self._kept(tensor), generator, t, resampling), tensor)

    def transform(self, tensor: Tensor, maps: Tensor) -> Tensor:
        """The tensor after maps of space; what is not there stays."""
        return self._kept(transformed(self.of, tensor, maps), tensor)

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Those of the other: of one of the :meth:`samples` they hold what is there."""
        return _at_nodes(self.of, tensor)

    def samples(self, tensor: Tensor) -> Iterator[Tensor]:
        """What is there of each sample.

        Yields:
            The samples, (1, n, ...).
        """
        for row, there in zip(tensor, self._there(tensor), strict=True):
            yield row[there][None]


@dataclass(frozen=True, eq=False)
class Packed(_Wrapped):
    """The nodes (N, ...) of all graphs of a batch in one axis, as PyG keeps them.

    Args:
        of: How the nodes of one graph, (1, n, ...), move.
        batch: For each node the number of its graph, (N,), in ascending order; or the name of the part of the input
            that holds them.

    Example:
        >>> import torch, lie_metric as lm
        >>> from lie_metric.representations import Points
        >>> nodes = Packed(Points(2), torch.tensor([0, 0, 1]))
        >>> nodes.tangents(torch.zeros(3, 2), lm.generators("rotation"), lm.Resampling()).shape
        torch.Size([1, 3, 2])
    """

    of: Representation
    batch: Tensor | str

    def _sizes(self, tensor: Tensor) -> list[int]:
        if isinstance(self.batch, str):
            raise TypeError(
                f"`batch` must be the numbers of graphs here, got the name {self.batch!r}. Names are read from inputs "
                "with named parts: pass `input_representation={...}`."
            )
        if not isinstance(self.batch, Tensor) or self.batch.ndim != 1 or not self.batch.numel():
            got = tuple(self.batch.shape) if isinstance(self.batch, Tensor) else self.batch
            raise TypeError(
                f"`batch` must hold a number of graph for each node, got {got}. One graph alone needs none: pass "
                "`torch.zeros(nodes, dtype=torch.long)` as its batch, or collate graphs with nodes."
            )
        return torch.bincount(self.batch).tolist()

    @property
    def count(self) -> int:
        """How many graphs there are."""
        return len(self._sizes(torch.empty(0)))

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts the nodes of graphs in order.

        Raises:
            ValueError: If there is not one number for each node, or they do not ascend.
        """
        batch = self.batch if isinstance(self.batch, Tensor) and self.batch.numel() else torch.zeros(1)
        sizes = self._sizes(tensor) if int(batch.min()) >= 0 else []
        if batch.ndim != 1 or len(batch) != len(tensor) or bool((batch.diff() < 0).any()) or int(batch[0]) < 0:
            raise ValueError(
                f"`batch` must hold a number of graph for each of the {len(tensor)} nodes, ascending from 0, got shape "
                f"{tuple(batch.shape)}. That is what PyG's `Batch.batch` holds."
            )
        if 0 in sizes:
            raise ValueError(
                f"`batch` must hold graphs with nodes, got none of graph {sizes.index(0)}. Leave empty graphs out."
            )
        self.of.check(tensor[: sizes[0]][None], name)

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, N, ...)."""
        # What moves node by node needs no loop over graphs.
        graphs = [tensor[None]] if isinstance(self.of, Affine) else self.samples(tensor)
        moved = [self.of.tangents(one, generators, resampling) for one in graphs]
        return torch.cat([each[:, 0] for each in moved], dim=1)

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor; t is a number, or one for each graph."""
        graphs = list(self.samples(tensor))
        steps = torch.as_tensor(t, dtype=torch.float64).expand(len(graphs))
        moved = [self.of.act(one, generator, step, resampling) for one, step in zip(graphs, steps, strict=True)]
        return torch.cat([each[0] for each in moved])

    def transform(self, tensor: Tensor, maps: Tensor) -> Tensor:
        """The tensor after maps of space, one for all graphs or one for each."""
        graphs = list(self.samples(tensor))
        maps = maps.expand(len(graphs), *maps.shape[1:])
        return torch.cat([transformed(self.of, one, maps[k : k + 1])[0] for k, one in enumerate(graphs)])

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Those of one of the :meth:`samples`."""
        return _at_nodes(self.of, tensor)

    def samples(self, tensor: Tensor) -> Iterator[Tensor]:
        """The nodes of each graph.

        Yields:
            The graphs, (1, n, ...).
        """
        for nodes in tensor.split(self._sizes(tensor)):
            yield nodes[None]


def _at_nodes(representation: Representation, sample: Tensor) -> tuple[Tensor, ...]:
    """The blocks of a sample (1, n, ...) of like nodes: numbers on which nothing acts have a mean for each channel."""
    if isinstance(representation, Invariant):
        return (sample.reshape(1, sample.shape[1], -1),)
    return representation.components(sample)


@dataclass(frozen=True, eq=False)
class Parts:
    """Several tensors as one, row by row, each with an action of its own.

    Args:
        representations: How each part moves, by name.
        shapes: The shape of each part; the first number is that of rows unless the whole is one row.
        together: Whether the tensors are one row, because a batch is no axis of each.

    Example:
        >>> import torch, lie_metric as lm
        >>> from lie_metric.representations import Invariant, Points
        >>> two = Parts({"pos": Points(3), "charge": Invariant()}, ((2, 5, 3), (2, 5)))
        >>> whole = two.join([torch.rand(2, 5, 3), torch.rand(2, 5)])
        >>> whole.shape, [tuple(part.shape) for part in two.split(whole)]
        (torch.Size([2, 20]), [(2, 5, 3), (2, 5)])
    """

    representations: dict[str, Representation]
    shapes: tuple[tuple[int, ...], ...]
    together: bool = False
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.representations))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts as one tensor (rows, entries)."""
        return torch.cat([part.reshape(1 if self.together else len(part), -1) for part in parts], dim=1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The parts of a tensor (..., rows, entries), with its leading axes."""
        lead, shapes = tensor.shape[:-1], self.shapes
        if self.together:
            lead = tensor.shape[:-2]
            tensor = tensor.reshape(*lead, -1)
        else:
            shapes = tuple(shape[1:] for shape in shapes)
        sizes = [math.prod(shape) for shape in shapes]
        return [part.reshape(*lead, *shape) for part, shape in zip(tensor.split(sizes, dim=-1), shapes, strict=True)]

    @property
    def _each(self) -> tuple[Representation, ...]:
        return tuple(self.representations.values())

    @property
    def dimension(self) -> int | None:
        """That of the parts which have one."""
        return common_dimension(self.representations)

    @property
    def charges(self) -> frozenset[str] | None:
        """The charges that any part reads; None if one does not say."""
        read = [getattr(one, "charges", None) for one in self._each]
        return None if None in read else frozenset().union(*read)  # type: ignore[arg-type]

    def check(self, tensor: Tensor, name: str) -> None:
        """Checks each part."""
        for key, one, part in zip(self.names, self._each, self.split(tensor), strict=True):
            one.check(part, f"{name}[{key!r}]")

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, rows, entries)."""
        moved = [one.tangents(part, generators, resampling) for one, part in self._pairs(tensor)]
        joined = [self.join([part[k] for part in moved]) for k in range(len(generators))]
        return torch.stack(joined) if joined else tensor.new_zeros((0, *tensor.shape))

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The transformed tensor."""
        return self.join([one.act(part, generator, t, resampling) for one, part in self._pairs(tensor)])

    def transform(self, tensor: Tensor, maps: Tensor) -> Tensor:
        """The tensor after maps of space."""
        return self.join([transformed(one, part, maps) for one, part in self._pairs(tensor)])

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(block for one, part in self._pairs(tensor) for block in one.components(part))

    def _pairs(self, tensor: Tensor) -> Iterator[tuple[Representation, Tensor]]:
        return zip(self._each, self.split(tensor), strict=True)


def taken(representation: Representation, row: int) -> Representation:
    """How one row of a tensor moves by itself.

    Args:
        representation: How the tensor moves.
        row: The number of the row.

    Returns:
        The representation, with the row's own mask.

    Example:
        >>> from lie_metric.representations import Points
        >>> taken(Masked(Points(1), torch.eye(2).bool()), 1).mask.tolist()
        [[False, True]]
    """
    if isinstance(representation, Masked) and isinstance(representation.mask, Tensor):
        return Masked(representation.of, representation.mask[row : row + 1])
    if isinstance(representation, Parts):
        return Parts(
            {name: taken(one, row) for name, one in representation.representations.items()}, representation.shapes
        )
    return representation


def present(representation: Representation, tensor: Tensor) -> Tensor | None:
    """Which entries of a tensor are there; None for all.

    Args:
        representation: How it is laid out.
        tensor: The tensor.

    Returns:
        Booleans that broadcast with it.

    Example:
        >>> from lie_metric.representations import Points
        >>> present(Masked(Points(1), torch.tensor([[True, False]])), torch.zeros(1, 2, 1)).flatten().tolist()
        [True, False]
    """
    if isinstance(representation, Masked):
        return representation.there(tensor)
    if isinstance(representation, Parts):
        parts = list(zip(representation.representations.values(), representation.split(tensor), strict=True))
        if not any(isinstance(one, Masked) for one, _ in parts):
            return None
        found = [present(one, part) for one, part in parts]
        kept = [torch.ones_like(part, dtype=torch.bool) if one is None else one.expand_as(part)
                for one, (_, part) in zip(found, parts, strict=True)]  # fmt: skip
        return representation.join(kept)
    return None


def permuted(
    representation: Any, tensor: Tensor, orders: Callable[[int], Tensor | None], along: Sequence[str] = ()
) -> Tensor:
    """A tensor after its points were put in another order; what is not of points stays.

    Args:
        representation: How the tensor is laid out.
        tensor: The tensor, (B, ...).
        orders: From a number of points N to the orders (B, N); None if points of that number stay.
        along: Which of several named parts stand at the points; all of them if there is one.

    Returns:
        The tensor, of the same shape.

    Raises:
        TypeError: If it cannot be told what the points are.

    Example:
        >>> from lie_metric.representations import Points
        >>> flipped = lambda count: torch.arange(count).flip(0)[None]
        >>> permuted(Points(1), torch.tensor([[[1.0], [2.0]]]), flipped).flatten().tolist()
        [2.0, 1.0]
    """
    if isinstance(representation, Parts):
        moved = []
        for name, part in zip(representation.names, representation.split(tensor), strict=True):
            stays = name not in (along or representation.names)
            moved.append(part if stays else _reordered(part, orders))
        return representation.join(moved)
    if isinstance(representation, Invariant):
        return tensor
    if isinstance(representation, Affine) and tensor.ndim <= 1 + representation.axes:
        return tensor  # one for each sample
    if not isinstance(representation, Affine) or tensor.ndim != 2 + representation.axes:
        raise TypeError(
            f"`transforms` must not be permutations for {representation!r} of shape {tuple(tensor.shape)}, of which it "
            "is not known where its points are. Permute points (B, N, d), vectors at points, and what is one for each "
            "sample; clouds without padding."
        )
    return _reordered(tensor, orders)


def _reordered(tensor: Tensor, orders: Callable[[int], Tensor | None]) -> Tensor:
    order = orders(tensor.shape[1])
    return tensor if order is None else tensor[torch.arange(len(tensor), device=tensor.device)[:, None], order]


def common_dimension(representations: dict[str, Representation]) -> int | None:
    """The dimension of those representations that have one.

    Args:
        representations: By name.

    Returns:
        The dimension; None if none has one.

    Raises:
        ValueError: If they are several.

    Example:
        >>> from lie_metric.representations import Invariant, Points
        >>> common_dimension({"pos": Points(3), "energy": Invariant()})
        3
    """
    found = {name: getattr(one, "dimension", None) for name, one in representations.items()}
    kinds = {dimension for dimension in found.values() if dimension is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"`representations` must be of one dimension, got {found}. The same generators act on all parts: give "
            "matrices with as many rows to all, e.g. `Points(3)` and `Vectors(3)`."
        )
    return kinds.pop() if kinds else None
