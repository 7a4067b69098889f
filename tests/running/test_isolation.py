"""Nothing of the model, nor of what is around it, is changed by a measurement, whether it succeeds or not."""

import copy
import random

import numpy as np
import pytest
import torch
from cases import TokensOut, cnn, images
from torch import nn

import lie_metric as lm
from lie_metric.running import evaluation, isolated
from lie_metric.running.draws import MEASURED


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = cnn()

    def forward(self, x):
        self.body(x)
        raise RuntimeError("planted")


def everything(model):
    return {
        "modes": [m.training for m in model.modules()],
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def assert_same(before, after):
    for key, value in before.items():
        if key == "state":
            assert list(value) == list(after[key])
            assert all(torch.equal(value[name], after[key][name]) for name in value)
        elif key == "grads":
            assert all(torch.equal(a, b) for a, b in zip(value, after[key], strict=True))
        elif key in {"torch", "numpy"}:
            assert (value == after[key]).all()
        else:
            assert value == after[key], key


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["auto", "forward vmap", "reverse", "double_backward"])
def test_nothing_is_changed(method, fails):
    model = Fails() if fails else nn.Sequential(cnn())
    body = model.body if fails else model[0]
    body.train()
    body[1].eval()  # a frozen batch norm
    body[0].weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = everything(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.is_autocast_enabled("cpu")
        if fails:
            with pytest.raises(RuntimeError, match="planted"):
                lm.lie_derivative(model, images(), method=method)
        else:
            found = lm.lie_derivative(model, images(), method=method)
            assert found["rotation"].dtype == torch.float64
        assert torch.is_autocast_enabled("cpu") == inside
    assert_same(before, everything(model))


@pytest.mark.parametrize("method", ["auto", "forward vmap", "reverse", "double_backward"])
@pytest.mark.parametrize("generators", ["rotation", "affine"])
def test_autocast_does_not_reach_the_measurement(method, generators):
    model, x = cnn().float().eval(), images().float()
    wanted = lm.lie_derivative(model, x, generators, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        found = lm.lie_derivative(model, x, generators, method=method)
    for name, value in wanted.items():
        assert torch.equal(found[name], value)


def test_dropout_and_batch_statistics_do_not_act():
    model = cnn().train()
    torch.testing.assert_close(lm.lie_derivative(model, images()), lm.lie_derivative(model, images()))
    assert model[1].num_batches_tracked == 0


def test_random_numbers_are_given_back():
    def draws(x):
        random.random()
        np.random.rand()  # noqa: NPY002
        return x.flatten(1) * torch.rand(())

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with torch.no_grad():
        lm.lie_derivative(draws, images(), "rotation")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_changed_buffer_is_restored_with_a_warning():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x.flatten(1)

    model = Counts()
    with pytest.warns(UserWarning, match=r"changed its buffers \['calls'\]"):
        lm.lie_derivative(model, images(), "rotation")
    assert model.calls == 0


def test_conditions_inside():
    model = TokensOut()
    with torch.inference_mode(), isolated(model):
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not any(m.training for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    with isolated(model):
        assert torch.is_grad_enabled()
    with evaluation(lambda x: x):
        pass


@pytest.mark.slow
def test_a_compiled_model_stays_compiled():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.rand(2, 4)).sum().backward()
    lm.lie_derivative(lambda x: compiled(x[:, 0, :, 0]), torch.rand(2, 1, 4, 4), "rotation")
    assert type(compiled(torch.rand(2, 4)).grad_fn).__name__ == "CompiledFunctionBackward"


def test_autocast_around_the_measurement_does_not_lower_the_precision():
    """In float32, which autocast lowers; it leaves float64 alone."""
    model, x = cnn().float(), images().float()
    wanted = lm.lie_derivative(model, x, "rotation")["rotation"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.eval()(x).dtype == torch.bfloat16
        found = lm.lie_derivative(model, x, "rotation")["rotation"]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["affine", "plain", "no running statistics"])
def test_batch_norm_inside_is_that_of_torch(kind, training):
    options = {"affine": {}, "plain": {"affine": False}, "no running statistics": {"track_running_stats": False}}
    norm, x = nn.BatchNorm2d(3, eps=0.1, **options[kind]).double(), images()
    for value in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        torch.nn.init.uniform_(value, 0.5, 2)
    wanted = copy.deepcopy(norm).train(training)(x)
    with isolated(lambda v: v):
        torch.testing.assert_close(norm.train(training)(x), wanted, rtol=1e-12, atol=1e-12)
    with isolated(norm):
        torch.testing.assert_close(norm(x), copy.deepcopy(norm).eval()(x), rtol=1e-12, atol=1e-12)


def test_nothing_is_compiled_inside():
    compiled_graphs = []

    def backend(graph, example_inputs):
        compiled_graphs.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    with isolated(None):
        function(torch.ones(2))
    assert not compiled_graphs
    function(torch.ones(2))
    assert len(compiled_graphs) == 1


class HooksItself(nn.Module):
    """Installs hooks in its first call, as libraries do that record hidden states, and marks it in an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.seen = nn.Linear(4, 4).double(), 0.0

    def forward(self, x):
        if not hasattr(self, "installed"):
            self.installed = True
            self.inner.register_forward_hook(lambda module, args, output: output * 2)
        return self.inner(x.flatten(1)[:, :4]).sin()


def test_hooks_that_a_model_installs_in_its_first_call_are_not_installed_again_and_again():
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    hooked = HooksItself()
    found = lm.lie_derivative(hooked, x, "rotation")
    assert not hooked.inner._forward_hooks
    assert not hasattr(hooked, "installed")
    hooked(x)  # as it is ever after
    torch.testing.assert_close(found, lm.lie_derivative(hooked, x, "rotation"))
    report = lm.layerwise_equivariance_error(hooked, x, "rotation")
    assert report.residual["rotation"] < 1e-10


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, (1, 1), (1, 2), (None, 1), 2])
def test_pooling_inside_is_that_of_torch(size, layout):
    x = images(2, 8).contiguous(memory_format=layout)
    model = nn.AdaptiveAvgPool2d(size)
    wanted = model(x)
    with isolated(model):
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", ["frozen", "exported"])
def test_programs_without_a_mode_are_measured(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.rand(2, 3, 8, 8)
    if kind == "frozen":
        program = torch.jit.freeze(torch.jit.trace(model, x))
    else:
        program = torch.export.export(model, (x,)).module()
    wanted = lm.lie_derivative(model, x, "rotation")["rotation"]
    for given in (program, lambda v: program(v)):
        with torch.no_grad():
            torch.testing.assert_close(lm.lie_derivative(given, x, "rotation")["rotation"], wanted)


@pytest.mark.parametrize("enabled", [True, False])
def test_switches_of_the_process_are_what_they_were(enabled):
    """Also those that a user has turned off, and also when a recurrent layer fails."""
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    layer, x = nn.LSTM(48, 4, batch_first=True), torch.rand(2, 5, 48)
    try:
        torch.backends.mha.set_fastpath_enabled(enabled)
        torch._C._set_mkldnn_enabled(enabled)
        with isolated(layer):
            layer(x)
            assert torch._C._get_mkldnn_enabled() == enabled
            with pytest.raises(RuntimeError, match="input"):
                layer(x[..., 1:])
            assert torch._C._get_mkldnn_enabled() == enabled
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)


def made_by(output):
    return output.grad_fn.name().removesuffix("0")


def test_what_is_computed_in_another_way_inside():
    """Operations whose derivatives are missing, slow or wrong; in training mode batch norm is torch's own."""
    x = images().requires_grad_()
    F, norm = nn.functional, nn.BatchNorm2d(3).double().requires_grad_(False)
    mean, var = norm.running_mean, norm.running_var
    with isolated(None):
        assert made_by(norm.eval()(x)) == made_by(F.batch_norm(x, mean, var)) == "AddBackward"
        assert made_by(F.batch_norm(x, None, None, training=True)) == "NativeBatchNormBackward"
        for size in (1, (1, 1), [1, 1]):
            assert made_by(F.adaptive_avg_pool2d(x, size)) == made_by(F.adaptive_avg_pool2d(input=x, output_size=size))
            assert made_by(F.adaptive_avg_pool2d(x, size)) == "MeanBackward1"
            torch.testing.assert_close(F.adaptive_avg_pool2d(x[0], size), x[0].mean((1, 2), keepdim=True))
        assert made_by(F.adaptive_avg_pool2d(x, (1, 2))) == "AdaptiveAvgPool2DBackward"


def test_a_measurement_that_fails_is_not_taken_for_one_that_goes_on():
    with pytest.raises(RuntimeError, match="planted"):
        lm.lie_derivative(Fails(), images(), "rotation")
    assert not MEASURED
    with isolated(None):
        assert len(MEASURED) == 1
    assert not MEASURED


@pytest.mark.parametrize("size", [1, (1, 1), [1, 1]])
def test_pooling_to_one_pixel_is_laid_out_as_a_mean_is(size):
    """What torch makes of it where channels come last has no batching rule, and is warned of."""
    x = images(4, 8).contiguous(memory_format=torch.channels_last)
    with isolated(None):
        assert nn.functional.adaptive_avg_pool2d(x, size).stride() == x.mean((-2, -1), keepdim=True).stride()
