"""How many completions have room for their keys and values."""

from transformers import GenerationConfig

from penstock.offload.generation.caches import Caches
from penstock.offload.generation.completions import Prompt
from penstock.offload.generation.decoding_options import DecodingOptions


def way(**options: int) -> DecodingOptions:
    config = GenerationConfig(**options)  # type: ignore[no-untyped-call]
    return DecodingOptions(config, (), 4, frozenset(), 0)


def prompts(num: int, length: int, **options: int) -> list[Prompt]:
    return [Prompt(n, n, way(**options), (5,) * length) for n in range(num)]


def caches(room: int | None, token: int = 10) -> Caches:
    return Caches(room_bytes=room, token_bytes=token)


def test_a_micro_batch_has_no_more_rows_than_have_room_together() -> None:
    pool = [*prompts(3, 2), *prompts(2, 6)]  # ten tokens in the end, at most
    assert caches(1000).most_rows(pool, 32) == 10
    assert caches(1000).most_rows(pool, 8) == 8
    assert caches(50).most_rows(pool, 8) == 1, "one goes on, whatever it takes"
    assert caches(1000).most_rows([], 8) == 8


def test_beams_and_several_texts_of_a_row_have_a_cache_each() -> None:
    assert caches(1000).most_rows(prompts(2, 6, num_beams=2), 32) == 5
    assert (
        caches(1000).most_rows(
            prompts(2, 6, do_sample=True, num_return_sequences=5), 32
        )
        == 2
    )


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
