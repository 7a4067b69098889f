"""Pictures: what stands on them."""

import pytest

from lie_metric.figures import Curve, comparison, unit_of

pytest.importorskip("matplotlib")


def panels(regimes=("none", "rotation"), generators=("translation_x", "rotation")):
    curve = {g: Curve([0, 1, 2], [3.0, 2.0, 1.0], [0.3, 0.2, 0.1]) for g in generators}
    half = {g: Curve([0, 1, 2], [3.0, 1.0, 0.5], [0.3, 0.2, 0.05]) for g in generators}
    return {"cnn": dict(zip(regimes, (curve, half), strict=False))}


def test_curves_and_table_say_what_they_show(tmp_path):
    figure = comparison(panels(), title="Digits", caption="bspline, reflection, pixel areas")
    axes = figure.axes
    assert [axis.get_title() for axis in axes[:2]] == ["translation x", "rotation"]
    assert [axis.get_ylabel() for axis in axes[:2]] == ["output std. per half side", "output std. per radian"]
    assert [list(line.get_ydata()) for line in axes[1].get_lines()] == [[3.0, 2.0, 1.0], [3.0, 1.0, 0.5]]
    assert axes[0].get_ylim()[0] == 0
    assert [text.get_text() for text in axes[2].texts] == ["1.00\n±0.10"] * 2 + ["0.50\n±0.05"] * 2
    assert [label.get_text() for label in axes[2].get_yticklabels()] == ["none", "rotation"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "rotation"]
    assert "bspline" in figure.texts[-1].get_text()
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_an_unnamed_generator_has_a_unit():
    assert unit_of("spiral") == "unit of t"


def test_bad_input():
    with pytest.raises(ValueError, match="of one length"):
        Curve([0, 1], [1.0], [0.1])
    with pytest.raises(ValueError, match="non-empty"):
        Curve([], [], [])
    uneven = panels()
    uneven["vit"] = panels(generators=("scale",))["cnn"]
    with pytest.raises(ValueError, match="same generators for every regime"):
        comparison(uneven, title="", caption="")
