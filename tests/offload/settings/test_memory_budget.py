"""How the memory of one process is divided."""

import itertools

import pytest

from penstock.io.errors import DoesNotFitError, PolicyError
from penstock.offload.policy import Policy
from penstock.offload.settings.installed import Installed, over_budget
from penstock.offload.settings.memory_budget import (
    LEAST_HEAP,
    MOST_HEAP,
    MemoryBudget,
    MemoryRoom,
    MemoryWish,
    Use,
    divide_memory,
    reserve_of,
)

MIB = 1 << 20
WISH = MemoryWish(
    fixed=16 * MIB,
    least_weights=262 * MIB,
    paired_weights=438 * MIB,
    ahead_weights=786 * MIB,
    whole_weights=4200 * MIB,
    least_activations=100 * MIB,
    activations=220 * MIB,
)
USES: tuple[Use, ...] = ("any", "rows", "completions")


def divided(mib: int, use: Use = "rows", wish: MemoryWish = WISH) -> MemoryBudget:
    room = MemoryRoom(total=mib * MIB, runtime=400 * MIB, is_asked=True)
    return divide_memory(room, wish, use)


def parts(budget: MemoryBudget) -> int:
    own = budget.weights + budget.activations + budget.kv + budget.heap
    return budget.runtime + budget.fixed + own


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mib", [803, 900, 1100, 1500, 3000, 6000, 20000])
def test_the_parts_never_make_more_than_the_whole(mib: int, use: Use) -> None:
    budget = divided(mib, use)
    assert parts(budget) <= mib * MIB
    assert budget.weights >= WISH.least_weights
    assert budget.activations >= WISH.least_activations
    assert LEAST_HEAP <= budget.heap <= MOST_HEAP


@pytest.mark.parametrize("use", USES)
def test_more_memory_makes_no_part_smaller(use: Use) -> None:
    budgets = [divided(mib, use) for mib in range(803, 9000, 97)]
    for less, more in itertools.pairwise(budgets):
        assert more.weights >= less.weights
        assert more.activations >= less.activations


def test_what_does_not_fit_names_the_least_that_works_and_that_works() -> None:
    with pytest.raises(DoesNotFitError, match="set memory to at least 802MiB") as error:
        divided(801)
    assert "\n" not in str(error.value)
    assert divided(802).weights == WISH.least_weights


def test_what_is_free_and_does_not_do_is_named_with_the_reserve() -> None:
    room = MemoryRoom(total=700 * MIB, runtime=400 * MIB)
    with pytest.raises(DoesNotFitError, match="at least 856 MiB"):
        divide_memory(room, WISH, "rows")
    total = 856 * MIB - reserve_of(856 * MIB)
    room = MemoryRoom(total=total, runtime=400 * MIB)
    assert divide_memory(room, WISH, "rows").weights >= WISH.least_weights


def test_two_parts_of_the_weights_come_before_more_in_flight() -> None:
    assert divided(802 + 100).weights == WISH.least_weights + 100 * MIB
    assert divided(802 + 100).activations == WISH.least_activations
    assert divided(802 + 176 + 100).activations == WISH.least_activations + 100 * MIB


def test_rows_keep_weights_with_what_is_left_and_completions_half_of_it() -> None:
    rows, completions = divided(4000), divided(4000, "completions")
    assert rows.activations == WISH.activations
    assert parts(rows) == 4000 * MIB
    assert completions.activations > 2 * WISH.activations
    assert parts(completions) == 4000 * MIB


@pytest.mark.parametrize("use", USES)
def test_a_model_that_fits_leaves_the_rest_to_activations(use: Use) -> None:
    budget = divided(20_000, use)
    assert budget.weights == WISH.whole_weights
    assert parts(budget) == 20_000 * MIB


def test_a_store_of_keys_and_values_has_what_activations_would_have() -> None:
    kept = MemoryWish(
        least_weights=WISH.least_weights,
        paired_weights=WISH.paired_weights,
        whole_weights=WISH.whole_weights,
        activations=WISH.activations,
        keeps_kv=True,
    )
    budget = divided(4000, "completions", kept)
    assert budget.kv > 0
    assert budget.activations == WISH.activations


def test_a_budget_says_whether_all_in_flight_has_room() -> None:
    assert divided(900).is_tight
    assert not divided(2000).is_tight


def test_a_budget_is_one_line_for_people() -> None:
    assert str(divided(1200)) == (
        "1.2 GiB of memory: weights 489.0 MiB, activations 220.0 MiB, buffers 91.0 "
        "MiB, Python and its libraries 400.0 MiB"
    )
    free = MemoryRoom(total=1200 * MIB, runtime=400 * MIB)
    assert str(divide_memory(free, WISH, "rows")).startswith(
        "1.2 GiB of memory that is"
    )


def test_sizes_that_make_more_than_the_memory_are_refused_with_their_names() -> None:
    with pytest.raises(PolicyError, match=r"host_memory .* \+ device_memory .* make"):
        Policy(memory="1GiB", device_memory="800MiB", host_memory="300MiB")
    with pytest.raises(PolicyError, match=r"device_memory 1\.0 GiB"):
        Policy(memory="1GiB", device_memory="1GiB")
    assert Policy(memory="1GiB", device_memory="800MiB").memory == 1 << 30
    on_gpu = Policy(memory="1GiB", device="cuda", device_memory="20GiB")
    assert on_gpu.device_memory == 20 << 30


def test_more_memory_than_there_is_is_refused() -> None:
    installed = Installed(host_bytes=1 << 30, disk_bytes=1 << 40)
    (problem,) = over_budget(Policy(memory="2GiB"), installed)
    assert problem.message.startswith("memory of 2.0 GiB is more than the memory of")
    assert over_budget(Policy(memory="1GiB"), installed) == []
