"""Training a LoRA: a folder of clips to a dataset, and a dataset to a LoRA."""

from pathlib import Path
from typing import Any

from comfy_api.latest import io
from safetensors.torch import load_file

from mochi_core.errors import TrainingError
from mochi_core.memory.plan import MemoryPolicy
from mochi_core.sampling.guidance import RELEASED_SCALE
from mochi_core.sampling.schedule import RELEASED_STEPS
from mochi_core.shapes import VideoSize
from mochi_core.training.config import BASES, Data, Memory, ModelFiles, Samples, TrainingConfig
from mochi_core.training.dataset import Dataset
from mochi_core.training.loop import Step
from mochi_core.training.lora import LoraOptions, Rank
from mochi_core.training.optimizer import OptimizerOptions
from mochi_core.training.prepare import PrepareModels, PrepareOptions, prepare
from mochi_core.training.trainer import train
from mochi_core.weights.build import TINY_NAME

from . import _checks, _host, _training, native_files
from ._training import EXAMPLE
from .loading import (
    AUTO,
    DIT_FOLDERS,
    T5_FOLDERS,
    VAE_FOLDERS,
    dit_file,
    t5_files,
    tokenizer_input,
    tokenizer_options,
    vae_file,
)
from .native_events import send_training
from .size import LARGEST, LONGEST

CATEGORY = "Mochi Video/training"
# Under these names the page finds what the nodes report.
REPORT, TRAINING = "text", "mochi_video_training"
NONE = native_files.NO_LORA
# What a page can say exactly.
LARGEST_SEED = 2**53 - 1
# For a budget, and for the loss: what no machine has, and no training needs.
MOST_GIGABYTES, MOST_STEPS = 1024.0, 1_000_000


def _budget_input() -> io.Float.Input:
    return _host.advanced(
        io.Float.Input(
            "budget_gb",
            default=0.0,
            min=0.0,
            max=MOST_GIGABYTES,
            step=0.5,
            optional=True,
            tooltip="Gigabytes of device memory to plan with. 0: what is free. A CPU is not planned for.",
        )
    )


def _missing_files(**names: tuple[str | None, tuple[str, ...]]) -> str:
    """What is wrong with each of several choices of a file, all of it: they are got in one go."""
    said = (native_files.no_such_file(name, value, folders) for name, (value, folders) in names.items())
    return " ".join(filter(None, said))


def _source(folder: str) -> Path:
    """As `_training.source_folder`."""
    return _training.source_folder(folder, _host.input_folder())


class MochiVideoPrepareDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoPrepareDataset",
            display_name="Mochi Video Prepare Dataset",
            category=CATEGORY,
            description="Encodes a folder of clips and captions for training. What was done before is not done again.",
            search_aliases=["dataset", "training data", "captions", "encode clips", "finetune"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[EXAMPLE, *_training.clip_folders(_host.input_folder())],
                    tooltip="A folder of ComfyUI's input folder with videos, each with its caption beside it: name.mp4 "
                    f"and name.txt. {EXAMPLE} comes with this pack.",
                ),
                io.String.Input(
                    "name",
                    default="my-dataset",
                    tooltip=f"What to call the dataset. It goes to {_training.DATASETS} in the output folder.",
                ),
                io.Int.Input("width", default=848, min=16, max=LARGEST, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input("height", default=480, min=16, max=LARGEST, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input(
                    "frames",
                    default=37,
                    min=1,
                    max=LONGEST,
                    step=6,
                    tooltip="1, 7, 13, ...: how much of each clip is learnt, at 30 frames a second. Memory and time "
                    "of the training grow with it.",
                ),
                io.Combo.Input(
                    "vae_name",
                    options=native_files.model_names(VAE_FOLDERS),
                    tooltip=f"A Mochi VAE with its encoder. {TINY_NAME} comes with this pack.",
                ),
                io.Combo.Input(
                    "t5_name",
                    options=native_files.model_names(T5_FOLDERS),
                    tooltip=f"The T5 that reads the captions. {TINY_NAME} comes with this pack.",
                ),
                tokenizer_input(),
                _host.advanced(
                    io.Int.Input(
                        "clips_per_video",
                        default=1,
                        min=1,
                        max=1000,
                        optional=True,
                        tooltip="How many clips a long video may give, one after another, all with its caption.",
                    )
                ),
                _budget_input(),
            ],
            outputs=[
                io.String.Output(display_name="dataset", tooltip="For Mochi Video Train LoRA."),
                io.String.Output(display_name="report", tooltip="What became of each clip, and what was skipped."),
            ],
            is_output_node=True,
            # Newer hosts tell the page of the report again when nothing had to run.
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        folder: str | None = None,
        name: str | None = None,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        vae_name: str | None = None,
        t5_name: str | None = None,
        tokenizer: str | None = AUTO,
        clips_per_video: int | None = None,
        budget_gb: float | None = None,
    ) -> bool | str:
        numbers = {"width": width, "height": height, "frames": frames, "clips_per_video": clips_per_video}
        return (
            _missing_files(t5_name=(t5_name, T5_FOLDERS), vae_name=(vae_name, VAE_FOLDERS))
            or _checks.not_among(tokenizer=(tokenizer, tokenizer_options()))
            or _checks.refused_by(_source, folder)
            or _checks.refused_by(_training.check_name, name)
            or _checks.refused_by(VideoSize, width, height, frames)
            or _checks.out_of_range(cls, **numbers, budget_gb=budget_gb)
            or True
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        folder: str | None = None,
        vae_name: str | None = None,
        t5_name: str | None = None,
        tokenizer: str | None = AUTO,
        **_: object,
    ) -> str:
        clips = ""
        if folder is not None and not _checks.refused_by(_source, folder):
            clips = _training.listing(_source(folder))
        t5 = native_files.stamp((t5_name, tokenizer), T5_FOLDERS)
        return " ".join((clips, t5, native_files.stamp((vae_name,), VAE_FOLDERS)))

    @classmethod
    def execute(
        cls,
        folder: str,
        name: str,
        width: int,
        height: int,
        frames: int,
        vae_name: str,
        t5_name: str,
        tokenizer: str = AUTO,
        clips_per_video: int = 1,
        budget_gb: float = 0.0,
    ) -> io.NodeOutput:
        files = {"vae_name": vae_name, "t5_name": t5_name, "tokenizer": tokenizer}
        given = {"width": width, "height": height, "frames": frames, "clips_per_video": clips_per_video}
        _checks.at_run(cls, folder=folder, name=name, **files, **given, budget_gb=budget_gb)
        device = _host.sampling_device()
        t5, tokens = t5_files(t5_name, tokenizer)
        models = PrepareModels(
            Path(vae_file(vae_name)),
            Path(t5),
            Path(tokens),
            MemoryPolicy(device, budget_gb * 1e9 or None),
            _host.training_dtype(device),
        )
        options = PrepareOptions((VideoSize(width, height, frames),), clips_per_video)
        target = _host.output_folder() / _training.DATASETS / name
        with _host.whole_device(device):
            report = prepare(_source(folder), target, options, models, _host.progress())
        _host.log.info("%s", report)
        return io.NodeOutput(name, str(report), ui={REPORT: [str(report)]})


def _check_samples(sample_every: int, sample_prompts: str, vae_name: str, t5_name: str) -> None:
    """Raises `TrainingError` when samples are asked for without what they need."""
    lacking = [name for name, value in (("vae_name", vae_name), ("t5_name", t5_name)) if value == NONE]
    lacking += [] if _prompts(sample_prompts) else ["sample_prompts"]
    if sample_every and lacking:
        raise TrainingError(
            f"sample_every is {sample_every} without {', '.join(lacking)}",
            "samples need a VAE, a T5 and a prompt",
            "Set them, or set sample_every to 0",
        )


def _prompts(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _open_dataset(dataset: str) -> Dataset:
    """Raises `TrainingError` or `DatasetError` when there is none of this name."""
    return Dataset.open(_training.dataset_folder(dataset, _host.output_folder()))


def _check_free(name: str) -> None:
    _training.check_installed()
    _training.check_name(name)
    _training.check_free(name, _host.output_folder())


class MochiVideoTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoTrainLora",
            display_name="Mochi Video Train LoRA",
            category=CATEGORY,
            description="Trains a LoRA on a prepared dataset and shows how it goes. What was stopped goes on when run "
            "again with the same name and settings.",
            search_aliases=["train lora", "finetune", "fine-tuning", "trainer"],
            inputs=[
                io.String.Input(
                    "dataset",
                    default="my-dataset",
                    tooltip="From Mochi Video Prepare Dataset, or the name that was given there.",
                ),
                io.Combo.Input(
                    "dit_name",
                    options=native_files.model_names(DIT_FOLDERS),
                    tooltip=f"The Mochi DiT to train beside. {TINY_NAME} comes with this pack.",
                ),
                io.String.Input(
                    "name",
                    default="my-lora",
                    tooltip=f"What to call the LoRA. It goes to {_training.LORAS} in the output folder, which the "
                    f"loaders list; all else of the training to {_training.TRAININGS}.",
                ),
                io.Int.Input("steps", default=1000, min=1, max=MOST_STEPS, tooltip="How many steps to train for."),
                io.Int.Input(
                    "rank", default=16, min=1, max=1024, tooltip="How much the LoRA can hold, and how large it is."
                ),
                io.Float.Input(
                    "learning_rate",
                    default=2e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="The highest rate: after the warm-up it falls along a cosine to zero.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=1024, tooltip="How many clips at once. Memory grows with it."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    # A training that goes on has the seed that it began with.
                    control_after_generate=False,
                    tooltip="The same seed, dataset and settings train the same LoRA.",
                ),
                *_advanced_inputs(),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output(
                    display_name="lora", tooltip="The trained LoRA, for the host's Load LoRA Model."
                ),
                io.String.Output(
                    display_name="path", tooltip="Its file, which Mochi Video LoRA Loader lists after a reload."
                ),
            ],
            is_output_node=True,
            # Newer hosts tell the page how the training went again when nothing had to run.
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        dataset: str | None = None,
        dit_name: str | None = None,
        name: str | None = None,
        steps: int | None = None,
        rank: int | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        alpha: float | None = 0.0,
        accumulation: int | None = 1,
        caption_dropout: float | None = 0.1,
        warmup: int | None = 100,
        base: str | None = BASES[0],
        save_every: int | None = 200,
        sample_every: int | None = 0,
        sample_prompts: str | None = "",
        vae_name: str | None = NONE,
        t5_name: str | None = NONE,
        tokenizer: str | None = AUTO,
        sample_steps: int | None = RELEASED_STEPS,
        cfg: float | None = RELEASED_SCALE,
        budget_gb: float | None = 0.0,
    ) -> bool | str:
        numbers = {"steps": steps, "rank": rank, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
        numbers |= {"alpha": alpha, "accumulation": accumulation, "caption_dropout": caption_dropout, "warmup": warmup}
        numbers |= {"save_every": save_every, "sample_every": sample_every, "sample_steps": sample_steps, "cfg": cfg}
        files = {
            "t5_name": (None if t5_name == NONE else t5_name, T5_FOLDERS),
            "dit_name": (dit_name, DIT_FOLDERS),
            "vae_name": (None if vae_name == NONE else vae_name, VAE_FOLDERS),
        }
        return (
            _missing_files(**files)
            or _checks.not_among(tokenizer=(tokenizer, tokenizer_options()), base=(base, BASES))
            or _checks.refused_by(_open_dataset, dataset)
            or _checks.refused_by(_check_free, name)
            or _checks.out_of_range(cls, **numbers, budget_gb=budget_gb)
            or _checks.refused_by(_check_samples, sample_every, sample_prompts, vae_name, t5_name)
            or True
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        dataset: str | None = None,
        dit_name: str | None = None,
        vae_name: str | None = None,
        t5_name: str | None = None,
        tokenizer: str | None = AUTO,
        **_: object,
    ) -> str:
        files = [
            native_files.stamp((dit_name,), DIT_FOLDERS),
            native_files.stamp((vae_name,), VAE_FOLDERS),
            native_files.stamp((t5_name, tokenizer), T5_FOLDERS),
        ]
        if dataset and not _checks.refused_by(_training.dataset_folder, dataset, _host.output_folder()):
            files.append(_training.listing(_training.dataset_folder(dataset, _host.output_folder())))
        return " ".join(files)

    @classmethod
    def execute(
        cls,
        dataset: str,
        dit_name: str,
        name: str,
        steps: int,
        rank: int,
        learning_rate: float,
        batch_size: int,
        seed: int,
        alpha: float = 0.0,
        accumulation: int = 1,
        caption_dropout: float = 0.1,
        warmup: int = 100,
        base: str = BASES[0],
        save_every: int = 200,
        sample_every: int = 0,
        sample_prompts: str = "",
        vae_name: str = NONE,
        t5_name: str = NONE,
        tokenizer: str = AUTO,
        sample_steps: int = RELEASED_STEPS,
        cfg: float = RELEASED_SCALE,
        budget_gb: float = 0.0,
    ) -> io.NodeOutput:
        given: dict[str, Any] = {"steps": steps, "rank": rank, "learning_rate": learning_rate, "batch_size": batch_size}
        given |= {"seed": seed, "alpha": alpha, "accumulation": accumulation, "caption_dropout": caption_dropout}
        given |= {"warmup": warmup, "base": base, "save_every": save_every, "sample_every": sample_every}
        given |= {"sample_prompts": sample_prompts, "vae_name": vae_name, "t5_name": t5_name, "tokenizer": tokenizer}
        given |= {"sample_steps": sample_steps, "cfg": cfg, "budget_gb": budget_gb}
        _checks.at_run(cls, dataset=dataset, dit_name=dit_name, name=name, **given)
        output, device = _host.output_folder(), _host.sampling_device()
        opened = _open_dataset(dataset)
        size = opened.clips[0].size
        files: dict[str, Any] = {"dit": dit_file(dit_name)}
        if sample_every:
            t5, tokens = t5_files(t5_name, tokenizer)
            files |= {"vae": vae_file(vae_name), "t5": str(t5), "tokenizer": str(tokens)}
        trained = Rank(rank, alpha or None)
        samples = Samples(
            every=sample_every,
            prompts=_prompts(sample_prompts),
            width=size.width,
            height=size.height,
            frames=size.frames,
            steps=sample_steps,
            cfg=cfg,
        )
        config = TrainingConfig(
            dataset=str(opened.folder),
            output=str(output / _training.TRAININGS / name),
            steps=steps,
            seed=seed,
            accumulation=accumulation,
            save_every=save_every,
            device=str(device),
            model=ModelFiles(**files, base=base, dtype="fp32" if device.type == "cpu" else "bf16"),
            data=Data(batch_size, caption_dropout),
            lora=LoraOptions(qkv=trained, out=trained),
            optimizer=OptimizerOptions(rate=learning_rate, warmup=warmup),
            memory=Memory(budget=budget_gb or None),
            samples=samples,
        )
        with _host.whole_device(device):
            final, told = _trained(config, name)
        return io.NodeOutput(load_file(final), str(final), ui={TRAINING: [told]})


def _trained(config: TrainingConfig, name: str) -> tuple[Path, dict[str, Any]]:
    """Trains, telling the page; the LoRA where the host lists it, and what the page was told last."""
    output = _host.output_folder()
    told = _training.Reports(Path(config.output), output, config.steps, send_training)
    moved = _host.progress()

    def watch(done: Step) -> None:
        told(done)
        # Raises when the user has interrupted: the step is done, and the loop keeps it.
        moved(done.step, done.steps)

    try:
        # A sample may take as long as many steps.
        written = train(config, watch, lambda step, total, preview=None: _host.interruptible())
        final = _training.published(written, _training.lora_file(name, output))
    except BaseException as error:
        told.end("stopped" if isinstance(error, _host.interruptions()) else "failed")
        if not isinstance(error, TrainingError):
            raise
        # The library says it of folders.
        remedy = error.remedy.replace("another folder", "another name")
        raise TrainingError(error.value, error.rule, remedy) from error
    return final, told.end("finished", f"{_training.LORAS}/{final.name}")


def _advanced_inputs() -> list[Any]:
    inputs = [
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=1.0,
            tooltip="Over the rank, the strength at which the LoRA is trained. 0: as the rank.",
        ),
        io.Int.Input(
            "accumulation",
            default=1,
            min=1,
            max=1024,
            tooltip="How many batches make a step: as a larger batch, in the memory of one.",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="The part of the clips that are shown without their caption, which keeps guidance working.",
        ),
        io.Int.Input(
            "warmup", default=100, min=0, max=MOST_STEPS, tooltip="Steps over which the rate rises to its highest."
        ),
        io.Combo.Input(
            "base",
            options=list(BASES),
            default=BASES[0],
            tooltip="How the model's own weights are held: as in the file, or in fewer bits to save memory.",
        ),
        io.Int.Input(
            "save_every",
            default=200,
            min=0,
            max=MOST_STEPS,
            tooltip="Steps from one snapshot to the next. 0: at the end, or when it is stopped.",
        ),
        io.Int.Input(
            "sample_every",
            default=0,
            min=0,
            max=MOST_STEPS,
            tooltip="Steps from one sample to the next. 0: never.",
        ),
        io.String.Input(
            "sample_prompts",
            multiline=True,
            default="",
            tooltip="One prompt on each line: a sample shows their videos side by side.",
        ),
        io.Combo.Input(
            "vae_name",
            options=[NONE, *native_files.model_names(VAE_FOLDERS)],
            default=NONE,
            tooltip="The VAE for samples.",
        ),
        io.Combo.Input(
            "t5_name",
            options=[NONE, *native_files.model_names(T5_FOLDERS)],
            default=NONE,
            tooltip="The T5 for samples.",
        ),
        tokenizer_input(),
        io.Int.Input("sample_steps", default=RELEASED_STEPS, min=1, max=1000, tooltip="Steps that a sample takes."),
        io.Float.Input(
            "cfg",
            default=RELEASED_SCALE,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="How far samples follow their prompt.",
        ),
        _budget_input(),
    ]
    for one in inputs:
        one.optional = True
    return [_host.advanced(one) for one in inputs]
