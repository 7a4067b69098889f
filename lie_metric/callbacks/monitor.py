"""What the monitors share: refusals, the rehearsal on two images, and how failures are told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lie_metric.binding import bind
from lie_metric.callbacks.silence import silence
from lie_metric.callbacks.trainers import first_batch, is_fitting, outermost, refuse_strategy, validation_loaders
from lie_metric.callbacks.weights import tensors_of
from lie_metric.calling import call_of, called_name, part_of
from lie_metric.curves.batches import describe, inputs_of, refusal
from lie_metric.curves.failures import report, validate_on_error
from lie_metric.curves.keys import validate_prefix
from lie_metric.measured import function_of, validate_inputs
from lie_metric.options import Layout, Options
from lie_metric.resampling import working_precision
from lie_metric.running import Unsharded, gather, is_sharded, isolated
from lie_metric.warning import warn

__all__ = ["Function", "Monitor"]

Function = Callable[[Any, Any], Any] | str

_MISUSE = (TypeError, ValueError)
_OPTIONS = ("output_representation", "input_representation", "output", "function", "images")


class Monitor(Callback):
    """A callback that measures the module on validation images, and shows a misuse before training begins.

    In the sanity check, or without one before the first training step, two validation images go through the whole
    measurement: the *rehearsal*. A TypeError or ValueError is a misuse and is raised whatever ``on_error`` is; any
    other failure is one of the model and obeys ``on_error``.

    Args:
        images: Where the images are in a batch.
        function: What is called of the module.
        input_representation: How the input carries the action.
        on_error: What to do when the model cannot be measured.
        prefix: First word of the keys.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.
    """

    failure: str
    """What is said of a model that cannot be measured."""

    def __init__(
        self,
        *,
        images: Callable[[Any], Any] | int | str | None,
        function: Function | None,
        input_representation: Layout | None,
        on_error: Literal["warn", "raise"],
        prefix: str,
    ) -> None:
        super().__init__()
        validate_on_error(on_error)
        if images is not None and not callable(images) and not isinstance(images, (str, int)):
            raise TypeError(
                f"`images` must be a callable, a key or an index, got {images!r}. Pass e.g. `lambda batch: batch[0]`."
            )
        if function is not None and not callable(function) and not isinstance(function, str):
            raise TypeError(
                f"`function` must be the name of a method or a callable, got {function!r}. Pass e.g. "
                "`lambda module, images: module.encode(images)`."
            )
        validate_prefix(prefix)
        self.images, self.function, self.on_error, self.prefix = images, function, on_error, prefix
        self._input_representation = input_representation
        self._rehearsed = self._announced = self._tried = False
        self._failures: list[Exception] = []
        self._whole: Unsharded | Exception | None = None

    def words(self) -> set[str]:
        """The texts before the slash of the keys."""
        raise NotImplementedError

    def rehearse(self, trainer: Trainer, pl_module: LightningModule, images: Tensor, dataloader_idx: int) -> str:
        """Measures images as an epoch would, and forgets the result.

        Args:
            trainer: The trainer.
            pl_module: The module.
            images: One image or more.
            dataloader_idx: Number of the loader that they are from.

        Returns:
            What is measured, as a line for the user.
        """
        raise NotImplementedError

    @property
    @override
    def state_key(self) -> str:
        """Tells monitors of one Trainer apart in checkpoints."""
        return self._generate_state_key(prefix=self.prefix, keys=sorted(self.words()))

    @property
    def _name(self) -> str:
        """Class and, where several may be in use, prefix."""
        return type(self).__name__

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses trainers under which nothing could be measured.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: The stage about to begin.

        Raises:
            MisconfigurationException: If the strategy is DeepSpeed's, or another monitor writes the same keys.
        """
        self._rehearsed = self._announced = self._tried = False
        self._failures, self._whole = [], None
        refuse_strategy(self, trainer, stage)
        if stage == "test":
            warn(
                f"`{self._name}` measures validation images, nothing in `trainer.test()`. For other images call "
                "`trainer.validate(model, loader)`."
            )
        for other in getattr(trainer, "callbacks", ()):
            shared = self.words() & other.words() if isinstance(other, Monitor) and other is not self else set()
            if shared:
                raise MisconfigurationException(
                    f"`{self._name}` must have keys of its own, got a second monitor, `{other._name}`, that "
                    f"writes {sorted(shared)[0]!r} too. Pass `{self._name}(prefix=...)` to one of them."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearses, if there was no sanity check.

        The images are the first of the validation set, where it can be indexed by numbers and its loader is made by
        now; otherwise the first validation batch shows a misuse.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if self._rehearsed:
            return
        if trainer.num_val_batches and not any(map(is_lazy, tensors_of(pl_module).values())):
            self._gather(trainer, pl_module)
            for index, loader in enumerate(validation_loaders(trainer)):
                batch = None if loader is None else first_batch(trainer, pl_module, index)
                if batch is not None:
                    self._try(trainer, pl_module, batch, index)
            self._whole = None
        self._settle(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Gathers weights that are dealt out over processes, once an epoch: here all of them come by.

        Args:
            trainer: The trainer.
            pl_module: The module.
            batch: The batch; not used.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        if batch_idx == 0 and self._whole is None and (not self._rehearsed or self.measures_now(trainer)):
            self._gather(trainer, pl_module)

    def measures_now(self, trainer: Trainer) -> bool:
        """Whether something is measured in this validation epoch.

        Args:
            trainer: The trainer.

        Returns:
            Whether it is.
        """
        raise NotImplementedError

    def _gather(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the whole weights of a module that is sharded, or why they cannot be had; monitors share them."""
        if not is_sharded(outermost(trainer, pl_module).modules()):
            return
        others = (other._whole for other in trainer.callbacks if isinstance(other, Monitor))  # type: ignore[attr-defined]
        self._whole = next((whole for whole in others if whole is not None), None)
        if self._whole is None:
            try:
                self._whole = gather(outermost(trainer, pl_module), pl_module.device)
            except Exception as error:  # of all processes alike
                self._whole = error

    @contextmanager
    def measuring(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """The module as one that may be called at will: none of its logs and metrics take notice, and it is whole.

        Args:
            trainer: The trainer.
            pl_module: The module.

        Yields:
            Nothing.

        Raises:
            Exception: Why its whole weights could not be had.
        """
        if isinstance(self._whole, Exception):
            raise self._whole
        with silence(trainer, pl_module), nullcontext() if self._whole is None else self._whole.standing():
            yield

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Rehearses on the first batch of a run.

        Args:
            trainer: The trainer.
            pl_module: The module.
            outputs: What ``validation_step`` returned; not used.
            batch: The batch, on the module's device.
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.
        """
        if not self._rehearsed and batch_idx == 0:
            self._try(trainer, pl_module, batch, dataloader_idx)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells all processes how the rehearsal went.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        if not self._rehearsed:
            self._settle(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Frees gathered weights.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """
        self._whole = None

    def _try(self, trainer: Trainer, pl_module: LightningModule, batch: Any, dataloader_idx: int) -> None:
        self._tried = True
        try:
            with self.measuring(trainer, pl_module):
                line = self._line(trainer, pl_module, batch, dataloader_idx)
        except Exception as error:
            # The other processes learn of it when all meet: raising here would leave them waiting.
            self._failures.append(error)
            if trainer.world_size == 1:
                self._settle(trainer, pl_module)
        else:
            if not self._announced and trainer.is_global_zero:
                announce(f"`{self._name}` measures {line}.")
            self._announced = True

    def _line(self, trainer: Trainer, pl_module: LightningModule, batch: Any, dataloader_idx: int) -> str:
        images = inputs_of(batch, self.images, self._input_representation, self._name)
        if isinstance(self._input_representation, Mapping):
            self._call(pl_module, images)
            return self.rehearse(trainer, pl_module, images, dataloader_idx)
        if not len(images):
            raise ValueError(f"The first batch must have images, got {describe(images)} from {describe(batch)}.")
        try:
            # The images alone; whether the module can be called with them is seen below.
            validate_inputs(lambda x: x, images, self._input_representation)
        except _MISUSE as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            reason = refusal(batch, images, self.images, self._input_representation, self._name, error)
            raise kind(self._addressed(reason)) from error
        # Some models take batches of certain sizes only.
        few = images[:2]
        try:
            self._call(pl_module, few)
        except Exception:
            few = images
            self._call(pl_module, few)
        return self.rehearse(trainer, pl_module, few, dataloader_idx)

    def _call(self, pl_module: LightningModule, images: Any) -> None:
        """Runs what is measured once, so that its own failures are told from those of measuring it."""
        name = self.function_name(pl_module)
        try:
            if isinstance(self._input_representation, Mapping):
                given = Options(function=self.function, input_representation=self._input_representation)
                bound = bind(pl_module, images, given)
                moving, function = bound.inputs, bound.function
            else:
                moving, function = images, self.function
            call_of(pl_module, function)
        except (*_MISUSE, KeyError) as error:
            raise self.explained(error, name) from error
        try:
            with torch.no_grad(), isolated(pl_module):
                function_of(pl_module, _ran, function)(working_precision(moving.clone()))
        except Exception as error:
            kind = next((kind for kind in _MISUSE if isinstance(error, kind)), RuntimeError)
            # What a function raises that is given something else than it expects, or that is not there.
            kind = ValueError if isinstance(error, (LookupError, AttributeError, NotImplementedError)) else kind
            text = str(error).strip().removesuffix(".")
            images_too = (
                ""
                if isinstance(error, NotImplementedError)
                else (f"; if these are not the inputs, `{self._name}(inputs=lambda batch: batch[1])`, say")
                if isinstance(self._input_representation, Mapping)
                else (f"; if these are not the images, `{self._name}(images=lambda batch: batch[1])`, say")
            )
            raise kind(
                f"`{self._name}` measures {name}(images), which fails on {describe(images)} with "
                f"{type(error).__name__}{text and f': {text}'}. To measure another function pass its name or "
                f"`{self._name}(function=lambda module, images: {part_of(pl_module)}(images))`{images_too}."
            ) from error

    def function_name(self, pl_module: LightningModule) -> str:
        """What is measured of a module, for messages.

        Args:
            pl_module: The module.

        Returns:
            Its name.
        """
        return called_name(pl_module, self.function or "forward")

    def explained(self, error: Exception, whose: str) -> Exception:
        """A misuse with the argument of the monitor that remedies it; any other failure as it is.

        Args:
            error: The failure.
            whose: What was measured.

        Returns:
            What to raise.
        """
        kind = next((kind for kind in _MISUSE if isinstance(error, kind)), None)
        if kind is None:
            return error
        text = str(error)
        told = self._addressed(text)
        named = next((name for name in _OPTIONS if f"`{name}" in text), None)
        remedy = f" Here that is `{self._name}({named}=...)`." if named and told == text else ""
        return kind(f"`{self._name}` cannot measure {whose}: {told}{remedy}")

    def _addressed(self, text: str) -> str:
        """A text with the options that it names as arguments of the monitor."""
        return re.sub(rf"`(({'|'.join(_OPTIONS)})=[^`]*)`", rf"`{self._name}(\1)`", text)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All processes agree on the rehearsal's outcome, and raise or warn together."""
        failures, self._failures = self._failures, []
        misuse = next((error for error in failures if isinstance(error, _MISUSE)), None)
        flags = torch.tensor([not self._tried, bool(failures), misuse is not None], device=pl_module.device).float()
        untried, failed, misused = trainer.strategy.reduce(flags, reduce_op="sum").tolist()
        self._rehearsed = not untried
        if misused:
            if misuse is None:
                raise ValueError(f"`{self._name}` cannot measure the module, as another process found.")
            raise misuse
        if failed:
            self.report(self.failure, failures[0] if failures else None)

    def report(self, what: str, error: Exception | None) -> None:
        """Tells that something could not be measured, as ``on_error`` says.

        Args:
            what: That something could not be, as a beginning of a sentence.
            error: Why; None if it was on another process.

        Raises:
            RuntimeError: If ``on_error`` is ``"raise"``.
        """
        report(what, error, self.on_error)

    def skips(self, trainer: Trainer, every_n_epochs: int) -> bool:
        """Whether nothing is measured in this validation epoch.

        Args:
            trainer: The trainer.
            every_n_epochs: Which epochs of training are measured.

        Returns:
            Whether it is skipped.
        """
        if trainer.sanity_checking:
            return True
        if not is_fitting(trainer) or getattr(trainer, "fast_dev_run", False):
            return False
        return (trainer.current_epoch + 1) % every_n_epochs != 0


def _ran(returned: Any) -> Tensor:
    """That something was returned, whatever it is."""
    return torch.ones(1)


def announce(line: str) -> None:
    """Tells the user what is measured, once a run; the Trainer's own lines go the same way.

    Args:
        line: What to tell.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    rank_zero_info(line)
