"""Run inside a ComfyUI's own process by test_version_guards.py: our nodes on hosts that know less or more. Prints JSON.

Whatever version this host is, it is made to look older and newer, one difference at a time.
"""

import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from inside import comfy, load, native_dit, of_the_pack

from mochi_core.weights.formats import Scaled

_host, native_vae, native_weights = (of_the_pack(name) for name in ("_host", "native_vae", "native_weights"))
io = _host.io
NODES = sys.modules["some_x_pack.nodes"].NODES
CPU = torch.device("cpu")

# The least that a node can be described with, and what no host has yet.
OLDEST = ("node_id", "display_name", "category", "inputs", "outputs", "hidden", "description")
UNKNOWN = {"accent_colour": "none", "needs_review": True}
MISSING = object()


@contextlib.contextmanager
def having(owner, name, value=MISSING):
    """`owner` with `name`, or without it when no value is given; afterwards as before."""
    before = vars(owner).get(name, MISSING)
    if value is not MISSING:
        setattr(owner, name, value)
    elif before is not MISSING:
        delattr(owner, name)
    try:
        yield
    finally:
        if before is not MISSING:
            setattr(owner, name, before)
        elif name in vars(owner):
            delattr(owner, name)


def fields_of(schema):
    return {field.name for field in dataclasses.fields(schema)}


def older_schema():
    fields = [field for field in dataclasses.fields(io.Schema) if field.name in OLDEST]
    made = [(field.name, Any, dataclasses.field(default=None)) for field in fields]
    return dataclasses.make_dataclass("OlderSchema", made)


def newer_schema():
    lacking = {"search_aliases", "essentials_category", "has_intermediate_output"} - fields_of(io.Schema)
    extra = [(name, Any, dataclasses.field(default=None)) for name in sorted(lacking)]
    extra += [(name, Any, dataclasses.field(default=value)) for name, value in UNKNOWN.items()]
    return dataclasses.make_dataclass("NewerSchema", extra, bases=(io.Schema,))


class Seen:
    """A module as seen by a host that has other things under some names, or nothing."""

    def __init__(self, module, **instead):
        self.module, self.instead = module, instead

    def __getattr__(self, name):
        found = self.instead[name] if name in self.instead else getattr(self.module, name)
        if found is MISSING:
            raise AttributeError(name)
        return found


class WithoutMark:
    """An attribute that no input has, whatever its constructor sets."""

    def __get__(self, widget, kind):
        raise AttributeError("advanced")

    def __set__(self, widget, value):
        pass


def described(schema):
    return {
        "id": schema.node_id,
        "inputs": [[widget.id, str(widget.get_io_type())] for widget in schema.inputs],
        "outputs": [str(output.io_type) for output in schema.outputs],
    }


def marks(schema):
    """The inputs that are advanced, by where they say so."""
    return {
        "attribute": [widget.id for widget in schema.inputs if getattr(widget, "advanced", None) is True],
        "extra": [widget.id for widget in schema.inputs if widget.extra_dict.get("advanced") is True],
    }


def schemas():
    return [node.define_schema() for node in NODES]


def raises(kind, function, *arguments, **named):
    try:
        function(*arguments, **named)
    except kind:
        return True
    return False


def schema_findings():
    found = {"here": [described(schema) for schema in schemas()], "marks": [marks(schema) for schema in schemas()]}
    found["told_to_the_page"] = [
        [widget.id for widget in schema.inputs if widget.as_dict().get("advanced") is True] for schema in schemas()
    ]
    for name, kind in (("older", older_schema()), ("newer", newer_schema())):
        with mock.patch.object(io, "Schema", kind):
            made = schemas()
            found[name] = [described(schema) for schema in made]
            found[f"{name}_is_faked"] = all(type(schema) is kind for schema in made)
            found[f"{name}_refuses_unknown"] = raises(TypeError, kind, node_id="x", nonsense=1)
            found[f"{name}_filters_unknown"] = _host.schema(node_id="x", nonsense=1).node_id == "x"
        found[f"{name}_aliases"] = [bool(getattr(schema, "search_aliases", None)) for schema in made]
    found["newer_defaults"] = all(getattr(schema, name) == value for schema in made for name, value in UNKNOWN.items())
    with mock.patch.object(io.Input, "advanced", WithoutMark(), create=True):
        found["marks_without"] = [marks(schema) for schema in schemas()]
    with mock.patch.object(io.Input, "advanced", None, create=True):
        found["marks_with"] = [marks(schema) for schema in schemas()]
    return found


def inference_dtype(with_device):
    """What our loader hands a `set_inference_dtype` that takes a device, or does not."""
    kind, seen = native_dit.MochiSupported, []
    real = kind.set_inference_dtype

    def plain(self, dtype, manual_cast_dtype):
        seen.append(None)
        real(self, dtype, manual_cast_dtype)

    def on_device(self, dtype, manual_cast_dtype, device=None):
        seen.append(str(device))
        real(self, dtype, manual_cast_dtype)

    with having(kind, "set_inference_dtype", on_device if with_device else plain):
        load()
    return seen


def management_findings():
    management, found = comfy.model_management, {}
    for name, value in (("with", True), ("without", False)):
        found[f"inference_dtype_{name}_device"] = inference_dtype(value)

    class CoreModelPatcher(comfy.model_patcher.ModelPatcher):
        pass

    def patcher():
        return type(_host.patcher(torch.nn.Linear(1, 1), CPU, CPU)).__name__

    with having(comfy.model_patcher, "CoreModelPatcher", CoreModelPatcher):
        found["patcher_with"] = patcher()
    with having(comfy.model_patcher, "CoreModelPatcher"):
        found["patcher_without"] = patcher()

    known, unknown = management.OOM_EXCEPTION("full"), KeyError("full")
    with having(management, "is_oom", lambda error: isinstance(error, KeyError)):
        found["out_of_memory_with"] = [_host.out_of_memory(error) for error in (known, unknown)]
    with having(management, "is_oom"):
        found["out_of_memory_without"] = [_host.out_of_memory(error) for error in (known, unknown)]

    entered = []

    @contextlib.contextmanager
    def context(device):
        entered.append(str(device))
        yield

    with having(management, "cuda_device_context", context), _host.on_device(CPU):
        found["device_context_with"] = list(entered)
    with having(management, "cuda_device_context"), _host.on_device(CPU):
        found["device_context_without"] = list(entered)

    found["on_meta_when_archived"] = []
    for name, archive in (
        ("with", lambda network: found["on_meta_when_archived"].append(any(p.is_meta for p in network.parameters()))),
        ("without", MISSING),
    ):
        # The host's own calls go on as they are.
        with having(native_dit, "comfy", Seen(comfy, model_management=Seen(management, archive_model_dtypes=archive))):
            found[f"loaded_{name}_archive"] = type(load().model.diffusion_model).__name__

    found["free_memory_with"] = _host.free_memory(SimpleNamespace(get_free_memory=lambda device: 7), CPU)
    with having(management, "get_free_memory", lambda device: 5):
        found["free_memory_without"] = _host.free_memory(SimpleNamespace(), CPU)

    vae = native_vae.MochiVAE.__new__(native_vae.MochiVAE)
    with having(comfy.sd.VAE, "vae_output_dtype", lambda self: torch.bfloat16):
        found["vae_output_with"] = str(vae._output_dtype())
    with having(comfy.sd.VAE, "vae_output_dtype"):
        found["vae_output_without"] = str(vae._output_dtype())
    return found


def weights_findings():
    """How this host is told of scaled 8-bit floats: once for a file, or for each layer."""
    scaled = Scaled(torch.ones(2, 2, dtype=torch.float8_e4m3fn), torch.tensor(0.5))
    weights, found = {"layer.weight": scaled}, {}
    for name, by_file in (("by_file", True), ("by_layer", False)):
        with having(native_weights, "SCALED_BY_FILE", by_file):
            supported = SimpleNamespace(optimizations={})
            native_weights.describe_scales(supported, weights)
            found[name] = {
                "names": sorted(native_weights._scaled_state("layer", scaled)),
                "options": sorted(native_weights.quantized_options(weights)),
                "description": sorted(set(vars(supported)) - {"optimizations"}),
            }
    found["meta_with"] = native_weights.loads_on_meta(SimpleNamespace(_quant_config={}))
    found["meta_without"] = native_weights.loads_on_meta(SimpleNamespace())
    by_layer = SimpleNamespace(_qdata=0, dequantize=lambda: torch.tensor(6.0))
    by_file = SimpleNamespace(weight=torch.tensor(2.0), scale_weight=torch.tensor(4.0))
    layers = (SimpleNamespace(weight=by_layer), by_file, SimpleNamespace(weight=torch.tensor(3.0)))
    found["floats"] = [native_weights.floats(layer).item() for layer in layers]
    return found


sys.stdout.write("FOUND" + json.dumps(schema_findings() | management_findings() | weights_findings()) + "\n")
