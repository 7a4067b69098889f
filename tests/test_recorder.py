"""The recorder: the monitor's values in any loop, its files, its failures, and training unchanged."""

import json
import math
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lie_metric as lm
from lie_metric.curves import spread, strides_of
from lie_metric.representations import Invariant, Points, Vectors

IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, _):
        pass


class TestValues:
    def test_are_those_of_the_monitor(self):
        options = {
            "measures": ("relative", "lee", "sensitivity", "rms"),
            "metrics": [lm.PredictionConsistency()],
            "seed": 3,
        }
        monitor = lm.EquivarianceMonitor(("rotation", "scale"), 24, on_error="raise", **options)
        trainer = Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False, enable_model_summary=False,
                          accelerator="cpu", num_sanity_val_steps=0)  # fmt: skip
        module = Module()
        trainer.validate(module, DataLoader(TensorDataset(IMAGES), 7), verbose=False)
        wanted = {key: value.item() for key, value in trainer.callback_metrics.items()}
        for size in (None, 7):
            recorder = lm.Recorder(IMAGES, ("rotation", "scale"), batch_size=size, on_error="raise", **options)
            assert recorder.described is None
            found = recorder.measure(module.net, step=5)
            assert found.keys() == wanted.keys()
            assert found == pytest.approx(wanted, rel=1e-6)
        assert recorder.described.startswith("Sequential: output (B, 3): invariant, class scores; method ")
        assert recorder.described.endswith("24 samples")

    def test_companions_take_the_part_of_many_images_that_the_monitor_takes(self):
        images = torch.randn(70, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        assert set(strides_of(70).values()) - {1}
        monitor = lm.EquivarianceMonitor("rotation", 70, on_error="raise")
        trainer = Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False, enable_model_summary=False,
                          accelerator="cpu", num_sanity_val_steps=0)  # fmt: skip
        module = Module()
        trainer.validate(module, DataLoader(TensorDataset(images), 35), verbose=False)
        wanted = {key: value.item() for key, value in trainer.callback_metrics.items()}
        assert lm.Recorder(images, "rotation").measure(module.net, step=5) == pytest.approx(wanted, rel=1e-6)

    def test_a_stream_is_gone_through_as_far_as_it_is_needed(self):
        def stream():
            yield from IMAGES[:12].split(4)
            raise AssertionError("this batch is not needed")

        recorder = lm.Recorder.of_loader(stream(), "rotation", num_images=10, displacement=None, floor=False)
        recorder.measure(net(), step=0)
        assert recorder.described.endswith("10 samples")

    def test_named_parts(self):
        batches = [
            {"pos": torch.randn(n, 5, 3, generator=torch.Generator().manual_seed(n)), "charge": torch.rand(n, 5)}
            for n in (4, 3)
        ]
        options = {
            "input_representation": {"pos": Points(3)},
            "output_representation": {"energy": Invariant(), "forces": Vectors(3)},
        }

        def model(batch):
            weighted = batch["charge"][..., None] * batch["pos"]
            return {"energy": weighted.sum((1, 2))[:, None].sin(), "forces": weighted.cos()}

        recorder = lm.Recorder(batches, "rotation", on_error="raise", **options)
        found = recorder.measure(model, step=1)
        metric = lm.LocalEquivarianceError("rotation", **options)
        for batch in batches:
            metric.update(model, batch)
        for name, value in metric.compute().items():
            part, generator = name.split("/")
            assert found[f"equivariance_{part}/{generator}"] == pytest.approx(value.item(), rel=1e-6)

    def test_inputs_that_a_loop_changes_later_stay_as_they_were(self):
        images = IMAGES.clone()
        parts = [{"pos": torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))}]
        layout = {"input_representation": {"pos": Points(3)}, "output_representation": Invariant()}
        for inputs, options, model in (
            (images, {"displacement": None, "floor": False}, net()),
            (parts, layout, lambda batch: batch["pos"].sin().sum((1, 2))[:, None]),
        ):
            recorder = lm.Recorder(inputs, "rotation", on_error="raise", **options)
            before = recorder.measure(model, step=0)
            for tensor in [inputs] if isinstance(inputs, torch.Tensor) else inputs[0].values():
                tensor.mul_(3)
            if isinstance(inputs, list):
                inputs.clear()
            assert recorder.measure(model, step=1) == before

    def test_of_a_loader(self):
        loader = DataLoader(TensorDataset(IMAGES, torch.arange(24)), 5, shuffle=True)
        state = torch.get_rng_state()
        recorder = lm.Recorder.of_loader(loader, "rotation", num_images=12, displacement=None, floor=False)
        assert torch.equal(torch.get_rng_state(), state)
        found = recorder.measure(net(), step=0)
        assert recorder.described.endswith("12 samples")
        assert found.keys() == {f"equivariance{kind}/rotation" for kind in ("", "_se", "_lee", "_lee_se")}
        for empty in ([], DataLoader(TensorDataset(IMAGES[:0]), 5)):
            with pytest.raises(ValueError, match="at least one sample"):
                lm.Recorder.of_loader(empty)
        with pytest.raises(ValueError, match="`num_images` must be at least 1, got 0"):
            lm.Recorder.of_loader(loader, num_images=0)
        with pytest.raises(TypeError, match=r"`num_images` must be an integer, got 2\.5"):
            lm.Recorder.of_loader(loader, num_images=2.5)

    @pytest.mark.parametrize("kind", ["plain", "drop last", "other", "in pairs", "stream"])
    def test_of_a_loader_are_the_samples_of_the_monitor(self, kind):
        loaded = []

        class Set(torch.utils.data.Dataset):
            def __len__(self):
                return 24

            def __getitem__(self, index):
                loaded.append(index)
                return IMAGES[index]

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(IMAGES)

        class Other(DataLoader):
            """Not known to give what a plain one gives."""

        def in_pairs(entries):
            return torch.stack([image for entry in entries for image in (entry, 2 * entry)])

        options = {"drop last": {"drop_last": True}, "in pairs": {"collate_fn": in_pairs}}.get(kind, {})
        make = Other if kind == "other" else DataLoader
        batches = make(Stream() if kind == "stream" else Set(), 5, **options)
        recorder = lm.Recorder.of_loader(batches, ("rotation", "scale"), num_images=9, seed=3, on_error="raise")
        assert kind != "plain" or loaded == spread(9, 24)
        monitor = lm.EquivarianceMonitor(("rotation", "scale"), 9, seed=3, on_error="raise")
        trainer = Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False, enable_model_summary=False,
                          accelerator="cpu")  # fmt: skip
        module = Module()
        (wanted,) = trainer.validate(module, batches, verbose=False)
        assert recorder.measure(module.net, step=0) == pytest.approx(wanted, rel=1e-6)

    def test_of_a_loader_of_named_parts(self):
        batches = [{"pos": torch.full((4, 5, 3), float(index))} for index in range(6)]
        layout = {"input_representation": {"pos": Points(3)}, "output_representation": Invariant()}

        def kept(loader):
            recorder = lm.Recorder.of_loader(loader, "rotation", num_images=9, **layout)
            return [int(batch["pos"][0, 0, 0]) for batch in recorder._batches]

        loader = DataLoader(TensorDataset(torch.arange(24)), 4, collate_fn=lambda rows: batches[int(rows[0][0]) // 4])
        assert kept(loader) == spread(3, 6) == [0, 3, 4]
        assert kept(batches) == kept(iter(batches)) == [0, 1, 2]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [5, 32, 64, 256])
def test_processes_share_companions_too(monkeypatch, world, count):
    recorder = lm.Recorder(torch.zeros(count, 1, 8, 8), "rotation", batch_size=7)
    dealt = []
    for rank in range(world):
        monkeypatch.setattr("lie_metric.recorder.process", lambda rank=rank: (rank, world))
        shares = list(recorder._shares())
        assert all(len(images) == len(numbers) for images, numbers in shares)
        dealt.append([number for _, numbers in shares for number in numbers])
    assert sorted(number for numbers in dealt for number in numbers) == list(range(count))
    for stride in {1, *strides_of(count).values()}:
        loads = [sum(number % stride == 0 for number in numbers) for numbers in dealt]
        assert max(loads) - min(loads) <= 1


def test_processes_share_batches_of_named_parts(monkeypatch):
    batches = [{"pos": torch.full((count, 5, 3), float(count))} for count in (2, 1, 3)]
    dealt = []
    for rank in range(2):
        monkeypatch.setattr("lie_metric.recorder.process", lambda rank=rank: (rank, 2))
        recorder = lm.Recorder(batches, "rotation", input_representation={"pos": Points(3)})
        dealt.append([(len(batch["pos"]), numbers) for batch, numbers in recorder._shares()])
    assert dealt == [[(2, [0, 1]), (3, [3, 4, 5])], [(1, [2])]]


class TestLoop:
    def trained(self, recorder=None):
        model = net().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(6):
            if recorder is not None and step % 2 == 0:
                recorder.measure(model, step=step, epoch=step / 2)
            loss = nn.functional.cross_entropy(model(IMAGES), torch.arange(24) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    def test_training_is_unchanged_and_everything_is_kept(self, tmp_path):
        logged = []
        recorder = lm.Recorder(
            IMAGES, ("rotation", "translation"), folder=tmp_path / "run", log=logged.append, on_error="raise",
            settings={"lr": 0.1, "seed": 4},
        )  # fmt: skip
        watched, plain = self.trained(recorder), self.trained()
        for one, other in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(one, other)
        assert watched.training
        assert [(entry["step"], entry["epoch"]) for entry in recorder.history] == [(0, 0), (2, 1), (4, 2)]
        assert recorder.history == logged
        assert "equivariance_floor/rotation" in logged[0]
        header, *lines = map(json.loads, (tmp_path / "run" / "equivariance.jsonl").read_text().splitlines())
        assert header["hyperparameters"] == {"lr": 0.1, "seed": 4}
        assert header["seed"] == 4
        assert [(line["step"], line["epoch"], line["baseline"]) for line in lines] == [
            (0, 0, True),
            (2, 0, False),
            (4, 1, False),
        ]
        read = lm.read_runs(tmp_path)
        assert sorted(set(zip(read["step"], read["epoch"], strict=True))) == [(0, 0), (2, 1), (4, 2)]
        kept = lm.read_record(tmp_path / "run")
        assert kept.images == 24
        value = dict(zip(kept.names, kept.replicates.value.tolist(), strict=True))["rotation"]
        assert value == pytest.approx(logged[-1]["equivariance/rotation"], rel=1e-5)
        assert set(lm.read_runs(tmp_path)["key"]) >= {"equivariance", "equivariance_finite"}

    def test_floors_are_measured_where_the_monitor_measures_them(self):
        for steps, wanted in ((range(6), [0, 1, 2, 4]), (range(1, 6), [1, 2, 4])):
            recorder = lm.Recorder(IMAGES[:2], "rotation", displacement=None)
            for step in steps:
                recorder.measure(net(), step)
            key = "equivariance_floor/rotation"
            assert [entry["step"] for entry in recorder.history if key in entry] == wanted
            assert recorder.keys == [key for key in recorder.history[0] if key not in {"step", "epoch"}]

    def test_what_a_log_does_to_values_is_not_kept(self):
        recorder = lm.Recorder(
            IMAGES[:4], "rotation", displacement=None, floor=False, log=lambda values: values.clear()
        )
        assert recorder.measure(net(), 0).items() <= recorder.history[0].items()
        assert recorder.history[0]["step"] == 0

    def test_epochs_count_by_themselves(self):
        recorder = lm.Recorder(IMAGES[:4], "rotation", displacement=None, floor=False)
        for step in (0, 10):
            recorder.measure(net(), step)
        assert [entry["epoch"] for entry in recorder.history] == [0, 1]


class TestFailures:
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"inputs": (IMAGES, 3)}, TypeError, "`inputs` must be a tensor, or a list of tensors, got tuple"),
            ({"inputs": []}, ValueError, "at least one sample"),
            ({"inputs": IMAGES[:0]}, ValueError, "at least one sample"),
            ({"inputs": {"x": IMAGES}, "input_representation": {"pos": Points(3)}}, KeyError, "pos"),
            ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
            ({"batch_size": 2.5}, TypeError, "`batch_size` must be an integer or None, got 2.5"),
            ({"on_error": "ignore"}, ValueError, "`on_error` must be 'warn' or 'raise', got 'ignore'"),
            ({"log": "file"}, TypeError, "`log` must take a mapping of values, got 'file'"),
            ({"prefix": "a/b"}, ValueError, "`prefix` must be a non-empty string without '/'"),
            ({"measures": "lee"}, ValueError, "`measures` must be a sequence"),
            ({"generators": "twist"}, ValueError, "twist"),
            ({"metrics": [3]}, TypeError, "`metrics` must be metrics of this library"),
            ({"method": "backward"}, ValueError, "`method` must be one of"),
        ],
    )
    def test_bad_arguments(self, arguments, error, match):
        with pytest.raises(error, match=match):
            lm.Recorder(**{"inputs": IMAGES, **arguments})

    def test_a_misuse_is_raised_at_the_first_call(self):
        recorder = lm.Recorder(IMAGES, "rotation")
        with pytest.raises(ValueError, match="output_representation"):
            recorder.measure(lambda x: x.new_zeros(len(x), 3, 5), step=0)
        assert recorder.history == []

    def test_what_fails_later_is_nan_and_told(self):
        class Breaks(nn.Module):
            broken = False

            def forward(self, x):
                if self.broken:
                    raise RuntimeError("planted")
                return x.mean((2, 3))

        model = Breaks()
        recorder = lm.Recorder(IMAGES, "rotation", displacement=None, floor=False)
        strict = lm.Recorder(IMAGES, "rotation", displacement=None, floor=False, on_error="raise")
        assert all(map(math.isfinite, recorder.measure(model, 0).values()))
        strict.measure(model, 0)
        model.broken = True
        with pytest.warns(UserWarning, match="could not be measured, it failed with RuntimeError: planted"):
            assert all(map(math.isnan, recorder.measure(model, 1).values()))
        with pytest.raises(RuntimeError, match="planted"):
            strict.measure(model, 1)
        model.broken = False
        assert all(map(math.isfinite, recorder.measure(model, 2).values()))

    def test_a_companion_that_fails_is_nan_alone(self, monkeypatch, tmp_path):
        options = {"metrics": {"own": lm.PredictionConsistency()}, "floor": False}
        recorder = lm.Recorder(IMAGES, "rotation", folder=tmp_path, **options)
        recorder.measure(net(), 0)

        def fails(*_, **__):
            raise RuntimeError("planted")

        monkeypatch.setattr(lm.PredictionConsistency, "update", fails)
        with pytest.warns(UserWarning, match="companion 'own' of `Recorder` could not be measured.*planted"):
            found = recorder.measure(net(), 1)
        assert (
            {key for key, value in found.items() if math.isnan(value)}
            == {key for key in found if key.startswith("equivariance_own")}
            != set()
        )
        _, *lines = map(json.loads, (tmp_path / "equivariance.jsonl").read_text().splitlines())
        assert [any("own" in json.dumps(record) for record in line["records"]) for line in lines] == [True, False]


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    with open(f"{folder}/{rank}.pickle", "wb") as file:
        pickle.dump([*_measured(folder), _refused(rank)], file)
    torch.distributed.destroy_process_group()


def _measured(folder):
    logged = []
    options = {"metrics": [lm.PredictionConsistency()], "measures": ("relative", "sensitivity"), "on_error": "raise"}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    kept = None if rank else folder  # as loops have it that give a folder to one process alone
    recorder = lm.Recorder(IMAGES[:19], "rotation", batch_size=8, folder=kept, log=logged.append, **options)
    model = net()
    model[1].running_mean += rank  # as data parallelism leaves them after a step of training
    found = recorder.measure(model, step=0)
    assert (model[1].running_mean == rank).all()
    return found, len(logged)


def _refused(rank):
    """What is said of inputs that differ, in values, numbers, and parts that move."""
    layout = {"input_representation": {"pos": Points(3)}, "output_representation": Invariant()}
    cases = [
        (IMAGES[rank : rank + 4], {}),
        (IMAGES[: 4 - rank], {}),
        ({"pos": torch.full((2, 5, 3), float(rank))}, layout),
    ]
    found = []
    for inputs, options in cases:
        with pytest.raises(ValueError, match="same samples") as caught:
            lm.Recorder(inputs, "rotation", **options).measure(lambda x: x, step=0)
        found.append(str(caught.value))
    return found


@pytest.mark.slow
def test_two_processes_give_the_values_of_one(tmp_path):
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    torch.multiprocessing.start_processes(_worker, (str(tmp_path / "two"),), 2, start_method="forkserver")
    pair = [pickle.loads((tmp_path / "two" / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    refused = [found.pop() for found in pair]
    assert all("`inputs` must be the same samples on every process" in text for texts in refused for text in texts)
    assert ["[4, 3] samples by rank" in refused[0][1], "4 on each that differ" in refused[1][0]] == [True, True]
    wanted, _ = _measured(tmp_path / "one")
    assert pair[0][0] == pair[1][0] == pytest.approx(wanted, rel=1e-5)
    assert [logged for _, logged in pair] == [1, 0]
    one, two = (lm.read_record(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(one.replicates.left_out, two.replicates.left_out, rtol=1e-5, atol=0)
    assert len((tmp_path / "two" / "equivariance.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("bf16", [False, True])
def test_under_the_trainer_of_transformers(tmp_path, bf16):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lie_metric.callbacks.transformers import watch

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip

    class Set(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            return {"pixel_values": IMAGES[index], "labels": index % 3}

    def trained(with_recorder):
        transformers.set_seed(0)
        model = transformers.ViTForImageClassification(config)
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), num_train_epochs=2, eval_strategy="epoch", report_to=[], use_cpu=True,
            per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True, seed=0, bf16=bf16,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Set(), eval_dataset=Set())
        recorder = lm.Recorder(IMAGES, "rotation", on_error="raise")
        if with_recorder:
            watch(trainer, recorder)
        trainer.train()
        return trainer, recorder, model

    trainer, recorder, model = trained(True)
    told = [entry for entry in trainer.state.log_history if "equivariance/rotation" in entry]
    assert [entry["step"] for entry in told] == [0, 3, 6]
    assert [entry["epoch"] for entry in recorder.history] == [0, 1, 2]
    assert "half precision" not in recorder.described
    metric = lm.LocalEquivarianceError("rotation")
    whole = transformers.ViTForImageClassification(config)
    whole.load_state_dict(model.state_dict())
    metric.update(whole, IMAGES)
    assert told[-1]["equivariance/rotation"] == pytest.approx(metric.compute()["rotation"].item(), rel=1e-6)
    assert told[-1]["equivariance/rotation"] == recorder.history[-1]["equivariance/rotation"]
    *_, plain = trained(False)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    several = lm.Recorder(IMAGES, "rotation", displacement=None, floor=False)
    watch(trainer, several)
    trainer.eval_dataset = {"one": Set(), "other": Set()}
    trainer.args.eval_on_start = True
    trainer.train()
    assert [entry["step"] for entry in several.history] == [0, 3, 6]
    trainer.evaluate(Set())
    trainer.evaluate(Set())
    assert [entry["step"] for entry in several.history] == [0, 3, 6, 6, 6]
    with pytest.raises(TypeError, match=r"`trainer` must be a `transformers.Trainer`, got int"):
        watch(3, recorder)
    with pytest.raises(TypeError, match=r"`recorder` must be a `lie_metric.Recorder`, got 'all'"):
        watch(trainer, "all")
