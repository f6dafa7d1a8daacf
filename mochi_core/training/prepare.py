"""A folder of videos and captions to a dataset of latents and features, of which nothing is made twice.

report = prepare("clips", "dataset", PrepareOptions((VideoSize(848, 480, 37),)), PrepareModels(vae, t5, tokenizer))

Everything that can be known without a network is found out first. Then the encoder goes over the clips, and after it
the T5 over the captions; each clip is on disk, and in the manifest, as soon as it is done.
"""

import hashlib
import logging
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from ..errors import DatasetError
from ..latents import LatentStatistics, require_finite
from ..memory.borrowing import on_device
from ..memory.plan import MemoryPolicy, encode_plan
from ..progress import Progress, silent
from ..shapes import VideoSize
from ..text.conditioning import warn_of_cut
from ..text.tokenizer import read_tokenizer
from ..vae import Encoder
from ..vae.causal_conv import VALUES_AT_ONCE
from ..weights import build, layouts
from ..weights.checkpoint import Checkpoint
from ..weights.files import TYPE_NAMES, Unchanged
from ..weights.identity import digest_of, identity, sha256_of
from ..weights.writer import Output, write_safetensors
from .captions import reading
from .clips import choose_size, enlargement, left_out, read_pixels
from .dataset import CLIPS, FILE_NAME, MANIFEST, Entry, Manifest, read_tensors
from .lock import NAME as LOCK
from .lock import locked
from .sources import PROCESSING, ClipPlan, PrepareOptions, Source

log = logging.getLogger(__name__)

# More of the picture than this cropped away is worth a word.
MUCH_CROPPED = 0.4
SHOWN_REASONS = 3


@dataclass(frozen=True)
class PrepareModels:
    """The files that clips and captions are encoded with, where they run, and in which dtype (None: the files' own)."""

    vae: Path
    t5: Path
    tokenizer: Path
    memory: MemoryPolicy = MemoryPolicy("cpu")
    dtype: torch.dtype | None = None

    @classmethod
    def tiny(cls, memory: MemoryPolicy | None = None) -> "PrepareModels":
        """The embedded small checkpoint, in float32."""
        files = build.TINY_VAE, build.TINY_T5, build.TINY_TOKENIZER
        return cls(*files, memory or MemoryPolicy("cpu"), torch.float32)


@dataclass(frozen=True)
class Report:
    """What became of each clip; skipped ones and warnings are pairs of a name and why. Printable."""

    folder: Path
    prepared: tuple[str, ...]
    unchanged: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        counts = f"{len(self.prepared)} prepared, {len(self.unchanged)} unchanged, {len(self.skipped)} skipped"
        lines = [f"{self.folder}: {counts}"]
        for kind, pairs in (("skipped", self.skipped), ("warning", self.warnings)):
            lines += [f"  {kind}  {name}: {why}" for name, why in pairs]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Known:
    """What the models' files say without being loaded."""

    identities: dict[str, str]
    statistics: LatentStatistics
    text_width: int


@dataclass
class _Work:
    """What a run has found out and done so far; `put` makes a clip's state last."""

    target: Path
    manifest: Manifest
    progress: Progress
    total: int
    entries: dict[tuple[str, int], Entry] = field(default_factory=dict)
    made: set[tuple[str, int]] = field(default_factory=set)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    step: int = 0

    def write(self) -> None:
        replace(self.manifest, clips=tuple(self.entries[key] for key in sorted(self.entries))).write(self.target)

    def put(self, entry: Entry) -> None:
        key = entry.source, entry.start
        before = self.entries.get(key)
        self.entries[key] = entry
        self.made.add(key)
        self.write()
        if before is not None and before.file != entry.file:
            (self.target / CLIPS / before.file).unlink(missing_ok=True)

    def skip(self, name: str, why: Exception) -> None:
        self.skipped.append((name, str(why)))
        log.info("%s is skipped: %s", name, why)

    def done(self) -> None:
        self.step += 1
        self.still()

    def still(self, step: int = 0, total: int = 0, preview: torch.Tensor | None = None) -> None:
        """Nothing that counts, but a chance to cancel."""
        self.progress(self.step, self.total)


def prepare(
    source: str | Path,
    target: str | Path,
    options: PrepareOptions,
    models: PrepareModels,
    progress: Progress = silent,
) -> Report:
    """Encodes each video of `source` that has a caption beside it (`name.mp4`, `name.txt`) into the dataset `target`.

    What is there already and would become the same is left alone. A clip that cannot be used is skipped and reported.
    However a run ends, what it finished is kept.

    Raises `DatasetError` when there is nothing to prepare, or the folders cannot be used or are in use,
    `WeightsError` and `ConfigError` as loading does, `MemoryBudgetError`, `LatentsError` when a network makes what are
    no numbers, `OSError` as writing does, and what `progress` raises.
    """
    clips, target = Source.open(Path(source)), Path(target)
    _written_before(clips.folder, target)  # refuses before there is work
    known = _known(models)
    manifest = Manifest(_plain(options, models), known.identities, known.statistics, known.text_width, ())
    work = _Work(target, manifest, progress, 3 * len(clips.videos))
    plans = _plans(clips, options, models, known, work)
    if not plans:
        raise _nothing(clips, work)
    with locked(target, DatasetError):
        before = _written_before(clips.folder, target)
        for plan in plans:
            kept = _kept(before.get(plan.key), plan, target)
            if kept is not None:
                work.entries[plan.key] = kept
        to_encode = [plan for plan in plans if plan.key not in work.entries]
        to_read = [plan for plan in plans if plan.key not in work.entries or not work.entries[plan.key].features_of]
        work.total = work.step + len(to_encode) + len(to_read)
        work.write()  # from here on the folder is known to be ours
        _encode_videos(to_encode, options, models, work)
        _encode_captions([plan for plan in to_read if plan.key in work.entries], models, work)
        _remove_strays(target, {entry.file for entry in work.entries.values()})
    if not work.entries:
        raise _nothing(clips, work)
    return _report(plans, work)


# What there is


def _written_before(source: Path, target: Path) -> dict[tuple[str, int], Entry]:
    """What the target has from an earlier run. Raises `DatasetError` when it is a folder of something else."""
    if target.resolve() == source.resolve():
        raise DatasetError(f"{target} is the folder of the videos", "a dataset has its own", "Choose another folder")
    if (target.exists() and not target.is_dir()) or (target / CLIPS).is_symlink():
        raise DatasetError(f"{target} is no folder of its own", "a dataset is one", "Choose another folder")
    if (target / MANIFEST).exists():
        return {(entry.source, entry.start): entry for entry in Manifest.read(target).clips}
    if target.exists() and any(path.name != LOCK for path in target.iterdir()):
        raise DatasetError(
            f"{target} has files and is no dataset", "nothing is mixed with what is there", "Choose an empty folder"
        )
    return {}


def _known(models: PrepareModels) -> _Known:
    """Raises `DatasetError` or `WeightsError` when the files cannot be what is needed."""
    vae = Checkpoint(models.vae)
    if layouts.ENCODER.found_in(vae.names) is None:
        raise _no_encoder(models.vae)
    read_tokenizer(models.tokenizer)
    width = build.open_t5(models.t5).config.d_model
    identities = {name: identity(getattr(models, name)) for name in ("vae", "t5", "tokenizer")}
    return _Known(identities, LatentStatistics.from_metadata(vae.metadata), width)


def _no_encoder(vae: Path) -> DatasetError:
    return DatasetError(
        f"{vae} has no VAE encoder", "clips are encoded with one", "Choose a VAE file that has its encoder"
    )


def _plans(clips: Source, options: PrepareOptions, models: PrepareModels, known: _Known, work: _Work) -> list[ClipPlan]:
    """What the videos become, in order; those that cannot become anything are skipped."""
    plans: list[ClipPlan] = []
    for video in clips.videos:
        try:
            plans += clips.plans(video, options, known.identities, str(models.dtype))
        except (DatasetError, OSError) as error:
            work.skip(video.name, error)
        work.done()
    work.warnings += [(name, "No video has this name") for name in clips.lone_captions]
    return plans


def _kept(entry: Entry | None, plan: ClipPlan, target: Path) -> Entry | None:
    """What stays of an earlier run's clip: all of it, its latents alone, or nothing."""
    if entry is None or entry.latents_of != plan.latents_of:
        return None
    file = target / CLIPS / entry.file
    if not file.is_file() or sha256_of(file) != entry.file_hash:
        return None
    return entry if entry.features_of == plan.features_of else replace(entry, features_of="")


def _nothing(clips: Source, work: _Work) -> DatasetError:
    reasons = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in work.skipped[:SHOWN_REASONS])
    if len(work.skipped) > SHOWN_REASONS:
        reasons += f"; and {len(work.skipped) - SHOWN_REASONS} more"
    return DatasetError(
        f"None of the {len(work.skipped)} videos in {clips.folder} can be used ({reasons})",
        "at least one must be",
        "Mend what is said of each, and prepare them again",
    )


def _report(plans: list[ClipPlan], work: _Work) -> Report:
    there = [plan for plan in plans if plan.key in work.entries]
    warnings = list(work.warnings)
    for plan in there:
        entry = work.entries[plan.key]
        warnings += [(plan.name, warning) for warning in (*entry.warnings, entry.cut) if warning]
    return Report(
        work.target,
        tuple(plan.name for plan in there if plan.key in work.made),
        tuple(plan.name for plan in there if plan.key not in work.made),
        tuple(work.skipped),
        tuple(warnings),
    )


def _plain(options: PrepareOptions, models: PrepareModels) -> dict[str, Any]:
    return {**asdict(options), "dtype": str(models.dtype), "processing": PROCESSING}


# What is made


def _encode_videos(plans: list[ClipPlan], options: PrepareOptions, models: PrepareModels, work: _Work) -> None:
    if not plans:
        return
    memory, unchanged, encoder = models.memory, Unchanged(models.vae), _encoder(models)
    budget = memory.budget_now
    ways = [encode_plan(encoder, size.latent, budget, memory.device) for size in {plan.size for plan in plans}]
    # A clip that ends early becomes a shorter one, which takes less.
    at_once = min(way.values_at_once for way in ways)
    with on_device(encoder, memory.device, check=unchanged):
        for plan in plans:
            try:
                pixels, size, warnings = _pixels(plan, options)
            except (DatasetError, OSError) as error:
                work.skip(plan.name, error)
                work.total -= 1  # its caption is not read either
            else:
                mean, logvar = encode_clip(encoder, pixels, memory.device, at_once, work.still)
                require_finite(torch.stack([mean, logvar]), f"What the encoder makes of {plan.name}")
                entry = Entry(
                    *plan.key,
                    **asdict(size),
                    video=plan.video_hash,
                    caption=plan.caption,
                    caption_hash=_text_hash(plan.caption),
                    latents_of=plan.latents_of,
                    features_of="",
                    file="",
                    file_hash="",
                    warnings=warnings,
                )
                work.put(_written(entry, work.target, dict(mean=mean, logvar=logvar)))
            work.done()


def _encoder(models: PrepareModels) -> Encoder:
    """Raises `DatasetError` when the VAE's file has none."""
    encoder = build.load_vae(models.vae, dtype=models.dtype).encoder
    if encoder is None:
        raise _no_encoder(models.vae)
    return encoder


def _pixels(plan: ClipPlan, options: PrepareOptions) -> tuple[torch.Tensor, VideoSize, tuple[str, ...]]:
    """The clip's frames, the size that they fill, and what is to be said of them."""
    size, pixels = plan.size, read_pixels(plan.video, plan.size, plan.start)
    damage = pixels.damage or plan.look.damage
    if len(pixels.frames) < size.frames:
        # The file promised more than could be decoded.
        size = choose_size(replace(plan.look, frames=len(pixels.frames)), options.sizes)
        damage = damage or "it ends early"
        pixels = read_pixels(plan.video, size, plan.start)
        if len(pixels.frames) < size.frames:
            raise DatasetError(f"{plan.name} reads differently each time", "it must be a whole video", "Get it again")
    warnings = [f"The video is damaged ({damage}); {size.frames} frames of it are used"] if damage else []
    look = plan.look
    if enlargement(look, size) > 1:
        warnings.append(f"{look.width} x {look.height} is enlarged to {size.width} x {size.height}")
    if left_out(look, size) > MUCH_CROPPED:
        warnings.append(f"{left_out(look, size):.0%} of the picture is cropped away")
    return pixels.frames, size, tuple(warnings)


@torch.inference_mode()
def encode_clip(
    encoder: Encoder,
    pixels: torch.Tensor,
    device: torch.device | str,
    values_at_once: int = VALUES_AT_ONCE,
    report: Progress = silent,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and logarithm of the variance of a clip's latents, `C t h w`, float32, of its frames, `T H W 3`, uint8."""
    video = rearrange(pixels, "T H W C -> 1 C T H W").float().div_(127.5).sub_(1)
    dtype = next(encoder.parameters()).dtype
    posterior = encoder.stagewise(video, dtype, device=device, values_at_once=values_at_once, report=report)
    return posterior.mean[0].float().cpu(), posterior.logvar[0].float().cpu()


def _encode_captions(plans: list[ClipPlan], models: PrepareModels, work: _Work) -> None:
    if not plans:
        return
    with reading(models.t5, models.tokenizer, models.memory, models.dtype) as text_encoder:
        for plan in plans:
            entry = work.entries[plan.key]
            mean, logvar = read_tensors(work.target / CLIPS / entry.file, plan.name, ("mean", "logvar"))
            encoded = text_encoder([plan.caption])
            features = encoded.features[0][encoded.mask[0]].cpu().clone()
            require_finite(features, f"The features of the caption of {plan.name}")
            cut = warn_of_cut(text_encoder.tokenizer(plan.caption)) if plan.caption else None
            entry = replace(
                entry,
                caption=plan.caption,
                caption_hash=_text_hash(plan.caption),
                features_of=plan.features_of,
                cut=cut or "",
            )
            work.put(_written(entry, work.target, dict(mean=mean, logvar=logvar, features=features)))
            work.done()


def _written(entry: Entry, target: Path, tensors: dict[str, torch.Tensor]) -> Entry:
    """Writes a clip's file under a name that nothing else has; the entry with that name.

    What the manifest speaks of is never written over: it holds until the manifest speaks of the new file.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(entry.source).stem)[:40] or "_"
    unique = digest_of(entry.source, entry.start, entry.latents_of, entry.features_of)[:16]
    file = target / CLIPS / f"{stem}-{unique}.safetensors"
    outputs = [
        Output(name, TYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    write_safetensors(file, outputs, {"name": entry.name, "caption": entry.caption})
    return replace(entry, file=file.name, file_hash=sha256_of(file))


def _remove_strays(target: Path, held: set[str]) -> None:
    """Removes files of ours that no clip has any more, and parts that a crash left."""
    for path in (target / CLIPS).glob("*"):
        part = path.name.startswith(".") and path.name.endswith(".part")
        ours = FILE_NAME.match(path.name.lstrip(".")) if part else FILE_NAME.fullmatch(path.name)
        if ours and path.name not in held:
            path.unlink(missing_ok=True)


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
