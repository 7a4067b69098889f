"""Every call of one measurement begins from the same state of the model, whatever the calls before have changed."""

import warnings

import pytest
import torch
from torch import nn

from lie_metric.running import isolated, same_draws


class Changes(nn.Module):
    """Each call is another function, unless the model is put back before it."""

    def __init__(self, change):
        super().__init__()
        self.change, self.n, self.h = change, 1, None
        self.seen, self.table, self.names = [1.0], {"a": 1.0}, {"a"}
        self.register_buffer("count", torch.ones(()))
        self.register_buffer("none", None)
        self.inner = nn.Identity()
        self.inner.n = 1

    def forward(self, x):
        self.change(self)
        held = [self.n, self.inner.n, len(self.seen), sum(self.seen), len(self.table), self.table.get("a", 5.0)]
        held += [len(self.names), 0 if getattr(self, "h", 3) is None else 7, 2 * hasattr(self, "fresh")]
        return x * sum(a * 3**i for i, a in enumerate(held)) * getattr(self, "count", torch.zeros(())).sum()


def raised(place, name, by=1):
    setattr(place, name, getattr(place, name) + by)


def outputs(model, x):
    with isolated(model), torch.no_grad():
        function = same_draws(model)
        return [function(x) for _ in range(3)]


CHANGES = {
    "a number": lambda m: raised(m, "n"),
    "a number of a part": lambda m: raised(m.inner, "n"),
    "two numbers": lambda m: (raised(m, "n"), raised(m.inner, "n")),
    "a feature": lambda m: setattr(m, "h", torch.ones(2)),
    "something new": lambda m: m.__dict__.setdefault("fresh", 0) if m.n == 2 else setattr(m, "fresh", 1),
    "something new for something old": lambda m: (setattr(m, "fresh", 1), m.__dict__.pop("h", None)),
    "something less": lambda m: m.__dict__.pop("h", None),
    "a longer list": lambda m: m.seen.append(1.0),
    "another entry of a list": lambda m: m.seen.__setitem__(0, m.seen[0] + 1),
    "a shorter list": lambda m: m.seen.clear(),
    "an entry of a table": lambda m: m.table.update(a=m.table["a"] + 1),
    "another entry of a table": lambda m: m.table.update({len(m.table): 1.0}),
    "an entry less": lambda m: m.table.pop("a", None),
    "a larger set": lambda m: m.names.add(len(m.names)),
    "another list": lambda m: setattr(m, "seen", [*m.seen, 2.0]),
    "a buffer": lambda m: m.count.add_(1),
    "a buffer by its data": lambda m: m.count.data.add_(1),
    "a buffer by a view of its data": lambda m: m.count.data.view(1).mul_(2),
    "a buffer given other data": lambda m: setattr(m.count, "data", m.count.data + 1),
    "a buffer made wider in place": lambda m: m.count.resize_(m.count.numel() + 1).fill_(1),
    "another buffer": lambda m: setattr(m, "count", m.count + 1),
    "a wider buffer": lambda m: setattr(m, "count", torch.ones(m.count.numel() + 1)),
    "a buffer less": lambda m: m._buffers.pop("count", None),
    "a buffer for none": lambda m: setattr(m, "none", m.count.clone()) if m.none is None else m.count.add_(1),
}


@pytest.mark.filterwarnings("ignore:The model changed its buffers")
@pytest.mark.parametrize("kind", CHANGES)
def test_each_call_is_one_of_the_same_function(kind):
    model, x = Changes(CHANGES[kind]), torch.ones(2)
    buffer, seen = model.count, model.seen
    with isolated(model), torch.no_grad():
        function = same_draws(model)
        first = function(x)
        for _ in range(3):
            assert torch.equal(function(x), first)
    again = Changes(CHANGES[kind])
    assert torch.equal(again(x), first)
    assert (
        not torch.equal(again(x), first)
        or "less" in kind
        or "shorter" in kind
        or kind.startswith(("a feature", "something"))
    ), "this would change nothing"
    assert torch.equal(model(x), first), "everything is given back"
    assert model.seen is seen or kind == "another list"
    assert "buffer" in kind or model.count is buffer


def test_the_innermost_measurement_is_rewound():
    outer, inner, x = Changes(CHANGES["a number"]), Changes(CHANGES["a buffer"]), torch.ones(2)
    with isolated(outer), torch.no_grad():
        of_outer = same_draws(outer)
        first = of_outer(x)
        with pytest.warns(UserWarning, match="count"):
            one, two, three = outputs(inner, x)
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert outer.n == 2
        assert torch.equal(of_outer(x), first)
    assert outer.n == 1
    assert inner.count == 1


def test_what_eval_has_made_stays_between_calls():
    class Builds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.built = nn.Parameter(torch.ones(2)), 0
            self.register_buffer("filter", torch.zeros(2))

        def train(self, mode=True):
            if not mode:
                self.built = self.built + 1
                self.filter.copy_(self.weight.detach() * 3)
            return super().train(mode)

        def forward(self, x):
            self.filter.add_(1)
            self.built += 1
            return x * self.filter * self.built

    model = Builds()
    with pytest.warns(UserWarning, match="filter"):
        found = outputs(model, torch.ones(2))
    assert all(torch.equal(value, torch.full((2,), 8.0)) for value in found)
    assert not model.filter.any()
    assert model.built == 0


def test_buffers_without_entries_are_not_changed_by_what_has_no_memory():
    """As those of e3nn have: their address is that of any tensor without memory."""

    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.empty(0))

        def forward(self, x):
            y = x.new_zeros(x.shape).add_(x)
            x.new_zeros(0).add_(1)
            return y + self.weight.sum()

    model = Empty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with isolated(model), torch.no_grad():
            run = same_draws(model)
            run(torch.ones(2))
            run(torch.ones(2))
    assert model.weight._version == 0
