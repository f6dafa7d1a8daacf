"""Run inside a ComfyUI's own process by test_memory.py: what our models ask of memory, and what they do without.

Prints JSON.
"""

import json
import logging
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from inside import comfy, conditionings, difference, load, native_dit, of_the_pack, sample

from mochi_core.config import MOCHI_1
from mochi_core.memory.need import FEWEST_TOKENS, dit_activations
from mochi_core.memory.vae_need import streaming_decode_bytes
from mochi_core.shapes import LatentSize
from mochi_core.vae.decoder import to_frames
from mochi_core.weights.build import TINY_VAE

import folder_paths  # isort: skip
import nodes as host_nodes  # isort: skip

host, memory, native_vae = (of_the_pack(name) for name in ("_host", "_memory", "native_vae"))
decoding, native_guider = of_the_pack("decoding"), of_the_pack("native_guider")


class Log(logging.Handler):
    """What was logged, by level."""

    def __init__(self):
        super().__init__()
        self.said = []
        logging.getLogger().addHandler(self)

    def emit(self, record):
        self.said.append((record.levelname, record.getMessage()))

    def take(self, level="WARNING"):
        taken = [message for name, message in self.said if name == level]
        self.said.clear()
        return taken


log = Log()
logging.getLogger().setLevel(logging.INFO)


@contextmanager
def replaced(owner, **values):
    """Attributes of a module or object for a while."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def at_call(layer, *numbers, do):
    """Does something when a layer is called for one of these times, from 1; yields the list of calls."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) in numbers:
            do()

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def run_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def error_of(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_vae():
    return native_vae.load_native_vae(str(TINY_VAE), torch.float32)


def decoded_by_node(vae, latents, mode="streaming", *tiles):
    tiles = tiles or (1, 1, 0)
    ((clip,), _) = decoding.MochiVideoDecode.execute(vae, {"samples": latents}, mode, 30.0, *tiles, player=False).args
    return clip


def decoded_by_host(vae, latents):
    (frames,) = host_nodes.VAEDecode().decode(vae, {"samples": latents})
    return frames


def decode_findings():
    vae, latents = load_vae(), normal(1, 12, 17, 8, 8)
    decoder = vae.first_stage_model.decoder
    plain = to_frames(decoder(latents))[0]
    found = {"frames": list(plain.shape)}
    found["host"] = difference(decoded_by_host(vae, latents), plain)
    found["node"] = difference(decoded_by_node(vae, latents), decoded_by_host(vae, latents))
    found["full"] = difference(decoded_by_node(vae, latents, "full"), plain)
    log.take()
    (tiled,) = host_nodes.VAEDecodeTiled().decode(vae, {"samples": latents}, 64, 16, 8, 4)
    found["host_tiled"] = difference(tiled, decoded_by_host(vae, latents))
    found["host_tiled_said"] = log.take("INFO")
    found["tiled_3d"] = difference(vae.decode_tiled_3d(latents)[0].movedim(0, -1), plain)
    two = torch.cat([latents, normal(1, 12, 17, 8, 8, seed=1)])
    found["batch"] = difference(vae.decode(two)[1], vae.decode(two[1:])[0])
    blended = decoded_by_node(vae, latents, "tiled blended", 1, 3, 2)
    found["blended"] = [list(blended.shape), (blended - plain).abs().mean().item()]
    found["bad_tiles"] = [
        decoding.MochiVideoDecode.validate_inputs(mode, 30.0, *tiles)
        for mode, tiles in (
            ("tiled spatial", (3, 1, 0)),
            ("tiled spatial", (2, 2, 3)),
            ("tiled blended", (0, 1, 0)),
            ("tiled blended", (17, 1, 0)),
            ("tiled blended", (3, 5, 64)),
            ("streaming", (3, 1, 0)),
            ("tiled spatial", (None, 3, 0)),
        )
    ]

    layer = decoder.output_proj
    log.take()
    with at_call(layer, 5, do=run_out) as calls:
        found["once"] = difference(decoded_by_host(vae, latents), plain)
    found["once_calls"] = len(calls)
    found["once_said"] = log.take()
    with replaced(host, host_apart=lambda device: True), at_call(layer, 5, do=run_out):
        found["once_apart"] = difference(decoded_by_host(vae, latents), plain)
    found["once_apart_said"] = log.take()

    real = comfy.model_management.load_models_gpu
    failing = iter([run_out])

    def load_once_not(*arguments, **named):
        next(failing, lambda: real(*arguments, **named))()

    with replaced(comfy.model_management, load_models_gpu=load_once_not):
        found["not_loaded"] = difference(decoded_by_host(vae, latents), plain)
    found["not_loaded_said"] = log.take()
    return found


def autosaved_files():
    return sorted(file.name for file in (Path(folder_paths.get_output_directory()) / "latents").glob("*"))


def autosave_findings(folder):
    vae, latents = load_vae(), normal(2, 12, 17, 8, 8)
    layer, plain = vae.first_stage_model.decoder.output_proj, vae.decode(latents)
    found, during = {"after": autosaved_files()}, []
    for some in (latents, latents[:, :, :1]):
        with at_call(layer, 2 if some is latents else 1, do=lambda: during.append(autosaved_files())):
            vae.decode(some)
    found["during"] = during
    with at_call(layer, 3, 6, do=run_out):
        found["twice"] = error_of(lambda: decoded_by_host(vae, latents))
    found["kept"] = autosaved_files()
    folder_paths.set_input_directory(str(folder / "latents"))
    loaded = host_nodes.LoadLatent().load(found["kept"][0])[0]["samples"]
    found["loaded"] = torch.equal(loaded, latents)
    found["decoded_later"] = difference(vae.decode(loaded), plain)
    log.take()

    def other_error():
        raise RuntimeError("a kernel failed")

    with at_call(layer, 3, do=other_error):
        found["other_error"] = error_of(lambda: decoded_by_node(vae, latents))
    found["other_error_said"] = log.take("ERROR")
    found["kept_both"] = autosaved_files()

    with at_call(layer, 3, do=lambda: comfy.model_management.interrupt_current_processing(True)) as calls:
        try:
            vae.decode(latents)
        except BaseException as error:
            found["interrupted"] = type(error).__name__
    found["interrupted_calls"] = len(calls)
    found["after_interruption"] = autosaved_files()
    found["decoded_after_interruption"] = difference(vae.decode(latents), plain)

    blocked = folder / "a file"
    blocked.write_text("")
    folder_paths.set_output_directory(str(blocked))
    log.take()
    found["unwritable"] = difference(vae.decode(latents), plain)
    found["unwritable_said"] = log.take()
    folder_paths.set_output_directory(str(folder))
    return found


def encode_findings():
    vae, video = load_vae(), torch.rand(13, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    encoder = vae.first_stage_model.encoder
    plain = encoder((video * 2 - 1).movedim(-1, 0).unsqueeze(0)).mean

    def encoded():
        return host_nodes.VAEEncode().encode(vae, video)[0]["samples"]

    found = {"host": difference(encoded(), plain)}
    (tiled,) = host_nodes.VAEEncodeTiled().encode(vae, video, 64, 16, 8, 4)
    found["host_tiled"] = difference(tiled["samples"], encoded())
    found["tiled_3d"] = difference(vae.encode_tiled_3d(video.movedim(-1, 0).unsqueeze(0)), plain)
    log.take()
    with at_call(encoder.output_proj, 1, do=run_out):
        found["once"] = difference(encoded(), plain)
    found["once_said"] = log.take()
    with at_call(encoder.output_proj, 1, 2, do=run_out):
        found["twice"] = error_of(encoded)
    return found


def estimate_findings():
    vae, found, asked = load_vae(), {}, []
    latents = normal(1, 12, 17, 8, 8)
    real = comfy.model_management.load_models_gpu

    def recorded(models, memory_required=0, **named):
        asked.append(memory_required)
        return real(models, memory_required=memory_required, **named)

    with replaced(comfy.model_management, load_models_gpu=recorded):
        vae.decode(latents)
        vae.encode(torch.rand(13, 64, 64, 3))
    found["asked"] = asked
    config, size = vae.first_stage_model.config, LatentSize(17, 8, 8)
    found["decode"] = memory.asked(streaming_decode_bytes(config, size, dtype=torch.float32))
    found["told"] = [
        vae.memory_used_decode((1, 12, 17, 8, 8), torch.float32),
        vae.memory_used_encode((1, 3, 13, 64, 64), torch.float32),
    ]
    found["by_frames"] = [vae.memory_used_decode((1, 12, t, 8, 8), torch.float32) for t in (1, 17, 100)]

    # The released VAE at its size, on devices from large to tiny.
    ways = memory.decode_ways(MOCHI_1.vae, LatentSize(28, 60, 106), torch.bfloat16, host_apart=True, whole=True)
    found["ways"] = [
        [str(way), round(way.need / 1e9, 2), memory.fitting(ways, way.need) is way, way.need < before]
        for before, way in zip([float("inf"), *(way.need for way in ways)], ways)
    ]
    found["too_small"] = memory.fitting(ways, 0) is ways[-1]

    # A device that has room for the decode only with the frames on the host.
    ways = memory.decode_ways(config, size, torch.float32, host_apart=True, whole=False)
    room = vae.model_size() + ways[1].need
    log.take()
    with replaced(host, host_apart=lambda device: True, usable_memory=lambda device: room):
        small = load_vae()
        found["small_told"] = [small.memory_used_decode((1, 12, 17, 8, 8), torch.float32), ways[1].need, ways[0].need]
        log.take()
        found["small"] = difference(small.decode(latents), vae.decode(latents))
    found["small_said"] = log.take("INFO")
    plain = vae.decode(latents)
    log.take()
    with replaced(host, free_memory=lambda patcher, device: 0):
        found["nothing_free"] = difference(vae.decode(latents), plain)
    found["nothing_free_said"] = log.take("INFO")
    return found


def forward_findings():
    found, shape = {}, (1, 12, 2, 8, 8)
    model = load()
    network, plain = model.model.diffusion_model, sample(model)
    block, config = network.blocks[1], network.config

    def lora(model):
        weight = model.model.state_dict()["diffusion_model.blocks.1.attn.qkv_x.weight"]
        change = normal(*weight.shape, seed=1) * 0.05
        model = model.clone()
        model.add_patches({"diffusion_model.blocks.1.attn.qkv_x.weight": ("diff", (change,))}, 1.0)
        return model

    log.take()
    with at_call(block, 2, do=run_out) as calls:
        found["once"] = difference(sample(model), plain)
    found["once_calls"], found["once_said"] = len(calls), log.take()
    found["chunks_then"] = network.tokens_at_once
    found["afterwards"] = difference(sample(model), plain)
    found["chunks_afterwards"] = network.tokens_at_once
    with at_call(block, 2, 3, do=run_out):
        found["twice"] = error_of(lambda: sample(model))
    found["after_twice"] = difference(sample(model), plain)
    log.take()

    changed = lora(load())
    whole = sample(changed)
    found["lora_effect"] = difference(whole, plain)
    moved = []
    real = type(changed).partially_unload

    def partially_unload(self, *arguments, **named):
        moved.append(real(self, *arguments, **named))
        return moved[-1]

    with (
        replaced(host, host_apart=lambda device: True),
        replaced(type(changed), partially_unload=partially_unload),
        at_call(changed.model.diffusion_model.blocks[1], 2, do=run_out),
    ):
        found["moved_out"] = difference(sample(changed), whole)
    found["moved_out_said"] = log.take()
    found["moved"], found["weights"] = moved, changed.model_size()

    size, dtype = LatentSize(*shape[2:]), model.model.compute_dtype
    found["need"] = [
        [
            model.model.memory_required([batch, *shape[1:]]),
            memory.asked(dit_activations(config, size, batch=batch, dtype=dtype)),
        ]
        for batch in (1, 2)
    ]
    with (
        replaced(host, usable_memory=lambda device: model.model_size()),
        replaced(native_dit, BUSY_TOKENS=16),
    ):
        found["chunked_need"] = [
            model.model.memory_required(shape),
            memory.asked(dit_activations(config, size, dtype=dtype, tokens_at_once=16)),
        ]
        found["chunked"] = difference(sample(model), plain)
        found["chunks"] = network.tokens_at_once
        found["chunked_run"] = native_dit.described_run(model, shape, 3)
    found["fewest"] = FEWEST_TOKENS

    positive, negative = conditionings()
    guider = native_guider.MochiGuider(model, positive, negative, 4.0, "", True)
    log.take()
    guider.sample(
        normal(*shape), torch.zeros(shape), comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
    )
    found["run_said"] = [line for line in log.take("INFO") if "sampling" in line]
    return found


@torch.inference_mode()
def main():
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        found = {
            "decode": decode_findings(),
            "autosave": autosave_findings(Path(folder)),
            "encode": encode_findings(),
            "estimates": estimate_findings(),
            "forward": forward_findings(),
        }
    sys.stdout.write("FOUND" + json.dumps(found) + "\n")


main()
