"""How do I measure my kind of model? One short recipe for each kind of data, each with a network at random weights.

    python examples/recipes.py            # all of them
    python examples/recipes.py graphs     # one

Every recipe is a function of a few lines: take what stands in it. It returns the relative error of each generator, in
standard deviations of the output per unit of the transform: 0 is equivariant.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import lie_metric as lm
from lie_metric.representations import (
    Boxes,
    Covectors,
    DirectSum,
    Field,
    Image,
    Invariant,
    Packed,
    Points,
    Tensors,
    Vectors,
)

Values = dict[str, Tensor]


def images(count: int = 8, channels: int = 3, size: int = 32) -> Tensor:
    """Smooth random images (B, C, H, W)."""
    drawn = torch.randn(count, channels, size, size)
    return nn.functional.avg_pool2d(drawn, 5, stride=1, padding=2)


def convolutions(inside: int, outside: int, stride: int = 1) -> nn.Module:
    """Three convolutions."""
    return nn.Sequential(
        nn.Conv2d(inside, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, stride, 1), nn.GELU(),
        nn.Conv2d(8, outside, 3, padding=1),
    )  # fmt: skip


def classifier() -> Values:
    """Images to class scores: nothing to say, the output is taken as invariant."""
    model = nn.Sequential(convolutions(3, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return lm.functional.relative(model, images(), ("translation", "rotation"))


def transformers() -> Values:
    """A vision transformer of Hugging Face: the model returns an object with ``logits``, which is found."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    return lm.functional.relative(ViTForImageClassification(config), images(), ("translation", "rotation"))


def segmentation() -> Values:
    """Images to maps of class scores (B, classes, H, W): maps in the proportions of the image move with it."""
    return lm.functional.relative(convolutions(3, 5), images(), ("translation", "rotation"))


def keypoints() -> Values:
    """Images to places (B, K, 2) in pixels: they move with the content."""
    features = convolutions(3, 4)

    def model(x: Tensor) -> Tensor:
        weights = features(x).flatten(2).softmax(-1).unflatten(-1, x.shape[-2:])
        column, row = torch.arange(x.shape[-1]).to(x), torch.arange(x.shape[-2]).to(x)
        return torch.stack([(weights.sum(-2) * column).sum(-1), (weights.sum(-1) * row).sum(-1)], dim=-1)

    places = Points.of_image(32, 32)
    return lm.functional.relative(model, images(), ("translation", "rotation"), output_representation=places)


def detection() -> Values:
    """Images to boxes (B, N, 4) as (x1, y1, x2, y2) in pixels: they do not turn, but move and grow."""
    head = nn.Sequential(convolutions(3, 16, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 12))

    def model(x: Tensor) -> Tensor:
        return head(x).unflatten(1, (3, 4))

    boxes = Boxes.of_image(32, 32)
    return lm.functional.relative(model, images(), ("translation", "scale"), output_representation=boxes)


def flow() -> Values:
    """Two images to a field of displacements (B, 2, H, W): its vectors turn with the images."""
    network = convolutions(6, 2)

    def model(first: Tensor, second: Tensor) -> Tensor:
        return network(torch.cat([first, second], dim=1))

    return lm.functional.relative(
        model, (images(), images()), ("translation", "rotation"),
        input_representation={"0": Image(), "1": Image()}, output_representation=Field(2, fibre=Vectors(2)),
    )  # fmt: skip


def self_supervised() -> Values:
    """A backbone with heads: ``function=`` names what of it is measured."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(convolutions(3, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def encode(self, x: Tensor) -> Tensor:
            return self.backbone(x)

    return lm.functional.relative(Model(), images(), ("translation", "rotation"), function="encode")


def diffusion() -> Values:
    """A denoiser (x, t): ``function=`` says how it is called."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = convolutions(4, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.network(torch.cat([x, t[:, None, None, None].expand(-1, 1, *x.shape[-2:])], dim=1))

    def at_half_time(model: nn.Module, x: Tensor) -> Tensor:
        return model(x, x.new_full((len(x),), 0.5))

    return lm.functional.relative(Denoiser(), images(), ("translation", "rotation"), function=at_half_time)


def volumes() -> Values:
    """Volumes (B, C, D, H, W), slices 3 mm apart: one argument."""
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.GELU(), nn.Conv3d(4, 2, 3, padding=1))
    scans = nn.functional.avg_pool3d(torch.randn(4, 1, 12, 24, 24), 3, stride=1, padding=1)
    return lm.functional.relative(
        network, scans, ("translation", "rotation"), input_representation=Field(3, spacing=(1, 1, 3)),
        output_representation=Field(3, spacing=(1, 1, 3)),
    )  # fmt: skip


def signals() -> Values:
    """Signals (B, C, T): shifts and changes of speed."""
    network = nn.Sequential(nn.Conv1d(1, 8, 5, padding=2), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    waves = nn.functional.avg_pool1d(torch.randn(8, 1, 128), 9, stride=1, padding=4)
    return lm.functional.relative(network, waves, "affine", input_representation=Field(1))


def point_clouds() -> Values:
    """Point clouds (B, N, 3) to class scores."""
    network = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 10))

    def model(points: Tensor) -> Tensor:
        return network(points).amax(1)

    clouds = torch.randn(8, 64, 3)
    return lm.functional.relative(model, clouds, ("translation", "rotation"), input_representation=Points(3))


def graphs() -> Values:
    """A batch of PyTorch Geometric, all nodes in one axis, to energies and forces, measured in one pass."""
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import MessagePassing, global_add_pool

    class Layer(MessagePassing):
        def __init__(self) -> None:
            super().__init__(aggr="add")
            self.weigh = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 1))

        def forward(self, pos: Tensor, edge_index: Tensor) -> Tensor:
            return self.propagate(edge_index, pos=pos)

        def message(self, pos_i: Tensor, pos_j: Tensor) -> Tensor:
            apart = pos_i - pos_j
            return apart * self.weigh(apart.square().sum(-1, keepdim=True))

    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, batch: Any) -> dict[str, Tensor]:
            forces = self.layer(batch.pos, batch.edge_index)
            energy = global_add_pool(forces[:, :1].square(), batch.batch)  # not invariant: it prefers an axis
            return {"energy": energy, "forces": forces}

    def molecule(atoms: int) -> Data:
        pairs = torch.cartesian_prod(torch.arange(atoms), torch.arange(atoms)).T
        return Data(pos=torch.randn(atoms, 3), edge_index=pairs[:, pairs[0] != pairs[1]])

    batch = Batch.from_data_list([molecule(atoms) for atoms in (4, 6, 5, 7)])
    return lm.functional.relative(
        Potential(), batch, "rotation", input_representation={"pos": Packed(Points(3), "batch")},
        output_representation={"energy": Invariant(), "forces": Packed(Vectors(3), "batch")},
    )  # fmt: skip


def crystals() -> Values:
    """Atoms in a periodic cell: both move. Named parts move, everything else in the batch stays."""

    def energy(batch: dict[str, Tensor]) -> Tensor:
        apart = batch["pos"][:, :, None] - batch["pos"][:, None]
        within = apart @ torch.linalg.inv(batch["cell"])[:, None]
        nearest = (within - within.round()) @ batch["cell"][:, None]
        return (batch["charge"][:, :, None] * (-nearest.square().sum(-1)).exp()).sum((1, 2))

    cells = 4 * torch.eye(3) + 0.1 * torch.randn(8, 3, 3)
    batch = {"pos": torch.randn(8, 5, 3), "cell": cells, "charge": torch.rand(8, 5)}
    return lm.functional.relative(
        energy, batch, "rotation", input_representation={"pos": Points(3), "cell": Vectors(3)}
    )


def stress() -> Values:
    """Point clouds to matrices (B, 3, 3) that turn on both sides."""
    network = nn.Linear(3, 3)

    def model(points: Tensor) -> Tensor:
        turned = network(points)
        return torch.einsum("bni,bnj->bij", turned, turned)

    return lm.functional.relative(
        model, torch.randn(8, 20, 3), "rotation", input_representation=Points(3), output_representation=Tensors(3, 2)
    )


def dynamics() -> Values:
    """A learned vector field on states (B, n, q p): how fast momenta and energy drift along its own flow."""
    network = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def hamiltonian(state: Tensor) -> Tensor:
        return state[..., 2:].square().sum((1, 2)) / 2 + network(state).sum((1, 2))

    def field(state: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda z: hamiltonian(z).sum())(state)
        return torch.cat([gradient[..., 2:], -gradient[..., :2]], dim=-1)

    states = torch.randn(32, 5, 4)
    drift = lm.functional.conservation_error(
        field, states, {"energy": hamiltonian, "momentum_x": lambda z: z[..., 2].sum(1)}
    )
    phase_space = DirectSum((Points(2), Covectors(2)))
    symmetry = lm.functional.relative(hamiltonian, states, "translation_x", input_representation=phase_space)
    return drift | {"translation_x of H": symmetry["translation_x"]}


def ones_own() -> Values:
    """A representation of one's own: four methods. Here an angle in degrees, which a rotation adds to."""

    class Angle:
        def check(self, tensor: Tensor, name: str) -> None:
            """Accepts (B,)."""
            if tensor.ndim != 1:
                raise ValueError(f"`{name}` must be angles (B,), got shape {tuple(tensor.shape)}.")

        def tangents(self, tensor: Tensor, generators: Sequence[lm.Generator], resampling: lm.Resampling) -> Tensor:
            """One radian of the generator is 57.3 degrees more."""
            return torch.stack([torch.rad2deg(tensor.new_tensor(self.turn(g))).expand_as(tensor) for g in generators])

        def act(self, tensor: Tensor, generator: lm.Generator, t: Any, resampling: lm.Resampling) -> Tensor:
            """The angle after a time t."""
            return tensor + t * torch.rad2deg(tensor.new_tensor(self.turn(generator)))

        def components(self, tensor: Tensor) -> tuple[Tensor, ...]:
            """One number for each sample."""
            return (tensor[:, None, None],)

        @staticmethod
        def turn(generator: lm.Generator) -> float:
            """By how much a generator turns."""
            return (generator.matrix[0][1] - generator.matrix[1][0]) / 2

    def model(points: Tensor) -> Tensor:
        """The direction of the first point."""
        return torch.rad2deg(torch.atan2(points[:, 0, 1], points[:, 0, 0]))

    return lm.functional.relative(
        model,
        torch.randn(8, 5, 2),
        ("rotation", "scale"),
        input_representation=Points(2),
        output_representation=Angle(),
    )


def plain_loop() -> Values:
    """A training loop of one's own: the monitor's curves from a recorder of fixed images."""
    model = nn.Sequential(convolutions(3, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = lm.Recorder(images(16), ("translation", "rotation"))  # folder="runs/mine", log=wandb.log
    for step in range(3):
        recorder.measure(model, step=step)
        loss = nn.functional.cross_entropy(model(images(16)), torch.arange(16) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = recorder.history[-1]
    return {name: torch.tensor(last[f"equivariance/{name}"]) for name in ("translation_x", "translation_y", "rotation")}


RECIPES: dict[str, Callable[[], Values]] = {
    recipe.__name__: recipe
    for recipe in (
        classifier, transformers, segmentation, keypoints, detection, flow, self_supervised, diffusion, volumes,
        signals, point_clouds, graphs, crystals, stress, dynamics, ones_own, plain_loop,
    )
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Values]:
    """Runs recipes and prints what they measure.

    Args:
        argv: The command line; the default is that of the process.

    Returns:
        The values by recipe.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"some of {', '.join(RECIPES)}; all by default")
    asked = SimpleNamespace(**vars(parser.parse_args(argv)))
    unknown = sorted(set(asked.recipes) - set(RECIPES))
    if unknown:
        parser.error(f"there is no recipe {unknown[0]!r}; choose from {', '.join(RECIPES)}")
    warnings.filterwarnings("ignore", message=".*taken as invariant.*")
    found = {}
    for name in asked.recipes or RECIPES:
        torch.manual_seed(0)
        try:
            found[name] = RECIPES[name]()
        except ModuleNotFoundError as error:
            print(f"{name}: not run, {error.name} is not installed")
            continue
        told = ", ".join(f"{key} {value.item():.2g}" for key, value in found[name].items())
        print(f"{name}: {(inspect.getdoc(RECIPES[name]) or '').splitlines()[0]}\n    {told}", flush=True)
    return found


if __name__ == "__main__":
    main()
