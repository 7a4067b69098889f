"""What is promised of the package as a whole."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import lie_metric as lm

PACKAGE = Path(lm.__file__).parent
ROOMS = (
    "version", "warning", "randomness", "algebra", "cube", "filters", "holders", "resampling", "lattice", "motion",
    "warping", "running", "jacobian", "transforms", "representations", "options", "calling", "measured", "orbits",
    "binding", "lie", "functional", "testing", "records", "tables", "figures", "attribution", "layerwise", "metrics",
    "compare", "run_files", "runs", "curves", "recorder", "callbacks", "study",
)  # fmt: skip
"""The house from its ground up: modules and folders of the package, each of which imports only those before it."""

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


def test_importing_differentiates_nothing():
    """Where there are accelerators, threads of autograd that have run forbid processes that are forked later."""
    code = """
import torch, lightning.pytorch, torchmetrics
def started(*args, **kwargs):
    raise SystemExit("autograd has run")
torch.autograd.grad = torch.autograd.backward = torch.Tensor.backward = started
import lie_metric
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


def modules():
    """The modules of the package by name, with their files."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path):
    """What a file imports from the package, wherever it does: pairs of a module and a name, or None for all of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((one.name, None) for one in node.names if one.name.split(".")[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import says from where, got a relative one."
            if node.module.split(".")[0] == PACKAGE.name:
                yield from ((node.module, one.name) for one in node.names)


def dependencies():
    """For each module those that it imports."""
    known = modules()
    return {
        name: {f"{module}.{what}" if f"{module}.{what}" in known else module for module, what in imported(path)}
        for name, path in known.items()
    }


def test_private_names_stay_in_their_files():
    taken = [
        f"{path.relative_to(PACKAGE)} imports {what} from {module}"
        for path in modules().values()
        for module, what in imported(path)
        if what is not None and what.startswith("_") and not what.endswith("__")
    ]
    assert not taken, "give these names without underscores, in `__all__`:\n" + "\n".join(taken)


def test_imports_run_one_way():
    """From the top of the house to its ground, and among the modules of one room without a circle."""
    place = {room: number for number, room in enumerate(ROOMS)}
    against = []
    for name, wanted in dependencies().items():
        if name == PACKAGE.name:
            continue
        room = name.split(".")[1]
        assert room in place, f"{room} is a new room: give it a place in `ROOMS`, above all that it imports."
        assert PACKAGE.name not in wanted, f"{name} imports from the top of the package: import from the module itself."
        below = {other.split(".")[1] for other in wanted} - {room}
        against += [f"{name} imports {other}" for other in below if place.get(other, -1) > place[room]]
    assert not against, "\n".join(against)
    assert set(place) == {name.split(".")[1] for name in modules() if name != PACKAGE.name}
    TopologicalSorter(dependencies()).prepare()  # fails with a circle, if there is one
