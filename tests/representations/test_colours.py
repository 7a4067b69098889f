"""Photometric generators: exact groups, against what image libraries do to pixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lie_metric as lm
from lie_metric.representations import Image, Photograph

STENCIL = lm.Resampling()
NAMES = ("brightness", "contrast", "chroma", "hue", "blur")
PHOTO = Photograph()
number = st.floats(-1, 1, allow_nan=False)


def photographs(count=3, size=9, seed=0):
    raw = torch.rand(count, 3, size, size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (raw - raw.new_tensor(PHOTO.mean)[:, None, None]) / raw.new_tensor(PHOTO.std)[:, None, None], raw


def changed(name, t):
    """The raw values after a change."""
    x, _ = photographs()
    found = PHOTO.act(x, lm.generators(name)[0], t, STENCIL)
    return found * x.new_tensor(PHOTO.std)[:, None, None] + x.new_tensor(PHOTO.mean)[:, None, None]


@pytest.mark.parametrize("name", NAMES)
class TestGroups:
    def test_tangents_are_the_derivative_of_the_action(self, name):
        x, _ = photographs()
        (X,), h = lm.generators(name), 1e-4
        steps = [PHOTO.act(x, X, k * h, STENCIL) for k in (-2, -1, 1, 2)]
        wanted = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)
        torch.testing.assert_close(PHOTO.tangents(x, [X], STENCIL)[0], wanted, atol=1e-9, rtol=1e-9)

    @given(number, number)
    def test_one_parameter_group(self, name, s, t):
        x, _ = photographs()
        (X,) = lm.generators(name)
        twice = PHOTO.act(PHOTO.act(x, X, s, STENCIL), X, t, STENCIL)
        torch.testing.assert_close(twice, PHOTO.act(x, X, s + t, STENCIL), atol=1e-8, rtol=1e-8)

    def test_one_parameter_for_each_image(self, name):
        x, _ = photographs()
        (X,), t = lm.generators(name), torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64)
        each = torch.cat([PHOTO.act(x[k : k + 1], X, t[k], STENCIL) for k in range(3)])
        torch.testing.assert_close(PHOTO.act(x, X, t, STENCIL), each)

    def test_it_is_no_generator_of_plain_images(self, name):
        with pytest.raises(ValueError, match=f"got {name!r} with .*`Photograph` for colours"):
            lm.LocalEquivarianceError(name)


class TestAgainstPixels:
    def test_brightness_adds(self):
        torch.testing.assert_close(changed("brightness", 0.1), photographs()[1] + 0.1)

    def test_contrast_is_about_the_mean_grey(self):
        raw = photographs()[1]
        mean = raw.mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(changed("contrast", 0.3), mean + (raw - mean) * torch.tensor(0.3).double().exp())

    def test_chroma_keeps_the_grey_of_each_pixel(self):
        raw = photographs()[1]
        grey = raw.mean(1, keepdim=True)
        torch.testing.assert_close(changed("chroma", -60.0), grey.expand_as(raw))
        torch.testing.assert_close(changed("chroma", 0.5).mean(1, keepdim=True), grey)

    def test_a_third_of_a_turn_of_the_hue_changes_channels(self):
        raw = photographs()[1]
        torch.testing.assert_close(changed("hue", 2 * torch.pi / 3), raw[:, [2, 0, 1]])

    def test_blur_is_a_gaussian_of_its_variance(self):
        # Far from the borders a single pixel spreads to the variance t along each axis, and nothing is lost.
        x = torch.zeros(1, 3, 41, 41, dtype=torch.float64)
        x[..., 20, 20] = 1
        photo = Photograph((0, 0, 0), (1, 1, 1))
        spread = photo.act(x, lm.generators("blur")[0], 4.0, STENCIL)[0, 0]
        place = torch.arange(41.0, dtype=torch.float64) - 20
        assert spread.sum().item() == pytest.approx(1)
        assert (spread.sum(0) * place.square()).sum().item() == pytest.approx(4, rel=1e-6)
        assert (spread.sum(1) * place.square()).sum().item() == pytest.approx(4, rel=1e-6)
        constant = torch.full((1, 3, 5, 5), 0.3, dtype=torch.float64)
        torch.testing.assert_close(photo.act(constant, lm.generators("blur")[0], 2.0, STENCIL), constant)


def test_they_move_as_images_do():
    x, _ = photographs()
    for X in lm.generators("all"):
        assert torch.equal(PHOTO.tangents(x, [X], STENCIL), Image().tangents(x, [X], STENCIL))
        assert torch.equal(PHOTO.act(x, X, 0.2, STENCIL), Image().act(x, X, 0.2, STENCIL))


@pytest.mark.parametrize("name", NAMES)
def test_half_types(name):
    x, (X,) = photographs()[0].half(), lm.generators(name)
    moved, turned = PHOTO.tangents(x, [X], STENCIL), PHOTO.act(x, X, 0.3, STENCIL)
    assert moved.dtype == turned.dtype == torch.half
    # Rounded once, at the end.
    assert torch.equal(moved, PHOTO.tangents(x.float(), [X], STENCIL).half())
    assert torch.equal(turned, PHOTO.act(x.float(), X, 0.3, STENCIL).half())


def test_a_network_that_sees_grey_alone():
    def grey(x):
        raw = x * x.new_tensor(PHOTO.std)[:, None, None] + x.new_tensor(PHOTO.mean)[:, None, None]
        return raw.mean(1).flatten(1)

    found = lm.functional.relative(grey, photographs()[0], "photometric", input_representation=PHOTO,
                                   output_representation=lm.representations.Invariant())  # fmt: skip
    assert found["hue"] < 1e-14
    assert found["chroma"] < 1e-14
    assert min(found["brightness"], found["contrast"], found["blur"]) > 0.1


def test_finite_changes_of_colour():
    turns = lm.orbits.listed(("hue", "brightness"), (0.5,))
    metric = lm.FiniteEquivarianceError(turns, input_representation=PHOTO)
    x, _ = photographs(8)
    metric.update(lambda v: v.mean((2, 3)), x)
    f = x.mean((2, 3))
    moved = PHOTO.act(x, lm.generators("hue")[0], 0.5, STENCIL).mean((2, 3))
    wanted = ((moved - f).square().sum() / (2 * 8 * f.var(0).sum())).sqrt()
    assert metric.compute()["hue_0.5"].item() == pytest.approx(wanted.item())


def test_a_blur_goes_with_a_turn_and_with_an_intensity():
    x, _ = photographs(2)
    PHOTO.act(x, sum(lm.generators("rotation"), lm.generators("blur")[0]), 0.1, STENCIL)
    commuting = sum(lm.generators("saturation"), lm.generators("blur")[0])
    step = PHOTO.act(PHOTO.act(x, commuting, 0.1, STENCIL), commuting, 0.2, STENCIL)
    torch.testing.assert_close(step, PHOTO.act(x, commuting, 0.3, STENCIL))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Photograph((0, 0), (1, 1)), "three numbers"),
        (lambda: Photograph((0, 0, 0), (1, 0, 1)), "positive"),
        (lambda: PHOTO.check(torch.zeros(1, 1, 4, 4), "inputs"), "three channels"),
        (
            lambda: PHOTO.act(photographs()[0], sum(lm.generators("hue"), lm.generators("blur")[0]), 0.1, STENCIL),
            "contrast or blur alone",
        ),
        *[
            (
                lambda one=one, other=other: PHOTO.act(
                    photographs()[0], sum(lm.generators(one), lm.generators(other)[0]), 0.1, STENCIL
                ),
                match,
            )
            for one, other, match in (
                ("scale", "blur", "must not mix a blur, .* with a change of scale"),
                ("perspective_x", "blur", "must not mix a blur, .* with a change of scale"),
                ("saturation", "hue", "must not mix an intensity, .* with a change of colours"),
                ("saturation", "contrast", "must not mix an intensity, .* with a change of colours"),
                ("saturation", "brightness", "must not mix an intensity, .* with a change of colours"),
            )
        ],
        (
            lambda: lm.orbits.displaced(sum(lm.generators("translation_x"), lm.generators("hue")[0]), (1,)),
            "must move pixels and nothing else, got .*hue",
        ),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()
