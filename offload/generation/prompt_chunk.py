"""How much of each prompt comes in with one pass. Pure."""

from ...scheduler.packing import chunk_tokens
from ..policy import Policy


def prompt_chunk(
    policy: Policy, num_rows: int, num_groups: int, *, in_parts: bool
) -> int | None:
    """Tokens of each prompt in a micro-batch of `num_rows` that come in with one pass,
    which `num_groups` micro-batches share. None: all of them at once, as for models
    whose prompts cannot come `in_parts`."""
    asked, keeps_bits = policy.prompt_tokens, policy.coalesce == "off"
    if not in_parts or asked == "all" or (keeps_bits and asked == "auto"):
        return None
    if asked != "auto":
        return asked
    return chunk_tokens(
        num_rows,
        num_groups,
        tokens_in_flight=policy.tokens_in_flight,
        max_tokens=policy.micro_batch_tokens,
    )
