"""LoRA files of every kind as changes to our layers, at the strength they were trained for.

genmo's keep rank and alpha in their metadata, PEFT's and diffusers' in a JSON beside or inside, kohya's as a tensor for
each layer. Their names are ours, diffusers', or either with underscores; diffusers' separate q, k and v become one.

Shapes: `R` rank, `I` input features, `O` output features.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoraError
from . import files, layouts
from .architecture import depth_of
from .checkpoint import listing
from .files import TYPE_NAMES
from .formats import plain
from .lora_scale import Scales

log = logging.getLogger(__name__)

PREFIXES = (
    "base_model.model.transformer.",
    "base_model.model.",
    "transformer.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
# What a layer's tensors are called behind its name, by what they are.
ENDINGS = {
    "down": (
        ".lora_A.weight",
        ".lora_A",
        ".lora_down.weight",
        ".lora.down.weight",
        "_lora.down.weight",
        ".lora_linear_layer.down.weight",
    ),
    "up": (
        ".lora_B.weight",
        ".lora_B",
        ".lora_up.weight",
        ".lora.up.weight",
        "_lora.up.weight",
        ".lora_linear_layer.up.weight",
    ),
    "alpha": (".alpha",),
    "magnitude": (
        ".dora_scale",
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.weight",
    ),
}
# PEFT puts an adapter's name before the last part, as in `lora_A.default.weight`.
ADAPTER_NAME = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.\w+\.weight$")
# Kinds of change that are no low-rank product, by what their tensors are called.
OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "boft_": "BOFT"}


@dataclass(frozen=True)
class LowRank:
    """One layer's change: `scale * up @ down`, `up`: `O R`, `down`: `R I`.

    With `magnitude` (`O`) it is DoRA (Liu et al. 2024): the changed weight's rows get these lengths.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """The changes of a file by our layers' names, and the tensors in it that belong to no layer of this model."""

    source: str
    layers: Mapping[str, LowRank]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a layer of a file belongs: piece `index` of `count` that lie below each other in our `target`."""

    target: str
    index: int
    count: int
    swap: bool


def read_lora(path: str | Path, network: nn.Module) -> Lora:
    """The LoRA of a file, an archive or a folder, for this DiT.

    Tensors that belong to no layer are logged and kept in `unmatched`.

    Raises `LoraError` when nothing in the file belongs to the model, or a shape does not fit; `WeightsError` when it
    cannot be read.
    """
    path = Path(path)
    reader = files.opened(path)
    shapes = linear_shapes(network)
    places = _places(shapes)
    held: dict[_Place, dict[str, str]] = {}  # what -> name in the file
    spellings: dict[_Place, str] = {}
    unmatched = []
    for name in reader.names:
        spelling, what = _parsed(name)
        place = places.get(_known(spelling, places))
        if place is None or what is None:
            unmatched.append(name)
            continue
        if what in held.setdefault(place, {}):
            raise LoraError(
                f"{path} holds both {held[place][what]} and {name}",
                "a layer may be changed once",
                "The file is damaged or merged from several: get it again",
            )
        held[place][what], spellings[place] = name, spelling
    for place in [place for place, names in held.items() if not {"down", "up"} <= names.keys()]:
        unmatched += held.pop(place).values()
    others = sorted({kind for mark, kind in OTHER_KINDS.items() for name in unmatched if mark in name})
    if not held and others:
        raise LoraError(f"{path} is a {' and '.join(others)}", "only LoRA and DoRA are read", "Choose another file")
    if not held:
        raise LoraError(
            f"{path} has no LoRA for this model: it holds {listing('tensors', reader.names) or 'nothing'}",
            "its layers must be those of Mochi's DiT, such as blocks.0.attn.qkv_x",
            "Choose a LoRA that was trained on Mochi 1",
        )
    if unmatched:
        log.warning("%s: %s belong to no layer of this model and are not used", path, listing("tensors", unmatched))

    scale_of = Scales(path, reader.metadata)
    pieces: dict[str, dict[_Place, LowRank]] = {}
    for place, names in held.items():
        tensors = {what: plain(reader.tensor(name)) for what, name in names.items()}
        rank = _rank(path, names, tensors)
        scale = scale_of(place.target, spellings[place], rank, tensors.get("alpha"))
        change = LowRank(tensors["down"], tensors["up"], scale, _magnitude(path, names, tensors))
        pieces.setdefault(place.target, {})[place] = change
    layers = {target: _whole(path, target, shapes[target], changes) for target, changes in pieces.items()}
    return Lora(str(path), layers, tuple(sorted(unmatched)))


def linear_shapes(network: nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers of a network, of whatever class they are: `O I` by name."""
    return {
        name: (layer.out_features, layer.in_features)  # pyright: ignore[reportReturnType]
        for name, layer in network.named_modules()
        if hasattr(layer, "in_features") and hasattr(layer, "out_features")
    }


def _places(shapes: Mapping[str, Any]) -> dict[str, _Place]:
    """Where each layer belongs, by every spelling that files have for it."""
    places = {target: _Place(target, 0, 1, False) for target in shapes}
    for rule in layouts.diffusers_dit(depth_of(shapes, "blocks.")):
        if rule.ours in shapes:
            for index, theirs in enumerate(rule.theirs):
                places[theirs] = _Place(rule.ours, index, len(rule.theirs), rule.swap)
    return {name.replace(".", "_"): place for name, place in places.items()} | places


def _parsed(name: str) -> tuple[str, str | None]:
    """The name of a tensor's layer as the file spells it, and what the tensor is to it."""
    plain_name = ADAPTER_NAME.sub(r"\1.weight", name)
    for what, endings in ENDINGS.items():
        for ending in endings:
            if plain_name.endswith(ending):
                return plain_name.removesuffix(ending), what
    return name, None


def _known(layer: str, places: Mapping[str, _Place]) -> str:
    """The layer without its prefix, if that is known; else as it is."""
    for prefix in PREFIXES:
        if layer.startswith(prefix) and layer[len(prefix) :] in places:
            return layer[len(prefix) :]
    return layer


def _rank(path: Path, held: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> int:
    down, up = tensors["down"], tensors["up"]
    floats = all(tensor.dtype in TYPE_NAMES and tensor.is_floating_point() for tensor in (down, up))
    if floats and not (down.float().isfinite().all() and up.float().isfinite().all()):
        raise LoraError(
            f"{path} has values in {held['down']} or {held['up']} that are not finite",
            "a change must be numbers",
            "The file is damaged, or its training diverged: choose another one",
        )
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0] or not floats:
        raise LoraError(
            f"{path} has {held['down']} of shape {tuple(down.shape)} and {held['up']} of shape {tuple(up.shape)}",
            "they must be rank x inputs and outputs x rank, of one rank, in floats",
            "The file is damaged or of another kind of adapter: get it again",
        )
    return down.shape[0]


def _magnitude(path: Path, names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """DoRA's row lengths, as a vector."""
    found = tensors.get("magnitude")
    if found is None:
        return None
    if found.dtype not in TYPE_NAMES or not found.is_floating_point():
        raise LoraError(
            f"{path} has {names['magnitude']} in {found.dtype}", "lengths must be floats", "Get the file again"
        )
    if found.ndim == 2 and found.shape[0] == 1 < tensors["up"].shape[0]:
        raise LoraError(
            f"{path} has {names['magnitude']} of shape {tuple(found.shape)}: lengths of columns",
            "DoRA is read with lengths of rows",
            "Train the adapter with weight decomposition on the output axis",
        )
    return found.flatten()


def _whole(path: Path, target: str, shape: tuple[int, int], pieces: Mapping[_Place, LowRank]) -> LowRank:
    """The change of one of our layers from its pieces. Raises `LoraError` when they do not fit it."""
    count, swap = {(place.count, place.swap) for place in pieces}.pop()
    if any((place.count, place.swap) != (count, swap) for place in pieces):
        raise LoraError(
            f"{path} changes {target} both whole and in pieces",
            "a layer may be changed once",
            "The file is damaged or merged from several: get it again",
        )
    outputs, inputs = shape
    height = outputs // count
    changes = {place.index: change for place, change in pieces.items()}
    for change in changes.values():
        rows = None if change.magnitude is None else len(change.magnitude)
        if change.down.shape[1] != inputs or change.up.shape[0] != height or rows not in (None, height):
            raise LoraError(
                f"{path} changes {target} by {change.up.shape[0]} x {change.down.shape[1]}",
                f"this model's layer {'has pieces of' if count > 1 else 'is'} {height} x {inputs}",
                "Choose a LoRA that was trained on this model",
            )
    if count == 1 and not swap:
        return changes[0]
    magnitudes = [change.magnitude for _, change in sorted(changes.items()) if change.magnitude is not None]
    if len(magnitudes) not in (0, count):
        raise LoraError(
            f"{path} has DoRA magnitudes for {len(magnitudes)} of {count} pieces of {target}",
            "a layer has them for all of its rows or for none",
            "Train the adapter on q, k and v together",
        )
    # Pieces of one scale keep the file's dtype; others get their scales multiplied in.
    scales = {change.scale for change in changes.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    dtype = torch.float32 if scales else changes[min(changes)].up.dtype
    up = torch.zeros(outputs, sum(change.rank for change in changes.values()), dtype=dtype)
    column = 0
    for index, change in sorted(changes.items()):
        block = change.up.to(torch.float32) * (change.scale / scale) if scales else change.up
        up[index * height : (index + 1) * height, column : column + change.rank] = block
        column += change.rank
    down = torch.cat([change.down for _, change in sorted(changes.items())])
    magnitude = torch.cat(magnitudes) if magnitudes else None
    if swap:
        up = torch.cat(up.chunk(2)[::-1])
        magnitude = None if magnitude is None else torch.cat(magnitude.chunk(2)[::-1])
    return LowRank(down, up, scale, magnitude)
