"""Compares a streamed model with the resident one, unit by unit, bit for bit.

A few tokens run through the streamed model. After each site, its weights are compared
with the same weights loaded in another way. Then the site runs again on the same inputs
with those: the outputs must be equal to the last bit.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..io.codecs.cast import Cast
from ..io.codecs.computed import Computed
from ..io.codecs.tiles import TILES
from ..io.devices.accelerators import memory_of
from ..io.errors import UsageError
from ..io.weights.recipe import Recipe
from ..scheduler.sweep.module_state import ModuleState
from .adapters import CONFIG_FILE
from .configs.trust import loading
from .engine.engine import Engine
from .model import engine_of, load, unwrap
from .monitoring.memory import available_bytes
from .policy import Policy

Reference = Callable[[str], torch.Tensor]
"""Loads the tensor with this name in the model in a way that is not streaming."""


@dataclass(slots=True)
class Verification:
    """What was compared, and what differed."""

    reference: str
    """How the resident weights were loaded."""
    num_sites: int = 0
    sites_run: set[str] = field(default_factory=set)
    num_tensors: int = 0
    differences: list[str] = field(default_factory=list)
    faults: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        return not self.differences and bool(self.sites_run)


def verify(
    path: str | Path,
    policy: Policy | Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Verification:
    """Compares the checkpoint in the folder `path`, streamed under `policy`, with the
    resident one.

    The whole model is resident if it fits into memory, otherwise one unit at a time.
    `inputs` are keyword arguments of the model's forward; by default, a few made-up
    ones.

    Differences are in the result. Raises PenstockError if the model cannot be loaded,
    and UsageError if the model does not take the inputs.
    """
    policy = Policy.of(policy)
    if policy.adapter is not None:
        raise UsageError(
            "the checkpoint's own weights are verified, which an adapter leaves as "
            f"they are: take adapter ({policy.adapter}) out of the policy"
        )
    model = load(path, policy)
    try:
        engine = engine_of(model)
        inputs = tree_map(_to(engine.device), dict(inputs or sample_inputs(model)))
        fits = _fits(engine)
        # transformers would apply an adapter in this folder.
        fits = fits and not (Path(path) / CONFIG_FILE).exists()
        fits = fits and not _is_quantised(engine)  # transformers would not dequantise
        resident = _resident(model, path) if fits else None
        name = "transformers' own loading" if fits else "safetensors, unit by unit"
        result = Verification(name, num_sites=len(engine.model_division.sites))
        reference = (
            _from_model(resident) if resident is not None else _from_files(engine)
        )
        with torch.inference_mode(), _comparing(engine, reference, result):
            try:
                streamed = model(**inputs)
            except (AttributeError, TypeError, ValueError) as error:
                raise UsageError(
                    f"{type(model).__name__} does not take the sample inputs "
                    f"{', '.join(inputs)} ({error}): give it others in Python"
                ) from error
            if resident is not None:
                _compare_outputs("the model", streamed, resident(**inputs), result)
        result.faults = engine.statistics().faults
        return result
    finally:
        unwrap(model)


def sample_inputs(model: Any) -> dict[str, torch.Tensor]:
    """A few tokens (`input_ids`, int64 [2, 7]), or a picture (`pixel_values`, float32
    [1, channels, height, width]).

    Raises UsageError for a model that takes neither alone.
    """
    if model.main_input_name == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        values = torch.linspace(-1, 1, torch.Size(shape).numel())
        inputs = {"pixel_values": values.view(shape)}
        if "input_ids" in inspect.signature(type(model).forward).parameters:
            inputs["input_ids"] = torch.arange(2, 9)[None]
        return inputs
    text = model.config.get_text_config()
    if model.main_input_name != "input_ids" or not hasattr(text, "vocab_size"):
        raise UsageError(
            f"{type(model).__name__} takes {model.main_input_name!r}: give inputs for "
            "it to penstock.offload.verify.verify in Python"
        )
    vocabulary = int(text.vocab_size)
    ids = torch.arange(14).view(2, 7) * 7 % max(vocabulary - 1, 1)
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :5]
    return inputs


def _fits(engine: Engine) -> bool:
    """Whether the resident model finds room beside the streamed one: in host memory,
    which loads it, and on the device, which computes."""
    nbytes = engine.statistics().model_bytes
    on_device = True
    if engine.device.type != "cpu":
        free, _ = memory_of(str(engine.device))
        on_device = 2 * nbytes < free
    return on_device and 2 * nbytes < available_bytes()


def _to(device: torch.device) -> Callable[[Any], Any]:
    """Moves tensors, and leaves other values as they are."""
    return lambda value: value.to(device) if isinstance(value, torch.Tensor) else value


class _comparing:
    """Hooks every site, so that its work is checked before its units are evicted."""

    def __init__(
        self, engine: Engine, reference: Reference, result: Verification
    ) -> None:
        self._engine = engine
        self._reference = reference
        self._result = result
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for site in self._engine.model_division.sites:
            if site.experts is None:
                self._watch(site.name, site.module)

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, name: str, module: nn.Module) -> None:
        given: list[tuple[Any, Any]] = []
        states: list[ModuleState] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            given.append(tree_map(_own, (args, kwargs)))
            states.append(ModuleState(module.modules()))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            state = states.pop()
            state.learn()
            kept = state.take()  # the site runs again from the state in which it began
            self._check(name, module, *given.pop(), output)
            state.put(kept)

        self._hooks += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True, prepend=True),
        ]

    def _check(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        result = self._result
        result.sites_run.add(name)
        streamed = list(_parameters(module))
        for store, key, parameter in streamed:
            tensor_name = self._engine.name_of(store, key)
            with torch.inference_mode(False):  # as the weights of a resident model are
                resident = nn.Parameter(
                    self._reference(tensor_name), requires_grad=parameter.requires_grad
                )
            result.num_tensors += 1
            if not _same_bits(self._engine.value_of(tensor_name, parameter), resident):
                result.differences.append(f"weights of {tensor_name}")
            store[key] = resident
        try:
            again = module.forward(*args, **kwargs)
        finally:
            for store, key, parameter in streamed:
                store[key] = parameter
        _compare_outputs(name, output, again, result)


def _own(value: Any) -> Any:
    """A copy of an argument that the site may change (hidden states, a cache)."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    is_data = hasattr(value, "__dict__") and not callable(value)
    return copy.deepcopy(value) if is_data else value


def _parameters(
    module: nn.Module,
) -> Iterator[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]]:
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield part._parameters, key, parameter


def _compare_outputs(
    name: str, streamed: Any, resident: Any, result: Verification
) -> None:
    pairs = zip(tree_leaves(streamed), tree_leaves(resident), strict=True)
    for one, other in pairs:
        if isinstance(one, torch.Tensor) and not _same_bits(one, other):
            result.differences.append(f"output of {name}")
            return


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


def _resident(model: Any, path: str | Path) -> Any:
    kind: Any = type(model).__mro__[1]
    loaded = kind.from_pretrained(
        path,
        config=copy.deepcopy(model.config),
        dtype=model.config.dtype,
        use_safetensors=True,
        **loading(engine_of(model).policy.trust_remote_code),
    )
    return loaded.train(False).to(engine_of(model).device)


def _is_quantised(engine: Engine) -> bool:
    """Whether a codec knows what the files hold, and transformers has to be told."""
    codecs = [p.codec for recipe in engine.recipes.values() for p in recipe.slices]
    return not all(isinstance(codec, Cast | Computed) for codec in codecs)


def _from_model(resident: Any) -> Reference:
    tensors = dict(resident.named_parameters(remove_duplicate=False))
    return lambda name: tensors[name].detach()


def _from_files(engine: Engine) -> Reference:
    """Reads one tensor at a time with the safetensors library."""

    def reference(name: str) -> torch.Tensor:
        return assembled(engine.recipes[name]).to(engine.device)

    return reference


def assembled(recipe: Recipe) -> torch.Tensor:
    """The tensor that `recipe` makes, in its shape and dtype, on the CPU: its parts are
    read with the safetensors library, and decoded."""
    flat = torch.empty(torch.Size(recipe.shape).numel(), dtype=recipe.dtype)
    for part in recipe.slices:
        first, *others = (_stored(entry.path, entry.name) for entry in part.entries)
        source = part.source.on(first.reshape(-1))
        views = [view for _, view in part.companion_parts]
        beside = [v.on(t.reshape(-1)) for v, t in zip(views, others, strict=True)]
        part.codec.decode((source, *beside), part.target.on(flat), TILES)
    return flat.view(recipe.shape)


def _stored(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name)
    assert isinstance(tensor, torch.Tensor)
    return tensor
