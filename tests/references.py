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


def sampling_matrix(size, matrix, t, interpolation="bspline", padding="reflection", align_corners=False):
    """T_t on images of a height and width as an explicit matrix (H·W, H·W), pixel by pixel, sample by sample."""
    height, width = size
    unit = (min(size) - align_corners) / 2
    generator = torch.tensor([*matrix, (0, 0, 0)], dtype=torch.float64) * t
    exponential, term = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    for k in range(1, 40):
        term = term @ generator / k
        exponential = exponential + term
    axes = [_Row(length, interpolation, padding, align_corners) for length in size]
    rows = []
    for r in range(height):
        for c in range(width):
            place = [(c - (width - 1) / 2) / unit, (r - (height - 1) / 2) / unit, 1.0]
            x, y, _ = (exponential @ torch.tensor(place, dtype=torch.float64)).tolist()
            along_y = axes[0].weights(y * unit + (height - 1) / 2)
            along_x = axes[1].weights(x * unit + (width - 1) / 2)
            rows.append(torch.outer(along_y, along_x).flatten())
    return torch.stack(rows)


class _Row:
    """One axis: the weight of each pixel in the value between pixels, from the kernel's formula."""

    beyond = 60

    def __init__(self, size, interpolation, padding, align_corners):
        self.size, self.interpolation = size, interpolation
        self.period = size if padding == "circular" else 2 * size - 2 * align_corners
        length = size + 2 * self.beyond
        # The row written out far beyond its ends; for the spline, its coefficients instead of its pixels.
        self.samples = torch.zeros(length, size, dtype=torch.float64)
        for n in range(length):
            pixel = self._pixel(n - self.beyond, padding, align_corners)
            if pixel is not None:
                self.samples[n, pixel] = 1
        if interpolation == "bspline":
            line = torch.full((length,), 4 / 6, dtype=torch.float64)
            side = torch.full((length - 1,), 1 / 6, dtype=torch.float64)
            self.samples = torch.linalg.solve(line.diag() + side.diag(1) + side.diag(-1), self.samples)

    def _pixel(self, n, padding, align_corners):
        if padding == "zeros" and not 0 <= n < self.size:
            return None
        if padding == "border":
            return min(max(n, 0), self.size - 1)
        while not 0 <= n < self.size:
            if padding == "circular":
                n += self.size if n < 0 else -self.size
            elif n < 0:
                n = -n if align_corners else -n - 1
            else:
                n = 2 * self.size - 2 - n if align_corners else 2 * self.size - 1 - n
        return n

    def weights(self, position):
        if self.interpolation == "fourier":
            near, kernel = range(self.period), self._waves
        else:
            near = range(math.floor(position) - 3, math.floor(position) + 5)
            kernel = {"bilinear": _hat, "cubic": _keys, "bspline": _spline}[self.interpolation]
        return sum(kernel(position - n) * self.samples[n + self.beyond] for n in near)

    def _waves(self, s):
        """The periodic function through a unit pulse, of waves up to half a cycle per pixel."""
        total = 0.0
        for k in range(-(self.period // 2), self.period // 2 + 1):
            total += math.cos(2 * math.pi * k * s / self.period) * (0.5 if 2 * abs(k) == self.period else 1)
        return total / self.period


def _hat(s):
    return max(0.0, 1 - abs(s))


def _keys(s):
    """Keys (1981), Eq. 15."""
    s = abs(s)
    if s < 1:
        return 1.5 * s**3 - 2.5 * s**2 + 1
    return -0.5 * s**3 + 2.5 * s**2 - 4 * s + 2 if s < 2 else 0.0


def _spline(s):
    """Unser (1999), Box 1."""
    s = abs(s)
    if s < 1:
        return 2 / 3 - s**2 + s**3 / 2
    return (2 - s) ** 3 / 6 if s < 2 else 0.0


def moved(images, generator, t, **stencil):
    """T_t of images (..., H, W) by the explicit matrix."""
    size = images.shape[-2:]
    matrix = sampling_matrix(size, generator.matrix, t, **stencil)
    return math.exp(t * generator.intensity) * (images.flatten(-2) @ matrix.T).unflatten(-1, size)
