"""Generators as vectors, groups of names, spanning sets, and the exponential as a one-parameter group."""

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lie_metric as lm
from lie_metric.algebra import GENERATORS, coefficients, exponential, simplest_basis, spanning_set

number = st.floats(-2, 2, allow_nan=False)
matrix = st.lists(st.lists(number, min_size=3, max_size=3), min_size=2, max_size=2)


def names(*asked):
    return [generator.name for generator in lm.generators(*asked)]


def test_groups_and_order():
    assert names("rotation", "translation") == ["rotation", "translation_x", "translation_y"]
    assert names(["shear"], ("stretch",)) == ["shear_x", "shear_y", "stretch_x", "stretch_y"]
    assert len(names("affine")) == 9
    assert names("all") == [*names("affine"), "saturation"]
    own = lm.Generator.affine("own", torch.tensor([[0, 1, 0], [2, 0, 3]]))
    assert lm.generators("scale", own)[1] is own
    assert own.coefficients == (0, 1, 0, 2, 0, 3, 0)


def test_matrices_of_the_named_generators():
    wanted = {
        "translation_x": [[0, 0, 1], [0, 0, 0]],
        "translation_y": [[0, 0, 0], [0, 0, 1]],
        "rotation": [[0, 1, 0], [-1, 0, 0]],
        "hyperbolic_rotation": [[0, 1, 0], [1, 0, 0]],
        "scale": [[-1, 0, 0], [0, -1, 0]],
        "shear_x": [[0, 1, 0], [0, 0, 0]],
        "shear_y": [[0, 0, 0], [1, 0, 0]],
        "stretch_x": [[1, 0, 0], [0, 0, 0]],
        "stretch_y": [[0, 0, 0], [0, 1, 0]],
    }
    for name, rows in wanted.items():
        assert [list(row) for row in GENERATORS[name].matrix] == rows
        assert GENERATORS[name].intensity == 0
    assert GENERATORS["saturation"].coefficients == (0, 0, 0, 0, 0, 0, 1)


def test_vector_space():
    rotation, scale, saturation = lm.generators("rotation", "scale", "saturation")
    combined = 2 * rotation - scale + saturation * 0.5
    assert combined.coefficients == (1, 2, 0, -2, 1, 0, 0.5)
    assert combined.with_name("spiral").name == "spiral"
    assert (-rotation).matrix == ((0, -1, 0), (1, 0, 0))
    with pytest.raises(TypeError):
        rotation + 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        rotation.name = "other"


def test_affine_needs_six_tangents():
    asked = lm.generators("affine")
    basis, combine = spanning_set(asked)
    assert len(basis) == 6
    rows = torch.tensor([g.coefficients for g in basis], dtype=torch.float64)
    wanted = torch.tensor([g.coefficients for g in asked], dtype=torch.float64)
    assert torch.equal(combine @ rows, wanted)


@given(st.lists(matrix, min_size=1, max_size=9))
def test_spanning_set_spans(matrices):
    asked = [lm.Generator.affine(f"g{i}", m) for i, m in enumerate(matrices)]
    basis, combine = spanning_set(asked)
    wanted = torch.tensor([g.coefficients for g in asked], dtype=torch.float64)
    rows = torch.tensor([g.coefficients for g in basis], dtype=torch.float64).reshape(-1, 7)
    assert len(basis) <= 6
    scale = wanted.abs().max() + 1e-300
    assert ((combine @ rows - wanted) / scale).abs().max() < 1e-8


def test_zero_generator_and_tiny_units():
    asked = (lm.Generator.affine("nothing", [[0] * 3] * 2), 1e-9 * lm.generators("rotation")[0])
    basis, combine = spanning_set(asked)
    assert basis == asked[1:]
    assert combine.tolist() == [[0.0], [1.0]]


@given(matrix, number, number)
def test_exponential_is_a_one_parameter_group(entries, s, t):
    generator = lm.Generator.affine("g", entries)
    S, T, both = (exponential(generator, torch.tensor(v, dtype=torch.float64)) for v in (s, t, s + t))
    assert (S @ T - both).abs().max() <= 1e-10 * max(1.0, float(S.norm() * T.norm()))


def test_exponential_is_exactly_the_identity_at_zero():
    for generator in GENERATORS.values():
        assert torch.equal(exponential(generator, torch.zeros(3)), torch.eye(3).expand(3, 3, 3))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 4e-16), (torch.float32, 5e-7)])
def test_exponentials_of_one_matrix_are_as_exact_as_of_many(dtype, rounding):
    """torch's own have a wrong coefficient below a norm of 0.05, or 0.58 in float32."""
    angles = torch.linspace(1e-4, 1, 200, dtype=dtype)
    many = exponential(GENERATORS["rotation"], angles)[:, 0, 1]
    alone = torch.stack([exponential(GENERATORS["rotation"], angle)[0, 1] for angle in angles])
    for found in (many, alone):
        assert (found.double() - angles.double().sin()).abs().max() < rounding


def test_exponential_of_named_generators():
    t = torch.tensor(0.3, dtype=torch.float64)
    c, s = t.cos().item(), t.sin().item()
    assert exponential(GENERATORS["rotation"], t)[:2, :2].flatten().tolist() == pytest.approx([c, s, -s, c])
    assert exponential(GENERATORS["scale"], t).diagonal().tolist() == pytest.approx([0.7408182, 0.7408182, 1])
    ch, sh = t.cosh().item(), t.sinh().item()
    got = exponential(GENERATORS["hyperbolic_rotation"], t)[:2, :2].flatten().tolist()
    assert got == pytest.approx([ch, sh, sh, ch])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lm.generators("rotations"), ValueError, "got 'rotations'. Choose from"),
        (lambda: lm.generators(), ValueError, "at least one generator"),
        (lambda: lm.generators("affine", "scale"), ValueError, r"\['scale'\] more than once"),
        (lambda: lm.generators(1.5), TypeError, "got 1.5"),
        (lambda: lm.generators(torch.eye(2)), TypeError, "must be names"),
        (lambda: lm.Generator.affine("g", [[1, 2], [3, 4]]), ValueError, r"must be d×\(d \+ 1\)"),
        (lambda: lm.Generator.affine("g", [[1, 2, 3]]), ValueError, r"must be d×\(d \+ 1\)"),
        (lambda: lm.Generator.affine("g", [["a", 2, 3], [1, 2, 3]]), TypeError, "must hold d rows"),
        (lambda: lm.Generator.affine("g", [[1, 2, float("inf")], [1, 2, 3]]), ValueError, "must be finite"),
        (lambda: lm.Generator.affine("a/b", [[0] * 3] * 2), ValueError, "without '/'"),
        (lambda: lm.Generator.affine("", [[0] * 3] * 2), ValueError, "non-empty"),
        (lambda: lm.Generator.affine(3, [[0] * 3] * 2), TypeError, "`name` must be a string"),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_only_numbers_multiply():
    rotation, scale = lm.generators("rotation", "scale")
    with pytest.raises(TypeError, match="unsupported operand"):
        rotation * scale
    assert (0 * rotation).coefficients == (0,) * 7
    assert (rotation - rotation).coefficients == (0,) * 7


@given(st.lists(number, min_size=9, max_size=9))
def test_named_affine_generators_from_their_span(weights):
    """Any combination of the nine is the same combination of their spanning six."""
    asked = lm.generators("affine")
    basis, combine = spanning_set(asked)
    total = sum((weight * generator for weight, generator in zip(weights, asked, strict=True)), 0 * asked[0])
    short = torch.tensor(weights, dtype=torch.float64) @ combine
    rows = torch.tensor([g.coefficients for g in basis], dtype=torch.float64)
    assert (short @ rows).tolist() == pytest.approx(list(total.coefficients), abs=1e-12)


def test_combination():
    names = lm.generators("rotation", "scale", "saturation")
    made = lm.Generator.combination("mix", names, [1.0, -0.5, 2.0])
    assert made == (names[0] - 0.5 * names[1] + 2.0 * names[2]).with_name("mix")
    assert lm.Generator.combination("mix", names, torch.tensor([1.0, -0.5, 2.0])) == made
    with pytest.raises(ValueError, match="`coefficients` must hold 3 numbers, one for each generator, got 2"):
        lm.Generator.combination("mix", names, [1.0, 2.0])


@given(st.lists(matrix, min_size=1, max_size=8))
def test_simplest_basis_spans(matrices):
    asked = [lm.Generator.affine(f"g{index}", rows) for index, rows in enumerate(matrices)]
    basis, combine = simplest_basis(asked)
    assert len(basis) == len(spanning_set(asked)[0])
    wanted = torch.tensor([generator.coefficients for generator in asked], dtype=torch.float64)
    found = torch.tensor([generator.coefficients for generator in basis], dtype=torch.float64).reshape(-1, 7)
    torch.testing.assert_close(combine @ found, wanted, rtol=1e-9, atol=1e-9)


def test_simplest_basis_takes_single_entries_where_they_are_as_few():
    basis, combine = simplest_basis(lm.generators("all"))
    assert all(sum(map(bool, generator.coefficients)) == 1 for generator in basis)
    assert combine.shape == (10, 7)
    assert simplest_basis(lm.generators("rotation"))[0] == lm.generators("rotation")


AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}


@pytest.mark.parametrize("axis", AXES)
def test_rotations_in_space_turn_content_by_the_right_hand(axis):
    (rotation,) = lm.generators(f"rotation_{axis}", dimension=3)
    point = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    matrix = torch.tensor(rotation.matrix, dtype=torch.float64)
    velocity = -(matrix @ torch.cat([point, torch.ones(1, dtype=torch.float64)]))
    assert torch.equal(velocity, torch.linalg.cross(torch.tensor(AXES[axis], dtype=torch.float64), point))


def test_the_plane_lies_in_space():
    for plane, space in (("rotation", "rotation_z"), ("hyperbolic_rotation", "hyperbolic_xy"), ("shear_x", "shear_xy")):
        small = torch.tensor(lm.generators(plane)[0].matrix)
        large = torch.tensor(lm.generators(space, dimension=3)[0].matrix)
        assert torch.equal(large[:2][:, [0, 1, 3]], small), plane


@pytest.mark.parametrize(("group", "names", "rank"), [
    ("translation", 3, 3), ("rotation", 3, 3), ("rigid", 6, 6), ("similarity", 7, 7), ("affine", 19, 12),
    ("all", 20, 13), ("galilean", 9, 9),
])  # fmt: skip
def test_groups_of_space_span(group, names, rank):
    asked = lm.generators(group, dimension=3)
    basis, matrix = spanning_set(asked)
    rows, wanted = coefficients(basis), coefficients(asked)
    assert len(asked) == names
    assert len(basis) == rank
    if rows.shape[1] == wanted.shape[1]:
        torch.testing.assert_close(matrix @ rows, wanted, atol=1e-14, rtol=0)


def test_so3_closes():
    x, y, z = (torch.tensor(g.matrix, dtype=torch.float64)[:, :3] for g in lm.generators("rotation", dimension=3))
    # Fields are read at exp(tA) p: of the right-handed turns -A the brackets are those of the cross product.
    for a, b, c in ((x, y, z), (y, z, x), (z, x, y)):
        torch.testing.assert_close((-a) @ (-b) - (-b) @ (-a), -c)


def test_a_line():
    assert [g.name for g in lm.generators("all", dimension=1)] == ["translation_x", "scale", "saturation"]
    (scale,) = lm.generators("scale", dimension=1)
    assert exponential(scale, torch.tensor(1.0)).tolist() == [[pytest.approx(math.exp(-1)), 0], [0, 1]]


def test_charges_are_numbers_of_the_vector_space():
    boost, turn = lm.generators("boost_x", "rotation")
    mixed = 2 * boost - 3 * turn
    assert mixed.charges == {"boost_x": 2}
    assert mixed.matrix == ((0, -3, 0), (3, 0, 0))
    assert (boost - boost).charges == {}
    basis, matrix = spanning_set([boost, mixed, turn])
    assert len(basis) == 2
    assert matrix[2].tolist() == pytest.approx([2 / 3, -1 / 3])
    assert hash(boost) == hash(lm.Generator("boost_x", [[0] * 3] * 2, charges={"boost_x": 1, "hue": 0}))
    assert lm.Generator("boost_x", [[0] * 3] * 2, charges={"boost_x": 1, "hue": 0}) == boost != -1 * boost
    assert pickle.loads(pickle.dumps(mixed)) == mixed


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lm.generators("rotation_x"), ValueError, "known generators, got 'rotation_x'"),
        (lambda: lm.generators("rotation", dimension=1), ValueError, "known generators of the line"),
        (
            lambda: lm.generators("rotation", dimension=4),
            ValueError,
            "known generators of dimension 4.*Pass `Generator",
        ),
        (lambda: lm.generators(lm.generators("scale"), dimension=3), ValueError, "dimension 3, got 'scale'"),
        (lambda: lm.generators("scale")[0] + lm.generators("scale", dimension=3)[0], ValueError, r"got \[2, 3\]"),
        (lambda: lm.Generator("g", (), charges={"hue": "red"}), TypeError, "`charges` must map"),
        (lambda: lm.Generator("g", (), charges={3: 1.0}), TypeError, "`charges` must map"),
        (lambda: lm.Generator("g", (), charges={"hue": float("nan")}), ValueError, "finite"),
    ],
)
def test_dimensions_and_charges_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
