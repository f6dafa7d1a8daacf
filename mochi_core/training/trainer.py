"""A training from its configuration: what it needs is checked, loaded and put in its place, then the loop runs.

train(read_config("lora.yaml")[0])
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..attention.joint import PlainJointAttention
from ..dit import AsymmDiT
from ..errors import TrainingError
from ..latents import LatentStatistics
from ..memory.blocks import streamed
from ..memory.plan import MemoryPolicy, waiting_place
from ..memory.training_plan import plan_training
from ..memory.waiting import Source
from ..progress import Progress, silent
from ..weights import build
from ..weights.files import Unchanged, opened
from ..weights.identity import identity
from ..weights.quantized import quantize_linears
from .captions import reading
from .checkpointing import Checkpoints, checkpointed
from .config import TINY, TrainingConfig
from .dataset import Dataset
from .lock import locked
from .loop import Watch, run, unseen
from .lora import GROUPS, TrainableLora
from .optimizer import check_installed
from .samples import Prompts, Strips
from .task import Batches, DiTTask

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("cuda", "xpu", "mps")


@dataclass(frozen=True)
class SampleFiles:
    """What samples need beside the DiT."""

    vae: Path
    t5: Path
    tokenizer: Path

    @classmethod
    def of(cls, config: TrainingConfig) -> "SampleFiles | None":
        """None where no sample is asked for. Raises `TrainingError` when one is, and a file is not given."""
        model = config.model
        if not config.samples.every:
            return None
        if model.dit == TINY:
            return cls(build.TINY_VAE, build.TINY_T5, build.TINY_TOKENIZER)
        given = {"vae": model.vae, "t5": model.t5, "tokenizer": model.tokenizer}
        paths = {name: Path(path) for name, path in given.items() if path is not None}
        lacking = [f"model.{name}" for name in given if name not in paths]
        if lacking:
            raise TrainingError(
                f"Samples are asked for without {', '.join(lacking)}",
                "they need the VAE, the T5 and its tokenizer",
                "Give the files, or set samples.every to 0",
            )
        return cls(**paths)


def train(config: TrainingConfig, watch: Watch = unseen, sampling: Progress = silent) -> Path:
    """Trains as `config` says, from where its output folder stands; returns the final LoRA or model file.

    `sampling` is told how each video of a sample goes. All that can be known from headers is checked before anything
    large is read. The rest as `loop.run`.

    Raises `MochiError` kinds, and `OSError` as writing does.
    """
    # One of several processes writes, and they have their number before anything is loaded.
    leads = os.environ.get("RANK", "0") == "0"
    try:
        with locked(Path(config.output), TrainingError) if leads else nullcontext(), prepared(config, sampling) as task:
            return run(task, config.loop, config.output, watch)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"The device has no more memory ({str(error).splitlines()[0]})",
            "a training must fit, beside all else that is there",
            "Set memory.budget to fewer gigabytes, or model.base to q8_0, or prepare smaller clips",
        ) from error


@contextmanager
def prepared(config: TrainingConfig, sampling: Progress = silent) -> Iterator[DiTTask]:
    """The task of a configuration, its network where it trains, as long as the block runs."""
    dit, files = build.TINY_DIT if config.model.dit == TINY else Path(config.model.dit), SampleFiles.of(config)
    dataset = Dataset.open(config.dataset)
    file = build.open_dit(dit)
    dataset.check(file.config.latent_channels, file.config.text_feature_dim, file.statistics)
    check_installed(config.optimizer)
    metadata = {"modelspec.architecture": "mochi-1"}
    device = training_device(config.device)
    # The T5 is not needed afterwards.
    prompts = None if files is None else _prompts(config, files, device)
    # What host or caller runs in inference mode makes tensors that nothing can be learnt with.
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        network, statistics = _network(config, dit)
        lora = TrainableLora(network, config.lora, config.seed, device) if config.kind == "lora" else None
        batches = Batches(dataset, statistics, config.data, config.seed)
        how = _placement(config, network, batches, device)
        if lora is None:
            network.to(device).requires_grad_(True)
        else:
            check = Unchanged(dit) if config.model.base == "keep" else None
            blocks: Any = network.blocks
            stack.enter_context(
                streamed(network, blocks, device, resident=how.resident, source=how.source, check=check)
            )
            stack.enter_context(lora.attached(network))
        resident = how.resident if how.streams else None
        run_block = stack.enter_context(checkpointed(network, how.checkpoints, resident=resident))
        if config.model.compile:
            _compile(network, how)
        task = DiTTask(network, lora, batches, device, run_block)
        task.fingerprint = {**config.fingerprint, "dataset": dataset.digest, "dit": identity(dit)}
        task.metadata = metadata if lora is not None else _model_metadata(dit)
        if files is not None and prompts is not None:
            decoder = build.load_decoder(files.vae)
            task.samples = Strips(config.samples, prompts, decoder, MemoryPolicy(device), sampling)
        yield task


def training_device(name: str) -> torch.device:
    """The device called so; for `auto` this process's GPU, or the CPU where there is none.

    Raises `TrainingError` when it is not here.
    """
    from accelerate import PartialState  # slow to import

    if name == "auto":
        here = any(getattr(torch, kind).is_available() for kind in DEVICES if hasattr(torch, kind))
        return (PartialState().device if here else None) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"device is {name!r}", f"it must be here ({error})", "Use auto") from error


def _prompts(config: TrainingConfig, files: SampleFiles, device: torch.device) -> Prompts:
    """The samples' prompts through the T5."""
    with reading(files.t5, files.tokenizer, MemoryPolicy(device, _budget(config))) as encoder:
        return Prompts.encoded(config.samples, encoder)


def _budget(config: TrainingConfig) -> float | None:
    """In bytes; None for what is free."""
    return None if config.memory.budget is None else config.memory.budget * 1e9


def _network(config: TrainingConfig, path: Path) -> tuple[AsymmDiT, LatentStatistics]:
    network, statistics = build.load_dit(path, dtype=DTYPES[config.model.dtype])
    if config.model.base != "keep":
        quantize_linears(network.blocks, config.model.base)
    blocks: Any = network.blocks
    for block in blocks:
        block.attn.joint = PlainJointAttention(config.model.attention)
    return network.requires_grad_(False), statistics


@dataclass(frozen=True)
class Placement:
    """How many blocks' weights stay on the device, where the others wait, and what is computed again."""

    blocks: int
    resident: int
    source: Source
    checkpoints: Checkpoints

    @property
    def streams(self) -> bool:
        return self.resident < self.blocks


def _placement(config: TrainingConfig, network: AsymmDiT, batches: Batches, device: torch.device) -> Placement:
    """As the configuration says, or as fits its budget."""
    memory, depth = config.memory, len(network.blocks)
    if memory.by_hand or device.type == "cpu" or config.kind == "full":
        resident = depth if memory.resident_blocks is None or device.type == "cpu" else memory.resident_blocks
        counts = (memory.qkv or 0, memory.feed_forward or 0, memory.post_attention or 0, memory.blocks or 0)
        source, _ = waiting_place(network.blocks, resident, device)  # pyright: ignore[reportArgumentType]
        return Placement(depth, min(resident, depth), source, Checkpoints(*counts))
    size = max((clip.size for clip in batches.order.clips), key=lambda size: size.width * size.height * size.frames)
    ranks = {group: getattr(config.lora, group).rank for group in GROUPS}
    budget = MemoryPolicy(device, _budget(config)).budget_now
    plan = plan_training(
        budget, size, network, device, batch=config.data.batch_size, ranks=ranks, averaged=bool(config.ema)
    )
    log.info("%s", plan)
    return Placement(depth, plan.resident, plan.source, plan.checkpoints)


def _compile(network: AsymmDiT, placement: Placement) -> None:
    if placement.streams:
        raise TrainingError(
            f"model.compile with {placement.blocks - placement.resident} streamed blocks",
            "compiled blocks must keep their weights in one place",
            "Set model.compile to false, or allow more memory",
        )
    for block in network.blocks:
        block.compile()


def _model_metadata(path: Path) -> dict[str, str]:
    """What a trained model's file says of itself: what the file it was made from does."""
    return dict(opened(path).metadata)
