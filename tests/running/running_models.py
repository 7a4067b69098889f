"""Models that keep something while they run, each in another way, and one that builds filters as escnn does."""

import torch
from torch import nn
from torch.nn import functional as F


class BuildsFilters(nn.Module):
    """Filters are built from weights when evaluation begins, and dropped when training does."""

    def __init__(self, classes=3, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.Parameter(torch.randn(4, channels, 3, 3))
        self.head = nn.Linear(4, classes)
        self.built = 0

    def build(self):
        return self.weights - self.weights.flip(-1)

    def train(self, mode=True):
        if mode:
            if hasattr(self, "filter"):
                del self.filter
        else:
            self.built += 1
            self.register_buffer("filter", self.build())
        return super().train(mode)

    def forward(self, x):
        filters = self.build() if self.training else self.filter
        return self.head(F.conv2d(x, filters).tanh().mean((2, 3)))


class Keeps(nn.Module):
    """A small network that keeps something of each call; ``kind`` says how."""

    def __init__(self, kind, channels=3, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.n, self.h, self.seen, self.cache = kind, 0, None, [], {"calls": []}
        self.conv, self.head = nn.Conv2d(channels, 4, 3), nn.Linear(4, classes)
        self.memory = torch.zeros(4)
        self.register_buffer("center", torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        h = self.conv(x).tanh().mean((2, 3))
        value = h.detach().mean(0)
        with torch.no_grad():
            if self.kind == "counter":
                self.n = self.n + 1
            elif self.kind == "feature":
                self.h = h
            elif self.kind == "list":
                self.seen.append(h)
            elif self.kind == "dict":
                self.cache["calls"].append(h)
                self.cache["last"] = h
            elif self.kind == "new attribute":
                self.fresh = h
            elif self.kind == "new buffer":
                self.register_buffer("fresh", value, persistent=False)
            elif self.kind == "new module":
                self.extra = nn.Identity()
            elif self.kind == "memory":
                self.memory.mul_(0.5).add_(1)
            elif self.kind == "memory by index":
                self.memory[1:] = 3.0
            elif self.kind == "memory by data":
                self.memory.data.add_(1)
            elif self.kind == "memory by operator":
                self.memory += 1
            elif self.kind == "memory by out":
                torch.add(self.memory, 1, out=self.memory)
            elif self.kind == "parameter":
                self.scale.mul_(1.5)
            elif self.kind == "parameter by data":
                self.scale.data = self.scale.data * 1.5
            elif self.kind == "frozen":
                self.scale.requires_grad_(False)
            elif self.kind == "hook":
                self.conv.register_forward_hook(lambda *_: None)
            elif self.kind == "buffer":
                self.center.add_(1)
            elif self.kind == "buffer by data":
                self.center.data.add_(1)
            elif self.kind == "buffer anew":
                self.center = self.center + 1
        return self.head(h * self.scale)


SILENT = [
    "nothing", "counter", "feature", "list", "dict", "new attribute", "new buffer", "new module", "memory",
    "memory by index", "memory by data", "memory by operator", "memory by out", "parameter", "parameter by data",
    "frozen", "hook",
]  # fmt: skip
TOLD = ["buffer", "buffer by data", "buffer anew"]


def held(model):
    """Everything that a model holds: objects by identity, tensors by value."""

    def of(value, depth=0):
        if isinstance(value, torch.Tensor):
            grad = value.grad if value.is_leaf else None
            return id(value), value.detach().clone(), value.requires_grad, id(grad), value.data_ptr()
        if isinstance(value, dict):
            return [(key, id(item), of(item, depth + 1)) for key, item in value.items()] if depth < 3 else len(value)
        if isinstance(value, (list, tuple)):
            return [(id(item), of(item, depth + 1)) for item in value]
        return id(value), value if isinstance(value, (bool, int, str)) else None

    return [of(module.__dict__) for module in model.modules()]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
