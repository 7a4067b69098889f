"""Attribution by operation: completeness, the reference values, the granularities, and what it does to the model."""

import json
from pathlib import Path

import pytest
import torch
from cases import ImageToImage, OldSquare, TokensOut, cnn, images, vit
from references import filled, waves
from torch import nn
from torch.nn import functional as F

import lie_metric as lm
from lie_metric import representations as R

TWO = ("rotation", "translation_x", "scale")


class Detaches(nn.Module):
    def forward(self, x):
        return x * x.detach()


class Tricky(nn.Module):
    """In-place operations, a module called twice, several outputs, views, functional calls, a shared tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.position = nn.Parameter(torch.randn(1, 4, 16, 16))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = self.conv(x)
        y += self.position
        shortcut = y = self.act(y)
        y = self.twice(self.act(self.twice(y)))
        y += shortcut
        a, b = y.chunk(2, dim=1)
        y = torch.cat([a * b.sigmoid(), b], dim=1)
        y = F.max_pool2d(F.pad(y, (1, 1, 1, 1), value=-torch.inf), 3, 2)
        windows = y.reshape(len(x), 4, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 4, 4)
        y = (windows - windows.mean((2, 3), keepdim=True)).reshape(len(x), 2, 2, 4, 4, 4).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(len(x), 4, 8, 8)
        values, _ = y.flatten(2).topk(2)
        return self.head(values.flatten(1))


MODELS = {
    "cnn": lambda: cnn(4),
    "vit": vit,
    "tricky": lambda: Tricky().double(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_contributions_add_up_to_the_vector(name, batch):
    if name == "vit":
        pytest.importorskip("timm")
    model, x = MODELS[name](), images(batch)
    report = lm.layerwise_equivariance_error(model, x, TWO)
    L = lm.lie_derivative(model, x, TWO, method="double_backward")
    for k, generator in enumerate(TWO):
        found = report.vectors.sum(0)[k]
        torch.testing.assert_close(found, L[generator].flatten().detach(), rtol=1e-9, atol=1e-11)
    assert max(report.residual.values()) < 1e-11


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: ImageToImage().double(), {}),
        (lambda: TokensOut().double(), {}),
        (lambda: nn.Conv2d(3, 4, 3, padding=1).double(), {"output_representation": R.Invariant()}),
        (lambda: lambda x: F.gelu(x.permute(0, 2, 3, 1)), {"output_representation": R.ChannelsLast()}),
    ],
)
def test_outputs_that_move(make, options):
    report = lm.layerwise_equivariance_error(make(), images(2), TWO, probes=3, **options)
    assert max(report.residual.values()) < 1e-10


def test_dense_output_exactly():
    report = lm.layerwise_equivariance_error(nn.Conv2d(3, 1, 3, padding=1).double(), images(1, 6), "rotation")
    L = lm.lie_derivative(nn.Conv2d(3, 1, 3).double(), images(1, 6), "rotation")["rotation"]
    assert report.vectors.shape == (2, 1, 36)
    assert report.by("module")[0].squared_norm > 0.01 * L.square().mean()


REFERENCE = json.loads((Path(__file__).parent / "reference_values.json").read_text())["layerwise"]


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case["model"])
def test_values_of_modules_computed_independently(case):
    timm = pytest.importorskip("timm")
    torch.set_default_dtype(torch.float64)
    try:
        model = filled(timm.create_model(case["model"], num_classes=10, **case["kwargs"]).double())
    finally:
        torch.set_default_dtype(torch.float32)
    generator = {"translation": "translation_x"}.get(case["transform"], case["transform"])
    report = lm.layerwise_equivariance_error(
        model, waves(case["batch"], case["size"]), generator, output="probabilities", resampling=lm.PAPER
    )
    found = {row.name: row.squared_norm * report.dimension for row in report.by("module")}
    for path, wanted in case["squared_norm"].items():
        assert found[path] == pytest.approx(wanted, rel=1e-8), path
    assert report.residual[generator] < 1e-12


def test_contribution_of_a_module_by_hand():
    """Of a chain h∘g∘f the middle part adds J_h · L g (f)."""
    torch.manual_seed(0)
    f, g = nn.Conv2d(3, 4, 3, padding=1).double(), nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Tanh()).double()
    h = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).double()
    model, x = nn.Sequential(f, g, h), images(1)
    report = lm.layerwise_equivariance_error(model, x, "rotation")
    y = f(x).detach()
    local = lm.lie_derivative(g, y, "rotation")["rotation"].detach()
    _, wanted = torch.func.jvp(h, (g(y).detach(),), (local,))
    row = next(row for row in report.by("module") if row.name == "1")
    assert row.squared_norm == pytest.approx(wanted.square().mean().item(), rel=1e-10)
    total = lm.lie_derivative(model, x, "rotation")["rotation"]
    assert row.share == pytest.approx(((wanted * total).sum() / total.square().sum()).item(), rel=1e-9)


def test_granularities():
    model = Tricky().double()
    report = lm.layerwise_equivariance_error(model, images(2), ("rotation", "scale"))
    for rows in (report.by("op"), report.by("type"), report.by("module", depth=0), report.by("module", depth=1)):
        for generator in report.names:
            assert sum(row.share for row in rows if row.generator == generator) == pytest.approx(1, abs=1e-9)
        assert sum(row.calls for row in rows) == 2 * len(report.operations)
    modules = {row.name: row for row in report.by("module") if row.generator == "rotation"}
    assert set(modules) == {"", "conv", "twice", "act", "head"}
    assert modules["twice"].calls == 2
    assert modules["act"].calls == 2
    L = lm.lie_derivative(model, images(2), "rotation")["rotation"]
    assert modules[""].squared_norm == pytest.approx(L.square().mean().item(), rel=1e-9)
    assert modules[""].share == pytest.approx(1)
    kinds = {row.name for row in report.by("type")}
    assert {
        "convolution",
        "activation",
        "addition of a constant",
        "residual addition",
        "down-sampling",
        "head",
    } <= kinds
    assert "completeness error" in str(report)


def test_random_probes_agree_with_exact_ones():
    model, x = MODELS["cnn"](), images(2)
    exact = {row.name: row for row in lm.layerwise_equivariance_error(model, x, "rotation").by("module", 1)}
    random = lm.layerwise_equivariance_error(model, x, "rotation", probes=800, seed=1)
    for row in random.by("module", 1):
        wanted = exact[row.name]
        assert abs(row.squared_norm - wanted.squared_norm) <= 4 * row.standard_error + 1e-20
        assert row.share == pytest.approx(wanted.share, abs=0.2)
    other = lm.layerwise_equivariance_error(model, x, "rotation", probes=3, seed=2)
    assert not torch.equal(other.vectors[..., :3], random.vectors[..., :3])


def test_chunks_and_float32():
    model, x = MODELS["cnn"](), images(2)
    wanted = lm.layerwise_equivariance_error(model, x)
    chunked = lm.layerwise_equivariance_error(model, x, chunk_size=2)
    torch.testing.assert_close(chunked.vectors, wanted.vectors, rtol=1e-9, atol=1e-12)
    single = lm.layerwise_equivariance_error(model.float(), x.float())
    assert max(single.residual.values()) < 1e-3


def test_actions_of_hidden_tensors_are_shown_and_can_be_given():
    model = cnn(3)
    x = images(1)
    assumed = lm.layerwise_equivariance_error(model, x, "rotation")
    assert assumed.assumed["Image()"] >= 6
    assert assumed.assumed["Invariant()"] >= 2
    given = lm.layerwise_equivariance_error(model, x, "rotation", representations={"0": R.Invariant()})
    assert given.operations[0].representation == "Invariant()"
    assert given.residual["rotation"] < 1e-11
    first = [report.by("module", 1)[0].squared_norm for report in (assumed, given)]
    assert first[0] != pytest.approx(first[1], rel=1e-3)


def test_a_position_embedding_is_seen():
    """It is no module: an addition of a constant that does not move with the image."""
    pytest.importorskip("timm")
    rows = lm.layerwise_equivariance_error(vit(), images(1), "translation_x").by("op")
    row = next(row for row in rows if row.name.endswith(":model:add"))
    assert row.squared_norm > 0


def test_the_model_is_left_as_it_was():
    model = cnn().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            self.body(x)
            raise RuntimeError("planted")

    lm.layerwise_equivariance_error(model, images(), "rotation", probes=2)
    with pytest.raises(RuntimeError, match="planted"):
        lm.layerwise_equivariance_error(Fails(), images(), "rotation", probes=2)
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


class SinCos(torch.autograd.Function):
    """No torch function: nothing but its node in autograd's graph is seen, with two outputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, g, h):
        x = ctx.saved_tensors[0]
        return g * x.cos() - h * x.sin()


def _by_hand(f, g, x, generator="rotation"):
    """J_g · L f, the contribution of f in g(f(x)), with images between them."""
    local = lm.lie_derivative(f, x, generator, output_representation=R.Image(), method="double_backward")[generator]
    return torch.func.jvp(g, (f(x).detach(),), (local.detach(),))[1].flatten()


def _vector(report, function):
    (index,) = [i for i, operation in enumerate(report.operations) if operation.function == function]
    return report.vectors[index, 0]


@pytest.mark.filterwarnings("ignore:Method")
def test_what_is_no_torch_function_is_an_operation_as_well():
    conv = nn.Conv2d(3, 2, 3, 2).double()
    head = lambda y: conv(y).flatten(1)[:, :4]  # noqa: E731
    x = images(1)
    report = lm.layerwise_equivariance_error(lambda x: head(OldSquare.apply(x)), x, "rotation")
    torch.testing.assert_close(_vector(report, "OldSquare"), _by_hand(OldSquare.apply, head, x), rtol=1e-9, atol=1e-12)
    assert report.residual["rotation"] < 1e-11

    def both(x):
        sine, cosine = SinCos.apply(x)
        return head(sine * 2) + head(cosine.exp())

    report = lm.layerwise_equivariance_error(both, x, "rotation")
    assert report.residual["rotation"] < 1e-11
    stacked = lambda x: torch.cat(SinCos.apply(x), 1)  # noqa: E731
    rest = lambda y: head(y[:, :3] * 2) + head(y[:, 3:].exp())  # noqa: E731
    torch.testing.assert_close(_vector(report, "SinCos"), _by_hand(stacked, rest, x), rtol=1e-9, atol=1e-12)


class Squares(nn.Module):
    def forward(self, x):
        return OldSquare.apply(x)


@pytest.mark.filterwarnings("ignore:Method", "ignore:`torch.jit")
def test_where_an_operation_without_a_torch_function_was_made():
    torch.manual_seed(0)
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(3 * 256, 3)).double()
    x = images(2)
    made = [(op.path, op.function) for op in _operations(nn.Sequential(Squares(), head), x)]
    assert made[:2] == [("0", "OldSquare"), ("1.0", "relu")]
    scripted = torch.jit.script(nn.Sequential(nn.Tanh(), nn.Softplus()).double())
    made = [(op.path, op.function) for op in _operations(nn.Sequential(scripted, head), x)]
    assert made[:2] == [("", "Softplus"), ("1.0", "relu")]  # scripted modules do not say that they are called


def _operations(model, x):
    report = lm.layerwise_equivariance_error(model, x, "rotation")
    assert report.residual["rotation"] < 1e-11
    return report.operations


def test_flows_that_follow_from_others(monkeypatch):
    """Kirchhoff's law spares computations: the contributions are those of computing everything."""
    from lie_metric import layerwise

    model, x = Tricky().double(), images(2)
    spared = lm.layerwise_equivariance_error(model, x, TWO, probes=2)
    counts = []

    def all_of_them(flows, conserving):
        counts.append((len(flows), len(layerwise_independent(flows, conserving)[0])))
        return list(flows), []

    layerwise_independent = layerwise._independent
    monkeypatch.setattr(layerwise, "_independent", all_of_them)
    wanted = lm.layerwise_equivariance_error(model, x, TWO, probes=2)
    assert counts[0][1] < counts[0][0]
    torch.testing.assert_close(spared.vectors, wanted.vectors, rtol=1e-9, atol=1e-12)
    commuting = [index for index, operation in enumerate(spared.operations) if operation.commutes]
    assert commuting
    assert spared.vectors[commuting].abs().max() == 0


def test_tensors_changed_through_views():
    def model(x):
        y = x.tanh() * 2
        y[:, 0].mul_(3)
        y[:, :2, 1:] += x[:, :2, 1:]
        z = y.flatten(2)
        torch.ops.aten.add_.Scalar(z, -1)
        F.relu(input=z, inplace=True)
        return (y * z.reshape(y.shape)).flatten(1)[:, 20:24]

    x = images(1)
    report = lm.layerwise_equivariance_error(model, x, TWO)
    assert max(report.residual.values()) < 1e-12
    assert sum(row.share for row in report.by("op") if row.generator == "rotation") == pytest.approx(1)


def test_a_change_behind_the_graph_is_refused():
    def model(x):
        y = (x + 1).exp() + 2
        y.detach().mul_(2)
        return y.flatten(1)[:, :3]

    with pytest.raises(RuntimeError, match=r"`model` changes a tensor in place .* after Operation.*'add'"):
        lm.layerwise_equivariance_error(model, images(1), "rotation", probes=1)


def test_parameters_of_a_function_are_constants():
    conv = nn.Conv2d(3, 8, 3, padding=1).double()
    report = lm.layerwise_equivariance_error(
        lambda x: F.conv2d(x, conv.weight * 2, conv.bias).flatten(1)[:, :3], images(1), "rotation"
    )
    assert [operation.function for operation in report.operations] == ["conv2d", "flatten", "getitem", "output"]
    assert conv.weight.grad is None


class Ungraded(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            factor = x * 2
        return x * factor


class Item(nn.Module):
    def forward(self, x):
        return x * x.mean().item()


def test_what_is_missed_is_said():
    tail = nn.Sequential(nn.Flatten(), nn.Linear(768, 2)).double()
    with pytest.warns(UserWarning, match=r"contributions miss .*without gradients, such as \['mul in 0'\]"):
        report = lm.layerwise_equivariance_error(nn.Sequential(Ungraded(), tail), images(1), "rotation")
    assert report.residual["rotation"] > 1e-3
    for cutting, name in ((Detaches(), "detach"), (Item(), "item")):
        with pytest.warns(UserWarning, match=rf"detaches tensors.*'{name} in 0'"):
            lm.layerwise_equivariance_error(nn.Sequential(cutting, cnn()), images(1), "rotation", probes=1)


def test_a_view_of_a_tensor_that_changes():
    def model(x):
        y = x * 2
        view = y[:, :1]
        y.mul_(3)  # changes the view behind its back
        return (view * y).flatten(1)[:, :3]

    assert lm.layerwise_equivariance_error(model, images(1), "rotation").residual["rotation"] < 1e-12


def test_a_zero_derivative_has_an_absolute_residual():
    report = lm.layerwise_equivariance_error(lambda x: x.flatten(1)[:, :2] * 0, images(1), "rotation")
    assert report.residual["rotation"] == 0


def test_frame_and_plot(tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    report = lm.layerwise_equivariance_error(cnn(), images(2), ("rotation", "scale"), probes=2)
    frame = report.to_frame("type")
    assert list(frame.columns) == ["name", "generator", "squared_norm", "share", "calls", "standard_error"]
    assert frame.groupby("generator")["share"].sum().tolist() == pytest.approx([1, 1])
    figure = report.plot()
    line = figure.axes[1].get_lines()[0].get_ydata()
    whole = report.by("module", 0)[0].squared_norm
    assert line[-1] == pytest.approx(whole**0.5)
    figure.savefig(tmp_path / "layers.png")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"probes": 0}, ValueError, "`probes` must be 'exact' or a positive integer, got 0"),
        ({"probes": "all"}, ValueError, "`probes` must be"),
        ({"seed": -1}, ValueError, "`seed` must be"),
        (
            {"representations": {"9": R.Image()}},
            ValueError,
            r"`representations` must name modules of the model, got '9'",
        ),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        ({"generators": "turn"}, ValueError, "got 'turn'"),
    ],
)
def test_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        lm.layerwise_equivariance_error(cnn(), images(), **options)
    report = lm.layerwise_equivariance_error(cnn(), images(1), "rotation", probes=1)
    with pytest.raises(ValueError, match="`granularity` must be"):
        report.by("layer")
    with pytest.raises(ValueError, match="`depth` must be"):
        report.by("type", depth=1)
