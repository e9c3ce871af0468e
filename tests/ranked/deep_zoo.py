"""Models of the zoo with more blocks, so that several ranks can share them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import zoo

_NUMBERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_BY_LAYER = (
    "layer_types",
    "attention_layers",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
)
"""Keys with a value for each block: the first ones come again."""


def deepened(name: str, num_blocks: int) -> str:
    """The name of a model like `name` in the zoo, with `num_blocks` blocks."""
    case = zoo.ARCHITECTURES[name]

    def config() -> Any:
        shallow = case.config()
        values = whole = shallow.to_dict()
        values = values.get("text_config", values)
        for key in _BY_LAYER:
            if kinds := values.pop(key, None):
                values[key] = [kinds[n % len(kinds)] for n in range(num_blocks)]
        if "attention_types" in values:  # GPT-Neo: [[kinds, how often]]
            kinds = values.pop("attention_layers")
            values["attention_types"] = [[[kind], 1] for kind in kinds]
        numbers = {key: values[key] for key in _NUMBERS if key in values}
        for key, num in numbers.items():  # LongCat counts two for each
            values[key] = num_blocks * (num // min(numbers.values()))
        return type(shallow)(**whole)

    deep = f"{name}_of_{num_blocks}"
    zoo.ARCHITECTURES[deep] = replace(case, name=deep, config=config)
    return deep


def saved(name: str, folder: Path, num_blocks: int | None = None) -> Any:
    """Writes the checkpoint of a model to `folder`. Returns the model, resident."""
    if num_blocks is not None:
        name = deepened(name, num_blocks)
    zoo.save_checkpoint(name, folder)
    return zoo.load(name, folder)
