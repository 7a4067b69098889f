"""The report: every row in it, statistics that are those of scipy, nothing from outside."""

import csv
import json
import math
import re

import pytest

import lie_metric as lm
from lie_metric.study import StudyError, read_layers, read_records, read_rows, write_report
from lie_metric.study.__main__ import main
from lie_metric.study.figures import _scatter
from lie_metric.study.report import _axis, answers, correlations, summarise
from lie_metric.study.store import COLUMNS, Table, record_settings

Figure = pytest.importorskip("matplotlib.figure").Figure
stats = pytest.importorskip("scipy.stats")


def embedded(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def made_up(count, generators=("rotation", "scale")):
    """Rows of models whose relative error falls with accuracy, in the family "b" only, while the raw LEE rises."""
    rows = []
    for number in range(count):
        family, rank = "ab"[number % 2], number // 2
        falling = 1 / (1 + rank) if family == "b" else 1 + (rank * 7 % 5) / 10
        for place, generator in enumerate(generators, 1):
            rows.append(
                dict.fromkeys(COLUMNS)
                | {
                    "model": f"m{number}",
                    "generator": generator,
                    "status": "ok",
                    "family": family,
                    "tag": "t",
                    "reason": "",
                }
                | {"relative": falling * place, "relative_se": 0.01, "lee": (rank + 1) * place, "lee_se": math.nan}
                | {"accuracy": 0.5 + rank / 100, "accuracy_se": 0.01, "parameters": 100 * (rank + 1), "macs": 10.0}
                | {"seconds_measurement": 8.0, "images": 4, "seconds_evaluation": 2.0, "evaluation_images": 8}
            )
    return rows


@pytest.fixture
def folder(tmp_path):
    record_settings(
        tmp_path,
        {"data": "digits", "num_images": 4, "eval_images": 8, "resampling": {"interpolation": "bspline"}},
    )
    return tmp_path


def test_end_to_end(tmp_path, named, small, capsys):
    names = named(["a", "b", "c", "breaks"])
    assert main(["study", *names, *small, "--out", str(tmp_path), "--layerwise", "2", "--shard", "1/2"]) == 0
    assert main(["study", *names, *small, "--out", str(tmp_path), "--layerwise", "2", "--shard", "2/2"]) == 3
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    written = capsys.readouterr().out.split()
    assert {path.rpartition("/")[2] for path in written} == {
        "results.csv", "layers.csv", "pairs.csv", "report.html", "relative.png", "lee.png", "sensitivity.png",
        "correlations.png", "layers.png",
    }  # fmt: skip
    rows = read_rows(tmp_path)
    with (tmp_path / "results.csv").open() as file:
        merged = list(csv.DictReader(file))
    assert [(row["model"], row["generator"]) for row in merged] == [(row["model"], row["generator"]) for row in rows]
    page = (tmp_path / "report.html").read_text()
    data = embedded(page)
    assert data["failed"] == [{"model": "breaks", "reason": next(r["reason"] for r in rows if r["model"] == "breaks")}]
    models = {one["model"]: one for one in data["models"]}
    for row in rows:
        if row["status"] == "ok":
            for measure in ("relative", "lee", "sensitivity"):
                value, error = models[row["model"]]["values"][row["generator"]][measure]
                assert value == pytest.approx(row[measure], rel=1e-5)
                assert error == pytest.approx(row[f"{measure}_se"], rel=1e-5)
            for name in ("accuracy", "parameters", "macs", "consistency"):
                assert models[row["model"]][name] == pytest.approx(row[name], rel=1e-5)
    assert len(data["layers"]) > 27
    assert all(row["share_se"] > 0 for row in read_layers(tmp_path) if row["share"])
    # Any two rows can be compared: in the table, on the page, and in Python.
    records = read_records(tmp_path)
    wanted = lm.compare(records["a"]["relative"], records["c"]["relative"])["rotation"]
    with (tmp_path / "pairs.csv").open() as file:
        pairs = {(row["measure"], row["generator"], row["a"], row["b"]): row for row in csv.DictReader(file)}
    assert len(pairs) == 3 * (3 * 12 + 1)
    assert float(pairs["relative", "rotation", "a", "c"]["low"]) == pytest.approx(wanted.low)
    a, c = (data["pairs"]["deviations"][model]["relative"]["rotation"] for model in "ac")
    assert math.dist(a, c) / 1e6 == pytest.approx(wanted.over_images, rel=1e-4)
    value, error = models["a"]["values"]["mean per half side"]["relative"]
    assert 0 < error < value
    # Nothing comes from the network.
    outside = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|<link|src=|@import|fetch\(", outside)


def test_text_cannot_leave_the_data(folder):
    rows = made_up(2)
    for row in rows:
        row["model"] = '</script><script>alert("1")</script><!--' + row["model"]
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table:
        table.append(rows)
    write_report(folder, pictures=False)
    page = (folder / "report.html").read_text()
    assert page.count("</script>") == 2
    assert embedded(page)["models"][0]["model"] == rows[0]["model"]
    assert embedded(page)["models"][0]["values"]["rotation"]["lee"][1] is None


def test_summary():
    model = summarise(made_up(2))[0]
    assert model["values"]["rotation"] == {"relative": (1.0, 0.01), "lee": (1, pytest.approx(math.nan, nan_ok=True))}
    # Generators of several units have no common mean.
    assert set(model["values"]) == {"rotation", "scale"}
    assert model["cost"] == 8
    model = summarise(made_up(2, ("translation_x", "rotation", "translation_y")))[0]
    assert model["values"]["mean per half side"]["relative"] == (pytest.approx(3**0.5), None)
    assert model["values"]["mean per half side"]["lee"] == (pytest.approx(3**0.5), None)


def test_correlations_by_family():
    models = summarise(made_up(24, ("rotation", "translation_x", "translation_y")))
    found = {
        (one["measure"], one["generator"], one["against"], one["group"] if one["by"] == "family" else ""): one
        for one in correlations(models)
        if one["by"] != "tag"
    }
    for family in ("a", "b", ""):
        members = [one for one in models if family in {"", one["family"]}]
        for generator in ("rotation", "mean per half side"):
            y = [one["values"][generator]["relative"][0] for one in members]
            wanted = stats.spearmanr([one["accuracy"] for one in members], y).statistic
            assert found["relative", generator, "accuracy", family]["rho"] == pytest.approx(wanted)
    assert math.isnan(found["relative", "rotation", "macs", ""]["rho"])
    told = answers(list(found.values()))
    assert "relative error (geometric mean per half side), in the family b (12): correlation with accuracy -1.00 " \
        "(95 % interval -1.00 to -1.00): more accurate models have a lower relative error." in told  # fmt: skip
    assert any("relative error" in one and "family a" in one and one.endswith("no clear relation.") for one in told)
    # Over all models each unit has its sentence, no transform is left out.
    over_all = [one for one in told if one.startswith("relative error") and "over all models" in one]
    assert {one.partition("),")[0] for one in over_all} == {
        "relative error (geometric mean per half side", "relative error (rotation",
    }  # fmt: skip
    # A raw value never ranks.
    assert all("does not rank models" in one for one in told if one.startswith("raw LEE"))


def test_nothing_to_report(folder, tmp_path):
    with pytest.raises(StudyError, match="must hold the rows of a model, got none"):
        write_report(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"without settings\.json"):
        write_report(tmp_path / "empty")


def test_only_failures(folder):
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table:
        table.append([{"model": "a", "generator": "", "status": "failed", "reason": "memory"}])
    assert [path.name for path in write_report(folder)] == ["results.csv", "report.html"]


def test_models_without_accuracy_are_drawn_against_size(folder):
    rows = made_up(6)
    for row in rows:
        if row["family"] == "a":
            row |= {"accuracy": None, "accuracy_se": None}
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table:
        table.append(rows)
    write_report(folder, pictures=False)
    data = embedded((folder / "report.html").read_text())
    assert data["x"] == "accuracy"
    assert len(data["models"]) == 6
    models = summarise(rows)
    for x, drawn, left_out in (("accuracy", 3, 3), ("parameters", 6, 0), ("cost", 6, 0)):
        figure = _scatter(Figure, models, "relative", x)
        assert sum(len(one[0].get_xdata()) for one in figure.axes[0].containers) == drawn
        assert (f"{left_out} without it are not drawn: m0, m2, m4" in figure.get_supxlabel()) == (left_out > 0)
    with pytest.raises(
        ValueError, match=r"`x` must be what was measured of a model, one of \['accuracy', 'parameters'"
    ):
        write_report(folder, x="consistency")
    for row in rows:
        row |= {"accuracy": None}
    assert _axis(summarise(rows), None) == "parameters"


def test_bars_end_at_the_frame():
    rows = made_up(6)
    rows[0] |= {"relative_se": 0.999999}  # nearly down to zero, on a logarithmic axis
    rows[1] |= {"relative_se": 50.0}
    figure = _scatter(Figure, summarise(rows), "relative", "accuracy")
    low, high = figure.axes[0].get_ylim()
    assert 0.1 < low < 0.34
    assert 1.4 < high < 3


def test_families_by_argument(folder):
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table:
        table.append(made_up(4))
    assert main(["report", str(folder), "--no-pictures", "--family", "m[01]=new", "--tag", "m3=last"]) == 0
    models = embedded((folder / "report.html").read_text())["models"]
    assert [(one["family"], one["tag"]) for one in models] == [("new", "t"), ("new", "t"), ("a", "t"), ("b", "last")]
    with pytest.raises(ValueError, match=r"`families` must match the name of a model, got 'x'\. Names are e.g. m0"):
        write_report(folder, pictures=False, families={"x": "y"})


def test_too_many_models_for_all_pairs(folder, monkeypatch):
    monkeypatch.setattr("lie_metric.study.report._MOST_PAIRS", -1)
    with Table(folder / "rows-1-of-1.csv", COLUMNS) as table:
        table.append(made_up(4))
    with pytest.warns(UserWarning, match="No pairs.csv: 0 models are more than -1"):
        assert "pairs.csv" not in [path.name for path in write_report(folder, pictures=False)]
    with pytest.raises(ValueError, match="`against` must name models with Lie derivatives"):
        write_report(folder, pictures=False, against=["m0"])
