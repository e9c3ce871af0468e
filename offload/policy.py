"""What the user asks for. Every default of Penstock is set here (those of `kv`: in
settings/kv.py) and nowhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError

from ..io.errors import PolicyError
from ..io.pace import Pace
from .settings.contradictions import contradictions
from .settings.counts import open_counts, without_auto
from .settings.explain import explain
from .settings.extends import apply, read_policy
from .settings.kv import KvPolicy
from .settings.origin import Document, Origin, PolicyProblems
from .settings.user_cache import user_cache
from .settings.values import (
    AutoBytes,
    AutoCount,
    AutoExperts,
    AutoLookahead,
    AutoOnOff,
    Bytes,
    DeviceName,
    DtypeName,
    Expression,
    Section,
    TierName,
)


class IO(Section):
    """How bytes are read from disk."""

    reader: Literal["auto", "libaio", "threads", "aiofiles", "gds"] = "auto"
    """How files are read. `libaio` (the kernel's queue) and `threads` bypass the page
    cache, `aiofiles` uses it, `gds` reads into GPU memory. `auto` measures once for
    each drive and remembers the result. If the reader is not available, another one is
    used, and that is announced."""
    threads: Annotated[int, Field(ge=1, le=64)] = 2
    """How many reads `threads` and `aiofiles` run at the same time. Two keep one NVMe
    drive busy with large chunks."""
    depth: Annotated[int, Field(ge=1, le=256)] = 4
    """How many reads `libaio` runs at the same time."""
    chunk: Bytes = 8 << 20
    """Most bytes of one read."""
    max_gap: Bytes = 32 << 10
    """Tensors with at most this many other bytes between them are read together."""
    bounce: Bytes = 4 << 20
    """Bytes of one buffer for weights that are cast or assembled while they are loaded.
    There are two for each of two threads."""
    direct: bool = True
    """Bypass the page cache (O_DIRECT) if the file system allows it."""
    read_once: bool = True
    """Let the processes of `--workers` share what they read from disk, through some
    memory that all of them have, so that it is read once for all. Where the page cache
    is used, it does the same."""
    cache: Path | None = None
    """Folder for what is kept between runs (such as which reader is the fastest), and
    for the weights of wrapped modules while they are streamed. None: the user's cache
    folder."""


class LinkPolicy(Section):
    """The speed that a link is limited to."""

    bandwidth: Bytes
    """Bytes per second."""
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds of delay of each unit, in addition."""


def cache_folder(io: IO) -> Path:
    """The cache folder that `io` names; else the user's, or the folder that replaces
    it."""
    return io.cache or user_cache().path


def throttle(policy: "Policy", tier: str) -> Pace | None:
    """The limit that `policy` sets to the speed of the link from `tier`; None if it
    sets none."""
    speed = policy.links.get(tier)  # type: ignore[call-overload]
    if speed is None:
        return None
    return Pace(bytes_per_second=speed.bandwidth, latency_seconds=speed.latency)


def cache_fallback(io: IO) -> str | None:
    """Why the cache folder is not the user's own. None if it is, or if `io` names
    one."""
    return None if io.cache is not None else user_cache().fallback


class Policy(Section):
    """How a model is streamed. Sizes are numbers of bytes or strings such as "2GiB".
    Counts may be `auto`, which is the same as leaving the key out. Jobs let the planner
    choose the counts that nobody set."""

    device: DeviceName = "cpu"
    """The device that computes: `cpu`, `cuda` or `cuda:1`."""
    dtype: DtypeName = "auto"
    """Dtype of the weights in the working set (`float32`, `bfloat16`, ...). If it
    differs from the checkpoint's, weights are cast while they are loaded. `auto`:
    `penstock.load` and `wrap` take the checkpoint's dtype, as transformers does. Jobs,
    `plan` and `tune` take float32 if the CPU has no instructions for the checkpoint's
    16-bit dtype, the plan says that it is faster, and it fits."""
    memory: AutoBytes = "auto"
    """Bytes of the machine's memory that the whole process may take: Python and its
    libraries, weights, activations, keys and values, buffers. Sizes that are `auto` are
    parts of it. `auto` is what the machine and the cgroups of the process have free
    when the model is loaded, less a sixteenth. If a GPU computes, this is host memory
    only."""
    adapter: Path | None = None
    """Folder of an adapter (such as LoRA) that PEFT applies to the model
    (`penstock[peft]`). It stays on the device, beside `device_memory`."""
    device_memory: AutoBytes = "auto"
    """Bytes of the working set: slots of streamed weights, and resident weights. `auto`
    is its part of `memory` or, on a GPU, half of what is free there; at most the size
    of the model."""
    peer: dict[DeviceName, Bytes] = Field(default_factory=dict)
    """Bytes of weights that stay on other GPUs, by device: `{"cuda:1": "40GiB"}`. `cpu`
    simulates another GPU in host memory."""
    host_memory: Bytes | None = None
    """Bytes of weights that are read once and stay in host memory, beside
    device_memory; the rest is read from disk in every pass. None: no weights stay."""
    weights_kept: Literal["auto", "stored", "decoded"] = "auto"
    """How weights are kept in memory (`host_memory`, `peer`): as the files have them,
    and decoded or cast whenever they are loaded (`stored`), or as they are computed
    with (`decoded`). `auto`: as they are stored if they have fewer bytes so; on a CPU
    only if not all of them fit in `host_memory` otherwise, since decoded ones are used
    where they lie."""
    host_shared: bool = False
    """Processes of this machine that load the same checkpoint with the same policy
    share one copy of the weights in host memory."""
    placement: dict[Expression, TierName] = Field(default_factory=dict)
    """Where units stay, by regular expressions on their names; the first that matches
    counts. Tiers are `device`, `peer` (the first one) or a peer's name, `host`, `disk`.
    The other units are spread over these, in this order, as far as there is room."""
    staging_memory: AutoBytes = "auto"
    """Bytes of host memory through which weights are copied from disk to a GPU. `auto`
    is three times the size of the largest unit."""
    pinned_memory: AutoBytes = "auto"
    """Most bytes of host memory that are pinned for copies to a GPU: the host tier and
    the staging memory. `auto`: all of both, as far as the system allows it. Copies from
    memory that is not pinned are slower; that is announced."""
    links: dict[Literal["peer", "host", "disk"], LinkPolicy] = Field(
        default_factory=dict
    )
    """Speed limits of links, by the tier at their end: to leave bandwidth to others, or
    to simulate a slower link."""
    activation_memory: AutoBytes = "auto"
    """Bytes that the suspended micro-batches of a sweep may hold together: in device
    memory or, with `activations: host`, in host memory. `auto` is its part of `memory`;
    on a GPU, a quarter of what is free when a sweep without a width begins."""
    activations: Literal["device", "host"] = "device"
    """Where a suspended micro-batch keeps its hidden states, masks and caches. With
    `host`, device memory holds only those of the micro-batch that computes and of its
    neighbours. Tensors that something else refers to (its batch, the model, another
    micro-batch, an outside variable) stay on the device."""
    experts: AutoExperts = "device"
    """Where experts that are loaded as routers choose them, and lie in host memory, are
    computed if a GPU computes the rest. `device`: there. A number: experts that fewer
    tokens chose (of all micro-batches of a sweep) are computed by the CPU where they
    lie, and these tokens' hidden states move instead of the weights. `host`: jobs and
    `penstock plan` choose the number, by the machine's rates. The last bits of results
    may change, as CPU and GPU round differently."""
    kv: KvPolicy = KvPolicy()
    """Where keys and values of models that generate are kept."""
    micro_batch_tokens: AutoCount = 512
    """Tokens that run through a unit in one call, in scoring; at most all that are in
    flight."""
    tokens_in_flight: AutoCount = 4096
    """Tokens that share one pass over the weights, in scoring. Enough of them hide the
    time of streaming."""
    micro_batch_sequences: AutoCount = 32
    """Rows that run through a unit in one call, in generation; at most all that are in
    flight. If it is not set, it is at most a quarter of those, or 8 if that is more."""
    sequences_in_flight: AutoCount = 256
    """Rows that share one pass over the weights for each of their new tokens."""
    prompt_tokens: Literal["auto", "all"] | Annotated[int, Field(ge=1)] = "auto"
    """Tokens of each prompt that run through a unit in one call. A longer prompt takes
    several passes, which other rows use for their next tokens. `all`: the whole prompt
    at once, with exactly its results. `auto`: as many as let the micro-batches in
    flight share a pass of `tokens_in_flight`, and a call have `micro_batch_tokens`; all
    if `coalesce` is `off`. Models whose layers keep other states than keys and values
    take all."""
    logits_memory: Bytes = 64 << 20
    """Bytes of logits (with their float32 copies) that exist at one time, in scoring:
    the head runs in chunks of as many positions as fit."""
    lookahead: AutoLookahead = 2
    """How many sites ahead of the computing one are prefetched, not counting those
    whose units stay."""
    gather_rows: Bytes = 32 << 20
    """Embedding tables of at least this size are not loaded: only the rows that are
    looked up are read from the file."""
    resident_below: Bytes = 1 << 20
    """Modules outside of the blocks (norms, small embeddings) below this size stay in
    the working set."""
    compile: bool = False
    """Compile the forward of each block with torch.compile: one graph for all equal
    blocks, made in the first call, which fuses small operations. The last bits of
    results may change, which `penstock verify` finds. Needs a C++ compiler (on a GPU:
    triton), and calls that record no gradients. What cannot be compiled is announced
    and runs as it is. CUDA graphs are not used, since weights have another address in
    the next pass."""
    coalesce: AutoOnOff = "auto"
    """Whether matrix products of few rows, as in decode, are made once for all
    micro-batches of a sweep. The last bits of results may change, and with
    `activations: host` the device holds all micro-batches that share a product. `auto`:
    if a sweep asks for it (`coalesce=True`). `on`: unless a sweep refuses
    (`coalesce=False`). `off`: never; then rows that have ended remain in their
    micro-batch as padding, so that the products of the others keep their bits. Cannot
    be combined with `compile`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint or that it names (`auto_map`,
    kernels of others, `custom_generate/`): for models that transformers has no code
    for, if you trust them. Otherwise no such code runs, nothing is asked, and a
    checkpoint that needs it is refused."""
    ranks: Literal["pipeline", "gather", "tensor"] | None = None
    """How several processes (ranks), of this computer or of several, share one model.
    `pipeline`: each streams, holds and computes its own blocks, and sends what they
    make to the next one; with n ranks there are n drives or links, host memories and
    memories for keys and values. `gather`: each computes all blocks, for rows of its
    own, but reads only 1/n of the bytes, and sends them to the others (CPU only).
    `tensor`: all compute each micro-batch together; each streams, holds and multiplies
    1/n of the output rows of every matrix product in the blocks, and sends its part of
    the output to all others (CPU only). The ranks are those of torchrun, or of
    `--ranks`. None: this process has the whole model. With GPUs, `device: cuda` gives
    each rank of a computer its own."""
    strict: bool = False
    """Raise an error if weights are used outside of their unit's forward. Otherwise
    they are loaded at once, counted, and stay in the working set."""
    io: IO = IO()
    """How bytes are read from disk."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**without_auto(values))
        except ValidationError as error:
            raise PolicyProblems(explain(error, type(self))) from None
        self.__dict__.update(open_counts(self))
        if problems := contradictions(self):
            raise PolicyProblems(problems)

    @classmethod
    def of(cls, value: "Policy | Mapping[str, Any] | None") -> "Policy":
        """Converts `value` to a policy.

        It is a policy, a dict of its keys, or None for the defaults. Raises
        PolicyError.
        """
        if value is None:
            return cls()
        if isinstance(value, Policy):
            return value
        if isinstance(value, Mapping):
            return cls(**{str(key): one for key, one in value.items()})
        raise PolicyError(
            f"{value!r:.100} is not a policy: give a Policy, or a dict of its keys; a "
            "file is read by Policy.from_yaml"
        )

    @property
    def origin(self) -> Origin:
        """Where each key was written in its files."""
        return self._origin

    @classmethod
    def from_yaml(cls, path: str | Path, settings: Sequence[str] = ()) -> Self:
        """Reads a policy file, or the shipped policy with that name.

        It is merged over the files that it `extends`; then `key=value` settings are
        applied. Raises PolicyError, with one sentence for each thing that is wrong, and
        its file, line and column.
        """
        return cls._of(read_policy(path, settings))

    def with_settings(self, settings: Sequence[str]) -> Self:
        """This policy with `key=value` settings.

        Nested keys are dotted (`io.threads=4`). Values are YAML; null removes a key.
        Raises PolicyError.
        """
        own = Document(self.model_dump(exclude_unset=True), dict(self.origin.entries))
        return self._of(apply(own, settings))

    @classmethod
    def _of(cls, document: Document) -> Self:
        origin = Origin(document.entries)
        try:
            policy = cls(**document.values)
        except PolicyProblems as error:
            raise error.at(origin) from None
        policy._origin = origin
        return policy
