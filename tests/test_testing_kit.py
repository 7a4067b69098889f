"""The test kit: equivariant functions pass at rounding level, planted violations are rejected and named."""

import re

import pytest
import torch
from cases import ImageToImage, TokensOut, cnn, images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lie_metric as lm
from lie_metric import lattice, testing
from lie_metric import representations as R
from lie_metric.lattice import Roll

FOURIER = lm.Resampling("fourier")
PLANE = ("translation", "rotation", "scale")


def circular(channels=4, stride=1):
    torch.manual_seed(0)
    return nn.Conv2d(3, channels, 3, stride=stride, padding=1, padding_mode="circular").double()


def energy(x):
    """Exactly invariant to circular translations."""
    return circular()(x).square().mean((2, 3))


def smooth(n=3, size=16):
    """Below a quarter of a cycle per pixel, so that squares are free of aliasing."""
    waves = torch.fft.rfft2(images(n, size))
    ky = torch.fft.fftfreq(size)[:, None].abs()
    kx = torch.fft.rfftfreq(size)[None]
    return torch.fft.irfft2(waves * ((ky < 0.2) & (kx < 0.2)), s=(size, size))


class OnVectors:
    """The plane's linear maps on states (B, 2 N), an exact action without any image."""

    def check(self, tensor, name):
        pass

    def act(self, tensor, generator, t, resampling):
        raise NotImplementedError

    def tangents(self, tensor, generators, resampling):
        points = tensor.unflatten(-1, (-1, 2))
        return torch.stack([(points @ tensor.new_tensor(g.matrix)[:, :2].mT).flatten(-2) for g in generators])

    def components(self, tensor):
        return (tensor[:, None],)


class TestEquivariant:
    @pytest.mark.parametrize(
        ("model", "x"),
        [
            (circular(), images()),
            (energy, images()),
            (lambda v: F.relu(v[:, :1, 0, 0]) * 0 + 3, images()),  # constant
            (lambda v: v.square(), smooth()),
            (lambda v: 1e6 + 1e-3 * energy(1e3 * v), images()),
        ],
    )
    def test_exactly_equivariant_functions_pass(self, model, x):
        found = testing.equivariance_violation(model, x, "translation", resampling=FOURIER)
        assert list(found) == ["translation_x", "translation_y"]
        assert all(v.shape == (len(x),) and v.max() < 1e-11 for v in found.values())
        testing.assert_equivariant(model, x, "translation", resampling=FOURIER)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_rounding_passes_in_every_dtype(self, dtype):
        def deep(v):
            for _ in range(6):
                v = torch.tanh(circular(3).to(v.dtype)(v).mean((2, 3), keepdim=True)) + circular(3).to(v.dtype)(v)
            return v

        testing.assert_equivariant(deep, images(size=32).to(dtype), "translation", resampling=FOURIER)

    def test_invariant_and_vector_valued_functions_of_states(self):
        def length(q):
            return q.unflatten(-1, (-1, 2)).norm(dim=-1)

        def scaled(q):
            return q * length(q).sum(-1, keepdim=True)

        q, action = torch.randn(5, 6, dtype=torch.float64), OnVectors()
        testing.assert_equivariant(length, q, "rotation", input_representation=action)
        both = {"input_representation": action, "output_representation": action}
        testing.assert_equivariant(scaled, q, "rotation", **both)
        with pytest.raises(AssertionError, match="'rotation'"):
            testing.assert_equivariant(lambda q: q + 1e-6 * q.flip(-1), q, "rotation", **both)

    def test_the_formula(self):
        """Against explicit Jacobians, many draws of noise replaced by their expectation."""
        model, x = circular(4), images(2, 8)
        found = testing.equivariance_violation(model, x, "rotation")["rotation"]
        X = lm.transforms.tangents(x, lm.generators("rotation"), lm.Resampling())[0]
        Xf = lm.transforms.tangents(model(x), lm.generators("rotation"), lm.Resampling())[0]
        Df = F.conv2d(F.pad(X, [1] * 4, "circular"), model.weight)
        J = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], x[0]).flatten(3).flatten(0, 2)
        for i in range(2):
            noise = J.square().sum() / J.shape[1] * X[i].square().sum()
            wanted = (Df - Xf)[i].norm() / (Df[i].square().sum() + Xf[i].square().sum() + noise).sqrt()
            assert found[i].item() == pytest.approx(wanted.item(), rel=0.1)

    @settings(max_examples=20, deadline=None)
    @given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(-10, 10))
    def test_scale_and_offset_do_not_matter(self, before, after, offset):
        model, x = cnn().eval(), images()
        plain = testing.equivariance_violation(model, x, PLANE)
        other = testing.equivariance_violation(lambda v: after * model(v / before) + offset, before * x, PLANE)
        for name in plain:
            torch.testing.assert_close(other[name], plain[name], rtol=1e-6, atol=0)

    def test_the_unit_of_t_does_not_matter(self):
        turn = lm.generators("rotation")[0]
        found = testing.equivariance_violation(cnn(), images(), (turn, (-0.01 * turn).with_name("small")))
        torch.testing.assert_close(found["small"], found["rotation"], rtol=1e-8, atol=0)

    def test_at_most_root_two(self):
        found = testing.equivariance_violation(lambda v: v.flip(-1), images(), "translation_x")["translation_x"]
        assert ((found > 0.9) & (found <= 2**0.5)).all()

    @pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-6])
    def test_a_planted_violation_is_found_and_named(self, size):
        """One image in three meets a term that knows where it is; only along x."""
        ramp = torch.linspace(-1, 1, 16, dtype=torch.float64)

        def planted(v):
            bump = torch.tensor([[0.0], [size], [0.0]], dtype=v.dtype)[: len(v)]
            return energy(v) + bump * (v * ramp).sum((1, 2, 3))[:, None].sin()

        found = testing.equivariance_violation(planted, images(), "translation", resampling=FOURIER)
        assert found["translation_x"][[0, 2]].max() < 1e-12 < found["translation_x"][1]
        with pytest.raises(AssertionError) as caught:
            testing.assert_equivariant(planted, images(), "translation", resampling=FOURIER)
        text = str(caught.value)
        assert re.search(r"within 1e-10 \(float64\), got a violation of \S+ under 'translation_x' at image 1", text)
        assert float(re.search(r"violation of (\S+)", text)[1]) == pytest.approx(
            found["translation_x"][1].item(), rel=1e-2
        )
        testing.assert_equivariant(planted, images(), "translation", tolerance=1.5, resampling=FOURIER)

    def test_zero_padding_and_position_embeddings_are_rejected(self):
        torch.manual_seed(0)
        padded = nn.Conv2d(3, 4, 3, padding=1).double()
        for model in (padded, ImageToImage().double(), TokensOut().double(), cnn()):
            with pytest.raises(AssertionError, match="must be equivariant"):
                testing.assert_equivariant(model, images(), "translation")

    def test_nan_does_not_pass(self):
        def broken(v):
            return v.mean((1, 2, 3)) * torch.tensor([1.0, torch.nan, 1.0])

        with pytest.raises(AssertionError, match="violation of nan under 'rotation' at image 1"):
            testing.assert_equivariant(broken, images().float(), "rotation", tolerance=10)


class Strided(nn.Module):
    """A network that commutes with all of D4: filters averaged over the group, even padding, no other position."""

    def __init__(self, flaw=0.0):
        super().__init__()
        torch.manual_seed(0)
        weights = torch.randn(4, 3, 4, 4, dtype=torch.float64)
        group = lattice.elements("identity", "D4")
        self.weight = nn.Parameter(sum(g(weights) for g in group) / 8 + flaw * weights)

    def forward(self, x):
        return torch.tanh(F.conv2d(F.pad(x, [1] * 4, "circular"), self.weight.to(x.dtype), stride=2))


class TestLattice:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_equivariant_networks_pass(self, dtype):
        x = images().to(dtype)
        testing.assert_lattice_equivariant(Strided(), x, ("D4", Roll(2, -4)))
        testing.assert_lattice_equivariant(lambda v: Strided()(v).mean((2, 3)), x, ("D4", Roll(2, 0)))
        last = {"output_representation": R.ChannelsLast()}
        testing.assert_lattice_equivariant(lambda v: Strided()(v).movedim(1, -1), x, "D4", **last)
        tokens = {"output_representation": R.Tokens((8, 8), 1)}
        testing.assert_lattice_equivariant(
            lambda v: F.pad(Strided()(v).flatten(2).mT, (0, 0, 1, 0)), x, "rotations_90", **tokens
        )

    def test_the_formula(self):
        x = torch.eye(4, dtype=torch.float64).expand(1, 1, 4, 4)
        found = testing.lattice_violation(lambda v: 2 * v[:, 0, 0], x, ("flip_horizontal", "transpose"))
        assert found["flip_horizontal"].item() == pytest.approx(2**0.5)
        assert found["transpose"].item() == 0
        zero = testing.lattice_violation(lambda v: v.sum((1, 2, 3)) * 0, x, "D4")
        assert all(v.item() == 0 for v in zero.values())

    @pytest.mark.parametrize("flaw", [1.0, 1e-3, 1e-7])
    def test_a_planted_violation_is_found(self, flaw):
        with pytest.raises(AssertionError, match="must be equivariant within 1e-10"):
            testing.assert_lattice_equivariant(Strided(flaw).double(), images(), "D4")

    def test_worst_transform_and_image_are_named(self):
        def planted(v):
            return v.mean((2, 3)) + torch.tensor([0.0, 0.0, 1.0])[:, None] * v[:, :, :1].mean((2, 3))

        with pytest.raises(
            AssertionError, match=r"under '(rotate|flip_vert)\S+' at image 2, the worst of 5 tr"
        ) as caught:
            testing.assert_lattice_equivariant(planted, images(), ("rotations_90", "flips"))
        assert "flip_horizontal 2" not in str(caught.value)
        found = testing.lattice_violation(planted, images(), ("rotations_90", "flips"))
        assert found["flip_horizontal"].max() < 1e-12 < found["flip_vertical"][2]
        assert found["flip_vertical"][:2].max() < 1e-12

    def test_a_direction_that_is_wrong_is_seen(self):
        """A model that turns its output the other way round is equivariant to half turns and flips alone."""
        turn = lattice.ELEMENTS["rotate_90"]
        found = testing.lattice_violation(lambda v: turn(v), images(), ("D4", Roll(1, 0)))
        assert {name for name, v in found.items() if v.max() < 1e-12} == {"rotate_90", "rotate_180", "rotate_270"}

    def test_the_model_runs_in_evaluation_mode_and_is_left_alone(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).double().train()
        testing.assert_lattice_equivariant(model, images(), "D4")
        assert model.training
        assert model[1].training
        assert model[0].num_batches_tracked == 0

    def test_rectangles(self):
        x = images()[..., :12]
        testing.assert_lattice_equivariant(lambda v: v, x, ("rotate_180", "flips", "roll"))

    @pytest.mark.parametrize(
        ("model", "x", "options", "error", "match"),
        [
            (Strided(), images()[..., :12], {"transforms": "rotate_90"}, ValueError, "must be square for 'rotate_90'"),
            (Strided(), images(), {"transforms": Roll(1, 0)}, ValueError, "move an output of 8×8 by whole pixels"),
            (Strided(), images(), {"transforms": "turn"}, ValueError, "known transforms, got 'turn'"),
            (Strided(), images(), {"tolerance": -1}, ValueError, "`tolerance` must not be negative"),
            (Strided(), images(), {"tolerance": "1"}, TypeError, "`tolerance` must be a number"),
            (Strided(), images(), {"output": "scores"}, ValueError, "`output` must be"),
            (3, images(), {}, TypeError, "`model` must be callable"),
            (Strided(), images().int(), {}, TypeError, "floating-point dtype"),
            (lambda v: v.mean((1, 2, 3))[:1], images(), {}, ValueError, "one entry for each of the 3 images"),
            (lambda v: v[..., None], images(), {}, ValueError, "`output_representation` must be given"),
            (lambda v: v, images(), {"input_representation": R.Invariant()}, ValueError, "must hold images"),
            (
                lambda v: v,
                torch.ones(2, 6),
                {"input_representation": OnVectors()},
                TypeError,
                "must have a method `map",
            ),
            (
                lambda v: v[:, :, :, : int(v[0, 0, 0, 0] > 0) + 1],
                images(1, 2) * 0 + torch.tensor([[1.0, -1], [-1, -1]]),
                {"output_representation": R.Image(), "transforms": "flip_horizontal"},
                ValueError,
                "must keep its shape",
            ),
        ],
    )
    def test_bad_input(self, model, x, options, error, match):
        with pytest.raises(error, match=match):
            testing.assert_lattice_equivariant(model, x, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tolerance": True}, TypeError, "`tolerance` must be a number"),
        ({"tolerance": float("nan")}, ValueError, "`tolerance` must not be negative"),
        ({"generators": "turn"}, ValueError, "got 'turn'"),
        ({"output": "scores"}, ValueError, "`output` must be"),
        ({"method": "backward"}, ValueError, "`method` must be one of"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        ({"resampling": "fourier"}, TypeError, "`resampling` must be"),
        ({"inputs": images().int()}, TypeError, "floating-point dtype"),
    ],
)
def test_bad_arguments_stop_before_the_model_runs(options, error, match):
    def never(v):
        raise RuntimeError("the model ran")

    with pytest.raises(error, match=match):
        testing.assert_equivariant(never, **({"inputs": images()} | options))


def test_outputs_without_one_row_for_each_image():
    with pytest.raises(ValueError, match="one entry for each of the 3 images"):
        testing.equivariance_violation(lambda v: v.mean((0, 1, 2))[None], images(), "rotation")


@pytest.mark.parametrize(
    "options",
    [{"output": "probabilities"}, {"resampling": FOURIER}, {"seed": 3}, {"output_representation": R.Image()}],
    ids=str,
)
def test_options_reach_the_measurement(options):
    model = (lambda v: v.mean(1, keepdim=True).sin()) if "output_representation" in options else cnn()
    options = {"output_representation": R.Invariant()} if "output_representation" in options else options
    plain = testing.equivariance_violation(model, images(), "rotation")["rotation"]
    other = testing.equivariance_violation(model, images(), "rotation", **options)["rotation"]
    assert not torch.equal(plain, other)
