"""The three loaders: T5, DiT and VAE, each from a file or from the embedded checkpoint."""

from pathlib import Path

from comfy_api.latest import io

from mochi_core.weights.build import TINY_DIT, TINY_NAME, TINY_T5, TINY_TOKENIZER, TINY_VAE

from . import _checks, _host, native_files
from .native_clip import HOST_TOKENIZER, load_clip, tokenizer_beside
from .native_dit import MEMORY, load_model
from .native_vae import load_native_vae

# An all-in-one checkpoint serves each loader.
T5_FOLDERS = ("text_encoders", "checkpoints")
DIT_FOLDERS = ("diffusion_models", "checkpoints")
VAE_FOLDERS = ("vae", "checkpoints")
AUTO = "auto"
ATTENTION = ("auto", "sdpa", "flash", "sage", "reference")
CATEGORY = "Mochi Video/loaders"


def _dtype_input(tooltip: str) -> io.Combo.Input:
    return _host.advanced(io.Combo.Input("dtype", options=list(_host.DTYPES), default="auto", tooltip=tooltip))


def tokenizer_options() -> list[str]:
    """What a T5 may be used with."""
    return [AUTO, TINY_NAME, *native_files.tokenizer_names(T5_FOLDERS)]


def tokenizer_input() -> io.Combo.Input:
    return _host.advanced(
        io.Combo.Input(
            "tokenizer",
            options=tokenizer_options(),
            default=AUTO,
            optional=True,
            tooltip="auto: the one in the T5's folder, else the host's own T5 tokenizer. Or a "
            "tokenizer.json or spiece.model from models/text_encoders.",
        )
    )


def t5_files(t5_name: str, tokenizer: str) -> tuple[str, str | Path]:
    """Where the T5 of this name and the tokenizer that is meant with it lie."""
    is_tiny = t5_name == TINY_NAME
    path = str(TINY_T5) if is_tiny else native_files.model_path(t5_name, T5_FOLDERS)
    if tokenizer == TINY_NAME or (is_tiny and tokenizer == AUTO):
        return path, TINY_TOKENIZER
    if tokenizer == AUTO:
        return path, tokenizer_beside(path) or HOST_TOKENIZER
    return path, native_files.model_path(tokenizer, T5_FOLDERS)


def dit_file(dit_name: str) -> str:
    return str(TINY_DIT) if dit_name == TINY_NAME else native_files.model_path(dit_name, DIT_FOLDERS)


def vae_file(vae_name: str) -> str:
    return str(TINY_VAE) if vae_name == TINY_NAME else native_files.model_path(vae_name, VAE_FOLDERS)


class MochiVideoT5Loader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoT5Loader",
            display_name="Mochi Video T5 Loader",
            category=CATEGORY,
            description="Loads the text encoder that turns a prompt into what Mochi reads.",
            search_aliases=["clip loader", "text encoder", "load t5"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=native_files.model_names(T5_FOLDERS),
                    tooltip="A T5 v1.1 XXL encoder from models/text_encoders: safetensors, GGUF, a folder, or a "
                    f"checkpoint that has one. {TINY_NAME} comes with this pack.",
                ),
                _dtype_input("Keep the file's precision (auto), or convert it while loading."),
                tokenizer_input(),
            ],
            outputs=[io.Clip.Output(tooltip="For Mochi Video Text Encode, or the host's own CLIP Text Encode.")],
        )

    @classmethod
    def validate_inputs(
        cls, t5_name: str | None = None, dtype: str | None = None, tokenizer: str | None = AUTO
    ) -> bool | str:
        return (
            native_files.no_such_file("t5_name", t5_name, T5_FOLDERS)
            or _checks.not_among(dtype=(dtype, _host.DTYPES), tokenizer=(tokenizer, tokenizer_options()))
            or True
        )

    @classmethod
    def fingerprint_inputs(cls, t5_name: str | None = None, tokenizer: str | None = AUTO, **_: object) -> str:
        return native_files.stamp((t5_name, tokenizer), T5_FOLDERS)

    @classmethod
    def execute(cls, t5_name: str, dtype: str, tokenizer: str = AUTO) -> io.NodeOutput:
        _checks.at_run(cls, t5_name=t5_name, dtype=dtype, tokenizer=tokenizer)
        path, tokens = t5_files(t5_name, tokenizer)
        return io.NodeOutput(load_clip(path, tokens, _host.DTYPES[dtype]))


class MochiVideoDiTLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoDiTLoader",
            display_name="Mochi Video DiT Loader",
            category=CATEGORY,
            description="Loads the diffusion transformer that makes the video's latents.",
            search_aliases=["unet loader", "load diffusion model", "load checkpoint", "mochi model loader"],
            inputs=[
                io.Combo.Input(
                    "dit_name",
                    options=native_files.model_names(DIT_FOLDERS),
                    tooltip="A Mochi DiT from models/diffusion_models or an all-in-one from models/checkpoints: "
                    f"safetensors, GGUF or a diffusers folder. {TINY_NAME} comes with this pack.",
                ),
                _dtype_input("Keep the file's precision (auto), or convert it while loading."),
                _host.advanced(
                    io.Combo.Input(
                        "attention",
                        options=list(ATTENTION),
                        default="auto",
                        tooltip="auto: the fastest exact kernel that checks itself on this device.",
                    )
                ),
                _host.advanced(
                    io.Combo.Input(
                        "memory",
                        options=list(MEMORY),
                        default="auto",
                        tooltip="auto: the host decides. resident: the whole model in VRAM. "
                        "streamed: as little VRAM as possible, slower.",
                    )
                ),
            ],
            outputs=[io.Model.Output(tooltip="For Mochi Video Sampler or Guider, or the host's own samplers.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        dit_name: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        memory: str | None = None,
    ) -> bool | str:
        choices = {"dtype": (dtype, _host.DTYPES), "attention": (attention, ATTENTION), "memory": (memory, MEMORY)}
        return native_files.no_such_file("dit_name", dit_name, DIT_FOLDERS) or _checks.not_among(**choices) or True

    @classmethod
    def fingerprint_inputs(cls, dit_name: str | None = None, **_: object) -> str:
        return native_files.stamp((dit_name,), DIT_FOLDERS)

    @classmethod
    def execute(cls, dit_name: str, dtype: str, attention: str, memory: str) -> io.NodeOutput:
        _checks.at_run(cls, dit_name=dit_name, dtype=dtype, attention=attention, memory=memory)
        return io.NodeOutput(load_model(dit_file(dit_name), _host.DTYPES[dtype], attention, memory))


class MochiVideoVAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoVAELoader",
            display_name="Mochi Video VAE Loader",
            category=CATEGORY,
            description="Loads the VAE that turns latents into frames, and frames into latents.",
            search_aliases=["load vae", "mochi vae loader"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=native_files.model_names(VAE_FOLDERS),
                    tooltip="A Mochi VAE from models/vae: decoder, encoder or both, or a checkpoint that has it. "
                    f"{TINY_NAME} comes with this pack.",
                ),
                _dtype_input("The precision to compute in. auto: what the host prefers on this device."),
            ],
            outputs=[io.Vae.Output(tooltip="For Mochi Video Decode or Encode, or the host's own VAE nodes.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None = None, dtype: str | None = None) -> bool | str:
        return (
            native_files.no_such_file("vae_name", vae_name, VAE_FOLDERS)
            or _checks.not_among(dtype=(dtype, _host.DTYPES))
            or True
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None = None, **_: object) -> str:
        return native_files.stamp((vae_name,), VAE_FOLDERS)

    @classmethod
    def execute(cls, vae_name: str, dtype: str) -> io.NodeOutput:
        _checks.at_run(cls, vae_name=vae_name, dtype=dtype)
        return io.NodeOutput(load_native_vae(vae_file(vae_name), _host.DTYPES[dtype]))
