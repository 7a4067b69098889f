"""Random programs of torch operations, with views, changes in place and shared memory, against torch's own `jvp`.

A program is drawn from its seed and holds a pool of tensors, beginning with the input. Each step adds a tensor made of
those in the pool, a view of one of them, or changes one in place. All tensors of the pool are returned, so that a
change that a view has to see, or must not see, changes the result.
"""

import contextlib
import functools
import itertools
import random
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

import lie_metric as lm
from lie_metric.jacobian import push
from lie_metric.lie import linearise
from lie_metric.options import Options
from lie_metric.representations import Image, Invariant
from lie_metric.running import isolated

PROGRAMS, PARTS = 500, 10
SHAPE = (2, 3, 4, 4)
LENGTH = 14
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
GENERATORS = ("rotation", "translation_x")


def _fixed(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


_WEIGHTS = _fixed(16, 16)


def _weights(rows, columns):
    return _WEIGHTS[:rows, :columns] / 3


def _mask(a, k):
    """A mask that is no function of the values."""
    return (torch.arange(a.numel()).reshape(a.shape) * (2 * k + 1)) % 3 == 0


def _axis(a, k):
    return k % a.ndim


def _real(a):
    if a.is_complex():
        raise ValueError("real alone")
    return a


def _complex(a):
    if not a.is_complex():
        raise ValueError("complex alone")
    return a


# Each takes a tensor and a drawn integer.
NEW = {
    "sin": lambda a, k: a.sin(),
    "tanh": lambda a, k: a.tanh(),
    "exp": lambda a, k: (a * 0.3).exp(),
    "relu": lambda a, k: F.relu(_real(a)),
    "gelu": lambda a, k: F.gelu(_real(a)),
    "sigmoid": lambda a, k: _real(a).sigmoid(),
    "abs": lambda a, k: a.abs(),
    "square": lambda a, k: a * a,
    "power": lambda a, k: (_real(a) ** 2 + 1) ** -0.5,
    "twice": lambda a, k: a + a,
    "reciprocal": lambda a, k: 1 / (2 + _real(a) ** 2),
    "negative": lambda a, k: -a,
    "scaled": lambda a, k: a * (k + 1) / 3,
    "clone": lambda a, k: a.clone(),
    "contiguous": lambda a, k: a.contiguous(),
    "softmax": lambda a, k: _real(a).softmax(_axis(a, k)),
    "log_softmax": lambda a, k: _real(a).log_softmax(_axis(a, k)) / 4,
    "layer_norm": lambda a, k: F.layer_norm(_real(a), a.shape[-1:], eps=0.1),
    "linear": lambda a, k: F.linear(_real(a).double(), _weights(1 + k % 5, a.shape[-1])),
    "conv2d": lambda a, k: F.conv2d(_real(a).double(), _fixed(2, a.shape[1], 3, 3) / 4, padding=1),
    "avg_pool2d": lambda a, k: F.avg_pool2d(_real(a), 2, 1),
    "cumsum": lambda a, k: a.cumsum(_axis(a, k)) / 2,
    "flip": lambda a, k: a.flip(_axis(a, k)),
    "roll": lambda a, k: a.roll(1 + k, _axis(a, k)),
    "sum": lambda a, k: a.sum(_axis(a, k), keepdim=k > 3) / 2,
    "mean": lambda a, k: a.mean(_axis(a, k), keepdim=k > 3),
    "amax": lambda a, k: _real(a).amax(_axis(a, k), keepdim=True),
    "logsumexp": lambda a, k: _real(a).logsumexp(_axis(a, k), keepdim=True),
    "sort": lambda a, k: _real(a).sort(_axis(a, k)).values,
    "index": lambda a, k: a[torch.tensor([0, -1, 0])],
    "index by mask": lambda a, k: a[_mask(a, k)],
    "masked_fill": lambda a, k: a.masked_fill(_mask(a, k), 0.5),
    "where": lambda a, k: torch.where(_mask(a, k), a, a * 2),
    "pad": lambda a, k: F.pad(a, (1, 1)),
    "tril": lambda a, k: a.tril(),
    "repeat": lambda a, k: a.repeat_interleave(2, _axis(a, k)),
    "zeros, then assigned": lambda a, k: _assigned(torch.zeros_like(a), a),
    "zeros, then added to": lambda a, k: torch.zeros(a.shape, dtype=a.dtype).add_(a).mul_(a),
    "empty, then rows copied": lambda a, k: _rows(torch.empty(a.shape, dtype=a.dtype), a),
    "scatter on zeros": lambda a, k: torch.zeros_like(a).scatter_(
        -1, torch.zeros(a[..., :1].shape, dtype=torch.long), a[..., :1] * 2
    ),
    "index_add on zeros": lambda a, k: torch.zeros_like(a).index_add_(0, torch.arange(len(a)).flip(0), a),
    "fft": lambda a, k: torch.fft.fft(a, norm="ortho"),
    "filtered": lambda a, k: torch.fft.irfft(torch.fft.rfft(_real(a)) * (1 + 0.5j), n=a.shape[-1]),
    "to complex": lambda a, k: torch.complex(_real(a).double(), a.double() * 0.5),
    "polar": lambda a, k: torch.polar(_real(a).double().abs() + 1, a.double()),
    "modulus": lambda a, k: _complex(a).abs(),
    "real part times imaginary part": lambda a, k: _complex(a).real * a.imag,
    "as real": lambda a, k: torch.view_as_real(_complex(a).resolve_conj()).clone(),
    "to float32": lambda a, k: _real(a).float() * 2,
    "einsum": lambda a, k: torch.einsum("i...,j...->ij", a, a) / a[0].numel(),
    "gram": lambda a, k: a @ a.mT / a.shape[-1],
}

VIEWS = {
    "transpose": lambda a, k: a.transpose(0, _axis(a, k)),
    "mT": lambda a, k: a.mT,
    "select": lambda a, k: a.select(_axis(a, k), 0),
    "narrow": lambda a, k: a.narrow(_axis(a, k), 0, max(1, a.shape[_axis(a, k)] - 1)),
    "last rows": lambda a, k: a[1:],
    "every second": lambda a, k: a[..., ::2],
    "flatten": lambda a, k: a.flatten(1) if k % 2 else a.reshape(-1),
    "view": lambda a, k: a.view(a.shape[0], -1),
    "unsqueeze": lambda a, k: a.unsqueeze(_axis(a, k)),
    "squeeze": lambda a, k: a.squeeze(),
    "expand": lambda a, k: a.unsqueeze(0).expand(2, *a.shape),
    "diagonal": lambda a, k: a.diagonal(0, -2, -1),
    "windows": lambda a, k: a.unfold(_axis(a, k), 2, 1),
    "as_strided": lambda a, k: a.as_strided((2, 3), (a.stride(0), 1), a.storage_offset()),
    "chunk": lambda a, k: a.chunk(2, _axis(a, k))[-1],
    "unbind": lambda a, k: a.unbind(_axis(a, k))[-1],
    "permute": lambda a, k: a.permute(*range(1, a.ndim), 0),
    "real": lambda a, k: _complex(a).real,
    "imaginary": lambda a, k: _complex(a).imag,
    "conjugate": lambda a, k: _complex(a).conj(),
    "to float64": lambda a, k: _real(a).double(),
    "itself": lambda a, k: a,
    "view of itself": lambda a, k: a[:],
}

TWO = {
    "add": lambda a, b, k: a + b,
    "subtract": lambda a, b, k: torch.sub(a, b, alpha=k / 4),
    "multiply": lambda a, b, k: a * b,
    "divide": lambda a, b, k: a / (2 + _real(b) ** 2),
    "maximum": lambda a, b, k: torch.maximum(_real(a), _real(b)),
    "matmul": lambda a, b, k: a @ b / a.shape[-1],
    "cat": lambda a, b, k: torch.cat([a, b], _axis(a, k)),
    "stack": lambda a, b, k: torch.stack([a, b, a], _axis(a, k)),
    "where of two": lambda a, b, k: torch.where(_mask(a, k), a, b),
    "addcmul": lambda a, b, k: torch.addcmul(a, b, b, value=0.5),
    "lerp": lambda a, b, k: torch.lerp(_real(a), _real(b), 0.3),
    "outer": lambda a, b, k: torch.outer(a.flatten()[:4], b.flatten()[:5]),
    "atan2": lambda a, b, k: torch.atan2(_real(a), _real(b) ** 2 + 1),
    "bmm": lambda a, b, k: torch.einsum("...ij,...kj->...ik", a, b) / a.shape[-1],
    "gate": lambda a, b, k: a * _real(b).sigmoid(),
    "zeros, then halves": lambda a, b, k: _halves(a, b),
}

# These change the first tensor and return nothing new.
IN_PLACE = {
    "relu_": lambda a, k: F.relu(_real(a), inplace=True),
    "sin_": lambda a, k: a.sin_(),
    "tanh_": lambda a, k: a.tanh_(),
    "sigmoid_": lambda a, k: a.sigmoid_(),
    "mul_ by a number": lambda a, k: a.mul_(0.5 + k / 4),
    "add_ of a number": lambda a, k: a.add_(1),
    "mul_ by itself": lambda a, k: a.mul_(a),
    "clamp_": lambda a, k: _real(a).clamp_(-0.7, 0.8),
    "fill_": lambda a, k: a.fill_(0.5),
    "zero_": lambda a, k: a.zero_(),
    "masked_fill_": lambda a, k: a.masked_fill_(_mask(a, k), 0.2),
    "rows set to a number": lambda a, k: a.__setitem__(0, 0.3),
    "mask set to a number": lambda a, k: a.__setitem__(_mask(a, k), 0.1),
    "column scaled": lambda a, k: a[..., 0].mul_(2),
    "cumsum_": lambda a, k: a.cumsum_(_axis(a, k)).mul_(0.5),
    "negated": lambda a, k: a.neg_(),
    "squared by a method": lambda a, k: a.square_(),
}
IN_PLACE_TWO = {
    "add_": lambda a, b, k: a.add_(b, alpha=0.5),
    "sub_": lambda a, b, k: a.sub_(b),
    "mul_": lambda a, b, k: a.mul_(b),
    "div_": lambda a, b, k: a.div_(2 + _real(b) ** 2),
    "copy_": lambda a, b, k: a.copy_(b),
    "addcmul_": lambda a, b, k: a.addcmul_(b, b, value=0.3),
    "lerp_": lambda a, b, k: a.lerp_(b, 0.4),
    "row set": lambda a, b, k: a.__setitem__(0, b[0]),
    "all set": lambda a, b, k: a.__setitem__(..., b),
    "column set": lambda a, b, k: a[..., 0].copy_(b[..., -1]),
    "mask set": lambda a, b, k: a.__setitem__(_mask(a, k), b[_mask(a, k)]),
    "rows set by index": lambda a, b, k: a.__setitem__(torch.tensor([-1, 0]), b[:2]),
    "index_add_": lambda a, b, k: a.index_add_(0, torch.arange(len(b)) % len(a), b),
}


def _assigned(found, a):
    found[..., 0] = a[..., -1] * 2
    found[:1] += a[:1]
    return found


def _rows(found, a):
    for row, source in zip(found, a, strict=True):
        row.copy_(source.sin())
    return found


def _halves(a, b):
    found = torch.zeros(2, *a.shape, dtype=torch.result_type(a, b))
    found[0], found[1] = a, b
    return found


KINDS = {
    "new": (NEW, 1),
    "view": (VIEWS, 1),
    "two": (TWO, 2),
    "in place": (IN_PLACE, 1),
    "in place of two": (IN_PLACE_TWO, 2),
}
# How often a kind is drawn: memory that is shared and changed is what has to be got right.
ODDS = (5, 4, 4, 3, 4)


@dataclass(frozen=True)
class Step:
    kind: str
    name: str
    places: tuple[int, ...]
    number: int

    def __call__(self, pool):
        found = KINDS[self.kind][0][self.name](*[pool[place] for place in self.places], self.number)
        if not self.kind.startswith("in place"):
            pool.append(found)

    def __str__(self):
        return f"{self.kind}: {self.name} of {', '.join(f't{place}' for place in self.places)}, {self.number}"


@dataclass(frozen=True)
class Program:
    steps: tuple[Step, ...]

    def run(self, x):
        pool = [x]
        for step in self.steps:
            step(pool)
        return pool

    def __call__(self, x):
        parts = [torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in self.run(x)[1:]]
        return torch.cat([part.reshape(-1).double() for part in parts])[None]

    def __str__(self):
        made = itertools.count(1)
        lines = [f"t{next(made)} = {step}" if "in place" not in step.kind else f"     {step}" for step in self.steps]
        return "\n".join(lines)


def _addresses(tensor):
    """The places in memory that a tensor's entries take."""
    base = torch.zeros(tensor.shape, dtype=torch.long)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        base += (torch.arange(size) * stride).reshape(-1, *[1] * (tensor.ndim - 1 - axis))
    return (tensor.data_ptr() + base.flatten() * tensor.element_size()).tolist()


def _may_write(target, sources, elementwise):
    """Whether torch says what happens: one place for each entry, and sources elsewhere or at the very same places."""
    own = _addresses(target)
    if len(set(own)) < len(own):
        return False
    width = target.element_size()
    for source in sources:
        other = _addresses(source)
        if other == own and source.shape == target.shape and elementwise:
            continue
        if {place // width for place in own} & {place // width for place in other}:
            return False
    return True


def _by_itself(step, chosen):
    """Whether a tensor is changed by itself, as in `y.mul_(y)`, of which torch's own forward mode is wrong (2.14)."""
    both = len(chosen) == 2 and chosen[0].data_ptr() == chosen[1].data_ptr()
    return step.name == "mul_ by itself" or (step.kind == "in place of two" and both)


def _seen_twice(tensor, pool):
    place = tensor.untyped_storage().data_ptr()
    return sum(other.untyped_storage().data_ptr() == place for other in pool) > 1


# These write into tensors that do not move yet.
ON_CONSTANTS = {name for name in (*NEW, *TWO) if "zeros" in name or "empty" in name}
IN_A_VIEW = {"column scaled", "rows set to a number", "row set", "all set", "column set"}
ELEMENTWISE = {"add_", "sub_", "mul_", "div_", "copy_", "addcmul_", "lerp_"}


@functools.cache
def program(seed):
    """The program of a seed. A step that torch refuses, or that leaves the numbers' range, is drawn again.

    Programs of even seeds change only what no other tensor of the pool sees, and nothing that does not move: tensors
    that carry their tangents follow these. In the others anything is changed.
    """
    drawn = itertools.count()
    while True:
        found = _drawn(seed, f"{seed} {next(drawn)}")
        one = images()[:1].clone()
        with contextlib.suppress(RuntimeError, IndexError, ValueError):  # one image alone may make no batch
            found.run(one)
        if not one._version:
            return found


def _drawn(seed, text):
    draw = random.Random(text)
    x = images()
    steps = []
    while len(steps) < LENGTH:
        pool = Program(tuple(steps)).run(x)
        kind = draw.choices(list(KINDS), ODDS)[0]
        table, count = KINDS[kind]
        name = draw.choice(list(table))
        # Late tensors more often, so that programs are deep.
        places = tuple(max(draw.randrange(len(pool)), draw.randrange(len(pool))) for _ in range(count))
        step = Step(kind, name, places, draw.randrange(6))
        chosen = [pool[place] for place in places]
        if (name == "to float32" or _by_itself(step, chosen)) and draw.random() < 0.8:
            continue
        if kind.startswith("in place") and not _may_write(chosen[0], chosen[1:], name in ELEMENTWISE):
            continue
        in_view = name in IN_A_VIEW or (kind.startswith("in place") and _seen_twice(chosen[0], pool))
        if seed % 2 == 0 and (name in ON_CONSTANTS or in_view):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step(pool)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            continue
        if x._version or any(not _sound(tensor) for tensor in pool):
            if x._version:
                x = images()
            continue
        steps.append(step)
    return Program(tuple(steps))


def _sound(tensor):
    floats = tensor.is_floating_point() or tensor.is_complex()
    return floats and 0 < tensor.numel() <= 200 and tensor.ndim > 0 and bool((tensor.abs() < 20).all())


def images():
    return _fixed(*SHAPE, seed=1)


@functools.cache
def tangents():
    return Image().tangents(images(), lm.generators(*GENERATORS), lm.Resampling()) / 10


def by_jvp(function):
    """Torch's own forward mode, one tangent at a time; None where it has no rule."""
    try:
        return torch.stack([torch.func.jvp(function, (images(),), (tangent,))[1] for tangent in tangents()])
    except (RuntimeError, NotImplementedError):
        return None


def by_differences(function):
    x, h = images(), 2e-5
    found = []
    for tangent in tangents():
        wide, narrow = ((function(x + s * tangent) - function(x - s * tangent)) / (2 * s) for s in (h, h / 2))
        found.append((4 * narrow - wide) / 3)
    return torch.stack(found)


@dataclass
class Count:
    """How many programs were met, and how.

    Attributes:
        refused: Measured by no method.
        slower: Of even seeds, measured otherwise than by tensors that carry their tangents.
        defects: A rule of such tensors failed other than by refusing.
        differences: Held to central differences, because torch has no rule or a wrong one.
    """

    programs: int = 0
    refused: int = 0
    slower: int = 0
    defects: int = 0
    differences: int = 0


def compare(seed, measure, count):
    """Holds what is measured of a program to torch's derivatives; what is wrong or refused, in words."""
    function = program(seed)
    count.programs += 1
    precise = all(step.name != "to float32" for step in function.steps)
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        truth = by_jvp(function)
        try:
            found, used = measure(function)
        except RuntimeError as error:
            count.refused += 1
            return "", f"program {seed} refused: {error}"
        defects = [str(warning.message) for warning in told if "A rule of forward mode failed" in str(warning.message)]
        if defects:
            count.defects += 1
            return "", f"program {seed}: {defects[0]}"
        count.slower += used not in {"forward", "forward created"}
        tolerance = TOLERANCE[torch.float64 if precise else torch.float32]
        if truth is not None and _apart(found, truth) <= tolerance:
            return "", ""
        if measure is _unchecked and used != "forward":
            return "", f"program {seed}: torch itself is wrong"
        # Where torch has no rule or a wrong one, and before anyone is blamed.
        count.differences += 1
        error = _apart(found, by_differences(function))
    wrong = not error < (1e-6 if precise else 5e-2)
    return f"program {seed} differs by {error:.1e} ({used}):\n{function}" if wrong else "", ""


def _apart(found, truth):
    return float((found - truth).norm() / truth.norm().clamp(min=1e-3))


def _unchecked(function):
    """Tensors that carry their tangents, with nothing behind them that would find an error."""
    with isolated(function):
        found = push(function, images(), tangents(), "forward", None, verified=False)
    return found[1], found[2]


def _auto(function):
    found = linearise(function, images(), lm.generators(*GENERATORS), Options(output_representation=Invariant()))
    return found.lie_derivatives / 10, found.method


# All 500 by the carrying tensors alone, and a part of them with the check and what follows it: the rest is slow.
RUNS = [
    pytest.param(measure, part, marks=pytest.mark.slow if measure is _auto and part > 1 else ())
    for measure in (_unchecked, _auto)
    for part in range(PARTS)
]


@pytest.mark.parametrize(("measure", "part"), RUNS)
def test_random_programs(measure, part):
    count = Count()
    seeds = range(part * PROGRAMS // PARTS, (part + 1) * PROGRAMS // PARTS)
    wrong, others = zip(*[compare(seed, measure, count) for seed in seeds], strict=True)
    print(measure.__name__, count, *filter(None, others), sep="\n")
    wrong = sorted(filter(None, wrong), key=len)
    assert not wrong, f"{len(wrong)} programs are wrong, of these the shortest:\n{wrong[0]}"
    # Otherwise the test would pass by refusing, or by torch's own forward mode.
    assert count.refused <= 0.05 * count.programs
    assert count.slower <= 0.05 * count.programs
    assert not count.defects
    assert count.differences <= 0.1 * count.programs


def test_programs_hold_what_they_are_drawn_from():
    drawn = {(step.kind, step.name) for seed in range(PROGRAMS) for step in program(seed).steps}
    missing = {(kind, name) for kind, (table, _) in KINDS.items() for name in table} - drawn
    assert not missing
