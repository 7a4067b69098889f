"""Tables that survive interruptions."""

import errno
import os

import pytest
import torch

import lie_metric as lm
from lie_metric.study.store import (
    COLUMNS,
    LAYER_COLUMNS,
    Lines,
    StudyError,
    Table,
    read_layers,
    read_records,
    read_rows,
    record_settings,
)


@pytest.fixture
def folder(tmp_path):
    record_settings(tmp_path, {"seed": 0})
    return tmp_path


def row(model, generator="rotation", **values):
    return {"model": model, "generator": generator, "status": "ok", **values}


def test_round_trip(folder):
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table:
        table.append([row('a, "quoted"', relative=1 / 3, accuracy=None, reason="two\nlines, é"), row("b")])
    first, second = read_rows(folder)
    assert first["model"] == 'a, "quoted"'
    assert first["relative"] == 1 / 3
    assert first["accuracy"] is None
    assert first["reason"] == "two lines, é"
    assert second["model"] == "b"


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_torn_last_line_is_dropped(folder, cut):
    path = folder / "rows-1-of-1.csv"
    with Table(path, COLUMNS) as table:
        table.append([row("a"), row("é", relative=0.5)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [one["model"] for one in read_rows(folder)] == ["a"]
    with Table(path, COLUMNS) as table:
        table.append([row("é", relative=0.5)])
    assert path.read_bytes() == whole


def test_records_of_models(folder):
    """What was written is read, a torn line is dropped and cut off, a model that was written twice is there once."""
    metric = lm.LocalEquivarianceError(("rotation", "scale"))
    metric.update(lambda x: x[..., :4].mean((2, 3)), torch.randn(70, 1, 8, 8))
    record = metric.record()
    path = folder / "replicates-1-of-1.jsonl"
    with Lines(path) as lines:
        for model in ("a", "b", "a"):
            lines.append({"model": model, "records": [record.to_json()]})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"model": "c", "rec')
    found = read_records(folder)
    assert list(found) == ["a", "b"]
    torch.testing.assert_close(
        found["b"]["relative"].replicates.left_out, record.replicates.left_out, rtol=1e-11, atol=0
    )
    assert found["b"]["relative"].fingerprint == record.fingerprint
    # Small: what is left out for each group of images, of each generator.
    assert len(whole) / 3 / 2 < 1500
    Lines(path).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"{}\n")
    with pytest.raises(StudyError, match=r"damaged line 4 in .*replicates.*Remove the line"):
        read_records(folder)


def test_torn_header(folder):
    path = folder / "rows-1-of-1.csv"
    path.write_text("model,gener")
    assert read_rows(folder) == []
    with Table(path, COLUMNS) as table:
        table.append([row("a")])
    assert len(read_rows(folder)) == 1


def test_full_disk_leaves_the_file_as_it_was(folder, monkeypatch):
    path = folder / "rows-1-of-1.csv"
    write = os.write

    def full(file, data):
        if len(data) > 30:
            return write(file, data[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Table(path, COLUMNS) as table:
        table.append([row("a")])
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StudyError, match=r"`out` must be writable, got No space left on device.*kept"):
            table.append([row("b")])
        monkeypatch.undo()
        assert path.read_bytes() == before
        table.append([row("c")])
    assert [one["model"] for one in read_rows(folder)] == ["a", "c"]


def test_files_merge_without_duplicates(folder):
    for part, models in ((1, "ab"), (2, "bc")):
        with Table(folder / f"rows-{part}-of-2.csv", COLUMNS) as table:
            table.append(row(model, generator) for model in models for generator in ("rotation", "scale"))
        with Table(folder / f"layers-{part}-of-2.csv", LAYER_COLUMNS) as table:
            table.append({"model": model, "generator": "rotation", "type": "conv"} for model in models)
    keys = [(one["model"], one["generator"]) for one in read_rows(folder)]
    assert sorted(keys) == [(model, generator) for model in "abc" for generator in ("rotation", "scale")]
    assert [one["model"] for one in read_layers(folder)] == ["a", "b", "c"]


def test_a_failure_gives_way_to_a_measurement(folder):
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table:
        table.append([{"model": "a", "generator": "", "status": "failed", "reason": "memory"}])
        assert [one["status"] for one in read_rows(folder)] == ["failed"]
        table.append([row("a")])
    assert [one["status"] for one in read_rows(folder)] == ["ok"]


def test_one_process_for_a_file(folder):
    with Table(folder / "rows-1-of-1.csv", COLUMNS), pytest.raises(StudyError, match="one process at a time"):
        Table(folder / "rows-1-of-1.csv", COLUMNS)


def test_settings(folder):
    record_settings(folder, {"seed": 0})
    with pytest.raises(StudyError, match=r"same settings, got other ones.*seed: 1, there 0"):
        record_settings(folder, {"seed": 1})
    assert sorted(one.name for one in folder.iterdir()) == ["settings.json"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("model,other\n", "tables of this version, got other columns"),
        (",".join(COLUMNS) + "\na,b\nc,d\n", "damaged line 2"),
    ],
)
def test_foreign_tables(folder, content, match):
    (folder / "rows-1-of-1.csv").write_text(content)
    with pytest.raises(StudyError, match=match):
        read_rows(folder)


def test_no_study(tmp_path):
    with pytest.raises(StudyError, match=r"folder of a study, got .* without settings.json"):
        read_rows(tmp_path)
