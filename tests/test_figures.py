"""Pictures: what stands on them."""

import numpy as np
import pytest
import torch

import lie_metric as lm
from lie_metric.figures import Curve, comparison, unit_of, vector_field

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


def test_values_below_the_floor_are_marked():
    figure = comparison(panels(), title="", caption="", floors={"rotation": torch.tensor(0.7)})
    texts = figure.axes[2].texts
    assert [text.get_text() for text in texts] == ["1.00\n±0.10"] * 2 + ["0.50\n±0.05", "0.50\n≤ floor"]
    assert [text.get_color() for text in texts] == ["black", "black", "black", "0.55"]
    assert figure.axes[2].images[0].get_array().tolist() == [[1, 1], [0.5, 1]]
    assert [len(axis.patches) for axis in figure.axes[:2]] == [0, 1]
    assert figure.axes[1].patches[0].get_extents().height > 0


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


class TestVectorField:
    def test_arrows_point_to_where_the_content_goes(self):
        """Small steps of the library's own transforms move a bright spot along the arrow at its place."""
        spiral = lm.Generator.affine("spiral", [[-0.5, 1, 0.3], [-1, -0.5, 0]])
        figure = vector_field(spiral)
        arrows = figure.axes[0].collections[0]
        grid = torch.arange(41.0) - 20
        for index in (32, 50, 112, 160):
            at = torch.tensor(arrows.get_offsets()[index])
            arrow = torch.tensor([arrows.U[index], arrows.V[index]])
            spot = (-((grid / 20.5 - at[0]) ** 2 + (grid[:, None] / 20.5 - at[1]) ** 2) / 0.05).exp()[None]
            step = (lm.transforms.apply(spot, spiral, 0.05) - spot)[0]
            dipole = torch.stack([(step * grid).sum(), (step * grid[:, None]).sum()])
            drift = dipole / spot.sum() / 20.5 / 0.05
            if at.abs().max() < 0.6 and arrow.norm() > 0.2:
                centre = at * step.sum() / spot.sum() / 0.05  # a spot that grows weighs more at its place
                assert torch.nn.functional.cosine_similarity(drift - centre, arrow.float(), dim=0) > 0.98

    def test_panels(self, tmp_path):
        figure = vector_field(lm.generators("rotation", "saturation"), torch.rand(3, 8, 12), titles=["least", "most"])
        assert [axis.get_title() for axis in figure.axes] == ["least", "most"]
        assert [len(axis.collections) for axis in figure.axes] == [1, 0]
        assert figure.axes[1].get_xlabel() == "intensities × exp(1 t)"
        assert figure.axes[0].get_xlim() == (-1.5, 1.5)
        assert figure.axes[0].get_ylim() == (1, -1)
        figure.savefig(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000

    def test_arrows_of_space(self, tmp_path):
        """At each place of the grid the velocity -Ap, drawn with y down and z away."""
        turning, still = lm.generators("rotation_z", "saturation", dimension=3)
        spiral = (turning + 0.5 * lm.generators("translation_y", dimension=3)[0]).with_name("spiral")
        figure = vector_field([spiral, still])
        assert [len(axis.collections) for axis in figure.axes] == [1, 0]
        axis = figure.axes[0]
        segments = torch.tensor(np.array(axis.collections[0]._segments3d))
        segments = segments[: len(segments) // 3]  # shafts first, from the tip, then two lines for each head
        (x, z, y), (u, w, v) = segments.mean(1).unbind(1), (segments[:, 0] - segments[:, 1]).unbind(1)
        assert len(segments) == 125
        velocity = torch.stack([-y, x - 0.5, 0 * z], 1)  # the right hand turns x to y; content moves against a shift
        drawn = torch.stack([u, v, w], 1)
        longest = velocity.norm(dim=1).max()
        torch.testing.assert_close(drawn, 0.5 * velocity / longest, rtol=1e-5, atol=1e-6)
        assert axis.get_zlim() == (1, -1)
        assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_zlabel()) == ("x", "z", "y")
        figure.savefig(tmp_path / "picture.png")

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (([],), "at least one"),
            ((lm.generators("rotation"), torch.rand(2, 3, 8, 8)), r"`image` must have axes \(C, H, W\)"),
            (
                (lm.generators("rotation", dimension=3), torch.rand(8, 8)),
                "`image` must .* be None for generators of space",
            ),
            ((lm.generators("scale", dimension=1),), r"all be of two dimensions, or all of three, got \[1\]"),
            (((*lm.generators("scale"), *lm.generators("scale", dimension=3)),), r"got \[2, 3\]"),
        ],
    )
    def test_bad_input(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            vector_field(*arguments)
        with pytest.raises(ValueError, match="`titles` one for each, got 1 and 2"):
            vector_field(lm.generators("rotation"), titles=["a", "b"])


def test_floors_of_each_network_mark_its_own_values():
    regimes = {
        name: {"rotation": Curve([0, 1], [2.0, value], [0.1, 0.1])} for name, value in (("none", 1.0), ("all", 0.5))
    }
    floors = {"cnn": {"none": {"rotation": 1.5}, "all": {"rotation": 0.4}}}
    figure = comparison({"cnn": regimes}, title="", caption="", floors=floors)
    curves, table = figure.axes
    assert ["≤ floor" in text.get_text() for text in table.texts] == [True, False]
    (band,) = [patch for patch in curves.patches if patch.get_height()]
    assert band.get_y() + band.get_height() == pytest.approx(0.4)
