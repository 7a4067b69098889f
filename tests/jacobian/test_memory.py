"""Memory of tangents: shared until somebody writes, changed where it is when nobody else sees it, never otherwise."""

import gc

import pytest
import torch

from lie_metric.jacobian.memory import Tangents, same_memory

FACTOR = torch.tensor([2.0, 3.0, 5.0])


def rows():
    return torch.arange(6.0).reshape(2, 3) + 1


def test_a_factor_waits_and_is_applied_once():
    tangents = Tangents(rows(), FACTOR)
    place = tangents.raw.data_ptr()
    assert torch.equal(tangents.raw, rows())
    for _ in range(2):
        assert torch.equal(tangents.get(), rows() * FACTOR)
    assert tangents.factor is None
    assert tangents.get().data_ptr() == place, "nobody else sees the memory: no other is needed"


@pytest.mark.parametrize(("first", "second", "product"), [(None, 3.0, 3.0), (2.0, None, 2.0), (2.0, 3.0, 6.0)])
def test_factors_are_multiplied(first, second, product):
    one = Tangents(rows(), first)
    two = one.scaled(second)
    assert torch.equal(two.get(), rows() * product)
    assert torch.equal(one.get(), rows() * (first or 1))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_those_that_share_memory_do_not_change_one_another(order):
    first = Tangents(rows(), 2.0)
    members = [first, first.scaled(FACTOR), first.scaled(5.0).scaled(2.0)]
    wanted = [rows() * 2, rows() * 2 * FACTOR, rows() * 20]
    assert not any(member.alone() for member in members)
    for index in order:
        assert torch.equal(members[index].get(), wanted[index])
    for member, value in zip(members, wanted, strict=True):
        assert torch.equal(member.get(), value)


def test_the_last_one_has_the_memory_to_itself():
    first = Tangents(rows())
    second = first.scaled(2.0)
    place = first.raw.data_ptr()
    assert not second.alone()
    del first
    gc.collect()
    assert second.alone()
    assert second.get().data_ptr() == place


def test_who_turns_to_other_memory_leaves_the_others():
    first = Tangents(rows())
    second, third = first.scaled(2.0), first.scaled(3.0)
    second.get()
    assert second.raw.data_ptr() != first.raw.data_ptr()
    assert second.alone()
    assert not first.alone()
    assert not third.alone()
    del second
    assert not first.alone()
    assert not third.alone()
    third.replace(rows())
    assert first.alone()
    assert third.alone()


def test_groups_are_joined_whole():
    memory = rows()
    first, other = Tangents(memory), Tangents(memory)
    second, friend = first.scaled(2.0), other.scaled(3.0)
    assert first.sharing is second.sharing
    other.share(first)
    assert all(member.sharing is first.sharing for member in (first, second, other, friend))
    assert len(first.sharing) == 4
    other.share(first)  # once more changes nothing
    assert len(first.sharing) == 4
    assert not any(member.alone() for member in (second, friend, other))
    del second, other
    gc.collect()
    assert not friend.alone()
    new = first.scaled(4.0)
    assert len(first.sharing) == 3, "those that are gone are forgotten"
    del first, friend
    gc.collect()
    assert new.alone()


def test_someone_outside_who_needs_the_memory_is_asked():
    held = [object()]
    tangents = Tangents(rows(), 2.0)
    tangents.sharing.append(lambda: held[0])
    raw = tangents.raw
    assert not tangents.alone()
    joining = Tangents(raw)
    tangents.share(joining)  # others of a group need not be tangents
    assert torch.equal(tangents.get(), rows() * 2)
    assert torch.equal(raw, rows())
    held[0] = None
    del joining
    last = Tangents(raw, 2.0)
    last.sharing.append(lambda: held[0])
    assert last.alone()


@pytest.mark.parametrize(
    ("raw", "alone"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(3, 2).t(), True),
        (torch.zeros(1, 3).expand(2, 3), False),
        (torch.zeros(2, 4)[:, ::2], False),
        (torch.zeros(2, 4)[:, :2], False),
        (torch.zeros(4).as_strided((2, 3), (1, 1)), False),
        (torch.zeros(4, 1, 3).as_strided((4, 1, 3), (3, 7, 1)), True),
        (torch.zeros(2, 1, 1), True),
        (torch.zeros(()), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
    ],
)
def test_only_entries_that_lie_apart_and_close_are_written_in_place(raw, alone):
    assert Tangents(raw).alone() is alone
    tangents = Tangents(raw, 3.0)
    assert (tangents.get().data_ptr() == raw.data_ptr()) is alone


def test_same_memory():
    one = torch.zeros(4)
    assert same_memory(one, one)
    assert same_memory(one[:2], one[2:])
    assert not same_memory(one, torch.zeros(4))
    assert not same_memory(one, one.clone())
