"""Our DiT as the host's MODEL, so that its samplers, patches, wrappers, LoRA and memory management apply."""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import torch

from mochi_core.attention.joint import PlainJointAttention
from mochi_core.attention.kernels import check_kernel
from mochi_core.config import DiTConfig
from mochi_core.dit import AsymmDiT
from mochi_core.dit.block import AsymmetricJointBlock
from mochi_core.errors import ConditioningError, MemoryBudgetError
from mochi_core.memory.need import BUSY_TOKENS, FEWEST_TOKENS, dit_activations
from mochi_core.shapes import LatentSize
from mochi_core.weights.build import open_dit
from mochi_core.weights.formats import FLOAT8
from mochi_core.weights.lora import attached, branches

from . import _host
from ._memory import asked, gigabytes, video_of
from .native_latents import MochiSupported
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
# The part of the loaded weights that goes, at least, when a forward ran out of memory.
MOVED_OUT = 0.25


class NativeDiT(AsymmDiT):
    """The network behind the host's calling convention. It returns noise minus clean, as the host expects."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, operations: Any, **_: Any):
        # On the meta device whatever the host says: the file's tensors become the parameters.
        device = "meta" if loads_on_meta(operations) else "cpu"
        # Never made in 8 bits, in which norms, biases and position frequencies must not be.
        made_in = torch.bfloat16 if dtype in FLOAT8.values() else dtype
        super().__init__(config, operations=operations, dtype=made_in, device=device)
        self.dtype = dtype
        # Bytes of weights that are to be on the device, and for the time of a forward who put them there.
        self.resident_bytes = 0
        self.patcher: Any = None
        # What ran out of memory in this run, as it was done then.
        self.too_large: set[tuple[int, ...]] = set()

    def need(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, text_tokens: int = 256) -> int:
        """Bytes that a forward on latents of this shape (`B C T H W`) asks of the device beside the weights."""
        at_once = self.fitting_tokens(shape, device, dtype)
        return self._need(shape, dtype, at_once, text_tokens)

    def fitting_tokens(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> int | None:
        """How many tokens at once such a forward takes: all (None) when that fits beside all the weights."""
        if tuple(shape) in self.too_large:
            return FEWEST_TOKENS
        whole = self._need(shape, dtype, None)
        return None if self.resident_bytes + whole <= _host.usable_memory(device) else BUSY_TOKENS

    def _need(self, shape: Sequence[int], dtype: torch.dtype, at_once: int | None, text_tokens: int = 256) -> int:
        size = LatentSize(*shape[2:])
        return asked(
            dit_activations(
                self.config, size, batch=shape[0], text_tokens=text_tokens, dtype=dtype, tokens_at_once=at_once
            )
        )

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

        loras = branches(transformer_options.get(LORAS, ()))
        for first_time in (True, False):
            self.tokens_at_once = self.fitting_tokens(x.shape, x.device, x.dtype)
            try:
                with attached(self, loras, floats):
                    return -super().forward(x, timestep, context, attention_mask, run_block=run_block)
            except Exception as error:
                if not _host.out_of_memory(error):
                    raise
            # Not before: the exception keeps alive what was on the device.
            _host.empty_cache()
            if first_time:
                self._make_room(x)
        raise MemoryBudgetError(
            f"The transformer ran out of memory twice at {video_of(x.shape)}, the second time in chunks",
            f"a forward needs about {gigabytes(self.need(x.shape, x.device, x.dtype))} beside the weights that stay",
            "Close other programs that use the device, load the model with memory streamed or in a smaller format, or "
            "make a smaller or shorter video",
        )

    def _make_room(self, x: torch.Tensor) -> None:
        """After a forward ran out of memory: small chunks for the rest of the run, fewer weights on the device."""
        self.too_large.add(tuple(x.shape))
        moved = 0
        if self.patcher is not None and _host.host_apart(x.device):
            short = self.need(x.shape, x.device, x.dtype) - _host.free_memory(self.patcher, x.device)
            wanted = max(short, self.patcher.loaded_size() * MOVED_OUT)
            moved = self.patcher.partially_unload(self.patcher.offload_device, wanted)
            _host.empty_cache()
        _host.log.warning(
            "a forward of %s ran out of memory: from here in chunks of %d tokens, %s of weights moved to the host; "
            "nothing done so far is lost",
            video_of(x.shape), FEWEST_TOKENS, gigabytes(moved),
        )  # fmt: skip


class MochiModel(comfy.model_base.GenmoMochi):
    """The host's base model around `NativeDiT`. Being a `GenmoMochi`, it has the official LoRA key map."""

    def __init__(self, supported: MochiSupported, memory: str):
        comfy.model_base.BaseModel.__init__(
            self, supported, comfy.model_base.ModelType.FLOW, device=None, unet_model=NativeDiT
        )
        self.memory = memory
        self.load_device = comfy.model_management.get_torch_device()

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

    def memory_required(self, input_shape: Sequence[int], cond_shapes: Mapping[str, Any] = {}) -> float:
        """Bytes a forward needs; a streamed model asks for all, so that the host keeps its weights out of VRAM."""
        if self.memory == "streamed":
            return 1e20
        if len(input_shape) != 5:  # no video: the forward will say so
            return super().memory_required(input_shape, cond_shapes)
        texts = [shape[1] for shape in cond_shapes.get("c_crossattn", ()) if len(shape) == 3]
        return self.forward_need(input_shape, max(texts, default=256))

    def forward_need(self, shape: Sequence[int], text_tokens: int = 256) -> int:
        """Bytes that a forward on latents of this shape asks of the device beside the weights."""
        return self.diffusion_model.need(shape, self.load_device, self.compute_dtype, text_tokens)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.manual_cast_dtype or self.diffusion_model.dtype

    def _apply_model(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """The host's; the network knows who loaded it, should it run out of memory."""
        self.diffusion_model.patcher = self.current_patcher
        try:
            return super()._apply_model(*arguments, **named)
        finally:
            self.diffusion_model.patcher = None


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
    supported = MochiSupported(file)
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
    _host.newer(comfy.model_management, "archive_model_dtypes", lambda network: None)(model.diffusion_model)
    for block in model.diffusion_model.blocks:
        block.attn.joint = PlainJointAttention(attention)
    model.diffusion_model.resident_bytes = 0 if memory == "streamed" else management.module_size(model.diffusion_model)
    patcher = _host.patcher(model, load_device, offload_device)
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, _start_afresh)
    if memory == "resident":
        patcher.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, _load_whole)
    patcher.cached_patcher_init = (load_model, (path, dtype, attention, memory))
    return patcher


def _start_afresh(patcher: Any) -> None:
    """Before sampling: what ran out of memory in another run may fit in this one."""
    patcher.model.diffusion_model.too_large.clear()


def described_run(patcher: Any, shape: Sequence[int], steps: int) -> str:
    """What a sampling run of latents of this shape will ask of the device, and how it will be done."""
    model: MochiModel = patcher.model
    network, device = model.diffusion_model, patcher.load_device
    one, both = (model.forward_need([count * shape[0], *shape[1:]]) for count in (1, 2))
    weights, usable = patcher.model_size(), _host.usable_memory(device)
    over = min(weights, one + weights - usable)
    if model.memory == "streamed":
        how = "the host streams all weights"
    elif over <= 0 or model.memory == "resident":
        how = "all weights stay on the device"
    else:
        how = f"the host streams about {gigabytes(over)} of the weights"
    at_once = network.fitting_tokens(shape, device, model.compute_dtype)
    chunks = "" if at_once is None else f", in chunks of {at_once} tokens"
    return (
        f"sampling {video_of(shape)}, {steps} steps: a forward of one prompt needs about "
        f"{gigabytes(one)}, of both {gigabytes(both)}, beside {gigabytes(weights)} of weights; "
        f"{gigabytes(_host.free_memory(patcher, device))} are free of {gigabytes(usable)} to use: {how}{chunks}"
    )


def _load_whole(executor: Any, *arguments: Any, **named: Any) -> Any:
    """Before sampling, all weights to the device, however the host would have split them."""
    comfy.model_management.load_models_gpu([executor.class_obj.model_patcher], force_full_load=True)
    return executor(*arguments, **named)
