"""The coarsest precision on the way is found whatever else a function computes with."""

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lie_metric.jacobian.precision import coarsest

X = torch.linspace(1, 2, 4, dtype=torch.float64)
DOUBLE, SINGLE, HALF = (torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16))
# Comes from outside, so that no operation has made it.
STORED = torch.ones(2, 2)


FUNCTIONS = {
    "nothing": (lambda x: x, DOUBLE),
    "one precision": (lambda x: x.exp(), DOUBLE),
    "single": (lambda x: x.float().exp().double(), SINGLE),
    "half, then single": (lambda x: (x.bfloat16() * 2).float().double(), HALF),
    "single, then half": (lambda x: (x.float() * 2).bfloat16().double(), HALF),
    "half where it ends": (lambda x: x.bfloat16(), HALF),
    "an option by its name": (lambda x: torch.full_like(x, 2.0, dtype=torch.float32).double() * x, SINGLE),
    "several results": (lambda x: STORED.unbind()[0].sum(dtype=torch.float64) * x, SINGLE),
    "integers before": (lambda x: x[x.argsort()].float().double(), SINGLE),
    "a number before": (lambda x: x.sum().item() * x.float().double(), SINGLE),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_largest_rounding(name):
    function, eps = FUNCTIONS[name]
    assert coarsest(function, X) == eps


def test_what_does_not_run_beneath_a_mode_has_the_precision_of_its_value():
    def alone(x):
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("not beneath a mode")
        return x.float()

    assert coarsest(alone, X) == SINGLE


def test_memory_that_does_not_suffice_is_not_asked_for_again():
    calls = []

    def hungry(x):
        calls.append(1)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        coarsest(hungry, X)
    assert len(calls) == 1
