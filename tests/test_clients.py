"""Networks of real libraries, of which others know that they are equivariant."""

import pytest
import torch

import lie_metric as lm
from lie_metric.representations import Invariant, Packed, Points, Tensors

pytestmark = pytest.mark.slow


def points(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_egnn_pytorch():
    egnn = pytest.importorskip("egnn_pytorch")
    torch.manual_seed(0)
    layer = egnn.EGNN(dim=8, m_dim=8).double()
    features = points(4, 6, 8, seed=1)

    def model(places):
        moved_features, moved = layer(features[: len(places)], places)
        return {"features": moved_features, "places": moved}

    found = lm.functional.relative(
        model, points(4, 6, 3), "rigid", input_representation=Points(3),
        output_representation={"features": Tensors(3, 0), "places": Points(3)},
    )  # fmt: skip
    assert len(found) == 12
    assert max(found.values()) < 1e-13
    scaled = lm.functional.relative(
        model,
        points(4, 6, 3),
        "scale",
        input_representation=Points(3),
        output_representation={"features": Tensors(3, 0)},
    )
    assert scaled["features/scale"] > 1e-11  # its first weights are small


def test_schnet_of_torch_geometric():
    pytest.importorskip("torch_geometric")
    pytest.importorskip("ase")
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import SchNet

    def graph(places, batch):
        i, j = ((batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)).nonzero(as_tuple=True)
        return torch.stack([i, j]), (places[i] - places[j]).norm(dim=-1)

    torch.manual_seed(0)
    network = SchNet(hidden_channels=8, num_filters=8, num_interactions=2, num_gaussians=6, interaction_graph=graph)
    network = network.double()
    molecules = [Data(pos=points(n, 3, seed=n), z=torch.arange(1, n + 1)) for n in (3, 5, 4)]
    found = lm.functional.relative(
        lambda batch: network(batch.z, batch.pos, batch.batch), Batch.from_data_list(molecules), ("rigid", "scale"),
        input_representation={"pos": Packed(Points(3), "batch")}, output_representation=Invariant(),
    )  # fmt: skip
    assert max(value for name, value in found.items() if name != "scale") < 1e-13 < 1e-3 < found["scale"]
