"""What is known exactly: networks equivariant by construction, planted violations, conservation, the virial."""

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric import functional as F
from lie_metric.representations import (
    Boxes,
    Covectors,
    DirectSum,
    Field,
    Flow,
    Image,
    Invariant,
    Irreps,
    Packed,
    Points,
    Tensors,
    Vectors,
    Velocities,
)

RIGID = ("translation", "rotation")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def largest(values):
    return max(value.abs().max().item() for value in values.values())


def relative(model, inputs, generators=RIGID, **options):
    return lm.functional.relative(model, inputs, generators, **options)


class EGNN(nn.Module):
    """Satorras, Hoogeboom & Welling (2021), Eqs. 3 to 7, with velocities and an energy."""

    def __init__(self, width=8, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(width))
        for name, inside, outside in (("edge", 2 * width + 1, width), ("step", width, 1), ("node", 2 * width, width)):
            self.add_module(
                name,
                nn.ModuleList(
                    nn.Sequential(nn.Linear(inside, width), nn.SiLU(), nn.Linear(width, outside)) for _ in range(layers)
                ),
            )
        self.drive = nn.ModuleList(nn.Linear(width, 1) for _ in range(layers))
        self.double()

    def forward(self, pos, vel):
        h = self.embed.expand(*pos.shape[:2], -1)
        for edge, step, node, drive in zip(self.edge, self.step, self.node, self.drive, strict=True):
            apart = pos[:, :, None] - pos[:, None]
            pair = torch.cat(
                [
                    h[:, :, None].expand(-1, -1, pos.shape[1], -1),
                    h[:, None].expand(-1, pos.shape[1], -1, -1),
                    apart.square().sum(-1, keepdim=True),
                ],
                dim=-1,
            )
            message = edge(pair)
            vel = drive(h) * vel + (apart * step(message)).sum(2) / pos.shape[1]
            pos = pos + vel
            h = h + node(torch.cat([h, message.sum(2)], dim=-1))
        return {"pos": pos, "vel": vel, "energy": h.sum((1, 2))}


class TestExactlyEquivariant:
    def test_egnn(self):
        found = relative(
            EGNN(), (random(8, 5, 3), random(8, 5, 3, seed=1)),
            input_representation={"0": Points(3), "1": Vectors(3)},
            output_representation={"pos": Points(3), "vel": Vectors(3), "energy": Invariant()},
        )  # fmt: skip
        assert len(found) == 18
        for name, value in found.items():
            assert value < 1e-14, name

    @pytest.mark.parametrize("degrees", ["4x0e", "2x0e+2x1o", "2x0e+1x1o+1x2e"])
    def test_e3nn(self, degrees):
        o3 = pytest.importorskip("e3nn.o3")
        torch.manual_seed(0)
        product = o3.FullyConnectedTensorProduct(degrees, degrees, "2x0e+1x1o+1x1e+1x2e").double()
        gate = nn.Identity()

        def model(x, y):
            return gate(product(x, y))

        size = o3.Irreps(degrees).dim
        kinds = {"0": Irreps(degrees), "1": Irreps(degrees)}
        inputs = random(8, size), random(8, size, seed=1)
        found = relative(model, inputs, input_representation=kinds, output_representation=Irreps("2x0e+1x1o+1x1e+1x2e"))
        # Tensor products of e3nn hold coefficients in float32.
        assert max(found.values()) < (1e-6 if "1o" in degrees else 1e-14)

    def test_circular_convolutions(self):
        torch.manual_seed(0)
        stencil = lm.Resampling("fourier", "circular")
        for layer, shape in ((nn.Conv1d(2, 3, 3), (4, 2, 16)), (nn.Conv3d(2, 3, 3), (2, 2, 8, 8, 8))):
            dimension = len(shape) - 2
            circular = type(layer)(2, 3, 3, padding=1, padding_mode="circular").double()
            model = nn.Sequential(circular)
            field = Field(dimension)
            found = lm.lie_derivative(
                model, random(*shape), "translation", input_representation=field, output_representation=field,
                resampling=stencil,
            )  # fmt: skip
            assert len(found) == dimension
            assert largest(found) < 1e-12

    def test_lorentz_boosts(self):
        # Four coordinates (ct, x, y, z): a boost mixes ct and x symmetrically.
        boosts = []
        for axis in (1, 2, 3):
            matrix = torch.zeros(4, 5)
            matrix[0, axis] = matrix[axis, 0] = 1
            boosts.append(lm.Generator.affine(f"lorentz_{axis}", matrix))
        metric = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)

        def products(events):
            apart = events[:, :, None] - events[:, None]
            return (apart * metric * apart).sum(-1).flatten(1)

        found = lm.lie_derivative(products, random(4, 5, 4), boosts, input_representation=Points(4))
        assert largest(found) < 1e-13
        euclidean = lm.lie_derivative(
            lambda events: (events[:, :, None] - events[:, None]).square().sum(-1).flatten(1), random(4, 5, 4), boosts,
            input_representation=Points(4),
        )  # fmt: skip
        assert largest(euclidean) > 1

    def test_packed_graphs(self):
        geometric = pytest.importorskip("torch_geometric")
        from torch_geometric.data import Batch, Data
        from torch_geometric.nn import MessagePassing

        assert geometric.__version__

        class Layer(MessagePassing):
            def __init__(self):
                super().__init__(aggr="add")
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1)).double()

            def forward(self, batch):
                return {"forces": self.propagate(batch.edge_index, pos=batch.pos)}

            def message(self, pos_i, pos_j):
                apart = pos_i - pos_j
                return apart * self.net(apart.square().sum(-1, keepdim=True))

        def graph(atoms, seed):
            pairs = torch.cartesian_prod(torch.arange(atoms), torch.arange(atoms)).T
            return Data(pos=random(atoms, 3, seed=seed), edge_index=pairs[:, pairs[0] != pairs[1]])

        batch = Batch.from_data_list([graph(3 + k % 3, k) for k in range(5)])
        found = lm.lie_derivative(
            Layer(), batch, RIGID, input_representation={"pos": Packed(Points(3), "batch")},
            output_representation={"forces": Packed(Vectors(3), "batch")},
        )  # fmt: skip
        assert largest(found) < 1e-14

    def test_an_image_and_its_keypoints(self):
        grid = torch.stack(torch.meshgrid(*[torch.arange(48.0).double()] * 2, indexing="xy"), dim=-1)
        places = 24 + 4 * random(6, 2)

        def blobs(places):
            return (-(grid - places[:, None, None]).square().sum(-1) / 18).exp()[:, None]

        def centre(image):
            weights = image[:, 0] / image[:, 0].sum((1, 2), keepdim=True)
            return (weights[..., None] * grid).sum((1, 2))

        right = relative(centre, blobs(places), output_representation=Points.of_image(48, 48))
        wrong = relative(centre, blobs(places), output_representation=Invariant())
        assert max(right.values()) < 2.4e-4
        assert wrong["translation_x"] > 3  # half of the side over the spread of the places

    @pytest.mark.parametrize("kind", [Points, Boxes])
    @pytest.mark.parametrize("stencil", [lm.PAPER, lm.Resampling("cubic"), lm.Resampling("cubic", align_corners=True)])
    def test_a_centre_of_mass_in_the_unit_of_the_stencil(self, kind, stencil):
        """Central differences move the centre of an image with black borders by one pixel, whatever the unit."""
        image = torch.nn.functional.pad(random(6, 1, 7, 9).abs(), (5, 5, 5, 5))
        x, y = torch.arange(19.0).double(), torch.arange(17.0).double()

        def centre(image):
            weights = image[:, 0] / image[:, 0].sum((1, 2), keepdim=True)
            place = torch.stack([(weights * x).sum((1, 2)), (weights * y[:, None]).sum((1, 2))], 1)
            return place if kind is Points else torch.cat([place - 1, place + 1], 1)

        right = kind.of_image(17, 19, align_corners=stencil.align_corners)
        other = kind.of_image(17, 19, align_corners=not stencil.align_corners)
        assert type(right) is kind
        assert right.unit == (8.0 if stencil.align_corners else 8.5)
        found = relative(centre, image, "translation", output_representation=right, resampling=stencil)
        assert max(found.values()) < 1e-12
        shifts = lm.orbits.displaced("translation", (2,), border="reflect")
        found = F.finite_equivariance_error(centre, image, shifts, output_representation=right, resampling=stencil)
        assert max(found.values()) < 1e-12
        message = rf"`resampling` must have the unit.*Pass `{kind.__name__}.of_image\(17, 19, align_corners="
        with pytest.raises(ValueError, match=message + str(stencil.align_corners)):
            relative(centre, image, "translation", output_representation=other, resampling=stencil)
        with pytest.raises(ValueError, match=message):
            F.finite_equivariance_error(centre, image, shifts, output_representation=other, resampling=stencil)

    @pytest.mark.parametrize(
        ("fibre", "generator", "wanted"),
        [
            (Covectors(2), "rotation", 0), (Covectors(2), "scale", 0), (Covectors(2), "shear_x", 0),
            (None, "rotation", (5 / 6) ** 0.5),  # of scalars the mean over six images is taken off
            (Vectors(2), "scale", 2),
        ],
    )  # fmt: skip
    def test_an_image_and_its_gradient(self, fibre, generator, wanted):
        frequency = torch.fft.fftfreq(64).square()
        kept = (frequency[:, None] + frequency).sqrt() < 0.03
        image = torch.fft.ifft2(torch.fft.fft2(random(6, 1, 64, 64)) * kept).real
        window = torch.hann_window(64, periodic=False, dtype=torch.float64) ** 3
        image = image * window * window[:, None]

        def gradient(x):
            wide = nn.functional.pad(x, (2, 2, 2, 2), mode="circular")
            weights = torch.tensor([1.0, -8, 0, 8, -1], dtype=x.dtype) / 12
            along_x = nn.functional.conv2d(wide[..., 2:-2, :], weights.reshape(1, 1, 1, 5))
            along_y = nn.functional.conv2d(wide[..., 2:-2], weights.reshape(1, 1, 5, 1))
            return torch.cat([along_x, along_y], dim=1)

        found = relative(gradient, image, (generator,), output_representation=Field(2, fibre=fibre))
        assert found[generator].item() == pytest.approx(wanted, abs=5e-3)


class TestPlanted:
    @pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1])
    def test_a_violation_is_returned_as_planted(self, size):
        # Of standard normal points r² has the variance 2 d; y turns into x, of variance 1.
        def model(points, scale=1.0):
            radius = points.square().sum((1, 2)) / (2 * points[0].numel()) ** 0.5
            return scale * torch.stack([radius, size * points[:, 0, 1]], dim=1)

        points = random(2000, 4, 3)
        options = {"input_representation": Points(3), "output_representation": Invariant()}
        found = relative(model, points, ("rotation_z",), **options)["rotation_z"].item()
        assert found == pytest.approx(size / (1 + size**2) ** 0.5, rel=0.05)  # of so many points
        spread = len(points) * model(points).var(0).sum()
        wanted = (size**2 * points[:, 0, 0].square().sum() / spread).sqrt().item()
        assert found == pytest.approx(wanted, rel=1e-9)
        scaled = relative(lambda p: model(p, 1000.0), points, ("rotation_z",), **options)["rotation_z"].item()
        assert scaled == pytest.approx(found, rel=1e-9)
        # Other units of length: angles stay what they are.
        angstrom = relative(lambda p: model(p / 10), 10 * points, ("rotation_z",), **options)["rotation_z"].item()
        assert angstrom == pytest.approx(found, rel=1e-9)

    @pytest.mark.parametrize("kind", ["perceptron", "point net"])
    def test_networks_that_know_no_symmetry(self, kind):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(15 if kind == "perceptron" else 3, 32), nn.ReLU(), nn.Linear(32, 3)).double()
        model = (lambda p: net(p.flatten(1))) if kind == "perceptron" else (lambda p: net(p).amax(1))
        found = relative(model, random(64, 5, 3), input_representation=Points(3), output_representation=Invariant())
        assert all(0.1 < value < 9 for value in found.values())


class TestMechanics:
    def test_symmetric_generators_on_places_and_cell_give_the_virial(self):
        def energy(pos, cell):
            apart = pos[:, :, None] - pos[:, None]
            within = apart @ torch.linalg.inv(cell)[:, None]
            nearest = (within - within.round()) @ cell[:, None]
            return (-nearest.square().sum(-1)).exp().sum((1, 2))

        pos, cell = random(4, 5, 3), 4 * torch.eye(3).double() + 0.1 * random(4, 3, 3, seed=1)
        found = lm.lie_derivative(
            energy, (pos, cell), ("stretch_x", "hyperbolic_yz"),
            input_representation={"0": Points(3), "1": Vectors(3)},
        )  # fmt: skip
        places, vectors = pos.clone().requires_grad_(), cell.clone().requires_grad_()
        on_pos, on_cell = torch.autograd.grad(energy(places, vectors).sum(), (places, vectors))
        virial = torch.einsum("bni,bnj->bij", on_pos, pos) + torch.einsum("bni,bnj->bij", on_cell, cell)
        torch.testing.assert_close(found["stretch_x"], -virial[:, 0, 0])
        torch.testing.assert_close(found["hyperbolic_yz"], -(virial[:, 1, 2] + virial[:, 2, 1]))
        assert found["stretch_x"].abs().max() > 1e-3

    def test_noether_along_a_trajectory(self):
        # Bodies on springs in a bowl that is not round: L_X H along the way is the rate at which the momentum changes.
        phase_space = DirectSum((Points(2), Covectors(2)))

        def hamiltonian(z):
            q, p = z[..., :2], z[..., 2:]
            springs = (q[:, :, None] - q[:, None]).square().sum((1, 2, 3)) / 4
            return p.square().sum((1, 2)) / 2 + springs + (q[..., 0] ** 4).sum(1) / 4

        def field(z):
            gradient = torch.func.grad(lambda state: hamiltonian(state).sum())(z)
            return torch.cat([gradient[..., 2:], -gradient[..., :2]], dim=-1)

        def spin(z):
            return (z[..., 0] * z[..., 3] - z[..., 1] * z[..., 2]).sum(1)

        flow, (rotation,) = Flow({"time": field}, steps=1), lm.generators("rotation")
        state, path, h = random(1, 3, 4), [], 1e-3
        for _ in range(400):
            path.append(state)
            state = flow.act(state, flow.generators[0], h, lm.Resampling())
        states = torch.cat(path)
        momenta = spin(states)
        # Sixth-order differences of the momentum along the way, between which the integrator's own error is h⁴.
        weights = torch.tensor([-1.0, 9, -45, 0, 45, -9, 1], dtype=torch.float64) / (60 * h)
        rate = nn.functional.conv1d(momenta[None, None], weights[None, None])[0, 0]
        found = lm.lie_derivative(hamiltonian, states[3:-3], "rotation", input_representation=phase_space)["rotation"]
        torch.testing.assert_close(rate, -found, atol=1e-9, rtol=1e-9)
        assert rate.abs().max() > 0.1
        assert rotation.name == "rotation"

    def test_pairwise_springs_conserve_all_momenta(self):
        def field(z):
            q, p = z[..., :2], z[..., 2:]
            return torch.cat([p, -(q[:, :, None] - q[:, None]).sum(2)], dim=-1)

        momenta = {
            "x": lambda z: z[..., 2].sum(1), "y": lambda z: z[..., 3].sum(1),
            "spin": lambda z: (z[..., 0] * z[..., 3] - z[..., 1] * z[..., 2]).sum(1),
        }  # fmt: skip
        assert max(lm.functional.conservation_error(field, random(32, 6, 4), momenta).values()) < 1e-14

    def test_dynamics_are_equivariant_where_the_hamiltonian_is_invariant(self):
        def field(pos, vel):
            return {"pos": vel, "vel": -(pos[:, :, None] - pos[:, None]).sum(2)}

        found = lm.lie_derivative(
            field, (random(8, 5, 3), random(8, 5, 3, seed=1)), "rigid",
            input_representation={"0": Points(3), "1": Velocities(3)},
            output_representation={"pos": Vectors(3), "vel": Vectors(3)},
        )  # fmt: skip
        assert largest(found) < 1e-13


class TestTensors:
    def test_an_image_beside_a_cloud(self):
        # A network of both: an image is turned about its centre as the cloud is about its own.
        image, points = random(4, 1, 12, 12), random(4, 5, 2)

        def model(image, points):
            return torch.einsum("bni,bnj->bij", points, points) * image.square().mean((1, 2, 3))[:, None, None]

        found = lm.lie_derivative(
            model, (image, points), "rotation", input_representation={"0": Image(), "1": Points(2)},
            output_representation=Tensors(2, 2), resampling=lm.Resampling("fourier", "circular"),
        )  # fmt: skip
        alone = lm.lie_derivative(
            lambda image: model(image, points), image, "rotation", output_representation=Tensors(2, 0),
            output=lambda matrix: matrix.diagonal(dim1=1, dim2=2).sum(1),
            resampling=lm.Resampling("fourier", "circular"),
        )  # fmt: skip
        trace = found["rotation"].diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(trace, alone["rotation"])
