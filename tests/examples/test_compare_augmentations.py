"""The main job at reduced size."""

import csv
import math

import pytest
import torch
from torch import nn

for module in ("sklearn", "timm", "tensorboard", "matplotlib", "torchvision"):
    pytest.importorskip(module)


@pytest.fixture
def compare(example):
    return example("compare_augmentations")


def tiny(compare, monkeypatch, count=96):
    train, val, channels, classes = compare.digits()
    subsets = [torch.utils.data.Subset(part, range(count)) for part in (train, val)]
    monkeypatch.setattr(compare, "digits", lambda: (*subsets, channels, classes))


def test_whole_job(compare, monkeypatch, tmp_path, capsys):
    tiny(compare, monkeypatch)
    arguments = ["--epochs", "2", "--num-images", "32", "--threads", "1", "--out", str(tmp_path)]
    results = compare.main([*arguments, "--models", "cnn", "--regimes", "none", "translation", "rotation"])
    printed = capsys.readouterr().out
    folder = tmp_path / "digits"
    assert (folder / "comparison.png").stat().st_size > 30_000
    rows = list(csv.reader((folder / "table.csv").open()))
    assert [row[1] for row in rows[1:]] == ["none", "translation", "rotation"]
    curve = results["cnn"]["rotation"]["curves"]["equivariance"]["rotation"]
    assert list(curve.epochs) == [0, 1, 2]
    assert all(math.isfinite(v) and v > 0 for v in [*curve.values, *curve.errors])
    assert f"{curve.values[-1]:.3f} ± {curve.errors[-1]:.3f}" in printed
    assert "rotation augmentation left" in printed
    assert "bspline, reflection, pixel areas" in printed
    assert f"tensorboard --logdir {folder}" in printed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for regime in ("none", "translation", "rotation"):
        events = EventAccumulator(str(folder / f"cnn-{regime}-s0")).Reload()
        logged = [event.value for event in events.Scalars("equivariance/rotation")]
        wanted = results["cnn"][regime]["curves"]["equivariance"]["rotation"].values
        assert logged == pytest.approx(list(wanted), rel=1e-5)


def test_regimes_of_a_seed_start_from_the_same_weights(compare):
    states = []
    for _ in range(2):
        compare.seed_everything(3, verbose=False)
        states.append(compare.build("cnn", 1, 10).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_folder_of_images_and_vision_transformer(compare, tmp_path, capsys):
    from torchvision.utils import save_image

    for part in ("train", "val"):
        for kind in ("left", "right"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for k in range(32):
                image = torch.rand(3, 40, 36) * 0.3
                image[:, :, :18] += 0.6 * (kind == "left")
                save_image(image, tmp_path / "data" / part / kind / f"{k}.png")
    arguments = ["--data", f"folder:{tmp_path / 'data'}", "--models", "vit", "--regimes", "none", "all"]
    arguments += ["--epochs", "1", "--num-images", "16", "--seeds", "2", "--threads", "1", "--out", str(tmp_path / "o")]
    results = compare.main([*arguments, "--augmentation", "torchvision"])
    assert set(results["vit"]) == {"none", "all"}
    assert "over 2 seeds" in capsys.readouterr().out
    assert (tmp_path / "o" / "folder" / "vit-all-s1").is_dir()


@pytest.mark.parametrize("generators", [("translation_x", "translation_y"), ("rotation",), ("scale",)])
def test_both_backends_do_the_same(compare, generators):
    """Same parameters, same signs: torchvision's action and ours agree on a smooth image."""
    grid = torch.linspace(-1, 1, 32)
    image = torch.exp(-((grid[:, None] - 0.2) ** 2 + 2 * (grid + 0.1) ** 2) / 0.1).expand(4, 1, 32, 32).contiguous()
    ours, theirs = (compare.Augmentation(generators, 0, backend)(image) for backend in ("lie_metric", "torchvision"))
    assert (ours - image).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03)


def test_regimes_move_what_they_say(compare):
    drawn = compare.Augmentation(("rotation",), 0).draw(100)
    assert drawn["rotation"].abs().max() > 0.3
    assert not drawn["translation_x"].any()
    assert not drawn["scale"].any()


def test_the_sentence_follows_from_the_numbers(compare):
    def regimes(rotation, translation):
        curve = compare.Curve
        return {
            "rotation": curve([0, 1], [1.0, rotation], [0.1, 0.01]),
            "translation_x": curve([0, 1], [1.0, translation], [0.1, 0.01]),
            "translation_y": curve([0, 1], [1.0, translation], [0.1, 0.01]),
        }

    relative = {"none": regimes(2, 2), "rotation": regimes(1, 2), "translation": regimes(2, 2.0)}
    lee = {"none": regimes(3, 2), "rotation": regimes(4, 2), "translation": regimes(2, 2)}
    told = compare.sentence("cnn", relative, relative, lee)
    assert "rotation augmentation left 0.50 ± 0.01 of the rotation error at two pixels and 1.00 ± 0.01" in told
    assert "lowered the former more than the latter; translation augmentation left 1.00" in told
    assert "not distinguishably more than" in told
    assert "raw LEE gives another one (translation, none, rotation)" in told
    assert "lowest for the untrained network" in told
    assert (
        compare.sentence("cnn", {"none": relative["none"]}, {"none": relative["none"]}, lee)
        == "cnn: too few regimes to compare."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--num-images", "-1"], "--num-images must be at least 1"),
        (["--data", "imagenet"], "--data must be digits, mnist, cifar10 or folder:PATH, got 'imagenet'"),
        (["--regimes", "mirror"], "invalid choice"),
    ],
)
def test_bad_command_lines(compare, arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_data_that_cannot_be_had(compare, tmp_path, monkeypatch):
    from torchvision import datasets

    with pytest.raises(SystemExit, match=r"cannot be had.*use --data digits"):
        compare.torchvision_data(f"folder:{tmp_path / 'nothing'}", tmp_path)

    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading train-images")

    monkeypatch.setattr(datasets, "MNIST", offline)
    with pytest.raises(SystemExit, match="--data mnist cannot be had: Error downloading"):
        compare.torchvision_data("mnist", tmp_path)


def test_models(compare):
    for name in ("cnn", "vit", "test_resnet"):
        model = compare.build(name, 1, 10)
        assert isinstance(model, nn.Module)
        assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
