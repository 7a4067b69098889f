r"""Measures under finite transforms: error curves, lattice-exact errors, consistency, orbit variance, REMUL's E'.

One pass over the orbit of each image gives all of them: with :math:`z_g = \rho_2(g)^{-1} f(\rho_1(g) x)`, the output
brought back, each is a mean over g and x of something that z_g and f(x) say. Positions of an image-valued output that
were read outside of the frame are left out, and the others weighted up to as many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lie_metric.binding import (
    Bound,
    bind_rows,
    moved_parts,
    off_grid,
    resolve_for,
    sample_count,
    split_parts,
    unnamed_parts,
)
from lie_metric.functional.sums import MOMENTS, Sums, defined, grouped, moments, spread, totals
from lie_metric.measured import described, function_of, row_by_row
from lie_metric.options import Layout, Options
from lie_metric.orbits import (
    Border,
    DisplacedOrbit,
    Element,
    Frame,
    LatticeOrbit,
    MatrixOrbit,
    Orbit,
    Orbits,
    PermutationOrbit,
    displaced,
    uniform,
)
from lie_metric.orbits import orbits as resolve
from lie_metric.randomness import validate_seed
from lie_metric.representations import (
    ChannelsLast,
    Field,
    Image,
    Masked,
    Parts,
    Representation,
    grid_size,
    map_grid,
    scalar_fields,
)
from lie_metric.representations.composite import common_dimension, present
from lie_metric.resampling import coordinate_dtype, working_precision
from lie_metric.running import isolated

__all__ = [
    "Loss",
    "Reference",
    "finite_equivariance_error",
    "lattice_equivariance_error",
    "orbit_variance",
    "prediction_consistency",
    "relaxed_equivariance_error",
]

Loss = Callable[[Tensor, Any], Tensor]
Reference = Literal["image", "pairs"]

SUMS = ("violation", "distance", "agreement", "pairs", "variance", "loss", "parameter")
"""Names of the sums that hold one number for each orbit."""


def _refuse_other_dimensions(asked: Sequence[Orbit], layout: Layout | None) -> None:
    """Refuses transforms of images for inputs that are none, and those of another dimension."""
    wanted = common_dimension(dict(layout) if isinstance(layout, Mapping) else {"": layout or Image()})
    for orbit in asked:
        moving = [orbit.generator] if isinstance(orbit, DisplacedOrbit) else getattr(orbit, "generators", ())
        if isinstance(orbit, (DisplacedOrbit, LatticeOrbit)) and off_grid(layout):
            raise ValueError(
                f"`transforms` must act on the inputs, got {orbit.name!r}, which moves pixels, for {layout!r}. Pass "
                "e.g. `orbits.listed('rotation', (0.5,), dimension=3)`, `orbits.permutations()` or "
                "`orbits.matrices({'inversion': ...})`."
            )
        if moving:
            resolve_for(tuple(moving), layout)
        if isinstance(orbit, MatrixOrbit) and wanted not in {None, len(orbit.maps[0])}:
            raise ValueError(
                f"`transforms` must be maps of {wanted} dimensions, got {orbit.name!r} with {len(orbit.maps[0])} rows."
            )


def _check_permuted(orbit: PermutationOrbit, inputs: Any, layout: Layout | None) -> None:
    """Refuses permutations where it is not said which of several tensors stand at the points."""
    if not isinstance(layout, Mapping):
        return
    named, unknown = moved_parts(inputs, layout), sorted(set(orbit.along) - set(layout))
    if unknown:
        raise ValueError(f"`along` must name moved parts, got {unknown} for {list(layout)}.")
    along = orbit.along or (tuple(layout) if len(layout) == 1 else ())
    padded = [name for name in along if isinstance(layout[name], Masked)]
    counts = {name: named[name].shape[1] if named[name].ndim > 1 else 1 for name in along}
    left = [
        name
        for name, part in unnamed_parts(inputs, layout).items()
        if part.ndim > 1 and part.shape[1] in counts.values()
    ]
    if not along or left or padded or len(set(counts.values())) > 1:
        got = (
            f"{padded} with padding" if padded
            else f"{left} beside {list(along)}, which are not moved" if left
            else f"the parts {list(layout)}" if not along
            else f"parts of {counts} points"
        )  # fmt: skip
        raise TypeError(
            f"`transforms` must say by `orbits.permutations(along=...)` which parts stand at the points, all of them, "
            f"got {got}. Name what stands there, numbers as floating-point `Invariant()` or `Tensors(3, 0)`; clouds "
            "without padding."
        )


def default_curve() -> tuple[Orbit, ...]:
    """Shifts along both axes, rotation and scale, by 1, 2 and 8 pixels."""
    return displaced()


def default_shifts() -> tuple[Orbit, ...]:
    """Random shifts by up to an eighth of the image along both axes, and random rotations by up to 15 degrees."""
    return (uniform("translation", 0.25), uniform("rotation", 0.2618))


def finite_transforms_validate(
    transforms: Orbits, seed: int, options: Options, several: bool = False
) -> tuple[Orbit, ...]:
    """The orbits asked for, if every option has a meaning."""
    found = resolve(transforms)
    validate_seed(seed)
    if options.input_representation is not None:  # a monitor may give its own later
        _refuse_other_dimensions(found, options.input_representation)
    short = [orbit.name for orbit in found if len(orbit) < 2]
    if several and short:
        raise ValueError(
            f"`transforms` must be orbits of at least two elements, got one element in {short}. Pass e.g. "
            "`orbits.uniform('rotation', 0.5, samples=8)` or 'D4', of which the whole group is measured."
        )
    return found


def finite_transforms_update(
    model: Callable[..., Any],
    images: Any,
    options: Options,
    *,
    orbits: Sequence[Orbit],
    indices: Sequence[int],
    targets: Any = None,
    loss: Loss | None = None,
    seed: int = 0,
    border: Border | None = None,
) -> tuple[dict[str, Tensor], str, Border | None, Bound]:
    """The sums of a batch, what is measured in words, the border of shifts by whole pixels, and what was bound.

    ``indices`` are the images' running numbers, which fix their groups and transforms.
    """
    bound = bind_rows(model, images, options)
    _refuse_other_dimensions(orbits, bound.carrier)
    for orbit in orbits:
        if isinstance(orbit, PermutationOrbit):
            _check_permuted(orbit, images, options.input_representation)
    if loss is not None and targets is None:
        raise ValueError(
            "`targets` must be given when there is a `loss`, got None. Pass `update(model, images, labels)`."
        )
    resampling, carrier = options.stencil, bound.carrier
    with torch.no_grad(), isolated(model):
        images = working_precision(bound.inputs)
        measured = function_of(model, bound.output, bound.function)
        f = row_by_row(measured, images)
        representation = bound.carried(f, model)
        if isinstance(representation, Parts):
            whole, joined = representation, measured

            def measured(x: Tensor) -> Tensor:
                return whole.split(joined(x))[0]

            ((_, representation, f),) = split_parts(whole, f)
        # What stands on no grid has an action of its own, which asks for no size; permutations of pixels refuse it.
        size = grid_size(carrier, images) if callable(getattr(carrier, "map", None)) else (0, 0)
        if getattr(carrier, "spacing", ()) and any(isinstance(orbit, DisplacedOrbit) for orbit in orbits):
            raise ValueError(
                f"`transforms` must be in units of t for samples that are not equally far apart, got distances "
                f"in samples for {carrier!r}. Pass e.g. `orbits.listed('rotation', [0.1], dimension=3)`."
            )
        columns: dict[str, list[Tensor]] = {name: [] for name in SUMS}
        shown: dict[Frame | None, Tensor] = {None: f}  # what each part of the images gives, which orbits share
        own: list[Tensor | None] = []
        for orbit in orbits:
            elements = orbit.draw(indices, size, seed, resampling)
            if isinstance(orbit, DisplacedOrbit) and orbit.shifts and orbit.border == "auto":
                chosen: Border = "reflect"
                if orbit.pixels > _MIRRORED * min(size):
                    border = border or _possible_border(elements[0], measured, carrier, images, representation, shown)
                    chosen = border
                elements = replace(orbit, border=chosen).draw(indices, size, seed, resampling)
            frame = elements[0].frame
            if frame is not None and frame not in shown:
                shown[frame] = measured(map_grid(carrier, images, frame.of))
            orbit_sums = _Orbit(shown[frame], representation, len(orbit), orbit.complete)
            own.append(None if frame is None else shown[frame])
            for element in elements:
                returned = measured(element.on(carrier, images))
                orbit_sums.add(returned, element, loss, targets)
            for name, values in orbit_sums.rows().items():
                columns[name].append(values)
            t = orbit.parameter(size, resampling) if isinstance(orbit, DisplacedOrbit) else 0.0
            columns["parameter"].append(orbit_sums.zero + t**2)
        rows = {name: torch.stack(values, 1) for name, values in columns.items()} | _of_frames(own, f, representation)
        rows["size"] = f.reshape(len(f), -1).to(coordinate_dtype(f.device)).norm(dim=1)
        sums = grouped(rows | moments(f, representation), indices)
        sums["rounding"] = torch.tensor(torch.finfo(f.dtype).eps, dtype=rows["size"].dtype, device=f.device)
    return sums, described(f, representation, options.output_representation, options.output), border, bound


# The part of the side up to which mirrored borders are nearer to the truth than a network that is run at another size:
# on photographs and a pretrained efficientnet-lite0 within 2 % at 1 and 2 of 224 pixels, where crops are within 10 %.
_MIRRORED = 0.01


def _of_frames(outputs: Sequence[Tensor | None], f: Tensor, representation: Representation) -> dict[str, Tensor]:
    """Moments of the outputs for parts of the images, by orbit; zeros for orbits that are compared with the whole."""
    found = [None if output is None else moments(output, representation) for output in outputs]
    known = next((each for each in found if each is not None), None)
    wide, device = coordinate_dtype(f.device), f.device
    width = 1 if known is None else known["total"].shape[1]
    nothing = {
        name: torch.zeros(len(f), *([width] if shape else []), dtype=wide, device=device)
        for name, shape in MOMENTS.items()
    }
    return {f"frame_{name}": torch.stack([(each or nothing)[name] for each in found], 1) for name in nothing}


def spreads(sums: Sums) -> Tensor:
    """For each orbit the spread of the outputs that it is compared with."""
    own = {name: sums[f"frame_{name}"] for name in MOMENTS}
    found = spread(own | {"rounding": sums["rounding"], "images": sums["images"][..., None]})
    return torch.where(own["entries"] > 0, found, spread(sums)[..., None])


def _possible_border(
    element: Element,
    measured: Callable[[Tensor], Tensor],
    carrier: Representation,
    images: Tensor,
    representation: Representation,
    shown: dict[Frame | None, Tensor],
) -> Border:
    """The frame is cropped for a model that takes images smaller by a few pixels, and mirrored for any other."""
    if not isinstance(carrier, (Field, ChannelsLast)) or not scalar_fields(carrier) or element.frame is None:
        return "reflect"
    try:
        output = measured(map_grid(carrier, images, element.frame.of))
        element.on(representation, output, -1)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return "reflect"
    if output.ndim != shown[None].ndim or output.shape[:1] != images.shape[:1]:
        return "reflect"
    shown[element.frame] = output
    return "crop"


class _Orbit:
    """What the elements of an orbit say together, one element after the other, for each image."""

    def __init__(self, f: Tensor, representation: Representation, count: int, complete: bool) -> None:
        self.f, self.representation, self.count, self.complete = f, representation, count, complete
        self.wide = coordinate_dtype(f.device)
        self.zero = torch.zeros(len(f), dtype=self.wide, device=f.device)
        self.violation, self.distance, self.agreement, self.loss = (self.zero.clone() for _ in range(4))
        # Differences from f, so that what is common to all cancels before it is squared.
        self.first, self.second = torch.zeros_like(f), torch.zeros_like(f)
        self.valid = torch.ones_like(f)
        self.there = present(representation, f)
        # Of each sample, without what fills up a batch.
        kept = self.valid if self.there is None else self.there.expand_as(f)
        self.entries = kept.reshape(len(f), -1).sum(1).to(self.wide)
        self.classes: list[Tensor] = []

    def add(self, returned: Tensor, element: Element, loss: Loss | None, targets: Any) -> None:
        f = self.f
        z = element.on(self.representation, returned, -1)
        valid = element.valid(self.representation, f)
        if self.there is not None:
            z, valid = torch.where(self.there, z, f), torch.where(self.there, valid, 0.0)
        difference = z - f
        square = self._mean(difference.square(), valid) * self.entries
        self.violation += square / self.count
        self.distance += square.sqrt() / self.count
        self.first += difference / self.count
        self.second += difference.square() / self.count
        self.valid *= valid
        mine, theirs, weight = (self._scores(tensor) for tensor in (f, z, valid))
        self.classes.append(theirs.argmax(-1))
        same = self.classes[-1] == mine.argmax(-1)
        share = self._share(same, weight[..., 0], mine.shape[-1])
        # The largest of what is not finite is no class.
        self.agreement += torch.where(torch.isfinite(square), share, torch.nan) / self.count
        if loss is not None:
            found = loss(z, targets)
            if not isinstance(found, Tensor) or found.shape != self.zero.shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"`loss` must return one number for each of the {len(f)} images, got {got}. Use e.g. "
                    "`torch.nn.CrossEntropyLoss(reduction='none')`."
                )
            self.loss += found.to(self.wide) / self.count

    def rows(self) -> dict[str, Tensor]:
        classes = self._scores(self.f).shape[-1]
        # Of one element there is neither; it is refused before where they are asked for.
        pairs, variance = self.zero, self.zero
        if self.count > 1:
            weight = self._scores(self.valid)[..., 0]
            total = self.zero.clone()
            for i, one in enumerate(self.classes):
                for other in self.classes[:i]:
                    total += self._share(one == other, weight, classes)
            pairs = total / (self.count * (self.count - 1) / 2)
            pairs = torch.where(torch.isfinite(self.violation), pairs, torch.nan)
            # A sample of K elements sees K - 1 of K parts of the variance; a whole group sees all.
            correction = 1.0 if self.complete else self.count / (self.count - 1)
            about_mean = self._mean(self.second - self.first.square(), self.valid)
            variance = about_mean.clamp(min=0) * self.entries * correction
        found = (self.violation, self.distance, self.agreement, pairs, variance, self.loss)
        return dict(zip(SUMS[:-1], found, strict=True))

    def _mean(self, values: Tensor, valid: Tensor) -> Tensor:
        """The mean over the valid entries of each image; NaN if there is none."""
        kept, count = ((part.reshape(len(part), -1).to(self.wide)).sum(1) for part in (values * valid, valid))
        return kept / count

    def _scores(self, tensor: Tensor) -> Tensor:
        """Shape (B, positions, classes); no classes where no numbers stand for themselves, as of vectors."""
        blocks = self.representation.components(tensor)
        return blocks[-1] if blocks else tensor.reshape(len(tensor), -1, 1)

    def _share(self, same: Tensor, weight: Tensor, classes: int) -> Tensor:
        if classes < 2:
            return self.zero + torch.nan
        weight = weight.to(self.wide)
        return (same.to(self.wide) * weight).sum(1) / weight.sum(1)


def _finite_error(sums: Sums) -> Tensor:
    return (sums["violation"] / (2 * spreads(sums))).sqrt()


def _agreement(sums: Sums) -> Tensor:
    return sums["agreement"] / sums["images"][..., None]


def _pairs(sums: Sums) -> Tensor:
    return sums["pairs"] / sums["images"][..., None]


def _variance(sums: Sums) -> Tensor:
    return sums["variance"] / sums["images"][..., None]


def _share_of_loss(sums: Sums) -> Tensor:
    return sums["variance"] / sums["loss"]


def _relaxed(sums: Sums) -> Tensor:
    return sums["distance"] / sums["images"][..., None]


def _relaxed_normalised(sums: Sums) -> Tensor:
    return sums["distance"] / sums["size"][..., None]


STATISTICS: dict[str, tuple[Callable[[Sums], Tensor], str]] = {
    "finite_equivariance_error": (_finite_error, "the output does not vary over the images, or nothing stays inside"),
    "lattice_equivariance_error": (_finite_error, "the output does not vary over the images"),
    "prediction_consistency": (_agreement, "the output has fewer than two classes, or nothing stays inside the frame"),
    "pairwise_consistency": (_pairs, "the output has fewer than two classes, or the orbit fewer than two elements"),
    "orbit_variance": (_variance, "no position stays inside the frame under all elements"),
    "orbit_variance_share": (_share_of_loss, "the loss is zero or was not given"),
    "relaxed_equivariance_error": (_relaxed, "nothing stays inside the frame"),
    "relaxed_equivariance_error_normalised": (_relaxed_normalised, "the output is zero, or nothing stays inside"),
}
"""Each measure as a function of the sums, and why it may be undefined."""


def finite_transforms_compute(sums: Sums, measure: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The measure of each orbit from the sums."""
    statistic, reason = STATISTICS[measure]
    total = totals(sums)
    if not bool(torch.isfinite(total["square"])):
        reason = "the model's outputs are not finite"
    value = defined(statistic(total), measure, names, reason, total)
    return dict(zip(names, value.unbind(), strict=True))


def _measure(
    measure: str,
    model: Callable[..., Any],
    images: Tensor,
    transforms: Orbits,
    options: Mapping[str, Any],
    *,
    several: bool = False,
    targets: Any = None,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    own = {"seed": options["seed"]} if "seed" in options else {"seed": 0}
    shared = {name: value for name, value in options.items() if name != "seed"}
    chosen = Options.of(shared, without=("method", "chunk_size"), beside=("seed",))
    asked = finite_transforms_validate(transforms, own["seed"], chosen, several)
    indices = range(sample_count(images, chosen.input_representation))
    sums, *_ = finite_transforms_update(
        model, images, chosen, orbits=asked, indices=indices, targets=targets, loss=loss, **own
    )
    return finite_transforms_compute(sums, measure, [orbit.name for orbit in asked])


def finite_equivariance_error(
    model: Callable[..., Any], images: Tensor, transforms: Orbits | None = None, **options: Any
) -> dict[str, Tensor]:
    r"""The error of finite transforms, in the spread of the output: a curve over the parameter.

    .. math:: EE(g) = \sqrt{ E_x \| \rho_2(g)^{-1} f(\rho_1(g) x) - f(x) \|^2 / 2\,\mathrm{Var} f }

    0 for an equivariant model, 1 if the transformed image gives an output as far away as that of another image. For
    one generator, EE(t) / \|t\| tends to :func:`relative` / √2 as t → 0.
    Var f is E‖f - E f‖², E f as in :func:`relative`.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W), at least two.
        transforms: Orbits, see :func:`lie_metric.orbits.orbits`; of a random one the mean square over its elements
            counts. The default is rotations and shifts by 0.05 to 0.8.
        options: ``output``, ``function``, ``input_representation``, ``output_representation``, ``resampling``, ``seed``
            as in :class:`lie_metric.LocalEquivarianceError`.

    Returns:
        For each orbit's name a number of no axes; NaN, with a warning, where the output does not vary.

    Example:
        >>> import torch, lie_metric as lm
        >>> corner = lambda x: x[:, 0, :1, 0]  # sees one pixel
        >>> images = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).reshape(2, 1, 1, 2).expand(2, 1, 2, 2)
        >>> error = finite_equivariance_error(corner, images, "flip_horizontal")  # ±2 against 2 · a variance of 2
        >>> round(error["flip_horizontal"].item() ** 2, 6)
        1.0
    """
    chosen = default_curve() if transforms is None else transforms
    return _measure("finite_equivariance_error", model, images, chosen, options)


def lattice_equivariance_error(
    model: Callable[..., Any], images: Tensor, transforms: Orbits = "D4", **options: Any
) -> dict[str, Tensor]:
    r"""The error of transforms that permute pixels: quarter turns, flips, circular shifts. No interpolation.

    The formula of :func:`finite_equivariance_error`. It sees what no Lie derivative can, reflections and rotations by
    exactly 90°, and has no floor but rounding. "D4" adds the root mean square over the whole group, identity included.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W), at least two; H = W for quarter turns.
        transforms: Names ("rotate_90", "flips", "D4", "roll") or lattice transforms.
        options: As in :func:`finite_equivariance_error`.

    Returns:
        For each transform's name, and that of a whole group, a number of no axes.

    Example:
        >>> import torch
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> images = torch.arange(64.0).reshape(4, 1, 4, 4)
        >>> {name: value.item() for name, value in lattice_equivariance_error(brightness, images, "flips").items()}
        {'flip_horizontal': 0.0, 'flip_vertical': 0.0}
    """
    return _measure("lattice_equivariance_error", model, images, transforms, options)


def prediction_consistency(
    model: Callable[..., Any],
    images: Tensor,
    transforms: Orbits | None = None,
    *,
    reference: Reference = "image",
    **options: Any,
) -> dict[str, Tensor]:
    r"""The probability that the predicted class stays the same under a transform; 1 is best.

    With ``reference="image"``, :math:`P(\arg\max f(g x) = \arg\max f(x))` (Azulay & Weiss 2019); with "pairs",
    :math:`P(\arg\max f(g x) = \arg\max f(h x))` over pairs g ≠ h of the orbit (Zhang 2019). Image-valued
    outputs are compared pixel by pixel after they are brought back. A constant prediction is perfectly consistent.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        transforms: Orbits; the default is random shifts by up to an eighth of the image and rotations by up to 15°.
        reference: What a transformed image is compared with.
        options: As in :func:`finite_equivariance_error`.

    Returns:
        For each orbit's name a number in [0, 1]; NaN, with a warning, if there are fewer than two classes.

    Raises:
        ValueError: If the reference is unknown, or "pairs" is asked of an orbit of one element.

    Example:
        >>> import torch
        >>> halves = lambda x: torch.stack([x[..., :2].sum((1, 2, 3)), x[..., 2:].sum((1, 2, 3))], 1)
        >>> prediction_consistency(halves, torch.arange(4.0).expand(1, 1, 4, 4), "flips")["flip_horizontal"].item()
        0.0
    """
    measure = consistency(reference)
    chosen = default_shifts() if transforms is None else transforms
    return _measure(measure, model, images, chosen, options, several=reference == "pairs")


def consistency(reference: Reference) -> str:
    if reference not in get_args(Reference):
        raise ValueError(f"`reference` must be one of {get_args(Reference)}, got {reference!r}.")
    return "prediction_consistency" if reference == "image" else "pairwise_consistency"


def orbit_variance(
    model: Callable[..., Any],
    images: Tensor,
    transforms: Orbits | None = None,
    *,
    targets: Any = None,
    loss: Loss | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    r"""How much an output varies along the orbit of an image, and with a loss, which part of the loss that is.

    .. math:: V = E_x \left[ E_g \|z_g\|^2 - \| E_g z_g \|^2 \right], \qquad z_g = \rho_2(g)^{-1} f(\rho_1(g) x)

    with the factor K / (K - 1) for K random elements, which makes it unbiased. :math:`E_g z_g` is the model averaged
    over the orbit (its twirl); for the squared error, V is exactly the part of the risk that averaging removes
    (Elesedy & Zaidi 2021). V does not see an error that is the same all along the orbit.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        transforms: Orbits of at least two elements; the default is those of :func:`prediction_consistency`. Of "D4" and
            "rotations_90" pass the whole group, ``orbits.lattice("D4")[-1]``.
        targets: What the loss compares with.
        loss: From outputs brought back (B, ...) and targets to one number for each image, e.g. the squared error summed
            over the output. Given one, V / E loss is returned.
        options: As in :func:`finite_equivariance_error`.

    Returns:
        For each orbit's name V, in squared units of the output, or its share of the loss.

    Raises:
        ValueError: If an orbit has one element, or a loss comes without targets.

    Example:
        >>> import torch, lie_metric as lm
        >>> corner = lambda x: x[:, 0, 0, :1]
        >>> both = lm.orbits.LatticeOrbit("Z2", lm.lattice.elements("identity", "flip_horizontal"), complete=True)
        >>> orbit_variance(corner, torch.tensor([1.0, 3.0]).expand(1, 1, 2, 2), both)["Z2"].item()  # of 1 and 3
        1.0
    """
    measure = "orbit_variance" if loss is None else "orbit_variance_share"
    chosen = default_shifts() if transforms is None else transforms
    return _measure(measure, model, images, chosen, options, several=True, targets=targets, loss=loss)


def relaxed_equivariance_error(
    model: Callable[..., Any],
    images: Tensor,
    transforms: Orbits | None = None,
    *,
    normalise: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    r"""The mean distance between the output of a transformed image and the transformed output, E' of REMUL.

    .. math:: E' = E_x E_g \| \rho_2(g)^{-1} f(\rho_1(g) x) - f(x) \|, \qquad E'_{norm} = E' / E_x \|f(x)\|

    The measure that relaxed-equivariance training reports (Elhag et al. 2024, arXiv 2410.17878), with outputs compared
    after they are brought back, which for an orthogonal ρ₂ is the same.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        transforms: Orbits; the default is those of :func:`prediction_consistency`.
        normalise: Whether to divide by the mean norm of the output.
        options: As in :func:`finite_equivariance_error`.

    Returns:
        For each orbit's name E' in units of the output, or E' / E‖f‖.

    Example:
        >>> import torch
        >>> corner = lambda x: x[:, 0, 0, :1]
        >>> x = torch.tensor([1.0, 3.0]).expand(1, 1, 2, 2)
        >>> relaxed_equivariance_error(corner, x, "flip_horizontal", normalise=True)["flip_horizontal"].item()
        2.0
    """
    measure = "relaxed_equivariance_error" + ("_normalised" if normalise else "")
    chosen = default_shifts() if transforms is None else transforms
    return _measure(measure, model, images, chosen, options)
