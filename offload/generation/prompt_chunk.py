"""Decides how many tokens of each prompt run in one pass. Pure."""

from ...scheduler.packing import chunk_tokens
from ..policy import Policy


def prompt_chunk(
    policy: Policy, num_rows: int, num_groups: int, *, in_parts: bool
) -> int | None:
    """The tokens of each prompt that run in one pass; None for all.

    A micro-batch has `num_rows` rows; `num_groups` micro-batches share a pass.
    `in_parts` says whether the model's prompts can run in several passes.
    """
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
