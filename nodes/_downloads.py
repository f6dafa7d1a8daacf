"""Where well-known files can be had, for what a node says when one is missing."""

_COMFY = "https://huggingface.co/Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"
_GENMO = "https://huggingface.co/genmo/mochi-1-preview/resolve/main"

# Public files by the name that the workflows have for them. A test holds them to the workflows' own.
DOWNLOADS = {
    "dit.safetensors": f"{_GENMO}/dit.safetensors",
    "decoder.safetensors": f"{_GENMO}/decoder.safetensors",
    "encoder.safetensors": f"{_GENMO}/encoder.safetensors",
    "fastmochi_dit.safetensors": "https://huggingface.co/FastVideo/FastMochi/resolve/main/dit.safetensors",
    "mochi_preview_bf16.safetensors": f"{_COMFY}/diffusion_models/mochi_preview_bf16.safetensors",
    "mochi_preview_fp8_scaled.safetensors": f"{_COMFY}/diffusion_models/mochi_preview_fp8_scaled.safetensors",
    "mochi_vae.safetensors": f"{_COMFY}/vae/mochi_vae.safetensors",
    "t5xxl_fp16.safetensors": f"{_COMFY}/text_encoders/t5xxl_fp16.safetensors",
    "t5xxl_fp8_e4m3fn_scaled.safetensors": f"{_COMFY}/text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors",
}
