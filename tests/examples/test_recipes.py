"""Each recipe runs, and finds what its network was made to have."""

import pytest

EXACT = {
    "crystals": {"rotation_x", "rotation_y", "rotation_z"},
    "graphs": {"energy/rotation_x", "forces/rotation_x", "forces/rotation_y", "forces/rotation_z"},
    "dynamics": {"energy"},
    "ones_own": {"rotation", "scale"},
}
"""What is equivariant by construction."""


@pytest.fixture
def recipes(example):
    return example("recipes")


@pytest.mark.parametrize(
    "name",
    [
        "classifier", "transformers", "segmentation", "keypoints", "detection", "flow", "self_supervised", "diffusion",
        "volumes", "signals", "point_clouds", "graphs", "crystals", "stress", "dynamics", "ones_own", "plain_loop",
    ],
)  # fmt: skip
def test_recipe(recipes, name, capsys):
    for package in {"transformers": ["transformers"], "graphs": ["torch_geometric"]}.get(name, []):
        pytest.importorskip(package)
    found = recipes.main([name])[name]
    exact = EXACT.get(name, set())
    assert exact <= set(found)
    for key, value in found.items():
        assert (value < 1e-5) == (key in exact), (key, value)
    assert name in capsys.readouterr().out


def test_all_are_tested(recipes):
    mark = test_recipe.pytestmark[0]
    assert set(mark.args[1]) == set(recipes.RECIPES)


def test_unknown_recipe(recipes, capsys):
    with pytest.raises(SystemExit):
        recipes.main(["molecule"])
    assert "there is no recipe 'molecule'" in capsys.readouterr().err
