"""Tokenizers whose steps would make a text without end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.io.errors import CheckpointError
from penstock.offload.rows.tokenizer_check import check_tokenizer


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


FOURFOLD = replace({"String": "o"}, "oooo")
METASPACE = replace({"String": " "}, "\u2581")
BYTES = replace({"Regex": " {2,}"}, "\u2581\u2581\u2581")


def check(folder: Path, **values: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}, **values}))
    check_tokenizer(folder)


@pytest.mark.parametrize("kind", ["normalizer", "pre_tokenizer", "decoder"])
def test_replacements_that_follow_one_another_without_end_are_refused(
    kind: str, tmp_path: Path
) -> None:
    inner = {"type": "Sequence", f"{kind}s": [FOURFOLD] * 3}
    many = {"type": "Sequence", f"{kind}s": [inner] * 2}
    with pytest.raises(CheckpointError, match=rf"of its {kind} make a text more than"):
        check(tmp_path, **{kind: many})
    check(tmp_path, **{kind: inner})
    with pytest.raises(CheckpointError, match="more than 1,000 times"):
        check(tmp_path, **{kind: replace({"Regex": "."}, "a" * 2_000)})


def test_what_tokenizers_have_is_none_of_it(tmp_path: Path) -> None:
    check_tokenizer(tmp_path)
    steps = [{"type": "Prepend", "prepend": "\u2581"}, METASPACE, BYTES]
    check(tmp_path, normalizer={"type": "Sequence", "normalizers": steps}, decoder=None)
    undone = replace({"String": "\u2581"}, " ")
    check(
        tmp_path, decoder={"type": "Sequence", "decoders": [undone, {"type": "Fuse"}]}
    )
    check(tmp_path, normalizer={"type": "Replace", "pattern": 5, "content": None})
