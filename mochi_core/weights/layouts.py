"""How files name their tensors, as data: which part of the model a file holds, and behind which prefix.

A part is recognised by names that no other part has, never by the name of the file.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import WeightsError
from .checkpoint import NAMES_SHOWN, Checkpoint


@dataclass(frozen=True)
class Part:
    """One network of the model: `markers` are names only it has, `prefixes` where files put them."""

    title: str
    markers: tuple[str, ...]
    prefixes: tuple[str, ...] = ("",)

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """The prefix under which `names` holds this part, None when it does not."""
        names = set(names)
        for prefix in self.prefixes:
            if all(prefix + marker in names for marker in self.markers):
                return prefix
        return None


DIT = Part("a Mochi DiT", ("pos_frequencies", "t5_yproj.weight", "blocks.0.attn.qkv_x.weight"))
DECODER = Part("a Mochi VAE decoder", ("blocks.0.0.weight", "blocks.1.proj.weight"), ("decoder.", ""))
ENCODER = Part("a Mochi VAE encoder", ("layers.0.weight", "output_norm.weight"), ("encoder.", ""))
T5 = Part("a T5 text encoder", ("shared.weight", "encoder.final_layer_norm.weight"))

PARTS = (DIT, DECODER, ENCODER, T5)


def find(checkpoint: Checkpoint, part: Part) -> str:
    """The prefix of `part` in the file. Raises `WeightsError` that says what the file holds instead."""
    prefix = part.prefix_in(checkpoint.names)
    if prefix is not None:
        return prefix
    held = [other.title for other in PARTS if other.prefix_in(checkpoint.names) is not None]
    names = ", ".join(checkpoint.names[:NAMES_SHOWN]) or "no tensors"
    raise WeightsError(
        f"{checkpoint.path} is not {part.title}: it holds {' and '.join(held) if held else f'another model ({names})'}",
        f"{part.title} has tensors such as {', '.join(part.markers)}",
        "Choose another file" + (", or load this one where it belongs" if held else ""),
    )
