"""The model card, written from what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from . import scenes

TEMPLATE = """# The tiny checkpoint (model card)

Mochi 1's architecture with small numbers, trained from nothing on procedural clips: one coloured shape, one motion, one
background, {size}x{size}, 7 to {most} frames. It makes the whole chain real on any machine: tokenizer -> T5
-> AsymmDiT with CFG -> Euler -> causal decoder. {license}; the data is generated, nothing was downloaded.
{megabytes:.1f} MB in bfloat16.

`make tiny` makes it anew, from seed {seed}; `python -m mochi_core.training.tiny evaluate` measures it.

| File | What |
|---|---|
| `mochi_video_tiny_dit.safetensors` | AsymmDiT in Genmo's names |
| `mochi_video_tiny_vae.safetensors` | `encoder.` and `decoder.` |
| `mochi_video_tiny_t5.safetensors` | T5 encoder in Hugging Face's names, `shared.weight` once |
| `tokenizer.json` | unigram, lower case, `<pad>` 0, `</s>` 1, `<unk>` 2 |

Metadata: `config` (JSON), and in DiT and VAE `latents_mean`, `latents_std`: **its own statistics, standard deviations
from {low:.2f} to {high:.2f}, so the released model's would be wrong**; in the DiT `latent_colours` for previews. The
null prompt is an all-False mask.

Words it knows:

{words}

Prompts are best written as in "a red circle moving right on a black background". It has never seen a {shape} or
anything {motion}: that is for a LoRA to teach (its T5 knows the words), and until then a prompt for one may give noise.

Measured with the bfloat16 files ({count} captions of held-out combinations, {frames} frames, {steps} steps, CFG {cfg},
fixed seeds) by `classifier.py`, which looks at pixels alone:

| Right | Share |
|---|---|
{generation}

VAE on clips of held-out combinations: {psnr:.1f} dB PSNR; the classifier reads through it {through}.
With the shape or the motion that no training clip has: {reserved_psnr:.1f} dB; {reserved}.

Made in {minutes:.0f} minutes by {processes} CPU process(es), each of which had a core for {processor:.0f} of them.
Minutes by stage: {stages}.
"""


@dataclass(frozen=True)
class Spent:
    """What a stage took: of time, and of the processor in each process."""

    minutes: float = 0.0
    processor_minutes: float = 0.0


@dataclass(frozen=True)
class Measured:
    """All figures of the card."""

    generation: Mapping[str, float]
    vae: Mapping[str, float]
    reserved: Mapping[str, float]
    count: int
    frames: int
    steps: int
    cfg: float


def card(
    measured: Measured,
    stds: tuple[float, ...],
    megabytes: float,
    license: str,
    seed: int,
    times: Mapping[str, Spent],
    processes: int,
) -> str:
    """The card's text. `times` are those of each stage."""
    kinds = {
        "Colours": (scenes.COLOUR_WORDS, ()),
        "Shapes": (scenes.SHAPE_WORDS, (scenes.RESERVED_SHAPE,)),
        "Motions": (scenes.MOTION_WORDS, (scenes.RESERVED_MOTION,)),
        "Backgrounds": (scenes.BACKGROUND_WORDS, ()),
    }
    words = "\n".join(
        f"- {kind}: {', '.join('/'.join(group) for name, group in some.items() if name not in never)}"
        for kind, (some, never) in kinds.items()
    )
    return TEMPLATE.format(
        size=scenes.SIZE,
        most=scenes.MOST_FRAMES,
        license=license,
        seed=seed,
        megabytes=megabytes,
        low=min(stds),
        high=max(stds),
        words=words,
        shape=scenes.RESERVED_SHAPE,
        motion=scenes.MOTION_WORDS[scenes.RESERVED_MOTION][0],
        count=measured.count,
        frames=measured.frames,
        steps=measured.steps,
        cfg=f"{measured.cfg:g}",
        generation="\n".join(f"| {name} | {_percent(share)} |" for name, share in measured.generation.items()),
        psnr=measured.vae["psnr"],
        through=_listed(measured.vae),
        reserved_psnr=measured.reserved["psnr"],
        reserved=_listed(measured.reserved),
        minutes=sum(spent.minutes for spent in times.values()),
        processor=sum(spent.processor_minutes for spent in times.values()),
        processes=processes,
        stages=", ".join(f"{name} {spent.minutes:.0f}" for name, spent in times.items()),
    )


def _listed(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items() if name != "psnr")


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %").replace(".0 ", " ")
