"""Curves without a training library: a fixed set of inputs, measured whenever a training loop asks for it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lie_metric.binding import Generators, moved_parts, sample_count
from lie_metric.calling import called_name
from lie_metric.curves import Measurement, Program, append, chosen_samples, entries_of, strides_of
from lie_metric.curves.failures import OnError, report, validate_on_error
from lie_metric.curves.keys import validate_prefix
from lie_metric.functional.local_equivariance import LeeOutput, Measure
from lie_metric.jacobian import Method
from lie_metric.metrics.base import ModelMetric
from lie_metric.options import Function, Layout, Options, Output
from lie_metric.records import VERSION, plain
from lie_metric.resampling import Resampling
from lie_metric.running import (
    add_up,
    buffers_of_the_first,
    found_modules,
    is_sharded,
    process,
    shared_buffers,
    unsharded,
)

__all__ = ["Recorder"]


class Recorder:
    """Measures the same inputs again and again while a model trains: what `EquivarianceMonitor` does, in any loop.

    :meth:`measure` returns the values under the keys of :class:`~lie_metric.EquivarianceMonitor`, keeps them in
    :attr:`history`, gives them to ``log``, and adds a line to ``<folder>/<prefix>.jsonl``, from which
    :func:`lie_metric.read_runs`, :func:`lie_metric.compare` and ``lie-metric compare`` read. The model is measured in
    evaluation mode and left as it was found, random states included, so that training is not changed.

    Linearity and the stencil's own error are measured at step 0 and at the first, second, fourth, eighth, ... call
    after it, and companions of many images on a part of them, as the monitor does it. On the same weights and images
    its values are those of the monitor.

    *The model* may be compiled, wrapped for data parallelism, or prepared by accelerate, whatever its mixed precision:
    what is measured is the module inside, in float32, without autocast.

    *Several processes* (``torchrun``, accelerate): every process makes the recorder with the same inputs and calls
    :meth:`measure` at the same time; each measures its share, with the buffers of the first (running statistics of
    batch normalisation are each process's own in training), and all have the values of one process over all inputs.
    The process of rank 0 logs and writes. Inputs that differ between processes are an error of the first call. Of a
    model that is sharded pass the outermost module, with FSDP1 its wrapper: see :func:`lie_metric.unsharded`.

    Args:
        inputs: Images (B, C, H, W), or what else ``input_representation`` is of; a list of batches, where they are of
            several sizes or have named parts. They are copied, so that what a loop does to them later changes nothing.
        generators: As of :class:`~lie_metric.EquivarianceMonitor`, as are all arguments that are not described here.
        batch_size: How many images of one tensor are measured at a time; None for all.
        folder: Where the file is kept; None for none. That of the process of rank 0 counts, as does its ``log``.
        log: What takes the values, with "step" and "epoch" beside them: ``wandb.log``, ``print``, a writer's method.
        settings: What tells the run from others, such as its learning rate and its "seed"; kept in the file.
        measures: As of the monitor.
        displacement: As of the monitor.
        floor: As of the monitor.
        metrics: As of the monitor.
        output: As of the monitor.
        function: As of the monitor.
        lee_output: As of the monitor.
        input_representation: As of the monitor.
        output_representation: As of the monitor.
        resampling: As of the monitor.
        method: As of the monitor.
        chunk_size: As of the monitor.
        seed: As of the monitor.
        on_error: ``"raise"``, or ``"warn"``: NaN for what could not be measured, and training goes on. A TypeError or
            ValueError of the first call, which is a misuse, is raised whatever it is.
        prefix: First word of the keys and name of the file.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or there are no inputs.

    Attributes:
        history: For each call the values, with "step" and "epoch".
        keys: All keys of the values, in their order; a call lacks those of what it leaves out.
        described: What is measured, by which method and stencil, in a line; None before the first call.

    Example:
        >>> import torch, lie_metric as lm
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(1))
        >>> model.append(torch.nn.LazyLinear(3)); _ = model(torch.rand(1, 1, 8, 8))  # doctest: +ELLIPSIS
        Sequential(...
        >>> recorder = lm.Recorder(torch.rand(8, 1, 8, 8), "rotation", displacement=None, floor=False)
        >>> for step in range(2):
        ...     values = recorder.measure(model, step=step)  # and train
        >>> sorted(values)[0], len(recorder.history)
        ('equivariance/rotation', 2)
    """

    def __init__(
        self,
        inputs: Any,
        generators: Generators = ("translation", "rotation", "scale"),
        *,
        batch_size: int | None = None,
        folder: Path | str | None = None,
        log: Callable[[dict[str, float]], Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        measures: Sequence[Measure] = ("relative", "lee"),
        displacement: float | None = 2.0,
        floor: bool = True,
        metrics: Sequence[ModelMetric] | Mapping[str, ModelMetric] = (),
        output: Output = "logits",
        function: Function | None = None,
        lee_output: LeeOutput = "output",
        input_representation: Layout | None = None,
        output_representation: Layout | None = None,
        resampling: Resampling | None = None,
        method: Method = "auto",
        chunk_size: int | None = None,
        seed: int = 0,
        on_error: OnError = "warn",
        prefix: str = "equivariance",
    ) -> None:
        validate_on_error(on_error)
        validate_prefix(prefix)
        if log is not None and not callable(log):
            raise TypeError(f"`log` must take a mapping of values, got {log!r}. Pass e.g. `wandb.log`, or `print`.")
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
            raise TypeError(f"`batch_size` must be an integer or None, got {batch_size!r}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        options = Options(output, function, input_representation, output_representation, resampling, method, chunk_size)
        self.program = Program(
            generators,
            options,
            measures=measures,
            displacement=displacement,
            floor=floor,
            metrics=metrics,
            lee_output=lee_output,
            seed=seed,
            prefix=prefix,
        )
        self._layout = input_representation
        self._batches = _batches(inputs, input_representation, batch_size)
        self._count = sum(sample_count(batch, input_representation) for batch in self._batches)
        self.keys = self.program.keys.all()
        self.log, self.on_error, self.prefix = log, on_error, prefix
        self.file = None if folder is None else Path(folder) / f"{prefix}.jsonl"
        self._keeps = False
        self._settings = {name: plain(value) for name, value in dict(settings or {}).items()}
        self.history: list[dict[str, float]] = []
        self.described: str | None = None

    @classmethod
    def of_loader(
        cls,
        loader: Iterable[Any],
        generators: Generators = ("translation", "rotation", "scale"),
        *,
        num_images: int = 256,
        inputs: Callable[[Any], Any] | int | str | None = None,
        **options: Any,
    ) -> Recorder:
        """A recorder of the samples of a loader that the monitor would measure.

        These are one from each of ``num_images`` equal parts of the set, in the order of the loader, and the first ones
        where its length is not known. Of a plain ``DataLoader`` that does not shuffle only they are loaded; any other
        loader is gone through once, as far as it is needed. No random state is changed.

        Args:
            loader: Gives batches. Under several processes one that gives all of them the same, rather than to each its
                part.
            generators: As of the class.
            num_images: How many samples; of inputs with named parts as many batches as hold them.
            inputs: Where what the model takes is in a batch, as of :class:`~lie_metric.EquivarianceMonitor`.
            options: Further arguments of the class.

        Returns:
            The recorder.

        Raises:
            TypeError: If ``num_images`` is no integer.
            ValueError: If the loader is empty, or ``num_images`` is less than one.
        """
        if isinstance(num_images, bool) or not isinstance(num_images, int):
            raise TypeError(f"`num_images` must be an integer, got {num_images!r}. Pass e.g. 256.")
        if num_images < 1:
            raise ValueError(f"`num_images` must be at least 1, got {num_images}. Pass e.g. 256.")
        found = chosen_samples(loader, num_images, inputs, options.get("input_representation"), "Recorder")
        return cls(found, generators, **options)

    def measure(self, model: Any, step: int, epoch: float | None = None) -> dict[str, float]:
        """Measures a model as it is now.

        Args:
            model: The model, on one device or sharded.
            step: How many steps it was trained; at step 0 it is the baseline.
            epoch: How many epochs it was trained, which may be a fraction; the default is the number of earlier calls.

        Returns:
            The values by key, NaN for what could not be measured.

        Raises:
            RuntimeError: If nothing can be measured and ``on_error`` is ``"raise"``.
            TypeError: If the first call is a misuse.
            ValueError: If the first call is a misuse, or other processes hold other inputs.
        """
        with _shared(model) as whole:
            return self._measure(whole, step, len(self.history) if epoch is None else epoch)

    def _measure(self, model: Any, step: int, epoch: float) -> dict[str, float]:
        device, calls = _device_of(model), len(self.history)
        if not calls:
            self._agree(device)
            self._rehearse(model, device)
        # As the monitor counts: its baseline is none of the epochs that it measures.
        count = 1 + sum(entry["step"] > 0 for entry in self.history)
        measurement = self.program.measurement(device, self.program.seldom(count) if step > 0 else frozenset())
        measurement.strides = strides_of(self._count)
        for inputs, numbers in self._shares():
            measurement.update(model, _on(inputs, device), numbers)
        measurement.finish(model)
        values = self.program.keys.values([measurement], self._tell, device, add_up)
        found = {key: float(value) for key, value in values.items()}
        self._keep(measurement, step, epoch, device)
        entry = {**found, "step": step, "epoch": epoch}
        self.history.append(entry)
        if self.log is not None and process()[0] == 0:
            self.log(dict(entry))
        return found

    def _agree(self, device: torch.device) -> None:
        """Compares inputs over processes, of which each measures a share, and tells all whether there is a file."""
        rank, world = process()
        self._keeps = self.file is not None
        if world == 1:
            return
        told = torch.zeros(world, 3, dtype=torch.int64, device=device)
        told[rank] = torch.tensor([self._count, _checksum(self._batches, self._layout), int(self._keeps)])
        told = add_up(told)
        self._keeps = bool(told[0, 2])
        if (told[:, :2] != told[0, :2]).any():
            counts = told[:, 0].tolist()
            got = f"{counts} samples by rank" if len(set(counts)) > 1 else f"{counts[0]} on each that differ"
            raise ValueError(
                f"`inputs` must be the same samples on every process, got {got}. A loader that is dealt out, as by "
                "`accelerator.prepare` or a distributed sampler, gives each process a part of its own: pass one that "
                "is not, nor shuffles or augments, `Recorder.of_loader(DataLoader(dataset, batch_size))`."
            )

    def _shares(self) -> Iterator[tuple[Any, list[int]]]:
        """What this process measures: whole batches of named parts, and of images as many as any other.

        Yields:
            Inputs, and the numbers of their samples.
        """
        rank, world = process()
        # Companions take every so many-th image: these are dealt out first, so that each process has as many of them.
        strides = {1, *strides_of(self._count).values()}
        order = sorted(range(self._count), key=lambda number: -max(s for s in strides if number % s == 0))
        own = set(order[rank::world])
        start = 0
        for index, batch in enumerate(self._batches):
            count = sample_count(batch, self._layout)
            numbers = range(start, start + count)
            start += count
            if isinstance(self._layout, Mapping):
                if index % world == rank:
                    yield batch, list(numbers)
            else:
                rows = [row for row, number in enumerate(numbers) if number in own]
                if rows:
                    yield batch[rows] if world > 1 else batch, [numbers[row] for row in rows]

    def _keep(self, measurement: Measurement, step: int, epoch: float, device: torch.device) -> None:
        """Adds a line to the file; all processes take part in adding up."""
        if not self._keeps:
            return
        failures = [float(name in measurement.errors) for name in measurement.metrics]
        outcomes = add_up(torch.tensor(failures, device=device))
        entries = [
            entry
            for (name, metric), failed in zip(measurement.metrics.items(), outcomes.tolist(), strict=True)
            if not failed
            for entry in entries_of(name, metric, self.prefix, self.program.measures)
        ]
        if process()[0] == 0 and self.file is not None:
            # Files count from 0 the epoch that ends, as the monitor's do.
            number = 0 if step == 0 else epoch - 1
            line = {"version": VERSION, "epoch": number, "step": step, "baseline": step == 0, "records": entries}
            seed = self._settings.get("seed")
            header = {"version": VERSION, "hyperparameters": self._settings}
            append(self.file, [line], header | ({"seed": seed} if isinstance(seed, int) else {}))

    def _rehearse(self, model: Any, device: torch.device) -> None:
        """Measures two samples. What failed on one process is known on all, before any waits for the others."""
        few = self._batches[0] if isinstance(self._layout, Mapping) else self._batches[0][:2]
        failures: dict[str, Exception] = {}
        try:
            local = self.program.rehearse(model, _on(few, device), device, failures.__setitem__)
            name = called_name(model, self.program.options.function)
            self.described = self.program.told(local, name, f"{self._count} samples")
        except Exception as error:
            failures[""] = error
        names = list(self.program.measurement(device).metrics)
        misuses = {
            name: error
            for name, error in failures.items()
            if isinstance(error, (TypeError, ValueError)) and name not in self.program.built_in
        }
        outcomes = add_up(torch.tensor([[name in failures, name in misuses] for name in names], device=device).float())
        for name, (failed, misused) in zip(names, outcomes.tolist(), strict=True):
            if misused:
                raise misuses.get(name) or ValueError("`Recorder` cannot measure `model`, as another process found.")
            if failed:
                self._tell(name, failures.get(name))

    def _tell(self, name: str, error: Exception | None) -> None:
        what = f"The companion {name!r} of `Recorder`" if name else "The equivariance of the model"
        report(f"{what} could not be measured", error, self.on_error)


def _batches(inputs: Any, layout: Layout | None, size: int | None) -> list[Any]:
    """What is measured at a time, copied."""
    found = list(inputs) if isinstance(inputs, list) else [inputs]
    if not isinstance(layout, Mapping):
        wrong = next((one for one in found if not isinstance(one, Tensor)), None)
        if wrong is not None:
            raise TypeError(
                f"`inputs` must be a tensor, or a list of tensors, got {type(wrong).__name__}. Pass the images alone, "
                "without labels, or name the parts that move, e.g. `input_representation={'pos': Points(3)}`."
            )
        found = [part for one in found for part in (one.split(size) if size and len(one) else [one])]
    else:
        for one in found:
            moved_parts(one, layout)
    if not found or not sum(sample_count(one, layout) for one in found):
        raise ValueError("`inputs` must hold at least one sample, got none. Pass images of the validation set.")
    return [one.detach().clone() if isinstance(one, Tensor) else copy.deepcopy(one) for one in found]


def _checksum(batches: list[Any], layout: Layout | None) -> int:
    """A number that the bytes of all tensors that move fix, below 2^62."""
    told = hashlib.blake2b(digest_size=8)
    for batch in batches:
        for name, tensor in moved_parts(batch, layout).items():
            told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(told.digest(), "big") >> 2


def _on(inputs: Any, device: torch.device) -> Any:
    """Inputs on a device."""
    if isinstance(inputs, Tensor) or callable(getattr(inputs, "to", None)):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({key: _on(value, device) for key, value in inputs.items()})  # type: ignore[call-arg]
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return type(inputs)(_on(value, device) for value in inputs)
    return inputs


@contextmanager
def _shared(model: Any) -> Iterator[Any]:
    """The model as all processes have it alike: whole, and with the first one's buffers.

    Yields:
        The model.
    """
    modules = [module for _, module in found_modules(model).modules.values()]
    if isinstance(model, torch.nn.Module) and is_sharded(modules):
        with unsharded(model) as whole:  # its buffers are the first one's
            yield whole
    else:
        with shared_buffers(buffers_of_the_first(modules, _device_of(model))):
            yield model


def _device_of(model: Any) -> torch.device:
    """Where a model's first weight is; the CPU for what has none."""
    for module in found_modules(model).roots:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")
