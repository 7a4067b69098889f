"""The images of a study."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lie_metric.study import Framing, StudyError
from lie_metric.study.data import Prepared, class_numbers, digits, load_data


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(4):
            pixels = random.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_embedded_sets():
    for name, size, classes in (("digits", 32, 10), ("synthetic", 64, 4)):
        images = load_data(name, 20, 0)
        assert len(images) == 20
        assert len(images.classes) == classes
        assert images.read(0).size == (size, size)
        assert images.fingerprint == load_data(name, 20, 0).fingerprint
        assert images.fingerprint != load_data(name, 20, 1).fingerprint
    assert [len(digits(train=train)[0]) for train in (True, False)] == [1437, 360]


def test_first_images_do_not_depend_on_the_count():
    few, many = load_data("digits", 5, 3), load_data("digits", 50, 3)
    assert list(few.labels) == list(many.labels[:5])


def test_folder(folder):
    images = load_data(f"folder:{folder}", 100, 0)
    assert images.classes == ("cat", "dog")
    assert sorted(images.labels) == [0, 0, 0, 0, 1, 1, 1, 1]
    Image.new("RGB", (20, 24)).save(folder / "cat" / "0.png")
    assert load_data(f"folder:{folder}", 100, 0).fingerprint != images.fingerprint


def test_each_model_gets_its_own_preprocessing(folder):
    images = load_data(f"folder:{folder}", 8, 0)
    model = timm.create_model("test_resnet")
    tensor, label, number = Prepared(images, model)[3]
    config = timm.data.resolve_model_data_config(model)
    wanted = timm.data.create_transform(**config)(images.read(3))
    assert tensor.shape == (3, 160, 160)
    torch.testing.assert_close(tensor, wanted)
    assert (label, number) == (images.labels[3], 3)
    # A model that does not say gets the pixels.
    bare, _, _ = Prepared(images, torch.nn.Flatten())[3]
    torch.testing.assert_close(bare, torch.tensor(np.array(images.read(3))).permute(2, 0, 1) / 255)


def test_framing_takes_the_place_of_what_the_model_says(folder):
    images = load_data(f"folder:{folder}", 8, 0)
    framing = Framing((40, 32), (0.5,), (0.25, 0.5, 1.0))
    prepared = Prepared(images, timm.create_model("test_resnet"), framing)
    assert prepared[3][0].shape == (3, 40, 32)
    assert prepared.normalisation == "mean [0.5], std [0.25, 0.5, 1.0]"
    # Of a model that does not say: the largest part of that shape, 16 by 24 of 20 by 24, in full resolution.
    bare = Prepared(images, torch.nn.Flatten(), Framing((16, 24), (0.5,), (0.25, 0.5, 1.0)))[3][0]
    pixels = torch.tensor(np.array(images.read(3))).permute(2, 0, 1)[:, 2:18] / 255
    torch.testing.assert_close(bare, (pixels - 0.5) / torch.tensor([0.25, 0.5, 1.0])[:, None, None])
    grey = Prepared(images, torch.nn.Flatten(), Framing(channels=1))[3][0]
    assert grey.shape == (1, 20, 24)
    with pytest.raises(ValueError, match=r"`mean` must be one number or .* of 1 channels, got 3\. Give --mean"):
        Prepared(images, timm.create_model("test_resnet"), Framing(channels=1))


def test_channels_of_a_set(folder):
    assert load_data(f"folder:{folder}", 8, 0).channels == 3
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load_data(f"folder:{folder}", 8, 0).channels == 1
    Image.new("RGB", (24, 20)).save(folder / "cat" / "0.png")
    mixed = load_data(f"folder:{folder}", 8, 0)
    assert {Prepared(mixed, torch.nn.Flatten())[number][0].shape for number in range(8)} == {(3, 20, 24)}


def test_classes_of_imagenet():
    model = timm.create_model("test_resnet")
    assert class_numbers(["n01443537", "n01440764"], 1000, model) == [1, 0]
    assert class_numbers(["n01443537", "n01440764"], 2, model) == [0, 1]
    assert class_numbers(["cat", "dog"], 1000, model) is None


def test_corrupt_image(folder):
    path = folder / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(StudyError, match=r"readable images, got .* at .*dog/2.png. Repair or remove the file"):
        load_data(f"folder:{folder}", 8, 0)


def test_folders_that_hold_nothing(folder, tmp_path):
    (folder / "mouse").mkdir()
    with pytest.raises(StudyError, match=r"images in every class folder, got none in .*mouse"):
        load_data(f"folder:{folder}", 8, 0)
    with pytest.raises(StudyError, match=r"one folder of images for each class, got none"):
        load_data(f"folder:{folder / 'mouse'}", 8, 0)
    with pytest.raises(StudyError, match="folder that exists"):
        load_data(f"folder:{folder / 'nothing'}", 8, 0)


def test_unknown_set():
    with pytest.raises(ValueError, match="`data` must be digits, synthetic, folder:PATH or one of cifar10"):
        load_data("imagenett", 8, 0)
