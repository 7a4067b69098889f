"""How the Lie derivative splits: every contribution against one computed for its operation alone, by full Jacobians.

A program is a list of steps. Here each step is written twice: as a model runs it, views and changes in place included,
and as a function of values that nobody changes, from which the reference takes J_(out<-i) · (Df_i[X·in] - X·out).
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian
from torch.nn import functional as F

import lie_metric as lm
from lie_metric import representations as R

pytestmark = pytest.mark.filterwarnings("ignore:Shares of")

SIZE = 6
torch.manual_seed(0)
KERNEL = torch.randn(2, 2, 3, 3, dtype=torch.float64) / 3
MIX = torch.randn(2, 2, 1, 1, dtype=torch.float64)
OUT = torch.randn(3, 2 * SIZE**2, dtype=torch.float64) / 5
FILTER = torch.randn(2, SIZE, SIZE // 2 + 1, dtype=torch.complex128)


@dataclass
class Step:
    """Values ``given`` (by their numbers; 0 is the image) go into ``pure``, whose results are new values.

    What has a border moves as the field within it.
    """

    pure: Any
    given: tuple[int, ...]
    name: str
    made: int = 1
    border: int = 0


def by_hand(value, generator):
    """The action on a square map with a border, which turns about the centre in pixels whatever the border is."""
    if generator == "saturation":
        return value
    size = value.shape[-1]
    places = torch.arange(size).double() - (size - 1) / 2
    slope_x, slope_y = R.Image().tangents(value, lm.generators("translation"), lm.Resampling()) / (size / 2)
    return {"rotation": places[:, None] * slope_x - places * slope_y, "translation_x": (size - 2) / 2 * slope_x}[
        generator
    ]


def reference(steps, x, generator="rotation", carrier=None):
    """The contribution of each step, shape (steps, outputs): J_(out<-i) · (Df_i[X·in] - X·out)."""
    asked, stencil = lm.generators(generator), lm.Resampling()

    def act(value, border):
        if value.is_complex() or value.ndim != 4:
            return torch.zeros_like(value)
        if not border:
            return R.Image().tangents(value, asked, stencil)[0]
        return by_hand(value, generator)

    values, borders = [x], [0]
    for step in steps:
        made = step.pure(*(values[number] for number in step.given))
        values += made if isinstance(made, tuple) else [made]
        borders += [step.border] * step.made

    def rest(after, start, count):
        """The output as a function of the values made by the step before number ``after``."""

        def run(*made):
            now = list(values)
            now[start : start + count] = made
            place = start + count
            for step in steps[after:]:
                found = step.pure(*(now[number] for number in step.given))
                found = found if isinstance(found, tuple) else (found,)
                now[place : place + len(found)] = found
                place += len(found)
            return now[-1].flatten()

        return run

    found, place = [], 1
    for after, step in enumerate(steps, start=1):
        given = tuple(values[number] for number in step.given)
        made = tuple(values[place : place + step.made])
        moved = tuple(act(values[number], borders[number]) for number in step.given)
        pushed = torch.func.jvp(step.pure, given, moved)[1]
        pushed = pushed if isinstance(pushed, tuple) else (pushed,)
        local = [push - act(value, step.border) for push, value in zip(pushed, made, strict=True)]
        real = tuple(torch.view_as_real(value.resolve_conj()) if value.is_complex() else value for value in made)
        run = rest(after, place, step.made)
        back = lambda *made, values=made, run=run: run(  # noqa: E731
            *(torch.view_as_complex(m) if v.is_complex() else m for m, v in zip(made, values, strict=True))
        )
        rows = jacobian(back, real)
        local = [torch.view_as_real(value.resolve_conj()) if value.is_complex() else value for value in local]
        found.append(sum(row.flatten(1) @ value.flatten() for row, value in zip(rows, local, strict=True)))
        place += step.made
    return torch.stack(found)


def check(model, steps, x=None, generator="rotation"):
    x = images(1, SIZE)[:, :2] if x is None else x
    kept = x.clone()
    report = lm.layerwise_equivariance_error(model, x, generator, probes="exact", output_representation=R.Invariant())
    alone = lm.layerwise_equivariance_error(model, x, generator, output_representation=R.Invariant())
    assert torch.equal(x, kept)
    steps = in_two(steps)
    wanted = reference(steps, x, generator)
    assert [operation.function for operation in report.operations] == [*(step.name for step in steps), "output"]
    torch.testing.assert_close(report.vectors[:-1, 0], wanted, rtol=1e-9, atol=1e-11)
    assert report.vectors[-1].abs().max() < 1e-11
    torch.testing.assert_close(report.vectors.sum(0)[0], wanted.sum(0), rtol=1e-9, atol=1e-11)
    # The shares, by one cotangent alone.
    products = wanted @ wanted.sum(0)
    torch.testing.assert_close(alone.products[:-1, 0, 0], products, rtol=1e-9, atol=1e-11 * float(products.sum()))
    assert wanted.abs().max(1).values.gt(1e-6).sum() >= 2  # the split is no trivial one
    return report


def conv(y):
    return F.conv2d(y, KERNEL, padding=1)


PAD = torch.eye(SIZE + 2, dtype=torch.float64)[:, 1:-1]


def in_two(steps):
    """The steps with each convolution as a padding and one that does not pad, which are told apart."""
    found, numbers, count = [], [0], 1
    for step in steps:
        step = replace(step, given=tuple(numbers[number] for number in step.given))
        if step.pure is conv:
            found.append(Step(lambda y: PAD @ y @ PAD.mT, step.given, "pad", border=1))
            step = Step(lambda y: F.conv2d(y, KERNEL), (count,), "conv2d")
            count += 1
        found.append(step)
        numbers += range(count, count + step.made)
        count += step.made
    return found


def head(y):
    return F.linear(y.flatten(1), OUT)


HEAD = (lambda y: y.flatten(1), lambda y: F.linear(y, OUT))


def ending(number):
    return [Step(HEAD[0], (number,), "flatten"), Step(HEAD[1], (number + 1,), "linear")]


def squared(x):
    y = conv(x)
    return head(y * y)


def two_convolutions(x):
    return head(conv(x) * conv(x))


def three_times(x):
    y = conv(x)
    return head(torch.addcmul(y, y, y))


def residual(x):
    y = conv(x)
    return head(y + conv(y.tanh()))


def branches(x):
    y = conv(x)
    a, b = y.tanh(), y.sigmoid()
    return head(a * b + y)


def chunks(x):
    a, b = conv(x).chunk(2, 1)
    return head(torch.cat([a * b, b.exp()], 1))


def cat_of_itself(x):
    y = conv(x)
    return head(torch.cat([y, y], 1)[:, 1:3] ** 2)


def twice_in_a_list(x):
    y = conv(x)
    return head(torch.stack([y, y, x]).prod(0))


def in_place(x):
    y = conv(x)
    y *= 3
    y += x
    F.elu(y, inplace=True)
    return head(y.sin())


def in_place_beside_its_former_self(x):
    y = conv(x)
    z = y.cos()  # saves y
    w = z.clone()
    w.add_(y)
    return head(w * z)


def in_place_with_itself(x):
    y = conv(x)
    y.add_(y)
    return head(y.sin())


def spectrum(x):
    return head(x + torch.fft.irfft2(torch.fft.rfft2(conv(x)) * FILTER))


def conjugates(x):
    z = torch.fft.fft2(conv(x))
    return head((z * z.conj() * (1 + 2j)).imag)


def minus_itself(x):
    y = x - x
    return head(conv(y) + x.exp())


PROGRAMS = {
    squared: [Step(conv, (0,), "conv2d"), Step(torch.mul, (1, 1), "mul"), *ending(2)],
    two_convolutions: [
        Step(conv, (0,), "conv2d"),
        Step(conv, (0,), "conv2d"),
        Step(torch.mul, (1, 2), "mul"),
        *ending(3),
    ],
    three_times: [Step(conv, (0,), "conv2d"), Step(torch.addcmul, (1, 1, 1), "addcmul"), *ending(2)],
    residual: [
        Step(conv, (0,), "conv2d"),
        Step(torch.tanh, (1,), "tanh"),
        Step(conv, (2,), "conv2d"),
        Step(torch.add, (1, 3), "add"),
        *ending(4),
    ],
    branches: [
        Step(conv, (0,), "conv2d"),
        Step(torch.tanh, (1,), "tanh"),
        Step(torch.sigmoid, (1,), "sigmoid"),
        Step(torch.mul, (2, 3), "mul"),
        Step(torch.add, (4, 1), "add"),
        *ending(5),
    ],
    chunks: [
        Step(conv, (0,), "conv2d"),
        Step(lambda y: y.chunk(2, 1), (1,), "chunk", 2),
        Step(torch.mul, (2, 3), "mul"),
        Step(torch.exp, (3,), "exp"),
        Step(lambda a, b: torch.cat([a, b], 1), (4, 5), "cat"),
        *ending(6),
    ],
    cat_of_itself: [
        Step(conv, (0,), "conv2d"),
        Step(lambda a, b: torch.cat([a, b], 1), (1, 1), "cat"),
        Step(lambda y: y[:, 1:3], (2,), "getitem"),
        Step(torch.square, (3,), "pow"),
        *ending(4),
    ],
    twice_in_a_list: [
        Step(conv, (0,), "conv2d"),
        Step(lambda a, b, c: torch.stack([a, b, c]), (1, 1, 0), "stack"),
        Step(lambda y: y.prod(0), (2,), "prod"),
        *ending(3),
    ],
    in_place: [
        Step(conv, (0,), "conv2d"),
        Step(lambda y: 3 * y, (1,), "mul_"),
        Step(torch.add, (2, 0), "add_"),
        Step(F.elu, (3,), "elu"),
        Step(torch.sin, (4,), "sin"),
        *ending(5),
    ],
    in_place_beside_its_former_self: [
        Step(conv, (0,), "conv2d"),
        Step(torch.cos, (1,), "cos"),
        Step(torch.clone, (2,), "clone"),
        Step(torch.add, (3, 1), "add_"),
        Step(torch.mul, (4, 2), "mul"),
        *ending(5),
    ],
    in_place_with_itself: [
        Step(conv, (0,), "conv2d"),
        Step(torch.add, (1, 1), "add_"),
        Step(torch.sin, (2,), "sin"),
        *ending(3),
    ],
    spectrum: [
        Step(conv, (0,), "conv2d"),
        Step(torch.fft.rfft2, (1,), "fft_rfft2"),
        Step(lambda z: z * FILTER, (2,), "mul"),
        Step(torch.fft.irfft2, (3,), "fft_irfft2"),
        Step(torch.add, (0, 4), "add"),
        *ending(5),
    ],
    conjugates: [
        Step(conv, (0,), "conv2d"),
        Step(torch.fft.fft2, (1,), "fft_fft2"),
        Step(torch.conj, (2,), "conj"),
        Step(torch.mul, (2, 3), "mul"),
        Step(lambda z: z * (1 + 2j), (4,), "mul"),
        Step(torch.imag, (5,), "get imag"),
        *ending(6),
    ],
    minus_itself: [
        Step(torch.sub, (0, 0), "sub"),
        Step(conv, (1,), "conv2d"),
        Step(torch.exp, (0,), "exp"),
        Step(torch.add, (2, 3), "add"),
        *ending(4),
    ],
}


@pytest.mark.filterwarnings("ignore:The contributions miss", "ignore:Method")
@pytest.mark.parametrize("model", PROGRAMS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("generator", ["rotation", "translation_x", "saturation"])
def test_each_operation_by_its_jacobian(model, generator):
    check(model, PROGRAMS[model], generator=generator)


def _written(x):
    """Views that are written through: what they write is an operation on the whole of the tensor."""
    y = conv(x)
    y[:, :1].mul_(3)
    y[:, 1:] = y[:, :1] + 1
    return head(y)


def test_views_that_are_written_through():
    """The calls of views give values that nobody uses; the writing calls take the tensor as it was."""
    x = images(1, SIZE)[:, :2]
    report = lm.layerwise_equivariance_error(_written, x, "rotation", probes="exact")
    steps = [
        Step(conv, (0,), "conv2d"),
        Step(lambda y: torch.cat([3 * y[:, :1], y[:, 1:]], 1), (1,), "mul_"),
        Step(lambda y: y[:, :1], (2,), "getitem"),
        Step(lambda y: y + 1, (3,), "add"),
        Step(lambda y, z: torch.cat([y[:, :1], z], 1), (2, 4), "__setitem__"),
        *ending(5),
    ]
    steps = in_two(steps)
    wanted = reference(steps, x)
    found = {operation.function: report.vectors[i, 0] for i, operation in enumerate(report.operations)}
    rows = {step.name: row for step, row in zip(steps, wanted, strict=True) if step.name != "getitem"}
    assert set(found) == {*rows, "getitem", "output"}
    for name, row in rows.items():
        torch.testing.assert_close(found[name], row, rtol=1e-9, atol=1e-11)


ONE = {
    "tanh": torch.tanh,
    "sin": torch.sin,
    "conv2d": conv,
    "softmax": lambda y: y.softmax(1),
    "avg_pool2d": lambda y: F.avg_pool2d(y, 3, 1, 1),
    "roll": lambda y: y.roll(1, -1),
    "flip": lambda y: y.flip(1),
    "sigmoid": torch.sigmoid,
}
TWO = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "matmul": torch.matmul, "maximum": torch.maximum}
IN_PLACE = {"add_": torch.add, "sub_": torch.sub, "mul_": torch.mul}
"""What they do to a copy of their first value; the copy is a step of its own, "clone"."""


@st.composite
def programs(draw):
    """Names of operations and the numbers of the maps that go into them; every map has the shape of the image."""
    program, maps, made = [], [0], 1
    for _ in range(draw(st.integers(4, 8))):
        name = draw(st.sampled_from([*ONE, *TWO, *IN_PLACE]))
        # Recent values more often: long chains, and few values that nobody uses.
        value = st.one_of(st.just(maps[-1]), st.sampled_from(maps[-3:]), st.sampled_from(maps))
        program.append((name, tuple(draw(value) for _ in range(1 if name in ONE else 2))))
        made += 2 if name in IN_PLACE else 1
        maps.append(made - 1)
    return program


@pytest.mark.filterwarnings("ignore:The contributions miss", "ignore:All contributions", "ignore:Method")
@settings(max_examples=60, deadline=None)
@given(programs())
def test_random_programs_by_jacobians(program):
    def model(x):
        values = [x]
        for name, numbers in program:
            given = [values[number] for number in numbers]
            if name in IN_PLACE:
                target = given[0].clone()
                values += [target, getattr(target, name)(given[1])]
            else:
                values.append({**ONE, **TWO}[name](*given))
        return head(values[-1]).tanh()

    steps = []
    for name, numbers in program:
        if name in IN_PLACE:
            steps.append(Step(torch.clone, numbers[:1], "clone"))
            numbers = (len(steps), numbers[1])
        steps.append(Step({**ONE, **TWO, **IN_PLACE}[name], numbers, name))
    steps += [*ending(len(steps)), Step(torch.tanh, (len(steps) + 2,), "tanh")]
    steps = in_two(steps)
    x = images(1, SIZE)[:, :2]
    report = lm.layerwise_equivariance_error(model, x, "rotation", probes="exact")
    wanted = reference(steps, x)
    assert [operation.function for operation in report.operations] == [*(step.name for step in steps), "output"]
    torch.testing.assert_close(report.vectors[:-1, 0], wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()) + 1e-14)
