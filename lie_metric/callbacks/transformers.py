"""Equivariance curves under ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from lie_metric.recorder import Recorder

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ModuleNotFoundError(
        "`lie_metric.callbacks.transformers` must have the package transformers, which is not installed. Run `pip "
        "install transformers`, or call `lie_metric.Recorder.measure` in a loop of your own."
    ) from error

__all__ = ["watch"]


class _Watching(TrainerCallback):
    def __init__(self, trainer: Any, recorder: Recorder) -> None:
        self.trainer, self.recorder = trainer, recorder
        self._measured: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The baseline; none where training is resumed."""
        self._measured = -1
        if state.global_step == 0:
            self._measure(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on weights may be set without a step."""
        self._measured = None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """A point of the curves; one, where several sets are evaluated after one step."""
        if self._measured != state.global_step:
            self._measure(state, model)

    def _measure(self, state: Any, model: Any) -> None:
        if self._measured is not None:
            self._measured = state.global_step
        values = self.recorder.measure(model, step=state.global_step, epoch=float(state.epoch or 0.0))
        self.trainer.log(dict(values))


def watch(trainer: Any, recorder: Recorder) -> None:
    """Measures the model of a ``transformers.Trainer`` before training and after each evaluation.

    The values are logged by the trainer: they are in ``trainer.state.log_history``, and go where it reports to,
    TensorBoard or W&B. The recorder keeps them too, and writes its file. Whatever precision the trainer uses, they are
    those of the model in float32. Where several sets are evaluated after one step, the model is measured once.

    Under several processes the trainer's own loaders give each process a part: make the recorder of one that does not,
    ``lm.Recorder.of_loader(DataLoader(eval_dataset, 64, collate_fn=trainer.data_collator))``.

    Args:
        trainer: The trainer.
        recorder: What is measured.

    Raises:
        TypeError: If the one is no trainer or the other no recorder.

    Example:
        >>> import lie_metric as lm
        >>> from lie_metric.callbacks.transformers import watch  # doctest: +SKIP
        >>> watch(trainer, lm.Recorder.of_loader(trainer.get_eval_dataloader()))  # doctest: +SKIP
    """
    if not callable(getattr(trainer, "add_callback", None)) or not callable(getattr(trainer, "log", None)):
        raise TypeError(f"`trainer` must be a `transformers.Trainer`, got {type(trainer).__name__}.")
    if not isinstance(recorder, Recorder):
        raise TypeError(
            f"`recorder` must be a `lie_metric.Recorder`, got {recorder!r}. Pass e.g. `lie_metric.Recorder(images)`."
        )
    trainer.add_callback(_Watching(trainer, recorder))
