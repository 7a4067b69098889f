"""Metrics of finite transforms. Those with the same orbits and options share one pass in a MetricCollection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lie_metric.figures import Curve
from lie_metric.functional.finite_transforms import (
    Reference,
    consistency,
    default_curve,
    default_shifts,
    finite_transforms_update,
    finite_transforms_validate,
)
from lie_metric.functional.orbit_sums import STATISTICS, SUMS, Loss, finite_transforms_compute, spreads
from lie_metric.functional.sums import MOMENTS, Replicates, Sums, defined, spread
from lie_metric.metrics.base import ModelMetric
from lie_metric.metrics.local_equivariance import LocalEquivarianceError
from lie_metric.options import Function, Layout, Options, Output
from lie_metric.orbits import Border, DisplacedOrbit, Orbits, RandomOrbit
from lie_metric.representations import Representation
from lie_metric.resampling import Resampling

__all__ = [
    "FiniteEquivarianceError",
    "LatticeEquivarianceError",
    "OrbitVariance",
    "PredictionConsistency",
    "RelaxedEquivarianceError",
]


class _FiniteTransforms(ModelMetric):
    """What the metrics of finite transforms share; each reads its own measure off the same sums."""

    measure: str
    own: ClassVar[tuple[str, ...]] = ("orbits", "loss", "seed")

    def __init__(
        self,
        transforms: Orbits,
        *,
        output: Output = "logits",
        function: Function | None = None,
        input_representation: Layout | None = None,
        output_representation: Representation | None = None,
        resampling: Resampling | None = None,
        seed: int = 0,
        several: bool = False,
        **kwargs: Any,
    ) -> None:
        options = Options(output, function, input_representation, output_representation, resampling)
        asked = finite_transforms_validate(transforms, seed, options, several)
        super().__init__(
            dict.fromkeys(SUMS, (len(asked),))
            | {"size": ()}
            | MOMENTS
            | {f"frame_{name}": (len(asked), *shape) for name, shape in MOMENTS.items()},
            options,
            **kwargs,
        )
        self.orbits = asked
        self.seed = seed
        self.loss: Loss | None = None
        self.border: Border | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The orbits' names, in the order of all results."""
        return tuple(orbit.name for orbit in self.orbits)

    @property
    def parameter_units(self) -> tuple[str, ...]:
        """For each orbit of a stated displacement that, which fixes what the value is of."""
        return tuple(f"at {one.pixels:g} px" if isinstance(one, DisplacedOrbit) else "" for one in self.orbits)

    def statistics(self) -> Mapping[str, Callable[[Sums], Tensor]]:
        """The measure as a function of the sums."""
        return {self.measure: STATISTICS[self.measure][0]}

    def update(
        self,
        model: Callable[..., Any],
        images: Any,
        targets: Any = None,
        groups: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Adds a batch of images.

        Args:
            model: A module or callable, see :func:`~lie_metric.lie_derivative`.
            images: Shape (B, C, H, W), floating point and finite.
            targets: What the loss compares outputs with; only :class:`OrbitVariance` has one.
            groups: For each image an integer, alike for those that belong together, such as crops of one photo: the
                jackknife leaves them out as one, by the number modulo 64. By default images are independent.

        Raises:
            ValueError: If the outputs have another width than before.
        """
        indices = self._indices(images, groups, self.input_representation)
        sums, described, self.border, bound = finite_transforms_update(
            model, images, self.options, indices=indices, targets=targets, border=self.border, **self._own()
        )
        self._add(bound.inputs, indices, sums, described, bound.carrier)

    def compute(self) -> dict[str, Tensor]:
        """The measure of each orbit.

        Returns:
            For each orbit's name a float64 number of no axes.
        """
        return finite_transforms_compute(self._sums(), self.measure, self.names)

    def standard_error(self) -> dict[str, Tensor]:
        """The standard error over images of the measure, in its units.

        Returns:
            For each orbit's name a number; NaN for fewer than two images.
        """
        return dict(zip(self.names, self._errors(STATISTICS[self.measure][0]).unbind(), strict=True))


class FiniteEquivarianceError(_FiniteTransforms):
    r"""The error of finite transforms, in the spread of the output: a curve over the parameter.

    .. math:: EE(g) = \sqrt{ E_x \| \rho_2(g)^{-1} f(\rho_1(g) x) - f(x) \|^2 / 2\,\mathrm{Var} f }

    See :func:`lie_metric.functional.finite_equivariance_error`. One pass over the model for each element, and one more.

    Args:
        transforms: Orbits, see :func:`lie_metric.orbits.orbits`; the default is shifts along both axes, rotation and
            scale that move pixels by 1, 2 and 8 (:func:`lie_metric.orbits.displaced`).
        output: ``"logits"``, ``"probabilities"`` or a callable, see :func:`~lie_metric.lie_derivative`.
        function: See :func:`~lie_metric.lie_derivative`.
        input_representation: See :func:`~lie_metric.lie_derivative`. Transforms of one-parameter groups go through its
            ``act``; those that permute pixels through a method ``map``, see
            :func:`lie_metric.representations.map_grid`.
        output_representation: See :func:`~lie_metric.lie_derivative`; as for the inputs.
        resampling: The stencil; the default is ``Resampling()``.
        seed: Fixes the parameters of random orbits.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch, lie_metric as lm
        >>> metric = lm.FiniteEquivarianceError(lm.orbits.listed("rotation", (0.1, 0.2)))
        >>> metric.update(lambda x: x.mean((2, 3)), torch.rand(4, 1, 8, 8))
        >>> list(metric.compute()), list(metric.curves())
        (['rotation_0.1', 'rotation_0.2'], ['rotation'])
    """

    measure = "finite_equivariance_error"

    def __init__(self, transforms: Orbits | None = None, **kwargs: Any) -> None:
        super().__init__(default_curve() if transforms is None else transforms, **kwargs)

    def linearity(self, local: LocalEquivarianceError) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        r"""How much of the first order is left at a stated displacement, and its standard error over images.

        .. math:: \sqrt{ \sum_i \| \rho_2(g)^{-1} f(\rho_1(g) x_i) - f(x_i) \|^2 \Big/ t^2 \sum_i \|L_X f(x_i)\|^2 },
            \qquad g = \exp(t X)

        1 where the function is straight along the transform as far as that; trained networks are often at a few tenths
        after one pixel, and their Lie derivative then says how they bend at the image, not what a moved image meets.

        Args:
            local: Of the same model, over all images of the groups that were measured here.

        Returns:
            For each orbit of a stated displacement (:func:`lie_metric.orbits.displaced`) a number, and its error.

        Raises:
            ValueError: If there is no such orbit, a generator is missing in ``local``, or the images are others.

        Example:
            >>> import torch, lie_metric as lm
            >>> images, pixels = torch.rand(6, 1, 16, 16).double(), lm.orbits.displaced("rotation", (0.001,))
            >>> finite, local = lm.FiniteEquivarianceError(pixels), lm.LocalEquivarianceError("rotation")
            >>> for metric in (finite, local):
            ...     metric.update(lambda x: x.square().mean((2, 3)), images)
            >>> round(finite.linearity(local)[0]["rotation_0.001px"].item(), 1)
            1.0
        """
        moved = [(k, orbit) for k, orbit in enumerate(self.orbits) if isinstance(orbit, DisplacedOrbit)]
        missing = sorted({orbit.generator.name for _, orbit in moved} - set(local.names))
        if not moved or missing:
            raise ValueError(
                f"`local` must hold the generators of displaced orbits, got {local.names} without {missing}. Pass "
                "orbits by `orbits.displaced(generators)` and a metric of the same generators."
            )
        mine, theirs = [k for k, _ in moved], [local.names.index(orbit.generator.name) for _, orbit in moved]

        def read(sums: Sums, others: Sums) -> Replicates:
            used = sums["images"] > 0
            if not torch.equal(sums["hash"][used], others["hash"][used]):
                raise ValueError(
                    "`local` must have measured the images of the groups that were measured here, and no others of "
                    "them. Update both with the same images."
                )
            squared = sums["parameter"][used][:, mine].sum(0) / sums["images"].sum()
            joint = dict(sums)
            joint["first"] = squared * torch.where(used[:, None], others["violation"][:, theirs], 0.0)
            # A network that is run on smaller frames has outputs of another size there.
            return Replicates.of(
                joint,
                lambda s: ((s["violation"] / spreads(s))[..., mine] / (s["first"] / spread(s)[..., None])).sqrt(),
            )

        found = self._synced(lambda sums: local._synced(lambda others: read(sums, others)))
        names = [orbit.name for _, orbit in moved]
        reason = "the Lie derivative is zero, or outputs have no spread, as that of one image alone"
        value = defined(found.value, "linearity", names, reason, {"images": found.images.sum()})
        errors = found.standard_error()
        return dict(zip(names, value.unbind(), strict=True)), dict(zip(names, errors.unbind(), strict=True))

    def curves(self) -> dict[str, Curve]:
        """The listed parameters of each generator with their errors, for :func:`lie_metric.figures.error_curves`.

        Returns:
            For each generator's name a curve over t, or over pixels under a name that ends in "[px]"; random and
            lattice orbits have no place on one.
        """
        values, errors = self.compute(), self.standard_error()
        points: dict[str, list[tuple[float, float, float]]] = {}
        for orbit in self.orbits:
            if isinstance(orbit, DisplacedOrbit):
                point = (orbit.pixels, values[orbit.name].item(), errors[orbit.name].item())
                points.setdefault(f"{orbit.generator.name} [px]", []).append(point)
            if isinstance(orbit, RandomOrbit) and orbit.low == orbit.high and len(orbit.generators) == 1:
                point = (orbit.low[0], values[orbit.name].item(), errors[orbit.name].item())
                points.setdefault(orbit.generators[0].name, []).append(point)
        return {name: Curve(*(list(part) for part in zip(*sorted(rows), strict=True))) for name, rows in points.items()}


class LatticeEquivarianceError(_FiniteTransforms):
    """The error of transforms that permute pixels: quarter turns, flips, circular shifts. No interpolation.

    See :func:`lie_metric.functional.lattice_equivariance_error`.

    Args:
        transforms: Names ("rotate_90", "flips", "D4", "roll") or lattice transforms.
        kwargs: As in :class:`FiniteEquivarianceError`.

    Example:
        >>> import torch, lie_metric as lm
        >>> metric = lm.LatticeEquivarianceError("flips")
        >>> metric.update(lambda x: x.mean((2, 3)), torch.arange(128.0).reshape(8, 1, 4, 4))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'flip_horizontal': 0.0, 'flip_vertical': 0.0}
    """

    measure = "lattice_equivariance_error"

    def __init__(self, transforms: Orbits = "D4", **kwargs: Any) -> None:
        super().__init__(transforms, **kwargs)


class PredictionConsistency(_FiniteTransforms):
    """The probability that the predicted class stays the same under a transform.

    See :func:`lie_metric.functional.prediction_consistency` (Zhang 2019; Azulay & Weiss 2019). 1 is best; a constant
    prediction is perfectly consistent.

    Args:
        transforms: Orbits; the default is random shifts by up to an eighth of the image and rotations by up to 15°.
        reference: What a transformed image is compared with: the "image" as it is, or, in "pairs", another transform.
        kwargs: As in :class:`FiniteEquivarianceError`.

    Raises:
        ValueError: If the reference is unknown, or "pairs" is asked of an orbit of one element.

    Example:
        >>> import torch, lie_metric as lm
        >>> metric = lm.PredictionConsistency()
        >>> metric.update(lambda x: torch.stack([x.mean((1, 2, 3)), x.amin((1, 2, 3))], 1), torch.rand(4, 1, 8, 8))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'translation_within_0.25': 1.0, 'rotation_within_0.2618': 1.0}
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, transforms: Orbits | None = None, *, reference: Reference = "image", **kwargs: Any) -> None:
        measure = consistency(reference)
        chosen = default_shifts() if transforms is None else transforms
        super().__init__(chosen, several=reference == "pairs", **kwargs)
        self.reference = reference
        self.measure = measure


class OrbitVariance(_FiniteTransforms):
    """How much an output varies along the orbit of an image, and with a loss, which part of the loss that is.

    See :func:`lie_metric.functional.orbit_variance`. With a loss, pass the targets to :meth:`update`.

    Args:
        transforms: Orbits of at least two elements; the default is that of :class:`PredictionConsistency`.
        loss: From outputs (B, ...) and targets to one number for each image; given one, the share is computed.
        kwargs: As in :class:`FiniteEquivarianceError`.

    Raises:
        ValueError: If an orbit has one element.

    Example:
        >>> import torch, lie_metric as lm
        >>> metric = lm.OrbitVariance()
        >>> metric.update(lambda x: x.new_ones(len(x), 2), torch.rand(4, 1, 8, 8))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'translation_within_0.25': 0.0, 'rotation_within_0.2618': 0.0}
    """

    def __init__(self, transforms: Orbits | None = None, *, loss: Loss | None = None, **kwargs: Any) -> None:
        if loss is not None and not callable(loss):
            raise TypeError(
                f"`loss` must be a callable or None, got {loss!r}. Pass e.g. "
                "`torch.nn.CrossEntropyLoss(reduction='none')`."
            )
        super().__init__(default_shifts() if transforms is None else transforms, several=True, **kwargs)
        self.loss = loss
        self.measure = "orbit_variance" if loss is None else "orbit_variance_share"


class RelaxedEquivarianceError(_FiniteTransforms):
    """The mean distance between the output of a transformed image and the transformed output, E' of REMUL.

    See :func:`lie_metric.functional.relaxed_equivariance_error` (Elhag et al. 2024).

    Args:
        transforms: Orbits; the default is that of :class:`PredictionConsistency`.
        normalise: Whether to divide by the mean norm of the output; it may be set later too, also after images.
        kwargs: As in :class:`FiniteEquivarianceError`.

    Example:
        >>> import torch, lie_metric as lm
        >>> metric = lm.RelaxedEquivarianceError("flip_horizontal", normalise=True)
        >>> metric.update(lambda x: x[:, 0, 0, :1], torch.tensor([1.0, 3.0]).expand(2, 1, 2, 2))
        >>> metric.compute()["flip_horizontal"].item()
        2.0
    """

    def __init__(self, transforms: Orbits | None = None, *, normalise: bool = False, **kwargs: Any) -> None:
        super().__init__(default_shifts() if transforms is None else transforms, **kwargs)
        self.normalise = normalise

    @property
    def normalise(self) -> bool:
        """Whether :meth:`compute` divides by the mean norm of the output."""
        return self.measure.endswith("_normalised")

    @normalise.setter
    def normalise(self, normalise: bool) -> None:
        self.measure = "relaxed_equivariance_error" + ("_normalised" if normalise else "")
