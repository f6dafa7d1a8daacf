"""The nodes, one family a file. They are thin: the model is `mochi_core`, the host is behind `_host` and `native_*`."""

from comfy_api.latest import ComfyExtension, io

from ._replacements import register
from .conditioning import MochiVideoTextEncode
from .decoding import MochiVideoDecode, MochiVideoEncode
from .loading import MochiVideoDiTLoader, MochiVideoT5Loader, MochiVideoVAELoader
from .lora import MochiVideoLoraLoader, MochiVideoLoraStack
from .native_events import send_warnings, server
from .prompts import MochiVideoPrompts
from .routes import add_routes
from .sampling import MochiVideoGuider, MochiVideoSampler
from .schedule import MochiVideoSigmas
from .size import MochiVideoSize
from .training import MochiVideoPrepareDataset, MochiVideoTrainLora

NODES: list[type[io.ComfyNode]] = [
    MochiVideoT5Loader,
    MochiVideoDiTLoader,
    MochiVideoVAELoader,
    MochiVideoLoraLoader,
    MochiVideoLoraStack,
    MochiVideoTextEncode,
    MochiVideoPrompts,
    MochiVideoSize,
    MochiVideoSigmas,
    MochiVideoGuider,
    MochiVideoSampler,
    MochiVideoDecode,
    MochiVideoEncode,
    MochiVideoPrepareDataset,
    MochiVideoTrainLora,
]


class MochiVideoExtension(ComfyExtension):
    async def on_load(self) -> None:
        await register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> MochiVideoExtension:
    """What ComfyUI asks for the nodes."""
    send_warnings()
    host_server = server()
    if host_server is not None:
        add_routes(host_server.routes)
    return MochiVideoExtension()
