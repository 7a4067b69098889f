"""Modules are found wherever a callable holds them, and are all measured in evaluation mode."""

import functools
import types

import pytest
import torch
from cases import cnn, images
from torch import nn

import lie_metric as lm
from lie_metric.running import isolated
from lie_metric.running.modules import found_modules

GLOBAL = nn.BatchNorm2d(3)


def by_global(x):
    return GLOBAL(x)


def by_helper(x):
    return by_global(x)


class Holder:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x)

    def predict(self, x):
        return self.module(x)


class Slotted:
    __slots__ = ("module",)

    def __init__(self, module):
        self.module = module

    def predict(self, x):
        return self.module(x)


def with_default(module):
    def call(x, inner=module):
        return inner(x)

    return call


def with_keyword_default(module):
    def call(x, *, inner=module):
        return inner(x)

    return call


def with_attribute(module):
    def call(x):
        return call.module(x)

    call.module = module
    return call


def nested(module):
    namespace = types.SimpleNamespace(parts={"net": (module,)})
    return functools.partial(lambda scale, x: (lambda v: namespace.parts["net"][0](v))(x) * scale, 1.0)


PLACES = {
    "module": lambda module: module,
    "closure": lambda module: lambda x: module(x),
    "closure of a closure": lambda module: (lambda inner: lambda x: inner(x))(lambda x: module(x)),
    "partial": lambda module: functools.partial(lambda inner, x: inner(x), module),
    "keyword of a partial": lambda module: functools.partial(lambda x, inner: inner(x), inner=module),
    "partial of a module": lambda module: functools.partial(module),
    "bound method": lambda module: module.forward,
    "bound method of an object": lambda module: Holder(module).predict,
    "callable object": Holder,
    "slots": lambda module: Slotted(module).predict,
    "object in a closure": lambda module: (lambda holder: lambda x: holder.module(x))(Holder(module)),
    "list": lambda module: (lambda parts: lambda x: parts[0](x))([module]),
    "dict": lambda module: (lambda parts: lambda x: parts["a"](x))({"a": module}),
    "default": with_default,
    "keyword default": with_keyword_default,
    "attribute of a function": with_attribute,
    "nested": nested,
    "cycle": lambda module: (lambda parts: (parts.append(parts), lambda x: parts[0](x))[1])([module]),
    "wrapped": lambda module: torch.no_grad()(lambda x: module(x)),
}


@pytest.mark.parametrize("place", PLACES)
def test_found_and_in_evaluation_mode(place):
    module = cnn().train()
    module[1].eval()
    function = PLACES[place](module)
    modes = [part.training for part in module.modules()]
    with isolated(function):
        assert not any(part.training for part in module.modules())
        wanted = module(images())
        torch.testing.assert_close(function(images()), wanted)
    assert [part.training for part in module.modules()] == modes
    torch.testing.assert_close(wanted, cnn().eval()(images()))
    assert module[1].num_batches_tracked == 0


@pytest.mark.parametrize("function", [by_global, by_helper, lambda x: (lambda v: GLOBAL(v))(x)])
def test_globals_that_a_function_names(function):
    GLOBAL.train()
    with isolated(function):
        assert not GLOBAL.training
    assert GLOBAL.training


def test_measured_like_the_module_itself():
    model = cnn().train()
    wanted = lm.lie_derivative(model, images())
    found = lm.lie_derivative(lambda x: model(x), images())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_what_a_module_hides_from_its_own_eval_keeps_its_mode():
    """Evaluation runs it so; its state is given back all the same."""

    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = [nn.BatchNorm2d(3)]

        def forward(self, x):
            return self.parts[0](x).flatten(1)

    model = Hides()

    def measure():
        with isolated(model):
            assert model.parts[0].training
            model(images().float())

    with pytest.warns(UserWarning, match=r"Batch norm ran in training mode in \['parts'\]"):
        measure()
    assert model.parts[0].num_batches_tracked == 0
    assert model.parts[0].running_mean.eq(0).all()


def test_nothing_is_looked_for_in_the_objects_of_a_module():
    """A Lightning module holds its trainer, which holds everything."""

    class Trainer:
        def __init__(self):
            self.other = nn.BatchNorm2d(3)

    model = cnn()
    model.trainer = Trainer()
    assert len(found_modules(model).modules) == len(list(model.modules()))
    with isolated(model):
        assert model.trainer.other.training


def test_each_module_is_found_once_and_eval_is_called_on_the_outermost():
    model = cnn()
    found = found_modules(lambda x: model[0](model(x)))
    assert len(found.modules) == len(list(model.modules()))
    assert found.roots == [model]


def test_modules_that_hash_by_their_state():
    from torchmetrics import MeanMetric

    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.mean = MeanMetric()
    with isolated(model):
        model.mean.update(1.0)
    assert model.mean.update_count == 0
