"""LocalEquivarianceError and its functions, against explicit Jacobians and through every torchmetrics convention."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torchmetrics import MetricCollection

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import composite

NAMES = ("translation", "rotation", "shear", "saturation")


class Net(nn.Module):
    """A small classifier with batch norm and dropout, neither of which may act during a measurement."""

    def __init__(self, classes=4, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(2, 5, 3, stride=2),
            nn.BatchNorm2d(5),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.LazyLinear(classes),
        ).to(dtype)
        self.body(torch.zeros(2, 2, 9, 9, dtype=dtype))

    def forward(self, x):
        return self.body(x)


def images(n=7, dtype=torch.float64, seed=1):
    return torch.randn(n, 2, 9, 9, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def explicit(model, x, names=NAMES, probabilities=False):
    """Lie derivatives through the explicit Jacobian, image by image, and the outputs."""
    model = copy.deepcopy(model).eval()

    def f(v):
        y = model(v[None])[0]
        return y.softmax(-1) if probabilities else y

    rows = []
    for image in x:
        jacobian = torch.autograd.functional.jacobian(f, image).flatten(1)
        tangents = lm.transforms.tangents(image, lm.generators(names), lm.Resampling()).flatten(1)
        rows.append(tangents @ jacobian.T)
    return torch.stack(rows, 1), torch.stack([f(image) for image in x])


def test_measures_equal_their_formulas():
    model, x = Net(), images()
    L, f = explicit(model, x)
    metric = lm.LocalEquivarianceError(NAMES)
    metric.update(model, x)
    relative = (L.square().sum((1, 2)) / (len(x) * f.var(0).sum())).sqrt()
    torch.testing.assert_close(torch.stack(list(metric.compute().values())), relative, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.stack(list(metric.lee().values())), L.square().mean((1, 2)), rtol=1e-10, atol=0)
    gram = torch.einsum("ibc,jbc->ij", L, L) / f.numel()
    torch.testing.assert_close(metric.gram, gram, rtol=1e-9, atol=1e-12)
    c = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 0.25], dtype=torch.float64)
    torch.testing.assert_close(metric.directional(c), torch.einsum("i,ibc->bc", c, L).square().mean())
    values, vectors = metric.principal_directions()
    torch.testing.assert_close(metric.directional(vectors), values)
    assert values.diff().min() >= 0


def test_rms_is_the_root_of_lee_in_units_of_the_output():
    model, x = Net(), images()
    L, _ = explicit(model, x)
    metric = lm.LocalEquivarianceError(NAMES, "rms")
    metric.update(model, x)
    wanted = L.square().mean((1, 2)).sqrt()
    for found in (metric.compute(), metric.rms(), F.rms(model, x, NAMES)):
        torch.testing.assert_close(torch.stack(list(found.values())), wanted, rtol=1e-10, atol=0)
    thousand = F.rms(lambda v: 1000 * model.eval()(v), x, NAMES)
    torch.testing.assert_close(torch.stack(list(thousand.values())), 1000 * wanted, rtol=1e-10, atol=0)
    # One image in a group: the jackknife of the root.
    square = L.square().mean(2)
    left = torch.stack([(square.sum(1) - square[:, k]) / (len(x) - 1) for k in range(len(x))]).sqrt()
    errors = ((len(x) - 1) / len(x) * (left - left.mean(0)).square().sum(0)).sqrt()
    found = torch.stack(list(metric.standard_error().values()))
    torch.testing.assert_close(found, errors, rtol=1e-8, atol=0)
    shifts = lm.LocalEquivarianceError("translation", "rms")
    shifts.update(model, x)
    in_pixels = (shifts.rms("pixel"), shifts.standard_error(units="pixel"))
    for by_pixel, by_unit in zip(in_pixels, (shifts.rms(), shifts.standard_error()), strict=True):
        assert by_pixel["translation_x"].item() == pytest.approx(by_unit["translation_x"].item() / 4.5)


def test_lee_of_probabilities_comes_from_the_same_pass():
    model, x = Net(), images()
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    metric = lm.LocalEquivarianceError(NAMES, lee_output="probabilities", method="forward")
    metric.update(model, x)
    assert calls.count(len(x)) == 1  # the check of the method takes single images
    L, _ = explicit(model, x, probabilities=True)
    torch.testing.assert_close(torch.stack(list(metric.lee().values())), L.square().mean((1, 2)), rtol=1e-10, atol=0)
    raw, _ = explicit(model, x)
    _, f = explicit(model, x)
    wanted = (raw.square().sum((1, 2)) / (len(x) * f.var(0).sum())).sqrt()
    torch.testing.assert_close(torch.stack(list(metric.relative().values())), wanted, rtol=1e-10, atol=0)
    auto = lm.LocalEquivarianceError(NAMES, "lee", lee_output="auto")
    assert auto(model, x) == pytest.approx({k: v.item() for k, v in metric.lee().items()})


def test_sensitivity_against_the_expectation_over_noise():
    """Of a matrix that knows no place, all directions of one norm are alike; many images average the draw of each."""
    torch.manual_seed(0)
    J = torch.randn(30, 162, dtype=torch.float64)
    x = images(3000)
    value = F.sensitivity(lambda v: v.flatten(1) @ J.T, x, "rotation", seed=3)["rotation"]
    X = lm.transforms.tangents(x, lm.generators("rotation"), lm.Resampling())[0].flatten(1)
    wanted = ((X @ J.T).square().sum() / (J.square().sum() / 162 * X.square().sum())).sqrt()
    assert value.item() == pytest.approx(wanted.item(), rel=0.03)


def test_standard_error_of_a_mean_is_the_textbook_one():
    model, x = Net(), images(20)
    metric = lm.LocalEquivarianceError(NAMES, "lee")
    metric.update(model, x)
    L, _ = explicit(model, x)
    wanted = L.square().mean(2).std(1) / 20**0.5
    torch.testing.assert_close(torch.stack(list(metric.standard_error().values())), wanted, rtol=1e-9, atol=0)


def test_standard_error_of_relative_covers_the_spread_over_samples():
    """Over many samples of images, the mean squared standard error is the variance of the measure."""
    model = Net(dtype=torch.float32)
    values, errors = [], []
    for seed in range(60):
        metric = lm.LocalEquivarianceError("rotation", with_noise=False, method="forward")
        metric.update(model, images(100, torch.float32, seed + 10))
        values.append(metric.compute()["rotation"])
        errors.append(metric.standard_error()["rotation"])
    ratio = torch.stack(errors).square().mean().sqrt() / torch.stack(values).std()
    assert 0.7 < ratio < 1.4, ratio


def test_image_output_pools_positions_by_channel():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    x = images()
    y = conv(x).detach()
    spread = (y - y.mean((0, 2, 3), keepdim=True)).square().sum() * len(x) / (len(x) - 1)
    L = lm.lie_derivative(conv, x, "rotation")["rotation"]
    wanted = (L.square().sum() / spread).sqrt()
    assert F.relative(conv, x, "rotation")["rotation"].item() == pytest.approx(wanted.item(), rel=1e-10)


@pytest.mark.parametrize("measure", ["relative", "lee", "sensitivity"])
def test_function_class_forward_and_batch_split_agree(measure):
    model, x = Net(), images(10)
    function = getattr(F, measure)(model, x, NAMES, seed=5)
    metric = lm.LocalEquivarianceError(NAMES, measure, seed=5)
    at_once = metric(model, x)
    first = metric.compute()
    metric.reset()
    for part in x.split(3):
        metric.update(model, part)
    split = metric.compute()
    metric.reset()
    for part in x.split(4):
        metric(model, part)
    through_forward = metric.compute()
    chunked = getattr(F, measure)(model, x, NAMES, seed=5, chunk_size=2)
    assert list(function) == list(metric.names)
    for other in (at_once, first, split, through_forward, chunked):
        torch.testing.assert_close(other, function, rtol=1e-9, atol=1e-13)


def test_forward_runs_the_model_once():
    model, x = Net(), images()
    metric = lm.LocalEquivarianceError(NAMES, method="forward")
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    metric(model, x)
    assert calls.count(len(x)) == 1  # the check of the method takes single images
    calls.clear()
    metric(model, x)
    assert calls == [len(x)]


def test_torchmetrics_conventions():
    model, x = Net(), images()
    metric = lm.LocalEquivarianceError(NAMES)
    assert (metric.full_state_update, metric.higher_is_better, metric.is_differentiable) == (False, False, False)
    metric.update(model, x)
    value = metric.compute()
    assert metric.state_dict() == {}
    assert not list(metric.children())
    torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), value)
    clone = metric.clone()
    clone.update(model, images(seed=2))
    torch.testing.assert_close(metric.compute(), value)
    other = lm.LocalEquivarianceError(NAMES)
    other.update(model, images(seed=2))
    other.merge_state(metric)
    torch.testing.assert_close(other.compute(), clone.compute(), rtol=1e-10, atol=0)
    metric.set_dtype(torch.float32)
    torch.testing.assert_close(metric.compute(), value, check_dtype=False, rtol=1e-4, atol=0)
    metric.reset()
    with pytest.warns(UserWarning, match="`relative` is NaN"):
        assert all(v.isnan() for v in metric.compute().values())
    with pytest.raises(ValueError, match="Unexpected keyword"):
        lm.LocalEquivarianceError(NAMES, unknown=1)


def test_collection_shares_one_pass():
    model, x = Net(), images()
    collection = MetricCollection(
        {
            "relative": lm.LocalEquivarianceError("rotation", "relative", method="forward"),
            "lee": lm.LocalEquivarianceError("rotation", "lee", method="forward"),
        }
    )
    collection.update(model, x)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    collection.update(model, x)
    assert len(calls) == 1, "metrics with equal states must form one compute group"
    values = collection.compute()
    assert set(values) == {"relative_rotation", "lee_rotation"}
    assert values["lee_rotation"] != values["relative_rotation"]


def test_plot():
    pytest.importorskip("matplotlib")
    metric = lm.LocalEquivarianceError(("rotation", "scale"))
    values = [metric(Net(), images(seed=seed)) for seed in range(3)]
    _, axis = metric.plot(values)
    assert len(axis.get_lines()) >= 2


def test_state_made_in_inference_mode_can_be_updated_later():
    model, x = Net(), images()
    inside, outside = lm.LocalEquivarianceError(NAMES), lm.LocalEquivarianceError(NAMES)
    with torch.inference_mode():
        inside.reset()
        inside.update(model, x.clone())
    for metric in (inside, outside, outside):
        metric.update(model, x)
    torch.testing.assert_close(inside.compute()["rotation"], outside.compute()["rotation"], rtol=1e-9, atol=0)
    assert inside.sum_images.sum() == 14


@pytest.mark.parametrize(
    ("model", "x", "measure", "reason"),
    [
        (lambda v: v.new_ones(len(v), 3) + 0 * v.sum(), images(), "relative", "does not vary"),
        (lambda v: v.new_ones(len(v), 3) + 0 * v.sum(), images(), "sensitivity", "does not respond to noise"),
        (Net(), images(1), "relative", "does not vary"),
        (lambda v: v.sum((1, 2, 3)) / 0, images(), "relative", "not finite"),
        (lambda v: v.flatten(1) * 1e300 * 1e10, images(), "lee", "not finite"),
    ],
)
def test_undefined_is_nan_with_a_reason(model, x, measure, reason):
    with pytest.warns(UserWarning, match=reason):
        value = getattr(F, measure)(model, x, "rotation")
    assert value["rotation"].isnan()


def test_rounding_of_float32_outputs_is_not_taken_for_spread():
    def nearly_constant(v):
        return 1.0 + 1e-9 * v.flatten(1)[:, :3]

    with pytest.warns(UserWarning, match="rounding"):
        assert F.relative(nearly_constant, images(dtype=torch.float32), "rotation")["rotation"].isnan()
    small = F.relative(lambda v: 1e-9 * v.flatten(1)[:, :3], images(dtype=torch.float32), "rotation")["rotation"]
    assert small > 0


def test_one_image_has_no_standard_error():
    metric = lm.LocalEquivarianceError("rotation", "lee")
    metric.update(Net(), images(1))
    assert metric.compute()["rotation"] > 0
    assert metric.standard_error()["rotation"].isnan()


def test_model_keeps_its_modes():
    model = Net()
    model.train()
    model.body[1].eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    lm.LocalEquivarianceError("affine")(model, images())
    assert model.training
    assert not model.body[1].training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"measure": "lie"}, ValueError, "`measure` must be one of"),
        ({"lee_output": "softmax"}, ValueError, "`lee_output` must be one of"),
        ({"output": "scores"}, ValueError, "`output` must be"),
        ({"generators": "rotate"}, ValueError, "got 'rotate'"),
        ({"generators": 3}, TypeError, "`generators` must be names"),
        ({"generators": ()}, ValueError, "at least one generator"),
        ({"generators": ("shear", "shear_x")}, ValueError, "more than once"),
        ({"method": "backward"}, ValueError, "`method` must be one of"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        ({"seed": -1}, ValueError, "`seed` must be a non-negative integer"),
        ({"resampling": "bspline"}, TypeError, "`resampling` must be a `Resampling`"),
        ({"output_representation": lm.representations.Image}, TypeError, "Pass an instance"),
        ({"measure": "sensitivity", "with_noise": False}, ValueError, "`with_noise` must be True"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        lm.LocalEquivarianceError(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (images().to(torch.uint8), TypeError, "floating-point dtype, got torch.uint8"),
        (images()[0], ValueError, "must be non-empty with axes"),
        (images()[:0], ValueError, "must be non-empty"),
        (images().where(images() > -2, torch.nan), ValueError, "must be finite"),
        ([images()], TypeError, "`inputs` must be a tensor, got list"),
    ],
)
def test_bad_images_stop_before_the_model_runs(x, error, match):
    def never(v):
        raise RuntimeError("the model ran")

    with pytest.raises(error, match=match):
        lm.LocalEquivarianceError("rotation").update(never, x)
    with pytest.raises(error, match=match):
        F.relative(never, x, "rotation")


def test_bad_readings():
    metric = lm.LocalEquivarianceError(("rotation", "scale"), with_noise=False)
    metric.update(Net(), images())
    with pytest.raises(ValueError, match="`with_noise` must be True"):
        metric.sensitivity()
    with pytest.raises(ValueError, match="`measure` must be one of"):
        metric.standard_error("spread")
    with pytest.raises(ValueError, match="`coefficients` must hold 2 numbers"):
        metric.directional([1.0])
    with pytest.raises(ValueError, match="outputs of one width"):
        metric.update(Net(classes=6), images())
    with pytest.raises(ValueError, match="`lee_output` must be 'output'"):
        F.lee(nn.Conv2d(2, 2, 1).double(), images(), "rotation", lee_output="probabilities")
    with pytest.raises(ValueError, match="one entry for each of the 7 images"):
        F.lee(lambda v: v.sum(0).flatten()[None], images(), "rotation")
    with pytest.raises(TypeError, match="`options` must be among"):
        F.lee(Net(), images(), "rotation", chunks=2)


class Planted(nn.Module):
    """A smooth function of weighted rings of a warped image: rotations of the warped image leave it alone.

    With T_S x(p) = x(Sp), f(x) = g(T_S x) and g invariant to exp(tR), f is invariant to the group of S R S⁻¹.
    """

    def __init__(self, warp, size=40):
        super().__init__()
        torch.manual_seed(0)
        at = ((torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1).square()
        radius = (at + at[:, None]).sqrt()
        self.rings = torch.stack([(-((radius - r) ** 2) / 0.02).exp() for r in torch.linspace(0, 0.4, 5)])
        self.head = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        self.warp = lm.Generator.affine("warp", warp)

    @property
    def symmetry(self):
        step = torch.linalg.matrix_exp(torch.tensor([*self.warp.matrix, (0, 0, 0)], dtype=torch.float64))
        rotation = torch.tensor([(0, 1, 0), (-1, 0, 0), (0, 0, 0)], dtype=torch.float64)
        return (step @ rotation @ torch.linalg.inv(step))[:2]

    def forward(self, x):
        warped = lm.transforms.apply(x, self.warp, 1.0)
        return self.head(torch.einsum("bchw,rhw->br", warped, self.rings) / 20)


def blobs(n=24, size=40):
    """Smooth images that vanish at the frame."""
    source = torch.Generator().manual_seed(3)
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    total = torch.zeros(n, 1, size, size, dtype=torch.float64)
    for _ in range(8):
        cx, cy = (torch.rand(2, n, 1, 1, 1, generator=source, dtype=torch.float64) - 0.5) * 1.0
        height = torch.randn(n, 1, 1, 1, generator=source, dtype=torch.float64)
        total += height * (-((at - cx) ** 2 + (at[:, None] - cy) ** 2) / 0.04).exp()
    return total


def angle(generator, matrix):
    found, wanted = torch.tensor(generator.matrix, dtype=torch.float64).flatten(), matrix.flatten()
    return torch.rad2deg(torch.acos(((found @ wanted) / found.norm() / wanted.norm()).abs().clamp(max=1)))


@pytest.mark.parametrize("normalise", [None, "input"])
@pytest.mark.parametrize("names", ["affine", ("translation", "rotation", "scale", "shear_x", "stretch_x")], ids=str)
@pytest.mark.parametrize(
    "warp",
    [
        [[0, 0, 0], [0, 0, 0]],
        [[0.3, 0, 0], [0, -0.2, 0]],
        [[0, 0.4, 0], [0.1, 0, 0]],
        [[0.1, -0.2, 0.15], [0.2, 0.1, -0.1]],
    ],
    ids=["none", "stretch", "shear", "all"],
)
def test_a_planted_symmetry_is_the_least_violated_direction(warp, names, normalise):
    model = Planted(warp)
    metric = lm.LocalEquivarianceError(names, with_noise=False)
    metric.update(model, blobs())
    values, directions = metric.principal_directions(normalise)
    assert values.shape == (6,)
    assert directions.shape == (6, len(metric.names))
    least = lm.Generator.combination("least", metric.generators, directions[0])
    assert angle(least, model.symmetry) < 1
    assert values[0] < 1e-4 * values[1]
    most = lm.Generator.combination("most", metric.generators, directions[-1])
    assert angle(most, model.symmetry) > 30


def test_gains_solve_the_generalised_problem():
    model, x = Net(), images(12)
    metric = lm.LocalEquivarianceError(NAMES)
    metric.update(model, x)
    values, directions = metric.principal_directions("input")
    L, _ = explicit(model, x)
    X = lm.transforms.tangents(x, lm.generators(NAMES), lm.Resampling()).flatten(2)
    for value, c in zip(values, directions, strict=True):
        out, into = (torch.einsum("k,kbn->bn", c, v).square().mean() for v in (L, X))
        assert value.item() == pytest.approx((out / into).item(), rel=1e-8)
    assert values.diff().min() > 0
    for c in torch.randn(200, 6, dtype=torch.float64):
        out, into = (torch.einsum("k,kbn->bn", c, v).square().mean() for v in (L, X))
        assert values[0] * (1 - 1e-9) <= out / into <= values[-1] * (1 + 1e-9)
    function = F.principal_directions(model, x, NAMES, normalise="input")
    torch.testing.assert_close(function, (values, directions), rtol=1e-8, atol=1e-10)
    doubled, _ = F.principal_directions(lambda v: 2 * model.eval()(v / 3), 3 * x, NAMES, normalise="input")
    torch.testing.assert_close(doubled, 4 / 9 * values, rtol=1e-8, atol=0)


def test_directions_of_parts_are_those_of_the_whole():
    model, x = Net(), images(10)
    whole = F.principal_directions(model, x, NAMES, normalise="input")
    split, through_forward, other = (lm.LocalEquivarianceError(NAMES) for _ in range(3))
    for part in x.split(5):
        split.update(model, part)
        through_forward(model, part)
    torch.testing.assert_close(split.principal_directions("input"), whole, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(through_forward.principal_directions("input"), whole, rtol=1e-8, atol=1e-9)
    other.update(model, images(4, seed=2))
    other.merge_state(split)
    both = F.principal_directions(model, torch.cat([x, images(4, seed=2)]), NAMES, normalise="input")
    torch.testing.assert_close(other.principal_directions("input"), both, rtol=1e-8, atol=1e-9)
    assert split.principal_directions()[0][0] != whole[0][0]
    split.reset()
    assert not split.sum_energy.any()


def test_directions_do_not_depend_on_how_generators_are_written():
    """The nine affine names and any basis of what they span give the same gains."""
    model, x = Net(), images()
    nine, _ = F.principal_directions(model, x, "affine", normalise="input")
    basis = ("translation", "shear", "stretch")
    six, _ = F.principal_directions(model, x, basis, normalise="input")
    small = [0.01 * g for g in lm.generators(basis)]
    torch.testing.assert_close(nine, six, rtol=1e-7, atol=0)
    torch.testing.assert_close(F.principal_directions(model, x, small, normalise="input")[0], six, rtol=1e-7, atol=0)
    values, directions = F.principal_directions(model, x, "affine")
    metric = lm.LocalEquivarianceError("affine")
    metric.update(model, x)
    torch.testing.assert_close(metric.directional(directions), values, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(directions @ directions.mT, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)
    for normalise in (None, "input"):
        for names in ("affine", basis, ("rotation", "scale", "saturation")):
            _, rows = F.principal_directions(model, x, names, normalise=normalise)
            assert (rows.max(1).values == rows.abs().max(1).values).all()
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows), dtype=torch.float64))


def test_combinations_that_move_no_image_have_no_gain():
    rows = images()[..., :1].expand(-1, -1, -1, 9).contiguous()  # nothing changes along x
    values, directions = F.principal_directions(Net(), rows, ("translation", "saturation"), normalise="input")
    assert values.shape == (2,)
    assert directions[:, 0].abs().max() < 1e-6
    nothing = F.principal_directions(Net(), rows, lm.Generator.affine("nothing", [[0, 0, 0], [0, 0, 0]]))
    assert [part.shape for part in nothing] == [(0,), (0, 1)]
    options = {"normalise": "input", "resampling": lm.PAPER}  # whose slopes of a constant are 0 exactly
    flat = F.principal_directions(Net(), torch.ones_like(rows), "translation", **options)
    assert flat[0].shape == (0,)
    assert flat[1].shape == (0, 2)


def test_directions_of_nothing_measured_or_not_finite_are_nan():
    with pytest.warns(UserWarning, match="NaN"):
        values, directions = lm.LocalEquivarianceError("affine").principal_directions("input")
    assert values.isnan().all()
    assert directions.isnan().all()
    assert directions.shape == (6, 9)
    with pytest.raises(ValueError, match="`normalise` must be None or 'input', got 'output'"):
        lm.LocalEquivarianceError("affine").principal_directions("output")
    with pytest.raises(ValueError, match="`normalise` must be None or 'input'"):
        F.principal_directions(Net(), images(), normalise="output")


COUNTS = [(6, 5), (6, 0)]


def _work(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        for counts in COUNTS:
            x = images(11)[rank::2][: counts[rank]]
            metric = lm.LocalEquivarianceError(NAMES, lee_output="probabilities", seed=1)
            for part in x.split(2) if len(x) else ():
                metric.update(Net(), part)
            found = (metric.measures(), metric.compute(), metric.gram, metric.principal_directions("input"))
            results[counts, rank] = found
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found, for each number of images that they had."""
    found = mp.Manager().dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = tmp_path_factory.mktemp("processes") / "store"
        mp.start_processes(_work, (str(path), found), nprocs=2, start_method="forkserver")
        return dict(found)


@pytest.mark.parametrize("counts", COUNTS)
def test_two_processes_give_the_values_of_one(results, counts):
    single = lm.LocalEquivarianceError(NAMES, lee_output="probabilities", seed=1)
    x = images(11)
    if counts == (6, 5):
        single.update(Net(), x)
        for rank in (0, 1):
            measures, value, gram, directions = results[counts, rank]
            torch.testing.assert_close(directions, single.principal_directions("input"), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(measures, single.measures(), rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(value, single.compute(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(gram, single.gram, rtol=1e-9, atol=1e-12)
    else:
        single.update(Net(), x[::2])
        for rank in (0, 1):
            torch.testing.assert_close(results[counts, rank][1], single.compute(), rtol=1e-9, atol=1e-12)


# Units ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 9), (8, 14)])
def test_values_per_pixel(size):
    model = lambda v: v.square().mean((2, 3))  # noqa: E731
    x = torch.randn(6, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    metric = lm.LocalEquivarianceError(("translation_x", "rotation"))
    metric.update(model, x)
    half = min(size) / 2
    radius = sum(
        (i - (size[0] - 1) / 2) ** 2 + (j - (size[1] - 1) / 2) ** 2 for i in range(size[0]) for j in range(size[1])
    )
    pixels = {"translation_x": half, "rotation": (radius / size[0] / size[1]) ** 0.5}
    for name, each in pixels.items():
        assert metric.relative(units="pixel")[name].item() == pytest.approx(metric.relative()[name].item() / each)
        assert metric.lee(units="pixel")[name].item() == pytest.approx(metric.lee()[name].item() / each**2)
        for measure, power in (("relative", 1), ("lee", 2)):
            one, other = (metric.standard_error(measure, units=units)[name].item() for units in ("pixel", "t"))
            assert one == pytest.approx(other / each**power)


def test_units_that_have_no_meaning():
    metric = lm.LocalEquivarianceError(("rotation", "saturation"))
    metric.update(Net(), images())
    with pytest.raises(ValueError, match=r"must be 't' for generators that move no pixels, got 'pixel' for \['satur"):
        metric.relative(units="pixel")
    with pytest.raises(ValueError, match="`units` must be one of"):
        metric.relative(units="degrees")
    mixed = lm.LocalEquivarianceError("rotation")
    for size in (8, 9):
        mixed.update(lambda v: v.mean((2, 3)), torch.rand(3, 3, size, size))
    assert mixed.input_shape is None
    with pytest.raises(ValueError, match=r"unless all images are of one size, got \[\(3, 8, 8\), \(3, 9, 9\)\]"):
        mixed.relative(units="pixel")


def test_a_spread_from_elsewhere():
    """Ten times the images that a model is measured on, and another model's outputs."""
    model, x = Net(), images(40)
    few, many = lm.LocalEquivarianceError("rotation"), lm.LocalEquivarianceError("rotation")
    few.update(model, x[:5])
    many.update(model, x)
    L, _ = explicit(model, x[:5], ("rotation",))
    with torch.no_grad():
        wanted = (L[0].square().sum() / 5 / model.eval()(x).var(0).sum()).sqrt()
    found = few.relative(spread_from=many)["rotation"]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    other = lm.LocalEquivarianceError("rotation")
    other.update(lambda v: v.mean((2, 3))[:, :1], x)
    with pytest.raises(ValueError, match="`spread_from` must be a metric of outputs of 4 means that vary"):
        few.relative(spread_from=other)


def test_relative_does_not_depend_on_how_many_images_there_are():
    """The variance is that of a sample: pairs of images give, on average of squares, what hundreds do."""
    model, x = Net(), images(400)
    squares = []
    for start in range(0, 400, 2):
        metric = lm.LocalEquivarianceError("rotation")
        metric.update(model, x[start : start + 2])
        squares.append((metric.lee()["rotation"] / metric.relative()["rotation"].square()).item())  # variance / dim
    whole = lm.LocalEquivarianceError("rotation")
    whole.update(model, x)
    wanted = (whole.lee()["rotation"] / whole.relative()["rotation"].square()).item()
    assert sum(squares) / len(squares) == pytest.approx(wanted, rel=0.15)


def test_pixels_of_outputs_with_named_parts():
    """Each part is what it is alone; of generators of other reach each has its own pixels."""
    model, x, asked = Net(), images(), ("rotation", "perspective")
    alone = lm.LocalEquivarianceError(asked)
    alone.update(model, x)
    layout = {"a": lm.representations.Invariant(), "b": lm.representations.Invariant()}
    both = lm.LocalEquivarianceError(asked, output_representation=layout)
    both.update(lambda x: {"a": model(x), "b": 3 * model(x)}, x)
    for measure, factor in (("relative", 1), ("rms", 3), ("lee", 9)):
        own, values = getattr(alone, measure)("pixel"), getattr(both, measure)("pixel")
        errors = alone.standard_error(measure, "pixel"), both.standard_error(measure, "pixel")
        for one, found in ((own, values), errors):
            wanted = {f"{part}/{name}": by * one[name] for part, by in (("a", 1), ("b", factor)) for name in one}
            assert list(found) == list(wanted)
            torch.testing.assert_close(found, wanted)
    still = lm.LocalEquivarianceError(("rotation", "saturation"), output_representation=layout)
    still.update(lambda x: {"a": model(x), "b": 3 * model(x)}, x)
    with pytest.raises(ValueError, match=r"move no pixels, got 'pixel' for \['saturation'\]"):
        still.rms("pixel")


@pytest.mark.parametrize("measure", [F.lee, F.rms, F.relative, F.sensitivity, F.gram, F.principal_directions])
def test_a_class_is_no_representation(measure):
    with pytest.raises(TypeError, match=r"`input_representation` must be a representation, .* Pass an instance"):
        measure(Net(), images(), "rotation", input_representation=lm.representations.Image)


@pytest.mark.parametrize("lee_output", ["output", "probabilities"])
def test_large_outputs_are_summed_a_few_samples_at_a_time(monkeypatch, lee_output):
    x = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).double() / 8

    def states():
        metric = lm.LocalEquivarianceError(("rotation", "scale"), lee_output=lee_output)
        metric.update(lambda v: (v.flatten(1) @ weight.T).sin(), x)
        return metric.metric_state

    together = states()
    monkeypatch.setattr(composite, "_AT_ONCE", 6)
    torch.testing.assert_close(states(), together, equal_nan=True)
