"""What the user asks for. Every default of Penstock stands here (those of `kv`: in
settings/kv.py) and nowhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError

from ..io.errors import PolicyError
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
    AutoLookahead,
    AutoOnOff,
    Bytes,
    DeviceName,
    DtypeName,
    Expression,
    Section,
    TierName,
)
from .settings.values import parse_bytes as parse_bytes


class IO(Section):
    """How bytes come from disk."""

    reader: Literal["auto", "libaio", "threads", "aiofiles", "gds"] = "auto"
    """How files are read: `libaio` (the kernel's queue) and `threads` read past the
    page cache, `aiofiles` through it, `gds` straight into a GPU. `auto` measures once
    for each drive and remembers. A reader that was asked for by name and cannot be had
    is announced and replaced."""
    threads: Annotated[int, Field(ge=1, le=64)] = 2
    """Reads under way at once, of `threads` and `aiofiles`. Two keep one NVMe drive
    busy in large chunks."""
    depth: Annotated[int, Field(ge=1, le=256)] = 4
    """Reads under way at once, of `libaio`."""
    chunk: Bytes = 8 << 20
    """Most bytes of one read."""
    max_gap: Bytes = 32 << 10
    """Tensors with at most so many foreign bytes between them are read as one."""
    bounce: Bytes = 4 << 20
    """Buffer, two each for two threads, of what is cast or assembled on its way in."""
    direct: bool = True
    """Read past the page cache (O_DIRECT) where the file system can."""
    cache: Path | None = None
    """Folder for what is kept between runs (which reader is best) and for the weights
    of wrapped modules while they are streamed. None: the user's cache folder."""


class LinkPolicy(Section):
    """The speed that a link is held to."""

    bandwidth: Bytes
    """Bytes a second."""
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds that each unit is late, beside that."""


def cache_folder(io: IO) -> Path:
    """The folder that `io` asks for, or the user's, as this system has it, or what
    stands in for that."""
    return io.cache or user_cache().path


def cache_fallback(io: IO) -> str | None:
    """Why the cache folder is not the user's own; None where it is or `io` names it."""
    return None if io.cache is not None else user_cache().fallback


class Policy(Section):
    """How a model is streamed. Sizes are numbers of bytes or strings such as "2GiB".
    Counts may be `auto`, too: what they are without the key. Jobs let the planner
    choose those that nobody set."""

    device: DeviceName = "cpu"
    """The device that computes: `cpu`, `cuda` or `cuda:1`."""
    dtype: DtypeName = "auto"
    """Dtype of the weights in the working set (`float32`, `bfloat16`, ...). Another one
    than the checkpoint's is cast on the way in. `auto`: for `penstock.load` and `wrap`
    the checkpoint's, as in transformers; jobs, `plan` and `tune` take float32 where a
    CPU emulates the checkpoint's 16 bits, if that is faster by the plan and fits."""
    memory: AutoBytes = "auto"
    """Bytes of the machine's memory that the whole process may take: Python and its
    libraries, weights, activations, keys and values, buffers. Sizes that are `auto`
    are parts of it. `auto` is what is free when the model is loaded, by the machine
    and by the cgroups of the process, less a sixteenth. With a GPU: the host's part."""
    adapter: Path | None = None
    """Folder of an adapter (LoRA and its like) that is applied to the model, by PEFT
    (`penstock[peft]`). It stays on the device, beside `device_memory`."""
    device_memory: AutoBytes = "auto"
    """Bytes of the working set: streamed slots and resident weights. `auto` is its part
    of `memory` or, on a GPU, half of what is free there; at most the model."""
    peer: dict[DeviceName, Bytes] = Field(default_factory=dict)
    """Bytes of weights that stay on other GPUs, by device: `{"cuda:1": "40GiB"}`. With
    `cpu`, host memory plays the part of another GPU."""
    host_memory: Bytes | None = None
    """Bytes of weights that are read once and stay in host memory, beside
    device_memory; the rest is streamed from disk at every pass. None: nothing stays."""
    host_shared: bool = False
    """Processes of this machine that load the same checkpoint with the same policy
    share one copy of what stays in host memory."""
    placement: dict[Expression, TierName] = Field(default_factory=dict)
    """Where units are to stay, by regular expressions on their names, the first that
    matches: `device`, `peer` (the first one) or a peer's name, `host`, `disk`. The
    others are spread over these, in this order, as far as there is room."""
    staging_memory: AutoBytes = "auto"
    """Bytes of host memory that weights pass through on their way from disk to a GPU.
    `auto` is three times the largest unit."""
    pinned_memory: AutoBytes = "auto"
    """Most bytes of host memory that are locked in place for copies to a GPU: the host
    tier and what weights are staged in. `auto`: all of both, as far as the system lets
    one. What is not locked is copied from more slowly, and announced."""
    links: dict[Literal["peer", "host", "disk"], LinkPolicy] = Field(
        default_factory=dict
    )
    """Links to be held to a stated speed, by the tier at their end: to leave room on
    them, or to try out how a slower one would do."""
    activation_memory: AutoBytes = "auto"
    """Bytes that the suspended micro-batches of a sweep may keep alive together: in the
    device's memory or, with `activations: host`, in the host's. `auto` is its part of
    `memory`; on a GPU, a quarter of what is free when a sweep starts without a
    width."""
    activations: Literal["device", "host"] = "device"
    """Where a suspended micro-batch keeps its hidden states, masks and caches. With
    `host` the device holds only those of the one that computes and of its neighbours.
    What it does not have to itself (its batch, what the model, another micro-batch or
    a variable outside refers to) stays on the device."""
    kv: KvPolicy = KvPolicy()
    """Where the keys and values of what generates are kept."""
    micro_batch_tokens: AutoCount = 512
    """Tokens that run through a unit in one call, when scoring; at most all that are
    in flight."""
    tokens_in_flight: AutoCount = 4096
    """Tokens that share one pass over the weights, when scoring: enough of them make
    streaming free."""
    micro_batch_sequences: AutoCount = 32
    """Rows that run through a unit in one call, when generating; at most all that are
    in flight. Left open and more than 8: at most a quarter of those."""
    sequences_in_flight: AutoCount = 256
    """Rows that share one pass over the weights for each token they get."""
    prompt_tokens: Literal["auto", "all"] | Annotated[int, Field(ge=1)] = "auto"
    """Tokens of each prompt that run through a unit in one call: a longer prompt comes
    in with several passes, beside the others' next tokens. `all`: at once, with the
    bits of that. `auto`: as many as let the micro-batches in flight share a pass of
    `tokens_in_flight`, and a call have `micro_batch_tokens`; all, where `coalesce` is
    `off`. Models whose layers keep other states than keys and values take all."""
    logits_memory: Bytes = 64 << 20
    """Bytes of logits (with their float32 copies) that exist at one time, when scoring:
    the head runs in chunks of as many positions."""
    lookahead: AutoLookahead = 2
    """Sites whose units are prefetched while one computes, not counting those whose
    units stay."""
    gather_rows: Bytes = 32 << 20
    """Embedding tables of at least this size are not loaded: the rows that are looked
    up are read from the file."""
    resident_below: Bytes = 1 << 20
    """Modules outside of the blocks (norms, small embeddings) below this size stay in
    the working set."""
    compile: bool = False
    """Compile each block's forward with torch.compile: one graph for all equal blocks,
    made at the first call, that fuses small operations. It may change the last bits,
    which `penstock verify` then finds. Needs a C++ compiler (on a GPU: triton) and a
    call that records no gradients; what cannot be compiled is announced and runs as it
    is. CUDA graphs are not used: weights stand elsewhere on the next pass."""
    coalesce: AutoOnOff = "auto"
    """Whether products of few rows, as in decode, are made once for all micro-batches
    of a sweep. It may change the last bits, and with `activations: host` the device
    holds those who share a product. `auto`: where a sweep asks for it
    (`coalesce=True`); `on`: unless it refuses (`coalesce=False`); `off`: never, and
    rows that have ended go on as padding beside the others of their micro-batch, whose
    products so stay what they are. Not with `compile`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint, or that it names (`auto_map`, a
    kernel of somebody's, `custom_generate/`): for models that transformers has no code
    for, and that you trust. Without it none is run, nothing is asked, and a checkpoint
    that needs it is refused."""
    strict: bool = False
    """Weights touched outside of their unit's forward are an error instead of being
    loaded on the spot, counted, and made resident."""
    io: IO = IO()
    """How bytes come from disk."""

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
        """What somebody gives as a policy: one, its keys and values, or None for the
        default. Raises PolicyError."""
        if value is None:
            return cls()
        if isinstance(value, Policy):
            return value
        if isinstance(value, Mapping):
            return cls(**{str(key): one for key, one in value.items()})
        raise PolicyError(
            f"{value!r:.100} is no policy: give a Policy, or a dict of its keys; a "
            "file is read by Policy.from_yaml"
        )

    @property
    def origin(self) -> Origin:
        """Where in its files each key was written."""
        return self._origin

    @classmethod
    def from_yaml(cls, path: str | Path, settings: Sequence[str] = ()) -> Self:
        """Reads a policy file (or the shipped policy of that name), what it `extends`,
        and `key=value` settings on top. Raises PolicyError: a sentence for each thing
        that is wrong, with file, line and column."""
        return cls._of(read_policy(path, settings))

    def with_settings(self, settings: Sequence[str]) -> Self:
        """This policy with `key=value` settings; nested keys are dotted
        (`io.threads=4`), values are YAML, null takes a key out."""
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
