"""How often a measurement makes an accelerator wait for the host, counted on the CPU: per batch, and not per image."""

import pytest
import torch
from cases import cnn, images, vit
from torch.utils._python_dispatch import TorchDispatchMode

import lie_metric as lm
from lie_metric import lie
from lie_metric.binding import by_samples
from lie_metric.functional.sums import grouped, moments
from lie_metric.representations import Image, Invariant


class Calls(TorchDispatchMode):
    """Counts operations, and numbers that are read."""

    def __init__(self):
        super().__init__()
        self.all = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.numbers += func._overloadpacket.__name__ in {"_local_scalar_dense", "equal", "nonzero"}
        return func(*args, **(kwargs or {}))


def numbers_read(run, monkeypatch):
    """How many numbers a call reads from tensors, by Python or by torch."""
    with Calls() as calls:
        lists = []
        real = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(1), real(self))[1])
        run()
        monkeypatch.setattr(torch.Tensor, "tolist", real)
    return calls.numbers + len(lists)


@pytest.mark.parametrize(("build", "most"), [(vit, 2), (cnn, 4)], ids=["vit", "cnn"])
@pytest.mark.parametrize("names", ["rotation", "affine"])
def test_a_batch_reads_few_numbers(build, most, names, monkeypatch):
    model, x = build(), images(6).float()
    metric = lm.LocalEquivarianceError(names)
    metric.update(model.float(), x)
    known = lie.spanning_set(metric.generators)  # of the generators alone: small matrices on the host
    monkeypatch.setattr(lie, "spanning_set", lambda asked: known)
    for count in (1, 2, 6):
        # Whether images are finite, before any work, and derivatives, after it; twice whether buffers have changed.
        assert 2 <= numbers_read(lambda count=count: metric.update(model, x[:count]), monkeypatch) <= most


def test_a_finite_error_reads_one_number(monkeypatch):
    model, x = vit().float(), images(6).float()
    metric = lm.FiniteEquivarianceError(lm.orbits.listed("rotation", (0.1, 0.2)))
    metric.update(model, x)
    for count in (2, 6):
        assert numbers_read(lambda count=count: metric.update(model, x[:count]), monkeypatch) == 1


@pytest.mark.parametrize("representation", [Invariant(), Image()])
def test_sums_take_as_many_calls_for_many_images(representation):
    def calls(count):
        output = torch.rand(count, 3, 4, 4)
        with Calls() as made:
            rows = moments(output, representation)
            rows["gram"] = torch.cat([one @ one.mT for one in by_samples(representation, torch.stack([output] * 2))])
            grouped(rows, range(count))
        return made.all

    assert calls(64) == calls(2)
