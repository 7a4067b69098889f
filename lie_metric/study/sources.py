"""Callables from Python files and modules, and weights from checkpoints of which no code is run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lie_metric.options import Output

__all__ = ["Entry", "FromFile", "callable_from", "load_weights", "selection"]

_FILES: dict[Path, ModuleType] = {}
"""Modules of files that were given, by path."""

_SIBLINGS: dict[str, Path] = {}
"""Modules that files of models imported from their own folders: another folder may have one of the same name."""


@dataclass(frozen=True)
class FromFile:
    """A callable of a Python file, in whose folder it looks for modules first, also for those it imports when called.

    Attributes:
        folder: The file's folder.
        function: The callable.
    """

    folder: Path
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """What the callable returns."""
        with _first(self.folder):
            return self.function(*args)


@dataclass(frozen=True)
class Entry:
    """Takes an entry or attribute of what a model returns.

    Attributes:
        name: Its key, its attribute's name, or its number.

    Example:
        >>> Entry("pred")({"pred": 1.5, "aux": 2.5}), Entry("1")((1.5, 2.5))
        (1.5, 2.5)
    """

    name: str

    def __call__(self, returned: Any) -> Any:
        """The entry.

        Raises:
            TypeError: If there is none.
        """
        number = int(self.name) if self.name.lstrip("-").isdecimal() else None
        if isinstance(returned, Mapping):
            for key in (self.name, number):
                if key in returned:
                    return returned[key]
            there = f"a mapping with keys {list(returned)[:8]}"
        elif number is not None and isinstance(returned, Sequence):
            if -len(returned) <= number < len(returned):
                return returned[number]
            there = f"a {type(returned).__name__} of length {len(returned)}"
        elif hasattr(returned, self.name):
            return getattr(returned, self.name)
        else:
            there = f"{type(returned).__name__} with {[name for name in dir(returned) if name[0] != '_'][:8]}"
        raise TypeError(f"`output` must name an entry of what the model returns, got {self.name!r} for {there}.")


def selection(output: str) -> Output:
    """Which tensor of what a model returns a text stands for.

    Args:
        output: ``"logits"``, ``"probabilities"``, a name or number, ``"module:callable"`` or ``"file.py:callable"``.

    Returns:
        What the measures take as ``output``.

    Raises:
        ValueError: If it stands for nothing.

    Example:
        >>> selection("logits"), selection("pred")
        ('logits', Entry(name='pred'))
    """
    if output == "logits":
        return "logits"
    if output == "probabilities":
        return "probabilities"
    if not isinstance(output, str) or not output:
        raise ValueError(
            f"`output` must be logits, probabilities, the name or number of an entry, or module:callable, got "
            f"{output!r}."
        )
    return callable_from(output, "output") if ":" in output else Entry(output)


def callable_from(source: str, argument: str = "models") -> Callable[..., Any]:
    """The callable that ``module:name`` or ``path/to/file.py:name`` stands for.

    A file is imported as if it were run: modules beside it are found, and it is known to :data:`sys.modules`, which
    dataclasses and pickles need. Files of one name in several folders do not disturb one another.

    Args:
        source: The text; the name may have dots in it.
        argument: What it was given for, for messages.

    Returns:
        The callable.

    Raises:
        ValueError: If there is no such thing, its module cannot be imported, or it cannot be called.

    Example:
        >>> callable_from("math:sqrt")(9)
        3.0
    """
    place, _, name = source.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).resolve()
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}")
            with _first(path.parent):
                found = operator.attrgetter(name)(_module(path))
        else:
            if os.getcwd() not in sys.path:  # a console script does not look there by itself
                sys.path.insert(0, os.getcwd())
            found = operator.attrgetter(name)(importlib.import_module(place))
    except Exception as error:  # whatever the module does when it is imported
        advice = ""
        if "relative import" in str(error):
            advice = " A file of a package is given as package.module:callable, from the folder that holds the package."
        raise ValueError(
            f"`{argument}` must name a callable as module:callable or file.py:callable, got {source!r}: "
            f"{type(error).__name__}: {str(error).rstrip('.')}.{advice}"
        ) from error
    if not callable(found):
        raise ValueError(f"`{argument}` must name a callable, got {source!r}, which is a {type(found).__name__}.")
    return FromFile(path.parent, found) if place.endswith(".py") else found


def _module(path: Path) -> ModuleType:
    """The module of a file, imported once."""
    there = _FILES.get(path) or sys.modules.get(path.stem)
    if there is not None and getattr(there, "__file__", None) == str(path):
        return there
    # Its plain name, so that modules beside it may import it, unless something else has that name.
    own = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    name = path.stem if _free(path.stem, path) else own
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _FILES[path] = module
    return module


def _free(name: str, path: Path) -> bool:
    """Whether nothing but the file at the path is imported by a name."""
    if not name.isidentifier() or name in sys.modules:
        return False
    sys.path.remove(str(path.parent))
    try:
        found = importlib.util.find_spec(name)
    finally:
        sys.path.insert(0, str(path.parent))
    return found is None or found.origin == str(path)


@contextmanager
def _first(folder: Path) -> Iterator[None]:
    """Looks for modules in a folder first, and forgets those of these names that files elsewhere had beside them."""
    for name, home in list(_SIBLINGS.items()):
        if home != folder and ((folder / f"{name}.py").exists() or (folder / name).is_dir()):
            # Whoever imported the other one keeps it.
            for known in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
                del sys.modules[known]
            del _SIBLINGS[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    # A file that was written a moment ago may be missing in what the finders remember of the folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if "." not in name and origin is not None and folder in Path(origin).parents:
                _SIBLINGS[name] = folder


class _Inert:
    """Stands for every class and function that a checkpoint names: it takes what is given to it and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)


def _dict(*_: Any) -> dict[Any, Any]:
    """Stands for a ``defaultdict``: entries can be put into a dict alone."""
    return {}


def load_weights(model: Any, path: Path) -> str:
    """Loads weights, bare or below ``state_dict`` or ``model``.

    Nothing of a checkpoint is imported or run: what it names beside tensors, as hyperparameters that are an Enum, a
    Path or a class of one's own, is replaced by an object that does nothing.

    Args:
        model: The model.
        path: The checkpoint.

    Returns:
        The checkpoint's ``tag``, or its name.

    Raises:
        ValueError: If the file holds no weights.
        RuntimeError: If the weights are not those of the model.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: Any = load_file(path)
    else:
        found = _unpickled(path)
    if not isinstance(found, dict):
        raise ValueError(
            f"a checkpoint must hold a dict of weights, got a pickled {_told(found)} in {path}. Save "
            "`torch.save(model.state_dict(), path)` instead: classes that a checkpoint names are not run."
        )
    told = found.get("tag")
    tag = told if isinstance(told, (str, int, float)) else path.stem
    weights = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), found)
    wanted = set(model.state_dict())
    # Lightning and DistributedDataParallel put the model below an attribute.
    for prefix in ("", "model.", "module."):
        stripped = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if wanted <= set(stripped):
            break
    kept = {key: value for key, value in stripped.items() if key != "tag"}
    foreign = [key for key, value in kept.items() if isinstance(value, _Inert)]
    if foreign:
        raise ValueError(
            f"weights must be plain tensors, got other objects for {foreign[:3]} in {path}. Save them with "
            "`torch.save({name: weight.detach().clone() for name, weight in model.state_dict().items()}, path)`."
        )
    model.load_state_dict(kept)
    return str(tag)


def _told(found: object) -> str:
    return "model or other object" if isinstance(found, _Inert) else type(found).__name__


def _unpickled(path: Path) -> Any:
    try:
        # Names, not objects: nothing is imported to be allowed.
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # no archive: of torch before 1.6, or no checkpoint at all
        named = []
    allowed: list[Any] = [(_dict if name == "collections.defaultdict" else _Inert, name) for name in named]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Torch's own words advise to load with weights_only=False, which runs whatever code the file holds.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith(("Weights only", "Please file", "Check the", "("))]
        why = told[0].partition(". ")[0] if told else "no reason given"
        raise ValueError(
            f"a checkpoint must hold weights that can be read without running code, got {path} ({type(error).__name__}:"
            f" {why[:200]}). Save `torch.save(model.state_dict(), path)`, or a safetensors file."
        ) from error
