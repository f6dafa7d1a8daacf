"""Our DiT as the host's MODEL, so that its samplers, patches, wrappers, LoRA and memory management apply."""

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models
import torch

from mochi_core.attention.joint import PlainJointAttention
from mochi_core.attention.kernels import check_kernel
from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.dit.block import AsymmetricJointBlock
from mochi_core.errors import ConditioningError
from mochi_core.latents import MOCHI_1_STATISTICS, LatentStatistics
from mochi_core.weights.build import open_dit
from mochi_core.weights.formats import FLOAT8
from mochi_core.weights.lora import attached, branches

from . import _host
from .native_weights import (
    describe_scales,
    fill_native,
    floats,
    has_scales,
    is_mixed,
    loads_on_meta,
    savable,
    wanted,
    weight_dtype,
)

MEMORY = ("auto", "resident", "streamed")
# Where a model's options keep the LoRAs that work beside its weights: pairs of a LoRA and its strength.
LORAS = "mochi_video_loras"


class NativeDiT(AsymmDiT):
    """The network behind the host's calling convention. It returns noise minus clean, as the host expects."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, operations: Any, **_: Any):
        # On the meta device whatever the host says: the file's tensors become the parameters.
        device = "meta" if loads_on_meta(operations) else "cpu"
        # Never made in 8 bits, in which norms, biases and position frequencies must not be.
        made_in = torch.bfloat16 if dtype in FLOAT8.values() else dtype
        super().__init__(config, operations=operations, dtype=made_in, device=device)
        self.dtype = dtype

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},
        **options: Any,
    ) -> torch.Tensor:
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, transformer_options, **options)

    def _predict(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},
        **_: Any,
    ) -> torch.Tensor:
        if attention_mask is None:
            attention_mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})

        def run_block(index: int, block: AsymmetricJointBlock, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            _host.interruptible()
            replacement = replacements.get(("double_block", index))
            if replacement is None:
                return block(*inputs)
            names = ("img", "txt", "vec", "rotation", "text_mask")

            def original(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
                visual, text = block(*(arguments[name] for name in names))
                return {"img": visual, "txt": text}

            arguments = dict(zip(names, inputs), transformer_options=transformer_options)
            out = replacement(arguments, {"original_block": original})
            return out["img"], out["txt"]

        with attached(self, branches(transformer_options.get(LORAS, ())), floats):
            return -super().forward(x, timestep, context, attention_mask, run_block=run_block)


class MochiLatents(comfy.latent_formats.Mochi):
    """The host's Mochi latents with the statistics of a checkpoint."""

    def __init__(self, statistics: LatentStatistics):
        super().__init__()
        if statistics != MOCHI_1_STATISTICS:
            self.latents_mean = torch.tensor(statistics.mean).view(1, -1, 1, 1, 1)
            self.latents_std = torch.tensor(statistics.std).view(1, -1, 1, 1, 1)
            # Colours of the released model's latents say nothing about another VAE's.
            self.latent_rgb_factors = None
            self.latent_rgb_factors_bias = None


class MochiSupported(comfy.supported_models.GenmoMochi):
    """The host's description of a model: ours, with its own latents."""

    def __init__(self, config: DiTConfig, statistics: LatentStatistics):
        super().__init__({"image_model": "mochi_preview", "config": config})
        self.latent_format = MochiLatents(statistics)


class MochiModel(comfy.model_base.GenmoMochi):
    """The host's base model around `NativeDiT`. Being a `GenmoMochi`, it has the official LoRA key map."""

    def __init__(self, supported: MochiSupported, memory: str):
        comfy.model_base.BaseModel.__init__(
            self, supported, comfy.model_base.ModelType.FLOW, device=None, unet_model=NativeDiT
        )
        self.memory = memory

    @property
    def text_feature_dim(self) -> int:
        return self.diffusion_model.config.text_feature_dim

    def extra_conds(self, **conditions: Any) -> dict[str, Any]:
        """As the host has it, less `num_tokens`: our DiT reads the mask, so unequal prompts can share a batch."""
        check_features(self, conditions.get("cross_attn"))
        conds = super().extra_conds(**conditions)
        conds.pop("num_tokens", None)
        return conds

    def state_dict_for_saving(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """The host's, with packed weights under the names that say so."""
        state = super().state_dict_for_saving(*arguments, **named)
        return savable(state, self.diffusion_model, "model.diffusion_model.")

    def memory_required(self, *shapes: Any, **named_shapes: Any) -> float:
        """Bytes a forward needs; a streamed model asks for all, so that the host keeps its weights out of VRAM."""
        required = super().memory_required(*shapes, **named_shapes)
        return 1e20 if self.memory == "streamed" else required


def check_features(model: Any, features: torch.Tensor | None) -> None:
    """Raises `ConditioningError` when prompt features are missing or not of the width this model reads."""
    width = model.text_feature_dim if isinstance(model, MochiModel) else None
    if features is None or (width is not None and features.shape[-1] != width):
        given = "no text features" if features is None else f"text features of width {features.shape[-1]}"
        raise ConditioningError(
            f"The conditioning has {given}",
            f"this DiT reads T5 features of width {width}",
            "Encode the prompt with the T5 that belongs to this DiT, through Mochi Video Text Encode",
        )


def load_model(path: str, dtype: torch.dtype | None, attention: str, memory: str) -> Any:
    """A patcher around the DiT of a file. Raises `MochiError` kinds on a bad file, or a kernel that is not here."""
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    check_kernel(attention, load_device)

    file = open_dit(path)
    weights = wanted(file.entries, dtype)
    supported = MochiSupported(file.config, file.statistics)
    describe_scales(supported, weights)
    stored = weight_dtype(weights)
    if is_mixed(weights) and stored not in FLOAT8.values() and not has_scales(weights):
        supported.custom_operations = comfy.ops.manual_cast
    held = stored or management.unet_dtype(load_device, supported_dtypes=supported.supported_inference_dtypes)
    cast = management.unet_manual_cast(stored, load_device, supported.supported_inference_dtypes)
    set_dtype = supported.set_inference_dtype
    set_dtype(held, cast, **_host.known_arguments(set_dtype, device=load_device))

    check_kernel(attention, load_device, cast or held)

    model = MochiModel(supported, memory)
    fill_native(model.diffusion_model, weights)
    # Newer hosts note each weight's dtype when a network is made, and cast to it; ours have theirs only now.
    getattr(comfy.model_management, "archive_model_dtypes", lambda network: None)(model.diffusion_model)
    for block in model.diffusion_model.blocks:
        block.attn.joint = PlainJointAttention(attention)
    patcher = _host.patcher(model, load_device, offload_device)
    if memory == "resident":
        patcher.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, _load_whole)
    patcher.cached_patcher_init = (load_model, (path, dtype, attention, memory))
    return patcher


def _load_whole(executor: Any, *arguments: Any, **named: Any) -> Any:
    """Before sampling, all weights to the device, however the host would have split them."""
    comfy.model_management.load_models_gpu([executor.class_obj.model_patcher], force_full_load=True)
    return executor(*arguments, **named)
