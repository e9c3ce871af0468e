"""The way that weights take to a GPU, all of it, on a device that is not the host but
whose memory the CPU can compute with: staging, aligned slots, pinned memory, events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_gds import FakeCuFile
from test_pinned import FakeRegistrar

import penstock
import zoo
from penstock import Policy
from penstock.io.devices.device import CpuDevice
from penstock.io.memory.arena import HostMemory
from penstock.io.memory.pinned import Pinned
from penstock.io.readers import gds
from penstock.io.readers.gds import GdsReader
from penstock.offload.engine import build
from penstock.offload.model import engine_of

pytestmark = pytest.mark.usefixtures("no_leaks")

KINDS = ["llama", "gpt2", "mixtral", "bloom", "t5"]


@dataclass
class FakeGpu(CpuDevice):
    """Copies at once; its memory is the host's, which nobody is told."""

    is_host = False
    registrar: FakeRegistrar = field(default_factory=FakeRegistrar)
    settled: list[int] = field(default_factory=list)

    def pin(self, memory: HostMemory, max_bytes: int) -> Pinned | None:
        return Pinned(
            memory.view(0, memory.nbytes),
            max_bytes=max_bytes,
            chunk_bytes=3 * 4096,
            registrar=self.registrar,
        )

    def settle(self, memory: HostMemory) -> str | None:
        self.settled.append(memory.nbytes)
        return None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    found = FakeGpu()
    monkeypatch.setattr(build, "open_device", lambda name, num_sharing=1: found)
    yield found
    assert found.registrar.pieces == {}, "every page is given free"


def outputs(model: Any, kind: str) -> torch.Tensor:
    with torch.inference_mode():
        found = model(**zoo.inputs(kind)).logits
    assert isinstance(found, torch.Tensor)
    return found


POLICIES: dict[str, dict[str, Any]] = {
    "disk": {},
    "host": {"host_memory": "1GiB"},
    "half": {"host_memory": 60_000, "device_memory": 400_000},
    "peer": {"peer": {"cpu": 60_000}, "host_memory": 60_000},
    "little pinned": {"host_memory": "1GiB", "pinned_memory": 20_000},
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_resident_model(
    kind: str, name: str, gpu: FakeGpu, tmp_path: Path
) -> None:
    zoo.save_checkpoint(kind, tmp_path)
    resident = zoo.load(kind, tmp_path)
    values = {"device_memory": 300_000, "resident_below": 1, **POLICIES[name]}
    with penstock.load(tmp_path, Policy(**values)) as model:
        for _ in range(2):
            assert torch.equal(outputs(model, kind), outputs(resident, kind))
        found = penstock.statistics(model)
        slots = engine_of(model)._tiers
        for transfer in slots._transfers.values():
            for placed in transfer.tensors:
                assert placed.offset % 256 == 0
    if name == "little pinned":
        assert any("the cap is" in fallback for fallback in found.fallbacks)
    assert gpu.settled, "memory is asked for near the device"


def test_copies_end_where_pinned_pieces_do(gpu: FakeGpu, tmp_path: Path) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    policy = Policy(device_memory=300_000, resident_below=1, host_memory="1GiB")
    with penstock.load(tmp_path, policy) as model:
        outputs(model, "llama")
        link = next(x for x in engine_of(model)._tiers.links if x.tier == "host")
        assert link.statistics().num_copies > 0
        cuts = list(link._source.cut(0, 10 * 4096))
        assert max(nbytes for _, nbytes in cuts) <= 3 * 4096
        assert sum(nbytes for _, nbytes in cuts) == 10 * 4096


def with_gds(monkeypatch: pytest.MonkeyPatch) -> FakeCuFile:
    system = FakeCuFile()

    def open_reader(stamps: Any, **sizes: Any) -> GdsReader:
        return GdsReader(stamps, open_file=system.open, **sizes)

    monkeypatch.setattr(gds, "GdsReader", open_reader)
    monkeypatch.setattr(gds, "why_not", lambda device, path: None)
    return system


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_can_be_read_straight_into_slots(
    kind: str, gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save_checkpoint(kind, tmp_path)
    resident = zoo.load(kind, tmp_path)
    system = with_gds(monkeypatch)
    policy = Policy(
        device_memory=300_000, resident_below=1, **{"io": {"reader": "gds"}}
    )
    with penstock.load(tmp_path, policy) as model:
        for _ in range(2):
            assert torch.equal(outputs(model, kind), outputs(resident, kind))
        found = penstock.statistics(model)
        engine_of(model)._tiers.close()  # what was fetched ahead has arrived, too
        bytes_read = penstock.statistics(model).bytes_read["disk"]
    assert found.bytes_copied == 0
    assert system.offsets, "read by cuFile"
    assert bytes_read >= found.bytes_loaded > 0


def test_experts_that_were_stored_one_by_one_are_read_straight(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = zoo.ARCHITECTURES["mixtral"].config()
    config.hidden_size, config.intermediate_size = 256, 320
    config.num_attention_heads = config.num_key_value_heads = 4
    torch.manual_seed(3)
    transformers.MixtralForCausalLM(config).save_pretrained(
        tmp_path, max_shard_size="3MB"
    )
    resident: Any = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    system = with_gds(monkeypatch)
    policy = Policy(
        device_memory="16MiB", resident_below=1, **{"io": {"reader": "gds"}}
    )
    with penstock.load(tmp_path, policy) as model:
        assert torch.equal(outputs(model, "llama"), outputs(resident, "llama"))
        found = penstock.statistics(model)
    assert found.bytes_copied == 0
    assert system.offsets, "read by cuFile"


def test_only_parts_that_must_be_made_are_not_read_straight(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save_checkpoint("mixtral", tmp_path)  # whose experts are small
    resident = zoo.load("mixtral", tmp_path)
    system = with_gds(monkeypatch)
    policy = Policy(device_memory="1MiB", resident_below=1, **{"io": {"reader": "gds"}})
    with penstock.load(tmp_path, policy) as model:
        assert torch.equal(outputs(model, "mixtral"), outputs(resident, "mixtral"))
        found = penstock.statistics(model)
    assert 0 < found.bytes_copied < found.bytes_loaded
    assert system.offsets, "the others are read by cuFile"
    assert any("the weights of" in said and "parts" in said for said in found.fallbacks)


def test_what_must_be_cast_is_not_read_straight(gpu: FakeGpu, tmp_path: Path) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    policy = Policy(device_memory=600_000, dtype="float64", **{"io": {"reader": "gds"}})
    with penstock.load(tmp_path, policy) as model:
        outputs(model, "llama")
        fallbacks = penstock.statistics(model).fallbacks
    assert any("'gds'" in said and "cast" in said for said in fallbacks)


def test_a_read_that_fails_names_unit_file_and_offset(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    policy = Policy(device_memory=300_000, resident_below=1)
    with penstock.load(tmp_path, policy) as model:
        expected = outputs(model, "llama")
        files = engine_of(model)._tiers.drive.reader._files  # type: ignore[attr-defined]

        def changed(*args: Any) -> Any:
            raise penstock.PenstockError("model-00001: offset 4096 cannot be read")

        with monkeypatch.context() as patch:
            patch.setattr(files, "open", changed)
            with pytest.raises(penstock.PenstockError, match=r"unit .*offset 4096"):
                outputs(model, "llama")
        assert torch.equal(outputs(model, "llama"), expected)
