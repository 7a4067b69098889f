"""Measures on Lie derivatives: mean square, relative to the output's spread, relative to noise, and the Gram matrix.

All of them, and their standard errors, are functions of the same sums over images. The sums are kept for groups of
images; leaving out one group at a time gives the standard error of any such function (the jackknife).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lie_metric.algebra import Generator, spanning_set
from lie_metric.algebra import generators as resolve
from lie_metric.functional.options import chosen_options
from lie_metric.functional.sums import GROUPS, ROUNDINGS, Sums, defined, grouped, moments, spread, totals
from lie_metric.jacobian import Method
from lie_metric.lie import Generators, Linearisation, linearise
from lie_metric.measured import Function, Output, validate_options
from lie_metric.randomness import phase_randomised, validate_seed
from lie_metric.representations import Image, Invariant, Representation, map_grid
from lie_metric.resampling import Resampling, coordinate_dtype
from lie_metric.warning import warn

__all__ = ["LeeOutput", "Measure", "Normalise", "gram", "lee", "principal_directions", "relative", "sensitivity"]

Normalise = Literal["input"]
Measure = Literal["relative", "lee", "sensitivity"]
LeeOutput = Literal["output", "probabilities", "auto"]


def _local_equivariance_validate(
    generators: Generators,
    measure: Measure,
    output: Output,
    function: Function | None,
    lee_output: LeeOutput,
    input_representation: Representation | None,
    output_representation: Representation | None,
    resampling: Resampling | None,
    method: Method,
    chunk_size: int | None,
    seed: int,
) -> tuple[Generator, ...]:
    """The generators asked for, if every option has a meaning."""
    found = resolve(generators)
    if measure not in get_args(Measure):
        raise ValueError(f"`measure` must be one of {get_args(Measure)}, got {measure!r}.")
    if lee_output not in get_args(LeeOutput):
        raise ValueError(f"`lee_output` must be one of {get_args(LeeOutput)}, got {lee_output!r}.")
    validate_seed(seed)
    validate_options(output, input_representation, output_representation, resampling, method, chunk_size, function)
    return found


def _local_equivariance_update(
    model: Callable[..., Any],
    images: Tensor,
    *,
    generators: Sequence[Generator],
    indices: Sequence[int],
    lee_output: LeeOutput = "output",
    with_noise: bool = False,
    seed: int = 0,
    output: Output = "logits",
    **options: Any,
) -> tuple[dict[str, Tensor], Linearisation]:
    """The sums of a batch; ``indices`` are the images' running numbers, which fix their groups and their noise."""
    carrier = options.get("input_representation") or Image()

    def noise(tangents: Tensor) -> Tensor:
        return _like_noise(tangents, carrier, indices, seed)

    with torch.no_grad():
        result = linearise(model, images, generators, output=output, further=noise if with_noise else None, **options)
        if result.output.shape[:1] != images.shape[:1]:
            raise ValueError(
                f"`output` must have one entry for each of the {len(images)} images on its first axis, got shape "
                f"{tuple(result.output.shape)}. Select or reshape it with `output=`."
            )
        sums = _sum(result, generators, indices, lee_output, output)
    return sums, result


def _sum(
    result: Linearisation,
    asked: Sequence[Generator],
    indices: Sequence[int],
    lee_output: LeeOutput,
    output: Output,
) -> dict[str, Tensor]:
    f, wide = result.output, coordinate_dtype(result.output.device)
    invariant = isinstance(result.representation, Invariant)
    classifier = invariant and f.ndim == 2 and f.shape[1] > 1 and output == "logits"
    if lee_output == "probabilities" and not (invariant and f.ndim == 2 and f.shape[1] > 1):
        raise ValueError(
            f"`lee_output` must be 'output' unless the output is a batch of class scores (B, C), got an output of "
            f"shape {tuple(f.shape)} that acts as {result.representation!r}."
        )
    on_probabilities = lee_output == "probabilities" or (lee_output == "auto" and classifier)
    probabilities = f.to(wide).softmax(-1) if on_probabilities else None
    dimension = f[0].numel()
    rows: dict[str, list[Tensor]] = {name: [] for name in ("gram", "energy", "violation", "noise")}
    for image in range(len(f)):
        # Squares are taken in float64, one image at a time: large outputs would fill the memory twice.
        L = result.lie_derivatives[:, image].reshape(len(asked), -1).to(wide)
        rows["violation"].append(L.square().sum(1))
        if probabilities is not None:
            p = probabilities[image]
            L = p * (L - (L @ p)[:, None])
        rows["gram"].append(L @ L.mT / dimension)
        moved = result.tangents[:, image].reshape(len(asked), -1).to(wide)
        energy = moved @ moved.mT
        rows["energy"].append(energy / moved.shape[1])
        if result.further is not None:
            rows["noise"].append(result.further[:, image].reshape(len(asked), -1).to(wide).square().sum(1))
    sums = grouped(
        {name: torch.stack(values) for name, values in rows.items() if values} | moments(f, result.representation),
        indices,
    )
    if result.further is None:
        sums["noise"] = torch.zeros((GROUPS, len(asked)), dtype=wide, device=f.device)
    sums["rounding"] = torch.tensor(torch.finfo(f.dtype).eps, dtype=wide, device=f.device)
    return sums


def _like_noise(tangents: Tensor, carrier: Representation, indices: Sequence[int], seed: int) -> Tensor:
    """Tangents with the phases of their spectra turned at random; what stands on no grid is taken as one long row."""

    def turned(image: Tensor) -> Tensor:
        return phase_randomised(image, indices, seed)

    if callable(getattr(carrier, "map", None)):
        return torch.stack([map_grid(carrier, each, turned) for each in tangents])
    return turned(tangents.flatten(2)[:, :, None, None]).reshape(tangents.shape)


def _lee(sums: Sums) -> Tensor:
    return sums["gram"].diagonal(dim1=-2, dim2=-1) / sums["images"][..., None]


def _gram(sums: Sums) -> Tensor:
    return sums["gram"] / sums["images"][..., None, None]


def _energy(sums: Sums) -> Tensor:
    return sums["energy"] / sums["images"][..., None, None]


def _gram_and_energy(sums: Sums) -> Tensor:
    return torch.stack([_gram(sums), _energy(sums)])


def _relative(sums: Sums) -> Tensor:
    return (sums["violation"] / spread(sums)[..., None]).sqrt()


def _sensitivity(sums: Sums) -> Tensor:
    floor = (sums["square"] * (ROUNDINGS * sums["rounding"]) ** 2)[..., None]
    noise = torch.where(sums["noise"] > floor, sums["noise"], torch.nan)
    return (sums["violation"] / noise).sqrt()


# Input energies below this part of the largest are rounding of float32 tangents: such combinations move no image.
_UNMOVED = 1e-12


def _validate_normalise(normalise: Normalise | None) -> None:
    if normalise not in {None, "input"}:
        raise ValueError(f"`normalise` must be None or 'input', got {normalise!r}. 'input' gives gains.")


def _principal_directions(
    gram: Tensor, energy: Tensor, asked: Sequence[Generator], normalise: Normalise | None
) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and unit eigenvectors as rows, of G or of the pair G and E, on what the generators span."""
    # Coefficients that add up to no generator at all are left out: with the rest, every element of the span has one
    # way to be written, the one of least norm.
    span = torch.linalg.qr(spanning_set(asked)[1].to(gram)).Q
    if not bool(torch.isfinite(gram).all()):
        return span.new_full(span.shape[1:], torch.nan), torch.full_like(span.mT, torch.nan)
    if normalise == "input":
        sizes, axes = torch.linalg.eigh(span.mT @ energy @ span)
        moving = sizes > _UNMOVED * energy.diagonal().sum()
        span = span @ (axes[:, moving] / sizes[moving].sqrt())
    values, vectors = torch.linalg.eigh(span.mT @ gram @ span)
    rows = torch.nn.functional.normalize((span @ vectors).mT, dim=1)
    # An eigenvector is defined up to its sign: the largest coefficient is made positive.
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values, rows * largest.sign()


_STATISTICS: dict[str, Callable[[Sums], Tensor]] = {
    "relative": _relative,
    "lee": _lee,
    "sensitivity": _sensitivity,
}

_UNDEFINED = {
    "relative": "the output does not vary over the images, or not by more than rounding",
    "sensitivity": "the output does not respond to noise, or not by more than rounding",
    "lee": "it is not finite",
}


def _local_equivariance_compute(sums: Sums, measure: str, names: Sequence[str]) -> dict[str, Tensor]:
    """The measure of each generator from the sums."""
    return dict(zip(names, _value(sums, _STATISTICS[measure], measure, names).unbind(), strict=True))


def _value(sums: Sums, statistic: Callable[[Sums], Tensor], measure: str, names: Sequence[str]) -> Tensor:
    total = totals(sums)
    value = statistic(total)
    if not bool(torch.isfinite(total["square"])) or not bool(torch.isfinite(total["violation"]).all()):
        warn(f"`{measure}` is NaN: the model's outputs or derivatives are not finite.")
        return torch.full_like(value, torch.nan)
    return defined(value, measure, names, _UNDEFINED[measure], total)


_DEFAULTS: dict[str, Any] = {
    "output": "logits",
    "function": None,
    "lee_output": "output",
    "input_representation": None,
    "output_representation": None,
    "resampling": None,
    "method": "auto",
    "chunk_size": None,
    "seed": 0,
}


def _measure(
    statistic: Callable[[Sums], Tensor],
    measure: Measure,
    model: Callable[..., Any],
    images: Tensor,
    generators: Generators,
    options: Mapping[str, Any],
) -> tuple[tuple[str, ...], Tensor]:
    """The generators' names and a statistic of one batch: validate, update, compute."""
    chosen = chosen_options(options, _DEFAULTS)
    asked = _local_equivariance_validate(generators, measure, **chosen)
    names = tuple(generator.name for generator in asked)
    sums, _ = _local_equivariance_update(
        model,
        images,
        generators=asked,
        indices=range(len(images)) if isinstance(images, Tensor) else (),
        with_noise=measure == "sensitivity",
        **chosen,
    )
    return names, _value(sums, statistic, measure, names)


def _by_name(measure: Measure, *arguments: Any) -> dict[str, Tensor]:
    names, values = _measure(_STATISTICS[measure], measure, *arguments)
    return dict(zip(names, values.unbind(), strict=True))


def lee(
    model: Callable[..., Any], images: Tensor, generators: Generators = "affine", **options: Any
) -> dict[str, Tensor]:
    r"""The local equivariance error, the mean square of the Lie derivative (Gruver et al. 2023, Eq. 4).

    .. math:: \mathrm{LEE}_X = E_x \| L_X f(x) \|^2 / \dim f

    In squared units of the output per squared unit of t. It grows with the scale of the output and with confidence: a
    lower value across networks or against an untrained one does not mean "more equivariant". See :func:`relative`.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        generators: As in :func:`lie_metric.lie_derivative`.
        options: ``output`` ("probabilities" for the paper's choice), ``function``, ``lee_output``,
            ``input_representation``, ``output_representation``, ``resampling``, ``method``, ``chunk_size``, ``seed``
            as in :class:`lie_metric.LocalEquivarianceError`.

    Returns:
        For each generator's name a number of no axes.

    Example:
        >>> import torch
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> round(lee(brightness, torch.ones(4, 1, 8, 8), "saturation")["saturation"].item(), 6)
        1.0
    """
    return _by_name("lee", model, images, generators, options)


def relative(
    model: Callable[..., Any], images: Tensor, generators: Generators = "affine", **options: Any
) -> dict[str, Tensor]:
    r"""The Lie derivative in standard deviations of the output per unit of t.

    .. math:: r_X = \sqrt{ \frac{1}{n} \sum_i \|L_X f(x_i)\|^2 \Big/ \frac{1}{n - 1} \sum_i \|f(x_i) - E f\|^2 }

    E f is the mean over images, of every element of an invariant output, and of every channel of an image-valued
    one, its positions pooled. It does not change when the output is multiplied by a number or shifted by a constant.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W), at least two.
        generators: As in :func:`lie_metric.lie_derivative`.
        options: As in :func:`lee`.

    Returns:
        For each generator's name a number of no axes; NaN, with a warning, where the output does not vary.

    Example:
        >>> import torch
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> images = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
        >>> round(relative(brightness, images, "saturation")["saturation"].item() ** 2, 6)  # 5 over 2
        2.5
    """
    return _by_name("relative", model, images, generators, options)


def sensitivity(
    model: Callable[..., Any], images: Tensor, generators: Generators = "affine", **options: Any
) -> dict[str, Tensor]:
    r"""The response to a transform over the response to noise with the spectrum of the same change of the image.

    .. math:: s_X = \sqrt{ E\|L_X f(x)\|^2 / E\|Df(x)\,u\|^2 }, \qquad |\hat u| = |\widehat{X \cdot x}|

    u is the tangent with the phases of its Fourier transform turned at random, by the image's number and ``seed``: it
    has its norm, its spectrum and its colours, and nothing of the transform. 1: the model treats the transform as any
    other change of the image; below 1, it has learned (or was built) to respond less to it.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        generators: As in :func:`lie_metric.lie_derivative`.
        options: As in :func:`lee`.

    Returns:
        For each generator's name a number of no axes; NaN, with a warning, where the output does not respond to noise.

    Example:
        >>> import torch
        >>> pixels = lambda x: x.flatten(1)
        >>> round(sensitivity(pixels, torch.rand(2, 1, 8, 8), "saturation")["saturation"].item(), 5)
        1.0
    """
    return _by_name("sensitivity", model, images, generators, options)


def gram(model: Callable[..., Any], images: Tensor, generators: Generators = "affine", **options: Any) -> Tensor:
    r"""The Gram matrix of the Lie derivatives, whose quadratic form is the LEE of every linear combination.

    .. math:: G_{ij} = E_x \langle L_i f(x), L_j f(x) \rangle / \dim f, \qquad \mathrm{LEE}_{c} = c^T G c

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        generators: As in :func:`lie_metric.lie_derivative`; K of them.
        options: As in :func:`lee`.

    Returns:
        Shape (K, K), float64.

    Example:
        >>> import torch
        >>> gram(lambda x: x.flatten(1), torch.ones(2, 1, 8, 8), ("rotation", "saturation")).round().tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    return _measure(_gram, "lee", model, images, generators, options)[1]


def principal_directions(
    model: Callable[..., Any],
    images: Tensor,
    generators: Generators = "affine",
    *,
    normalise: Normalise | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    r"""The combinations of generators that a model violates least and most.

    With ``normalise=None`` the eigenvalues and eigenvectors of the Gram matrix, the extrema of :math:`c^T G c` over
    unit coefficients c: they depend on the units of t, in which a radian is as much as half of a side. With
    ``normalise="input"`` those of

    .. math:: G c = \lambda E c, \qquad E_{ij} = E_x \langle X_i \cdot x, X_j \cdot x \rangle / \dim x

    where λ is the mean square of the output's Lie derivative over that of the change of the input, a squared gain that
    depends on the span of the generators alone. Combinations that move no image (E c = 0) have no gain and are left
    out.

    Dependent generators, as the nine named affine ones, which span six dimensions, give one value for each dimension
    of the span; coefficients are those of least norm among all that give the same combination.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        generators: As in :func:`lie_metric.lie_derivative`; K of them, spanning R dimensions.
        normalise: None, or "input" for gains.
        options: As in :func:`lee`.

    Returns:
        The eigenvalues, ascending, shape (R,), and unit vectors of coefficients as rows, shape (R, K), the largest
        coefficient positive, float64. NaN where the Gram matrix is.

    Raises:
        ValueError: If ``normalise`` is neither.

    Example:
        >>> import torch, lie_metric as lm
        >>> left = lambda x: x.mean((1, 2))  # one number for each column of pixels
        >>> values, directions = principal_directions(left, torch.rand(8, 1, 8, 8), "translation", normalise="input",
        ...     resampling=lm.Resampling(padding="circular"))
        >>> directions.round().abs().tolist()  # a shift along y is not seen
        [[0.0, 1.0], [1.0, 0.0]]
    """
    _validate_normalise(normalise)
    asked = resolve(generators)
    _, both = _measure(_gram_and_energy, "lee", model, images, asked, options)
    return _principal_directions(both[0], both[1], asked, normalise)
