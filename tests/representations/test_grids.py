"""How tensors carry actions: consistency of finite and infinitesimal ones, and what is inferred and what is not."""

import pytest
import torch
from references import central_difference
from torch import nn

import lie_metric as lm
from lie_metric import representations as R
from lie_metric.representations.grids import planar_size, refuse_own_action, scalar_fields

GENERATORS = lm.generators("affine")


@pytest.mark.parametrize(
    ("representation", "shape"),
    [
        (R.Invariant(), (2, 5)),
        (R.Image(), (2, 3, 6, 8)),
        (R.ChannelsLast(), (2, 6, 8, 3)),
        (R.Tokens((3, 4)), (2, 12, 5)),
        (R.Tokens((3, 4), prefix=2), (2, 14, 5)),
    ],
    ids=str,
)
class TestEvery:
    def test_tangents_are_the_derivative_of_the_action(self, representation, shape):
        y = torch.randn(shape, dtype=torch.float64)
        representation.check(y, "output")
        stencil = lm.Resampling("cubic")
        found = representation.tangents(y, GENERATORS, stencil)
        assert found.shape == (9, *shape)
        for generator, value in zip(GENERATORS, found, strict=True):
            slow = central_difference(lambda t, g=generator: representation.act(y, g, t, stencil), 1e-5)
            # Keys' interpolant has a jump in its second derivative at the pixels: the difference is first order.
            torch.testing.assert_close(value, slow, rtol=1e-3, atol=2e-3)

    def test_components_hold_every_entry_once(self, representation, shape):
        y = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        blocks = representation.components(y)
        assert all(block.ndim == 3 and block.shape[0] == 2 for block in blocks)
        entries = torch.cat([block.flatten() for block in blocks])
        assert torch.equal(entries.sort().values, y.flatten())

    def test_it_is_one(self, representation, shape):
        assert isinstance(representation, R.Representation)


def test_layouts_say_the_same():
    image = torch.randn(2, 3, 4, 5)
    args = (GENERATORS, lm.Resampling())
    wanted = R.Image().tangents(image, *args)
    last = R.ChannelsLast().tangents(image.permute(0, 2, 3, 1), *args)
    tokens = R.Tokens((4, 5), 1).tangents(torch.cat([torch.ones(2, 1, 3), image.flatten(2).mT], 1), *args)
    torch.testing.assert_close(last.permute(0, 1, 4, 2, 3), wanted)
    torch.testing.assert_close(tokens[:, :, 1:].mT.unflatten(-1, (4, 5)), wanted)
    assert not tokens[:, :, 0].any()


@pytest.mark.parametrize(("size", "spacing"), [((7,), ()), ((3, 4, 5), ()), ((3, 4, 5), (1, 1, 2.5)), ((4, 6), (1, 2))])
def test_tokens_of_other_grids_move_as_their_fields(size, spacing):
    dimension = len(size)
    asked = lm.generators("all", dimension=dimension)
    field, layout = R.Field(dimension, spacing), R.Tokens(size, 2, spacing)
    grid = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens = torch.cat([torch.ones(2, 2, 3, dtype=torch.float64), grid.flatten(2).mT], 1)
    layout.check(tokens, "output")
    stencil = lm.Resampling()
    moved = layout.tangents(tokens, asked, stencil)
    torch.testing.assert_close(moved[:, :, 2:].mT.unflatten(-1, size), field.tangents(grid, asked, stencil))
    assert not moved[:, :, :2].any()
    for generator in asked:
        found = layout.act(tokens, generator, 0.2, stencil)
        torch.testing.assert_close(found[:, 2:].mT.unflatten(-1, size), field.act(grid, generator, 0.2, stencil))
        assert torch.equal(found[:, :2], tokens[:, :2])
    assert R.grid_size(layout, tokens) == size
    with pytest.raises(ValueError, match=f"of dimension {dimension}"):
        layout.tangents(tokens, lm.generators("scale", dimension=dimension % 3 + 1), stencil)


def test_a_border_brightens_with_the_field():
    padded, (brighter, *others) = (
        R.Padded(R.Image(), (1, 2, 0, 1)),
        lm.generators("saturation", "scale", "perspective_x"),
    )
    x, stencil = torch.randn(2, 1, 5, 6, dtype=torch.float64), lm.Resampling()
    for other in others:
        both, alone = padded.tangents(x, [2 * brighter + other, other], stencil)
        torch.testing.assert_close(both, alone + 2 * x)


def test_tokens_are_scalars_where_their_places_are_equally_far_apart():
    assert scalar_fields(R.Tokens((4, 6), 1))
    spaced = R.Tokens((4, 6), 0, (1, 2))
    assert not scalar_fields(spaced)
    with pytest.raises(TypeError, match=r"on images of scalars with square pixels, got Tokens.*spacing=\(1.0, 2.0\)"):
        planar_size(spaced, torch.zeros(1, 24, 3), "eq_t")
    with pytest.raises(TypeError, match=r"a layout of scalars for `eq_t`, got Tokens\(grid_size=\(7,\)"):
        refuse_own_action(R.Tokens((7,)), "eq_t")


def test_a_transformer_of_volumes_is_as_equivariant_as_its_patches_are_one_voxel():
    """Pointwise attention over voxels as tokens without positions: everything that permutes places commutes with it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double().eval()
    volumes = torch.randn(3, 4, 4, 4, 4, dtype=torch.float64)
    encode = lambda v: layer(v.flatten(2).mT)  # noqa: E731
    options = {"input_representation": R.Field(3), "output_representation": R.Tokens((4, 4, 4))}
    found = lm.functional.lattice_equivariance_error(encode, volumes, "flips", **options)
    assert max(found.values()) < 1e-12
    wrong = options | {"output_representation": R.Tokens((64,))}
    with pytest.raises(ValueError, match="dimension"):
        lm.functional.relative(encode, volumes, "rotation", **wrong)


class Declares(nn.Module):
    def __init__(self, grid=(2, 3), prefix=1):
        super().__init__()
        self.patch_embed = nn.Identity()
        self.patch_embed.grid_size = grid
        self.num_prefix_tokens = prefix


@pytest.mark.parametrize(
    ("shape", "model", "wanted"),
    [
        ((2,), None, R.Invariant()),
        ((2, 10), None, R.Invariant()),
        ((2, 3, 16, 24), None, R.Image()),
        ((2, 7, 8, 12), None, R.Image()),
        ((2, 7, 6, 8), None, R.Image()),  # 16 × 24 in steps of 3, rounded up
        ((2, 7, 4), Declares(), R.Tokens((2, 3), 1)),
        ((2, 7, 4), nn.Sequential(Declares()), R.Tokens((2, 3), 1)),
        ((2, 7, 4), Declares(grid=(4, 4)), None),
        ((2, 7, 4), nn.Sequential(Declares(), Declares(grid=(3, 2))), None),  # which of the two?
        ((2, 7, 4), None, None),
        ((2, 8, 12, 7), None, None),  # channels last must be said
        ((2, 16, 24, 36), None, None),  # fits both layouts
        ((2, 7, 5, 5), None, None),
        ((2, 3, 4, 5, 6), None, None),
    ],
)
def test_inference_only_where_nothing_else_is_possible(shape, model, wanted):
    output, inputs = torch.zeros(shape), torch.zeros(2, 3, 16, 24)
    if wanted is None:
        with pytest.raises(ValueError, match="`output_representation` must be given"):
            R.infer_output_representation(output, inputs, model)
    else:
        assert R.infer_output_representation(output, inputs, model) == wanted


def test_numbers_from_points_of_a_line():
    found = R.infer_output_representation(torch.zeros(2, 1), torch.zeros(2, 5, 1), None, R.Points(1))
    assert found == R.Invariant()  # a vector of one component is as often an energy


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: R.Image().check(torch.zeros(2, 3, 4), "inputs"),
            r"`inputs` must be non-empty with axes \(B, C, H, W\)",
        ),
        (lambda: R.ChannelsLast().check(torch.zeros(0, 3, 4, 2), "output"), r"\(B, H, W, C\)"),
        (lambda: R.Tokens((2, 2)).check(torch.zeros(2, 5, 3), "output"), "must have 4 tokens"),
        (lambda: R.Tokens((2, 0)), "`grid_size` must be two positive"),
        (lambda: R.Tokens((2, 2), -1), "`prefix` not negative"),
        (lambda: R.Tokens((2, 2), 0, (1,)), r"`spacing` must hold 2 positive distances.*got \(1,\)"),
        (lambda: R.Tokens((2, 2), 1.5), r"`prefix` not negative, got \(2, 2\) and 1.5"),
        (lambda: R.Tokens((4.7, 4)), r"`grid_size` must be two positive integers, .* got \(4.7, 4\)"),
        (lambda: R.Tokens(14), "`grid_size` must be two positive integers, .* got 14 and 0"),
        (lambda: R.Invariant().check(torch.tensor(1.0), "output"), "batch axis"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()
