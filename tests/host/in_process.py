"""Run inside a ComfyUI's own process by test_in_process.py: what only Python can see of our MODEL. Prints JSON."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from inside import PACK, comfy, difference, load, native_dit, native_lora, sample
from safetensors.torch import save_file

from mochi_core.weights import build
from mochi_core.weights.build import TINY_DIT
from mochi_core.weights.convert import convert


def patched_by_the_host(model):
    """What happens to a patch of a packed weight, on weights that are loaded and on streamed ones."""
    key = "diffusion_model.blocks.1.attn.qkv_x.weight"
    said = []
    for streamed in (False, True):
        clone = model.clone()
        clone.add_patches({key: ("diff", (torch.ones(576, 192),))}, 1.0)
        if streamed and getattr(clone, "is_dynamic", lambda: False)():
            continue
        try:
            if streamed:
                clone.patch_model(lowvram_model_memory=1)
            sample(clone)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
        clone.unpatch_model()
    return said


def saved_and_loaded(model, folder):
    """The model after the host has saved its weights and we have read them."""
    file = Path(folder) / "saved.safetensors"
    metadata = {
        name: json.dumps(list(getattr(load_statistics(), name[8:]))) for name in ("latents_mean", "latents_std")
    }
    comfy.sd.save_checkpoint(str(file), model, metadata=metadata)
    return native_dit.load_model(str(file), None, "auto", "auto")


def load_statistics():
    return build.open_dit(TINY_DIT).statistics


def quantised_findings():
    """Packed and 8-bit models whole and partly loaded, with LoRAs beside their weights on clones of one model."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "lora.safetensors"
        generator = torch.Generator().manual_seed(2)
        shapes = {"lora_A": (4, 192), "lora_B": (576, 4)}
        held = {
            f"blocks.{n}.attn.qkv_x.{k}": torch.randn(s, generator=generator) for n in (0, 2) for k, s in shapes.items()
        }
        save_file({name: tensor * 0.2 for name, tensor in held.items()}, lora)
        for kind in ("keep", "q8_0", "fp8_scaled"):
            file = Path(folder) / f"{kind}.safetensors"
            dora = Path(folder) / "dora.safetensors"
            lengths = {f"blocks.{n}.attn.qkv_x.dora_scale": torch.rand(576, 1, generator=generator) + 1 for n in (0, 2)}
            save_file({name: tensor * 0.2 for name, tensor in held.items()} | lengths, dora)
            convert(TINY_DIT, file, "comfy", kind)
            model = native_dit.load_model(str(file), None, "auto", "auto")
            plain = sample(model)
            one, other = (native_lora.with_loras(model, [(str(lora), strength)]) for strength in (1.0, -0.5))
            with_one, with_other = sample(one), sample(other)
            found[f"{kind}_lora_effect"] = difference(with_one, plain)
            found[f"{kind}_clones_apart"] = max(
                difference(sample(one), with_one),
                difference(sample(other), with_other),
                difference(sample(model), plain),
            )
            found[f"{kind}_chained"] = difference(sample(native_lora.with_loras(one, [(str(lora), -1.0)])), plain)
            fresh = native_lora.with_loras(native_dit.load_model(str(file), None, "auto", "auto"), [(str(lora), 1.0)])
            if not getattr(fresh, "is_dynamic", lambda: False)():
                fresh.patch_model(lowvram_model_memory=1)
                found[f"{kind}_partly_loaded"] = difference(sample(fresh), with_one)
                fresh.unpatch_model()
            # DoRA needs the weight itself: in every format what it is over the same weights as floats
            floats = native_dit.load_model(str(file), torch.float32, "auto", "auto")
            over_floats = sample(native_lora.with_loras(floats, [(str(dora), 0.8)]))
            found[f"{kind}_dora_effect"] = difference(over_floats, sample(floats))
            found[f"{kind}_dora"] = difference(sample(native_lora.with_loras(model, [(str(dora), 0.8)])), over_floats)
            if kind == "q8_0":
                found["packed_and_patched"] = patched_by_the_host(model)
            reloaded = saved_and_loaded(model, folder)
            found[f"{kind}_saved"] = difference(sample(reloaded), plain)
            hooks = [h for layer in model.model.diffusion_model.modules() for h in layer._forward_hooks]
            found[f"{kind}_hooks_left"] = len(hooks)

            def stop(arguments, extra):
                raise KeyboardInterrupt

            one.set_model_patch_replace(stop, "dit", "double_block", 1)
            try:
                sample(one)
            except KeyboardInterrupt:
                found[f"{kind}_interrupted"] = difference(sample(model), plain)
    return found


@torch.inference_mode()
def main():
    plain_model = load()
    plain = sample(plain_model)
    found = {"core_is_top_level": sys.modules["mochi_core"].__file__ == str(PACK / "mochi_core" / "__init__.py")}
    found["is_genmo_mochi"] = isinstance(plain_model.model, comfy.model_base.GenmoMochi)
    found["latent_mean"] = plain_model.model.latent_format.latents_mean.flatten()[0].item()

    calls = []

    def passing(arguments, extra):
        calls.append(arguments["img"].shape)
        return extra["original_block"](arguments)

    patched = load()
    patched.set_model_patch_replace(passing, "dit", "double_block", 2)
    found["replaced_block_difference"] = difference(sample(patched), plain)
    found["replaced_block_calls"] = len(calls)

    wrapped = load()
    seen = []
    wrapped.add_wrapper(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL,
        lambda executor, *args, **kwargs: (seen.append(1), executor(*args, **kwargs))[1],
    )
    found["wrapped_difference"] = difference(sample(wrapped), plain)
    found["wrapper_calls"] = len(seen)

    for memory in ("resident", "streamed"):
        found[f"{memory}_difference"] = difference(sample(load(memory)), plain)
    shape = (1, 12, 2, 8, 8)
    found["streamed_asks_for_all"] = load("streamed").model.memory_required(shape) > 1e15
    found["auto_asks_for_some"] = 0 < plain_model.model.memory_required(shape) < 1e12

    # A patch as a LoRA makes one, applied to whole and to partly loaded weights.
    key = "diffusion_model.blocks.1.attn.qkv_x.weight"
    weight = plain_model.model.state_dict()[key]
    change = {key: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05,))}
    lora = load()
    found["patched_keys"] = len(lora.add_patches(change, 1.0))
    changed = sample(lora)
    found["patch_effect"] = difference(changed, plain)
    partial = load()
    partial.add_patches(change, 1.0)
    if not getattr(partial, "is_dynamic", lambda: False)():
        partial.patch_model(lowvram_model_memory=1)
        found["partly_loaded_difference"] = difference(sample(partial), changed)
        partial.unpatch_model()
    found["unpatched_difference"] = difference(sample(load()), plain)
    found |= quantised_findings()
    sys.stdout.write("FOUND" + json.dumps(found) + "\n")


main()
