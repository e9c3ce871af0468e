"""The sweeps over one model: the open ones, and the counters of the closed ones."""

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
        """Returns these counters with those of `sweep` added."""
        statistics = sweep.statistics()
        held, joint = statistics.held_bytes_per_micro_batch, statistics.coalescing
        total = replace(
            self,
            max_in_flight=max(self.max_in_flight, statistics.max_in_flight),
            held_bytes_per_micro_batch=max(self.held_bytes_per_micro_batch, held),
            num_joint_calls=self.num_joint_calls + joint.num_calls,
            num_joint_rows=self.num_joint_rows + joint.num_rows,
            num_failed_joint_calls=self.num_failed_joint_calls + joint.num_failed,
        )
        if sweep.activation_offload is None:
            return total
        moved = sweep.activation_offload.statistics()
        return replace(
            total,
            bytes_out=self.bytes_out + moved.bytes_out,
            bytes_in=self.bytes_in + moved.bytes_in,
            num_buffers=self.num_buffers + moved.num_buffers_allocated,
        )


class Sweeps:
    """Keeps the open sweeps, so that they are closed with the model."""

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
        total, now_open = self._before, list(self._open)  # others may open one
        for sweep in now_open:
            total = total.and_of(sweep)
        return total

    def close(self) -> None:
        for sweep in self._open:
            sweep.close()
