"""The page's texts, against the nodes as the host describes them and as it serves the texts."""

import re
from typing import Any

import pytest
from harness import RunningHost

from scripts import locales

FILES = ("main.json", "nodeDefs.json", "settings.json", "commands.json")
LANGUAGES = ("en", "zh")
JS = locales.LOCALES.parent / "js"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
PLACEHOLDER = re.compile(r"\{(\w+)\}")
# What Chinese has no other word for.
ABBREVIATIONS = {"CFG", "CLIP", "Latent", "Mochi Video", "Sigmas", "VAE"}
# What starts something of its own in a message, unless it is in quotes and braces.
UNESCAPED = re.compile(r"[@{}|]")
ESCAPED = re.compile(r"\{'[^']*'\}")


@pytest.fixture(scope="module")
def schema_texts(host: RunningHost) -> dict[str, Any]:
    """What the nodes say of themselves, as English texts."""
    return locales.node_texts(host.get("/object_info"))


@pytest.fixture(scope="module")
def served(host: RunningHost) -> dict[str, Any]:
    return host.get("/i18n")


def test_english_says_what_the_nodes_say(schema_texts: dict[str, Any]) -> None:
    found = locales.differences(locales.read("en"), schema_texts, same_texts=True)
    assert not found, "run `python scripts/locales.py`"
    assert len(schema_texts) == 15


def test_every_language_has_each_text_and_none_of_what_no_longer_exists(schema_texts: dict[str, Any]) -> None:
    assert {"en", *locales.languages()} == set(LANGUAGES)
    for language in locales.languages():
        assert not locales.differences(locales.read(language), schema_texts), language


@pytest.mark.parametrize("file", FILES)
def test_the_languages_have_the_same_keys_and_placeholders(file: str) -> None:
    english = dict(locales.leaves(locales.read("en", file)))
    assert english
    for language in locales.languages():
        translated = dict(locales.leaves(locales.read(language, file)))
        assert translated.keys() == english.keys(), language
        for path, text in translated.items():
            assert sorted(PLACEHOLDER.findall(text)) == sorted(PLACEHOLDER.findall(english[path])), path


@pytest.mark.parametrize("file", FILES)
def test_chinese_is_chinese(file: str) -> None:
    for path, text in locales.leaves(locales.read("zh", file)):
        assert CHINESE.search(text) or text in ABBREVIATIONS, (path, text)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", FILES)
def test_keys_and_texts_mean_nothing_special_to_the_page(file: str, language: str) -> None:
    for path, text in locales.leaves(locales.read(language, file)):
        assert text == text.strip() and text, path
        assert not any("." in key for key in path), path
        # The extension's own texts are filled in by the extension; what is left of them must be plain too.
        plain = PLACEHOLDER.sub("", text) if path[0] == "mochiVideo" else ESCAPED.sub("", text)
        assert not UNESCAPED.search(plain), (path, text)


def test_special_characters_are_escaped_one_by_one() -> None:
    assert locales.escaped("a@b {c|d} $") == "a{'@'}b {'{'}c{'|'}d{'}'} {'$'}"
    assert locales.escaped("6.0*32, 4.5*32 (word:1.2)") == "6.0*32, 4.5*32 (word:1.2)"


def test_labels_are_words_and_known_abbreviations() -> None:
    assert locales.label("noise_device") == "noise device"
    assert [locales.label(name) for name in ("cfg_schedule", "t5_name", "dit_name", "vae", "lora_1")] == [
        "CFG schedule",
        "T5 name",
        "DiT name",
        "VAE",
        "LoRA 1",
    ]


def test_differences_name_what_is_missing_stale_and_too_much() -> None:
    wanted = {"Node": {"inputs": {"a": {"name": "a"}, "b": {"name": "b"}}}}
    texts = {"Node": {"inputs": {"a": {"name": "old"}, "c": {"name": "c"}}}}
    missing, too_much = "missing: Node.inputs.b.name", "no longer exists: Node.inputs.c.name"
    assert locales.differences(texts, wanted) == [missing, too_much]
    assert locales.differences(texts, wanted, same_texts=True) == [
        missing,
        too_much,
        "out of date: Node.inputs.a.name",
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_host_serves_each_text_to_its_page(served: dict[str, Any], language: str) -> None:
    for file in FILES:
        texts = served[language] if file == "main.json" else served[language][file.removesuffix(".json")]
        shown = dict(locales.leaves(texts))
        for path, text in locales.leaves(locales.read(language, file)):
            assert shown[path] == text, (file, path)


def test_settings_and_commands_are_under_the_names_the_page_looks_for() -> None:
    settings, commands = locales.read("en", "settings.json"), locales.read("en", "commands.json")
    assert list(settings) == [f"MochiVideo_{name}" for name in ("Preview", "Cost", "Player", "Training", "Warnings")]
    assert all(text.keys() == {"name", "tooltip"} for text in settings.values())
    assert list(commands) == [f"MochiVideo_{name}" for name in ("CopyPrompt", "CopyCurl", "CopyPython")]
    assert all(text.keys() == {"label"} for text in commands.values())


def test_the_page_code_and_the_texts_agree() -> None:
    """What the extension says itself, and what it asks for by name."""
    main = locales.read("en", "main.json")
    scripts = "".join(path.read_text(encoding="utf-8") for path in JS.glob("*.js"))
    asked = set(re.findall(r"\btext\('(\w+)'", scripts))
    assert asked and asked <= main["mochiVideo"].keys()
    own = [leaf for file in FILES[2:] for leaf in locales.leaves(locales.read("en", file))]
    for path, text in own:
        assert f"'{text}'" in scripts, path
    labels = [text["label"] for text in locales.read("en", "commands.json").values()]
    assert all(label in main["menuLabels"] for label in labels)
