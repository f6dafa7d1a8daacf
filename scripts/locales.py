"""The texts that ComfyUI's page shows for the nodes, in `locales/`.

    python scripts/locales.py            writes locales/en/nodeDefs.json as the nodes say it; lists what zh lacks
    python scripts/locales.py --check    writes nothing; lists what is out of date and fails when there is anything

English is the nodes' own. Every other language is written by hand, and never by this.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LOCALES = Path(__file__).resolve().parent.parent / "locales"
NODE_DEFS = "nodeDefs.json"
PREFIX = "MochiVideo"
# What the page's message compiler gives a meaning of its own.
SPECIAL = re.compile(r"[@{}|$]")
ABBREVIATIONS = {"cfg": "CFG", "dit": "DiT", "gb": "GB", "lora": "LoRA", "t5": "T5", "vae": "VAE"}


def escaped(text: str) -> str:
    """`text` as a message that the page shows as it stands."""
    return SPECIAL.sub(lambda found: f"{{'{found[0]}'}}", text)


def label(name: str) -> str:
    """How an input is called on its node: `noise_device` is "noise device"."""
    return " ".join(ABBREVIATIONS.get(word, word) for word in name.split("_"))


def node_texts(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """The English `nodeDefs` of our nodes, from what the host says of all nodes."""
    ours = sorted(name for name in object_info if name.startswith(PREFIX))
    return {name: _texts_of(object_info[name]) for name in ours}


def _texts_of(info: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {}
    for group, names in info["input_order"].items():
        for name in names if group != "hidden" else ():
            options = info["input"][group][name][1]
            inputs[name] = {"name": escaped(label(name)), "tooltip": escaped(options["tooltip"])}
    outputs = {}
    for index, (kind, name, tooltip) in enumerate(
        zip(info["output"], info["output_name"], info["output_tooltips"], strict=True)
    ):
        # An output that is called as its type is, goes by the page's own word for the type.
        named = {} if name == kind else {"name": escaped(label(name))}
        outputs[str(index)] = {**named, "tooltip": escaped(tooltip)}
    return {
        "display_name": escaped(info["display_name"]),
        "description": escaped(info["description"]),
        "inputs": inputs,
        "outputs": outputs,
    }


def read(language: str, file: str = NODE_DEFS) -> dict[str, Any]:
    """One file of a language; empty when there is none."""
    path = LOCALES / language / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def leaves(texts: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the keys that lead to it."""
    for key, value in texts.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def differences(texts: Mapping[str, Any], wanted: Mapping[str, Any], *, same_texts: bool = False) -> list[str]:
    """What `texts` lacks of `wanted`, and has beyond it; with `same_texts` also which texts differ."""
    have, want = dict(leaves(texts)), dict(leaves(wanted))
    found = [f"missing: {'.'.join(path)}" for path in want if not have.get(path)]
    found += [f"no longer exists: {'.'.join(path)}" for path in have if path not in want]
    if same_texts:
        both = (path for path in want if have.get(path) and have[path] != want[path])
        found += [f"out of date: {'.'.join(path)}" for path in both]
    return found


def languages() -> list[str]:
    """The languages there are beside English."""
    return sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir() and folder.name != "en")


def write(language: str, texts: Mapping[str, Any]) -> Path:
    path = LOCALES / language / NODE_DEFS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def object_info() -> dict[str, Any]:
    """What a host that is started for this says of its nodes."""
    import comfyui  # here, for the tests use the rest without it

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with comfyui.Host(base, base / "output", base / "log.txt") as host:
            return host.get("/object_info")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is out of date")
    check = parser.parse_args().check
    english = node_texts(object_info())
    found = {}
    if check:
        found["en"] = differences(read("en"), english, same_texts=True)
    else:
        print(f"wrote {write('en', english)}: {len(english)} nodes")
    for language in languages():
        found[language] = differences(read(language), english)
    for language, lines in found.items():
        for line in lines:
            print(f"locales/{language}/{NODE_DEFS}: {line}")
    if any(found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
