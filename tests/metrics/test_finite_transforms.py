"""Measures of finite transforms against hand-made loops, analytic cases and each other."""

import copy
import itertools
import pickle

import pytest
import torch
from cases import ImageToImage, TokensOut, channels_last, cnn, images
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchmetrics import MetricCollection

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.orbits import LatticeOrbit, lattice, listed, orbits, uniform

METRICS = [
    (lm.FiniteEquivarianceError, F.finite_equivariance_error, {}),
    (lm.LatticeEquivarianceError, F.lattice_equivariance_error, {}),
    (lm.PredictionConsistency, F.prediction_consistency, {}),
    (lm.PredictionConsistency, F.prediction_consistency, {"reference": "pairs"}),
    (lm.OrbitVariance, F.orbit_variance, {}),
    (lm.RelaxedEquivarianceError, F.relaxed_equivariance_error, {}),
    (lm.RelaxedEquivarianceError, F.relaxed_equivariance_error, {"normalise": True}),
]
RANDOM = (uniform("translation", 0.3, 3), uniform("rotation", 0.4, 5))


def stack(values):
    return torch.stack(list(values.values()))


def net():
    return ImageToImage().double().eval()


@pytest.mark.parametrize("make", [cnn, net, lambda: TokensOut().double(), channels_last])
@pytest.mark.parametrize(
    "orbit", [*listed("rotation", [0.3]), *lattice("rotate_90"), *lattice("flips")], ids=lambda o: o.name
)
def test_against_a_loop_over_images(make, orbit):
    """Each image alone, transformed by the public functions, and pixels outside told by an image of ones."""
    model, x = make(), images(6)
    if isinstance(model, nn.Module):
        model.eval()

    def forth(image):
        if isinstance(orbit, LatticeOrbit):
            return orbit.transforms[0](image)
        return lm.transforms.rotate(image, 0.3)

    def back(image):
        if isinstance(orbit, LatticeOrbit):
            return orbit.transforms[0].inverse(image)
        return lm.transforms.rotate(image, -0.3)

    def to_image(y):
        if y.ndim == 4:
            return y.movedim(-1, 1) if make is channels_last else y
        return y[:, 1:].mT.unflatten(-1, (4, 4)) if y.ndim == 3 else None

    errors, norms, same = [], [], []
    f = model(x)
    for n in range(6):
        y, ref = model(forth(x[n : n + 1])), f[n : n + 1]
        if y.ndim == 2:
            difference, scale = y - ref, 1.0
            same.append(float(y.argmax() == ref.argmax()))
        else:
            z, r = back(to_image(y)), to_image(ref)
            height, width = z.shape[-2:]
            i, j = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2)
            c, s = torch.tensor(0.3).double().cos(), torch.tensor(0.3).double().sin()
            inside = (((c * j - s * i).abs() <= width / 2) & ((s * j + c * i).abs() <= height / 2)).double()
            if isinstance(orbit, LatticeOrbit):
                inside = torch.ones_like(inside)
            same.append(((z.argmax(1) == r.argmax(1)) * inside).sum() / inside.sum())
            difference = ((z - r) * inside).flatten(1)
            prefix = (y - ref)[:, 0] if y.ndim == 3 else y.new_zeros(1, 0)
            difference = torch.cat([difference, prefix], 1)
            scale = f[0].numel() / (inside.sum() * z.shape[1] + prefix.numel())
        errors.append(scale * difference.square().sum())
        norms.append((scale * difference.square().sum()).sqrt())
        same[-1] = torch.as_tensor(same[-1]).double()
    if f.ndim == 2:
        spread = (f - f.mean(0)).square().sum()
    else:
        grid = to_image(f)
        spread = (grid - grid.mean((0, 2, 3), keepdim=True)).square().sum()
        if f.ndim == 3:
            spread = spread + (f[:, 0] - f[:, 0].mean(0)).square().sum()
    options = {"output_representation": lm.representations.ChannelsLast()} if make is channels_last else {}
    found = F.finite_equivariance_error(model, x, orbit, **options)[orbit.name]
    spread = spread * 6 / 5  # the variance of a sample
    torch.testing.assert_close(found, (torch.stack(errors).sum() / (2 * spread)).sqrt(), rtol=1e-9, atol=1e-12)
    found = F.relaxed_equivariance_error(model, x, orbit, **options)[orbit.name]
    torch.testing.assert_close(found, torch.stack(norms).mean(), rtol=1e-9, atol=1e-12)
    found = F.prediction_consistency(model, x, orbit, **options)[orbit.name]
    torch.testing.assert_close(found, torch.stack(same).mean())


@pytest.mark.parametrize("make", [cnn, net])
@pytest.mark.parametrize("generator", ["rotation", "translation_x", "scale"])
def test_the_curve_tends_to_the_local_error(make, generator):
    """EE(t) / t → relative / √2; with images that have no content at the frame, so that nothing enters."""
    model, x = make(), images(4) * torch.linspace(-1, 1, 16).mul(torch.pi / 2).cos().square().double()
    x = x * torch.linspace(-1, 1, 16).mul(torch.pi / 2).cos().square().double()[:, None]
    wanted = F.relative(model, x, generator)[generator] / 2**0.5
    gaps = []
    for t in (1e-2, 1e-3, 1e-4):
        (found,) = F.finite_equivariance_error(model, x, listed(generator, [t])).values()
        gaps.append(abs(found / t / wanted - 1))
    assert gaps[-1] < 1e-3
    assert gaps[2] < gaps[1] < gaps[0]


def test_orbit_variance_of_random_elements_is_unbiased():
    """For a scalar that is the drawn parameter itself the variance is that of the uniform distribution."""
    x = torch.zeros(3000, 1, 4, 4, dtype=torch.float64) + torch.arange(4).double()
    model = lambda v: v[:, 0, 1, 1:2]  # noqa: E731
    orbit = uniform("translation_x", 0.2, samples=2)
    found = F.orbit_variance(model, x, orbit, resampling=lm.Resampling("bilinear"))["translation_x_within_0.2"]
    # A shift by t half sides reads 2 t pixels further on a ramp of slope 1: variance (2 · 0.2)² / 3.
    error = lm.OrbitVariance(orbit, resampling=lm.Resampling("bilinear"))
    error.update(model, x)
    assert abs(found - 0.16 / 3) < 4 * error.standard_error()["translation_x_within_0.2"]
    assert error.standard_error()["translation_x_within_0.2"] < 0.002


def test_orbit_variance_is_the_part_of_the_risk_that_averaging_removes():
    """E‖z - y‖² = E‖z̄ - y‖² + V over a whole group, and its share of the loss."""
    model, x, y = cnn(), images(5), torch.randn(5, 5, dtype=torch.float64)
    model.eval()
    group = lattice("D4")[-1]
    z = torch.stack([model(transform(x)) for transform in group.transforms])
    risk = (z - y).square().sum(-1).mean()
    twirled = (z.mean(0) - y).square().sum(-1).mean()
    found = F.orbit_variance(model, x, group)["D4"]
    torch.testing.assert_close(found, risk - twirled)
    loss = lambda z, y: (z - y).square().sum(-1)  # noqa: E731
    share = F.orbit_variance(model, x, group, targets=y, loss=loss)["D4"]
    torch.testing.assert_close(share, (risk - twirled) / risk)
    metric = lm.OrbitVariance(group, loss=loss)
    metric.update(model, x, y)
    torch.testing.assert_close(metric.compute()["D4"], share)


def test_orbit_variance_leaves_out_what_any_element_moved_out_of_the_frame():
    model, x = nn.Identity(), images(4)
    orbit = uniform("translation", 0.5, samples=3)
    bilinear = lm.Resampling("bilinear", "zeros")
    assert F.orbit_variance(model, x, lattice("D4")[-1])["D4"] == 0
    # Shifts by whole pixels there and back change nothing inside the frame, and everything outside.
    whole = [orbit.__class__("whole", orbit.generators, (0.25, -0.5), (0.25, -0.5), 2)]
    assert F.orbit_variance(model, x, whole, resampling=bilinear)["whole"] < 1e-25
    assert F.finite_equivariance_error(model, x, whole, resampling=bilinear)["whole"] < 1e-12


class Both:
    """A shift and its inverse, each of which takes other columns out of the frame."""

    name, complete, one = "both", False, listed("translation_x", [0.5, -0.5])

    def __len__(self):
        return 2

    def draw(self, *about):
        return [element for orbit in self.one for element in orbit.draw(*about)]


def test_orbit_variance_is_over_what_stays_under_every_element():
    bilinear = lm.Resampling("bilinear", "zeros")
    assert F.orbit_variance(nn.Identity(), images(4), [Both()], resampling=bilinear)["both"] < 1e-25


def test_consistency_of_pairs_counts_pairs():
    model, x = cnn(), images(8)
    model.eval()
    orbit = lattice("D4")[-1]
    classes = torch.stack([model(transform(x)).argmax(1) for transform in orbit.transforms])
    pairs = [(classes[i] == classes[j]).double().mean() for i, j in itertools.combinations(range(8), 2)]
    found = F.prediction_consistency(model, x, orbit, reference="pairs")["D4"]
    torch.testing.assert_close(found, torch.stack(pairs).mean())
    assert found < 1


@given(st.floats(-3, 3), st.floats(-2, 2))
def test_functions_that_commute_with_the_lattice_have_no_error(scale, shift):
    """Pointwise functions of images and pooled ones, under every element of D4 and shifts, to rounding."""
    x = images(3)
    pointwise = lambda v: (scale * v + shift).sin()  # noqa: E731
    pooled = lambda v: pointwise(v).amax((2, 3))  # noqa: E731
    for model in (pointwise, pooled):
        found = F.lattice_equivariance_error(model, x, ("D4", "roll"))
        assert all(not value > 1e-12 for value in found.values())


def test_planted_violations_are_seen():
    x = images(6)
    position = torch.linspace(0, 1, 16, dtype=torch.float64)
    left = lambda v: (v * position).mean((2, 3))  # noqa: E731
    found = F.lattice_equivariance_error(left, x)
    assert found["flip_horizontal"] > 0.1
    assert found["flip_vertical"] < 1e-12
    assert found["rotate_90"] > 0.1


def test_a_lie_derivative_sees_no_reflection():
    """A function of r and of the handedness only: no generator of rotation moves it, a flip does."""
    y, x = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5)
    x, y = x.double(), y.double()
    circular = lm.Resampling("fourier")

    def curl(v):
        """The mean of x ∂y v - y ∂x v squared is the same for both hands; its third power is not."""
        change = lm.transforms.tangents(v, lm.generators("rotation"), circular)[0]
        return (change.pow(3) * (x**2 + y**2 < 36)).mean((2, 3))

    values = F.lattice_equivariance_error(curl, images(6), "flips")
    assert min(values.values()) > 0.1
    turned = F.lattice_equivariance_error(curl, images(6), "rotations_90")
    assert max(turned.values()) < 1e-10


def test_a_roll_of_a_strided_net_needs_whole_pixels():
    model = nn.Conv2d(3, 4, 3, 2, 1, padding_mode="circular").double()
    found = F.lattice_equivariance_error(model, images(), (lm.lattice.Roll(4, 2),))
    assert found["roll_4_2"] < 1e-12
    with pytest.raises(ValueError, match="`Roll` must move an output of 8×8 by whole pixels"):
        F.lattice_equivariance_error(model, images(), "roll")


@pytest.mark.parametrize(("cls", "function", "options"), METRICS)
def test_class_is_function_and_does_not_depend_on_the_batches(cls, function, options):
    model, x = cnn(), images(10)
    transforms = ("D4",) if cls is lm.LatticeEquivarianceError else RANDOM
    whole = function(model, x, transforms, **options)
    metric, part = cls(transforms, **options), cls(transforms, **options)
    metric.update(model, x[:7])
    per_batch = metric(model, x[7:])
    part.update(model, x[7:])
    assert list(metric.compute()) == list(whole) == [orbit.name for orbit in metric.orbits]
    torch.testing.assert_close(stack(metric.compute()), stack(whole), rtol=1e-10, atol=1e-12)
    assert stack(per_batch).isfinite().all()
    assert (stack(metric.standard_error()) >= 0).all()
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    clone = copy.deepcopy(metric)
    clone.reset()
    clone.update(model, x)
    torch.testing.assert_close(stack(clone.compute()), stack(whole), rtol=1e-10, atol=1e-12)
    assert metric.plot() is not None
    assert not metric.state_dict()


def test_a_norm_that_is_set_later_counts():
    x = images(4)
    metric = lm.RelaxedEquivarianceError("flip_horizontal")
    metric.update(ImageToImage().double(), x)
    plain = metric.compute()["flip_horizontal"]
    metric.normalise = True
    assert metric.normalise
    wanted = F.relaxed_equivariance_error(ImageToImage().double(), x, "flip_horizontal", normalise=True)
    torch.testing.assert_close(metric.compute()["flip_horizontal"], wanted["flip_horizontal"])
    metric.normalise = False
    assert metric.compute()["flip_horizontal"] == plain != wanted["flip_horizontal"]


def test_one_pass_serves_a_collection():
    """States coincide, so that a MetricCollection updates one metric for all."""
    model, x, calls = cnn(), images(4), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    kinds = (lm.FiniteEquivarianceError, lm.PredictionConsistency, lm.OrbitVariance, lm.RelaxedEquivarianceError)
    collection = MetricCollection([kind(RANDOM) for kind in kinds], compute_groups=True)
    collection.update(model, x)
    calls.clear()
    collection.update(model, x)
    assert len(calls) == 1 + 3 + 5
    alone = lm.OrbitVariance(RANDOM)
    for _ in range(2):
        alone.update(model, x)
    assert len(collection.compute()) == 4 * 2
    torch.testing.assert_close(stack(collection["OrbitVariance"].compute()), stack(alone.compute()))


def test_random_elements_depend_on_the_seed_and_the_image_alone():
    model, x = cnn(), images(4)
    state = torch.get_rng_state()
    one = stack(F.relaxed_equivariance_error(model, x, RANDOM))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(one, stack(F.relaxed_equivariance_error(model, x, RANDOM)))
    assert not torch.equal(one, stack(F.relaxed_equivariance_error(model, x, RANDOM, seed=1)))


@pytest.mark.parametrize(
    "options",
    [
        {"output": "probabilities"},
        {"resampling": lm.PAPER},
        {"output_representation": lm.representations.Invariant()},
        {"output": lambda y: y[:, :1]},
    ],
    ids=["probabilities", "resampling", "representation", "callable"],
)
def test_options_are_passed_on(options):
    x = images(4)
    plain = stack(F.relaxed_equivariance_error(net(), x, RANDOM))
    metric = lm.RelaxedEquivarianceError(RANDOM, **options)
    metric.update(net(), x)
    found = stack(F.relaxed_equivariance_error(net(), x, RANDOM, **options))
    assert not torch.allclose(found, plain)
    torch.testing.assert_close(stack(metric.compute()), found)


def test_undefined_values_are_nan_with_a_reason():
    with pytest.warns(UserWarning, match="`finite_equivariance_error` is NaN for .* the output does not vary"):
        found = F.finite_equivariance_error(lambda x: x.new_ones(len(x), 3), images(), listed("rotation", [0.1]))
    assert stack(found).isnan().all()
    with pytest.warns(UserWarning, match="`prediction_consistency` is NaN for .* fewer than two classes"):
        F.prediction_consistency(lambda x: x.mean((1, 2, 3)), images(), "flips")
    with pytest.warns(UserWarning, match="`relaxed_equivariance_error` is NaN for .* nothing stays inside"):
        F.relaxed_equivariance_error(nn.Identity(), images(), listed("translation_x", [9.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_have_no_classes(value):
    def model(x):
        return x.flatten(1)[:, :5] + torch.tensor([0, 0, 0, 0, value], dtype=x.dtype)

    for reference in ("image", "pairs"):
        with pytest.warns(UserWarning, match="consistency` is NaN for .*: the model's outputs are not finite"):
            found = F.prediction_consistency(model, images(), lattice("D4")[-1], reference=reference)
        assert found["D4"].isnan()


def test_curves_are_drawn_over_the_parameter():
    metric = lm.FiniteEquivarianceError(listed(("rotation", "scale"), (0.2, 0.1)))
    metric.update(cnn(), images(5))
    curves = metric.curves()
    assert list(curves["rotation"].epochs) == [0.1, 0.2]
    assert curves["scale"].values[1] == metric.compute()["scale_0.2"].item()
    figure = lm.figures.error_curves({"cnn": curves}, caption="bspline")
    assert [axis.get_xlabel() for axis in figure.axes] == ["t (radian)", "t (log factor)"]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lm.FiniteEquivarianceError(()), ValueError, "`transforms` must hold at least one orbit"),
        (lambda: lm.FiniteEquivarianceError(3), TypeError, "`transforms` must be names of lattice transforms, orbits"),
        (lambda: lm.FiniteEquivarianceError("rotation"), ValueError, "`transforms` must name known transforms"),
        (lambda: lm.FiniteEquivarianceError(("flips", "flip_vertical")), ValueError, "must have distinct names"),
        (lambda: lm.FiniteEquivarianceError(seed=-1), ValueError, "`seed` must be a non-negative integer"),
        (lambda: lm.FiniteEquivarianceError(output="x"), ValueError, "`output` must be 'logits'"),
        (lambda: lm.OrbitVariance("flips"), ValueError, "`transforms` must be orbits of at least two elements"),
        (lambda: lm.OrbitVariance(loss=3), TypeError, "`loss` must be a callable or None"),
        (lambda: lm.PredictionConsistency(reference="x"), ValueError, "`reference` must be one of"),
        (lambda: lm.PredictionConsistency("flips", reference="pairs"), ValueError, "at least two elements"),
        (lambda: listed("rotation", ()), ValueError, "`parameters` must hold at least one value"),
        (lambda: listed("rotation", (float("nan"),)), ValueError, "`low` and `high` must be finite"),
        (lambda: uniform("rotation", 0), ValueError, "`limit` must be positive"),
        (lambda: uniform("rotation", 1, samples=0), ValueError, "`samples` must be a positive integer"),
        (lambda: orbits(torch.ones(2)), TypeError, "`transforms` must be names"),
        (lambda: F.relaxed_equivariance_error(cnn(), images(), "flips", sede=1), TypeError, "`options` must be among"),
        (lambda: F.relaxed_equivariance_error(cnn(), images()[0], "flips"), ValueError, "`inputs` must be non-empty"),
        (lambda: F.relaxed_equivariance_error(lambda x: x.mean(0)[None], images(), "flips"), ValueError, "one entry"),
        (lambda: F.orbit_variance(cnn(), images(), loss=lambda z, y: z), ValueError, "`targets` must be given"),
        (
            lambda: F.orbit_variance(cnn(), images(), loss=lambda z, y: z, targets=1),
            ValueError,
            r"`loss` must return one number for each of the 3 images, got \(3, 5\)",
        ),
        (lambda: lm.figures.error_curves({}, caption=""), ValueError, "`models` must hold at least one curve"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_outputs_of_another_width_are_refused():
    metric = lm.FiniteEquivarianceError("flips")
    metric.update(cnn(), images())
    with pytest.raises(ValueError, match="`images` must lead to outputs of one width"):
        metric.update(cnn(4), images())


# Stated displacements ------------------------------------------------------------------------------------------------


class Pools(nn.Module):
    """Takes images of any size; `size` makes it take one alone."""

    def __init__(self, size=None):
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3, stride=2)).double()

    def forward(self, x):
        if self.size is not None and x.shape[-2:] != self.size:
            raise ValueError(f"images must be of {self.size}")
        return self.net(x).square().mean((2, 3))


def spread_of(f):
    return 2 * len(f) * f.var(0).sum()


@pytest.mark.parametrize(("name", "sign"), [("translation_x", 1), ("translation_y", 1), ("back", -1)])
def test_shifts_compare_two_crops_of_one_image(name, sign):
    back = lm.Generator.affine("back", [[0, 0, 0], [0, 0, -2.0]])
    model, x = Pools(), torch.rand(5, 3, 14, 18, dtype=torch.float64)
    generator = back if name == "back" else name
    metric = lm.FiniteEquivarianceError(lm.orbits.displaced(generator, (3,)))
    metric.update(model, x)
    assert metric.border == "crop"
    first, second = x[..., :11, :15], x[..., :11, 3:] if name == "translation_x" else x[..., 3:, :15]
    first, second = (first, second) if sign > 0 else (second, first)
    with torch.no_grad():
        wanted = ((model(second) - model(first)).square().sum() / spread_of(model(first))).sqrt()
    torch.testing.assert_close(metric.compute()[f"{name}_3px"], wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["translation_x", "translation_y"])
def test_models_of_one_size_see_mirrored_images(name):
    model, x = Pools((10, 12)), torch.rand(5, 3, 10, 12, dtype=torch.float64)
    metric = lm.FiniteEquivarianceError(lm.orbits.displaced(name, (2,)))
    metric.update(model, x)
    assert metric.border == "reflect"
    if name == "translation_x":
        moved = torch.cat([x[..., 2:], x[..., -2:].flip(-1)], -1)
    else:
        moved = torch.cat([x[..., 2:, :], x[..., -2:, :].flip(-2)], -2)
    with torch.no_grad():
        wanted = ((model(moved) - model(x)).square().sum() / spread_of(model(x))).sqrt()
    torch.testing.assert_close(metric.compute()[f"{name}_2px"], wanted, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="images must be of"):
        F.finite_equivariance_error(model, x, lm.orbits.displaced(name, (2,), border="crop"))


def test_less_than_a_hundredth_of_the_side_is_mirrored():
    model, x = Pools(), torch.rand(3, 3, 120, 120, dtype=torch.float64)
    found = F.finite_equivariance_error(model, x, lm.orbits.displaced("translation_x", (1, 2)))
    for border, pixels in (("reflect", 1), ("crop", 2)):
        alone = F.finite_equivariance_error(model, x, lm.orbits.displaced("translation_x", (pixels,), border=border))
        name = f"translation_x_{pixels}px"
        torch.testing.assert_close(found[name], alone[name], rtol=1e-12, atol=0)


def test_linearity_of_crops_does_not_depend_on_the_size_of_outputs_there():
    """A network whose outputs grow with the size of the image, and that moves with it in the same proportion."""
    x = torch.rand(8, 1, 20, 20, dtype=torch.float64)
    ratios = []
    for power in (0, 3):
        model = lambda v, power=power: v[..., 4:6, 4:6].flatten(1) * v.shape[-1] ** power  # noqa: E731
        finite = lm.FiniteEquivarianceError(lm.orbits.displaced("translation_x", (1,)))
        local = lm.LocalEquivarianceError("translation_x")
        for metric in (finite, local):
            metric.update(model, x)
        assert finite.border == "crop"
        ratios.append(finite.linearity(local)[0]["translation_x_1px"].item())
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-12)


def test_an_output_on_the_grid_moves_along():
    """Of patches without overlap every output that both frames see is the same."""
    torch.manual_seed(0)
    grid = {"output_representation": lm.representations.Image()}
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    for conv, pixels in ((nn.Conv2d(3, 4, 2, 2).double(), (2, 4)), (nn.Conv2d(3, 4, 1).double(), (1, 2, 3))):
        found = F.finite_equivariance_error(conv, x, lm.orbits.displaced("translation", pixels), **grid)
        assert all(value < 1e-12 for value in found.values()), found
    padded = nn.Conv2d(3, 4, 3, padding=1).double()
    found = F.finite_equivariance_error(padded, x, lm.orbits.displaced("translation", (1, 2)), **grid)
    assert all(value > 1e-3 for value in found.values()), found


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("name", ["rotation", "scale", "shear_x", "translation_x"])
def test_displacements_are_root_mean_squares_over_the_frame(name, size):
    (orbit,) = lm.orbits.displaced(name, (2,))
    t = orbit.parameter(size, lm.Resampling())
    ((a, b, c), (d, e, f)) = lm.generators(name)[0].matrix
    half = min(size) / 2
    total = 0.0
    for row in range(size[0]):
        for column in range(size[1]):
            u, v = (column - (size[1] - 1) / 2) / half, (row - (size[0] - 1) / 2) / half
            total += (a * u + b * v + c) ** 2 + (d * u + e * v + f) ** 2
    assert t * half * (total / size[0] / size[1]) ** 0.5 == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lm.orbits.displaced("saturation", (1,)), "must move pixels and nothing else"),
        (lambda: lm.orbits.displaced("translation", (1.5,)), r"must be whole for shifts.*got \[1.5\]"),
        (
            lambda: lm.orbits.displaced(("rotation", "translation_x"), (1, 1.5)),
            r"must be whole for shifts.*got \[1.5\]",
        ),
        (lambda: lm.orbits.displaced("rotation", ()), "must hold positive distances"),
        (lambda: lm.orbits.displaced("rotation", (-1,)), "must hold positive distances"),
        (lambda: lm.orbits.displaced("rotation", (float("inf"),)), r"must hold positive distances, got \(inf,\)"),
        (lambda: lm.orbits.displaced("rotation", (1,), border="zeros"), "`border` must be one of"),
        (lambda: F.finite_equivariance_error(Pools(), images(4)[..., :7, :14]), "must leave half of the image"),
        (
            lambda: lm.orbits.displaced("rotation", (5,))[0].draw((0,), (8, 12), 0, lm.Resampling()),
            "half of the image in the frame, got 'rotation_5px' for images of 8×12 pixels",
        ),
    ],
)
def test_displacements_that_have_no_meaning(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_half_of_the_image_may_leave_and_a_shift_that_brightens_is_none():
    shift, brighter = lm.generators("translation_x", "saturation")
    assert len(lm.orbits.displaced(shift, (4,))[0].draw((0,), (8, 8), 0, lm.Resampling())) == 1
    assert lm.orbits.DisplacedOrbit("shift", shift, 4.0).shifts
    both = (shift + brighter).with_name("both")
    assert not lm.orbits.DisplacedOrbit("both", both, 4.0).shifts
    with pytest.raises(ValueError, match=r"must move pixels and nothing else, got \['both'\]"):
        lm.orbits.displaced(both, (4,))


def test_linearity_is_one_on_what_is_straight_and_less_where_it_bends():
    """Of a function of one angle, f(R_t x) = sin(wt + a): the chord over the slope is a known number."""
    x = torch.rand(64, 1, 24, 24, dtype=torch.float64)
    pixels = lm.orbits.displaced("rotation", (0.02, 1.0))
    finite, local = lm.FiniteEquivarianceError(pixels), lm.LocalEquivarianceError(("scale", "rotation"))
    weights = torch.randn(24 * 24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for metric in (finite, local):
        metric.update(lambda v: (v.flatten(1) @ weights).mul(0.3).sin(), x)
    value, error = finite.linearity(local)
    assert value["rotation_0.02px"].item() == pytest.approx(1, abs=2e-2)
    t = [orbit.parameter((24, 24), lm.Resampling()) for orbit in pixels]
    spread = spread_of((x.flatten(1) @ weights).mul(0.3).sin()) / 2 / 64
    for (name, ratio), step in zip(value.items(), t, strict=True):
        change = finite.compute()[name] * (2 * spread).sqrt()
        first = step * local.relative()["rotation"] * spread.sqrt()
        assert ratio.item() == pytest.approx((change / first).item(), rel=1e-9)
        assert 0 < error[name] < 0.1 * ratio
    assert value["rotation_1px"] < 0.9


def test_linearity_of_images_in_half_precision():
    """They are measured in float32, by every metric."""
    finite, local = lm.FiniteEquivarianceError(lm.orbits.displaced("rotation", (1,))), lm.LocalEquivarianceError()
    for metric in (finite, local):
        metric.update(cnn().float(), images(6).bfloat16())
    (half,) = finite.linearity(local)[0].values()
    for metric in (finite, local):
        metric.reset()
        metric.update(cnn().float(), images(6).bfloat16().float())
    (whole,) = finite.linearity(local)[0].values()
    assert half.item() == pytest.approx(whole.item(), rel=1e-6)


def test_linearity_needs_the_same_images():
    finite = lm.FiniteEquivarianceError(lm.orbits.displaced("rotation", (1,)))
    local, other = lm.LocalEquivarianceError("rotation"), lm.LocalEquivarianceError("scale")
    for metric in (finite, local, other):
        metric.update(cnn(), images(6))
    with pytest.raises(ValueError, match=r"without \['rotation'\]"):
        finite.linearity(other)
    local.reset()
    local.update(cnn(), images(6) + 1e-6)
    with pytest.raises(ValueError, match="images of the groups that were measured here"):
        finite.linearity(local)
    local.reset()
    local.update(cnn(), images(70))
    with pytest.raises(ValueError, match="and no others of them"):
        finite.linearity(local)
    listed_alone = lm.FiniteEquivarianceError(lm.orbits.listed("rotation", (0.1,)))
    with pytest.raises(ValueError, match="displaced orbits"):
        listed_alone.linearity(local)
