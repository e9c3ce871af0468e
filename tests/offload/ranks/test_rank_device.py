"""Which accelerator a rank takes, and how many ranks divide one."""

from __future__ import annotations

import pytest

from penstock.offload.ranks.joining import RankEnvironment
from penstock.offload.ranks.rank_device import device_of, num_sharing

GPUS = ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("name", "there", "taken", "most"),
    [
        ("cpu", (), ["cpu"] * 3, 3),
        ("cuda", GPUS, ["cuda:0", "cuda:1", "cuda:0"], 2),
        ("cuda", GPUS[:1], ["cuda"] * 3, 3),
        ("cuda:1", GPUS, ["cuda:1"] * 3, 3),
    ],
)
def test_ranks_take_turns_over_the_accelerators_of_a_machine(
    name: str, there: tuple[str, ...], taken: list[str], most: int
) -> None:
    assert [device_of(name, rank, there) for rank in range(3)] == taken
    assert num_sharing(name, 3, there) == most


def test_the_number_on_its_machine_is_torchruns() -> None:
    given = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    given["LOCAL_WORLD_SIZE"] = "4"
    assert RankEnvironment.of(given).local_rank == 1
    assert RankEnvironment.of({**given, "LOCAL_RANK": "3"}).local_rank == 3
