"""Several videos from one graph: a list of prompts, each with a list of seeds."""

from comfy_api.latest import io

from mochi_core.errors import ConditioningError

from . import _checks, _host

LARGEST_SEED = 0xFFFFFFFFFFFFFFFF
MOST_VIDEOS = 1000


def listed(prompts: str, seed: int, seeds_per_prompt: int) -> list[tuple[str, int]]:
    """A prompt and a seed for each video: every line that is not empty, with consecutive seeds from `seed` on.

    Seeds start over after the largest. Raises `ConditioningError` when there is no prompt, or far too many.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not lines or len(lines) * seeds_per_prompt > MOST_VIDEOS:
        raise ConditioningError(
            f"prompts has {len(lines)} lines with {seeds_per_prompt} seeds each",
            f"they must make from 1 to {MOST_VIDEOS} videos",
            "Write one prompt on each line",
        )
    return [(line, (seed + index) % (LARGEST_SEED + 1)) for line in lines for index in range(seeds_per_prompt)]


class MochiVideoPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoPrompts",
            display_name="Mochi Video Prompts",
            category="Mochi Video/conditioning",
            description="A list of prompts and seeds: what comes after runs once for each of them, in turn.",
            search_aliases=["batch prompts", "prompt list", "seed list", "sweep"],
            inputs=[
                io.String.Input(
                    "prompts", multiline=True, default="", tooltip="One prompt on each line; empty lines do not count."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="The first seed; the others follow it.",
                ),
                io.Int.Input(
                    "seeds_per_prompt", default=1, min=1, max=MOST_VIDEOS, tooltip="How many videos of each prompt."
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", is_output_list=True, tooltip="For Mochi Video Text Encode."),
                io.Int.Output(display_name="seed", is_output_list=True, tooltip="For the seed of the sampler."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, prompts: str | None = None, seed: int | None = None, seeds_per_prompt: int | None = None
    ) -> bool | str:
        return (
            _checks.out_of_range(cls, seed=seed, seeds_per_prompt=seeds_per_prompt)
            or _checks.refused_by(listed, prompts, seed, seeds_per_prompt)
            or True
        )

    @classmethod
    def execute(cls, prompts: str, seed: int, seeds_per_prompt: int) -> io.NodeOutput:
        _checks.at_run(cls, prompts=prompts, seed=seed, seeds_per_prompt=seeds_per_prompt)
        pairs = listed(prompts, seed, seeds_per_prompt)
        return io.NodeOutput([prompt for prompt, _ in pairs], [seed for _, seed in pairs])
