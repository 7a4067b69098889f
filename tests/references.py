"""Slow float64 twins that share no code with the library."""

import math

import torch


def central_difference(function, step=1e-4):
    """The derivative at 0 of a function of one number, by Richardson's extrapolation of central differences."""
    wide = (function(step) - function(-step)) / (2 * step)
    narrow = (function(step / 2) - function(-step / 2)) / step
    return (4 * narrow - wide) / 3


def filled(model):
    """The model with every floating-point entry of its state fixed by a formula, so that values can be compared."""
    for i, (name, value) in enumerate(model.state_dict().items()):
        if not value.is_floating_point():
            continue
        n = value.numel()
        h = torch.sin(12.9898 * torch.arange(n, dtype=torch.float64) + 78.233 * i) * 43758.5453
        u = ((2 * (h - h.floor()) - 1) * math.sqrt(3)).reshape(value.shape)
        last = name.split(".")[-1]
        if name.endswith("running_var"):
            new = 1 + 0.25 * u
        elif value.ndim >= 2 and last not in {"pos_embed", "cls_token", "dist_token"}:
            new = u * math.sqrt(1.5 / (n / value.shape[0]))
        elif value.ndim == 1 and name.endswith(("weight", "gamma")):
            new = 1 + 0.15 * u
        else:
            new = 0.1 * u
        value.copy_(new)
    return model


def waves(batch, size):
    """Smooth images of three plane waves, different in every channel and image."""
    t = torch.arange(size, dtype=torch.float64) / (size - 1)
    x, y = t[None, None, None], t[None, None, :, None]
    b = torch.arange(batch, dtype=torch.float64)[:, None, None, None]
    c = torch.arange(3, dtype=torch.float64)[None, :, None, None]
    total = torch.zeros(batch, 3, size, size, dtype=torch.float64)
    for k in (1, 2, 3):
        phase = 2 * math.pi * (k * x * (1 + 0.3 * b) + (4 - k) * y * (1 - 0.1 * c))
        total += torch.sin(phase + 0.5 * b + 1.7 * c + k) / k
    return total


def spectrum(size, highest, seed=0, count=60):
    """A periodic image of plane waves with amplitude 1/f up to a frequency in cycles per pixel, and its ∂x."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(size, dtype=torch.float64)
    x, y = grid[None], grid[:, None]
    image, slope = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    limit = int(highest * size)
    drawn = 0
    while drawn < count:
        k, m = (int(torch.randint(-limit, limit + 1, (), generator=source)) for _ in range(2))
        radius = math.hypot(k, m)
        if not 0 < radius <= highest * size:
            continue
        drawn += 1
        phase = 2 * math.pi * (k * x + m * y) / size + 6.28 * float(torch.rand((), generator=source))
        image += torch.sin(phase) / radius
        slope += torch.cos(phase) / radius * 2 * math.pi * k / size
    return image, slope
