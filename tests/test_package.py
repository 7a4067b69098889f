"""What is promised of the package as a whole."""

import json
import subprocess
import sys
from pathlib import Path

import lie_metric as lm

BLOCKED = ("timm", "torchvision", "tensorboard", "matplotlib", "sklearn", "pandas")


def test_core_works_without_extras():
    # torchmetrics and Lightning look at what is installed before they import it: they come first.
    code = f"""
import sys, torch, torchmetrics, lightning.pytorch
for name in {BLOCKED!r}:
    for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
        del sys.modules[loaded]
    sys.modules[name] = None
import lie_metric as lm
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
metric = lm.LocalEquivarianceError()
metric.update(model, torch.rand(2, 3, 8, 8))
assert len(metric.compute()) == 9
lm.EquivarianceMonitor()
try:
    lm.figures.comparison({{"a": {{"b": {{"rotation": lm.figures.Curve([0], [1], [0])}}}}}}, title="", caption="")
except ModuleNotFoundError as error:
    assert "lie_metric[examples]" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_public_names():
    wanted = {
        "PAPER", "EquivarianceMonitor", "Generator", "LocalEquivarianceError", "Resampling", "functional", "generators",
        "lie_derivative", "representations", "transforms",
    }  # fmt: skip
    assert wanted <= set(lm.__all__)
    assert all(hasattr(lm, name) for name in lm.__all__)
    assert lm.Resampling() == lm.Resampling(interpolation="bspline", padding="reflection", align_corners=False)
    assert lm.Resampling("bilinear", "reflection", align_corners=True) == lm.PAPER


def test_types_are_announced():
    assert (Path(lm.__file__).parent / "py.typed").exists()


def test_names_of_the_modules_point_somewhere():
    assert len(set(lm.__all__)) == len(lm.__all__)
    for module in (lm.functional, lm.transforms, lm.representations):
        assert module.__all__
        assert all(callable(getattr(module, name)) for name in module.__all__)


def test_reference_values_are_whole():
    cases = json.loads((Path(__file__).parent / "reference_values.json").read_text())["end_to_end"]
    assert {case["model"] for case in cases} == {"resnet18", "vit_tiny_patch16_224"}
    for case in cases:
        for output in ("probabilities", "logits"):
            assert {"rotation", "scale", "translation_x", "translation_y"} <= set(case[output])
