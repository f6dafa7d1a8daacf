"""What a video of some size will cost on this machine, before anything runs: what the page shows under a size."""

from dataclasses import dataclass, replace

import torch

from mochi_core.config import TINY
from mochi_core.dit.flops import visual_tokens
from mochi_core.errors import MemoryBudgetError
from mochi_core.memory.plan import Networks, Plan, plan
from mochi_core.shapes import VideoSize
from mochi_core.text.t5 import empty_t5
from mochi_core.vae import Decoder
from mochi_core.weights.build import dit_outline

from ._runs import RUNS

FITS, STREAMS, TOO_LARGE = "fits", "streams", "too_large"


@dataclass(frozen=True)
class Cost:
    """`verdict` is one of FITS, STREAMS and TOO_LARGE. Bytes are of the device, at the worst moment.

    `blocks` and `resident` say how many of the transformer's blocks there are and stay on the device. `seconds_a_step`
    goes by this session's last run, and is None before it. `least_bytes` is the least that would do.
    """

    tokens: int
    verdict: str
    device: str
    available_bytes: int
    sampling_bytes: int | None = None
    decode_bytes: int | None = None
    least_bytes: int | None = None
    blocks: int | None = None
    resident: int | None = None
    seconds_a_step: float | None = None


def networks_of(path: str | None) -> Networks:
    """The networks that a DiT file goes with, without their weights; of None, the released ones in bfloat16.

    The text encoder counts as the small one: the host moves it out before sampling, and streams it where it must.
    Raises `MochiError` kinds on a file that is not a whole Mochi DiT.
    """
    released = Networks.released()
    text = empty_t5(TINY.text)
    if path is None:
        return replace(released, text=text)
    dit = dit_outline(path)
    if dit.config == TINY.dit:
        return Networks(text, dit, Decoder(TINY.vae, device="meta"))
    return Networks(text, dit, released.decoder)


def cost(
    networks: Networks, size: VideoSize, device: torch.device, available: int, *, batch: int = 1, memory: str = "auto"
) -> Cost:
    """What making `batch` videos of `size` asks of `device`, of which `available` bytes are to be had.

    `memory` is the DiT loader's: `streamed` keeps no block on the device, `resident` all of them.
    """
    config, latent = networks.dit.config, size.latent
    known = Cost(
        visual_tokens(config, latent),
        TOO_LARGE,
        device.type,
        available,
        seconds_a_step=RUNS.seconds_a_step(config, latent, batch),
    )
    try:
        found = _plan(networks, size, device, available, batch)
    except MemoryBudgetError as error:
        return replace(known, least_bytes=int(error.least or 0))
    dit = found.dit
    streams = dit.resident < dit.blocks or memory == "streamed"
    too_large = memory == "resident" and dit.resident < dit.blocks
    return replace(
        known,
        verdict=TOO_LARGE if too_large else STREAMS if streams else FITS,
        sampling_bytes=dit.peak,
        decode_bytes=found.decode.peak,
        blocks=dit.blocks,
        resident=0 if memory == "streamed" else dit.resident,
    )


def _plan(networks: Networks, size: VideoSize, device: torch.device, available: int, batch: int) -> Plan:
    """Both halves of guidance together, as the host runs them when all weights stay beside that; else one by one."""
    try:
        both = plan(available, size, networks, device, batch=2 * batch)
        if both.dit.resident == both.dit.blocks:
            return both
    except MemoryBudgetError:
        pass
    return plan(available, size, networks, device, batch=batch)
