"""Which part of a study is this process's: as it was asked for, and as torchrun or an array of SLURM says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

__all__ = ["part_of"]


def part_of(shard: str | None, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """This process's part, and how many there are.

    torchrun says it by ``RANK`` and ``WORLD_SIZE``, an array of SLURM by ``SLURM_ARRAY_TASK_ID``, ``_COUNT``, ``_MIN``
    and ``_STEP``.

    Args:
        shard: ``"i/n"`` if it was asked for.
        environment: Variables; the default is those of the process.

    Returns:
        Both, the part from 1; 1 and 1 where nobody says anything.

    Raises:
        ValueError: If it is no part, or they do not say the same.

    Example:
        >>> part_of(None, {"RANK": "2", "WORLD_SIZE": "4"})
        (3, 4)
        >>> array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}
        >>> part_of("3/3", array)
        (3, 3)
    """
    variables = os.environ if environment is None else environment
    said = {
        "`--shard`": _asked(shard),
        "RANK and WORLD_SIZE of torchrun": _torchrun(variables),
        "the array of SLURM": _array(variables),
    }
    # One process of one is no division: some containers set RANK=0 and WORLD_SIZE=1 for every program.
    found = {name: part for name, part in said.items() if part is not None and (part[1] > 1 or name == "`--shard`")}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{part}/{parts} by {name}" for name, (part, parts) in found.items())
        raise ValueError(
            f"`shard` must be what torchrun and SLURM say, got {told}. Leave `--shard` out under either; of several "
            "machines with several processes, `torchrun --nnodes` or `--on slurm` makes one division."
        )
    return next(iter(found.values()), (1, 1))


def _asked(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"`shard` must be i/n with 1 <= i <= n, got {shard!r}.")
    return part, parts


def _torchrun(variables: Mapping[str, str]) -> tuple[int, int] | None:
    if "RANK" not in variables or "WORLD_SIZE" not in variables:
        return None
    rank, world = _numbers(variables, "RANK", "WORLD_SIZE")
    if not 0 <= rank < world:
        raise ValueError(f"`shard` needs RANK below WORLD_SIZE, got {rank} and {world}. Unset both, or start torchrun.")
    return rank + 1, world


def _array(variables: Mapping[str, str]) -> tuple[int, int] | None:
    if "SLURM_ARRAY_TASK_ID" not in variables:
        return None
    given = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "1", **variables}
    number, count, first, step = _numbers(
        given, *(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP"))
    )
    part, rest = divmod(number - first, max(step, 1))
    if rest or not 0 <= part < count:
        raise ValueError(
            f"`shard` needs an array of SLURM in equal steps, got task {number} of {count} from {first} by {step}. "
            f"Submit e.g. --array=0-{max(count, 1) - 1}, or give `--shard i/n` outside of an array."
        )
    return part + 1, count


def _numbers(variables: Mapping[str, str], *names: str) -> list[int]:
    try:
        return [int(variables[name]) for name in names]
    except (KeyError, ValueError) as error:
        told = ", ".join(f"{name}={variables.get(name, '')!r}" for name in names)
        raise ValueError(f"`shard` needs whole numbers, got {told} of the environment. Unset them.") from error
