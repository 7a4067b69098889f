"""All calls of one measurement see the same random draws."""

import random

import numpy as np
import pytest
import torch
from cases import images
from torch import nn
from torch.nn import functional as F

import lie_metric as lm
from lie_metric.running import random_state, same_draws


class Own(nn.Module):
    """Draws from generators of its own."""

    def __init__(self):
        super().__init__()
        self.torch, self.numpy = torch.Generator(), [np.random.default_rng(0)]
        self.python = {"a": random.Random(0)}

    def forward(self, x):
        factor = torch.rand((), generator=self.torch) + self.numpy[0].random() + self.python["a"].random()
        return (x * x).flatten(1) * factor


DRAWS = {
    "torch": lambda x: x.flatten(1) * torch.rand(192, dtype=x.dtype),
    "numpy": lambda x: x.flatten(1) * np.random.rand(),  # noqa: NPY002
    "python": lambda x: x.flatten(1) * random.random(),
    "dropout": lambda x: F.dropout(x, 0.5, training=True).flatten(1),
    "gumbel": lambda x: F.gumbel_softmax(x.flatten(1), tau=2.0),
    "generators of its own": Own(),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_every_call_draws_alike(kind):
    with random_state():
        function = same_draws(DRAWS[kind])
        first = function(images(2, 8))
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        assert torch.equal(function(images(2, 8)), first)


def test_draws_are_not_those_of_another_moment():
    with random_state():
        first = same_draws(DRAWS["torch"])(images(2, 8))
        torch.rand(1)
        assert not torch.equal(same_draws(DRAWS["torch"])(images(2, 8)), first)


@pytest.mark.parametrize("kind", DRAWS)
def test_difference_of_two_calls_is_that_of_one_function(kind):
    own = DRAWS["generators of its own"]
    states = own.torch.get_state(), own.numpy[0].bit_generator.state, own.python["a"].getstate()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    function, x = DRAWS[kind], images(2, 8)
    one, two = (lm.lie_derivative(function, x, "rotation") for _ in range(2))
    assert torch.equal(one["rotation"], two["rotation"])
    chunked = lm.lie_derivative(function, x, "affine", chunk_size=2)
    for name, value in lm.lie_derivative(function, x, "affine").items():
        torch.testing.assert_close(chunked[name], value)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    assert torch.equal(states[0], own.torch.get_state())
    assert states[1] == own.numpy[0].bit_generator.state
    assert states[2] == own.python["a"].getstate()


def test_random_states_are_given_back_whatever_happens():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(2).tolist()  # noqa: NPY002

    with random_state():
        wanted = drawn()
        with random_state():
            drawn()
    with random_state():
        assert drawn() == wanted
    with pytest.raises(KeyError), random_state():
        {}[str(drawn())]
    assert drawn() == wanted


@pytest.mark.parametrize("initialized", [False, True])
def test_devices_draw_again_as_well(monkeypatch, initialized):
    devices = {"cuda": 0, "mps": 0}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: initialized)
    for kind, read, write in (
        ("cuda", "get_rng_state_all", "set_rng_state_all"),
        ("mps", "get_rng_state", "set_rng_state"),
    ):
        monkeypatch.setattr(getattr(torch, kind), read, lambda kind=kind: (devices[kind],))
        monkeypatch.setattr(getattr(torch, kind), write, lambda state, kind=kind: devices.update({kind: state[0]}))
    with random_state():
        devices.update(cuda=5, mps=7)
    assert devices == ({"cuda": 0, "mps": 0} if initialized else {"cuda": 5, "mps": 7})


def test_arguments_of_every_kind_arrive():
    assert same_draws(lambda x, *rest, y=0: (x, rest, y))(1, 2, 3, y=4) == (1, (2, 3), 4)
