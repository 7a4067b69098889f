"""Gradients that a model takes itself: enabled where it needs them, kept where they are differentiated again."""

import threading

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import lie_metric as lm
from lie_metric.representations import Points, Vectors
from lie_metric.running import GraphsKept, gradients_as_needed, isolated, same_draws
from lie_metric.running import isolation as isolation_


def force(pos):
    """-4 pos³, with a graph in training alone."""
    pos.requires_grad_()
    (gradient,) = torch.autograd.grad(pos.pow(4).sum(), pos, create_graph=False)
    return -gradient


def fixed(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestGradientsAsNeeded:
    def test_without_gradients(self):
        x = fixed(3)
        with torch.no_grad():
            with pytest.raises(RuntimeError, match="does not require grad"):
                force(x.clone())
            found = gradients_as_needed(force)(x.clone())
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(found, -4 * x**3)
        assert not found.requires_grad

    def test_from_then_on_it_runs_once(self):
        calls = []

        def counted(x):
            calls.append(torch.is_grad_enabled())
            return force(x)

        run = gradients_as_needed(counted)
        with torch.no_grad():
            run(fixed(3))
            run(fixed(3))
        assert calls == [False, True, True]

    def test_others_are_run_as_they_are(self):
        calls = []

        def plain(x):
            calls.append(torch.is_grad_enabled())
            return x * 2

        with torch.no_grad():
            gradients_as_needed(plain)(fixed(3))
        gradients_as_needed(plain)(fixed(3))
        assert calls == [False, True]

    @pytest.mark.parametrize("message", ["something else", "it does not require grad, ever"])
    def test_errors_are_shown(self, message):
        def fails(x):
            raise RuntimeError(message)

        run = gradients_as_needed(fails)
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            run(fixed(3))
        assert torch.is_grad_enabled()

    def test_draws_begin_again(self):
        def noisy(x):
            drawn = torch.rand(3, dtype=torch.float64)
            return force(x) + drawn

        torch.manual_seed(5)
        wanted = torch.rand(3, dtype=torch.float64) - 4 * fixed(3) ** 3
        torch.manual_seed(5)
        run = gradients_as_needed(same_draws(noisy))
        with torch.no_grad():
            torch.testing.assert_close(run(fixed(3)), wanted)
            torch.testing.assert_close(run(fixed(3)), wanted)


class TestGraphsKept:
    def test_gradients_have_a_graph(self):
        x = fixed(3).requires_grad_()
        assert not force(x).requires_grad
        with GraphsKept():
            found = force(x)
        (second,) = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(second, -12 * x.detach() ** 2)

    def test_graph_that_would_be_freed(self):
        x = fixed(3).requires_grad_()
        with GraphsKept():
            (gradient,) = torch.autograd.grad(x.pow(4).sum(), x, retain_graph=False, create_graph=False)
        assert torch.autograd.grad(gradient.sum(), x)[0].any()

    def test_the_attribute_may_be_set(self):
        x = fixed(3).requires_grad_() * 1.0
        with pytest.raises(RuntimeError, match="leaf"):
            x.requires_grad = True
        with GraphsKept():
            x.requires_grad = True
            y = fixed(3)
            y.requires_grad = True
            with pytest.raises(RuntimeError, match="leaf"):
                x.requires_grad = False
        assert x.requires_grad
        assert y.requires_grad

    def test_no_other_thread_and_no_error_sees_it(self):
        found = []

        def other():
            found.append(force(fixed(3)).requires_grad)

        def fails():
            with GraphsKept():
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails()
        assert found == [False]
        assert not force(fixed(3)).requires_grad
        assert not _get_current_function_mode_stack()


def test_gradients_of_training_are_no_sum_of_those_of_a_measurement():
    net = nn.Linear(3, 1).double()
    net(fixed(4, 3)).sum().backward()
    before, values = net.weight.grad, net.weight.grad.clone()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pos):
            pos.requires_grad_()
            pos.retain_grad()
            self.net(pos).pow(3).sum().backward()
            return -pos.grad

    with torch.no_grad():
        found = lm.lie_derivative(
            Model(), fixed(2, 3), "scale", input_representation=Points(3), output_representation=Vectors(3)
        )["scale"]
    assert net.weight.grad is before
    assert torch.equal(before, values)
    # F = -3 (w · x + b)² w, of which the differential along -x is less -F.
    w, b, x = net.weight[0].detach(), net.bias.detach(), fixed(2, 3)
    far = (x @ w + b)[:, None]
    step = lm.generators("scale", dimension=3)[0].matrix[0][0]
    torch.testing.assert_close(found, -step * (-6 * far * (far - b) * w + 3 * far.square() * w))


class Nested(nn.Module):
    """A model that measures another within its own pass, and forces besides."""

    def forward(self, pos):
        inner = lm.lie_derivative(force, fixed(1, 2, 3), "scale", method="double_backward",
                                  input_representation=Points(3), output_representation=Vectors(3))  # fmt: skip
        return force(pos) + inner["scale"].detach()


@pytest.mark.parametrize("method", ["double_backward", "reverse"])
def test_measurements_within_one_another(method):
    options = {"input_representation": Points(3), "output_representation": Vectors(3), "method": method}
    x = fixed(2, 2, 3, seed=1)
    found = lm.lie_derivative(Nested(), x, "rotation_z", **options)["rotation_z"]
    inner = lm.lie_derivative(force, fixed(1, 2, 3), "scale", **options)["scale"]
    alone = lm.lie_derivative(force, x, "rotation_z", **options)["rotation_z"]
    turn = lm.generators("rotation_z", dimension=3)
    moved = Vectors(3).tangents(inner.expand_as(x), turn, lm.Resampling())[0]
    torch.testing.assert_close(found, alone - moved)
    assert not _get_current_function_mode_stack()


class TestDistances:
    @pytest.mark.parametrize("p", [0.0, 1.0, 1.5, 2.0, 3.0, float("inf")])
    def test_values_and_gradients(self, p):
        x, y = fixed(2, 4, 3).requires_grad_(), fixed(5, 3, seed=1)
        wanted = torch.cdist(x, y, p)
        with isolated(None):
            found = torch.cdist(x, y, p)
        torch.testing.assert_close(found, wanted)
        if p:
            slopes = [torch.autograd.grad(far.sin().sum(), x)[0] for far in (found, wanted)]
            torch.testing.assert_close(*slopes)

    def test_second_derivatives_where_points_meet(self):
        x = fixed(4, 3).requires_grad_()
        with isolated(None):
            (slope,) = torch.autograd.grad(torch.exp(-torch.cdist(x, x)).sum(), x, create_graph=True)
        # By its own backward passes torch gives NaN here (seen in 2.14).
        u = torch.ones_like(x, requires_grad=True)
        (pulled,) = torch.autograd.grad(slope, x, u, create_graph=True)
        (found,) = torch.autograd.grad(pulled, u, slope)
        i, j = (~torch.eye(4, dtype=torch.bool)).nonzero(as_tuple=True)
        (slope,) = torch.autograd.grad(torch.exp(-(x[i] - x[j]).norm(dim=-1)).sum(), x, create_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(slope.square().sum() / 2, x)[0])

    def test_what_would_be_large_is_left_to_torch(self, monkeypatch):
        monkeypatch.setattr(isolation_, "_MANY", 10)
        x = fixed(2, 4, 3)
        with pytest.warns(UserWarning, match="Method 'double_backward' is used.*_cdist_forward"), torch.no_grad():
            lm.lie_derivative(lambda pos: torch.cdist(pos, pos.sin()).sum((1, 2)), x, "scale",
                              input_representation=Points(3))  # fmt: skip
