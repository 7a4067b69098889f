"""Models as loops hold them: compiled, wrapped for data parallelism, prepared by accelerate."""

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric.calling import bare, casting, uncast

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(144, 3)

    def encode(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def measured(model, **options):
    recorder = lm.Recorder(IMAGES, "rotation", on_error="raise", metrics=[lm.PredictionConsistency()], **options)
    values = recorder.measure(model, step=0)
    return values, recorder.described


def parallel(model):
    return nn.parallel.DistributedDataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def everywhere(model):
    return nn.DataParallel(model)


WRAPPERS = [parallel, everywhere, compiled, lambda model: compiled(parallel(model))]
NAMES = ["parallel", "everywhere", "compiled", "compiled parallel"]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=NAMES)
def test_wrappers_are_taken_off(group, monkeypatch, wrap):
    wrapped = wrap(Net())

    def waits(*_, **__):
        raise AssertionError("this waits for the other processes")

    with monkeypatch.context() as patch:
        patch.setattr(nn.parallel.DistributedDataParallel, "forward", waits)
        found, described = measured(wrapped)
        parts = [measured(wrapped, function=one)[0] for one in ("encode", lambda model, x: model.encode(x))]
        with pytest.warns(UserWarning, match="Shares of 8 images scatter"):
            report = lm.layerwise_equivariance_error(wrapped, IMAGES, "rotation")
    wanted, plain = measured(Net())
    assert found == wanted
    assert described.partition(": ")[2] == plain.partition(": ")[2]
    if wrap is not compiled:
        assert described == plain
    assert parts == [measured(Net(), function="encode")[0]] * 2
    assert report.residual["rotation"] < 1e-4
    # Training goes on as it would have.
    trained, other = wrap(Net()), wrap(Net())
    measured(trained)
    for model in (trained, other):
        torch.manual_seed(1)
        model(IMAGES).square().sum().backward()
    for one, two in zip(trained.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


class Tokens(nn.Module):
    """Declares its tokens as vision transformers of timm do."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Identity()
        self.patch_embed.grid_size = (4, 4)

    def forward(self, x):
        patches = nn.functional.avg_pool2d(x, 2).flatten(2).mT
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)


def test_wrappers_within_wrappers():
    model = Tokens()
    assert bare(everywhere(everywhere(model))) is model
    found = [lm.lie_derivative(one, IMAGES, "rotation")["rotation"] for one in (model, everywhere(everywhere(model)))]
    assert torch.equal(*found)


@pytest.fixture
def accelerate():
    """The package, whose state belongs to the process."""
    package = pytest.importorskip("accelerate")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("dynamo", [None, "eager"])
def test_what_accelerate_casts_is_measured_in_float32(accelerate, dynamo):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", dynamo_backend=dynamo)
    inside = Net()
    model = accelerator.prepare(inside)
    patched = inside.forward
    assert measured(model)[0] == measured(accelerator.unwrap_model(model))[0] == measured(Net())[0]
    found = lm.lie_derivative(lambda x: model(x), IMAGES, "rotation")["rotation"]
    torch.testing.assert_close(found, lm.lie_derivative(Net(), IMAGES, "rotation")["rotation"])
    assert inside.forward is patched
    with torch.autocast("cpu", torch.bfloat16):
        halved = Net().eval()(IMAGES).float()
    model.eval()
    assert torch.equal(model(IMAGES), halved)
    assert not torch.equal(halved, Net().eval()(IMAGES))


def test_what_accelerate_casts_is_given_back_after_a_failure(accelerate):
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(Net())
    patched = vars(model)["forward"]

    def fails(*_):
        raise RuntimeError("planted")

    model.head.forward = fails
    with pytest.raises(RuntimeError, match="planted"):
        measured(model)
    assert vars(model)["forward"] is patched
    with uncast(casting(model.modules())):
        assert vars(model)["forward"] is not patched
        with pytest.raises(RuntimeError, match="planted"):
            model(IMAGES)
    assert vars(model)["forward"] is patched


def test_a_forward_that_others_put_in_place_is_kept():
    """Of what is not accelerate's own nothing is known."""
    model = Net()
    original = model.forward
    model._original_forward = original
    model.forward = lambda x: 2 * original(x)
    found = lm.lie_derivative(model, IMAGES, "rotation")["rotation"]
    torch.testing.assert_close(found, 2 * lm.lie_derivative(Net(), IMAGES, "rotation")["rotation"])
