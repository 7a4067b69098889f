"""Which models a study is of: names, wildcards and families of timm, hub names, models of one's own, checkpoints."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lie_metric.study.sources import callable_from, load_weights

__all__ = ["ModelSpec", "labelled", "resolve_models"]


@dataclass(frozen=True)
class ModelSpec:
    """One model of a study, not built yet.

    Attributes:
        name: The name in the tables.
        source: A timm or ``hf-hub:`` name, or a callable that returns a model.
        checkpoint: Weights to load.
        pretrained: Whether a timm model comes with its pretrained weights.
        family: Its family; by default what :meth:`build` finds.
        tag: Its tag; by default what :meth:`build` finds.
    """

    name: str
    source: str | Callable[[], Any]
    checkpoint: Path | None = None
    pretrained: bool = True
    family: str | None = None
    tag: str | None = None

    def build(self, classes: int) -> tuple[Any, str, str]:
        """Makes the model.

        Args:
            classes: Number of classes of a timm model whose weights come from a checkpoint.

        Returns:
            The model in evaluation mode; its family: timm's module, the model's attribute ``family``, or its type; its
            tag: which weights these are.

        Raises:
            TypeError: If a callable returns something that cannot be called.
        """
        if isinstance(self.source, str):
            options = {"num_classes": classes} if self.checkpoint else {"pretrained": self.pretrained}
            model = _timm().create_model(self.source, **options)
        else:
            model = self.source()
            if not callable(model):
                raise TypeError(f"`{self.name}` must return a model, got {type(model).__name__}.")
        if self.checkpoint:
            tag = load_weights(model, self.checkpoint)
        elif isinstance(self.source, str):
            tag = str(_config(model).get("tag") or "pretrained") if self.pretrained else "random"
        else:
            tag = str(getattr(model, "tag", "own"))
        if isinstance(model, nn.Module):
            model.eval()
        return model, self.family or self._family(model), self.tag or tag

    def _family(self, model: Any) -> str:
        if callable(self.source):
            return str(getattr(model, "family", type(model).__name__))
        try:
            entry = _timm().models.model_entrypoint(str(_config(model).get("architecture") or self.source))
        except (KeyError, RuntimeError):
            return type(model).__module__.rpartition(".")[2]
        return entry.__module__.rpartition(".")[2]


def _config(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "pretrained_cfg", None) or {})


def _timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Models by timm's names need timm: pip install 'lie_metric[examples]'. Own models are given as "
            "`module:callable`."
        ) from error
    return timm


def labelled(names: Iterable[str], labels: Mapping[str, str], argument: str) -> dict[str, str]:
    """The family or tag of models by wildcards of their names.

    Args:
        names: The models' names.
        labels: Families or tags by wildcard; of several that match, the last.
        argument: What they were given for, for messages.

    Returns:
        Labels by name, of those that a wildcard matches.

    Raises:
        ValueError: If a wildcard matches no model.

    Example:
        >>> labelled(["cnn-1", "cnn-2", "vit"], {"cnn-*": "plain"}, "families")
        {'cnn-1': 'plain', 'cnn-2': 'plain'}
    """
    known = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for pattern, label in labels.items():
        # A name may have brackets in it, which are wildcards too.
        matched = [name for name in known if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, known, 3) or known[:3]
            raise ValueError(
                f"`{argument}` must match the name of a model, got {pattern!r}. Names are e.g. {', '.join(near)}."
            )
        found |= dict.fromkeys(matched, label)
    return found


def resolve_models(
    names: Sequence[str | ModelSpec],
    *,
    pretrained: bool = True,
    exclude: Sequence[str] = (),
    families: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> list[ModelSpec]:
    """The models that names stand for, each once, in order.

    Each name is one of

    - a timm name, with or without a pretraining tag, or a wildcard of either: ``resnet50``, ``resnet50.*``, ``vit_*``;
    - ``family:NAME``, every model of a module of timm, e.g. ``family:resnet``;
    - ``hf-hub:USER/MODEL``;
    - ``module:callable`` or ``path/to/file.py:callable``, which returns a model when called without arguments;
    - a timm name or a callable with ``@path/to/checkpoint``, e.g. ``resnet18@runs/best.ckpt``;
    - any of the single ones with a name of its own in front, e.g. ``mine=module:callable``;
    - a :class:`ModelSpec`, which stands for itself.

    Args:
        names: The names.
        pretrained: Whether timm models come with pretrained weights; wildcards and families then leave out models that
            have none.
        exclude: Wildcards of names that are left out.
        families: Families of models by wildcards of their names, instead of what the models say themselves.
        tags: Tags, likewise.

    Returns:
        The models, not built.

    Raises:
        ValueError: If a name stands for no model, or two models have the same name.
        ModuleNotFoundError: If timm is needed and not installed.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"`models` must be one name or more in a sequence, got {names!r}.")
    found: dict[str, ModelSpec] = {}
    for name in names:
        for spec in [name] if isinstance(name, ModelSpec) else _resolve(name, pretrained):
            if found.setdefault(spec.name, spec) != spec:
                raise ValueError(
                    f"`models` must have names of their own, got {spec.name!r} for two models. Write NAME=... for one."
                )
    chosen = [spec for spec in found.values() if not any(fnmatch.fnmatchcase(spec.name, one) for one in exclude)]
    if not chosen:
        raise ValueError(f"`exclude` must leave a model, got {list(exclude)!r}, which leaves none.")
    families = labelled([spec.name for spec in chosen], families or {}, "families")
    tags = labelled([spec.name for spec in chosen], tags or {}, "tags")
    return [
        replace(spec, family=families.get(spec.name, spec.family), tag=tags.get(spec.name, spec.tag)) for spec in chosen
    ]


def _resolve(name: str, pretrained: bool) -> list[ModelSpec]:
    # An equals sign behind a path belongs to the path: Lightning names checkpoints epoch=1-step=2.ckpt.
    named = re.fullmatch(r"([^@:/=]+)=(.+)", name)
    alias, rest = named.groups() if named else ("", name)
    if rest.startswith("hf-hub:"):
        return [ModelSpec(alias or rest, rest, None, pretrained)]
    if rest.startswith("family:") or any(sign in rest.partition("@")[0] for sign in "*?["):
        return [ModelSpec(one, one, None, pretrained) for one in _several(rest, pretrained)]
    source, _, weights = rest.partition("@")
    checkpoint = Path(weights) if weights else None
    if checkpoint and not checkpoint.is_file():
        raise ValueError(f"`models` must name a checkpoint that exists, got {name!r}: there is no file {checkpoint}.")
    if ":" in source:
        return [ModelSpec(alias or rest, callable_from(source), checkpoint, pretrained)]
    architecture = source.partition(".")[0]
    if not _timm().is_model(architecture):
        near = difflib.get_close_matches(architecture, _timm().list_models(), 3) or ["see timm.list_models()"]
        raise ValueError(
            f"`models` must be names, wildcards or families of timm, hf-hub:NAME or module:callable, got {name!r}, "
            f"which timm {_timm().__version__} does not have. Close to it: {', '.join(near)}."
        )
    tags = _timm().models.get_arch_pretrained_cfgs(architecture)
    if "." in source and source not in tags:
        raise ValueError(f"`models` must have a known tag, got {name!r}. Known: {', '.join(tags) or 'none'}.")
    return [ModelSpec(alias or rest, source, checkpoint, pretrained)]


def _several(pattern: str, pretrained: bool) -> list[str]:
    timm = _timm()
    if pattern.startswith("family:"):
        module = pattern.removeprefix("family:")
        if module not in timm.list_modules():
            near = difflib.get_close_matches(module, timm.list_modules(), 3) or timm.list_modules()[:3]
            raise ValueError(f"`models` must name a family of timm, got {pattern!r}. Close to it: {', '.join(near)}.")
        found = timm.list_models(module=module, pretrained=pretrained, include_tags=False)
    else:
        tagged = "." in pattern
        found = timm.list_models(pattern, pretrained=pretrained or tagged, include_tags=tagged)
    if not found:
        raise ValueError(f"`models` must match a model of timm, got {pattern!r}, which matches none. Quote wildcards.")
    return found
