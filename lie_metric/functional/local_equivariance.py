"""Measures on Lie derivatives: mean square, relative to the output's spread, relative to noise, and the Gram matrix.

All of them, and their standard errors, are functions of the same sums over images. The sums are kept for groups of
images; leaving out one group at a time gives the standard error of any such function (the jackknife).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lie_metric.algebra import Generator
from lie_metric.binding import Generators, by_samples, count_samples, resolve_for, sample_count, split_parts
from lie_metric.functional.local_statistics import (
    ONE_PART,
    STATISTICS,
    Normalise,
    directions_of,
    gram_and_energy,
    gram_of,
    validate_normalise,
    value_of,
)
from lie_metric.functional.noise import like_tangents
from lie_metric.functional.sums import Sums, grouped, moments
from lie_metric.lie import Linearisation, linearise
from lie_metric.options import Layout, Options, Output
from lie_metric.randomness import validate_seed
from lie_metric.representations import Invariant, Representation
from lie_metric.resampling import coordinate_dtype

__all__ = [
    "LeeOutput",
    "Measure",
    "gram",
    "lee",
    "local_equivariance_update",
    "local_equivariance_validate",
    "principal_directions",
    "relative",
    "rms",
    "sensitivity",
    "value_names",
]

Measure = Literal["relative", "lee", "rms", "sensitivity"]
LeeOutput = Literal["output", "probabilities", "auto"]


def local_equivariance_validate(
    generators: Generators, measure: Measure, lee_output: LeeOutput, seed: int, options: Options
) -> tuple[Generator, ...]:
    """The generators asked for, if every option has a meaning."""
    if measure not in get_args(Measure):
        raise ValueError(f"`measure` must be one of {get_args(Measure)}, got {measure!r}.")
    if lee_output not in get_args(LeeOutput):
        raise ValueError(f"`lee_output` must be one of {get_args(LeeOutput)}, got {lee_output!r}.")
    validate_seed(seed)
    return resolve_for(generators, options.input_representation)


def local_equivariance_update(
    model: Callable[..., Any],
    images: Any,
    options: Options,
    *,
    generators: Sequence[Generator],
    indices: Sequence[int],
    lee_output: LeeOutput = "output",
    with_noise: bool = False,
    seed: int = 0,
    known: str | None = None,
    verify: bool = True,
) -> tuple[dict[str, Tensor], Linearisation]:
    """The sums of a batch; ``indices`` are the images' running numbers, which fix their groups and their noise."""

    def noise(tangents: Tensor, carrier: Representation) -> Tensor:
        return like_tangents(tangents, carrier, indices, seed)

    with torch.no_grad():
        further = noise if with_noise else None
        result = linearise(model, images, generators, options, further=further, known=known, verify=verify)
        sums = _sum(result, indices, lee_output, options.output)
    return sums, result


def _sum(result: Linearisation, indices: Sequence[int], lee_output: LeeOutput, output: Output) -> dict[str, Tensor]:
    wide, device = coordinate_dtype(result.output.device), result.output.device
    values = split_parts(result.representation, result.output)
    changes = split_parts(result.representation, result.lie_derivatives)
    further = [None] * len(values) if result.further is None else split_parts(result.representation, result.further)
    parts = []
    for (name, representation, f), (_, _, L), noise in zip(values, changes, further, strict=True):
        count = count_samples(representation, f)
        if count != len(indices):
            raise ValueError(
                f"`output{f'[{name!r}]' if name else ''}` must have one entry for each of the {len(indices)} images or "
                f"samples on its first axis, got shape {tuple(f.shape)}. Select or reshape it with `output=`, or say "
                "where each belongs, e.g. `Packed(..., 'batch')`."
            )
        on_probabilities = _as_probabilities(f, representation, lee_output, output, name)
        rows = _rows(f, L, None if noise is None else noise[2], representation, on_probabilities)
        parts.append(grouped(rows | moments(f, representation), indices))
    sums = _stacked(parts) if values[0][0] else parts[0]
    energies = [moved @ moved.mT / moved.shape[2] for moved in _wide(by_samples(result.carrier, result.tangents), wide)]
    sums["energy"] = grouped({"energy": torch.cat(energies)}, indices)["energy"]
    if result.further is None:
        sums["noise"] = torch.zeros_like(sums["violation"])
    sums["rounding"] = torch.tensor(torch.finfo(result.output.dtype).eps, dtype=wide, device=device)
    return sums


def _wide(rows: Iterable[Tensor], wide: torch.dtype) -> Iterator[Tensor]:
    # Squares are taken in float64, of a few samples at a time: large outputs would fill the memory twice.
    return (row.to(wide) for row in rows)


def _as_probabilities(f: Tensor, representation: Representation, lee_output: str, output: Output, name: str) -> bool:
    """Whether LEE is that of the softmax of the output."""
    scores = isinstance(representation, Invariant) and f.ndim == 2 and f.shape[1] > 1 and not name
    if lee_output == "probabilities" and not scores:
        raise ValueError(
            f"`lee_output` must be 'output' unless the output is a batch of class scores (B, C), got an output of "
            f"shape {tuple(f.shape)} that acts as {representation!r}."
        )
    return lee_output == "probabilities" or (lee_output == "auto" and scores and output == "logits")


def _rows(
    f: Tensor, changes: Tensor, further: Tensor | None, representation: Representation, on_probabilities: bool
) -> dict[str, Tensor]:
    """For each sample the squares of its Lie derivatives, their products, and what noise does."""
    wide = coordinate_dtype(f.device)
    rows: dict[str, list[Tensor]] = {"gram": [], "violation": []}
    place = 0
    for L in _wide(by_samples(representation, changes), wide):
        rows["violation"].append(L.square().sum(2))
        if on_probabilities:
            p = f[place : place + len(L)].to(wide).softmax(-1)[..., None]
            L = p.mT * (L - L @ p)
        rows["gram"].append(L @ L.mT / L.shape[2])
        place += len(L)
    if further is not None:
        rows["noise"] = [each.square().sum(2) for each in _wide(by_samples(representation, further), wide)]
    return {name: torch.cat(values) for name, values in rows.items()}


def _stacked(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sums of all parts of an output on an axis behind that of groups; those of images are the same."""
    found = {"images": parts[0]["images"]}
    for name in parts[0].keys() - {"images"}:
        values = [part[name] for part in parts]
        if name in {"total", "weight"}:
            width = max(1, *(value.shape[-1] for value in values))
            values = [torch.nn.functional.pad(value, (0, width - value.shape[-1])) for value in values]
        found[name] = torch.stack(values, dim=1)
    return found


def _measure(
    statistic: Callable[[Sums], Tensor],
    measure: Measure,
    model: Callable[..., Any],
    images: Tensor,
    generators: Generators,
    options: Mapping[str, Any],
) -> tuple[tuple[str, ...], Tensor]:
    """The generators' names and a statistic of one batch: validate, update, compute."""
    lee_output, seed = options.get("lee_output", "output"), options.get("seed", 0)
    shared = {name: value for name, value in options.items() if name not in {"lee_output", "seed"}}
    chosen = Options.of(shared, beside=("lee_output", "seed"))
    asked = local_equivariance_validate(generators, measure, lee_output, seed, chosen)
    names = value_names(asked, chosen.output_representation)
    sums, _ = local_equivariance_update(
        model,
        images,
        chosen,
        generators=asked,
        indices=range(sample_count(images, chosen.input_representation)),
        lee_output=lee_output,
        with_noise=measure == "sensitivity",
        seed=seed,
    )
    return names, value_of(sums, statistic, measure, names)


def value_names(asked: Sequence[Generator], output_representation: Layout | None) -> tuple[str, ...]:
    """What values are called: by their generators, behind ``"part/"`` for outputs with named parts.

    Args:
        asked: The generators.
        output_representation: How outputs move.

    Returns:
        The names, part after part.

    Example:
        >>> from lie_metric.representations import Invariant
        >>> value_names(resolve_for("translation", None), {"energy": Invariant()})
        ('energy/translation_x', 'energy/translation_y')
    """
    parts = [f"{part}/" for part in output_representation] if isinstance(output_representation, Mapping) else [""]
    return tuple(part + generator.name for part in parts for generator in asked)


def _by_name(measure: Measure, *arguments: Any) -> dict[str, Tensor]:
    names, values = _measure(STATISTICS[measure], measure, *arguments)
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


def rms(
    model: Callable[..., Any], images: Tensor, generators: Generators = "affine", **options: Any
) -> dict[str, Tensor]:
    r"""The root mean square of the Lie derivative over images and entries of the output, the root of :func:`lee`.

    .. math:: \mathrm{rms}_X = \sqrt{ E_x \| L_X f(x) \|^2 / \dim f }

    In units of the output per unit of t: eV/rad for an energy, eV/Å/rad for the components of forces. As :func:`lee` it
    does not compare networks with one another.

    Args:
        model: As in :func:`lie_metric.lie_derivative`.
        images: Shape (B, C, H, W).
        generators: As in :func:`lie_metric.lie_derivative`.
        options: As in :func:`lee`.

    Returns:
        For each generator's name a number of no axes.

    Example:
        >>> import torch
        >>> brightness = lambda x: 3 * x.mean((1, 2, 3))
        >>> round(rms(brightness, torch.ones(4, 1, 8, 8), "saturation")["saturation"].item(), 6)
        3.0
    """
    return _by_name("rms", model, images, generators, options)


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
    return _measure(gram_of, "lee", model, images, generators, options)[1]


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
    validate_normalise(normalise)
    if isinstance(options.get("output_representation"), Mapping):
        raise ValueError(ONE_PART)
    _, both = _measure(gram_and_energy, "lee", model, images, generators, options)
    asked = resolve_for(generators, options.get("input_representation"))
    return directions_of(both[0], both[1], asked, normalise)
