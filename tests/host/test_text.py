"""The same ids and features from `mochi_core` (transformers) and from the nodes (the host's T5)."""

import json
import subprocess
import sys

import pytest
from harness import Graph, RunningHost

from mochi_core.pipeline import MochiPipeline
from mochi_core.text.tokenizer import read_tokenizer
from scripts import comfyui

PROMPTS = [
    "a red circle moving right on a black background",
    "A Green Triangle",
    "(parentheses) are text",
    "((double)) and (weight:1.3)",
    "unbalanced (paren",
    "closing) first",
    r"back\slash and \( escaped \)",
    "line one\nline two\n\nline four",
    "tabs\tand   many    spaces  ",
    "  leading space",
    "ünïcödé, naïve café — “quotes” … ½ ﬁ",
    "日本語のプロンプト",
    "emoji 🎬🔴 here",
    "embedding:name is text too",
    "punctuation!?;:,.'\"-_/[]{}<>|@#$%^&*+=~`",
    "1234567890 3.14159",
    "x",
    "<pad> </s> <unk> <extra_id_0>",
    "a " * 300,
    " ".join(f"word{index}" for index in range(5000)),
]


def test_ids_and_features_agree_on_twenty_prompts(host: RunningHost, graph: Graph) -> None:
    encoder = MochiPipeline.tiny().text_encoder
    clip = graph.t5()
    names = [f"prompt_{index}" for index in range(len(PROMPTS))]
    for name, text in zip(names, PROMPTS):
        graph.probe("Conditioning", graph.text(clip, text), name)
    for text, encoded in zip(PROMPTS, host.tensors(graph, *names)):
        expected = encoder([text])
        assert encoded["features"].shape == expected.features.shape
        assert (encoded["mask"].bool() == expected.mask).all(), text
        assert (encoded["features"] - expected.features)[expected.mask].abs().max() <= 1e-4, text


HOST_IDS = """
import json, sys
sys.argv = ["x", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
from comfy.text_encoders.genmo import T5XXLTokenizer
tokenizer = T5XXLTokenizer().tokenizer
print("IDS" + json.dumps([tokenizer(text)["input_ids"] for text in json.load(open(sys.stdin.fileno()))]))
"""


def test_the_released_tokenizer_gives_the_ids_that_the_host_gives() -> None:
    path = comfyui.path()
    if not (path / "comfy").is_dir():
        pytest.fail(f"no ComfyUI at {path}: run `make setup`")
    done = subprocess.run(
        [sys.executable, "-c", HOST_IDS], cwd=path, input=json.dumps(PROMPTS), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("IDS")]
    tokenizer = read_tokenizer(path / "comfy" / "text_encoders" / "t5_tokenizer")
    for text, host_ids in zip(PROMPTS, json.loads(line[3:])):
        assert tokenizer.all_ids(text) == host_ids, text
