"""Which part of a study is whose."""

import pytest

from lie_metric.study.shards import part_of


def torchrun(rank, world):
    return {"RANK": str(rank), "WORLD_SIZE": str(world)}


def array(number, count, first=None, step=None):
    given = {"ID": number, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("shard", "environment", "wanted"),
    [
        (None, {}, (1, 1)),
        ("2/3", {}, (2, 3)),
        (None, torchrun(0, 1), (1, 1)),
        (None, torchrun(1, 4), (2, 4)),
        ("2/4", torchrun(1, 4), (2, 4)),
        (None, array(0, 8), (1, 8)),
        (None, array(8, 8, 1, 1), (8, 8)),
        (None, array(20, 3, 10, 5), (3, 3)),
        ("8/8", array(8, 8, 1, 1), (8, 8)),
        ("2/3", {**torchrun(0, 1), **array(5, 1, 5, 1)}, (2, 3)),
        (None, {**torchrun(0, 1), **array(1, 4)}, (2, 4)),
        ("2/4", {**torchrun(1, 4), **array(1, 4)}, (2, 4)),
    ],
)
def test_parts(shard, environment, wanted):
    assert part_of(shard, environment) == wanted


@pytest.mark.parametrize(
    ("shard", "environment", "match"),
    [
        ("1/2", torchrun(1, 2), "got 1/2 by `--shard`, 2/2 by RANK and WORLD_SIZE of torchrun"),
        ("1/2", torchrun(0, 4), "got 1/2 by `--shard`, 1/4 by RANK"),
        ("1/1", torchrun(0, 4), "got 1/1 by `--shard`, 1/4 by RANK"),
        ("1/8", array(8, 8, 1, 1), "got 1/8 by `--shard`, 8/8 by the array of SLURM"),
        (None, {**torchrun(1, 2), **array(1, 4)}, "got 2/2 by RANK .* 2/4 by the array of SLURM.*--nnodes"),
        ("0/2", {}, "must be i/n with 1 <= i <= n, got '0/2'"),
        ("half", {}, "got 'half'"),
        (None, torchrun(4, 4), "RANK below WORLD_SIZE, got 4 and 4"),
        (None, torchrun("one", 4), "whole numbers, got RANK='one', WORLD_SIZE='4'"),
        (None, array(5, 3, 1, 1), "got task 5 of 3 from 1 by 1. Submit e.g. --array=0-2"),
        (None, array(4, 3, 1, 2), "equal steps, got task 4 of 3 from 1 by 2"),
        (None, array(4, None), "SLURM_ARRAY_TASK_COUNT=''"),
    ],
)
def test_contradictions_are_refused(shard, environment, match):
    with pytest.raises(ValueError, match=match):
        part_of(shard, environment)
