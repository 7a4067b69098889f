"""How fast quantities change along a model's own flow: conservation, the mirror image of equivariance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lie_metric.functional.local_equivariance import local_equivariance_update
from lie_metric.functional.local_statistics import local_equivariance_compute
from lie_metric.lie import Linearisation
from lie_metric.measured import function_of, validate_inputs
from lie_metric.options import Options
from lie_metric.representations import Flow, Invariant
from lie_metric.running import isolated

__all__ = ["Quantity", "conservation_error", "conservation_update", "conservation_validate"]

Quantity = Callable[[Tensor], Tensor]


class _Along:
    """Quantities of states, with the model along whose flow they are followed: both are run in one isolation."""

    def __init__(self, model: Any, quantities: Mapping[str, Quantity]) -> None:
        self.model, self.quantities = model, quantities

    def __call__(self, states: Tensor) -> dict[str, Tensor]:
        """Each quantity, (B,) or (B, 1)."""
        found = {}
        for name, quantity in self.quantities.items():
            value = quantity(states)
            if not isinstance(value, Tensor) or value.shape not in {states.shape[:1], (len(states), 1)}:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"`quantities[{name!r}]` must return one number for each of the {len(states)} states, got {got}. "
                    "Give each component of a vector, such as a momentum, a name of its own."
                )
            found[name] = value
        return found


def conservation_validate(quantities: Mapping[str, Quantity]) -> dict[str, Quantity]:
    """The quantities by name, if they have a meaning."""
    if not isinstance(quantities, Mapping) or not quantities or not all(map(callable, quantities.values())):
        raise TypeError(
            f"`quantities` must map names to functions of states, got {quantities!r}. Pass e.g. "
            "{'energy': lambda state: ...}."
        )
    found = dict(quantities)
    Options(output_representation=dict.fromkeys(found, Invariant()))  # refuses names that loggers would cut
    return found


def conservation_update(
    model: Callable[..., Any],
    states: Tensor,
    options: Options,
    *,
    quantities: Mapping[str, Quantity],
    indices: Sequence[int],
) -> tuple[dict[str, Tensor], Linearisation]:
    """The sums of a batch, and what they were made of."""
    if not isinstance(states, Tensor):
        raise TypeError(
            f"`states` must be one tensor (B, ...), got {type(states).__name__}. Put places and momenta side by side "
            "on the last axis, and let `function=` take them apart for the model."
        )
    validate_inputs(model, states, Invariant(), options.function)
    with torch.no_grad(), isolated(model):
        rates = function_of(model, options.output, options.function)(states.clone()).detach()
        if rates.shape != states.shape:
            raise ValueError(
                f"`model` must return the rate of change of the state, of shape {tuple(states.shape)}, got "
                f"{tuple(rates.shape)}. Select it with `output=`, or say what is called with `function=`."
            )
    flow = Flow({"time": lambda _: rates})
    along = Options(
        input_representation=flow,
        output_representation=dict.fromkeys(quantities, Invariant()),
        method=options.method,
        chunk_size=options.chunk_size,
    )
    return local_equivariance_update(
        _Along(model, quantities), states, along, generators=flow.generators, indices=indices
    )


def conservation_error(
    model: Callable[..., Any], states: Tensor, quantities: Mapping[str, Quantity], **options: Any
) -> dict[str, Tensor]:
    r"""How fast quantities change along a model's flow, in their standard deviations per unit of time.

    .. math:: c_J = \sqrt{ \frac1n \sum_i (dJ(x_i)[F(x_i)])^2 \Big/ \frac{1}{n-1} \sum_i (J(x_i) - E J)^2 }

    for a model F that gives the rate of change of the state. It is :func:`relative` of J along F, so it does not depend
    on J's scale or zero. 0: the model conserves J at these states. Of a Hamiltonian flow it is, by Noether's theorem,
    the error of the Hamiltonian along the symmetry that J generates; other models, such as neural ODEs, may be
    equivariant and conserve nothing. The drift of an integrator comes on top.

    Args:
        model: From states to their rates of change, or what ``function`` and ``output`` make that of.
        states: Shape (B, ...), at least two.
        quantities: By name a function from states to one number for each, (B,) or (B, 1).
        options: ``output``, ``function``, ``method``, ``chunk_size`` as in :func:`lie_metric.lie_derivative`.

    Returns:
        For each quantity's name a number of no axes; NaN, with a warning, where it does not vary over the states.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the model returns another shape than that of the states, or a quantity more than a number.

    Example:
        >>> oscillator = lambda z: torch.stack([z[:, 1], -z[:, 0]], dim=1)
        >>> damped = lambda z: oscillator(z) - 0.1 * z
        >>> energy = {"energy": lambda z: z.square().sum(1) / 2}
        >>> z = torch.randn(50, 2, dtype=torch.float64)
        >>> bool(conservation_error(oscillator, z, energy)["energy"] < 1e-12)
        True
        >>> e = energy["energy"](z)  # of the damped one dE/dt = -0.2 E
        >>> ratio = (0.2 * e).square().mean().sqrt() / e.std()
        >>> bool(torch.isclose(conservation_error(damped, z, energy)["energy"], ratio))
        True
    """
    chosen = Options.of(options, without=("input_representation", "output_representation", "resampling"))
    named = conservation_validate(quantities)
    count = len(states) if isinstance(states, Tensor) and states.ndim else 0
    sums, _ = conservation_update(model, states, chosen, quantities=named, indices=range(count))
    return local_equivariance_compute(sums, "relative", list(named))
