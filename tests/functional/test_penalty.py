"""The penalty against the measures it is made of, finite differences, and what training with it does."""

import pytest
import torch
from cases import ImageToImage, cnn, images
from torch import nn

import lie_metric as lm
from lie_metric import functional as F

NAMES = ("rotation", "translation_x")


@pytest.mark.parametrize("make", [cnn, lambda: ImageToImage().double()])
def test_it_is_the_mean_of_squared_measures(make):
    model, x = make(), images(5)
    relative = torch.stack(list(F.relative(model, x, NAMES).values()))
    torch.testing.assert_close(lm.equivariance_penalty(model, x, NAMES), relative.square().mean())
    lee = torch.stack(list(F.lee(model, x, NAMES).values()))
    torch.testing.assert_close(lm.equivariance_penalty(model, x, NAMES, normalise="none"), lee.mean())


@pytest.mark.parametrize("normalise", ["none", "spread"])
def test_gradient_is_that_of_finite_differences(normalise):
    model, x = cnn(), images(4)
    weight = model[-1].weight
    lm.equivariance_penalty(model, x, NAMES, normalise=normalise).backward()
    direction = torch.randn_like(weight)
    values = []
    for sign in (1, -1):
        weight.data += sign * 1e-5 * direction
        values.append(lm.equivariance_penalty(model, x, NAMES, normalise=normalise).item())
        weight.data -= sign * 1e-5 * direction
    assert (weight.grad * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_shrinking_the_outputs_does_not_lower_it():
    model, x = nn.Sequential(cnn(), nn.Linear(5, 3).double()), images(4)
    penalty = lm.equivariance_penalty(model, x, NAMES)
    penalty.backward()
    last = model[1]
    assert abs((last.weight.grad * last.weight).sum()) < 1e-10 * penalty
    with torch.no_grad():
        last.weight *= 0.01
    torch.testing.assert_close(lm.equivariance_penalty(model, x, NAMES), penalty)


def test_training_with_it_lowers_the_error():
    """Smooth images, of which the class is told by their mean; the plain network sees where things are."""
    errors = {}
    smooth = nn.Upsample(16, mode="bicubic")
    x, other = (smooth(images(64, 4, seed)) for seed in (1, 2))
    y = (x.mean((1, 2, 3)) > 0).long()
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(392, 2)).double()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(80):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss + weight * lm.equivariance_penalty(model, x, "translation") if weight else loss).backward()
            optimizer.step()
        errors[weight] = F.relative(model, other, "translation_x")["translation_x"].item()
        assert (model(x).argmax(1) == y).double().mean() > 0.9
    assert errors[0.1] < 0.85 * errors[0.0]


def test_it_leaves_modes_and_random_states_alone():
    model, x = cnn(), images()
    model.train()
    state, running = torch.get_rng_state(), model[1].running_mean.clone()
    lm.equivariance_penalty(model, x).backward()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, running)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lm.equivariance_penalty(cnn(), images(), normalise="x"), ValueError, "`normalise` must be one of"),
        (lambda: lm.equivariance_penalty(cnn(), images(1)), ValueError, "`images` must be at least two"),
        (lambda: lm.equivariance_penalty(lambda x: x.sum((2, 3)) * 0, images()), ValueError, "without a spread"),
        (lambda: lm.equivariance_penalty(cnn(), images(), "rotate"), ValueError, "`generators` must name known"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_without_gradients_it_is_refused():
    with torch.no_grad(), pytest.raises(RuntimeError, match="must be called with gradients enabled"):
        lm.equivariance_penalty(cnn(), images())
