"""Sharded modules in one process, whose parts are the whole; those of two are in `callbacks/test_sharded.py`."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lie_metric as lm
from lie_metric.running import is_sharded

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IMAGES = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
KINDS = ("fsdp2", "fsdp1", "flat")


@pytest.fixture(autouse=True)
def _group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU())).double()


def sharded(model, kind):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model[2], mesh=mesh)
        return fully_shard(model, mesh=mesh)
    options = {"device_id": torch.device("cpu"), "use_orig_params": kind == "fsdp1"}
    model[2] = FullyShardedDataParallel(model[2], **options)
    return FullyShardedDataParallel(model, **options)


def seen(model):
    """All that FSDP changes of modules: which there are, their classes, attributes, hooks and parameters."""
    return {
        name: (
            type(module), set(vars(module)), *map(copy.copy, (
                module._parameters, module._modules, module._forward_pre_hooks, module._forward_hooks
            )),
        )
        for name, module in model.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stands_whole_and_is_given_back(kind, fails):
    model = sharded(network(), kind)
    own = []
    hook = next(module for module in model.modules() if type(module) is nn.GELU).register_forward_hook(
        lambda *_: own.append(1)
    )
    with torch.no_grad():
        value = model(IMAGES)
    own.clear()
    for module in model.modules():
        getattr(module, "reshard", lambda: None)()
    before = seen(model)
    failure = pytest.raises(RuntimeError, match="planted") if fails else nullcontext()
    with failure, lm.unsharded(model) as whole:
        assert not is_sharded(whole.modules())
        assert [type(module) for module in whole.modules()] == [type(module) for module in network().modules()]
        for (name, found), (wanted, expected) in zip(
            whole.named_parameters(), network().named_parameters(), strict=True
        ):
            assert name == wanted
            assert type(found) is nn.Parameter
            assert torch.equal(found, expected)
        assert torch.equal(whole(IMAGES), value)
        assert own == [1]  # hooks of the user's stay
        if fails:
            raise RuntimeError("planted")
    after = seen(model)
    assert after.keys() == before.keys()
    for name, told in before.items():
        assert told[:2] == after[name][:2]
        for one, two in zip(told[2:], after[name][2:], strict=True):
            assert list(one) == list(two)
            assert all(one[key] is two[key] for key in one)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), value)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_of_the_moment(kind):
    """What is trained between two measurements is measured; of FSDP1, whose memory is freed, weights are copies."""
    model = sharded(network(), kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lm.unsharded(model) as whole, torch.no_grad():
        first = whole(IMAGES)
        for parameter in whole.parameters():
            parameter.zero_()
    if kind != "fsdp2":  # of which a part that is the whole is shared
        with torch.no_grad():
            assert torch.equal(model(IMAGES), first)
    model(IMAGES).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        value = model(IMAGES)
    assert not torch.allclose(value, first)
    with lm.unsharded(model) as whole, torch.no_grad():
        assert torch.equal(whole(IMAGES), value)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def encode(self, x):
        return self.net(x)


def test_frozen_weights_stay_so_and_methods_are_those_of_the_class():
    from torch.distributed.fsdp import register_fsdp_forward_method

    model = Encoder()
    model.net[1].bias.requires_grad_(False)
    sharded(model.net, "fsdp2")
    register_fsdp_forward_method(model.net, "forward")
    register_fsdp_forward_method(model, "encode")
    with lm.unsharded(model) as whole:
        assert "forward" not in vars(whole.net)
        assert [p.requires_grad for p in whole.parameters()] == [True, False, True, True]
    assert {"forward"} <= set(vars(model.net))


@pytest.mark.parametrize("kind", KINDS)
def test_refused_where_it_is_not_whole(kind):
    model = sharded(network(), kind)
    with pytest.raises(RuntimeError, match=r"Measure inside `with lie_metric.unsharded"):
        lm.lie_derivative(model, IMAGES, "rotation")
    if kind != "fsdp2":
        with pytest.raises(ValueError, match="must be the outermost wrapper of FSDP"):
            lm.unsharded(model.module).__enter__()
