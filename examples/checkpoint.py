"""Make a Hugging Face checkpoint with random weights, of any size, in little memory.

    python examples/checkpoint.py OUT --size 1.1b

What stands in OUT is what transformers' `save_pretrained` would have written for this
model, same names and same layout, with a tokenizer trained on the Python sources of
this machine. Only one shard is in memory at a time. The words that such a model writes
mean nothing; its speed is that of a real one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS = "<s>", "</s>"
SPECIAL_TOKENS = (BOS, EOS)
MAX_TOKENS = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The shape of a Llama, and how much text its tokenizer is trained on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    training_text_bytes: int


SIZES = {
    "tiny": Size(
        hidden=64,
        layers=4,
        heads=4,
        kv_heads=2,
        intermediate=176,
        vocabulary=600,
        training_text_bytes=250_000,
    ),
    "1.1b": Size(  # the shape of TinyLlama 1.1B; 2.2 GB in bfloat16
        hidden=2048,
        layers=22,
        heads=32,
        kv_heads=4,
        intermediate=5632,
        vocabulary=32_000,
        training_text_bytes=8_000_000,
    ),
    "3b": Size(  # the blocks of Llama 3.2 3B, a smaller vocabulary; 6.0 GB in bfloat16
        hidden=3072,
        layers=28,
        heads=24,
        kv_heads=8,
        intermediate=8192,
        vocabulary=32_000,
        training_text_bytes=8_000_000,
    ),
}


def make_checkpoint(
    folder: Path,
    size: str,
    *,
    dtype: str = "bfloat16",
    shards_of: str = "512MB",
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Write the checkpoint to `folder`, or reuse it if it already stands there.

    The work is done in `folder`.partial and renamed at the end, so `folder` is either
    complete or absent. The weights depend on `seed` and `dtype`, not on `shards_of`
    (a number of bytes such as "512MB"; 1 MB is 10**6 bytes). What is done is told
    on `console`, by default standard error.

    Raises ValueError for an unknown `size` or `dtype`, FileExistsError if `folder`
    holds anything else, OSError if the disk has no room.
    """
    console = console or Console(stderr=True)
    values = config_values(size, dtype)
    if is_complete(folder, values):
        console.print(f"{folder}: already there, reused", markup=False, soft_wrap=True)
        return folder
    with folder_in_one_piece(folder) as partial:
        config = LlamaConfig(**values)
        config.save_pretrained(partial)
        GenerationConfig.from_model_config(config).save_pretrained(partial)
        write_weights(partial, config, shards_of=shards_of, seed=seed, console=console)
        write_tokenizer(partial, SIZES[size])
    console.print(f"{folder}: {size} in {dtype}, written", markup=False, soft_wrap=True)
    return folder


def config_values(size: str, dtype: str) -> dict[str, Any]:
    """What config.json says of this model; ValueError for a name that is not known."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    shape = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "dtype": dtype,
    }


def is_complete(folder: Path, values: dict[str, Any]) -> bool:
    """Whether `folder` already holds this model; False if it is absent or empty."""
    if not folder.exists():
        return False
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    stored_file = folder / "config.json"
    stored = json.loads(stored_file.read_text()) if stored_file.is_file() else {}
    if all(stored.get(key) == value for key, value in values.items()):
        return True
    raise FileExistsError(
        f"{folder} holds something else than this checkpoint; "
        "name another folder or delete this one"
    )


@contextmanager
def folder_in_one_piece(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes `folder` if all goes well, else goes."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(
    folder: Path, config: LlamaConfig, *, shards_of: str, seed: int, console: Console
) -> None:
    """Write the shards one after the other, and their index if there are several."""
    tensors = meta_tensors(config)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shards_of)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    require_room(folder, total_bytes)
    seeds = {name: seed * 1_000_003 + index for index, name in enumerate(tensors)}
    with progress(console, total_bytes) as advance:
        for file_name, names in split.filename_to_tensors.items():
            shard: dict[str, torch.Tensor] = {}
            for name in names:
                shard[name] = random_like(tensors[name], seed=seeds[name])
                advance(tensors[name].nbytes)
            save_file(shard, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        num_parameters = sum(tensor.numel() for tensor in tensors.values())
        write_index(folder, split, num_parameters=num_parameters)


def meta_tensors(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The model's tensors by their names, shapes and dtypes only."""
    assert isinstance(config.dtype, torch.dtype), "a config makes a dtype of its name"
    with torch.device("meta"):
        model: torch.nn.Module = LlamaForCausalLM(config)
    tensors: dict[str, torch.Tensor] = model.to(config.dtype).state_dict()
    return tensors


def random_like(tensor: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Ones for a norm's weight, which is the only vector; else normal(0, 0.02)."""
    if tensor.dim() == 1:
        return torch.ones_like(tensor, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    empty = torch.empty_like(tensor, device="cpu")
    return empty.normal_(0.0, 0.02, generator=generator)


def write_index(folder: Path, split: StateDictSplit, *, num_parameters: int) -> None:
    """Write model.safetensors.index.json, which says what stands in which shard."""
    index = {
        "metadata": {"total_parameters": num_parameters, **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)


def require_room(folder: Path, total_bytes: int) -> None:
    """Raise OSError if the disk cannot hold `total_bytes` more."""
    free_bytes = shutil.disk_usage(folder).free
    if total_bytes > free_bytes:
        raise OSError(
            f"{folder.parent} has {free_bytes / 1e9:.1f} GB free, "
            f"the checkpoint needs {total_bytes / 1e9:.1f} GB"
        )


def write_tokenizer(folder: Path, size: Size) -> None:
    """Train a byte-level BPE tokenizer, which can encode any text, and write it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(size.training_text_bytes), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B:1",
        special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))],
    )
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_TOKENS,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def training_texts(max_bytes: int) -> Iterator[str]:
    """The standard library's own files, in one order, `max_bytes` of them at most."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left = max_bytes
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".txt")):
        if "site-packages" in path.parts or not path.is_file():
            continue
        content = path.read_bytes()[:left]
        yield content.decode(errors="ignore")
        left -= len(content)
        if left <= 0:
            return


@contextmanager
def progress(console: Console, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes if the console is a terminal; gives what moves it on."""
    bar = Progress(
        "weights",
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("weights", total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 for what the user can mend."""
    first_line = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first_line)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--shards-of", default="512MB", metavar="BYTES", help="as 512MB or 2GB"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        make_checkpoint(
            options.out,
            options.size,
            dtype=options.dtype,
            shards_of=options.shards_of,
            seed=options.seed,
        )
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
