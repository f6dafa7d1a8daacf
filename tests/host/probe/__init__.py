"""Nodes for the host tests only: they write what is on a wire to a file, and put wrong things on wires."""

from pathlib import Path

import folder_paths
import torch
from safetensors.torch import save_file


def _save(name: str, tensors: dict[str, torch.Tensor]) -> None:
    folder = Path(folder_paths.get_output_directory())
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, folder / f"{name}.safetensors")


class _Probe:
    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")  # writes its file every time


class ProbeLatent(_Probe):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "name": ("STRING", {})}}

    def run(self, latent, name):
        _save(name, {"samples": latent["samples"]})
        return {}


class ProbeImage(_Probe):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "name": ("STRING", {})}}

    def run(self, image, name):
        _save(name, {"image": image})
        return {}


class ProbeConditioning(_Probe):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {})}}

    def run(self, conditioning, name):
        ((features, options),) = conditioning
        _save(name, {"features": features, "mask": options["attention_mask"]})
        return {}


class ProbeSigmas(_Probe):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sigmas": ("SIGMAS",), "name": ("STRING", {})}}

    def run(self, sigmas, name):
        _save(name, {"sigmas": sigmas})
        return {}


class WrongLatent:
    """Latents full of NaN, or of another model's channel count."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"channels": ("INT", {"default": 12})}}

    def run(self, channels):
        return ({"samples": torch.full((1, channels, 2, 8, 8), float("nan"))},)


class ForeignConditioning:
    """What an SD text encoder would give: other widths, no mask."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {"default": 768, "max": 8192})}}

    def run(self, width):
        return ([[torch.ones(1, 77, width), {"pooled_output": torch.ones(1, width)}]],)


class Moving:
    """A clip with something in it: a bright square that moves."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        size = ("INT", {"default": 64, "max": 8192})
        return {"required": {"frames": size, "height": size, "width": size}}

    def run(self, frames, height, width):
        clip = torch.full((frames, height, width, 3), 0.1)
        for index in range(frames):
            clip[index, height // 4 : height // 2, index : index + width // 4] = torch.tensor([0.9, 0.2, 0.2])
        return (clip,)


NODE_CLASS_MAPPINGS = {
    f"MochiTest{node.__name__}": node
    for node in (
        ProbeLatent,
        ProbeImage,
        ProbeConditioning,
        ProbeSigmas,
        WrongLatent,
        ForeignConditioning,
        Moving,
    )
}
