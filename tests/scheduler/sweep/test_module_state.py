"""Attributes that calls change are found, and swapped; all others are left alone."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from penstock.scheduler.sweep.module_state import _NUM_FIRST_LOOKS, ModuleState


class Part(nn.Module):
    """Keeps whatever it is told to."""

    kept: Any
    later: Any
    table: torch.Tensor
    child: Any

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(2))
        vars(self).update(attributes)


def state_of(*parts: nn.Module) -> ModuleState:
    return ModuleState(module for part in parts for module in part.modules())


def learnt(part: Part, change: Callable[[Part], object]) -> tuple[ModuleState, Any]:
    """The state after one flow made `change`, and what that flow keeps."""
    state = state_of(part)
    change(part)
    state.learn()
    return state, state.take()


def test_where_nothing_changes_nothing_is_swapped() -> None:
    part = Part(kept=[1, 2], other={"a": 1}, third="x")
    before = dict(vars(part))
    state, values = learnt(part, lambda part: None)
    assert values == ()
    state.put(values)
    assert all(vars(part)[key] is value for key, value in before.items())
    assert state.conflict is None


def set_attribute(part: Part) -> None:
    part.kept = "changed"


def set_number(part: Part) -> None:
    part.kept += 1


def drop_attribute(part: Part) -> None:
    del part.kept


def add_buffer(part: Part) -> None:
    part.register_buffer("kept", torch.ones(3), persistent=False)


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Part], None]]] = {
    "set where there was none": ({}, set_attribute),
    "set where there was None": ({"kept": None}, set_attribute),
    "set to another": ({"kept": "first"}, set_attribute),
    "a number": ({"kept": 5}, set_number),
    "dropped": ({"kept": "first"}, drop_attribute),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_attribute_is_each_flows_own(change: str) -> None:
    attributes, act = CHANGES[change]
    part = Part(**attributes)
    blank = dict(vars(part))

    state, first = learnt(part, act)
    assert dict(vars(part)) == blank

    act(part)  # a second flow makes the same change from the same beginning
    second_sees = dict(vars(part))
    second = state.take()
    state.put(first)
    assert dict(vars(part)) == second_sees  # equal, but the first one's
    part.kept = "the first one's alone"
    first = state.take()
    state.put(second)
    assert dict(vars(part)) == second_sees
    state.put(first)
    assert part.kept == "the first one's alone"
    state.put(())
    assert dict(vars(part)) == blank


def test_eval_mode_is_each_flows_own() -> None:
    part = Part()
    state, values = learnt(part, lambda part: part.train(False))
    assert part.training
    assert part.child.training
    state.put(values)
    assert not part.training
    assert not part.child.training


def test_a_buffer_registered_again_is_each_flows_own() -> None:
    part = Part()
    table = part.table
    state, values = learnt(
        part, lambda part: part.register_buffer("table", torch.ones(2))
    )
    assert part.table is table
    state.put(values)
    assert torch.equal(part.table, torch.ones(2))


def test_a_new_buffer_is_gone_for_others() -> None:
    part = Part()
    state, values = learnt(part, add_buffer)
    assert not hasattr(part, "kept")
    state.put(values)
    assert part.kept.shape == (3,)


CONTAINERS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "list": ([1], lambda kept: kept.append(2)),
    "list, one replaced": ([1, 2], lambda kept: kept.__setitem__(0, 9)),
    "dict": ({"a": 1}, lambda kept: kept.update(b=2)),
    "dict, one replaced": ({"a": 1}, lambda kept: kept.update(a=2)),
    "set": ({1}, lambda kept: kept.add(2)),
    "deque": (deque([1]), lambda kept: kept.append(2)),
    "ordered dict": (OrderedDict(a=1), lambda kept: kept.popitem()),
    "default dict": (defaultdict(list), lambda kept: kept["a"]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_is_changed_in_place_is_each_flows_own_copy(kind: str) -> None:
    original, change = CONTAINERS[kind]
    blank = original.copy()
    part = Part(kept=original)
    state, first = learnt(part, lambda part: change(part.kept))
    assert part.kept == blank
    assert type(part.kept) is type(blank)

    change(part.kept)
    changed = part.kept
    second = state.take()
    assert part.kept == blank
    assert part.kept is not changed
    state.put(first)
    assert part.kept is original
    state.put(second)
    assert part.kept is changed
    assert changed == original


def test_modules_that_share_a_list_share_each_flows_copy() -> None:
    shared: list[int] = []
    one, other = Part(kept=shared), Part(kept=shared)
    state = state_of(one, other)
    shared.append(1)
    state.learn()
    state.take()
    assert one.kept == []
    assert one.kept is other.kept


def test_a_list_that_is_changed_and_then_replaced_is_put_back_as_it_was() -> None:
    def act(part: Part) -> None:
        part.kept.append(2)
        part.kept = [9]

    part = Part(kept=[1])
    learnt(part, act)
    assert part.kept == [1]


def test_a_tensor_written_in_place_is_a_conflict() -> None:
    part = Part()
    with torch.inference_mode():
        state, values = learnt(part, lambda part: part.table.add_(1))
    assert state.conflict == "Part.table"
    assert values == ()


def test_a_tensor_that_a_flow_made_and_writes_to_is_its_own() -> None:
    part = Part()
    state, values = learnt(part, add_buffer)
    state.put(values)
    part.kept.add_(1)
    state.learn()
    assert state.conflict is None


def test_parameters_hooks_and_children_are_not_state() -> None:
    def act(part: Part) -> None:
        part.child.weight = nn.Parameter(torch.zeros(2, 2))
        part.child._parameters["bias"] = None
        part.register_forward_hook(lambda *args: None)
        part.child = nn.Linear(2, 2)

    part = Part()
    state = state_of(part)
    act(part)
    state.learn()
    assert state.take() == ()


def test_the_mark_of_what_was_built_in_is_everybodys() -> None:
    def act(part: Part) -> None:
        if not getattr(part, "has_hook", False):
            part.register_forward_hook(lambda *args: None)
            part.has_hook = True  # type: ignore[assignment]
        part.kept += 1

    part = Part(kept=0)
    state, _ = learnt(part, act)
    assert part.has_hook
    assert part.kept == 0  # but not what changed beside it
    part.eval()
    state.learn()
    state.take()
    assert part.training  # nor what was True all along
    act(part)
    assert len(part._forward_hooks) == 1
    state.begin()
    state.learn()
    state.take()
    assert part.has_hook


def test_what_is_learnt_later_is_blank_for_those_who_waited() -> None:
    part = Part(kept=0, later=0)
    state, first = learnt(part, set_number)
    part.later = "somebody's"
    state.learn()
    state.take()
    state.put(first)
    assert (part.kept, part.later) == (1, 0)


def test_begin_takes_what_is_there_for_the_beginning() -> None:
    part = Part(kept=0)
    state, _ = learnt(part, set_number)
    part.kept, part.child.extra = 10, "the caller's"
    state.begin()
    state.learn()
    assert state.take() == (10,)
    assert part.kept == 10


def test_every_new_step_is_looked_at_and_no_step_for_ever() -> None:
    part = Part(kept=0)
    state = state_of(part)
    looks = 0
    learn = state.learn

    def counted() -> None:
        nonlocal looks
        looks += 1
        learn()

    state.learn = counted  # type: ignore[method-assign]
    for _ in range(1000):
        state.look(3, 1, 2)
        state.look(4, 1, 3)
    few = looks
    assert 2 <= few <= 20
    for _ in range(1000):
        state.look(0, 1, 2)
    assert looks == few + _NUM_FIRST_LOOKS
    state.begin()  # another run of the same sweep
    state.look(3, 1, 2)
    assert looks == few + _NUM_FIRST_LOOKS
    state.look(3, 3, 1)
    assert looks == few + _NUM_FIRST_LOOKS + 1
