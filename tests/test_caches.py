"""How many completions have room for their keys and values."""

from penstock.offload.tasks.caches import Caches
from penstock.offload.tasks.completions import Prompt


def prompts(num: int, length: int) -> list[Prompt]:
    found = [Prompt(number, number) for number in range(num)]
    for prompt in found:
        prompt.ids = [5] * length
    return found


def caches(room: int | None, token: int = 10) -> Caches:
    return Caches(room_bytes=room, token_bytes=token, new_tokens=4)


def test_a_micro_batch_has_no_more_rows_than_have_room_together() -> None:
    pool = [*prompts(3, 2), *prompts(2, 6)]  # ten tokens in the end, at most
    assert caches(1000).most_rows(pool, 32) == 10
    assert caches(1000).most_rows(pool, 8) == 8
    assert caches(50).most_rows(pool, 8) == 1, "one goes on, whatever it takes"
    assert caches(1000).most_rows([], 8) == 8


def test_the_next_micro_batch_waits_for_the_room_of_those_in_flight() -> None:
    found = caches(250)
    first, second = prompts(2, 6), prompts(1, 6)  # 200 and 100 bytes
    assert found.has_room(first)
    with found.holding(first):
        assert not found.has_room(second)
    assert found.has_room(second)


def test_who_is_alone_may_always_start() -> None:
    assert caches(1).has_room(prompts(9, 9))


def test_nothing_is_counted_where_caches_take_nothing_or_are_kept_elsewhere() -> None:
    for found in (caches(None), caches(1, token=0)):
        assert found.most_rows(prompts(9, 9), 32) == 32
        with found.holding(prompts(9, 9)):
            assert found.has_room(prompts(9, 9))
