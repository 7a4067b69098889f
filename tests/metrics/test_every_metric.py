"""What holds of every metric: options that were given, inherited and told apart, descriptions, and resets."""

import copy
import gc
import pickle

import pytest
import torch
from cases import cnn, images
from torch import nn
from torchmetrics import MetricCollection

import lie_metric as lm
from lie_metric import functional as F
from lie_metric import representations as R
from lie_metric.functional import local_equivariance
from lie_metric.jacobian import Check
from lie_metric.orbits import Element, LatticeOrbit, lattice, listed, uniform

MAKE = {
    "local": lambda **o: lm.LocalEquivarianceError(("rotation", "scale"), **o),
    "finite": lambda **o: lm.FiniteEquivarianceError(listed("rotation", [0.2]), **o),
    "lattice": lambda **o: lm.LatticeEquivarianceError("flips", **o),
    "consistency": lambda **o: lm.PredictionConsistency(**o),
    "variance": lambda **o: lm.OrbitVariance(**o),
    "relaxed": lambda **o: lm.RelaxedEquivarianceError(**o),
    "band": lambda **o: lm.BandLimitedEquivariance(kinds=("eq_t",), **o),
    "stability": lambda **o: lm.RelativeStability(**o),
}


def encode(model, x):
    return model[:-1](x)


def values(metric, model, x):
    metric.update(model, x)
    return torch.stack(list(metric.compute().values()))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
class TestEvery:
    def test_options_are_inherited_where_none_were_given(self, make):
        own, other = (lambda y: y[:, :3]), (lambda y: y[:, 1:])
        model, x = cnn(), images(4)
        plain = make()
        taken = plain.inheriting(output=other, function=encode, seed=1, chunk_size=1, lee_output="output")
        assert "output" not in plain.given
        assert type(taken) is type(plain)
        torch.testing.assert_close(
            values(taken, model, x), values(make(output=other, function=encode, seed=1), model, x), equal_nan=True
        )
        kept = make(output=own, seed=2)
        assert {"output", "seed"} <= kept.given
        kept.update(model, x)
        fresh = pickle.loads(pickle.dumps(make(seed=2))).inheriting(seed=0, output=other)
        assert (fresh.seed, fresh.output) == (2, other)
        fresh = copy.deepcopy(kept).inheriting(output=other, seed=0, function="forward")
        assert (fresh.seed, fresh.output, fresh.function) == (2, own, "forward")
        assert not fresh.sum_images.any()
        assert fresh.names == kept.names
        assert kept.sum_images.sum() == 4

    def test_bad_options_are_refused_when_inherited(self, make):
        with pytest.raises(ValueError, match="`output` must be 'logits'"):
            make().inheriting(output="scores")

    def test_descriptions_and_resets(self, make):
        metric = make()
        assert metric.described is None
        metric.update(cnn(), images(4))
        assert metric.described == "(B, 5): invariant, class scores"
        first = metric.compute()
        metric.reset()
        assert metric.described is None
        metric(cnn(), images(4))
        torch.testing.assert_close(metric.compute(), first, equal_nan=True)
        assert metric.described is not None

    def test_nothing_measured_says_so(self, make):
        with pytest.warns(UserWarning, match="NaN.*: no image was measured; call `update`"):
            assert all(value.isnan() for value in make().compute().values())

    @pytest.mark.parametrize(
        "options",
        [{"output": lambda y: y * torch.tensor([1.0, 1, 1, 1, 1 + 1e-9])}, {"function": "forward"}, {"seed": 1}],
        ids=["output", "function", "seed"],
    )
    def test_other_options_never_share_a_pass(self, make, options):
        """The first states are equal here, so that only the options tell them apart."""

        class Same(nn.Module):
            def forward(self, x):
                return x.new_ones(len(x), 5) + 0 * x.sum()

        model, x = Same(), images(4)
        both = MetricCollection({"a": make(), "b": make(**options), "c": make()})
        both.update(model, x)
        assert sorted(map(sorted, both.compute_groups.values())) == [["a", "c"], ["b"]]

    @pytest.mark.parametrize(("name", "other"), [("output", "probabilities"), ("function", lambda m, x: 2 * m(x))])
    def test_sums_of_two_functions_are_refused(self, make, name, other):
        metric, model, x = make(), cnn(), images(4)
        setattr(metric, name, other)
        setattr(metric, name, getattr(make(), name))
        metric.update(model, x)
        copied, stored = copy.deepcopy(metric), copy.deepcopy(metric)
        before = metric.compute()
        setattr(metric, name, other)
        for call in (lambda: metric.update(model, x), metric.replicates, lambda: metric(model, x)):
            with pytest.raises(ValueError, match=f"`{name}` must stay the same over all images, .* after 4 images"):
                call()
        setattr(metric, name, getattr(copied, name))
        torch.testing.assert_close(metric.compute(), before, equal_nan=True)
        copied.update(model, x)
        setattr(stored, name, other)
        stored.reset()
        torch.testing.assert_close(values(stored, model, x), values(make(**{name: other}), model, x), equal_nan=True)

    def test_warnings_point_to_the_line_of_the_user(self, make):
        metric = make()
        with pytest.warns(UserWarning, match="NaN") as seen:
            metric.compute()
        assert all(one.filename == __file__ for one in seen if "no image" in str(one.message))


def test_what_names_and_shapes_follow_from_stays():
    metric = lm.LocalEquivarianceError(("rotation", "scale"))
    with pytest.raises(AttributeError, match=r"`generators` of .*, got 'shear' for \['rotation', 'scale'\]. Make"):
        metric.generators = "shear"
    with pytest.raises(AttributeError, match=r"got \['shear_x', 'shear_y'\] for"):
        metric.generators = lm.generators("shear")
    with pytest.raises(AttributeError, match="`orbits` of a PredictionConsistency must stay"):
        MAKE["consistency"]().orbits = listed("rotation", [0.2])
    with pytest.raises(AttributeError, match="`quantities` of a ConservationError must stay"):
        lm.ConservationError({"first": lambda x: x[:, 0]}).quantities = {}
    assert metric.names == copy.deepcopy(metric).names == pickle.loads(pickle.dumps(metric)).names


def test_noise_of_some_images_is_no_sensitivity():
    metric, model, x = lm.LocalEquivarianceError("rotation"), cnn(), images(6)
    metric.update(model, x[:3])
    metric.with_noise = True
    with pytest.raises(ValueError, match=r"`with_noise` must stay the same over all .* got True after 3 .* False"):
        metric.update(model, x[3:])
    with pytest.raises(ValueError, match="`with_noise` must stay the same"):
        metric.sensitivity()


def test_a_measure_chosen_later_is_read_like_any_other():
    metric = lm.LocalEquivarianceError("rotation")
    metric.update(cnn(), images(4))
    for measure in ("relative", "rms", "lee"):  # what torchmetrics keeps is of the measure before
        metric.measure = measure
        assert metric.compute() == getattr(metric, measure)()
    metric.measure = "sensitivity"
    with pytest.raises(ValueError, match="`with_noise` must be True to read the sensitivity"):
        metric.compute()
    metric.measure = "typo"
    with pytest.raises(ValueError, match=r"`measure` must be one of \['lee', 'relative', 'rms'\], got 'typo'"):
        metric.compute()


def test_a_collection_measures_each_orbit_by_itself():
    """Orbits of one number of elements whose first errors are all zero, then not."""
    x = images(6)
    flat = x.mean((2, 3), keepdim=True).expand_as(x)
    left = nn.Flatten()
    one, other = (lm.RelaxedEquivarianceError(listed("translation_x", [t])) for t in (0.2, 0.5))
    both = MetricCollection({"one": one, "other": other}, compute_groups=True)
    both.update(left, flat)
    both.update(left, x)
    for name, t in (("one", 0.2), ("other", 0.5)):
        alone = lm.RelaxedEquivarianceError(listed("translation_x", [t]))
        alone.update(left, flat)
        alone.update(left, x)
        torch.testing.assert_close(both[name].compute(), alone.compute())
    assert len(both.compute_groups) == 2


class TestVerification:
    """A model is verified once, and anew when it, the options, the kind of images, or the sums are others."""

    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []
        real = local_equivariance.linearise

        def spied(model, inputs, generators, options, **kwargs):
            calls.append((kwargs["verify"], kwargs["known"] or options.method))
            result = real(model, inputs, generators, options, **kwargs)
            check = Check("agrees", result.method, 1e-9, 1e-12) if kwargs["verify"] else None
            object.__setattr__(result, "check", check)
            return result

        monkeypatch.setattr(local_equivariance, "linearise", spied)
        return calls

    def test_once_for_each_model_and_setting(self, asked):
        metric, model, x = lm.LocalEquivarianceError("rotation", method="forward"), cnn(), images(4)
        assert metric.method_used is metric.check is None
        metric.update(model, x)
        metric.update(model, x[:2])
        metric(model, x)
        assert asked == [(True, "forward"), (False, "forward"), (False, "forward")]
        assert (metric.method_used, metric.check.status) == ("forward", "agrees")
        for change in (
            lambda: metric.update(cnn(), x),
            lambda: metric.update(model, x),  # after another one
            lambda: metric.update(model, x[..., :12]),
            lambda: metric.update(model, x[..., :12].float().double()[..., :11]),
            lambda: setattr(metric, "method", "double_backward") or metric.update(model, x),
            lambda: metric.reset() or metric.update(model, x),
            lambda: copy.deepcopy(metric).update(model, x),
            lambda: pickle.loads(pickle.dumps(metric)).update(model, x),
        ):
            asked.clear()
            change()
            assert asked[-1] == (True, metric.method), change
            assert len(asked) == 1
        assert metric.method_used == "double_backward"

    def test_bound_methods_are_one_object_and_functions_made_anew_are_not(self, asked):
        metric, model, x = lm.LocalEquivarianceError("rotation"), cnn(), images(4)
        metric.update(model.forward, x)
        metric.update(model.forward, x)
        assert [verify for verify, _ in asked] == [True, False]
        asked.clear()
        for _ in range(2):
            metric.update(lambda v: model(v), x)
            gc.collect()
        assert [verify for verify, _ in asked] == [True, True]

    def test_what_cannot_be_referred_to_weakly_is_verified_each_time(self, asked):
        class Slotted:
            __slots__ = ()

            def __call__(self, v):
                return v.mean((2, 3))

        metric, model = lm.LocalEquivarianceError("rotation"), Slotted()
        metric.update(model, images(4))
        metric.update(model, images(4))
        assert [verify for verify, _ in asked] == [True, True]

    def test_a_model_is_not_kept_alive(self):
        import weakref

        metric, model = lm.LocalEquivarianceError("rotation"), cnn()
        metric.update(model, images(4))
        seen = weakref.ref(model)
        del model
        gc.collect()
        assert seen() is None


class Vectors:
    """Fields of vectors (B, 2, H, W) in isotropic coordinates: T_t v (p) = A⁻¹ v(A p), A = exp(tX)."""

    def check(self, tensor, name):
        assert tensor.shape[1] == 2

    def act(self, tensor, generator, t, resampling):
        assert isinstance(t, float)
        moved = lm.transforms.apply(tensor, generator, t, resampling)
        linear = torch.tensor(generator.matrix, dtype=tensor.dtype)[:, :2]
        return torch.einsum("ij,bjhw->bihw", torch.linalg.matrix_exp(-t * linear), moved)

    def tangents(self, tensor, generators, resampling):
        moved = R.Image().tangents(tensor, generators, resampling)
        linear = torch.tensor([g.matrix for g in generators], dtype=tensor.dtype)[:, :, :2]
        return moved - torch.einsum("kij,bjhw->kbihw", linear, tensor)

    def map(self, tensor, function):
        return function(tensor)

    def components(self, tensor):
        return R.Image().components(tensor)


def gradient(x):
    """The field of slopes of smooth images; under rotations it turns with them."""
    dx, dy = lm.resampling.slopes(x[:, :1], lm.Resampling("fourier"))
    return torch.cat([dx, dy], 1)


def bumps(n=4, size=24):
    """Smooth, and zero at the frame."""
    at = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = torch.meshgrid(at, at, indexing="ij")
    source = torch.Generator().manual_seed(0)
    centre = 0.12 * torch.randn(n, 2, generator=source, dtype=torch.float64)
    rows = [(-((x - a) ** 2 + 2 * (y - b) ** 2) / 0.08).exp() for a, b in centre.tolist()]
    return torch.stack(rows)[:, None]


class TestOwnActions:
    """Companions go through `act`, so that components turn with the image."""

    @pytest.mark.parametrize("orbit", [listed("rotation", [0.5])[0], uniform("rotation", 0.5), uniform("affine", 0.05)])
    def test_a_gradient_is_a_field_of_vectors(self, orbit):
        if orbit.name.startswith("affine"):
            orbit = uniform(("rotation", "translation"), 0.1)
        vectors = F.finite_equivariance_error(gradient, bumps(), orbit, output_representation=Vectors())
        scalars = F.finite_equivariance_error(gradient, bumps(), orbit, output_representation=R.Image())
        assert vectors[orbit.name] < 0.02
        assert scalars[orbit.name] > (0.1 if len(orbit.generators) == 1 else 0.03)

    def test_inputs_too(self):
        """The divergence of a field of vectors is a scalar."""

        def divergence(v):
            stencil = lm.Resampling("fourier")
            return lm.resampling.slopes(v[:, :1], stencil)[0] + lm.resampling.slopes(v[:, 1:], stencil)[1]

        options = {"output_representation": R.Image()}
        orbit, fields = listed("rotation", [0.5]), gradient(bumps())
        vectors = F.finite_equivariance_error(divergence, fields, orbit, input_representation=Vectors(), **options)
        scalars = F.finite_equivariance_error(divergence, fields, orbit, **options)
        assert vectors["rotation_0.5"] < 0.02 < 0.05 < scalars["rotation_0.5"]

    def test_actions_without_a_grid(self):
        """States on which a matrix acts, with no images at all."""

        class Plane:
            def check(self, tensor, name):
                assert tensor.shape[1:] == (2,)

            def act(self, tensor, generator, t, resampling):
                linear = torch.tensor(generator.matrix, dtype=tensor.dtype)[:, :2]
                return tensor @ torch.linalg.matrix_exp(t * linear).mT

            def tangents(self, tensor, generators, resampling):
                return torch.stack([tensor @ tensor.new_tensor(g.matrix)[:, :2].mT for g in generators])

            def components(self, tensor):
                return (tensor[:, None],)

        q = torch.randn(6, 2, dtype=torch.float64)
        both = {"input_representation": Plane(), "output_representation": Plane()}
        for orbit in (*listed("rotation", [0.7]), uniform(("rotation", "scale"), 0.7)):
            found = F.finite_equivariance_error(lambda v: v * v.norm(dim=1, keepdim=True), q, orbit, **both)
            tolerance = 1e-12 if orbit.name == "rotation_0.7" else 2
            assert found[orbit.name] < tolerance
            assert F.finite_equivariance_error(lambda v: v.flip(1), q, orbit, **both)[orbit.name] > 0.1
        with pytest.raises(TypeError, match="must have a method `map"):
            F.lattice_equivariance_error(lambda v: v, q, "flips", **both)

    def test_measures_that_only_move_places_refuse_them(self):
        for measure, options in ((F.relative_stability, {}), (F.eq_r, {"data_range": 1.0})):
            with pytest.raises(TypeError, match="`output_representation` must be a layout of scalars"):
                measure(gradient, bumps(size=40), output_representation=Vectors(), **options)

    def test_elements_of_ones_own_move_images(self):
        flip = Element(lambda x: x.flip(-1), lambda x: x.flip(-1), lambda x: torch.ones((1, *x.shape[-2:])).bool())

        class Mirror:
            name, complete = "mirror", False

            def __len__(self):
                return 1

            def draw(self, indices, size, seed, resampling):
                return [flip]

        found = F.relaxed_equivariance_error(nn.Flatten(), images(), Mirror())
        assert (
            found["mirror"]
            == F.relaxed_equivariance_error(nn.Flatten(), images(), "flip_horizontal")["flip_horizontal"]
        )


@pytest.mark.parametrize("measure", [F.relative_stability, F.eq_t, F.eq_t_frac])
def test_channels_last_inputs(measure):
    """The same images in the other layout give the same numbers."""
    conv = nn.Conv2d(3, 4, 3).double()

    def model(x):
        return conv(x).tanh().mean((2, 3))

    found = measure(lambda x: model(x.movedim(-1, 1)), images().movedim(1, -1), input_representation=R.ChannelsLast())
    if isinstance(found, dict):
        found, wanted = found["deformation"], measure(model, images())["deformation"]
    else:
        wanted = measure(model, images())
    torch.testing.assert_close(found, wanted)


def test_the_mean_distance_is_a_mean_over_elements():
    group = lattice("D4")[-1]
    whole = F.relaxed_equivariance_error(cnn(), images(), group)["D4"]
    each = F.relaxed_equivariance_error(cnn(), images(), "D4")
    total = sum(value for name, value in each.items() if name != "D4")
    torch.testing.assert_close(whole, total / 8)
    some = LatticeOrbit("four", group.transforms[1:5])
    torch.testing.assert_close(
        F.relaxed_equivariance_error(cnn(), images(), some)["four"],
        sum(each[transform.name] for transform in some.transforms) / 4,
    )


def test_whole_groups_see_all_of_the_variance_and_samples_a_part():
    model, x = cnn().eval(), images(5)
    for group in (lattice("rotations_90")[-1], lattice("D4")[-1]):
        assert group.complete
        z = torch.stack([model(transform(x)) for transform in group.transforms])
        wanted = (z - z.mean(0)).square().sum(-1).mean()
        torch.testing.assert_close(F.orbit_variance(model, x, group)[group.name], wanted.detach())
        part = LatticeOrbit("part", group.transforms)
        found = F.orbit_variance(model, x, part)["part"]
        torch.testing.assert_close(found, wanted.detach() * len(part) / (len(part) - 1))
    assert [len(group) for group in (lattice("rotations_90")[-1], lattice("D4")[-1])] == [4, 8]
    assert not any(orbit.complete for orbit in lattice("D4")[:-1])


def test_sensitivity_has_for_each_generator_noise_of_its_own_norm_and_spectrum():
    torch.manual_seed(0)
    J, x, names = torch.randn(4, 768, dtype=torch.float64), images(4), ("rotation", "translation_x", "saturation")
    found = F.sensitivity(lambda v: v.flatten(1) @ J.T, x, names, seed=7)
    noise = torch.fft.fft2(lm.randomness.noise(x[:, :1], range(4), 7))
    for name in names:
        X = lm.transforms.tangents(x, lm.generators(name), lm.Resampling())[0]
        turned = torch.fft.ifft2(torch.fft.fft2(X) * noise / noise.abs())
        assert turned.imag.abs().max() < 1e-12
        torch.testing.assert_close(turned.real.square().sum((1, 2, 3)), X.square().sum((1, 2, 3)))
        X, turned = X.flatten(1), turned.real.flatten(1)
        wanted = ((X @ J.T).square().sum() / (turned @ J.T).square().sum()).sqrt()
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=0)


def test_probabilities_of_float32_outputs_are_taken_in_float64():
    model, x = cnn().float(), images(4).float()
    with torch.no_grad():
        L = lm.lie_derivative(model, x, "rotation", method="forward")["rotation"].double()
        p = lm.measured.function_of(model.eval(), "logits")(x).double().softmax(-1)
    inner = (p * (L - (p * L).sum(-1, keepdim=True))).square().mean()
    found = F.lee(model.train(), x, "rotation", lee_output="probabilities", method="forward")["rotation"]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, inner, rtol=2e-6, atol=0)
    exact = F.lee(lambda v: 40 * v.flatten(1)[:, :3], x, "saturation", lee_output="probabilities")["saturation"]
    f = (40 * x.flatten(1)[:, :3]).double()
    p = f.softmax(-1)
    wanted = (p * (f - (p * f).sum(-1, keepdim=True))).square().mean()
    torch.testing.assert_close(exact, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["lee", "relative", "sensitivity"])
def test_chunks_bound_what_is_pushed_at_a_time(name):
    model, calls = cnn(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    getattr(F, name)(model, images(), method="forward")
    whole = len(calls)
    calls.clear()
    getattr(F, name)(model, images(), method="forward", chunk_size=1)
    assert len(calls) >= whole + 5
    calls.clear()
    lm.LocalEquivarianceError(chunk_size=1, method="forward").update(model, images())
    assert len(calls) >= whole + 5


def test_methods_reach_the_engine():
    for method in ("forward", "reverse", "double_backward"):
        metric = lm.LocalEquivarianceError("rotation", method=method)
        metric.update(cnn(), images())
        assert metric.method_used.startswith(method)
