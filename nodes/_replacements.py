"""Nodes that took the place of others: newer hosts offer to put ours into a graph that has the old ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import ComfyAPI, io

from . import _host

# What the host's NodeReplace is made of. It is looked at only when no pack has the old node any more. Without an
# `input_mapping` the new node gets none of the old one's inputs, and every old input it names must be in each prompt.
REPLACEMENTS: tuple[Mapping[str, Any], ...] = ()


async def register(replacements: Sequence[Mapping[str, Any]] = REPLACEMENTS) -> None:
    """Tells the host of `replacements`, where it knows such a thing."""
    kind, known = getattr(io, "NodeReplace", None), getattr(ComfyAPI(), "node_replacement", None)
    if kind is None or known is None:
        return
    for replacement in replacements:
        try:
            await known.register(kind(**replacement))
        except Exception:  # the host would drop all nodes of the pack
            _host.log.warning("%s is not known to replace %s", *map(replacement.get, ("new_node_id", "old_node_id")))
