"""Run inside a ComfyUI by test_replacements.py: what a host learns of nodes that replace others. Prints JSON."""

import asyncio
import json
import sys
from types import SimpleNamespace
from unittest import mock

from inside import of_the_pack

replacements = of_the_pack("_replacements")
nodes = sys.modules["some_x_pack.nodes"]
OURS = {
    "new_node_id": "MochiVideoSize",
    "old_node_id": "SomeEmptyVideo",
    "old_widget_ids": ["width"],
    "input_mapping": [{"new_id": "width", "old_id": "width"}, {"new_id": "frames", "set_value": 13}],
    "output_mapping": [{"new_idx": 0, "old_idx": 0}],
}


class Replace:
    """The host's NodeReplace, for hosts that have none."""

    def __init__(self, new_node_id, old_node_id, old_widget_ids=None, input_mapping=None, output_mapping=None):
        self.arguments = {name: value for name, value in locals().items() if name != "self"}

    def as_dict(self):
        return self.arguments


class Manager:
    """What keeps them in the host."""

    def __init__(self):
        self.kept = []

    def register(self, replacement):
        self.kept.append(replacement.as_dict())


def registered(given, kind, register):
    """What a host keeps of `given` that makes them with `kind` and takes them with `register`."""
    manager, api = Manager(), SimpleNamespace()
    if register is not None:

        async def taking(replacement):
            register(manager, replacement)

        api.node_replacement = SimpleNamespace(register=taking)
    io = SimpleNamespace() if kind is None else SimpleNamespace(NodeReplace=kind)
    with mock.patch.multiple(replacements, io=io, ComfyAPI=lambda: api):
        asyncio.run(replacements.register(given))
    return manager.kept


def by_this_host():
    """The same through this host's own interface, if it has one."""
    if not hasattr(replacements.io, "NodeReplace"):
        return None
    manager = Manager()
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(node_replace_manager=manager)))
    with mock.patch.dict(sys.modules, server=server):
        asyncio.run(replacements.register((OURS,)))
    return manager.kept


def refusing(manager, replacement):
    raise RuntimeError("no more")


async def loaded():
    """How many nodes the extension has after the host has called it."""
    extension = nodes.MochiVideoExtension()
    await extension.on_load()
    return len(await extension.get_node_list())


found = {
    "ours": OURS,
    "with": registered((OURS,), Replace, Manager.register),
    "without_interface": registered((OURS,), Replace, None),
    "without_kind": registered((OURS,), None, Manager.register),
    "refused": registered((OURS, OURS), Replace, refusing),
    "word_unknown": registered(({**OURS, "nonsense": 1}, OURS), Replace, Manager.register),
    "here": by_this_host(),
    "nodes": asyncio.run(loaded()),
    "ids": [node.define_schema().node_id for node in nodes.NODES],
    "declared": [dict(one) for one in replacements.REPLACEMENTS],
}
sys.stdout.write("FOUND" + json.dumps(found) + "\n")
