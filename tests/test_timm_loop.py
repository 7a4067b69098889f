"""The lines that timm's training script is given: a loop of its pieces, whose summary holds the curves."""

import csv
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import lie_metric as lm

timm = pytest.importorskip("timm")
optim = pytest.importorskip("timm.optim")
image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

EPOCHS = 3


class Pictures(Dataset):
    """What timm's loaders take: pictures of PIL, and a transform that they set."""

    transform = None

    def __len__(self):
        return 12

    def __getitem__(self, index):
        pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return self.transform(image.fromarray(pixels.numpy())), index % 3


def loader(is_training):
    return timm.data.create_loader(
        Pictures(), (3, 32, 32), 4, is_training=is_training, num_workers=0, persistent_workers=False,
        use_prefetcher=False, device=torch.device("cpu"),
    )  # fmt: skip


def train_one_epoch(epoch, model, batches, optimizer, model_ema):
    losses = timm.utils.AverageMeter()
    model.train()
    for index, (images, targets) in enumerate(batches):
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model_ema.update(model, step=epoch * len(batches) + index + 1)
        losses.update(loss.item(), len(images))
    return {"loss": losses.avg}


def validate(model, batches):
    losses, top1 = timm.utils.AverageMeter(), timm.utils.AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, targets in batches:
            scores = model(images)
            losses.update(nn.functional.cross_entropy(scores, targets).item(), len(images))
            top1.update(timm.utils.accuracy(scores, targets, topk=(1,))[0].item(), len(images))
    return {"loss": losses.avg, "top1": top1.avg}


def train(output_dir, with_recorder=True):
    timm.utils.random_seed(0)
    loader_train, loader_eval = loader(True), loader(False)
    model = timm.create_model("test_resnet", num_classes=3)
    optimizer = optim.create_optimizer_v2(model, "sgd", lr=0.01)
    model_ema = timm.utils.ModelEmaV3(model, decay=0.5)
    updates_per_epoch = len(loader_train)
    recorder = None
    if with_recorder:
        recorder = lm.Recorder.of_loader(loader_eval, ("translation", "rotation"), folder=output_dir, on_error="raise")
        recorder.measure(model_ema.module, step=0)
    for epoch in range(EPOCHS):
        train_metrics = train_one_epoch(epoch, model, loader_train, optimizer, model_ema)
        eval_metrics = validate(model_ema, loader_eval)
        if recorder is not None:
            values = recorder.measure(model_ema.module, step=(epoch + 1) * updates_per_epoch, epoch=epoch + 1)
            eval_metrics.update({key: values.get(key, math.nan) for key in recorder.keys})
        timm.utils.update_summary(epoch, train_metrics, eval_metrics, output_dir / "summary.csv", lr=0.01)
    return recorder, model, model_ema, loader_eval


def test_values_are_in_the_summary(tmp_path):
    recorder, model, model_ema, loader_eval = train(tmp_path)
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    # Each row has every column: of what is measured seldom "nan" rather than the value of the next column.
    assert all(float(row["lr"]) == 0.01 for row in rows)
    for row, entry in zip(rows, recorder.history[1:], strict=True):
        for key in recorder.keys:
            assert float(row[f"eval_{key}"]) == pytest.approx(entry.get(key, math.nan), nan_ok=True)
    floors = [float(row["eval_equivariance_floor/rotation"]) for row in rows]
    assert [math.isnan(value) for value in floors] == [False, False, True]
    metric = lm.LocalEquivarianceError(("translation", "rotation"))
    for images, _ in loader_eval:
        metric.update(model_ema.module, images)
    assert float(rows[-1]["eval_equivariance/rotation"]) == pytest.approx(metric.compute()["rotation"].item(), rel=1e-5)
    assert set(lm.read_runs(tmp_path)["epoch"]) == {0, 1, 2, 3}
    (tmp_path / "plain").mkdir()
    _, plain, other, _ = train(tmp_path / "plain", with_recorder=False)
    for one, two in ((model, plain), (model_ema, other)):
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
