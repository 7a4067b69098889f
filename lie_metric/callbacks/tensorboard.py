"""What TensorBoard needs beyond scalars: one chart for each family of curves, and runs that compare in its HPARAMS tab.

Nothing here imports TensorBoard before a logger of that kind is at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["flat_hyperparameters", "write_hyperparameters", "write_layout"]


def write_layout(logger: Any, categories: Mapping[str, Mapping[str, tuple[str, Sequence[str]]]]) -> None:
    """Puts the curves of each family on one chart of the Custom Scalars tab.

    A writer keeps one layout, the last one written: that of every monitor is written together.

    Args:
        logger: A TensorBoardLogger, of either package; call this on the process of rank zero only.
        categories: By the heading of some charts their families: by the title of each chart the text of its tags before
            ``/<name>``, and the names, one curve each.
    """
    # Tags are regular expressions that match from the left: anchored, or "lee" would also gather "lee_se".
    layout: dict[str, dict[str, list[Any]]] = {}
    for category, families in categories.items():
        for title, (family, names) in families.items():
            curves = "|".join(map(re.escape, names))
            pattern = rf"^{re.escape(family)}/({curves})(/dataloader_idx_\d+)?$"
            layout.setdefault(category, {})[title] = ["Multiline", [pattern]]
    logger.experiment.add_custom_scalars(layout)


def write_hyperparameters(trainer: Trainer, logger: Any, settings: Mapping[str, Any], tags: Sequence[str]) -> None:
    """Declares the run to the HPARAMS tab, so that it shows the final values of the run's scalars.

    The hyperparameters are those saved by the module and the data module, and the given settings. By default the tab
    shows every scalar of the run. A logger with ``default_hp_metric=True`` is about to declare ``hp_metric`` as the
    only one; since the first declaration counts, the given tags are declared beside it.

    No scalar is written: a placeholder would be the first point of every curve.

    Args:
        trainer: The trainer, before it logs hyperparameters itself.
        logger: The logger; call this on the process of rank zero only.
        settings: Further hyperparameters.
        tags: Scalars to show beside ``hp_metric``.
    """
    try:
        from torch.utils.tensorboard.summary import hparams
    except ModuleNotFoundError:  # the logger runs on tensorboardX, which has no such summaries to write
        return
    saved: dict[str, Any] = dict(settings)
    for source in (getattr(trainer, "datamodule", None), trainer.lightning_module):
        saved |= flat_hyperparameters(getattr(source, "hparams_initial", None) or {})
    experiment, start, end = hparams(saved, dict.fromkeys([*tags, "hp_metric"], 0.0))
    # Lightning keeps the flag private; where it cannot be read, tags are declared, which is right in both cases.
    declared = [experiment] if getattr(logger, "_default_hp_metric", True) else []
    for summary in (*declared, start, end):
        logger.experiment._get_file_writer().add_summary(summary)


def flat_hyperparameters(parameters: Mapping[Any, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested hyperparameters as one level with ``/`` in the keys; what is neither number nor text as its text.

    Args:
        parameters: The hyperparameters.
        prefix: What keys begin with.

    Returns:
        One level of numbers and texts.
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= flat_hyperparameters(value, f"{prefix}{key}/")
        elif not str(key).startswith("_"):  # e.g. the "_class_path" that LightningCLI keeps for itself
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
