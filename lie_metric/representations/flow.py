"""States that flow along vector fields of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lie_metric.algebra import Generator, named
from lie_metric.representations.affine import combined
from lie_metric.resampling import Resampling

__all__ = ["Flow"]


@dataclass(frozen=True, eq=False)
class Flow:
    """States (B, ...) that flow along given vector fields: X · x = F(x).

    Finite actions integrate the field by the classical Runge-Kutta method: exact to fourth order in the step, and no
    exact group. What is not a combination of the fields given is refused.

    Args:
        fields: By the name of a generator, or the generator itself, the field F: from states to their rates of change.
            A name that means nothing in space is a charge of its own, see :attr:`generators`.
        dimension: The dimension in which names are meant; 0 for fields that are no motion of space.
        steps: How many steps a finite action takes.

    Raises:
        ValueError: If there are no fields, or the steps are not positive.

    Example:
        >>> import torch, lie_metric as lm
        >>> growing = Flow({"growth": lambda x: x})
        >>> growing.tangents(torch.ones(1, 2), growing.generators, lm.Resampling())[0].tolist()
        [[1.0, 1.0]]
        >>> round(growing.act(torch.ones(1, 2), growing.generators[0], 1.0, lm.Resampling())[0, 0].item(), 5)
        2.71828
    """

    fields: Mapping[str | Generator, Callable[[Tensor], Tensor]]
    dimension: int = 0
    steps: int = 32
    generators: tuple[Generator, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.fields, Mapping) or not self.fields or not all(map(callable, self.fields.values())):
            raise ValueError(
                f"`fields` must map generators to vector fields, got {self.fields!r}. Pass e.g. "
                "{'time': lambda state: dynamics(state)}."
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"`steps` must be a positive integer, got {self.steps!r}.")
        object.__setattr__(self, "generators", tuple(self._generator(key) for key in self.fields))

    def _generator(self, key: str | Generator) -> Generator:
        if isinstance(key, Generator):
            return key
        known = named(self.dimension)[0]
        still = ((0.0,) * (self.dimension + 1),) * self.dimension
        return known.get(key) or Generator(key, still, charges={key: 1.0})

    @property
    def charges(self) -> frozenset[str]:
        """Those of the generators."""
        return frozenset(name for one in self.generators for name in one.charges)

    def check(self, tensor: Tensor, name: str) -> None:
        """Accepts every tensor with a batch axis.

        Raises:
            ValueError: If the tensor has no axes, or is empty.
        """
        if not tensor.ndim or not tensor.numel():
            raise ValueError(f"`{name}` must be non-empty with a batch axis, got shape {tuple(tensor.shape)}.")

    def tangents(self, tensor: Tensor, generators: Sequence[Generator], resampling: Resampling) -> Tensor:
        """The infinitesimal actions, shape (K, *tensor.shape).

        Raises:
            ValueError: If a field gives another shape, or a generator is no combination of those given.
        """
        moved = [self._rate(tensor, generator) for generator in generators]
        return torch.stack(moved) if moved else tensor.new_zeros((0, *tensor.shape))

    def act(self, tensor: Tensor, generator: Generator, t: float | Tensor, resampling: Resampling) -> Tensor:
        """The state after a time t, a number or one for each of B."""
        step = torch.as_tensor(t, dtype=tensor.dtype, device=tensor.device) / self.steps
        step = step.reshape(-1, *[1] * (tensor.ndim - 1))
        for _ in range(self.steps):
            first = self._rate(tensor, generator)
            second = self._rate(tensor + step / 2 * first, generator)
            third = self._rate(tensor + step / 2 * second, generator)
            fourth = self._rate(tensor + step * third, generator)
            tensor = tensor + step / 6 * (first + 2 * second + 2 * third + fourth)
        return tensor

    def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """One block (B, 1, elements): each element has a mean of its own."""
        return (tensor.reshape(len(tensor), 1, -1),)

    def _rate(self, tensor: Tensor, generator: Generator) -> Tensor:
        total = torch.zeros_like(tensor)
        numbers = combined(self.generators, generator, self).tolist()
        for number, (key, rate) in zip(numbers, self.fields.items(), strict=True):
            if number:
                found = rate(tensor)
                if found.shape != tensor.shape:
                    raise ValueError(
                        f"`fields[{key!r}]` must return a rate of change of shape {tuple(tensor.shape)}, that of the "
                        f"state, got {tuple(found.shape)}."
                    )
                total = total + number * found
        return total
