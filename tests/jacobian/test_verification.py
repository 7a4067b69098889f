"""When products are taken for those of the function, and when they are refused."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric.jacobian import methods, push
from lie_metric.lie import _found_right, linearise
from lie_metric.options import Options
from lie_metric.representations import Invariant

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def checked(model, images, method="auto"):
    with torch.no_grad():
        result = linearise(
            model, images, lm.generators("affine"), Options(output_representation=Invariant(), method=method)
        )
    return result.method, result.check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2])
def test_black_images_are_measured(count, dtype):
    images = torch.rand(3, 3, 8, 8, dtype=dtype)
    images[-count:] = 0
    method, check = checked(nn.Sequential(*NET).to(dtype), images[-2:])
    assert method == "forward"
    assert check.status == "agrees"
    NET.float()


def test_modules_in_a_closure_are_raised_for_the_check():
    _, check = checked(lambda x: NET(x), torch.rand(2, 3, 8, 8))
    assert check.difference < 1e-5
    assert NET[0].weight.dtype == torch.float32


def test_a_number_of_all_images_that_is_lost_is_found_whichever_image_it_is_from():
    for seed in range(8):
        torch.manual_seed(seed)
        stem = nn.Conv2d(3, 4, 3).double()
        with pytest.raises(RuntimeError, match="difference"):
            checked(lambda x, stem=stem: stem(x) * float(stem(x).amax()), torch.rand(2, 3, 8, 8).double())


def test_a_lost_number_of_the_last_image_is_found_in_the_others():
    images = torch.rand(3, 3, 8, 8).double()
    images[-1] *= 4
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).double()

    def scaled(x):
        y = net(x)
        own = y.amax(1)
        apart = torch.tensor([float(y.amax() - each) for each in own], dtype=x.dtype)  # zero for the last image
        return y * (own + apart)[:, None]

    with pytest.raises(RuntimeError, match="agrees"):
        checked(scaled, images)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_images_that_depend_on_one_of_them_are_measured(row):
    images = torch.rand(3, 3, 8, 8)
    images[row] *= 2
    method, check = checked(lambda x: NET(x) / NET(x).amax(), images)
    assert method == "forward"
    assert check.status == "agrees"


def test_values_that_are_not_those_of_the_function_are_found(monkeypatch):
    told = methods.METHODS["forward"]

    def lying(function, inputs, tangents, chunk):
        value, products = told(function, inputs, tangents, chunk)
        return 1.01 * value, products

    monkeypatch.setitem(methods.METHODS, "forward", lying)
    assert checked(NET, torch.rand(2, 3, 8, 8))[0] == "forward vmap"
    monkeypatch.setitem(methods.METHODS, "reverse", lying)
    with pytest.raises(RuntimeError, match="its values"):
        checked(NET, torch.rand(2, 3, 8, 8), "reverse")


class _StraightThrough(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 64, 5)

    def forward(self, x):
        y = self.linear(x.flatten(1))
        return y * y + y + (y.round() - y).detach()


def test_a_penalty_is_refused_as_often_as_it_is_asked_for():
    model = _StraightThrough()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="straight-through"):
            lm.lie_derivative(model, torch.rand(2, 3, 8, 8), "rotation", output_representation=Invariant())


def test_a_penalty_is_checked_for_each_output_and_keeps_its_method():
    model, images = nn.Sequential(*NET), torch.rand(2, 3, 8, 8)
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))

    def passes(**options):
        calls.clear()
        lm.lie_derivative(model, images, "rotation", output_representation=Invariant(), **options)
        return len(calls)

    first, second = passes(), passes()
    assert second < first
    doubled, detached = lambda y: 2 * y, lambda y: y * y.detach()
    assert passes(output=doubled) == first
    assert passes(output=doubled) == passes() == second
    with pytest.raises(RuntimeError, match="agrees"):
        passes(output=detached)
    with pytest.raises(RuntimeError, match="agrees"):
        passes(output=detached)
    with pytest.raises(RuntimeError, match="agrees"):
        passes(function=lambda whole, x: detached(whole(x)))
    assert passes() == second
    assert checked(model, images)[1].status == "agrees", "without gradients it is checked each time"


def test_options_of_a_penalty_are_not_kept_alive():
    model, images = nn.Sequential(*NET), torch.rand(2, 3, 8, 8)

    def gone(name, option):
        lm.lie_derivative(model, images, "rotation", output_representation=Invariant(), **{name: option})
        return weakref.ref(option)

    options = [gone("output", lambda y: 2 * y), gone("function", lambda whole, x: whole(x) + 1)]
    gc.collect()
    assert [option() for option in options] == [None, None]
    assert _found_right(model) == {}


def test_options_that_cannot_be_told_apart_are_checked_each_time():
    class Scaled:
        __slots__ = ("by",)

        def __init__(self, by):
            self.by = by

        def __call__(self, y):
            return y * self.by(y)

    model, images = nn.Sequential(*NET), torch.rand(2, 3, 8, 8)
    right, wrong = Scaled(lambda y: y), Scaled(lambda y: y.detach())
    lm.lie_derivative(model, images, "rotation", output_representation=Invariant(), output=right)
    with pytest.raises(RuntimeError, match="agrees"):
        lm.lie_derivative(model, images, "rotation", output_representation=Invariant(), output=wrong)


def test_what_was_right_in_the_first_step_is_used_in_the_second(monkeypatch):
    told = methods.METHODS["forward vmap"]

    def lying(function, inputs, tangents, chunk):
        value, products = told(function, inputs, tangents, chunk)
        return value, 2 * products

    monkeypatch.setitem(methods.METHODS, "forward vmap", lying)
    model, images = nn.Sequential(*NET), torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="do not agree"):
        one = lm.lie_derivative(model, images, "rotation", output_representation=Invariant())
    two = lm.lie_derivative(model, images, "rotation", output_representation=Invariant())
    torch.testing.assert_close(one, two)


def test_differences_of_a_function_that_jumps_are_not_taken_for_zero():
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad(), pytest.warns(UserWarning, match="converged"):
        result = push(lambda v: (v * 10).round() / 10, x, torch.randn_like(x)[None], "difference")
    assert result.products.any()
    with torch.no_grad():
        assert not push(lambda v: torch.ones_like(v), x, torch.randn_like(x)[None], "difference").products.any()


def test_differences_at_a_black_image():
    x, t = torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.randn(1, 1, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(push(torch.sin, x, t, "difference").products, t)


def test_a_method_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="forward quickly"):
        lm.lie_derivative(NET, torch.rand(2, 3, 8, 8), "rotation", method="forward quickly")


class _Quantised(nn.Module):
    """A network whose features are quantised in one of the usual ways, with the gradient passed straight through."""

    def __init__(self, kind, image):
        super().__init__()
        self.kind, self.image = kind, image
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 4, 3, 2, 1))
        self.codes = nn.Parameter(0.03 * torch.randn(16, 4))
        self.head = nn.ConvTranspose2d(4, 3, 8, 4, 2) if image else nn.Linear(4, 10)

    def forward(self, x):
        z = self.encoder(x)
        f = z.permute(0, 2, 3, 1).flatten(0, 2)
        if self.kind == "cdist":
            q = self.codes[torch.cdist(f, self.codes).argmin(-1)]
        elif self.kind == "squares":
            q = self.codes[(f[:, None] - self.codes).square().sum(-1).argmin(-1)]
        elif self.kind == "finite scalar":
            f = 3.5 * f.tanh()
            q = f.round()
        elif self.kind == "fake_quantize":
            q = torch.fake_quantize_per_tensor_affine(f, 0.05, 0, -128, 127)
        else:
            scale = f.detach().abs().amax() / 127
            q = (f / scale).round() * scale
        q = q if self.kind == "fake_quantize" else f + (q - f).detach()
        q = q.reshape(*z.movedim(1, -1).shape).movedim(-1, 1)
        return self.head(q) if self.image else self.head(q.mean((2, 3)))


@pytest.mark.parametrize("image", [False, True], ids=["scores", "image"])
@pytest.mark.parametrize("kind", ["cdist", "squares", "finite scalar", "fake_quantize", "scale"])
def test_quantised_networks_are_refused(kind, image):
    torch.manual_seed(0)
    model, images = _Quantised(kind, image), torch.rand(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match=r"jumps|straight-through"), torch.no_grad():
        lm.lie_derivative(model, images, "rotation")
    with pytest.raises(RuntimeError, match=r"jumps|straight-through"):
        lm.lie_derivative(model, images, "rotation")
    metric = lm.LocalEquivarianceError("rotation")
    with pytest.raises(RuntimeError, match=r"jumps|straight-through"):
        metric.update(model, images)


class _Inside(nn.Module):
    """A network that computes its second half in another precision, whatever its weights are in."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 10)

    def forward(self, x):
        y = self.stem(x).relu().to(self.dtype)
        return self.head((y * y).to(x.dtype).mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inside_is_told(dtype):
    torch.manual_seed(0)
    model, images = _Inside(dtype), torch.rand(2, 3, 64, 64)
    with torch.no_grad(), pytest.warns(UserWarning, match="half precision"):
        found = lm.lie_derivative(model, images, "rotation")["rotation"]
    model.dtype = torch.float32
    true = lm.lie_derivative(model, images, "rotation")["rotation"]
    assert (found - true).norm() < 2e-2 * true.norm()


def test_single_precision_inside_agrees(recwarn):
    torch.manual_seed(0)
    method, check = checked(_Inside(torch.float32).double(), torch.rand(2, 3, 32, 32).double())
    assert (method, check.status) == ("forward", "agrees")
    assert check.difference < 2e-2
    assert not check.warning


def test_a_wrong_product_is_found_behind_single_precision(monkeypatch):
    told = methods.METHODS["forward"]
    monkeypatch.setitem(methods.METHODS, "forward", lambda *given: (told(*given)[0], 1.2 * told(*given)[1]))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="do not agree"):
        method, _ = checked(_Inside(torch.float32).double(), torch.rand(2, 3, 32, 32).double())
    assert method == "forward vmap"


def test_a_kink_at_the_image_itself_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(2)).double()
    images = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    images[:, :, 3:6, 4:9] = 1
    rotation, pooled = lm.generators("rotation"), {"output": lambda y: y.mean(2), "output_representation": Invariant()}
    with torch.no_grad(), pytest.warns(UserWarning, match=r"kink, .* `method='difference'`") as seen:
        found = linearise(model, images, rotation, Options(**pooled))
    with torch.no_grad():
        mean = linearise(model, images, rotation, Options(method="difference", **pooled)).lie_derivatives
    off = (found.lie_derivatives - mean).norm() / mean.norm()
    assert off > 0.01
    assert f"{off:.0%} off their mean" in str(seen[0].message)
    assert "kink" in str(found.check)
    smooth = nn.Sequential(model[0], nn.GELU(), model[2])
    assert not linearise(smooth, images, rotation, Options(**pooled)).check.warning


def test_rounding_that_spoils_derivatives_is_told():
    torch.manual_seed(0)
    head = nn.Linear(3, 10)
    model = lambda x: head(((1e6 * x + x) - 1e6 * x).mean((2, 3)))  # noqa: E731
    with torch.no_grad(), pytest.warns(UserWarning, match="rounding in float32"):
        lm.lie_derivative(model, torch.rand(2, 3, 16, 16), "translation")


def test_a_model_at_rest_is_no_jump():
    """ReLU that is off for all of an image, and a head of zeros, have no derivative and do not jump."""
    torch.manual_seed(0)
    off = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
    nn.init.constant_(off[0].bias, -1.2)
    images = torch.rand(2, 3, 8, 8).double()
    assert checked(off, images)[1].status == "agrees"
    nn.init.zeros_(off[3].weight)
    assert checked(off, images)[1].status == "agrees"


class _Leak(nn.Module):
    """Divides by a spread that leaves torch and comes back, in single precision or not."""

    def __init__(self, back):
        super().__init__()
        self.back = back
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        z = self.stem(x).tanh()
        return self.head((z / self.back(z.flatten(1).std(1)).view(-1, 1, 1, 1)).mean((2, 3)))


LEAKS = {
    "list": lambda s: torch.tensor(s.tolist()),
    "numpy": lambda s: torch.from_numpy(s.detach().numpy().astype("float32")),
    "item": lambda s: torch.stack([torch.tensor(part.item()) for part in s]),
    "in double precision": lambda s: torch.tensor([float(part) for part in s], dtype=torch.float64).to(s.dtype),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", LEAKS)
def test_numbers_that_come_back_are_not_lost(kind, seed):
    torch.manual_seed(seed)
    model = _Leak(LEAKS[kind])
    images = nn.functional.interpolate(torch.randn(2, 3, 8, 8), scale_factor=4, mode="bicubic")
    for measured in (
        lambda: lm.LocalEquivarianceError("rotation").update(model, images),
        lambda: lm.lie_derivative(model, images, "rotation"),
    ):
        with pytest.raises(RuntimeError, match=r"out of torch|by its address|lost|not that of the function"):
            measured()
    with torch.no_grad():
        found = lm.lie_derivative(model, images, "rotation", method="difference")["rotation"]
        model.back = lambda s: s
        true = lm.lie_derivative(model, images, "rotation")["rotation"]
    assert (found - true).norm() < 1e-3 * true.norm()


def test_one_draw_is_told_from_rounding():
    torch.manual_seed(0)
    # So many outputs that masks of two dtypes differ, whatever a version of torch draws.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 64))
    drawn = lambda x: nn.functional.dropout(model(x), 0.5)  # noqa: E731
    with torch.no_grad(), pytest.warns(UserWarning, match="draws random numbers") as seen:
        lm.lie_derivative(drawn, torch.rand(2, 3, 8, 8), "rotation")
    assert not any("rounding" in str(one.message) for one in seen)


def test_a_function_that_checks_its_range_is_checked_within_it():
    """Steps beside black and white pixels would leave the range that it accepts."""

    def narrow(v):
        if v.min() < 0 or v.max() > 1:
            raise ValueError("images must be in [0, 1]")
        return v.square()

    x = torch.rand(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0], x[:, 1] = 0, 1
    t = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        result = push(narrow, x, t)
    torch.testing.assert_close(result.products, 2 * x * t)
    assert (result.method, result.check.status) == ("forward", "agrees")

    def lies(v):
        return narrow(v) + (v - v.detach())

    with torch.no_grad(), pytest.raises(RuntimeError, match="agrees with its own central differences"):
        push(lies, x, t, "double_backward")


def test_a_refusal_that_the_function_catches_is_one():
    def catches(v):
        try:
            size = v.mean().item()
        except RuntimeError:
            size = 0.0
        return v * size

    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad(), pytest.raises(RuntimeError, match="a number is taken out of torch"):
        push(catches, x, torch.ones(1, 1, 4), "forward")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_is_told_and_its_error_counts(dtype):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 3)).requires_grad_(False)

    wide = copy.deepcopy(net).double()

    def cast(v, net=net):
        with torch.autocast("cpu", dtype):
            return net(v).to(v.dtype)

    x, t = torch.randn(2, 20), torch.randn(1, 2, 20)
    with torch.no_grad(), pytest.warns(UserWarning, match="runs in half precision"):
        result = push(cast, x, t, precise=lambda v: cast(v, wide))
    true = torch.func.jvp(net, (x,), (t[0],))[1]
    off = ((result.products[0] - true).norm() / true.norm()).item()
    assert 1e-5 < off < 5e-2
    assert result.check.difference > off / 10
