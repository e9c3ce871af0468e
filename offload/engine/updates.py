"""Replaces weights of a streamed model while it is in use."""

import contextlib
import shutil
import sys
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ...io.checkpoint.header import TensorEntry, read_header
from ...io.closing import Closing
from ...io.errors import OutputError, UsageError
from ...io.fallbacks import Fallbacks
from ...io.readers.files import ALIGNMENT
from ...io.tier import Tier
from ...io.weights.layout import Layout
from ...io.weights.overlay import overlaid
from ...io.weights.recipe import Recipe, plain
from ...io.weights.stored_image import StoredImage, stored_image
from ...scheduler.sweep.entry import ForwardEntry
from ..policy import Policy, cache_folder
from ..units.expert_cuts import rows_of, unit_recipes
from ..weights.new_values import NewValue, new_values
from ..weights.spill_folder import SpillFolder
from .groups import Weights
from .readers import open_reader


class Updates(Closing):
    """Changes streamed weights. New values are written to a file in the cache folder,
    which is read instead of the checkpoint from then on. Slots and tiers in memory that
    hold old values are filled again in place.

    The folder holds each changed tensor once. `close` removes it.
    """

    def __init__(
        self,
        weights: Weights,
        entry: ForwardEntry,
        policy: Policy,
        fallbacks: Fallbacks,
    ) -> None:
        self._policy = policy
        self._fallbacks = fallbacks
        division = weights.arrangement.division
        self._recipes = cast(dict[str, Recipe], weights.arrangement.recipes)
        self._tiers = weights.tiers
        self._working_set = weights.working_set
        self._binding = weights.binding
        self._entry = entry
        self._gatherers = weights.gatherers
        self._layouts: MutableSequence[Layout] = division.layouts
        self._original = tuple(division.layouts)
        self._slots = division.transfers
        self._host_cache = weights.host_cache
        self._units_of = weights.units_of
        self._found = division.found.units
        self._entries: dict[str, TensorEntry] = {}
        self._folder: SpillFolder | None = None
        self._num_files = 0

    def __repr__(self) -> str:
        return f"<Updates: {len(self._entries)} tensors in {self._num_files} files>"

    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replaces the tensors with these names in `model`: all of them or, when it
        raises, none. Raises UsageError for a wrong name, shape or dtype, PenstockError
        during a sweep or a forward, OutputError if the cache folder has no room."""
        values = new_values(model, tensors, self._binding.find, self._like)
        with self._entry.idle(is_busy=_is_in_forward(model)):
            self._refuse_what_is_shared(values)
            self._host_cache.settle()
            streamed = {
                each.streamed_name: each
                for each in values
                if each.streamed_name is not None
            }
            if streamed:
                self._swap(self._write(streamed))
            with torch.no_grad():
                for each in values:
                    if each.streamed_name is None:
                        each.standing.data.copy_(each.value)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The new values by name of the streamed tensor, in the dtype of computing."""
        files = {path: load_file(path) for path in self._paths()}
        return {name: files[e.path][name] for name, e in self._entries.items()}

    def close(self) -> None:
        """Removes the files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _like(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        recipe = self._recipes[name]
        return recipe.shape, recipe.dtype

    def _refuse_what_is_shared(self, values: Iterable[NewValue]) -> None:
        for each in values:
            for unit in self._units_of.get(each.streamed_name or "", ()):
                if (why := self._why_fixed(unit)) is not None:
                    raise UsageError(f"{each.name!r} cannot be changed: {why}")

    def _write(self, values: Mapping[str, NewValue]) -> dict[str, TensorEntry]:
        """Writes `values` to a file, in the dtypes of computing. Returns its header."""
        if self._folder is None:
            self._folder = SpillFolder(cache_folder(self._policy.io), "updated-")
        stored = {}
        for name, each in values.items():
            dtype = self._recipes[name].dtype
            if each.value.dtype != dtype:
                self._fallbacks.announce(
                    f"update of {each.name!r}: {each.value.dtype} is cast to {dtype}"
                )
            value = each.value.to("cpu", dtype).contiguous()
            # safetensors refuses two names for one storage.
            stored[name] = value.clone() if value is each.value else value
        path = self._folder.path / f"{self._num_files}.safetensors"
        nbytes = sum(value.nbytes for value in stored.values())
        free = shutil.disk_usage(self._folder.path).free
        try:
            if free < nbytes:
                raise OSError(f"{free} bytes are free")
            save_file(stored, path)
        except Exception as error:
            path.unlink(missing_ok=True)
            raise OutputError(
                f"writing {nbytes} bytes of new weights to {path.parent} failed "
                f"({error}); set io.cache to a folder with room for them"
            ) from error
        self._num_files += 1
        stamp, entries = read_header(path)
        io = self._policy.io.model_copy(update={"reader": "threads"})
        reader = open_reader({path: stamp}, io, self._fallbacks)
        self._tiers.layered.add(path, reader)
        return {entry.name: entry for entry in entries}

    def _swap(self, entries: Mapping[str, TensorEntry]) -> None:
        """Switches to the values of `entries`. If that fails, switches back."""
        before = dict(self._entries)
        recipes = {name: self._recipes[name] for name in entries}
        paths = self._paths()
        new = {n: plain(e, name=n, dtype=recipes[n].dtype) for n, e in entries.items()}
        try:
            self._put({**before, **entries}, new)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is raised
                self._put(before, recipes)
            self._forget({entry.path for entry in entries.values()})
            raise
        self._forget(paths - self._paths())
        for name in entries:
            self._binding.accept(name)

    def _put(
        self, entries: dict[str, TensorEntry], recipes: Mapping[str, Recipe]
    ) -> None:
        self._entries = entries
        units = sorted({u for n in recipes for u in self._units_of.get(n, ())})
        for unit in units:
            plan, rows = self._original[unit], self._found[unit].experts
            new = {t.name: entries[t.name] for t in plan.tensors if t.name in entries}
            if rows is not None:
                new = {name: rows_of(entry, *rows) for name, entry in new.items()}
            self._layouts[unit] = overlaid(plan, new, alignment=ALIGNMENT)
        for name, recipe in recipes.items():
            self._recipes[name] = recipe
            if name in self._gatherers:
                self._gatherers[name].read_from(recipe)
        kept = self._tiers.kept
        images = {unit: self._image(unit) for unit in units if kept.are_images}
        for unit, image in images.items():
            if self._is_staged(unit):
                kept.check_staging(image)
        self._check_room({unit: image.layout.nbytes for unit, image in images.items()})
        for unit, image in images.items():
            kept.replace(unit, image)
        for unit in units:  # ends the loads of these units that are under way
            self._working_set.load_again(unit)
        self._load_tiers_again(units)
        for unit in units:
            self._working_set.load_again(unit)

    def _check_room(self, sizes: Mapping[int, int]) -> None:
        """Raises UsageError if tiers whose units get `sizes` (bytes) exceed what the
        policy gives them."""
        tiers, policy = self._tiers, self._policy
        names = [name for name in policy.peer if name in tiers.placement]
        asked = [
            (peer.nbytes_with(sizes), f"peer ({name})", policy.peer[name])
            for name, peer in zip(names, tiers.peers, strict=True)
        ]
        if (host := tiers.host) is not None:
            limit = policy.host_memory or 0
            asked.append((host.nbytes_with(sizes), "host_memory", limit))
        for needed, key, limit in asked:
            if needed > limit:
                raise UsageError(
                    f"weights kept as the files have them take {needed:,} bytes with "
                    f"their new values, and {key} has {limit:,}: set weights_kept: "
                    "decoded, or change fewer"
                )

    def _image(self, unit: int) -> StoredImage:
        """How tiers keep `unit` now."""
        slot = self._slots[unit]
        return stored_image(
            slot.name,
            unit_recipes(self._found[unit], self._recipes),
            slot,
            alignment=ALIGNMENT,
            max_gap_bytes=0,
        )

    def _is_staged(self, unit: int) -> bool:
        """Whether `unit` is read from disk through a ring buffer."""
        where = self._tiers.placement[unit]
        has_link = any(link.tier == Tier.DISK for link in self._tiers.links)
        return where in self._policy.peer or (where != Tier.HOST and has_link)

    def _load_tiers_again(self, units: Sequence[int]) -> None:
        """Loads the units that stay in host memory or on a peer again."""
        tiers = self._tiers
        tiers.device.synchronize()
        if (host := tiers.host) is not None:
            host.load_again([unit for unit in units if unit in host.offsets])
        for peer in tiers.peers:
            changed = [unit for unit in units if unit in peer.offsets]
            peer.load_again(changed, tiers.link_to_peer)

    def _why_fixed(self, unit: int) -> str | None:
        """Why `unit` cannot be changed; None if it can be."""
        if self._tiers.direct_to_device is not None:
            return "io.reader: gds reads the checkpoint alone; take io.reader: auto"
        if self._tiers.gathered is not None:
            return "other ranks read a part of it from the checkpoint (ranks: gather)"
        if self._policy.ranks == "tensor":
            return "each rank has rows of its own of it (ranks: tensor)"
        if self._policy.host_shared and self._tiers.placement[unit] == Tier.HOST:
            return "other processes share it; take host_shared: false"
        return None

    def _paths(self) -> set[Path]:
        return {entry.path for entry in self._entries.values()}

    def _forget(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._tiers.layered.remove(path)
            path.unlink(missing_ok=True)


def _is_in_forward(model: nn.Module) -> bool:
    """Whether the calling code runs inside a forward of `model` or of a part of it."""
    parts = {id(module) for module in model.modules()}
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        is_call = frame.f_code is nn.Module._call_impl.__code__
        if is_call and id(frame.f_locals.get("self")) in parts:
            return True
    return False
