"""The sweeps over one model: those that are open, and what the closed ones counted."""

from dataclasses import dataclass, replace

from ...scheduler.sweep.sweep import Sweep


@dataclass(frozen=True, slots=True)
class SweepsStatistics:
    """Counters of all sweeps since the model was loaded."""

    max_in_flight: int = 0
    held_bytes_per_micro_batch: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    num_buffers: int = 0
    num_joint_calls: int = 0
    num_joint_rows: int = 0
    num_failed_joint_calls: int = 0

    def and_of(self, sweep: Sweep) -> "SweepsStatistics":
        """With what `sweep` has counted."""
        statistics = sweep.statistics()
        held, joint = statistics.held_bytes_per_micro_batch, statistics.coalescing
        found = replace(
            self,
            max_in_flight=max(self.max_in_flight, statistics.max_in_flight),
            held_bytes_per_micro_batch=max(self.held_bytes_per_micro_batch, held),
            num_joint_calls=self.num_joint_calls + joint.num_calls,
            num_joint_rows=self.num_joint_rows + joint.num_rows,
            num_failed_joint_calls=self.num_failed_joint_calls + joint.num_failed,
        )
        if sweep.activation_offload is None:
            return found
        moved = sweep.activation_offload.statistics()
        return replace(
            found,
            bytes_out=self.bytes_out + moved.bytes_out,
            bytes_in=self.bytes_in + moved.bytes_in,
            num_buffers=self.num_buffers + moved.num_buffers_allocated,
        )


class Sweeps:
    """Keeps open sweeps, so that they end with the model; forgets closed ones."""

    def __init__(self) -> None:
        self._open: list[Sweep] = []
        self._before = SweepsStatistics()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, sweep: Sweep) -> None:
        for other in [other for other in self._open if other.is_closed]:
            self._before = self._before.and_of(other)
            self._open.remove(other)
        self._open.append(sweep)

    def statistics(self) -> SweepsStatistics:
        found, now_open = self._before, list(self._open)  # others may open one
        for sweep in now_open:
            found = found.and_of(sweep)
        return found

    def close(self) -> None:
        for sweep in self._open:
            sweep.close()
