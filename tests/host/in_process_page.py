"""Run inside a ComfyUI's own process by test_page.py: what is made for the page, without a page. Prints JSON."""

import base64
import io
import json
import logging
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
from inside import of_the_pack
from PIL import Image

from mochi_core.config import MOCHI_1, TINY
from mochi_core.errors import MochiError
from mochi_core.preview import LatentColours
from mochi_core.shapes import LatentSize
from mochi_core.training.loop import Step

preview, runs, events, training = (of_the_pack(name) for name in ("_preview", "_runs", "native_events", "_training"))
found = {}


def opened(strip):
    kind, content = strip.image.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def strips():
    """Of the released size, of one picture, and of more pictures than are sent."""
    sizes = {"released": (28, 60, 106), "single": (1, 8, 8), "longest": (257, 512, 256)}
    for name, shape in sizes.items():
        pictures = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        made = preview.strip(pictures)
        sheet = opened(made)
        yield (
            name,
            {
                "count": made.count,
                "picture": [made.width, made.height],
                "fits": sheet.width == made.columns * made.width and made.columns**2 >= made.count,
                "seconds": made.count / made.fps,
                "characters": len(made.image),
            },
        )


def colours_survive():
    """Each picture lies where its number says."""
    pictures = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
    for index in range(5):
        pictures[index] = torch.tensor([50 * index, 255 - 50 * index, 100])
    made = preview.strip(pictures)
    sheet = opened(made)
    read = [sheet.getpixel((index % made.columns * 8 + 4, index // made.columns * 8 + 4)) for index in range(5)]
    return max(abs(a - b) for index, pixel in enumerate(read) for a, b in zip(pixel, pictures[index, 0, 0].tolist()))


def paced():
    """Steps of an eighth of a second: which of them were sent."""
    now, sent, called = [0.0], [], []
    colours = LatentColours(tuple((1.0, 1.0, 1.0) for _ in range(12)))
    after = preview.with_previews(
        lambda *step: called.append(step[0]), colours, sent.append, lambda: True, lambda: now[0]
    )
    for step in range(20):
        after(step, torch.zeros(1, 12, 2, 8, 8), None, 20)
        now[0] += 0.125
    clip, yes = torch.zeros(1, 12, 2, 8, 8), lambda: True
    preview.with_previews(None, None, sent.append, yes)(0, clip, None, 1)
    preview.with_previews(None, colours, sent.append, lambda: False)(0, clip, None, 1)
    preview.with_previews(None, colours, sent.append, yes)(0, torch.zeros(1, 16, 2, 8, 8), None, 1)  # another model's
    preview.with_previews(None, colours, sent.append, yes)(0, torch.zeros(1, 12, 8, 8), None, 1)  # a picture's
    return {"sent": [data["step"] for data in sent], "called": len(called), "steps": sent[0]["steps"]}


def timed():
    """The first step, which holds the loading, does not count."""
    times = iter([0.0, 30.0, 31.0, 33.0, 34.0])
    steps = runs.Steps(lambda: next(times))
    after = steps.timed(lambda *_: None)
    for index in range(4):
        after(index)
    memory = runs.Runs()
    small, large = LatentSize(4, 8, 8), LatentSize(28, 60, 106)
    nothing = memory.seconds_a_step(TINY.dit, small, 1)
    memory.remember(runs.Run(TINY.dit, small, 1, steps.median))
    return {
        "median": steps.median,
        "before": nothing,
        "same": memory.seconds_a_step(TINY.dit, small, 1),
        "pair": memory.seconds_a_step(TINY.dit, small, 2),
        "larger": memory.seconds_a_step(TINY.dit, large, 1),
        "other": memory.seconds_a_step(MOCHI_1.dit, large, 1),
    }


def warned():
    """Warnings of ours reach the page that queued the prompt, cut; others, and without a page, nothing."""
    import sys

    from comfy_execution.utils import CurrentNodeContext

    sent = []
    server = types.SimpleNamespace(client_id="page", send_sync=lambda *message: sent.append(message))
    sys.modules["server"] = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    events.send_warnings()
    events.send_warnings()  # once is enough
    log = logging.getLogger("mochi_core.text.conditioning")
    log.warning("outside of a run")
    with CurrentNodeContext("prompt", "12:5"):
        log.info("not a warning")
        log.warning("cut: %s", "x" * 5000)
        logging.getLogger("another").warning("not ours")
        server.client_id = None
        log.warning("nobody asked")
    return [(event, {**data, "text": len(data["text"])}, to) for event, data, to in sent]


def trained():
    """A training that goes on: its snapshot was of step 500, and steps up to 503 are written down."""
    now, sent = [0.0], []
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        folder = output / "mochi_training" / "some"
        (folder / "samples").mkdir(parents=True)
        (folder / "samples" / "step_000500.mp4").touch()
        lines = [{"step": step, "loss": 1.0} for step in range(1, 504)] + [{"step": 504}]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        reports = training.Reports(folder, output, 1000, sent.append, lambda: now[0])
        first = reports.told("running")
        for step in range(501, 1001):
            sample = folder / "samples" / "step_001000.mp4" if step == 1000 else None
            reports(Step(step, 1000, 0.5, 1e-3, 1.0, 0.25, sample))
            now[0] += 0.125
        last = reports.end("finished", "loras/some.safetensors")
    json.dumps(sent, allow_nan=False)
    return {
        "first": [first["step"], first["curve"][-1], first["samples"]],
        "told": len(sent),
        "curve": [len(last["curve"]), last["curve"][0], last["curve"][-1]],
        "samples": [one["step"] for one in last["samples"]],
        "pace": last["seconds"],
    }


def refused(check, value):
    try:
        check(value)
    except MochiError as error:
        return str(error)
    return ""


def not_installed():
    """What is said where accelerate is not."""
    with mock.patch("importlib.util.find_spec", return_value=None):
        return refused(lambda _: training.check_installed(), None)


NAMES = [
    "my-style",
    "3 things_v1.2",
    "Ünïcode 名",
    "",
    " a",
    "a ",
    "a.",
    ".a",
    "..",
    "a/b",
    "a\\b",
    "nul.txt",
    "x" * 81,
    "a\0",
]

found["trained"] = trained()
found["names"] = [name for name in NAMES if not refused(training.check_name, name)]
found["not_installed"] = not_installed()
found |= {"strips": dict(strips()), "worst_colour": colours_survive(), "paced": paced(), "timed": timed()}
found["warned"] = warned()
print("FOUND" + json.dumps(found))  # noqa: T201
