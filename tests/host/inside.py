"""What the scripts that run inside a ComfyUI's own process start with: the host, the pack, a run of the tiny model."""

import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path.cwd()))
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402


def pack():
    """The pack, imported as the host imports it: under a name of the host's choosing."""
    spec = importlib.util.spec_from_file_location(
        "some_x_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["some_x_pack"] = module
    spec.loader.exec_module(module)
    return sys.modules["some_x_pack.nodes"]


pack()
from mochi_core.weights.build import TINY_DIT, TINY_T5, TINY_TOKENIZER  # noqa: E402


def of_the_pack(name):
    return sys.modules[f"some_x_pack.nodes.{name}"]


native_dit, native_clip, native_lora = (of_the_pack(f"native_{name}") for name in ("dit", "clip", "lora"))


def load(memory="auto"):
    return native_dit.load_model(str(TINY_DIT), None, "auto", memory)


def conditionings():
    clip = native_clip.load_clip(str(TINY_T5), TINY_TOKENIZER, None)
    return [native_clip.encode(clip, text, False) for text in ("a red circle", "")]


def sample(model, steps=3):
    latent = torch.zeros(1, 12, 2, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    positive, negative = conditionings()
    return comfy.sample.sample(
        model, noise, steps, 4.0, "euler", "linear_quadratic", positive, negative, latent, disable_pbar=True
    )


def difference(a, b):
    return (a - b).abs().max().item()
