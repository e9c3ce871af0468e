"""What the user asks for. Every default of Penstock stands here (those of `kv`: in
kv_policy) and nowhere else."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from platformdirs import user_cache_path
from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    ValidationError,
)

from ..io.errors import PolicyError
from .kv_policy import KvPolicy
from .section import Section
from .values import (
    AutoBytes,
    Bytes,
    DeviceName,
    Expression,
    TierName,
    parse_setting,
)
from .values import parse_bytes as parse_bytes


class IO(Section):
    """How bytes come from disk."""

    reader: Literal["auto", "libaio", "threads", "aiofiles", "gds"] = "auto"
    """How files are read: `libaio` (the kernel's queue) and `threads` read past the
    page cache, `aiofiles` through it, `gds` straight into a GPU. `auto` measures once
    for each drive and remembers; what cannot be had is announced and replaced."""
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
    """Buffer, one each for two threads, of what is cast or assembled on its way in."""
    direct: bool = True
    """Read past the page cache (O_DIRECT) where the file system can."""
    cache: Path | None = None
    """Folder for what is kept between runs (which reader is best) and for the weights
    of wrapped modules while they are streamed. None: the user's cache folder."""


class Link(Section):
    """The speed that a link is held to."""

    bandwidth: Bytes
    """Bytes a second."""
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds that each unit is late, beside that."""


def cache_folder(io: IO) -> Path:
    """The folder that `io` asks for, or the user's, as this system has it."""
    return io.cache or user_cache_path("penstock")


class Policy(Section):
    """How a model is streamed. Sizes are numbers of bytes or strings such as "2GiB"."""

    device: DeviceName = "cpu"
    """The device that computes: `cpu`, `cuda` or `cuda:1`."""
    dtype: str = "auto"
    """Dtype of the weights in the working set (`float32`, `bfloat16`, ...); `auto` is
    the checkpoint's. Another one is cast on the way in."""
    device_memory: AutoBytes = "auto"
    """Bytes of the working set: streamed slots and resident weights. `auto` is half of
    the memory that is free, at most the model."""
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
    links: dict[Literal["peer", "host", "disk"], Link] = Field(default_factory=dict)
    """Links to be held to a stated speed, by the tier at their end: to leave room on
    them, or to try out how a slower one would do."""
    activation_memory: AutoBytes = "auto"
    """Bytes that the suspended micro-batches of a sweep may keep alive together: in the
    device's memory or, with `activations: host`, in the host's. `auto` is a quarter of
    the memory that is free when a sweep starts without a width."""
    activations: Literal["device", "host"] = "device"
    """Where a suspended micro-batch keeps its hidden states, masks and caches. With
    `host` the device holds only those of the one that computes and of its neighbours.
    What it does not have to itself (its batch, what the model, another micro-batch or
    a variable outside refers to) stays on the device."""
    kv: KvPolicy = KvPolicy()
    """Where the keys and values of what generates are kept."""
    micro_batch_tokens: PositiveInt = 512
    """Tokens that run through a unit in one call, when scoring."""
    tokens_in_flight: PositiveInt = 4096
    """Tokens that share one pass over the weights, when scoring: enough of them make
    streaming free."""
    micro_batch_sequences: PositiveInt = 8
    """Rows that run through a unit in one call, when generating."""
    sequences_in_flight: PositiveInt = 256
    """Rows that share one pass over the weights for each token they get."""
    prompt_tokens: Literal["auto", "all"] | PositiveInt = "auto"
    """Tokens of each prompt that run through a unit in one call: a longer prompt comes
    in with several passes, beside the others' next tokens. `all`: at once, with the
    bits of that. `auto`: as many as let the micro-batches in flight share a pass of
    `tokens_in_flight`, and a call have `micro_batch_tokens`; all, where `coalesce` is
    `off`. Models whose layers keep other states than keys and values take all."""
    logits_memory: Bytes = 64 << 20
    """Bytes of logits (with their float32 copies) that exist at one time, when scoring:
    the head runs in chunks of as many positions."""
    lookahead: Annotated[int, Field(ge=0, le=8)] = 2
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
    coalesce: Literal["auto", "on", "off"] = "auto"
    """Whether products of few rows, as in decode, are made once for all micro-batches
    of a sweep. It may change the last bits, and with `activations: host` the device
    holds those who share a product. `auto`: where a sweep asks for it
    (`coalesce=True`); `on`: unless it refuses (`coalesce=False`); `off`: never, and
    rows that have ended go on as padding beside the others of their micro-batch, whose
    products so stay what they are. Not with `compile`."""
    strict: bool = False
    """Weights touched outside of their unit's forward are an error instead of being
    loaded on the spot, counted, and made resident."""
    io: IO = IO()
    """How bytes come from disk."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise PolicyError(_explain(error, type(self))) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Reads a policy file. Raises PolicyError naming the file and the key."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.safe_load(text)
        except OSError as error:
            raise PolicyError(f"cannot read {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PolicyError(f"{path} is no YAML: {error}") from None
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise PolicyError(f"{path} must hold keys and values, not {values!r}")
        try:
            return cls(**{str(key): value for key, value in values.items()})
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from None

    def with_settings(self, settings: list[str]) -> Self:
        """This policy with `key=value` settings; nested keys are dotted
        (`io.threads=4`), values are YAML."""
        values = self.model_dump(exclude_unset=True)
        for setting in settings:
            key, value = parse_setting(setting)
            target = values
            *parents, name = key.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
                if not isinstance(target, dict):
                    raise PolicyError(f"{key!r}: {parent} has no keys below it")
            target[name] = value
        return type(self)(**values)


_HIDDEN = ("int", "literal", "[key]")
"""Parts of a place that only pydantic knows."""


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    problems = []
    for item in error.errors():
        path = [str(part) for part in item["loc"] if part not in _HIDDEN]
        name = ".".join(path)
        if item["type"] == "extra_forbidden":
            known = ", ".join(_keys_at(model, path[:-1]))
            problems.append(f"unknown key {name!r}; known: {known}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {message} (got {item['input']!r})")
    return "; ".join(problems)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        if name not in model.model_fields:
            continue  # a key of a dict of sections, which was walked into already
        annotation: Any = model.model_fields[name].annotation
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        assert issubclass(annotation, BaseModel), f"{name} is no section"
        model = annotation
    return list(model.model_fields)
