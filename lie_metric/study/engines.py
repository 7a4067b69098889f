"""The engines that run the parts of a study on other processes and machines: Ray, and SLURM by submitit.

They place parts, and start them again when they are lost; nothing of that is done here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lie_metric.warning import warn

__all__ = ["ENGINES", "Done", "run_on", "validate_engine"]

ENGINES = ("local", "ray", "slurm")
"""Where a study is run; ``local`` is this process."""

_MINUTES = 240  # for one model; submitit would stop jobs after five minutes

Resources = Mapping[str, str | float]
Task = Callable[[int], Any]


class Done(NamedTuple):
    """A part that an engine is done with.

    Attributes:
        part: Its number.
        value: What it returned; None if it was lost.
        error: Why it was lost, after all tries of the engine.
    """

    part: int
    value: Any
    error: str = ""


class _Requeued:
    """A task as submitit takes it: a part that is stopped by a time limit or for another job is queued once more."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, part: int) -> Any:
        return self.task(part)

    def checkpoint(self, part: int) -> Any:
        """What to run in place of a job that was stopped: the same, as finished models are on the disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, part)


def validate_engine(on: str, retries: int, resources: Resources) -> None:
    """Refuses an engine that there is not, or what it cannot be asked for.

    Args:
        on: One of :data:`ENGINES`.
        retries: How often a lost part is started again.
        resources: What a part needs, in the engine's own words.

    Raises:
        ValueError: If a value is unknown or out of range, or there is no SLURM here.
        ModuleNotFoundError: If the engine is not installed.
    """
    if on not in ENGINES:
        raise ValueError(f"`on` must be one of {', '.join(ENGINES)}, got {on!r}.")
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f"`retries` must be a non-negative integer, got {retries!r}.")
    if on == "local" and resources:
        raise ValueError(f"`resources` must be empty on this machine, got {dict(resources)!r}. Give --on ray or slurm.")
    if on == "ray":
        _ray()
    if on == "slurm":
        submitit, cluster = _submitit(), resources.get("cluster", "slurm")
        if cluster not in {"slurm", "local", "debug"}:
            raise ValueError(f"`resources` must have the cluster slurm, local or debug, got {cluster!r}.")
        if cluster == "slurm" and submitit.SlurmExecutor.affinity() <= 0:
            raise ValueError(
                "`on` 'slurm' must be given where jobs can be submitted, got a machine without `srun`. Start it on one "
                "that has it, or try it with --resources cluster=local."
            )


def run_on(
    on: str, task: Task, parts: Sequence[int], folder: Path, *, retries: int, resources: Resources
) -> Generator[Done, None, None]:
    """Calls a task with each part, on an engine.

    Args:
        on: ``"ray"`` or ``"slurm"``.
        task: A function of a part's number that can be pickled. It must stand being called twice.
        parts: The numbers.
        folder: Where submitit keeps its files; all machines see it.
        retries: How often a part is started again whose process died (Ray), or that ran out of time (SLURM; jobs that
            are preempted are always queued again).
        resources: What each part needs: arguments of ``ray.remote`` (``num_cpus``, ``num_gpus``, ``memory``, ...), or
            of submitit's ``update_parameters`` (``timeout_min``, here 240 by default, ``gpus_per_node``,
            ``slurm_partition``, ...) and ``cluster``, which is ``"local"`` for processes of this machine, all at once,
            and ``"debug"`` for this process.

    Yields:
        The parts in the order in which they are done. Those that are not are cancelled when the iteration ends early.

    Raises:
        ValueError: If the engine does not know a resource.
    """
    if parts:
        yield from (
            _on_ray(task, parts, retries, resources)
            if on == "ray"
            else _on_slurm(task, parts, folder, retries, resources)
        )


def _on_ray(task: Task, parts: Sequence[int], retries: int, resources: Resources) -> Generator[Done, None, None]:
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        # A cluster where RAY_ADDRESS or a running one says so, else the cores of this machine.
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    waiting: dict[Any, int] = {}
    try:
        try:
            asked = {"num_gpus": int("GPU" in ray.cluster_resources()), "max_retries": retries, **resources}
            remote = ray.remote(**asked)(lambda part: task(part))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`resources` must be options of ray.remote, got {dict(resources)!r}: {error}") from error
        there = ray.cluster_resources()
        for name, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
            wanted, given = float(asked.get(name, 0)), there.get(kind, 0)
            if wanted > given:
                warn(
                    f"Each model asks for {name}={wanted:g}, and the cluster of Ray has {given:g}: the study waits "
                    "until it grows. Stop it and give other --resources if it does not."
                )
        waiting = {remote.remote(part): part for part in parts}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
            part = waiting.pop(ready)
            try:
                done = Done(part, ray.get(ready))
            except ray.exceptions.RayError as error:
                done = Done(part, None, _reason(error))
            yield done
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _on_slurm(
    task: Task, parts: Sequence[int], folder: Path, retries: int, resources: Resources
) -> Generator[Done, None, None]:
    submitit = _submitit()
    options: dict[str, Any] = {"name": "lie-metric", "timeout_min": _MINUTES, **resources}
    cluster = str(options.pop("cluster", "slurm"))
    executor = submitit.AutoExecutor(
        folder, cluster=cluster, slurm_max_num_timeout=retries, local_max_num_timeout=retries
    )
    try:
        executor.update_parameters(**options)
    except (TypeError, ValueError, NameError, AssertionError) as error:
        raise ValueError(f"`resources` must be parameters of submitit, got {options!r}: {error}") from error
    waiting = dict(zip(executor.map_array(_Requeued(task), parts), parts, strict=True))
    try:
        for job in submitit.helpers.as_completed(list(waiting), poll_frequency=10 if cluster == "slurm" else 0.2):
            part, lost = waiting.pop(job), job.exception()
            yield Done(part, job.result()) if lost is None else Done(part, None, _reason(lost))
    finally:
        for job in waiting:
            job.cancel()


def _reason(error: BaseException) -> str:
    """What an engine says of a part that was lost: how it begins, or the last line of a traceback in it."""
    lines = str(error).strip().splitlines() or [""]
    raised = re.findall(r"^[\w.]+(?:Error|Exception|Interrupt|Exit)\b.*$", "\n".join(lines), re.MULTILINE)
    told = raised[-1] if raised and "Traceback" in str(error) else " ".join(lines[:2])
    return textwrap.shorten(f"{type(error).__name__}: {told}", 400, placeholder=" ...")


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise _missing("ray", "Ray") from error
    return ray


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise _missing("slurm", "submitit") from error
    return submitit


def _missing(on: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"`on` {on!r} needs {package}, which is not installed. Run `pip install 'lie_metric[study]'`."
    )
