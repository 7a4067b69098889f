"""The images of a study: a folder, a torchvision set, or the embedded digits and synthetic shapes."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lie_metric.study.settings import Framing
from lie_metric.study.store import StudyError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageSet", "Prepared", "class_numbers", "digits", "load_data"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_TORCHVISION = {
    "cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashionmnist": "FashionMNIST", "kmnist": "KMNIST",
    "svhn": "SVHN", "stl10": "STL10", "food101": "Food101", "flowers102": "Flowers102", "pets": "OxfordIIITPet",
    "gtsrb": "GTSRB", "eurosat": "EuroSAT",
}  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """The images that every model of a study sees, in an order that a seed fixes.

    Attributes:
        name: The set's name.
        images: Images, or paths of image files, which are read when asked for.
        labels: The class of each image.
        classes: Names of the classes.
        fingerprint: Changes when an image, a label or the order does.
        channels: 1 where all images are grey, else 3.
    """

    name: str
    images: Sequence[Image | Path]
    labels: Sequence[int]
    classes: tuple[str, ...]
    fingerprint: str
    channels: int = 3

    def __len__(self) -> int:
        return len(self.images)

    def read(self, number: int) -> Image:
        """An image by its number.

        Args:
            number: From 0.

        Returns:
            The image, decoded.

        Raises:
            StudyError: If the file cannot be read as an image.
        """
        item = self.images[number]
        return _open(item) if isinstance(item, Path) else item


class Prepared(Dataset):
    """A set as one model wants it: timm's evaluation transform from the model's data config.

    A model without ``pretrained_cfg`` gets images of the set's own size, grey where all of them are, with values in
    [0, 1]. A framing takes the place of either.

    Args:
        images: The set.
        model: The model.
        framing: What is to be otherwise.

    Attributes:
        frame: How images are cut, in words: two models with the same see the same.
        normalisation: Mean and standard deviation, in words.

    Raises:
        ValueError: If mean and standard deviation are of another number of channels.
    """

    def __init__(self, images: ImageSet, model: Any, framing: Framing | None = None) -> None:
        self.images = images
        framing = framing or Framing()
        mean, std, size = framing.mean, framing.std, framing.input_size
        self._timm: Callable[[Image], Tensor] | None = None
        if getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None):
            config = _config(model)
            self.channels = framing.channels or config["input_size"][0]
            mean, std = mean or tuple(config["mean"]), std or tuple(config["std"])
            config |= {"input_size": (self.channels, *config["input_size"][1:]), "mean": mean, "std": std}
            self.frame = ", ".join(f"{name} {config[name]}" for name in _CUT if name in config)
        else:
            self.channels = framing.channels or images.channels
            mean, std = mean or (0.0,), std or (1.0,)
            config = {}
            self.frame = "as they are"
        if size is not None:  # for every model alike, so that they see the same
            config, self.frame = {}, "the largest part of that shape, bicubic"
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in {1, self.channels}:
                raise ValueError(
                    f"`{name}` must be one number or one for each of {self.channels} channels, got {len(values)}. Give "
                    f"--{name} for these channels, or --channels {len(values)}."
                )
        self.normalisation = f"mean {list(mean)}, std {list(std)}"
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self._size = size
        if config:
            from timm.data import create_transform

            self._timm = create_transform(**config, is_training=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, int, int]:
        """An image (C, H, W), its label, its number."""
        image = self.images.read(number)
        mode = "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if self._timm is not None:
            return self._timm(image), self.images.labels[number], number
        if self._size is not None:
            from PIL import ImageOps
            from PIL.Image import Resampling as Filter

            image = ImageOps.fit(image, self._size[::-1], Filter.BICUBIC)
        return (_tensor(image) - self._mean) / self._std, self.images.labels[number], number


_CUT = ("interpolation", "crop_pct", "crop_mode")


def _config(model: Any) -> dict[str, Any]:
    try:
        from timm.data import resolve_model_data_config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A model's own input size and normalisation (`pretrained_cfg`) need timm: pip install "
            "'lie_metric[examples]'."
        ) from error
    return dict(resolve_model_data_config(model))


def _tensor(image: Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def class_numbers(classes: Sequence[str], outputs: int, model: Any) -> list[int] | None:
    """The output of a model that stands for each class of a set.

    Outputs as many as classes are taken in order. WordNet names of classes (n01440764) are looked up in the ImageNet
    that a timm model was trained on.

    Args:
        classes: Names of the set's classes.
        outputs: Number of the model's outputs.
        model: The model.

    Returns:
        One number for each class, or None if classes and outputs cannot be matched.
    """
    if outputs == len(classes):
        return list(range(outputs))
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return None
    try:
        from timm.data import ImageNetInfo, infer_imagenet_subset
    except ModuleNotFoundError:
        return None
    subset = infer_imagenet_subset(model)
    numbers = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
    return [numbers[name] for name in classes] if all(name in numbers for name in classes) else None


def load_data(name: str, count: int, seed: int, root: Path | str = "data") -> ImageSet:
    """The images of a study, all of them read once, so that one that cannot be is found before any model runs.

    Args:
        name: ``"digits"`` (a fifth of scikit-learn's, at 32 pixels), ``"synthetic"`` (shapes, 64 pixels),
            ``"folder:PATH"`` (one folder of images for each class), or a set of torchvision, e.g. ``"cifar10"``.
        count: How many images, drawn by the seed; fewer if there are not as many.
        seed: Seed of the draw.
        root: Where torchvision's sets are, or are downloaded to.

    Returns:
        The images.

    Raises:
        ValueError: If the name is unknown.
        StudyError: If the images cannot be had.
    """
    images: Sequence[Image | Path]
    if name.startswith("folder:"):
        images, labels, classes = _folder(Path(name.removeprefix("folder:")))
    elif name == "digits":
        images, labels = digits(train=False)
        classes = tuple("0123456789")
    elif name == "synthetic":
        images, labels = _synthetic(max(count, 64))
        classes = ("circle", "square", "triangle", "cross")
    elif name in _TORCHVISION:
        images, labels, classes = _torchvision(name, Path(root), count, seed)
    else:
        raise ValueError(
            f"`data` must be digits, synthetic, folder:PATH or one of {', '.join(_TORCHVISION)}, got {name!r}."
        )
    chosen = _draw(len(images), count, seed)
    digest, modes = hashlib.sha256(), set()
    for number in chosen:
        item = images[number]
        picture = _open(item) if isinstance(item, Path) else item
        modes.add(picture.mode)
        digest.update(item.read_bytes() if isinstance(item, Path) else picture.tobytes())
        digest.update(f"{picture.size} {labels[number]};".encode())
    digest.update("/".join(classes).encode())
    return ImageSet(
        name.partition(":")[0],
        [images[number] for number in chosen],
        [labels[number] for number in chosen],
        classes,
        digest.hexdigest()[:16],
        1 if modes <= {"L"} else 3,
    )


def _draw(total: int, count: int, seed: int) -> list[int]:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return order[:count].tolist()


def _open(path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image if image.mode in {"RGB", "L"} else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise StudyError(
            f"`data` must hold readable images, got {error} at {path}. Repair or remove the file."
        ) from error


def _folder(path: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    if not path.is_dir():
        raise StudyError(f"`data` must be a folder that exists, got {path}.")
    classes = tuple(sorted(one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")))
    if not classes:
        raise StudyError(f"`data` must hold one folder of images for each class, got none in {path}.")
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(one for one in (path / name).rglob("*") if one.suffix.lower() in _SUFFIXES)
        if not files:
            raise StudyError(
                f"`data` must hold images in every class folder, got none in {path / name}. Add some, or remove it."
            )
        images += files
        labels += [label] * len(files)
    return images, labels, classes


def _torchvision(name: str, root: Path, count: int, seed: int) -> tuple[list[Image], list[int], tuple[str, ...]]:
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The set {name!r} needs torchvision: pip install 'lie_metric[examples]'. Without it, use folder:PATH."
        ) from error
    kind = getattr(datasets, _TORCHVISION[name])
    accepted = inspect.signature(kind).parameters
    options = {"train": False} if "train" in accepted else {"split": "test"} if "split" in accepted else {}
    try:
        found = kind(root, **options, download=True)
    except (OSError, RuntimeError) as error:
        raise StudyError(
            f"`data` must be a set that is in `data_root` or can be downloaded, got {name!r}: {error}. Without a "
            "network, use digits, synthetic or folder:PATH."
        ) from error
    pairs = [found[number] for number in _draw(len(found), count, seed)]
    labels = [int(label) for _, label in pairs]
    classes = getattr(found, "classes", None) or range(max(labels) + 1)
    return [image for image, _ in pairs], labels, tuple(str(one) for one in classes)


def digits(*, train: bool) -> tuple[list[Image], list[int]]:
    """scikit-learn's 1797 handwritten digits, 8 pixels enlarged to 24 in a frame of 32, split as by class.

    Args:
        train: The four fifths for training, or the fifth that a study is of.

    Returns:
        Images of one channel and their labels.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The digits need scikit-learn: pip install 'lie_metric[examples]'.") from error
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    pixels = torch.nn.functional.interpolate(pixels, size=24, mode="bicubic", align_corners=False).clamp(0, 1)
    pixels = torch.nn.functional.pad(pixels, (4, 4, 4, 4))[:, 0]
    parts = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=found.target, random_state=0)
    part = parts[0 if train else 1]
    return [_image(pixels[i].numpy()) for i in part], [int(found.target[i]) for i in part]


def _synthetic(count: int) -> tuple[list[Image], list[int]]:
    """Smooth-edged shapes of random place, size, orientation and colours, 64 pixels."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 32 - 1 + 1 / 64
    images, labels = [], []
    for number in range(count):
        angle, size = random.uniform(0, 2 * math.pi), random.uniform(0.3, 0.6)
        a, b = x - random.uniform(-0.3, 0.3), y - random.uniform(-0.3, 0.3)
        a, b = a * math.cos(angle) + b * math.sin(angle), b * math.cos(angle) - a * math.sin(angle)
        distance = (
            np.hypot(a, b) - size,
            np.maximum(abs(a), abs(b)) - size * 0.8,
            np.maximum(b, abs(a) * 0.87 - b / 2) - size * 0.6,
            np.maximum(np.minimum(abs(a), abs(b)) - size * 0.3, np.maximum(abs(a), abs(b)) - size),
        )[number % 4]
        inside = 1 / (1 + np.exp(np.clip(distance * 40, -50, 50)))[..., None]
        back, front = random.uniform(0, 0.4, 3), random.uniform(0.6, 1, 3)
        images.append(_image(back + (front - back) * inside))
        labels.append(number % 4)
    return images, labels


def _image(values: np.ndarray) -> Image:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Images need Pillow: pip install 'lie_metric[examples]'.") from error
    return Image.fromarray((values * 255).round().astype(np.uint8))
