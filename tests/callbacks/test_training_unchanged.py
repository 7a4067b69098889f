"""Training is the same, bit for bit, with and without the monitor."""

import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import lie_metric as lm
from lie_metric.callbacks import EquivarianceMonitor

try:
    from lightning.pytorch.callbacks import EMAWeightAveraging
except ImportError:
    EMAWeightAveraging = None

needs_averaging = pytest.mark.skipif(EMAWeightAveraging is None, reason="lightning 2.6 brought averaged weights")


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class RandomlyAugmented(Dataset):
    """Draws from every global random state, and from one of its own that training and validation share."""

    def __init__(self, size):
        self.images = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.own = np.random.default_rng(0)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        noise = torch.randn(()) + np.random.rand() + random.random() + self.own.random()  # noqa: NPY002
        return (self.images[index] * (1 + 0.1 * noise)).float(), index % 3


class StochasticDepth(nn.Module):
    def forward(self, x):
        return x * (torch.rand(()) < 0.5).to(x) if self.training else x * 0.5


class Network(nn.Sequential):
    """Everything that depends on the mode of a module, on random numbers, or on buffers."""

    def __init__(self):
        self_attending = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        super().__init__(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3, padding=1)),
            nn.BatchNorm2d(4),
            nn.GELU(),
            StochasticDepth(),
            nn.Flatten(2),
            nn.Unflatten(2, (64,)),
            _Transposed(self_attending),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(256, 3),
        )


class _Transposed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.mT).mT


class Keeps(nn.Module):
    """Training depends on what this keeps of earlier calls: on how many there were, and on what the last ones saw."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.n, self.h, self.seen = kind, 0, None, []
        self.weights = nn.Parameter(torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(2)))
        self.head = nn.Linear(4, 3)

    def train(self, mode=True):
        # As steerable networks do: filters are built when evaluation begins, and dropped when training does.
        if self.kind == "filters":
            if mode:
                self.__dict__.pop("filters", None)
            else:
                self.filters = self.weights - self.weights.flip(-1)
        return super().train(mode)

    def forward(self, x):
        filters = self.filters if "filters" in self.__dict__ else self.weights - self.weights.flip(-1)
        h = nn.functional.conv2d(x, filters).tanh().mean((2, 3))
        if self.kind == "counter":
            self.n = self.n + 1
            return self.head(h) / (1 + 0.1 * self.n)
        if self.kind == "feature":
            earlier, self.h = self.h, h
            return self.head(h if earlier is None else h + 0.1 * earlier.detach().mean(0))
        if self.kind == "cache":
            self.seen.append(h)
            return self.head(h + 0.1 * sum(item.detach().mean() for item in self.seen[-3:]))
        return self.head(h)


class Module(LightningModule):
    def __init__(self, variant):
        super().__init__()
        self.variant = variant
        if variant == "compiled":
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 3))
            self.net[4].compile(backend="aot_eager")
            self.compiled = torch.compile(self.net[:3], backend="aot_eager")
        elif variant.startswith("keeps"):
            self.net = Keeps(variant.split()[1])
        else:
            self.net = Network()
        if variant == "shared":
            self.alias = self.net[0]
        if variant == "channels_last":
            self.net.to(memory_format=torch.channels_last)
        if variant == "frozen":
            self.net[0].requires_grad_(False)
        self.losses, self.seen = [], []
        self.compiled_calls = []

    def forward(self, x):
        if self.variant == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        if self.variant == "checkpointing":
            return checkpoint(self.net, x, use_reentrant=False)
        if self.variant == "compiled":
            return self.net[3:](self.compiled(x))
        return self.net(x)

    def on_train_epoch_start(self):
        if self.variant == "frozen":
            self.net[1].eval()  # running statistics stay as they are; no one may switch it back

    def training_step(self, batch, batch_idx):
        if self.variant == "frozen":
            assert not self.net[1].training
        scores = self(batch[0])
        if self.variant == "compiled":
            self.compiled_calls.append(type(self.compiled(batch[0]).grad_fn).__name__)
        loss = nn.functional.cross_entropy(scores.float(), batch[1])
        self.losses.append(loss.item())
        self.seen.append(batch[0].double().sum().item())
        return loss

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.losses.append(loss.item())
        self.log("val_loss", loss)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


class RandomStates(Callback):
    """The random states as each training batch finds them."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, *_):
        self.states.append((torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()))  # noqa: NPY002


def trained(monitor, variant="plain", workers=0, options=None, extra=()):
    torch.compiler.reset()
    seed_everything(3)
    module, states = Module(variant), RandomStates()
    data = RandomlyAugmented(20)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*([monitor] if monitor else []), *(make() for make in extra), states],
        **(options or {}),
    )
    loader = {"num_workers": workers, "persistent_workers": workers > 0}
    trainer.fit(module, DataLoader(data, 4, shuffle=True, **loader), DataLoader(data, 4, **loader))
    return module, trainer, states


def assert_same(one, other):
    (module_a, trainer_a, states_a), (module_b, trainer_b, states_b) = one, other
    assert module_a.losses == module_b.losses
    assert module_a.seen == module_b.seen
    assert module_a.compiled_calls == module_b.compiled_calls
    for (name, a), b in zip(module_a.state_dict().items(), module_b.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    if isinstance(module_a.net, Keeps):
        assert module_a.net.n == module_b.net.n
        assert len(module_a.net.seen) == len(module_b.net.seen)
        assert ("filters" in module_a.net.__dict__) == ("filters" in module_b.net.__dict__)
        if module_a.net.h is not None:
            assert type(module_a.net.h) is torch.Tensor
            assert torch.equal(module_a.net.h, module_b.net.h)
    assert [m.training for m in module_a.modules()] == [m.training for m in module_b.modules()]
    assert [p.requires_grad for p in module_a.parameters()] == [p.requires_grad for p in module_b.parameters()]
    optimizer_a, optimizer_b = (t.optimizers[0].state_dict()["state"] for t in (trainer_a, trainer_b))
    for a, b in zip(optimizer_a.values(), optimizer_b.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(states_a.states, states_b.states, strict=True):
        assert torch.equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])
        assert a[2] == b[2]
    assert trainer_a.callback_metrics["val_loss"] == trainer_b.callback_metrics["val_loss"]


CASES = {
    "plain": {},
    "no sanity check": {"options": {"num_sanity_val_steps": 0}},
    "accumulation, validated in the middle": {"options": {"accumulate_grad_batches": 2, "val_check_interval": 3}},
    "bf16-mixed": {"options": {"precision": "bf16-mixed"}},
    "bf16-true": {"options": {"precision": "bf16-true"}},
    "averaged weights": {"extra": [lambda: EMAWeightAveraging(decay=0.5)]},
    "no inference mode": {"options": {"inference_mode": False}},
    "limited": {"options": {"limit_val_batches": 2, "limit_train_batches": 3}},
    "gradient checkpointing": {"variant": "checkpointing"},
    "channels last": {"variant": "channels_last"},
    "shared module": {"variant": "shared"},
    "frozen": {"variant": "frozen"},
    "workers": {"workers": 1},
    "compiled": {"variant": "compiled"},
    "counts its calls": {"variant": "keeps counter"},
    "keeps a feature": {"variant": "keeps feature"},
    "appends to a cache": {"variant": "keeps cache"},
    "builds filters for evaluation": {"variant": "keeps filters"},
}


MARKS = {"compiled": pytest.mark.slow, "averaged weights": needs_averaging}


@pytest.mark.parametrize("case", [pytest.param(case, marks=MARKS.get(case, ())) for case in CASES])
def test_bit_for_bit(case):
    companions = [lm.PredictionConsistency(), lm.LatticeEquivarianceError("flips")]
    measures = ("relative", "lee", "sensitivity")
    monitor = EquivarianceMonitor(("rotation", "scale"), num_images=10, measures=measures, metrics=companions)
    with_monitor = trained(monitor, **CASES[case])
    assert torch.isfinite(with_monitor[1].callback_metrics["equivariance/rotation"])
    assert_same(with_monitor, trained(None, **CASES[case]))
    if case == "compiled":
        assert set(with_monitor[0].compiled_calls) == {"CompiledFunctionBackward"}


def test_the_comparison_sees_a_single_random_number():
    """The comparison itself: a callback that draws one number is told apart."""

    class Draw(Callback):
        def on_validation_batch_end(self, *_):
            torch.rand(())

    with pytest.raises(AssertionError):
        assert_same(trained(Draw()), trained(None))


@needs_averaging
def test_measured_beside_averaged_weights_in_either_order():
    """The averaged weights are measured, because they are what is validated."""
    values = []
    for order in (1, -1):
        seed_everything(3)
        monitor, average = EquivarianceMonitor("rotation", 8), EMAWeightAveraging(decay=0.5)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[monitor, average][::order],
        )  # fmt: skip
        data = RandomlyAugmented(8)
        trainer.fit(Module("plain"), DataLoader(data, 4), DataLoader(data, 4))
        values.append(trainer.callback_metrics["equivariance/rotation"].item())
    assert values[0] == values[1]


@pytest.mark.parametrize("exception", [RuntimeError, ValueError, torch.OutOfMemoryError])
def test_failed_measurement_leaves_no_trace(exception):
    """A failure at any depth of the measurement leaves the model, its hooks and training as they were."""

    class Failing(Module):
        def forward(self, x):
            scores = super().forward(x)
            # Evaluated outside of `validation_step`: this is the measurement.
            if not torch.is_grad_enabled() and not self.validating:
                raise exception("planted")
            return scores

        validating = False

        def validation_step(self, batch, batch_idx):
            self.validating = True
            super().validation_step(batch, batch_idx)
            self.validating = False

    def run(monitor):
        seed_everything(3)
        module, states = Failing("frozen"), RandomStates()
        module.net[2].register_forward_hook(lambda *_: None)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[*monitor, states],
        )  # fmt: skip
        data = RandomlyAugmented(8)
        trainer.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 4))
        return module, trainer, states

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_monitor = run([EquivarianceMonitor("rotation", 8)])
    assert any("planted" in str(entry.message) for entry in caught)
    assert torch.isnan(with_monitor[1].callback_metrics["equivariance/rotation"])
    without = run([])
    assert_same(with_monitor, without)
    hooks = [
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in run_[0].modules()]
        for run_ in (with_monitor, without)
    ]
    assert hooks[0] == hooks[1]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in with_monitor[0].parameters())


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validate_before_and_after_fit(inference_mode):
    """States made in inference mode do not reach a later training."""
    seed_everything(3)
    module, data = Module("plain"), RandomlyAugmented(8)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=1, inference_mode=inference_mode, callbacks=EquivarianceMonitor("rotation", 8), **options
    )
    for _ in range(2):
        (metrics,) = trainer.validate(module, DataLoader(data, 4), verbose=False)
        assert np.isfinite(metrics["equivariance/rotation"])
        trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
        assert torch.isfinite(trainer.callback_metrics["equivariance/rotation"])
        trainer.fit_loop.max_epochs += 1


@pytest.mark.slow
def test_memory_stays_flat():
    """Many measured epochs leave nothing behind."""
    import gc

    counts = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.current_epoch % 50 == 9:
                gc.collect()
                counts.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))

    seed_everything(3)
    data = RandomlyAugmented(4)
    trainer = Trainer(
        max_epochs=500, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EquivarianceMonitor("rotation", 4, baseline=False), Count()],
    )  # fmt: skip
    module = Module("compiled")
    module.variant, module.compiled = "plain", None
    trainer.fit(module, DataLoader(data, 4), DataLoader(data, 4))
    assert all(b <= a + 2 for a, b in itertools.pairwise(counts)), counts
