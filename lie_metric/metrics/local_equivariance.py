"""The local equivariance error as a torchmetrics Metric."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MethodType
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lie_metric.binding import Generators, moved_parts, on_grid
from lie_metric.figures import unit_of
from lie_metric.functional.local_equivariance import (
    LeeOutput,
    Measure,
    local_equivariance_update,
    local_equivariance_validate,
    value_names,
)
from lie_metric.functional.local_statistics import (
    ONE_PART,
    STATISTICS,
    Normalise,
    directions_of,
    gram_and_energy,
    gram_of,
    local_equivariance_compute,
    validate_normalise,
    value_of,
)
from lie_metric.functional.stencil_error import tell_of_rough_stencil
from lie_metric.functional.sums import MOMENTS, Sums, standard_error
from lie_metric.jacobian import Check, Method
from lie_metric.lie import Linearisation
from lie_metric.measured import described
from lie_metric.metrics.arguments import told_apart
from lie_metric.metrics.base import ModelMetric, variance
from lie_metric.options import Function, Layout, Options, Output
from lie_metric.representations import Image, grid_size
from lie_metric.resampling import Resampling
from lie_metric.running import configuration
from lie_metric.transforms import pixels_per_unit

__all__ = ["LocalEquivarianceError", "Units"]

Units = Literal["t", "pixel"]


class LocalEquivarianceError(ModelMetric):
    r"""Lie derivatives of a model, summarised over images: relative, mean square, against noise, and their Gram matrix.

    One pass over the images gives every measure, each with its standard error (grouped jackknife over images):

    - :meth:`relative`: :math:`\sqrt{\sum\|L_X f\|^2 / \sum\|f - E f\|^2}`, output standard deviations per unit of t;
    - :meth:`lee`: :math:`E\|L_X f\|^2 / \dim f` (Gruver et al. 2023, Eq. 4);
    - :meth:`rms`: its root, in units of the output per unit of t, such as eV/rad;
    - :meth:`sensitivity`: :math:`\sqrt{E\|L_X f\|^2 / E\|Df\,u\|^2}`, u noise with the spectrum of X·x, if asked for;
    - :attr:`gram`: :math:`G_{ij} = E\langle L_i f, L_j f\rangle / \dim f`, from which :meth:`directional` and
      :meth:`principal_directions` follow.

    The model is passed to :meth:`update`, measured in evaluation mode and left as it was found; it is never stored. All
    states are float64 sums, so values over several processes are those of one process over the same images.

    Convention:
        Isotropic coordinates centred at the image centre, x right, y down; units of t: half of the shorter side
        (translation) and its inverse (perspective), radian, rapidity, log factor, slope. 0 means equivariance to first
        order at these images. A value is bound to its stencil; a lower raw ``lee`` does not rank networks.

    Args:
        generators: Names, groups, :class:`~lie_metric.Generator` objects, or a sequence of them; K in all.
        measure: Which measure :meth:`compute` returns: ``"relative"``, ``"lee"``, ``"rms"`` or
            ``"sensitivity"``.
        output: ``"logits"``, ``"probabilities"`` or a callable, see :func:`~lie_metric.lie_derivative`.
        function: What of the model is run, see :func:`~lie_metric.lie_derivative`.
        lee_output: What :meth:`lee` and :attr:`gram` are of: ``"output"``, the same output; ``"probabilities"``, the
            softmax of it, within the same pass; ``"auto"``, the softmax if the output is a batch of class scores
            (B, C > 1) as the model returns them, the output otherwise.
        input_representation: See :func:`~lie_metric.lie_derivative`.
        output_representation: See :func:`~lie_metric.lie_derivative`.
        resampling: The stencil; the default is ``Resampling()``.
        method: See :func:`~lie_metric.lie_derivative`.
        chunk_size: See :func:`~lie_metric.lie_derivative`.
        with_noise: Whether the noise that :meth:`sensitivity` needs is pushed along, as many tangents again; by default
            if ``measure`` is ``"sensitivity"``.
        seed: Fixes the noise images.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Attributes:
        method_used: The method by which the products with the Jacobian were taken; None before the first update.
        check: How these compared with the function itself, at the first update with a model; None before.
        described: As in every metric, the shape of the output, how it transforms and why that is thought.

    Example:
        >>> import torch, lie_metric as lm
        >>> metric = lm.LocalEquivarianceError(("rotation", "saturation"))
        >>> brightness = lambda x: x.mean((1, 2, 3))
        >>> metric.update(brightness, torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 8, 8))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'rotation': 0.0, 'saturation': 1.5811}
        >>> metric.lee()["saturation"].item()
        5.0
    """

    own: ClassVar[tuple[str, ...]] = ("generators", "lee_output", "with_noise", "seed")

    def __init__(
        self,
        generators: Generators = "affine",
        measure: Measure = "relative",
        *,
        output: Output = "logits",
        function: Function | None = None,
        lee_output: LeeOutput = "output",
        input_representation: Layout | None = None,
        output_representation: Layout | None = None,
        resampling: Resampling | None = None,
        method: Method = "auto",
        chunk_size: int | None = None,
        with_noise: bool | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        options = Options(output, function, input_representation, output_representation, resampling, method, chunk_size)
        asked = local_equivariance_validate(generators, measure, lee_output, seed, options)
        with_noise = measure == "sensitivity" if with_noise is None else with_noise
        if measure == "sensitivity" and not with_noise:
            raise ValueError("`with_noise` must be True when `measure` is 'sensitivity', got False.")
        count = len(asked)
        parts = (len(output_representation),) if isinstance(output_representation, Mapping) else ()
        of_parts = {"gram": (count, count), "violation": (count,), "noise": (count,)} | MOMENTS
        shapes = {name: (*parts, *shape) for name, shape in of_parts.items()} | {"energy": (count, count)}
        super().__init__(shapes, options, **kwargs)
        self.generators = asked
        self.measure = measure
        self.lee_output = lee_output
        self.with_noise = with_noise
        self.seed = seed
        self.method_used: str | None = None
        self.check: Check | None = None
        self._verified: tuple[Callable[[], Any], str] | None = None
        self._expected: str | None = None
        self._told = False

    @property
    def names(self) -> tuple[str, ...]:
        """The generators' names, in the order of all results; behind ``"part/"`` for outputs with named parts."""
        return value_names(self.generators, self.output_representation)

    @property
    def parameter_units(self) -> tuple[str, ...]:
        """For each generator the unit of t."""
        pixels = on_grid(self.input_representation)
        return tuple(unit_of(name.split("/")[-1], pixels=pixels) for name in self.names)

    def statistics(self) -> Mapping[str, Callable[[Sums], Tensor]]:
        """Every measure as a function of the sums; ``"sensitivity"`` only of a metric with noise."""
        return {name: value for name, value in STATISTICS.items() if name != "sensitivity" or self.with_noise}

    def update(self, model: Callable[..., Any], images: Any, groups: Sequence[int] | Tensor | None = None) -> None:
        """Adds a batch of images, or of what else the model takes.

        Args:
            model: A module or callable, see :func:`~lie_metric.lie_derivative`.
            images: Shape (B, C, H, W), floating point and finite; or the inputs that ``input_representation`` is of.
            groups: For each image an integer, alike for those that belong together, such as crops of one photo: the
                jackknife leaves them out as one, by the number modulo 64. By default images are independent.

        Raises:
            ValueError: If the outputs have another width than before.
        """
        indices = self._indices(images, groups, self.input_representation)
        # A method that was found right for this model and these options is kept; anything else is probed anew.
        setting = ""
        if indices:
            moved = moved_parts(images, self.input_representation)
            kinds = [(name, part.shape[1:], part.dtype, part.device) for name, part in moved.items()]
            setting = told_apart([*self._given_options().items(), kinds, configuration(model)])
        known = self._verified is not None and _same(self._verified[0](), model) and self._verified[1] == setting
        sums, result = self._by_what_is_expected(model, images, indices, known)
        if not self._told and on_grid(self.input_representation):
            self._told = True
            tell_of_rough_stencil(result.inputs, result.carrier, self.generators, self.resampling)
        told = described(result.output, result.representation, self.output_representation, self.output)
        self._add(result.inputs, indices, sums, told, result.carrier)
        if not known:
            self.method_used, self.check = result.method, result.check
            self._verified = _remembered(model, setting)

    def _by_what_is_expected(
        self, model: Callable[..., Any], images: Any, indices: Sequence[int], known: bool
    ) -> tuple[dict[str, Tensor], Linearisation]:
        """The sums of a batch, by the method that was right for an earlier state of the model if it still is."""
        measured = partial(
            local_equivariance_update, model, images, self.options, indices=indices, verify=not known, **self._own()
        )
        if not known and self._expected is not None and self.options.method == "auto":
            with suppress(RuntimeError):  # the model has changed: all methods have their turn
                return measured(known=self._expected)
        return measured(known=self.method_used if known else None)

    def reset(self) -> None:
        """Forgets all images, and what was found out about the model."""
        super().reset()
        if not getattr(self, "_continuing", False):
            self.method_used = self.check = self._verified = self._expected = None

    def expect(self, earlier: LocalEquivarianceError) -> None:
        """Begins with the method that another metric found to be right, which is checked again.

        Args:
            earlier: A metric of an earlier state of the same model.
        """
        self._expected, self._told = earlier.method_used, earlier._told

    def __getstate__(self) -> dict[str, Any]:
        # Which object was verified means nothing to a copy of it.
        return super().__getstate__() | {"_verified": None}

    def compute(self) -> dict[str, Tensor]:
        """The chosen measure of each generator.

        Returns:
            For each generator's name a float64 number of no axes.
        """
        self._needs_noise(self.measure)
        return local_equivariance_compute(self._sums(), self._chosen(None), self.names)

    def _named(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, values.unbind(), strict=True))

    def _needs_one_part(self) -> None:
        if isinstance(self.output_representation, Mapping):
            raise ValueError(ONE_PART)

    def _needs_noise(self, measure: str) -> None:
        if measure == "sensitivity" and not self.with_noise:
            raise ValueError("`with_noise` must be True to read the sensitivity, got False. Set it when constructing.")

    def relative(self, units: Units = "t", spread_from: ModelMetric | None = None) -> dict[str, Tensor]:
        """Output standard deviations per unit of t, see :func:`lie_metric.functional.relative`.

        Args:
            units: ``"t"``, or ``"pixel"``: per pixel of displacement, the root mean square over the frame. Units of t
                are parts of the image, and compare images of one size alone; pixels compare sizes.
            spread_from: Another metric, the standard deviation of whose outputs is the unit: that of a larger set of
                images, say, or of the model that others are compared with.

        Returns:
            For each generator's name a float64 number of no axes.

        Raises:
            ValueError: If a generator moves no pixels, images of several sizes were measured, or the other metric has
                no spread or is of another output.
        """
        scale, unit = self._scale(units), self._external(spread_from)
        value = self._synced(lambda sums: value_of(sums, STATISTICS["relative"], "relative", self.names) * unit(sums))
        return self._named(value * scale.to(value))

    def lee(self, units: Units = "t") -> dict[str, Tensor]:
        """The mean square of the Lie derivative, see :func:`lie_metric.functional.lee`.

        Args:
            units: As in :meth:`relative`; per squared pixel.

        Returns:
            For each generator's name a float64 number of no axes.
        """
        scale = self._scale(units)
        value = self._synced(lambda sums: value_of(sums, STATISTICS["lee"], "lee", self.names))
        return self._named(value * scale.to(value).square())

    def rms(self, units: Units = "t") -> dict[str, Tensor]:
        """The root mean square of the Lie derivative, see :func:`lie_metric.functional.rms`.

        Args:
            units: As in :meth:`relative`.

        Returns:
            For each generator's name a float64 number of no axes.
        """
        scale = self._scale(units)
        value = self._synced(lambda sums: value_of(sums, STATISTICS["rms"], "rms", self.names))
        return self._named(value * scale.to(value))

    def _scale(self, units: Units) -> Tensor:
        """What values per unit of t are multiplied by."""
        if units not in get_args(Units):
            raise ValueError(f"`units` must be one of {get_args(Units)}, got {units!r}.")
        if units == "t":
            return torch.ones(len(self.names), dtype=torch.float64)
        if self.input_shape is None:
            raise ValueError(
                f"`units` must be 't' unless all images are of one size, got {sorted(self.input_shapes)}. Use one "
                "metric for each size."
            )
        if isinstance(self.input_representation, Mapping):
            raise ValueError("`units` must be 't' for inputs with named parts, got 'pixel'. They have no pixels.")
        size = grid_size(self.input_representation or Image(), torch.zeros(1, *self.input_shape))
        spacing = getattr(self.input_representation, "spacing", ())
        moved = [pixels_per_unit(generator, size, self.resampling, spacing) for generator in self.generators]
        if not all(moved):
            still = [one.name for one, pixels in zip(self.generators, moved, strict=True) if not pixels]
            raise ValueError(f"`units` must be 't' for generators that move no pixels, got 'pixel' for {still}.")
        parts = len(self.names) // len(moved)  # of an output, one after the other
        return 1 / torch.tensor(moved, dtype=torch.float64).repeat(parts)

    def _external(self, other: ModelMetric | None) -> Callable[[Sums], Tensor | float]:
        """What values in this metric's standard deviation are multiplied by."""
        if other is None:
            return lambda sums: 1.0
        theirs, width = other.output_variance(), other._state("total").shape[-1] if "total" in other._names else 0
        if not bool(torch.isfinite(theirs)) or width != self._state("total").shape[-1]:
            raise ValueError(
                f"`spread_from` must be a metric of outputs of {self._state('total').shape[-1]} means that vary, got "
                f"{type(other).__name__} with {width}. Pass one that has measured the same kind of output."
            )
        return lambda sums: (variance(sums) / theirs).sqrt()

    def sensitivity(self) -> dict[str, Tensor]:
        """The response over that to noise, see :func:`lie_metric.functional.sensitivity`.

        Raises:
            ValueError: If the metric was made without noise.
        """
        self._needs_noise("sensitivity")
        return self._synced(lambda sums: local_equivariance_compute(sums, "sensitivity", self.names))

    def standard_error(self, measure: Measure | None = None, units: Units = "t") -> dict[str, Tensor]:
        """The standard error over images of a measure, in the measure's units.

        Args:
            measure: The measure; the default is the one of :meth:`compute`.
            units: As in :meth:`relative`.

        Returns:
            For each generator's name a number; NaN for fewer than two images.

        Raises:
            ValueError: If the measure is unknown, or needs noise and the metric was made without.
        """
        chosen = self.measure if measure is None else measure
        if chosen not in STATISTICS:
            raise ValueError(f"`measure` must be one of {sorted(STATISTICS)}, got {chosen!r}.")
        self._needs_noise(chosen)
        errors = self._errors(STATISTICS[chosen])
        scale = self._scale("t" if chosen == "sensitivity" else units).to(errors)
        return self._named(errors * (scale.square() if chosen == "lee" else scale))

    def measures(self) -> dict[str, dict[str, Tensor]]:
        """Every measure and its standard error, synchronised over processes once.

        Returns:
            ``{"relative": {name: value}, "relative_standard_error": {name: value}, "lee": ..., ...}``.
        """
        available = [name for name in STATISTICS if name != "sensitivity" or self.with_noise]

        def read(sums: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
            found = {}
            for name in available:
                found[name] = local_equivariance_compute(sums, name, self.names)
                found[f"{name}_standard_error"] = self._named(standard_error(sums, STATISTICS[name]))
            return found

        return self._synced(read)

    @property
    def gram(self) -> Tensor:
        """The Gram matrix of the Lie derivatives, (K, K): see :func:`lie_metric.functional.gram`.

        Raises:
            ValueError: If the output has several parts.
        """
        self._needs_one_part()
        return self._synced(lambda sums: value_of(sums, gram_of, "lee", self.names))

    def directional(self, coefficients: Sequence[float] | Tensor) -> Tensor:
        """The LEE of the linear combination of generators with the given coefficients, cᵀGc.

        Args:
            coefficients: K numbers, in the order of :attr:`names`; shape (..., K).

        Returns:
            Shape (...), in squared output units per squared unit of t.

        Raises:
            ValueError: If there are not K coefficients.
        """
        matrix = self.gram
        vector = torch.as_tensor(coefficients, dtype=matrix.dtype, device=matrix.device)
        if vector.ndim == 0 or vector.shape[-1] != len(self.names):
            raise ValueError(
                f"`coefficients` must hold {len(self.names)} numbers, one for each of {self.names}, got shape "
                f"{tuple(vector.shape)}."
            )
        return ((vector @ matrix) * vector).sum(-1)

    def principal_directions(self, normalise: Normalise | None = None) -> tuple[Tensor, Tensor]:
        """The combinations of generators that the model violates least and most.

        See :func:`lie_metric.functional.principal_directions`; draw one with :func:`lie_metric.figures.vector_field`.

        Args:
            normalise: None for the eigenvalues of :attr:`gram`, LEE of unit combinations; "input" for squared gains,
                mean squares of the Lie derivative over those of the change of the input.

        Returns:
            The eigenvalues, ascending, shape (R,), one for each dimension that the generators span; and unit vectors of
            coefficients, in the order of :attr:`names`, as rows, shape (R, K).

        Raises:
            ValueError: If ``normalise`` is neither.
        """
        validate_normalise(normalise)
        self._needs_one_part()
        gram, energy = self._synced(lambda sums: value_of(sums, gram_and_energy, "lee", self.names))
        return directions_of(gram, energy, self.generators, normalise)


def _remembered(model: Callable[..., Any], setting: str) -> tuple[Callable[[], Any], str] | None:
    """The model by a reference that does not keep it alive; None if there are none to such an object."""
    try:
        found = weakref.WeakMethod(model) if isinstance(model, MethodType) else weakref.ref(model)
    except TypeError:
        return None
    return found, setting


def _same(one: object, other: object) -> bool:
    """Whether two models are one object; a bound method is made anew whenever it is asked for."""
    return one is other or (isinstance(other, MethodType) and one == other)
