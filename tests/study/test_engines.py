"""Studies on engines: Ray, SLURM by submitit, and torchrun."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lie_metric.study import read_records, read_rows
from lie_metric.study.__main__ import main

TIMES = {"seconds_measurement", "seconds_evaluation", "finished"}
NINE = 9
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--no-python", sys.executable)
ENGINES = {
    "ray": ((), ("--on", "ray")),
    "slurm": ((), ("--on", "slurm", "--resources", "cluster=local")),
    "torchrun": (TORCHRUN, ()),
}


def values(folder):
    return {
        (row["model"], row["generator"]): {name: value for name, value in row.items() if name not in TIMES}
        for row in read_rows(folder)
    }


def lines(folder):
    """The rows as they stand in the files, without what merges and sorts them."""
    return sorted(line for path in folder.glob("rows-*.csv") for line in path.read_text().splitlines()[1:])


@pytest.fixture
def engine(request):
    """Starts a study on an engine, in a process group of its own."""
    name = request.param
    if name == "ray":
        pytest.importorskip("ray")
    if name == "slurm":
        pytest.importorskip("submitit")
    before, after = ENGINES[name]
    started = []

    def start(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, *before, "-W", "ignore", "-m", "lie_metric.study", "study", *map(str, arguments), *after],
            env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    start.name = name
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_cut_off_and_gone_on(engine, tmp_path, named, small):
    """With a driver that is killed in the middle the table is that of one process: nothing is lost or there twice."""
    names = [*named("ab"), *named(["slow"]), f"slower={named(['slow'])[0].partition('=')[2]}", *named("c")]
    assert main(["study", *names, *small, "--out", str(tmp_path / "one")]) == 0
    wait, out = tmp_path / "hold.wait", tmp_path / "out"
    wait.touch()
    running = engine(*names, *small, "--out", out, STUDY_WAIT=str(wait))
    deadline = time.monotonic() + 300  # the machine may be busy
    while not (wait.with_suffix(".reached").exists() and {"a", "b"} <= whole(out)):
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if engine.name == "torchrun":
        os.killpg(running.pid, signal.SIGKILL)
    else:
        running.send_signal(signal.SIGKILL)  # what it started is left to the engine
    running.wait()
    kept = lines(out)
    assert len(kept) >= 2 * NINE
    assert not {"slow", "slower"} & whole(out)
    wait.unlink()
    again = engine(*names, *small, "--out", out)
    told, _ = again.communicate(timeout=300)
    assert again.returncode == 0, told
    after = lines(out)
    assert set(kept) <= set(after)
    assert len(after) == 5 * NINE
    assert values(out) == values(tmp_path / "one")
    assert set(read_records(out)) == {"a", "b", "slow", "slower", "c"}


def whole(folder):
    """Models with all their rows."""
    if not (folder / "settings.json").exists():
        return set()
    found = [row["model"] for row in read_rows(folder)]
    return {model for model in found if found.count(model) == NINE}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "slurm"], indirect=True)
def test_lost_models(engine, tmp_path, named, small):
    """A process that dies is the engine's to start again; a model that is lost all the same has failed."""
    # submitit starts again what SLURM stops, not what breaks.
    names = ["dies", "dies_once", "a"] if engine.name == "ray" else ["dies", "a"]
    out = tmp_path / "out"
    running = engine(*named(names), *small, "--out", out, "--retries", 1, STUDY_DEATHS=str(tmp_path))
    told, _ = running.communicate(timeout=300)
    assert running.returncode == 3, told
    rows = {row["model"]: row for row in read_rows(out)}
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(names, "ok") | {"dies": "failed"}
    assert len(lines(out)) == (len(names) - 1) * NINE + 1
    assert len((tmp_path / "dies").read_text()) == (2 if engine.name == "ray" else 1)
    told = "WorkerCrashedError: The worker died" if engine.name == "ray" else "has not produced any output"
    assert told in rows["dies"]["reason"]


def debug(*arguments):
    pytest.importorskip("submitit")
    return main(["study", *map(str, arguments), "--on", "slurm", "--resources", "cluster=debug"])


def test_units_are_models(tmp_path, named, small, capsys):
    """Each model has files of its own, failures are rows, and what is there is skipped, whichever way it came there."""
    options = [*small, "--generators", "rotation", "--layerwise", "2", "--out", tmp_path / "out"]
    assert main(["study", *named("a"), *map(str, options)]) == 0
    assert debug(*named(["a", "b", "breaks"]), *options) == 3
    assert "1 measured, 1 failed, 1 skipped" in capsys.readouterr().out
    rows = {row["model"]: row for row in read_rows(tmp_path / "out")}
    assert "no such weights" in rows["breaks"]["reason"]
    assert rows["b"]["relative"] > 0
    assert {path.name for path in (tmp_path / "out").glob("rows*")} == {
        "rows-1-of-1.csv", "rows-2-of-3.csv", "rows-3-of-3.csv",
    }  # fmt: skip
    assert debug(*named(["a", "b", "breaks"]), *options) == 0
    assert "0 measured, 0 failed, 3 skipped" in capsys.readouterr().out


def test_what_stops_a_study_stops_it(tmp_path, named, small, capsys):
    assert debug(*named("ab"), *small, "--out", tmp_path / "out", "--device", "abacus") == 1
    assert "`device` must be one that torch can use here, got 'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--resources", "num_gpus=1"], "`resources` must be empty on this machine, got {'num_gpus': 1}"),
        (["--on", "slurm", "--resources", "cluster=moon"], "the cluster slurm, local or debug, got 'moon'"),
        (["--on", "slurm", "--resources", "cluster"], "`--resources` must be NAME=VALUE, got 'cluster'"),
        (["--on", "slurm"], "a machine without `srun`"),
        (["--retries", "-1"], "`retries` must be a non-negative integer, got -1"),
    ],
)
def test_refused_before_any_work(tmp_path, small, capsys, monkeypatch, options, match):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["study", "math:sqrt", *small, "--out", str(tmp_path / "out"), *options]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_resources(tmp_path, named, small, capsys):
    pytest.importorskip("submitit")
    command = ["study", *named("a"), *small, "--out", str(tmp_path), "--on", "slurm", "--resources"]
    assert main([*command, "cluster=debug", "slurm_moons=1"]) == 2
    assert "must be parameters of submitit" in capsys.readouterr().err


@pytest.mark.parametrize(("on", "package", "name"), [("ray", "ray", "Ray"), ("slurm", "submitit", "submitit")])
def test_extras_are_named(tmp_path, small, capsys, monkeypatch, on, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["study", "math:sqrt", *small, "--out", str(tmp_path / "out"), "--on", on]) == 2
    assert f"needs {name}, which is not installed. Run `pip install 'lie_metric[study]'`." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
