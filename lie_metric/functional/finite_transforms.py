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
    sample_count,
    split_parts,
)
from lie_metric.functional.orbit_refusals import check_permuted, refuse_other_dimensions
from lie_metric.functional.orbit_sums import SUMS, Loss, OrbitSums, finite_transforms_compute, of_frames
from lie_metric.functional.sums import grouped, moments
from lie_metric.measured import described, function_of, row_by_row
from lie_metric.options import Options
from lie_metric.orbits import (
    Border,
    DisplacedOrbit,
    Element,
    Frame,
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
    Parts,
    Representation,
    grid_size,
    map_grid,
    scalar_fields,
)
from lie_metric.resampling import coordinate_dtype, working_precision
from lie_metric.running import isolated

__all__ = [
    "Reference",
    "consistency",
    "default_curve",
    "default_shifts",
    "finite_equivariance_error",
    "finite_transforms_update",
    "finite_transforms_validate",
    "lattice_equivariance_error",
    "orbit_variance",
    "prediction_consistency",
    "relaxed_equivariance_error",
]

Reference = Literal["image", "pairs"]


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
        refuse_other_dimensions(found, options.input_representation)
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
    refuse_other_dimensions(orbits, bound.carrier)
    for orbit in orbits:
        if isinstance(orbit, PermutationOrbit):
            check_permuted(orbit, images, options.input_representation)
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
            orbit_sums = OrbitSums(shown[frame], representation, len(orbit), orbit.complete)
            own.append(None if frame is None else shown[frame])
            for element in elements:
                returned = measured(element.on(carrier, images))
                orbit_sums.add(returned, element, loss, targets)
            for name, values in orbit_sums.rows().items():
                columns[name].append(values)
            t = orbit.parameter(size, resampling) if isinstance(orbit, DisplacedOrbit) else 0.0
            columns["parameter"].append(orbit_sums.zero + t**2)
        rows = {name: torch.stack(values, 1) for name, values in columns.items()} | of_frames(own, f, representation)
        rows["size"] = f.reshape(len(f), -1).to(coordinate_dtype(f.device)).norm(dim=1)
        sums = grouped(rows | moments(f, representation), indices)
        sums["rounding"] = torch.tensor(torch.finfo(f.dtype).eps, dtype=rows["size"].dtype, device=f.device)
    return sums, described(f, representation, options.output_representation, options.output), border, bound


# The part of the side up to which mirrored borders are nearer to the truth than a network that is run at another size:
# on photographs and a pretrained efficientnet-lite0 within 2 % at 1 and 2 of 224 pixels, where crops are within 10 %.
_MIRRORED = 0.01


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
    seed = options.get("seed", 0)
    shared = {name: value for name, value in options.items() if name != "seed"}
    chosen = Options.of(shared, without=("method", "chunk_size"), beside=("seed",))
    asked = finite_transforms_validate(transforms, seed, chosen, several)
    indices = range(sample_count(images, chosen.input_representation))
    sums, *_ = finite_transforms_update(
        model, images, chosen, orbits=asked, indices=indices, targets=targets, loss=loss, seed=seed
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
    """The measure by what a transformed image is compared with."""
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
