"""Inputs and outputs of several named parts as one tensor each: the only place that knows mappings and attributes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lie_metric.algebra import PERSPECTIVE, Generator
from lie_metric.algebra import generators as resolve
from lie_metric.calling import call_of, select_output
from lie_metric.holders import entry, held, recast, replaced, tensor_of, tensors
from lie_metric.measured import carried, validate_inputs
from lie_metric.options import Function, Layout, Options, Output
from lie_metric.representations import Image, Invariant, Representation
from lie_metric.representations.composite import Masked, Packed, Parts, common_dimension, rows_at_once, samples

__all__ = [
    "Bound",
    "Generators",
    "bind",
    "bind_rows",
    "by_sample",
    "by_samples",
    "count_samples",
    "moved_parts",
    "off_grid",
    "on_grid",
    "resolve_for",
    "sample_count",
    "split_parts",
    "unnamed_parts",
]

Generators = str | Generator | Sequence[str | Generator]


@dataclasses.dataclass
class Bound:
    """A measurement of a function of one tensor, whatever a model takes and returns.

    Attributes:
        inputs: The moved parts of the inputs as one tensor.
        carrier: How it moves.
        function: What of the model is run, from the model and that tensor.
        output: From what the model returns to the measured tensor.
        given: How the inputs were said to move; None for images that were not said to be.
    """

    inputs: Tensor
    carrier: Representation
    function: Function | None
    output: Output
    given: Representation | None
    _declared: Representation | dict[str, Representation] | None = None
    _shapes: list[tuple[int, ...]] | None = None

    def carried(self, f: Tensor, model: object) -> Representation:
        """How the output carries the action.

        Args:
            f: The output.
            model: The model.

        Returns:
            Its representation; of outputs with named parts :class:`~lie_metric.representations.composite.Parts`.

        Raises:
            ValueError: If a part does not fit its representation.
        """
        if self._shapes is None:
            plain = cast("Representation | None", self._declared)
            return carried(f, self.inputs, model, plain, self.given)
        declared = cast("dict[str, Representation]", self._declared)
        together = isinstance(self.carrier, Parts) and self.carrier.together
        found = Parts(declared, tuple(self._shapes), together)
        found.check(f, "output")
        return found


def bind(model: Any, inputs: Any, options: Options) -> Bound:
    """Makes one tensor of the moved parts of inputs, and of the measured parts of outputs, and checks both.

    Args:
        model: The model.
        inputs: A tensor; or what holds several: a mapping, a tuple or list (the model's positional arguments), or an
            object with attributes, which the model takes as it is.
        options: How inputs and outputs move, and what of the model is run. A mapping from the names of parts to their
            representations leaves all other parts as they are. A name is a key, an index of a tuple, or an attribute,
            dotted where it is deeper.

    Returns:
        The measurement.

    Raises:
        KeyError: If there is no part of a name.
        TypeError: If a part is no tensor.
        ValueError: If a part does not fit its representation.

    Example:
        >>> from lie_metric.representations import Points
        >>> distance = lambda a, b: (a - b).norm(dim=-1)
        >>> pair = (torch.zeros(4, 3), torch.ones(4, 3))
        >>> bound = bind(distance, pair, Options(input_representation={"0": Points(3), "1": Points(3)}))
        >>> bound.inputs.shape, bound.function(distance, bound.inputs).shape
        (torch.Size([4, 6]), torch.Size([4]))
    """
    input_representation, output_representation = options.input_representation, options.output_representation
    output, function = options.output, options.function
    if not isinstance(input_representation, Mapping):
        if isinstance(input_representation, Packed):
            raise TypeError(
                "`input_representation` must name the part that is packed, got `Packed` alone. The model needs to know "
                "the graphs too: pass e.g. {'pos': Packed(Points(3), 'batch')} with a batch that holds both."
            )
        validate_inputs(model, inputs, input_representation, function)
        bound = Bound(inputs, input_representation or Image(), function, output, input_representation)
        if isinstance(output_representation, Mapping):
            _bind_output(bound, output_representation, inputs, output)
        else:
            bound._declared = output_representation
        return bound
    if not input_representation:
        raise ValueError("`input_representation` must name at least one part, got none. Pass e.g. {'pos': Points(3)}.")
    parts = {key: tensor_of(inputs, key) for key in input_representation}
    layouts = {key: _named(one, inputs) for key, one in input_representation.items()}
    common_dimension(layouts)
    for key, part in parts.items():
        layouts[key].check(part, f"inputs[{key!r}]")
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"`inputs[{key!r}]` must be finite, got NaN or infinite entries.")
    lengths = {key: len(part) for key, part in parts.items()}
    together = any(isinstance(one, Packed) for one in layouts.values())
    if not together and len(set(lengths.values())) > 1:
        raise ValueError(
            f"`inputs` must have parts with one batch axis, got lengths {lengths}. Give what is the same for all "
            "samples an axis of B, or pack nodes with `Packed(..., 'batch')`."
        )
    carrier = Parts(layouts, tuple(tuple(part.shape) for part in parts.values()), together)
    whole = carrier.join(list(parts.values()))
    arguments = len(inputs) if isinstance(inputs, (tuple, list)) else 1
    run = call_of(model, function, arguments)
    # A model that takes gradients itself cannot use tensors of inference mode, as loaders make them there.
    unusable = any(one.is_inference() for one in tensors(inputs))

    def rebuilt(tensor: Tensor) -> tuple[Any, ...]:
        found = inputs if tensor.dtype == whole.dtype and not unusable else recast(inputs, tensor.dtype)
        for key, part in zip(parts, carrier.split(tensor), strict=True):
            found = replaced(found, key.split("."), part)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    def called(owner: Any, tensor: Tensor) -> Any:
        return run(*rebuilt(tensor))

    bound = Bound(whole, carrier, called, output, carrier)
    if output_representation is None and not together:
        return bound
    declared = output_representation if isinstance(output_representation, Mapping) else {"": output_representation}
    _bind_output(bound, cast("Mapping[str, Representation | None]", declared), inputs, output)
    return bound


def bind_rows(model: Any, inputs: Any, options: Options) -> Bound:
    """As :func:`bind`, for measures that take samples row by row and measure one output.

    Args:
        model: As in :func:`bind`.
        inputs: As in :func:`bind`.
        options: As in :func:`bind`.

    Returns:
        The measurement.

    Raises:
        TypeError: If samples are packed in one axis, or the output has named parts.
    """
    bound = bind(model, inputs, dataclasses.replace(options, output_representation=options.whole_output))
    if isinstance(bound.carrier, Parts) and bound.carrier.together:
        raise TypeError(
            "`input_representation` must have a batch axis for this measure, got `Packed`. Measure Lie derivatives of "
            "graphs, or pad their nodes and give `Masked`."
        )
    return bound


def _bind_output(bound: Bound, asked: Mapping[str, Representation | None], inputs: Any, output: Output) -> None:
    """Makes one tensor of the asked parts of what the model returns."""
    if not asked:
        raise ValueError("`output_representation` must name at least one part, got none.")
    if output == "probabilities" and set(asked) != {""}:
        raise ValueError("`output` must not be 'probabilities' for outputs with named parts. Pass a callable.")
    layouts: dict[str, Representation] = {}

    def joined(returned: Any) -> Tensor:
        if set(asked) == {""}:
            parts = {"": select_output(returned, output)}
        else:
            whole = output(returned) if callable(output) else returned
            parts = {key: tensor_of(whole, key, "output") for key in asked}
        together = isinstance(bound.carrier, Parts) and bound.carrier.together
        for key, part in parts.items():
            one = asked[key]
            layouts[key] = _inferred(part) if one is None else _named(one, inputs)
        bound._shapes = [tuple(part.shape) for part in parts.values()]
        dtype = next(iter(parts.values())).dtype
        for part in parts.values():
            dtype = torch.promote_types(dtype, part.dtype)
        return Parts(layouts, tuple(bound._shapes), together).join([part.to(dtype) for part in parts.values()])

    bound.output, bound._declared, bound._shapes = joined, layouts, []


def _inferred(part: Tensor) -> Representation:
    if part.ndim == 1 or (part.ndim == 2 and part.shape[1] == 1):
        return Invariant()
    raise ValueError(
        f"`output_representation` must be given for an output of shape {tuple(part.shape)} of inputs with named parts: "
        "how it moves cannot be told. Pass e.g. `Invariant()`, `Vectors(3)`, or `Packed(Vectors(3), 'batch')` for a "
        "vector at each node."
    )


def split_parts(representation: Representation, tensor: Tensor) -> list[tuple[str, Representation, Tensor]]:
    """The measured parts of an output or of what has its shape, with leading axes.

    Args:
        representation: How the output moves.
        tensor: Shape (..., *output.shape).

    Returns:
        Name, representation and tensor of each; a single one without a name for an output of one part.

    Example:
        >>> split_parts(Invariant(), torch.zeros(2, 5))[0][:2]
        ('', Invariant())
    """
    if not isinstance(representation, Parts):
        return [("", representation, tensor)]
    split = representation.split(tensor)
    return list(zip(representation.names, representation.representations.values(), split, strict=True))


def by_sample(representation: Representation, stacked: Tensor) -> Iterator[Tensor]:
    """What each sample has of several tensors of one layout.

    Args:
        representation: The layout.
        stacked: Shape (K, *tensor.shape).

    Yields:
        For each sample a tensor (K, entries); the numbers of entries may differ.

    Example:
        >>> [tuple(one.shape) for one in by_sample(Image(), torch.zeros(3, 2, 1, 4, 4))]
        [(3, 16), (3, 16)]
    """
    if isinstance(representation, Parts):
        parts = split_parts(representation, stacked)
        for each in zip(*(by_sample(one, part) for _, one, part in parts), strict=True):
            yield torch.cat(each, dim=1)
    elif callable(getattr(representation, "samples", None)):
        for each in zip(*(samples(representation, one) for one in stacked), strict=True):
            yield torch.stack([one.flatten() for one in each])
    else:
        for row in range(stacked.shape[1]):
            yield stacked[:, row].reshape(len(stacked), -1)


def by_samples(representation: Representation, stacked: Tensor) -> Iterator[Tensor]:
    """As :func:`by_sample`, several samples at a time where they are of one size.

    Args:
        representation: The layout.
        stacked: Shape (K, *tensor.shape).

    Yields:
        Tensors (samples, K, entries) of samples that follow one another, of some millions of entries at most.

    Example:
        >>> [tuple(one.shape) for one in by_samples(Image(), torch.zeros(3, 2, 1, 4, 4))]
        [(2, 3, 16)]
    """
    if isinstance(representation, Parts) or callable(getattr(representation, "samples", None)):
        yield from (one[None] for one in by_sample(representation, stacked))
    else:
        for some in stacked.split(rows_at_once(stacked[:, :1]), dim=1):
            yield some.reshape(*some.shape[:2], math.prod(some.shape[2:])).transpose(0, 1)


def sample_count(inputs: Any, representation: Layout | None) -> int:
    """How many samples inputs hold, before they are bound; 0 where that cannot be told.

    Args:
        inputs: As in :func:`bind`.
        representation: As in :func:`bind`.

    Returns:
        The number.

    Example:
        >>> from lie_metric.representations import Points
        >>> sample_count({"pos": torch.zeros(5, 3), "batch": torch.tensor([0, 0, 1, 1, 1])},
        ...     {"pos": Packed(Points(3), "batch")})
        2
    """
    if not isinstance(representation, Mapping):
        return len(inputs) if isinstance(inputs, Tensor) and inputs.ndim else 0
    for key, one in representation.items():
        return count_samples(_named(one, inputs), tensor_of(inputs, key))
    return 0


def moved_parts(inputs: Any, representation: Layout | None) -> dict[str, Tensor]:
    """The tensors of inputs that move, by name; a single one has none.

    Args:
        inputs: As in :func:`bind`.
        representation: As in :func:`bind`.

    Returns:
        The tensors.

    Example:
        >>> from lie_metric.representations import Points
        >>> list(moved_parts({"pos": torch.zeros(5, 3), "z": torch.zeros(5)}, {"pos": Points(3)}))
        ['pos']
    """
    if not isinstance(representation, Mapping):
        return {"": inputs} if isinstance(inputs, Tensor) else {}
    return {key: tensor_of(inputs, key) for key in representation}


def count_samples(representation: Representation, tensor: Tensor) -> int:
    """How many samples a tensor holds.

    Args:
        representation: Its layout.
        tensor: The tensor.

    Returns:
        The number.

    Example:
        >>> count_samples(Image(), torch.zeros(3, 1, 4, 4))
        3
    """
    own = getattr(representation, "count", None)
    return len(tensor) if own is None else int(own)


def unnamed_parts(inputs: Any, representation: Layout | None) -> dict[str, Tensor]:
    """The tensors that a batch holds beside the parts that are named.

    Args:
        inputs: As in :func:`bind`.
        representation: As in :func:`bind`.

    Returns:
        The tensors by name; those of the first level alone.

    Example:
        >>> list(unnamed_parts({"pos": torch.zeros(5, 3), "z": torch.zeros(5)}, {"pos": Image()}))
        ['z']
    """
    if not isinstance(representation, Mapping):
        return {}
    found = {key: entry(inputs, key) for key in held(inputs) if key not in representation}
    return {key: part for key, part in found.items() if isinstance(part, Tensor)}


def on_grid(representation: Layout | None) -> bool:
    """Whether inputs stand on a grid of pixels as a whole.

    Args:
        representation: As in :func:`bind`; None for images.

    Returns:
        Whether it says where its pixels are.

    Example:
        >>> from lie_metric.representations import Points
        >>> on_grid(None), on_grid(Points(3)), on_grid({"image": Image()})
        (True, False, False)
    """
    return representation is None or callable(getattr(representation, "map", None))


def off_grid(representation: Layout | None) -> bool:
    """Whether inputs are known to stand on no grid; of those that say neither nothing is known.

    Args:
        representation: As in :func:`bind`; None for images.

    Returns:
        Whether it has named parts, or a dimension and no pixels.

    Example:
        >>> from lie_metric.representations import Points
        >>> off_grid(None), off_grid(Points(3)), off_grid({"image": Image()})
        (False, True, True)
    """
    said = isinstance(representation, Mapping) or getattr(representation, "dimension", None) is not None
    return said and not on_grid(representation)


def resolve_for(generators: Generators, representation: Layout | None) -> tuple[Generator, ...]:
    """The generators asked for, in the dimension of what they move, if it can read all that they say.

    Args:
        generators: Names, groups or generators.
        representation: How inputs move; None for images.

    Returns:
        The generators.

    Raises:
        ValueError: If they are of another dimension, have a charge that no part reads, or move places otherwise than a
            part can.

    Example:
        >>> from lie_metric.representations import Points
        >>> [generator.name for generator in resolve_for("rotation", {"pos": Points(3)})]
        ['rotation_x', 'rotation_y', 'rotation_z']
    """
    layouts = dict(representation) if isinstance(representation, Mapping) else {"": representation or Image()}
    dimension = common_dimension(layouts)
    if dimension is None:
        given = {one.dimension for one in _objects(generators)}
        dimension = given.pop() if len(given) == 1 else 2
    found = resolve(generators, dimension=dimension)
    read = [getattr(one, "charges", None) for one in layouts.values()]
    if None not in read:
        known = frozenset().union(*cast("list[frozenset[str]]", read))
        for one in found:
            unread = sorted({*one.charges, *(["intensity"] if one.intensity else [])} - known)
            if unread:
                raise ValueError(
                    f"`generators` must act on the inputs, got {one.name!r} with {unread}, which none of "
                    f"{list(layouts.values())} reads. Leave it out, or give a representation that does, e.g. "
                    "`Velocities` for boosts, `Image` for intensities and perspectives, and `Photograph` for colours."
                )
            # A perspective moves places: what stands in the plane and does not read it would move wrongly.
            slanted = frozenset(PERSPECTIVE) & one.charges.keys()
            left = {
                name: layout
                for name, layout in layouts.items()
                if getattr(layout, "dimension", None) == 2 and not slanted <= layout.charges  # type: ignore[attr-defined]
            }
            if left:
                raise ValueError(
                    f"`generators` must act on all parts of the inputs, got {one.name!r} with {sorted(slanted)}, which "
                    f"{left} do not read. Move places, as `Image` or `Points(2)`, or leave it out."
                )
    return found


def _objects(asked: Any) -> Iterator[Generator]:
    if isinstance(asked, Generator):
        yield asked
    elif isinstance(asked, (tuple, list)):
        for entry in asked:
            yield from _objects(entry)


def _named(representation: Representation, inputs: Any) -> Representation:
    """The representation with the tensors that it names."""
    if isinstance(representation, Masked):
        mask = entry(inputs, representation.mask) if isinstance(representation.mask, str) else representation.mask
        return Masked(representation.of, mask)
    if isinstance(representation, Packed):
        batch = entry(inputs, representation.batch) if isinstance(representation.batch, str) else representation.batch
        return Packed(representation.of, batch)
    return representation
