"""Inputs and outputs with named parts: one measurement of all equals one of each, and nothing else is touched."""

import dataclasses
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric.binding import bind, resolve_for
from lie_metric.functional.noise import like_tangents
from lie_metric.options import Options
from lie_metric.representations import (
    DirectSum,
    Flow,
    Image,
    Invariant,
    Linear,
    Masked,
    Packed,
    Parts,
    Points,
    Representation,
    Tensors,
    Vectors,
    Velocities,
)

RIGID = ("translation", "rotation")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Messages(nn.Module):
    """An equivariant network on positions and velocities: distances weigh differences."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 1)).double()

    def forward(self, pos, vel):
        apart = pos[:, :, None] - pos[:, None]
        weight = self.net(apart.square().sum(-1, keepdim=True))
        step = (apart * weight).sum(2)
        return {"pos": pos + step, "vel": vel + step, "energy": weight.mean((1, 2, 3))}


class Graphs(nn.Module):
    """The same on a batch of graphs, its nodes in one axis, with other layers for each kind of atom."""

    def __init__(self, equivariant=True):
        super().__init__()
        torch.manual_seed(1)
        self.equivariant = equivariant
        self.kinds = nn.Embedding(4, 3).double()
        self.net = nn.Sequential(nn.Linear(7 if equivariant else 9, 8), nn.SiLU(), nn.Linear(8, 1)).double()

    def forward(self, graphs):
        pos, batch = graphs["pos"], graphs["batch"]
        i, j = ((batch[:, None] == batch) & ~torch.eye(len(batch), dtype=bool)).nonzero(as_tuple=True)
        apart, kind = pos[i] - pos[j], self.kinds(graphs["z"])
        seen = apart.square().sum(-1, keepdim=True) if self.equivariant else apart
        weight = self.net(torch.cat([kind[i], kind[j], seen.to(pos)], dim=1))
        energy = pos.new_zeros(int(batch.max()) + 1, 1).index_add(0, batch[i], weight)
        return {"energy": energy, "forces": torch.zeros_like(pos).index_add(0, i, apart * weight)}


def graphs(sizes, seed=0, dtype=torch.float64):
    nodes = sum(sizes)
    return {
        "pos": random(nodes, 3, seed=seed, dtype=dtype),
        "z": torch.arange(nodes) % 4,
        "batch": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
    }


PACKED_IN = {"pos": Packed(Points(3), "batch")}
PACKED_OUT = {"energy": Invariant(), "forces": Packed(Vectors(3), "batch")}
PAIR_IN = {"0": Points(3), "1": Velocities(3)}
PAIR_OUT = {"pos": Points(3), "vel": Velocities(3), "energy": Invariant()}


class TestLieDerivatives:
    def test_an_equivariant_network_has_none(self):
        inputs = random(4, 5, 3), random(4, 5, 3, seed=1)
        found = lm.lie_derivative(
            Messages(), inputs, RIGID, input_representation=PAIR_IN, output_representation=PAIR_OUT
        )
        assert len(found) == 18
        assert max(value.abs().max() for value in found.values()) < 1e-14

    def test_exact_zeros_of_what_responds_are_no_sign_of_rest(self, recwarn):
        lm.lie_derivative(
            Messages(), (random(4, 5, 3), random(4, 5, 3)), "translation", input_representation=PAIR_IN,
            output_representation=PAIR_OUT,
        )  # fmt: skip
        assert not [one for one in recwarn if "does not move" in str(one.message)]

    def test_a_boost_that_is_forgotten_shows(self):
        inputs = random(4, 5, 3), random(4, 5, 3, seed=1)
        given = {"input_representation": {"0": Points(3), "1": Velocities(3)}}
        right = lm.lie_derivative(Messages(), inputs, "boost_x", **given, output_representation={"vel": Velocities(3)})
        assert not right["vel/boost_x"].abs().max() > 1e-14
        wrong = lm.lie_derivative(Messages(), inputs, "boost_x", **given, output_representation={"vel": Vectors(3)})
        torch.testing.assert_close(wrong["vel/boost_x"], torch.tensor([-1.0, 0, 0]).double().expand(4, 5, 3))

    def test_against_finite_motions(self):
        model, batch, h = Graphs(equivariant=False), graphs((3, 4, 2)), 1e-4
        found = lm.lie_derivative(
            model, batch, "rotation", input_representation=PACKED_IN, output_representation=PACKED_OUT
        )
        for X in lm.generators("rotation", dimension=3):

            def turned(t, X=X):
                moved = model({**batch, "pos": Points(3).act(batch["pos"], X, t, None)})
                return moved["energy"], Vectors(3).act(moved["forces"], X, -t, None)

            ahead, behind = turned(h), turned(-h)
            for part, a, b in zip(("energy", "forces"), ahead, behind, strict=True):
                torch.testing.assert_close(found[f"{part}/{X.name}"], (a - b) / (2 * h), atol=1e-6, rtol=1e-6)
            assert found[f"energy/{X.name}"].abs().max() > 1e-2

    @pytest.mark.parametrize("method", ["forward", "double_backward", "reverse", "difference"])
    def test_methods_agree(self, method):
        model, batch = Graphs(equivariant=False), graphs((3, 2))
        options = {"input_representation": PACKED_IN, "output_representation": PACKED_OUT}
        with torch.no_grad():
            wanted = lm.lie_derivative(model, batch, "rotation_x", **options)
            found = lm.lie_derivative(model, batch, "rotation_x", method=method, **options)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-8, rtol=1e-8)

    def test_what_is_not_named_stays(self):
        batch = graphs((3, 4))
        before = {key: value.clone() for key, value in batch.items()}
        lm.lie_derivative(Graphs(), batch, "rotation", input_representation=PACKED_IN, output_representation=PACKED_OUT)
        assert all(batch[key] is not None and torch.equal(batch[key], before[key]) for key in before)
        assert batch.keys() == before.keys()

    @pytest.mark.parametrize(
        "kind", ["dict", "tuple", "list", "named tuple", "dataclass", "object", "dotted", "nested"]
    )
    def test_holders(self, kind):
        pos, z, X = random(3, 4, 3), random(3, 4), "rotation_z"

        def energy(pos, z):
            return (pos[..., 0] * z).sum(1)

        wanted = lm.lie_derivative(lambda p: energy(p, z), pos, X, input_representation=Points(3))[X]
        key, call = "pos", lambda batch: energy(batch.pos, batch.z)
        if kind == "dict":
            batch, call = {"pos": pos, "z": z}, lambda batch: energy(batch["pos"], batch["z"])
        elif kind in {"tuple", "list"}:
            batch, key, call = (tuple if kind == "tuple" else list)((pos, z)), "0", energy
        elif kind == "named tuple":
            batch, key, call = namedtuple("Batch", "pos z")(pos, z), "0", energy
        elif kind == "dataclass":
            batch = dataclasses.make_dataclass("Batch", ["pos", "z"])(pos, z)
        elif kind == "object":
            batch = type("Batch", (), {})()
            batch.pos, batch.z = pos, z
        elif kind == "nested":
            batch, key = {"nodes": namedtuple("Nodes", "pos z")(pos, z)}, "nodes.0"
            call = lambda batch: energy(batch["nodes"].pos, batch["nodes"].z)  # noqa: E731
        else:
            batch, key = {"nodes": {"pos": pos}, "z": z}, "nodes.pos"
            call = lambda batch: energy(batch["nodes"]["pos"], batch["z"])  # noqa: E731
        found = lm.lie_derivative(call, batch, X, input_representation={key: Points(3)})[X]
        torch.testing.assert_close(found, wanted)

    def test_unnamed_tensors_are_raised_with_the_rest(self):
        # The check runs the model in float64: what the batch holds besides must come along.
        pos, charge = random(4, 5, 3, dtype=torch.float32), random(4, 5, 2, dtype=torch.float32)
        z = torch.arange(20).reshape(4, 5) % 3
        net, kinds = nn.Linear(3, 2), nn.Embedding(3, 2)

        def model(batch):
            charge, z = batch["atoms"].charge, batch["atoms"].z
            seen = net(batch["pos"]) * kinds(z)  # products of matrices want operands of one dtype
            return (batch["weight"] @ seen.mT).sum((1, 2)) + (charge.mT @ seen).sum((1, 2))

        metric = lm.LocalEquivarianceError("rotation", input_representation={"pos": Points(3)})
        weight = random(4, 1, 2, seed=1, dtype=torch.float32)
        metric.update(model, {"pos": pos, "weight": weight, "atoms": namedtuple("Atoms", "charge z")(charge, z)})
        assert metric.check.status == "agrees"
        assert metric.check.difference < 1e-6

    def test_a_cell_moves_with_its_atoms(self):
        pos, cell = random(4, 5, 3), torch.eye(3).double() * 4 + random(4, 3, 3, seed=1) * 0.1

        def energy(pos, cell):
            apart = pos[:, :, None] - pos[:, None]
            parts = apart @ torch.linalg.inv(cell)[:, None]
            nearest = (parts - parts.round()) @ cell[:, None]
            return (-nearest.square().sum(-1)).exp().sum((1, 2))

        both = {"0": Points(3), "1": Vectors(3)}
        right = lm.lie_derivative(energy, (pos, cell), "rotation", input_representation=both)
        assert max(value.abs().max() for value in right.values()) < 1e-13
        forgotten = lm.lie_derivative(energy, (pos, cell), "rotation", input_representation={"0": Points(3)})
        assert max(value.abs().max() for value in forgotten.values()) > 1e-3


class TestMetric:
    def test_parts_are_what_each_would_be(self):
        model, inputs = Messages(), (random(12, 5, 3), random(12, 5, 3, seed=1))
        generators = (*lm.generators("stretch", dimension=3), *lm.generators("rigid", dimension=3))
        options = {"input_representation": PAIR_IN, "with_noise": True}
        whole = lm.LocalEquivarianceError(generators, **options, output_representation=PAIR_OUT)
        whole.update(model, inputs)
        read = ("relative", "lee", "sensitivity")
        for part, kind in PAIR_OUT.items():
            alone = lm.LocalEquivarianceError(
                generators, **options, output=lambda y, part=part: y[part], output_representation=kind
            )
            alone.update(model, inputs)
            for name in read:
                found, wanted = getattr(whole, name)(), getattr(alone, name)()
                errors, single = whole.standard_error(name), alone.standard_error(name)
                for X in generators:
                    key = f"{part}/{X.name}"
                    torch.testing.assert_close(found[key], wanted[X.name], atol=1e-12, rtol=1e-9, equal_nan=True)
                    torch.testing.assert_close(errors[key], single[X.name], atol=1e-12, rtol=1e-7, equal_nan=True)
        assert "energy (B,): invariant" in whole.described

    def test_graphs_are_what_each_would_be(self):
        model, batch = Graphs(equivariant=False), graphs((3, 4, 2, 5))
        options = {"input_representation": PACKED_IN, "output_representation": PACKED_OUT}
        together = lm.LocalEquivarianceError("rotation", **options)
        together.update(model, batch)
        one_by_one = lm.LocalEquivarianceError("rotation", **options)
        for graph in range(4):
            there = batch["batch"] == graph
            alone = {"pos": batch["pos"][there], "z": batch["z"][there], "batch": batch["batch"][there] * 0}
            one_by_one.update(model, alone)
        for name in ("relative", "lee"):
            for key, value in getattr(together, name)().items():
                torch.testing.assert_close(getattr(one_by_one, name)()[key], value, atol=1e-12, rtol=1e-9)
        assert together.images_fingerprint() == one_by_one.images_fingerprint()
        assert len(together.standard_error()) == 6
        assert together.sum_images.sum() == 4

    def test_relative_is_that_of_its_definition(self):
        model, batch = Graphs(equivariant=False), graphs((3, 4, 2, 5))
        options = {"input_representation": PACKED_IN, "output_representation": PACKED_OUT}
        metric = lm.LocalEquivarianceError("rotation_x", **options)
        metric.update(model, batch)
        L = lm.lie_derivative(model, batch, "rotation_x", **options)
        out = {key: value.detach() for key, value in model(batch).items()}
        energy = L["energy/rotation_x"].square().sum() / (4 * out["energy"].var())
        forces = L["forces/rotation_x"].square().sum() / out["forces"].square().sum()  # nothing is taken off vectors
        found = metric.relative()
        torch.testing.assert_close(found["energy/rotation_x"].square(), energy.detach())
        torch.testing.assert_close(found["forces/rotation_x"].square(), forces.detach())

    def test_padding_does_not_count(self):
        def model(batch):
            there = batch["mask"][..., None]
            pos = batch["pos"] * there
            return {
                "dipole": (pos * torch.tensor([1.0, 2, 3])).sum(1),
                "moved": batch["pos"] * torch.tensor([1.0, 2, 3]),
            }

        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
        options = {
            "input_representation": {"pos": Masked(Points(3), "mask")},
            "output_representation": {"dipole": Vectors(3), "moved": Masked(Vectors(3), "mask")},
        }
        values = []
        for filling in (0.0, 100.0):
            pos = torch.where(mask[..., None], random(3, 4, 3), torch.tensor(filling, dtype=torch.float64))
            metric = lm.LocalEquivarianceError("rotation", **options)
            metric.update(model, {"pos": pos, "mask": mask})
            values.append(metric.relative())
        for key, value in values[0].items():
            assert value > 0.1
            torch.testing.assert_close(values[1][key], value)

    def test_padding_has_no_part_in_means_over_entries(self):
        mask, pos = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool(), random(3, 4, 3)
        stretch = torch.tensor([1.0, 2, 3]).double()
        padded = lm.functional.lee(
            lambda batch: batch["pos"] * stretch, {"pos": pos, "mask": mask}, "rotation",
            input_representation={"pos": Masked(Points(3), "mask")}, output_representation=Masked(Vectors(3), "mask"),
        )  # fmt: skip
        each = [
            lm.functional.lee(
                lambda x: x * stretch, row[there][None], "rotation", input_representation=Points(3),
                output_representation=Vectors(3),
            )
            for row, there in zip(pos, mask, strict=True)
        ]  # fmt: skip
        for name, value in padded.items():
            torch.testing.assert_close(value, torch.stack([one[name] for one in each]).mean())

    def test_anchors(self):
        directions = nn.functional.normalize(random(4000, 3), dim=1)

        def isotropic(points):
            return directions[: len(points)] + 0 * points.sum((1, 2))[:, None]

        kinds = {"input_representation": Points(3), "output_representation": Vectors(3)}
        metric = lm.LocalEquivarianceError("rotation", **kinds)
        with pytest.warns(UserWarning, match="does not move"):
            metric.update(isotropic, random(4000, 2, 3))
        for value in metric.relative().values():
            assert value.item() == pytest.approx((2 / 3) ** 0.5, abs=0.01)

        def constant(points):
            return torch.tensor([3.0, 4.0], dtype=points.dtype) + 0 * points.sum((1, 2))[:, None]

        kinds = {"input_representation": Points(2), "output_representation": Vectors(2)}
        for images in (random(1, 5, 2), random(3, 5, 2)):  # a single one has a spread too
            metric = lm.LocalEquivarianceError("rotation", **kinds)
            with warnings.catch_warnings(record=True) as told:
                metric.update(constant, images)
            assert all("does not move" in str(one.message) for one in told)
            assert metric.relative()["rotation"].item() == pytest.approx(1)

    def test_a_tensor_and_its_deviator(self):
        # p + s with the pressure p: about its mean trace the spread is that of both, without it that of s alone.
        stress = random(200, 3, 3)
        stress = stress + stress.mT + 100 * torch.eye(3)

        def model(points):
            return stress + 0 * points.sum((1, 2))[:, None, None]

        metric = lm.LocalEquivarianceError(
            "rotation_x", input_representation=Points(3), output_representation=Tensors(3, 2)
        )
        with pytest.warns(UserWarning, match="does not move"):
            metric.update(model, random(200, 4, 3))
        trace = stress.diagonal(dim1=1, dim2=2).sum(1)
        deviator = stress - trace[:, None, None] * torch.eye(3) / 3
        change = Tensors(3, 2).tangents(stress, lm.generators("rotation_x", dimension=3), lm.Resampling())[0]
        wanted = change.square().sum() / (deviator.square().sum() + 200 * trace.var() / 3)
        torch.testing.assert_close(metric.relative()["rotation_x"].square(), wanted)

    def test_noise_is_as_large_as_the_motion_of_each_part(self):
        moved = {"0": Points(3), "1": Vectors(3)}

        def model(pos, cell):
            return torch.cat([pos.flatten(1), 1000 * cell], dim=1)

        metric = lm.LocalEquivarianceError(
            "rotation", "sensitivity", input_representation=moved, output_representation=Invariant()
        )
        metric.update(model, (random(50, 6, 3), random(50, 3, seed=1)))
        for value in metric.compute().values():
            assert value.item() == pytest.approx(1)

    def test_noise_of_each_part_and_graph_is_its_own(self):
        same = random(1, 1, 4, 3).expand(1, 2, 4, 3)
        both = Parts({"0": Vectors(3), "1": Vectors(3)}, ((2, 4, 3),) * 2)
        first, second = both.split(like_tangents(both.join([same[0], same[0]])[None], both, [3, 4], 0))
        assert not torch.allclose(first, second)
        graphs = same.reshape(1, 8, 3)
        noise = like_tangents(graphs, Packed(Vectors(3), torch.tensor([0] * 4 + [1] * 4)), [3, 4], 0)
        assert not torch.allclose(noise[:, :4], noise[:, 4:])
        # It goes with the number of the graph, whatever batch it is in.
        alone = like_tangents(graphs[:, 4:], Packed(Vectors(3), torch.zeros(4, dtype=torch.long)), [4], 0)
        assert torch.equal(alone, noise[:, 4:])

    def test_scores_with_a_name_are_measured_as_they_are(self):
        options = {
            "input_representation": {"pos": Points(3)},
            "output_representation": {"scores": Invariant()},
            "lee_output": "auto",
        }
        metric = lm.LocalEquivarianceError("rotation_z", "lee", **options)
        batch = {"pos": random(4, 5, 3)}
        metric.update(lambda inputs: {"scores": inputs["pos"].sum(1)}, batch)
        total = batch["pos"].sum(1)
        wanted = total[:, :2].square().sum(1).mean() / 3
        torch.testing.assert_close(metric.compute()["scores/rotation_z"], wanted)

    def test_what_needs_one_part_says_so(self):
        metric = lm.LocalEquivarianceError("rotation", input_representation=PAIR_IN, output_representation=PAIR_OUT)
        metric.update(Messages(), (random(4, 5, 3), random(4, 5, 3, seed=1)))
        for read in (lambda: metric.gram, metric.principal_directions):
            with pytest.raises(ValueError, match="must be of one part"):
                read()
        with pytest.raises(ValueError, match="must be of one part"):
            lm.functional.principal_directions(
                Messages(), (random(4, 5, 3), random(4, 5, 3, seed=1)), "rotation",
                input_representation=PAIR_IN, output_representation=PAIR_OUT,
            )  # fmt: skip
        with pytest.raises(ValueError, match="have no pixels"):
            metric.relative("pixel")
        assert metric.parameter_units[:3] == ("radian",) * 3
        assert lm.LocalEquivarianceError("translation", input_representation=Points(3)).parameter_units[0] == (
            "unit of length"
        )

    def test_records_compare(self):
        a, b = (
            lm.LocalEquivarianceError("rotation", input_representation=PACKED_IN, output_representation=PACKED_OUT)
            for _ in range(2)
        )
        sizes = [3, 4, 2, 5] * 8
        a.update(Graphs(equivariant=False), graphs(sizes))
        b.update(Graphs(equivariant=False), graphs(sizes))
        assert {row.ratio for row in lm.compare(a, b)} == {1.0}
        c = lm.LocalEquivarianceError("rotation", input_representation=PACKED_IN, output_representation=PACKED_OUT)
        c.update(Graphs(equivariant=False), graphs(sizes, seed=5))
        with pytest.raises(ValueError, match="images"):
            lm.compare(a, c)


class TestRefusals:
    @pytest.mark.parametrize(
        ("inputs", "layout", "error", "match"),
        [
            ({"pos": random(3, 3)}, {"p": Points(3)}, KeyError, r"must have a part 'p', got dict with \['pos'\]"),
            ((random(3, 3),), {"1": Points(3)}, KeyError, r"a part '1', got tuple with \['0'\]"),
            ({"pos": torch.arange(6).reshape(2, 3)}, {"pos": Points(3)}, TypeError, "floating-point.*int64"),
            ({"pos": random(3, 4)}, {"pos": Points(3)}, ValueError, r"`inputs\['pos'\]`.*got shape \(3, 4\)"),
            ({"pos": random(3, 3) / 0}, {"pos": Points(3)}, ValueError, "must be finite"),
            ({}, {}, ValueError, "at least one part"),
            ((random(2, 3), random(3, 3)), {"0": Points(3), "1": Points(3)}, ValueError, "one batch axis"),
            ((random(2, 3), random(2, 2)), {"0": Points(3), "1": Points(2)}, ValueError, "one dimension"),
            ({"pos": random(3, 3)}, {"pos": Packed(Points(3), "batch")}, KeyError, "a part 'batch'"),
        ],
    )
    def test_inputs(self, inputs, layout, error, match):
        with pytest.raises(error, match=match):
            bind(lambda *x: x[0], inputs, Options(input_representation=layout))

    def test_packed_alone(self):
        with pytest.raises(TypeError, match="name the part that is packed"):
            bind(lambda x: x, random(3, 3), Options(input_representation=Packed(Points(3), torch.zeros(3).long())))

    def test_outputs(self):
        batch = graphs((3, 2))
        ask = lambda out: lm.lie_derivative(Graphs(), batch, "rotation", input_representation=PACKED_IN, **out)  # noqa: E731
        with pytest.raises(KeyError, match="a part 'dipole', got dict with"):
            ask({"output_representation": {"dipole": Vectors(3)}})
        with pytest.raises(ValueError, match=r"`output\['forces'\]`"):
            ask({"output_representation": {"forces": Packed(Points(2), "batch")}})
        with pytest.raises(ValueError, match="must be given for an output of shape"):
            ask({"output": lambda y: y["forces"]})
        with pytest.raises(ValueError, match="not be 'probabilities'"):
            ask({"output": "probabilities", "output_representation": PACKED_OUT})

    def test_nodes_that_belong_to_nothing(self):
        metric = lm.LocalEquivarianceError(
            "rotation", input_representation=PACKED_IN, output_representation={"forces": Vectors(3)}
        )
        with pytest.raises(ValueError, match=r"`output\['forces'\]` must have one entry for each of the 2"):
            metric.update(Graphs(), graphs((3, 2)))

    def test_generators_that_nothing_reads(self):
        with pytest.raises(ValueError, match=r"got 'boost_x' with \['boost_x'\]"):
            resolve_for("boost_x", Points(3))
        with pytest.raises(ValueError, match=r"got 'saturation' with \['intensity'\]"):
            resolve_for("all", {"pos": Points(3)})
        assert len(resolve_for("all", None)) == 10
        with pytest.raises(ValueError, match="known generators of space, got 'shear_x'"):
            resolve_for("shear_x", Points(3))

    def test_dimension_of_representations_of_ones_own(self):
        class Own:
            def check(self, tensor, name):
                pass

            tangents = act = components = check

        assert isinstance(Own(), Representation)
        assert len(resolve_for(lm.generators("rotation", dimension=3), Own())) == 3
        assert resolve_for("rotation", Own())[0].dimension == 2
        assert len(resolve_for("boost_x", {"own": Own(), "pos": Points(2)})) == 1  # it may read any charge
        assert len(resolve_for("boost_x", Parts({"own": Own(), "pos": Points(2)}, ((1, 2), (1, 2))))) == 1

    def test_charges_are_read_through_what_is_around(self):
        for around in (Masked(Velocities(3), "mask"), Packed(Velocities(3), "batch")):
            assert resolve_for("boost_x", {"vel": around})[0].name == "boost_x"
        states = DirectSum((Points(3), Velocities(3)))
        assert resolve_for("boost_x", states)[0].name == "boost_x"
        spin = Linear({lm.Generator("spin", ((0.0,) * 3,) * 2, charges={"spin": 1.0}): [[0, 1], [-1, 0]]})
        assert resolve_for(lm.Generator("spin", ((0.0,) * 3,) * 2, charges={"spin": 1.0}), spin)
        flow = Flow({"time": torch.sin})
        assert resolve_for(flow.generators, flow) == flow.generators

    def test_points_have_no_stencil(self):
        for layout in (Points(3), {"pos": Points(3)}):
            with pytest.raises(ValueError, match="there is no stencil"):
                lm.StencilError("rotation", input_representation=layout)

    @pytest.mark.parametrize("measure", [lm.RelativeStability, lm.BandLimitedEquivariance])
    def test_measures_of_one_tensor(self, measure):
        metric = measure(input_representation={"pos": Points(3)})
        with pytest.raises(TypeError, match="one representation for this measure"):
            metric.update(lambda x: x, {"pos": random(3, 4, 3)})

    def test_images_beside_points(self):
        image, place = random(3, 1, 8, 8), random(3, 2)

        def model(image, place):
            return image.mean((1, 2, 3)) * place[:, 0]

        both = {"0": Image(), "1": Points.of_image(8, 8)}
        found = lm.lie_derivative(model, (image, place), ("rotation", "saturation"), input_representation=both)
        torch.testing.assert_close(found["saturation"], model(image, place))
