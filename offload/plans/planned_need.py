"""What a task keeps in memory beside the weights, under a policy."""

from ...io.kv.tiers import PENDING_BYTES
from ...scheduler.cost.memory_need import Need, generating_need, scoring_need
from ...scheduler.cost.shape import ModelShape
from ..policy import Policy
from .forecast import generating_of, kv_itemsize
from .planned import Task


def need_of(shape: ModelShape, policy: Policy, task: Task, *, is_shared: bool) -> Need:
    """Of all that is in flight; `is_shared`: the device's memory is the host's."""
    if not task.generates:
        return scoring_need(
            shape,
            policy.tokens_in_flight,
            policy.micro_batch_tokens,
            0 if task.embeds else policy.logits_memory,
            waits_on_host=policy.activations == "host" and not is_shared,
        )
    in_flight, staging = policy.sequences_in_flight, policy.kv.staging_memory
    work = generating_of(
        policy,
        in_flight,
        task.prompt_tokens,
        task.new_tokens,
        in_parts=shape.prompts_in_parts,
    )
    return generating_need(
        shape,
        in_flight,
        task.prompt_tokens,
        task.new_tokens,
        work.each,
        chunk_tokens=work.chunk_tokens,
        kv_itemsize=kv_itemsize(policy),
        is_staged=_is_staged(policy, is_shared=is_shared),
        staging_bytes=None if staging == "auto" else staging,
        pending=PENDING_BYTES if policy.kv.tier == "disk" else 0,
    )


def _is_staged(policy: Policy, *, is_shared: bool) -> bool:
    """Whether keys and values are brought to where they are attended to."""
    kv = policy.kv
    if kv.tier == "host" and not is_shared:
        return kv.attention != "host"
    return kv.tier == "disk" or kv.dtype != "auto"
