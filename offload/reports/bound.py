"""Says what bound a run and which setting to change, from what the run has counted.
Pure."""

import math

from ...io.tier import Tier
from ...scheduler.packing import WIDE_ROWS
from .counts import Advice, Bound, Counts

_WAITING_BINDS = 0.1
"""With a smaller share of waiting, faster storage would make no difference."""
_OVERHEAD_BINDS = 0.25
_PADDING_BINDS = 0.15
_BUSY_BINDS = 0.15
"""A share of CPU time. Less than this may be the kernel's own work, or come from two
different clocks."""
_MANY_SEQUENCES = 64
_FEW_CALLS = 4
"""Micro-batches of at least `_MANY_SEQUENCES` rows, or at most `_FEW_CALLS` of them.
Then the overhead of a micro-batch (all but the shared matrix products) is small.
Measured with four blocks of a 3B model, 128 sequences in flight and two cores: eight
tokens of each took 32 s in micro-batches of 8, 16 s in micro-batches of 16, and 12 s in
micro-batches of 64."""
_GIB = 1 << 30


def what_bound(counts: Counts) -> Bound:
    """What bound the run: the first of other ranks, overhead, keys and values, a link,
    a busy machine or padding (whichever is more), narrow matrix products, and computing
    itself."""
    waited = sum(counts.wait_seconds.values())
    busy = waited + counts.compute_seconds
    for_ranks = counts.rank_wait_seconds
    overhead = max(0.0, counts.seconds - busy - for_ranks)
    if for_ranks > max(waited, overhead, _WAITING_BINDS * (busy + for_ranks)):
        return _ranks(counts, for_ranks / (busy + overhead + for_ranks))
    if counts.seconds and overhead / counts.seconds > _OVERHEAD_BINDS:
        return _overhead(overhead, counts.seconds)
    if busy and counts.kv_wait_seconds > max(waited, _WAITING_BINDS * busy):
        return _waiting_for_kv(counts, counts.kv_wait_seconds / busy)
    if busy and waited / busy > _WAITING_BINDS:
        return _waiting(counts, waited / busy)
    positions = counts.tokens + counts.tokens_padding
    padding = counts.tokens_padding / positions if positions else 0.0
    if counts.taken_elsewhere > max(_BUSY_BINDS, padding):
        return _busy(counts)
    if padding > _PADDING_BINDS:
        return _padding(counts, padding)
    if 0 < counts.rows_per_product < WIDE_ROWS:
        return _narrow(counts, waited / busy if busy else 0.0)
    return _computing(counts, waited / busy if busy else 0.0)


def _ranks(counts: Counts, share: float) -> Bound:
    """The first rank waited for others: they for their weights, or for messages."""
    for_weights = counts.others_wait_seconds > counts.rank_wait_seconds / 2
    why = "for their weights" if for_weights else "for what they compute"
    return Bound(
        "ranks",
        share,
        f"The first rank waited {share:.0%} of the time for others, and {why}.",
        (_more_in_flight(counts, 2.0),),
    )


def _overhead(overhead: float, seconds: float) -> Bound:
    share = overhead / seconds
    return Bound(
        "overhead",
        share,
        f"{share:.0%} of the time went neither into the model nor into waiting for its "
        "weights, but into starting, and reading and writing rows.",
        (Advice(None, "Longer jobs (more rows in one run) make this share small."),),
    )


def _waiting(counts: Counts, share: float) -> Bound:
    tier = max(counts.wait_seconds, key=lambda name: counts.wait_seconds[name])
    factor = 1 / (1 - share) if share < 1 else math.inf
    waited = f"Computing waited {share:.0%} of the time for weights from {_name(tier)}"
    stay = _stay(counts, tier, share)
    num_started = min(counts.width, counts.micro_batches)
    if counts.max_in_flight < num_started:
        why = (
            f"{waited}, and activation_memory let only {counts.max_in_flight} of "
            f"{counts.width} micro-batches in at a time."
        )
        more = Advice(
            "activations: host",
            "moves what waits out of the device; or a larger activation_memory lets "
            "more micro-batches share each pass.",
        )
        return Bound("activations", share, why, (more, *stay))
    what = "rows" if counts.is_generating else "tokens"
    work = counts.work
    if work <= counts.in_flight:
        why = f"{waited}: {work:,} {what} are too few to hide the reading."
        return Bound("rows", share, why, (_more_rows(work, what, factor), *stay))
    more = _more_in_flight(counts, factor)
    return Bound(tier, share, f"{waited}.", (more, *stay))


def _waiting_for_kv(counts: Counts, share: float) -> Bound:
    tier = max(counts.kv_bytes, key=lambda name: counts.kv_bytes[name])
    advice = []
    nearer = min(counts.kv_bytes[tier], counts.free_host_bytes // 2)
    if tier == Tier.DISK and (gib := math.floor(nearer / _GIB * 10) / 10):
        part = min(1.0, gib * _GIB / counts.kv_bytes[tier])
        effect = f"{part:.0%} of them would stay in host memory, the rest on disk."
        setting = f"kv: {{tier: host, limits: {{host: {gib:g}GiB}}}}"
        advice.append(Advice(setting, effect))
    if not counts.has_lossy_kv:
        effect = "moves half of the bytes or less, but may change what is generated."
        advice.append(Advice("kv: {dtype: int8}", effect))
    if not advice:
        advice.append(Advice(None, "Only a faster link, or shorter rows, would help."))
    why = (
        f"Computing waited {share:.0%} of the time for keys and values from "
        f"{_name(tier)}."
    )
    return Bound("kv", share, why, tuple(advice))


def _more_rows(work: int, what: str, factor: float) -> Advice:
    if math.isinf(factor):
        return Advice(None, f"Many more {what} in one job would hide it.")
    wanted = math.ceil(work * factor)
    return Advice(
        None,
        f"{_times(factor)} more {what} in one job ({_round(wanted, 1):,}) would hide "
        "it: they would all share the same passes.",
    )


def _more_in_flight(counts: Counts, factor: float) -> Advice:
    name = "sequences_in_flight" if counts.is_generating else "tokens_in_flight"
    what = "sequences" if counts.is_generating else "tokens"
    factor = min(factor, 64.0)  # beyond that, the share is too near 1 for an estimate
    wanted = math.ceil(counts.in_flight * factor)
    if counts.work < wanted:
        most = _round(counts.work, counts.micro_batch)
        return Advice(
            f"{name}: {most}",
            f"all {what} of this job would share the same passes; only more of them "
            f"in one job ({_round(wanted, 1):,}) would hide it.",
        )
    wanted = _round(wanted, counts.micro_batch)
    return Advice(
        f"{name}: {wanted}",
        f"{_times(factor)} more {what} in flight would hide it: they share each pass "
        "over the weights.",
    )


def _stay(counts: Counts, tier: str, share: float) -> tuple[Advice, ...]:
    """Advises to keep streamed weights in host memory, if there is room for them."""
    nbytes = math.ceil(counts.streamed_bytes * share)
    if tier != Tier.DISK or not nbytes or nbytes > counts.free_host_bytes:
        return ()
    gib = math.ceil((counts.host_memory + nbytes) / _GIB * 10) / 10
    return (
        Advice(
            f"host_memory: {gib:g}GiB",
            f"{share:.0%} of the streamed weights would be read once and stay in host "
            "memory.",
        ),
    )


def _padding(counts: Counts, share: float) -> Bound:
    unit = "sequences" if counts.is_generating else "tokens"
    smaller = max(1, counts.micro_batch // 2)
    return Bound(
        "padding",
        share,
        f"{share:.0%} of what was computed was padding: the rows of a micro-batch "
        "differ in length.",
        (
            Advice(
                f"micro_batch_{unit}: {smaller}",
                "smaller micro-batches are of more equal rows; more rows in one job "
                "match better, too.",
            ),
        ),
    )


def _busy(counts: Counts) -> Bound:
    share = counts.taken_elsewhere
    factor = 1 / (1 - share) if share < 1 else math.inf
    more = "" if math.isinf(factor) else f", up to {_times(factor)} as fast"
    return Bound(
        "busy",
        share,
        f"The machine was busy elsewhere: other processes or guests had {share:.0%} of "
        "the CPU time that this job's threads could have used.",
        (
            *_faster(counts),
            Advice(None, f"On a quiet machine the same job would be faster{more}."),
        ),
    )


def _narrow(counts: Counts, waited: float) -> Bound:
    rows = counts.rows_per_product
    why = (
        f"Computing: its products had {rows:.0f} rows on average, and come to their "
        f"speed from about {WIDE_ROWS}. It waited {waited:.0%} of the time for "
        "weights."
    )
    factor = WIDE_ROWS / rows
    work = counts.work
    more = Advice(None, "More rows in one job would make them wider.")
    if counts.is_generating and not counts.is_coalesced:
        more = Advice("coalesce: auto", "makes the products of all sequences at once.")
    elif counts.is_generating and work > counts.in_flight:
        factor = min(factor, work / counts.in_flight)
        wanted = _round(math.ceil(counts.in_flight * factor), counts.micro_batch)
        effect = f"{_times(factor)} wider products; keys and values take more memory."
        more = Advice(f"sequences_in_flight: {wanted}", effect)
    elif not counts.is_generating and counts.micro_batch < 2 * WIDE_ROWS <= work:
        effect = f"products of {2 * WIDE_ROWS} rows."
        more = Advice(f"micro_batch_tokens: {2 * WIDE_ROWS}", effect)
    advice = (*_faster(counts), more, *_fewer_calls(counts))
    return Bound("width", 1 - waited, why, advice)


def _computing(counts: Counts, waited: float) -> Bound:
    why = (
        f"Computing: weights were there in time (it waited {waited:.0%} of the time "
        "for them)."
    )
    advice = [*_faster(counts), *_fewer_calls(counts)]
    if not (counts.is_compiled or counts.is_coalesced):  # they cannot be combined
        effect = "fuses small operations (it may change the last bits)."
        advice.append(Advice("compile: true", effect))
    advice.append(Advice(None, "Beyond that, only a faster device helps."))
    return Bound("compute", 1 - waited, why, tuple(advice))


def _faster(counts: Counts) -> tuple[Advice, ...]:
    if not counts.has_slow_dtype:
        return ()
    effect = "this processor has no instructions for products in 16 bits."
    return (Advice("dtype: float32", effect),)


def _fewer_calls(counts: Counts) -> tuple[Advice, ...]:
    rows = min(counts.in_flight, counts.rows)
    wanted = min(_MANY_SEQUENCES, rows // _FEW_CALLS)
    if not counts.is_generating or wanted < 2 * counts.micro_batch:
        return ()
    now, then = (math.ceil(rows / each) for each in (counts.micro_batch, wanted))
    effect = f"each block is called {then} times for a token of all, not {now}."
    return (Advice(f"micro_batch_sequences: {wanted}", effect),)


def _name(tier: str) -> str:
    names: dict[str, str] = {Tier.HOST: "host memory", Tier.PEER: "another GPU"}
    return names.get(tier, tier)


def _times(factor: float) -> str:
    return f"{factor:.1f}x" if factor < 10 else f"{factor:.0f}x"


def _round(value: int, multiple: int) -> int:
    """`value` rounded up to two significant digits and a multiple of `multiple`."""
    digits = 10 ** max(0, len(str(value)) - 2)
    value = -(-value // digits) * digits
    return -(-value // multiple) * multiple
