"""Transforms that permute pixels: orientation on asymmetric images, the group's table, outputs of other sizes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lie_metric as lm
from lie_metric import lattice
from lie_metric import representations as R
from lie_metric.lattice import ELEMENTS, GROUPS, Dihedral, Roll, elements

D4 = list(ELEMENTS.values())
shifts = st.integers(-9, 9)


def picture(size=6):
    return torch.arange(2.0 * 3 * size * size, dtype=torch.float64).reshape(2, 3, size, size)


def test_where_a_corner_goes():
    """The top left corner and its right neighbour, as displayed, worked out by hand."""
    x = torch.zeros(4, 4)
    x[0, 0], x[0, 1] = 1, 2
    wanted = {
        "identity": ((0, 0), (0, 1)),
        "rotate_90": ((0, 3), (1, 3)),
        "rotate_180": ((3, 3), (3, 2)),
        "rotate_270": ((3, 0), (2, 0)),
        "flip_horizontal": ((0, 3), (0, 2)),
        "flip_vertical": ((3, 0), (3, 1)),
        "transpose": ((0, 0), (1, 0)),
        "anti_transpose": ((3, 3), (2, 3)),
    }
    assert set(wanted) == set(ELEMENTS)
    for name, (first, second) in wanted.items():
        y = ELEMENTS[name](x)
        assert (y[first], y[second], y.sum()) == (1, 2, 3), name


@pytest.mark.parametrize("k", [1, 2, 3])
def test_quarter_turns_are_rotations(k):
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    turned = lm.transforms.rotate(x, k * math.pi / 2, lm.Resampling("bilinear"))
    torch.testing.assert_close(Dihedral(k)(x), turned, rtol=0, atol=1e-12)


@given(dx=shifts, dy=shifts)
def test_rolls_are_circular_translations(dx, dy):
    x, stencil = picture(), lm.Resampling("bilinear", "circular")
    moved = lm.transforms.translate(lm.transforms.translate(x, dx / 3, "x", stencil), dy / 3, "y", stencil)
    torch.testing.assert_close(Roll(dx, dy)(x), moved, rtol=0, atol=1e-10)


@pytest.mark.parametrize("g", D4, ids=lambda g: g.name)
def test_composition_table(g):
    x = picture()
    for h in D4:
        assert torch.equal((g @ h)(x), g(h(x))), (g.name, h.name)
        assert (g @ h) in D4
    assert g @ g.inverse == g.inverse @ g == ELEMENTS["identity"]
    assert torch.equal(g.inverse(g(x)), x)


def test_the_eight_elements_are_different_and_do_not_commute():
    assert len({tuple(g(picture()).flatten().tolist()) for g in D4}) == 8
    turn, flip = ELEMENTS["rotate_90"], ELEMENTS["flip_horizontal"]
    assert turn @ flip != flip @ turn
    assert flip @ turn @ flip == turn.inverse


@given(dx=shifts, dy=shifts)
def test_roll_inverse(dx, dy):
    x = picture()
    assert torch.equal(Roll(dx, dy).inverse(Roll(dx, dy)(x)), x)


def test_names_and_groups():
    assert [g.name for g in elements("rotations_90")] == ["rotate_90", "rotate_180", "rotate_270"]
    assert len(elements("D4")) == 7
    assert len(elements("identity", "D4")) == 8
    assert elements("roll", ["flips", Roll(2, 0)])[-1] == Roll(2, 0)
    assert all(g in D4 for name, group in GROUPS.items() if name != "roll" for g in group)
    assert Dihedral(-1) == ELEMENTS["rotate_270"]
    assert Dihedral.__matmul__(D4[0], Roll(1)) is NotImplemented


def test_any_dtype_and_any_leading_axes():
    mask = torch.rand(5, 5) > 0.5
    assert ELEMENTS["rotate_90"](mask).dtype == torch.bool
    assert torch.equal(ELEMENTS["flip_vertical"](picture()[0, 0]), picture()[0, 0].flip(0))
    assert ELEMENTS["rotate_180"](torch.ones(4, 6)).shape == (4, 6)


class TestOnRepresentations:
    @pytest.mark.parametrize("g", [*D4, Roll(2, -1)], ids=lambda g: g.name)
    def test_every_layout_says_the_same(self, g):
        x = picture()
        wanted = g(x)
        assert torch.equal(R.map_grid(R.Image(), x, g), wanted)
        assert torch.equal(R.map_grid(R.ChannelsLast(), x.movedim(1, -1), g).movedim(-1, 1), wanted)
        head = torch.full((2, 2, 3), -1.0, dtype=torch.float64)
        tokens = R.map_grid(R.Tokens((6, 6), 2), torch.cat([head, x.flatten(2).mT], 1), g)
        assert torch.equal(tokens[:, :2], head)
        assert torch.equal(tokens[:, 2:].mT.unflatten(-1, (6, 6)), wanted)
        scores = torch.rand(2, 5)
        assert R.map_grid(R.Invariant(), scores, g) is scores

    def test_smaller_grids(self):
        grid = picture(3)
        assert torch.equal(ELEMENTS["rotate_90"].on_grid(grid, (6, 6)), ELEMENTS["rotate_90"](grid))
        assert torch.equal(Roll(4, -2).on_grid(grid, (6, 6)), Roll(2, -1)(grid))
        assert torch.equal(Roll(4, 4).on_grid(grid, (12, 6)), Roll(2, 1)(grid))
        with pytest.raises(ValueError, match=r"move an output of 3×3 by whole pixels, got 'roll_1_0'.*by 0.5 and 0"):
            Roll(1, 0).on_grid(grid, (6, 6))

    def test_one_without_map(self):
        class Own:
            check = tangents = act = components = None

        with pytest.raises(TypeError, match=r"`representation` must have a method `map\(tensor, function\)`"):
            R.map_grid(Own(), torch.ones(2, 3), ELEMENTS["rotate_90"])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ELEMENTS["rotate_90"](torch.ones(3, 4)), ValueError, "must be square for 'rotate_90', got 3×4"),
        (lambda: ELEMENTS["transpose"](torch.ones(3, 4)), ValueError, "must be square for 'transpose'"),
        (lambda: ELEMENTS["identity"](torch.ones(3)), ValueError, r"axes \(..., H, W\), got shape \(3,\)"),
        (lambda: Roll(1)([1]), ValueError, "got list"),
        (lambda: Dihedral(0.5), TypeError, "`quarter_turns` must be an integer"),
        (lambda: Dihedral(1, 1), TypeError, "`mirrored` a bool"),
        (lambda: Roll(0.5), TypeError, "`dx` and `dy` must be integers, got 0.5 and 0"),
        (lambda: elements("rotate"), ValueError, "known transforms, got 'rotate'"),
        (lambda: elements(), ValueError, "at least one transform"),
        (lambda: elements("flips", "D4"), ValueError, r"distinct, got \['flip_horizontal', 'flip_vertical'\]"),
        (lambda: elements(90), TypeError, "names, lattice transforms or sequences of them, got 90"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_public_names():
    assert all(hasattr(lattice, name) for name in lattice.__all__)


def test_a_roll_of_a_smaller_grid_along_each_axis():
    """By as much of its height and of its width, which differ here."""
    grid = torch.arange(12).reshape(3, 4)
    size = (6, 16)
    assert torch.equal(Roll(0, 2).on_grid(grid, size), grid.roll(-1, 0))
    assert torch.equal(Roll(8, 0).on_grid(grid, size), grid.roll(-2, 1))
    assert torch.equal(Roll(-4, 4).on_grid(grid, size), grid.roll((-2, 1), (0, 1)))
    for roll in (Roll(0, 1), Roll(2, 0), Roll(4, 1)):
        with pytest.raises(ValueError, match="by whole pixels"):
            roll.on_grid(grid, size)
    assert Roll(0, 3)(torch.arange(5)[:, None])[0] == 3


def test_quarter_turns_are_the_cyclic_group():
    """Closed, of four elements, the identity among them, and nothing else."""
    from lie_metric.orbits import lattice

    group = lattice("rotations_90")[-1]
    assert group.name == "C4"
    assert group.complete
    assert [g.name for g in group.transforms] == ["identity", "rotate_90", "rotate_180", "rotate_270"]
    assert {(g @ h).name for g in group.transforms for h in group.transforms} == {g.name for g in group.transforms}
