"""Random numbers during a measurement: given back afterwards, and the same in every call of the function."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch

from lie_metric.running.modules import found_modules

__all__ = ["RandomStates", "random_state", "same_draws"]

Function = TypeVar("Function", bound=Callable[..., Any])


class RandomStates:
    """The states of the global random sources (Python, NumPy, torch on each device), and of further ones, as they are.

    Args:
        generators: Generators of torch, NumPy or Python beside the global ones.
    """

    def __init__(self, generators: Iterable[Any] = ()) -> None:
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        # A device that nothing has run on yet has drawn nothing.
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        self._own = [(generator, _state(generator)) for generator in generators]

    def restore(self) -> None:
        """Puts every source where it was."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
        for generator, state in self._own:
            _set_state(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


@contextmanager
def random_state() -> Iterator[None]:
    """Gives the global random states (Python, NumPy, torch on each device) back as they were, whatever happens.

    Yields:
        Nothing.
    """
    states = RandomStates()
    try:
        yield
    finally:
        states.restore()


class _Rewound(Protocol):
    def call(self) -> AbstractContextManager[None]: ...


MEASURED: list[_Rewound] = []
"""The states of the models that are being measured, the innermost last."""


def same_draws(function: Function) -> Function:
    """The function whose every call begins from the same random states, those of this moment.

    A network that draws in evaluation, by dropout that stays active or by Gumbel noise, is another function each time
    that it is called. Derivatives and differences are those of one function: the value, each tangent and each
    difference have to see the same draws. Generators that the function's modules hold begin alike as well, and
    attributes and buffers of a model that is being measured: a counter that ``forward`` raises stands where it stood.

    Calls leave the global states moved; :func:`random_state` around them gives those back. Two calls on batches of
    different shape begin alike, and draw different numbers for one and the same image.

    Args:
        function: The function.

    Returns:
        A function of the same arguments.

    Example:
        >>> noisy = same_draws(lambda x: x + torch.rand(3))
        >>> torch.equal(noisy(torch.zeros(3)), noisy(torch.zeros(3)))
        True
    """
    states = RandomStates(found_modules(function).generators)

    def call(*args: Any, **kwargs: Any) -> Any:
        states.restore()
        with MEASURED[-1].call() if MEASURED else nullcontext():
            return function(*args, **kwargs)

    return cast(Function, call)
