"""The cost model: how long a pass over the weights takes. Pure.

The slowest resource bounds a pass: computing, device memory, a link or the disk. The
time of computing is summed over sites; each matrix product runs at the measured rate
for its number of rows. Units are loaded while sites compute (see `pipeline`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...io.tier import Tier
from ..packing import MAX_ROWS, WIDE_ROWS
from .pipeline import PassCost, PassWork, WeightLoad
from .rates import Rates
from .shape import MicroBatchShape, ModelShape, Settings, SiteCost, total_tokens
from .site_loads import SiteLoads, runs, site_loads
from .site_time import SiteCalls, expansion_seconds, gather_seconds, product_seconds
from .traffic import Moved, activations_moved, kv_moved

_HEAD_BYTES_PER_LOGIT = 12
"""Bytes that scoring takes for each logit: the logit, its float32 copy, a temporary."""
_HEAD_TOUCHES = 4
"""How often each logit is read or written after the product that computes it."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """The time that passes of one model take on one machine, with given settings."""

    shape: ModelShape
    rates: Rates
    settings: Settings
    loads: SiteLoads | None = None
    """What `site_loads` says of the three, if that is known already."""

    def scoring(self, batches: Sequence[MicroBatchShape]) -> PassCost:
        """The cost of a pass that scores the tokens of `batches`."""
        return self.scoring_work(batches).cost()

    def prefill(
        self, batches: Sequence[MicroBatchShape], context: float = 0.0
    ) -> PassCost:
        """The cost of a prefill pass over `batches` of prompts, or over a part of each
        prompt, of which earlier passes have computed `context` tokens."""
        return self.prefill_work(batches, context).cost()

    def decode(self, batches: Sequence[MicroBatchShape], context: float) -> PassCost:
        """The cost of a pass that generates one token for each row of `batches`, whose
        sequences are `context` tokens long."""
        return self.decode_work(batches, context).cost()

    def scoring_work(self, batches: Sequence[MicroBatchShape]) -> PassWork:
        """What `scoring` takes, by site."""
        alike = Counter(batches)
        compute = self._by_site(
            lambda site: sum(n * self._scored(site, b) for b, n in alike.items())
        )
        outside = sum(self._outside(self.rates.calls.batch, b.tokens) for b in batches)
        moved = activations_moved(self.shape, self.rates, self.settings, batches)
        return self._pass(compute, outside, moved)

    def prefill_work(
        self, batches: Sequence[MicroBatchShape], context: float = 0.0
    ) -> PassWork:
        """What `prefill` takes, by site."""
        num_rows = sum(batch.rows for batch in batches)
        alike = Counter(batches)
        compute = self._by_site(
            lambda site: (
                self._joint_head(site, batches, num_rows)
                if site.vocabulary
                else sum(
                    n * self._prompted(site, batch, batches, context)
                    for batch, n in alike.items()
                )
            )
        )
        outside = sum(self._outside(self.rates.calls.step, b.tokens) for b in batches)
        moved = activations_moved(self.shape, self.rates, self.settings, batches)
        moved += kv_moved(
            self.shape,
            self.rates,
            self.settings,
            num_new=total_tokens(batches),
            num_rows=num_rows if context else 0,
            context=context,
        )
        return self._pass(compute, outside, moved)

    def decode_work(
        self, batches: Sequence[MicroBatchShape], context: float
    ) -> PassWork:
        """What `decode` takes, by site."""
        num_rows = sum(batch.rows for batch in batches)
        compute = self._by_site(
            lambda site: (
                self._joint_head(site, batches, num_rows)
                if site.vocabulary
                else self._decoded(site, batches, num_rows, context)
            )
        )
        outside = sum(self._outside(self.rates.calls.step, b.rows) for b in batches)
        moved = kv_moved(
            self.shape,
            self.rates,
            self.settings,
            num_new=num_rows,
            num_rows=num_rows,
            context=context,
        )
        return self._pass(compute, outside, moved)

    def _by_site(self, seconds: Callable[[SiteCost], float]) -> list[float]:
        """Computes `seconds` for every site. Most sites are equal and computed once."""
        known = {
            site: seconds(site) if runs(site, self.settings) else 0.0
            for site in set(self.shape.sites)
        }
        return [known[site] for site in self.shape.sites]

    def _scored(self, site: SiteCost, batch: MicroBatchShape) -> float:
        if site.vocabulary:
            return self._scored_head(site, batch)
        return self._block(site, batch, batch.tokens, self.rates.calls.module)

    def _prompted(
        self,
        site: SiteCost,
        batch: MicroBatchShape,
        batches: Sequence[MicroBatchShape],
        context: float,
    ) -> float:
        joint = batch.tokens
        is_joint = self.settings.is_coalesced and batch.tokens < WIDE_ROWS
        if is_joint:
            joint = min(MAX_ROWS, sum(b.tokens for b in batches))
        calls = self.rates.calls
        each = calls.joint_module if is_joint else calls.decode_module
        block = self._block(site, batch, joint, each, context)
        return block + self._kv_call(site)

    def _block(
        self,
        site: SiteCost,
        batch: MicroBatchShape,
        joint_rows: int,
        call_seconds: float,
        context: float = 0.0,
    ) -> float:
        """Seconds of one site for a micro-batch whose matrix products are joined with
        those of others to `joint_rows` rows."""
        rates, tokens = self.rates, batch.tokens
        rows = max(joint_rows, tokens)
        share = tokens / rows
        products = product_seconds(rates, site, SiteCalls(tokens, rows, tokens))
        if context:  # else they are products of the call's own tokens
            products += expansion_seconds(
                rates, site, batch.rows, context, self.shape.itemsize
            )
        seen = site.context(context + batch.length)
        attention = 4.0 * site.attention_width * tokens * seen
        return (
            site.num_modules * call_seconds
            + site.num_products * rates.product_seconds * share
            + products
            + attention / rates.attention_flops.at(batch.length)
            + self._pointwise(site.pointwise_per_token * tokens)
        )

    def _decoded(
        self,
        site: SiteCost,
        batches: Sequence[MicroBatchShape],
        num_rows: int,
        context: float,
    ) -> float:
        rates, calls = self.rates, self.rates.calls
        each = max(batch.rows for batch in batches)
        is_joint = self.settings.is_coalesced and each < WIDE_ROWS and len(batches) > 1
        width = min(MAX_ROWS, num_rows) if is_joint else each
        times = num_rows / width
        products = product_seconds(rates, site, SiteCalls(num_rows, width, each))
        products += expansion_seconds(
            rates, site, num_rows, context, self.shape.itemsize
        )
        per_call = calls.joint_module if is_joint else calls.decode_module
        pointwise = site.pointwise_per_token * num_rows
        return (
            site.num_modules * per_call * len(batches)
            + site.num_products * rates.product_seconds * times
            + products
            + pointwise * self.shape.itemsize / rates.decode_bytes
            + self._kv_seconds(site, num_rows, context)
            + self._kv_call(site) * len(batches)
        )

    def _kv_call(self, site: SiteCost) -> float:
        is_kept = bool(site.kv_per_token) and self.settings.kv_tier != "auto"
        return is_kept * self.rates.calls.kv_layer

    def _kv_seconds(self, site: SiteCost, num_rows: int, context: float) -> float:
        """Seconds to read keys and values. A cache of transformers copies all of them
        for each new token."""
        nbytes = float(num_rows * (site.kv_per_token + site.own_kv_per_token))
        nbytes *= self.settings.kv_itemsize or self.shape.itemsize
        touches = 3 if self.settings.kv_tier == "auto" else 1
        return nbytes * site.context(context) * touches / self.rates.device_bytes

    def _scored_head(self, site: SiteCost, batch: MicroBatchShape) -> float:
        """Seconds of the head, run in chunks whose logits fit `logits_bytes`."""
        per_position = batch.rows * site.vocabulary * _HEAD_BYTES_PER_LOGIT
        step = max(1, self.settings.logits_bytes // per_position)
        step = min(step, batch.length)
        times = batch.length / step
        flops = site.flops_per_token * batch.tokens
        rows = step * batch.rows
        products = self.rates.matmul_seconds(flops, rows, site.weight_bytes * times)
        logits = batch.tokens * site.vocabulary * _HEAD_TOUCHES
        overhead = self.rates.calls.module + self.rates.product_seconds
        return products + self._pointwise(logits) + times * overhead

    def _joint_head(
        self, site: SiteCost, batches: Sequence[MicroBatchShape], num_rows: int
    ) -> float:
        """Seconds of the head for the last token of every row."""
        each = max(batch.rows for batch in batches)
        width = num_rows if self.settings.is_coalesced else each
        width = min(width, MAX_ROWS)
        times = num_rows / width
        flops = site.flops_per_token * num_rows
        products = self.rates.matmul_seconds(flops, width, site.weight_bytes * times)
        logits = self._pointwise(num_rows * site.vocabulary * _HEAD_TOUCHES)
        return products + logits + len(batches) * self.rates.calls.joint_module

    def _pointwise(self, elements: float) -> float:
        return elements * self.shape.itemsize / self.rates.pointwise_bytes

    def _outside(self, call_seconds: float, tokens: int) -> float:
        return call_seconds + gather_seconds(self.rates, self.shape, tokens)

    def _pass(
        self, compute: list[float], outside: float, moved: Sequence[Moved]
    ) -> PassWork:
        found = self.loads or site_loads(self.shape, self.rates, self.settings)
        loads = [list(of_site) for of_site in found.steady]
        out = [0.0] * len(compute)
        for one in moved:
            loads[one.site].append(one.load)
            out[one.site] += one.out_seconds
        for of_site in loads:
            crossing = [self.rates.crossing_seconds(x.link, x.seconds) for x in of_site]
            of_site += [
                WeightLoad(Tier.HOST, 0, seconds) for seconds in crossing if seconds
            ]
        compute = [max(c, o) for c, o in zip(compute, out, strict=True)]
        compute = [c + s for c, s in zip(compute, found.stolen, strict=True)]
        room = self.settings.capacity_bytes - self.shape.resident_bytes
        room -= found.staying_bytes
        return PassWork(
            compute,
            loads,
            [c + t for c, t in zip(compute, found.touching, strict=True)],
            [
                [*of_site, *more]
                for of_site, more in zip(loads, found.staying, strict=True)
            ],
            room_bytes=room,
            lookahead=self.settings.lookahead,
            outside_seconds=outside,
        )
