"""A test kit for people who write equivariant layers: violations without units, and assertions on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lie_metric import randomness
from lie_metric.binding import Generators, bind, resolve_for, split_parts
from lie_metric.calling import call_of, select_output
from lie_metric.jacobian import Method
from lie_metric.lattice import LatticeTransforms, check_reach, content_map, elements
from lie_metric.lie import linearise
from lie_metric.measured import carried, validate_inputs
from lie_metric.options import Function, Layout, Options, Output
from lie_metric.representations import Representation, grid_size, map_samples
from lie_metric.resampling import Resampling, coordinate_dtype
from lie_metric.running import evaluation, random_state

__all__ = [
    "TOLERANCES",
    "assert_equivariant",
    "assert_lattice_equivariant",
    "equivariance_violation",
    "lattice_violation",
]

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""The largest violation that passes for rounding, by the dtype of the output; some hundred times that of deep networks.

Derivatives of models in half precision are taken in float32.
"""

# One draw can by chance be nearly orthogonal to the one row of a scalar function's Jacobian; several hardly can.
_DRAWS = 4


def equivariance_violation(
    model: Callable[..., Any],
    inputs: Any,
    generators: Generators = "affine",
    *,
    output: Output = "logits",
    function: Function | None = None,
    input_representation: Layout | None = None,
    output_representation: Layout | None = None,
    resampling: Resampling | None = None,
    method: Method = "auto",
    chunk_size: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""The size of the Lie derivative against the sizes of what it is made of, image by image.

    .. math::
        v_X(x) = \frac{\|L_X f(x)\|}
        {\sqrt{\|Df(x)[X \cdot x]\|^2 + \|X \cdot f(x)\|^2 + \overline{\|Df(x)\,u\|^2}}}, \qquad \|u\| = \|X \cdot x\|

    with u Gaussian noise (the bar is a mean over four draws). The first two terms are the two sides of
    :math:`Df[X \cdot x] = X \cdot f`. An invariant function has neither, and is compared with its response to any other
    change of the same norm. The number does not change when the output is multiplied by a number or shifted by a
    constant, nor when inputs or t are measured in other units. It lies between 0 and √2, is at rounding level for an
    equivariant function and around 1 for one that knows nothing of X. Where all terms vanish (a constant function) it
    is 0; a function that is constant only up to rounding has no size to be compared with, and fails.

    Convention:
        An image is moved with the slopes of the stencil. A function that is linear over positions, such as a
        convolution under circular translation, can be exactly equivariant to them. A pointwise nonlinearity can only
        be as equivariant as the stencil obeys the chain rule: see :func:`lie_metric.functional.noise_floor`, and use
        smooth inputs with ``Resampling("fourier")``, or a wider tolerance.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        inputs: Shape (B, ...), floating point and finite.
        generators: As in :func:`lie_metric.lie_derivative`.
        output: As in :func:`lie_metric.lie_derivative`.
        function: As in :func:`lie_metric.lie_derivative`.
        input_representation: As in :func:`lie_metric.lie_derivative`.
        output_representation: As in :func:`lie_metric.lie_derivative`.
        resampling: As in :func:`lie_metric.lie_derivative`.
        method: As in :func:`lie_metric.lie_derivative`.
        chunk_size: As in :func:`lie_metric.lie_derivative`.
        seed: Fixes the noise.

    Returns:
        For each generator's name a float64 tensor of shape (B,).

    Raises:
        ValueError: If the output does not have one entry for each image on its first axis.

    Example:
        >>> import torch, lie_metric as lm
        >>> x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        >>> energy = lambda x: x.square().mean((1, 2, 3))  # invariant to circular shifts
        >>> v = equivariance_violation(energy, x, ("translation_x", "saturation"), resampling=lm.Resampling("fourier"))
        >>> bool((v["translation_x"] < 1e-12).all()), bool((v["saturation"] > 0.5).all())
        (True, True)
    """
    options = Options(output, function, input_representation, output_representation, resampling, method, chunk_size)
    return _violation(model, inputs, generators, seed, options)[0]


def _violation(
    model: Callable[..., Any], inputs: Any, generators: Generators, seed: int, options: Options
) -> tuple[dict[str, Tensor], torch.dtype]:
    """The violations, and the dtype in which the model ran."""
    asked = resolve_for(generators, options.input_representation)
    moving = bind(model, inputs, options).inputs
    count = len(moving)
    with torch.no_grad():
        noise = torch.stack([randomness.noise(moving, range(k * count, (k + 1) * count), seed) for k in range(_DRAWS)])
        result = linearise(model, inputs, asked, options, directions=noise)
        _check_rows(result.output, count)
        values: dict[str, Tensor] = {}
        outputs, changes, pushes = (
            split_parts(result.representation, whole)
            for whole in (result.output, result.lie_derivatives, result.products)
        )
        # Each part against its own size: units of parts differ.
        for (part, representation, f), (_, _, L), (_, _, products) in zip(outputs, changes, pushes, strict=True):
            moved = representation.tangents(f, asked, options.stencil)
            L, moved, products = (each.reshape(len(each), count, -1) for each in (L, moved, products))
            gain = (_energy(products, 2) / _energy(noise, 2)).mean(0)
            pushed = _energy(L + moved, 2)  # Df[X·x]
            size = (pushed + _energy(moved, 2) + gain * _energy(result.tangents, 2)).sqrt()
            names = [f"{part}/{generator.name}" if part else generator.name for generator in asked]
            values |= zip(names, _ratio(_energy(L, 2).sqrt(), size).unbind(), strict=True)
    return values, result.output.dtype


def assert_equivariant(
    model: Callable[..., Any],
    inputs: Any,
    generators: Generators = "affine",
    tolerance: float | None = None,
    *,
    output: Output = "logits",
    function: Function | None = None,
    input_representation: Layout | None = None,
    output_representation: Layout | None = None,
    resampling: Resampling | None = None,
    method: Method = "auto",
    chunk_size: int | None = None,
    seed: int = 0,
) -> None:
    """Fails if the Lie derivative of a model is more than rounding, naming the worst generator and image.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        inputs: Shape (B, ...), floating point and finite.
        generators: As in :func:`lie_metric.lie_derivative`.
        tolerance: The largest :func:`equivariance_violation` that passes; the default is :data:`TOLERANCES` of the
            dtype in which the model ran.
        output: As in :func:`lie_metric.lie_derivative`.
        function: As in :func:`lie_metric.lie_derivative`.
        input_representation: As in :func:`lie_metric.lie_derivative`.
        output_representation: As in :func:`lie_metric.lie_derivative`.
        resampling: As in :func:`lie_metric.lie_derivative`.
        method: As in :func:`lie_metric.lie_derivative`.
        chunk_size: As in :func:`lie_metric.lie_derivative`.
        seed: Fixes the noise.

    Raises:
        AssertionError: If a violation is above the tolerance, or NaN.

    Example:
        >>> import torch, lie_metric as lm
        >>> layer = torch.nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
        >>> assert_equivariant(layer, torch.randn(2, 1, 8, 8), "translation", resampling=lm.Resampling("fourier"))
    """
    _check_tolerance(tolerance)
    options = Options(output, function, input_representation, output_representation, resampling, method, chunk_size)
    found, dtype = _violation(model, inputs, generators, seed, options)
    _assert_below(
        found,
        TOLERANCES[dtype] if tolerance is None else tolerance,
        dtype,
        "The Lie derivative is not zero to rounding; its stencil alone leaves an error on content that is not smooth",
    )


def lattice_violation(
    model: Callable[..., Any],
    inputs: Tensor,
    transforms: LatticeTransforms = "D4",
    *,
    output: Output = "logits",
    function: Function | None = None,
    input_representation: Representation | None = None,
    output_representation: Representation | None = None,
) -> dict[str, Tensor]:
    r"""The difference between transforming before and after the model, against the outputs' size, image by image.

    .. math:: v_g(x) = \frac{\|f(g x) - g f(x)\|}{\max(\|f(g x)\|, \|f(x)\|)}

    for transforms that permute pixels, so that nothing is interpolated: 0 up to rounding if and only if f is
    equivariant at x, at most 2. Where both outputs vanish it is 0. The model runs in evaluation mode, once for each
    transform and once more.

    Convention:
        Quarter turns are clockwise as displayed; a roll is counted in pixels of the input and moves a smaller output
        by the same part of its width. See :mod:`lie_metric.lattice`.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        inputs: Shape (B, ...), floating point and finite.
        transforms: Names of elements of D4, groups ("rotations_90", "flips", "D4", "roll"),
            :class:`~lie_metric.lattice.Roll` objects, or a sequence of them.
        output: As in :func:`lie_metric.lie_derivative`.
        function: As in :func:`lie_metric.lie_derivative`.
        input_representation: How the inputs are laid out; the default is an image.
        output_representation: How the output is; inferred where its shape leaves no choice.

    Returns:
        For each transform's name a float64 tensor of shape (B,).

    Raises:
        TypeError: If a representation cannot say where its images are.
        ValueError: If the inputs stand on no grid, a transform does not fit the size of the inputs or outputs, or the
            outputs do not have one entry for each image.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 1, 4, 4)
        >>> lattice_violation(lambda x: x.mean((1, 2, 3)), x, "rotate_90")["rotate_90"].max().item() < 1e-6
        True
        >>> lattice_violation(lambda x: x[:, 0, 0], torch.eye(4).expand(1, 1, 4, 4), "flip_horizontal")
        {'flip_horizontal': tensor([1.4142], dtype=torch.float64)}
    """
    options = Options(output, function, input_representation, output_representation)
    return _lattice_violation(model, inputs, transforms, options)[0]


def _lattice_violation(
    model: Callable[..., Any], inputs: Tensor, transforms: LatticeTransforms, options: Options
) -> tuple[dict[str, Tensor], torch.dtype]:
    asked, output, given = elements(transforms), options.output, options.input_representation
    carrier = validate_inputs(model, inputs, given, options.function)
    call = call_of(model, options.function)
    size = grid_size(carrier, inputs)
    check_reach(asked, size)
    # All transforms act before the model runs, so that a size that does not fit is met first.
    moved = [map_samples(carrier, inputs, element, content_map(element, len(size))) for element in asked]
    found = {}
    with torch.no_grad(), random_state(), evaluation(model):
        plain = select_output(call(inputs), output)
        _check_rows(plain, len(inputs))
        layout = carried(plain, inputs, model, options.whole_output, cast("Representation | None", given))
        for element, image in zip(asked, moved, strict=True):
            wanted = map_samples(layout, plain, partial(element.on_grid, size=size), content_map(element, len(size)))
            result = select_output(call(image), output)
            if result.shape != wanted.shape:
                raise ValueError(
                    f"`output` must keep its shape {tuple(wanted.shape)} under {element.name!r}, got "
                    f"{tuple(result.shape)}. Select a tensor of fixed size with `output=`."
                )
            larger = torch.maximum(_energy(result), _energy(wanted)).sqrt()
            found[element.name] = _ratio(_energy(_wide(result) - _wide(wanted)).sqrt(), larger)
    return found, plain.dtype


def assert_lattice_equivariant(
    model: Callable[..., Any],
    inputs: Tensor,
    transforms: LatticeTransforms = "D4",
    tolerance: float | None = None,
    *,
    output: Output = "logits",
    function: Function | None = None,
    input_representation: Representation | None = None,
    output_representation: Representation | None = None,
) -> None:
    """Fails if a model is not equivariant to transforms that permute pixels, naming the worst transform and image.

    Args:
        model: As in :func:`lattice_violation`.
        inputs: As in :func:`lattice_violation`.
        transforms: As in :func:`lattice_violation`.
        tolerance: The largest :func:`lattice_violation` that passes; the default is :data:`TOLERANCES` of the
            output's dtype.
        output: As in :func:`lattice_violation`.
        function: As in :func:`lattice_violation`.
        input_representation: As in :func:`lattice_violation`.
        output_representation: As in :func:`lattice_violation`.

    Raises:
        AssertionError: If a violation is above the tolerance, or NaN.

    Example:
        >>> import torch
        >>> from lie_metric.lattice import Roll
        >>> layer = torch.nn.Conv2d(1, 3, 3, stride=2, padding=1, padding_mode="circular")
        >>> assert_lattice_equivariant(layer, torch.randn(2, 1, 16, 16), Roll(2, 4))
    """
    _check_tolerance(tolerance)
    found, dtype = _lattice_violation(
        model, inputs, transforms, Options(output, function, input_representation, output_representation)
    )
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    _assert_below(found, allowed, dtype, "Transforming before and after the model differs by more than rounding")


def _assert_below(found: Mapping[str, Tensor], tolerance: float, dtype: torch.dtype, reason: str) -> None:
    table = torch.stack(list(found.values()))
    if bool((table <= tolerance).all()):
        return
    # NaN is the worst of all.
    transform, image = divmod(int(table.nan_to_num(nan=torch.inf).argmax()), table.shape[1])
    name = list(found)[transform]
    raise AssertionError(
        f"`model` must be equivariant within {tolerance:g} ({str(dtype).removeprefix('torch.')}), got a violation of "
        f"{float(table[transform, image]):.3g} under {name!r} at image {image}, the worst of {len(table)} transforms "
        f"and {table.shape[1]} images. {reason}; give a `tolerance` if that is expected. Largest of each: "
        + ", ".join(f"{key} {float(value.max()):.3g}" for key, value in found.items())
        + "."
    )


def _check_tolerance(tolerance: object) -> None:
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"`tolerance` must be a number or None, got {tolerance!r}. None takes the one of the dtype.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must not be negative, got {tolerance!r}. A violation is at most 2.")


def _check_rows(output: Tensor, count: int) -> None:
    if output.shape[:1] != (count,):
        raise ValueError(
            f"`output` must have one entry for each of the {count} images on its first axis, got shape "
            f"{tuple(output.shape)}. Select or reshape it with `output=`."
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(coordinate_dtype(tensor.device))


def _energy(values: Tensor, axes: int = 1) -> Tensor:
    """Squared norms over all but the leading axes."""
    return _wide(values).flatten(axes).square().sum(-1) if values.ndim > axes else _wide(values).square()


def _ratio(violation: Tensor, size: Tensor) -> Tensor:
    """The quotient, 0 where both vanish; NaN stays NaN."""
    return torch.where(size == 0, violation, violation / size)
