"""The memory that a workload needs beside the weights."""

from ...io.kv.tiers import PENDING_BYTES
from ...scheduler.cost.memory_need import Need, generating_need, scoring_need
from ...scheduler.cost.shape import ModelShape
from ..policy import Policy
from ..settings.contradictions import keeps_kv
from .forecast import generating_of, kv_itemsize
from .planned import Workload


def need_of(
    shape: ModelShape, policy: Policy, workload: Workload, *, is_shared: bool
) -> Need:
    """The memory of all that is in flight. `is_shared`: device and host have one
    memory."""
    task = workload.task
    if not task.keeps_kv:
        return scoring_need(
            shape,
            policy.tokens_in_flight,
            policy.micro_batch_tokens,
            policy.logits_memory if task.runs_head else 0,
            waits_on_host=policy.activations == "host" and not is_shared,
        )
    in_flight, staging = policy.sequences_in_flight, policy.kv.staging_memory
    work = generating_of(
        policy,
        in_flight,
        workload.row_tokens,
        task.new_tokens,
        in_parts=shape.prompts_in_parts,
    )
    return generating_need(
        shape,
        in_flight,
        workload.row_tokens,
        task.new_tokens,
        work.each,
        chunk_tokens=work.chunk_tokens,
        kv_itemsize=kv_itemsize(policy),
        is_staged=_is_staged(policy, is_shared=is_shared),
        staging_bytes=None if staging == "auto" else staging,
        pending=PENDING_BYTES if policy.kv.tier == "disk" else 0,
        is_stored=keeps_kv(policy),
    )


def _is_staged(policy: Policy, *, is_shared: bool) -> bool:
    """Whether keys and values are copied to a buffer before attention reads them."""
    kv = policy.kv
    if kv.tier == "host" and not is_shared:
        return kv.attention != "host"
    return kv.tier == "disk" or kv.dtype != "auto"
