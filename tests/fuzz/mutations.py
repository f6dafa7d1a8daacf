"""Ways to damage a weight file's header: blindly, number by number, and so that the file is whole but means another.

Every function takes bytes and a `Random`, and returns bytes; the same `Random` gives the same bytes.
"""

import io
import json
import math
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from seeds import GGUF_TYPES, Seed, encoded_gguf, ggufs

# Numbers that counters, sizes and offsets do not expect.
NUMBERS = (0, 1, -1, 2, 3, 7, 16, 31, 32, 33, 48, 64, 96, 255, 256, 1000, 9999, 65535, 65536, 10**6, 10**7, 2**31 - 1)
NUMBERS += (
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
    -(2**31),
    -(2**63),
)
# What a JSON text may hold in the place of anything else.
VALUES = (None, True, False, "", "a", "3", "\0", "\u202e", [], {}, [[]], [1], [1, "a"], {"a": 1}, 0.5, -0.0, 1e308)
RAW_VALUES = ("1e999", "NaN", "-Infinity", "1e-400", "9" * 400, "9" * 5000, '"\\ud800"', "'a'", "", "01", "//", "\xff")

DTYPES = ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32")
DTYPES += ("F64", "I64", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "Q8_0", "f32", "")
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2}
ITEM_BYTES |= {"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}

# Names whose endings, beginnings or numbers mean something to the readers.
ENDINGS = (".weight", ".bias", ".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant")
ENDINGS += (".Q8_0_qweight", ".Q4_0_qweight", ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".alpha")
ENDINGS += (".dora_scale", ".lora_magnitude_vector", "scaled_fp8", ".", "")
BEGINNINGS = ("model.diffusion_model.", "vae.", "decoder.", "encoder.", "text_encoders.t5xxl.transformer.", ".", "")
BEGINNINGS += ("transformer.", "transformer/", "base_model.model.", "lora_unet_", "blocks.0.", "blocks.9999.")
CONFS = ('{"format": "float8_e4m3fn"}', '{"format": "nvfp4"}', "[" * 2000, "1", '"a"', '{"format": []}', "\xff", "")

# More than these bytes of a safetensors header, or of an archive, are hardly ever tensors.
MOST_CHANGES = 4


def mutated(seed: Seed, random: Random, others: Sequence[Seed]) -> dict[str, bytes]:
    """The seed's files, one or more of them damaged one or more times."""
    files = dict(seed.files)
    # An index or config is small and says much: it is drawn as often as all the rest.
    small = [name for name in files if name.endswith(".json")]
    for _ in range(1 + min(int(random.expovariate(1)), MOST_CHANGES - 1)):
        name = random.choice(small if small and random.random() < 0.5 else sorted(files))
        if random.random() < 0.02:
            other = random.choice(others)
            files[name] = other.files[random.choice(sorted(other.files))]
            continue
        change = CHANGES.get(name.rpartition(".")[2], any_bytes)
        if seed.kind == "gguf" and change is gguf and random.random() < 0.7:
            files[name] = gguf_in_pieces(seed.name.removeprefix("gguf_"), random)
        else:
            files[name] = change(files[name], random)
    if seed.kind == "folder" and random.random() < 0.05:
        del files[random.choice(sorted(files))]
    return files


# Blindly


def any_bytes(data: bytes, random: Random, first: int = 0, last: int | None = None) -> bytes:
    """Bits flipped, bytes cut out, doubled, moved or written over between two places, or the end cut off."""
    content = bytearray(data)
    last = min(len(data) if last is None else last, len(data))
    if last <= first:
        return bytes(content) + random.randbytes(8)
    place = random.randrange(first, last)
    size = random.choice((1, 1, 2, 4, 8, 16, 64, 500))
    kind = random.randrange(7)
    if kind == 0:
        for _ in range(random.choice((1, 1, 3, 30))):
            content[random.randrange(first, last)] ^= 1 << random.randrange(8)
    elif kind == 1:
        content[place : place + size] = b""
    elif kind == 2:
        content[place:place] = content[place : place + size]
    elif kind == 3:
        other = random.randrange(first, last)
        content[place : place + size], content[other : other + size] = (
            content[other : other + size],
            content[place : place + size],
        )
    elif kind == 4:
        content[place : place + size] = random.choice((b"\0", b"\xff", b"\x80", b"[", b'{"')) * size
    elif kind == 5:
        content[place : place + 8] = struct.pack("<Q", _unsigned(random.choice(NUMBERS), 8))
    else:
        content = content[: random.choice((place, random.randrange(len(content)), len(content) - 1))]
    return bytes(content)


def _unsigned(number: int, size: int) -> int:
    return number % 2 ** (8 * size)


# JSON


def json_text(data: bytes, random: Random, node: Callable[[Any, Random], Any] | None = None) -> bytes:
    """A JSON text with a value changed, or broken as text."""
    try:
        return _other_json(json.loads(data), data, random, node or any_value)
    except (ValueError, RecursionError):  # earlier changes have left no JSON, or one that is very deep
        return any_bytes(data, random)


def _other_json(content: Any, data: bytes, random: Random, node: Callable[[Any, Random], Any]) -> bytes:
    kind = random.random()
    if kind < 0.65:
        changed = node(content, random)
        return json.dumps(changed, separators=(",", ":")).encode("utf-8", "surrogatepass")
    if kind < 0.8:  # a value that no encoder writes
        marked = json.dumps(any_value(content, random, MARK), separators=(",", ":"))
        return marked.replace(f'"{MARK}"', random.choice(RAW_VALUES)).encode("latin-1", "replace")
    if kind < 0.85:
        depth = random.choice((10, 500, 5000, 100_000))
        return random.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    if kind < 0.9 and isinstance(content, dict) and content:  # a key twice
        key = random.choice(sorted(content))
        twice = json.dumps({key: content[random.choice(sorted(content))]}, separators=(",", ":")).encode()
        return twice[:-1] + b"," + json.dumps(content, separators=(",", ":")).encode()[1:]
    return any_bytes(data, random)


MARK = "\u2603"


def any_value(content: Any, random: Random, new: Any = None) -> Any:
    """The same with one value somewhere changed, taken out, or put in another's place."""
    path = _paths(content)
    keys = random.choice(path)
    if not keys:
        return random.choice(VALUES) if new is None else new
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    old = inner[keys[-1]]
    if new is not None:
        inner[keys[-1]] = new
    elif random.random() < 0.15:
        del inner[keys[-1]]
    elif isinstance(inner, dict) and random.random() < 0.15:
        inner[random.choice((*inner, *PATTERNS, "", "a", "weight_map", "config"))] = inner.pop(keys[-1])
    elif isinstance(old, list) and random.random() < 0.5:
        inner[keys[-1]] = random.choice((old * 2, old[:-1], [*old, old[-1] if old else 1], old * 1000, old[::-1]))
    elif isinstance(old, int | float) and random.random() < 0.8:
        inner[keys[-1]] = random.choice((*NUMBERS, old + 1, old - 1, old * 2, -old, old / 2, str(old), [old]))
    else:
        inner[keys[-1]] = random.choice(VALUES)
    return content


# Expressions that keep a careless machine busy for ever, or are none.
PATTERNS = (
    "(a+)+$",
    "(.*)*x",
    ".*" * 60 + "zz",
    ".+" * 60 + "zz",
    r"\d+" * 30,
    "(" * 500,
    "[",
    "*",
    "a{999999999}",
    "^",
)


def _paths(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in it."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(inner for key, value in items for inner in _paths(value, (*path, key)))]


def folder_json(data: bytes, random: Random) -> bytes:
    """An index, now and then with the names of files that are none of its own."""

    def names(content: Any, random: Random) -> Any:
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not shards or random.random() < 0.3:
            return any_value(content, random)
        name = random.choice((*STRANGE_FILES, *shards.values()))
        if random.random() < 0.2:
            shards |= dict.fromkeys(shards, name)
        shards[random.choice((*sorted(shards), "zebra.weight"))] = name
        return content

    return json_text(data, random, names)


STRANGE_FILES = (
    "",
    ".",
    "..",
    "/",
    "../other.safetensors",
    "/etc/hostname",
    "a" * 300,
    "a" * 5000,
    "\0",
    "a\0b",
    "\ud800",
)
STRANGE_FILES += (
    "model.safetensors.index.json",
    "other.safetensors.index.json",
    "config.json",
    "C:\\a",
    "a/b",
    "\n",
    "con",
)


# safetensors


def safetensors(data: bytes, random: Random) -> bytes:
    """A file whose header is damaged, or that is whole and holds something else."""
    size = int.from_bytes(data[:8], "little")
    kind = random.random()
    if kind < 0.6 and 0 < size <= len(data) - 8:
        try:
            header = json.loads(data[8 : 8 + size])
            return random.choice(STRUCTURED)(header, data[8 + size :], random)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            pass  # what earlier changes left is no header any more
    if kind < 0.75:
        text = json_text(data[8 : 8 + size], random)
        return len(text).to_bytes(8, "little") + text + data[8 + size :]
    if kind < 0.8:
        wrong = random.choice((*NUMBERS, size - 1, size + 1, len(data), len(data) - 8, 100_000_001))
        return _unsigned(wrong, 8).to_bytes(8, "little") + data[8:]
    if kind < 0.83:
        return data + random.randbytes(random.choice((1, 8, 1000)))
    return any_bytes(data, random, random.choice((0, 8)), 8 + min(size, len(data)))


def _whole(header: Any, data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _tensor(header: Any, random: Random) -> str:
    return random.choice([name for name in header if name != "__metadata__"])


def _other_shape(header: Any, data: bytes, random: Random) -> bytes:
    """The same bytes as another shape, type or both."""
    entry = header[_tensor(header, random)]
    start, stop = entry["data_offsets"]
    shape = entry["shape"]
    if random.random() < 0.6:
        old_bytes = ITEM_BYTES[entry["dtype"]]
        same = random.random() < 0.5
        fitting = [name for name, item in ITEM_BYTES.items() if (stop - start) % item == 0]
        entry["dtype"] = random.choice([name for name in fitting if not same or ITEM_BYTES[name] == old_bytes])
        if ITEM_BYTES[entry["dtype"]] == old_bytes and random.random() < 0.7:
            return _whole(header, data)
    count = (stop - start) // ITEM_BYTES[entry["dtype"]]
    side = random.choice([n for n in (1, 2, 3, 4, 8, 32, 64) if count % n == 0])
    half = max(1, side // 2)
    entry["shape"] = random.choice(
        (shape[::-1], [count], [side, count // side], [count // side, side], [1, *shape], [*shape, 1], [1] * 30 + shape)
        + (([],) if count == 1 else ())
        + (([shape[0], count // shape[0]],) if shape and shape[0] and count % shape[0] == 0 else ())
        + (([half, side // half, count // side],) if side % half == 0 else ())
    )
    return _whole(header, data)


def _other_name(header: Any, data: bytes, random: Random) -> bytes:
    """A tensor under another name, or all behind another prefix, or two for each other."""
    name = _tensor(header, random)
    kind = random.randrange(6)
    if kind == 0:
        prefix = random.choice(BEGINNINGS)
        renamed = {prefix + key: value for key, value in header.items() if key != "__metadata__"}
        return _whole({key: header[key] for key in header if key == "__metadata__"} | renamed, data)
    if kind == 1:
        other = _tensor(header, random)
        header[name], header[other] = header[other], header[name]
        return _whole(header, data)
    new = name
    if kind == 2:
        new = name.rpartition(".")[0] + random.choice(ENDINGS)
    elif kind == 3:
        new = random.choice(BEGINNINGS) + name
    elif kind == 4:
        digits = [index for index, letter in enumerate(name) if letter.isdigit()]
        if digits:
            index = random.choice(digits)
            new = (
                name[:index]
                + random.choice(("9", "99", "9999", "10000", "999999999", "-1", "", "²"))
                + name[index + 1 :]
            )
    else:
        words = name.split(".")
        words[random.randrange(len(words))] = random.choice(("", "\0", "weight", "é", "a" * 1000, "0", "/"))
        new = ".".join(words)
    header[new] = header.pop(name)
    return _whole(header, data)


def _another(header: Any, data: bytes, random: Random) -> bytes:
    """A tensor more, such as might belong beside one that is there."""
    name = _tensor(header, random).rpartition(".")[0] + random.choice(ENDINGS)
    kind = random.random()
    if kind < 0.2:  # nothing, in a shape that is huge but for one side
        side = random.choice((2**31, 2**40, 2**62, 2**63 - 1))
        shape = random.choice(([0], [0, side], [side, 0], [side, side, 0]))
        return _with(header, data, name, random.choice(DTYPES), shape, b"")
    if kind < 0.4:  # numbers of less than a byte
        dtype, bits = random.choice((("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)))
        return _with(header, data, name, dtype, [4, 8], bytes(32 * bits // 8))
    shape = random.choice(([], [1], [2], [4, 32], [32], [96, 4], [512, 1], [2, 3, 4]))
    return _with_random(header, data, name, shape, random)


def _companion(header: Any, data: bytes, random: Random) -> bytes:
    """A scale, a scale for activations or a format beside a weight, in the place of what was there."""
    weights = [name for name in header if name.endswith(".weight")]
    # Where a weight has a scale, the others mean something too.
    scaled = [name for name in weights if {name[:-6] + "scale_weight", name[:-6] + "weight_scale"} & header.keys()]
    name = random.choice(scaled if scaled and random.random() < 0.7 else weights)
    shape = header[name]["shape"]
    ending = random.choice(("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "comfy_quant"))
    layer = name.removesuffix("weight")
    if ending == "comfy_quant":
        content = random.choice(CONFS).encode("latin-1")
        if random.random() < 0.4:  # numbers where JSON is expected
            content = struct.pack("<q", random.choice((-1, 0, 3, 2**33, 2**62)))
            return _with(header, data, layer + ending, "I64", random.choice(([], [1])), content)
        return _with(header, data, layer + ending, "U8", [len(content)], content)
    side = shape[0] if shape else 1
    sides = random.choice(([], [1], [1, 1], [side], [side, 1], [1, side], shape, shape[::-1], [2], [0], [side + 1]))
    return _with_random(header, data, layer + ending, sides, random)


def _with_random(header: Any, data: bytes, name: str, shape: list[int], random: Random) -> bytes:
    dtype = random.choice(("F32", "F32", "BF16", "F16", *sorted(ITEM_BYTES)))
    return _with(header, data, name, dtype, shape, random.randbytes(math.prod(shape) * ITEM_BYTES[dtype]))


def _with(header: Any, data: bytes, name: str, dtype: str, shape: list[int], content: bytes) -> bytes:
    """The file with this tensor too, in the place of one of that name."""
    if name in header:
        return _with(*_without(header, data, {name}), name, dtype, shape, content)
    end = max((value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"), default=0)
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
    return _whole(header, data[:end] + content)


def _one_less(header: Any, data: bytes, random: Random) -> bytes:
    """Without some of the tensors."""
    count = random.choice((1, 1, 2, len(header) // 2, len(header) - 2))
    gone = set(random.sample(sorted(name for name in header if name != "__metadata__"), max(1, count)))
    return _whole(*_without(header, data, gone))


def _without(header: Any, data: bytes, gone: set[str]) -> tuple[Any, bytes]:
    """A header and its data without these, the rest moved together."""
    kept = bytearray()
    new: dict[str, Any] = {}
    for name, value in header.items():
        if name == "__metadata__":
            new[name] = value
        elif name not in gone:
            start, stop = value["data_offsets"]
            new[name] = value | {"data_offsets": [len(kept), len(kept) + stop - start]}
            kept += data[start:stop]
    return new, bytes(kept)


def _other_metadata(header: Any, data: bytes, random: Random) -> bytes:
    """Metadata whose JSON says something else."""
    metadata = header.setdefault("__metadata__", {})
    name = random.choice(sorted(metadata)) if metadata and random.random() < 0.7 else random.choice([*METADATA])
    text = metadata.get(name, METADATA.get(name, "{}")).encode()
    for _ in range(random.choice((1, 1, 2))):
        text = json_text(text, random)
    metadata[name] = text.decode("latin-1")
    return _whole(header, data)


METADATA = {
    "config": "{}",
    "latents_mean": "[0]",
    "kwargs": json.dumps({"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 8}),
    "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in (("r", 2), ("alpha_pattern", {"to_q": 4}))}),
    "_quantization_metadata": json.dumps({"layers": {"blocks.0.attn.qkv_x": {"format": "float8_e4m3fn"}}}),
}


def _edited(header: Any, data: bytes, random: Random) -> bytes:
    """One number, type or place in a tensor's entry, with no regard to its bytes."""
    entry = header[_tensor(header, random)]
    what = random.choice(("shape", "data_offsets", "dtype", "more"))
    if what == "dtype":
        entry["dtype"] = random.choice(DTYPES)
    elif what == "more":
        entry[random.choice(("dtype", "shape", "data_offsets", "zebra"))] = random.choice((*VALUES, *NUMBERS))
    else:
        entry[what] = any_value({"": list(entry[what])}, random).get("", [])
    return _whole(header, data)


STRUCTURED = (_other_shape, _other_shape, _other_name, _another, _companion, _companion, _one_less, _edited)
STRUCTURED += (_other_metadata, _other_metadata)


# GGUF


def gguf(data: bytes, random: Random) -> bytes:
    """A file whose header's bytes are damaged."""
    return any_bytes(data, random, random.choice((0, 4, 24)), random.choice((64, 600, 5000, len(data))))


def gguf_in_pieces(name: str, random: Random) -> bytes:
    """The file of that name with pieces of its header changed, one at least."""
    pieces, data = GGUFS[name]
    pieces = list(pieces)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        # Not a piece at random, which would be a name most often, but one of a random kind.
        what = random.choice(sorted({piece[0] for piece in pieces}))
        index = random.choice([index for index, piece in enumerate(pieces) if piece[0] == what])
        content, kind = pieces[index][1], random.random()
        if kind < 0.06:
            pieces[index] = (what, b"")
        elif kind < 0.12:
            pieces[index:index] = pieces[index : index + random.choice((1, 2, 8))]
        elif kind < 0.2:
            other = random.randrange(len(pieces))
            pieces[index], pieces[other] = pieces[other], pieces[index]
        elif what == "text" and index:
            changed = _gguf_text(content, random)
            pieces[index] = ("text", changed)
            if random.random() < 0.8:
                pieces[index - 1] = ("length", struct.pack("<Q", len(changed)))
        elif what == "dimensions" and random.random() < 0.7:
            _refold(pieces, index, random)
        elif what == "type" and random.random() < 0.5:
            pieces[index] = (what, struct.pack("<I", random.choice((*GGUF_TYPES.values(), *range(45)))))
        else:
            old = int.from_bytes(content, "little")
            new = random.choice((*NUMBERS, old + 1, old - 1, old * 2, old + 32, old // 2, old ^ 2**63))
            pieces[index] = (what, _unsigned(new, len(content)).to_bytes(len(content), "little"))
    return encoded_gguf(pieces, data[: random.randrange(len(data))] if random.random() < 0.05 else data)


def _gguf_text(content: bytes, random: Random) -> bytes:
    if content.startswith((b"{", b"[")):
        return json_text(content, random)
    words = content.decode().split(".")
    kind = random.randrange(4)
    if kind == 0:
        return any_bytes(content, random)
    if kind == 1:
        words[random.randrange(len(words))] = random.choice(
            ("", "weight", "9999", "99", "general", "config", "\0", "é")
        )
    elif kind == 2:
        words[-1] = random.choice(ENDINGS).strip(".")
    else:
        words[0] = random.choice(BEGINNINGS) + words[0]
    return ".".join(words).encode()


def _refold(pieces: list[tuple[str, bytes]], index: int, random: Random) -> None:
    """A tensor's dimensions in another order, or with one more, of the same product."""
    count = int.from_bytes(pieces[index][1], "little")
    sizes = [piece[1] for piece in pieces[index + 1 : index + 1 + count]]
    random.shuffle(sizes)
    if random.random() < 0.4:
        sizes.insert(random.randrange(len(sizes) + 1), struct.pack("<Q", 1))
    pieces[index : index + 1 + count] = [
        ("dimensions", struct.pack("<I", len(sizes))),
        *(("dimension", size) for size in sizes),
    ]


GGUFS = ggufs()


# Torch archives


def archive(data: bytes, random: Random) -> bytes:
    """An archive damaged anywhere, or whole with a pickle that is damaged, squeezed, doubled or gone."""
    if random.random() < 0.25:
        return random.choice(HOSTILE)
    if not data.startswith(b"PK") or random.random() < 0.3:
        return any_bytes(data, random, 0, random.choice((2000, len(data), len(data))))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = [(info.filename, old.read(info)) for info in old.infolist()]
    except Exception:  # of every kind, when earlier changes have left no archive
        return any_bytes(data, random)
    kind = random.random()
    index = next((i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")), 0)
    if kind > 0.7:
        index = random.randrange(len(members))
    name, content = members[index]
    if kind < 0.75:
        members[index] = (name, any_bytes(content, random))
    elif kind < 0.85:
        members[index] = (name, content + bytes(random.choice((1, 10**4, 10**8))))
    elif kind < 0.9:
        members.append(random.choice(members))
    elif kind < 0.95:
        members[index] = (random.choice(("data.pkl", "archive/data.pkl", "archive/data/0", "../a", "")), content)
    else:
        del members[index]
    buffer = io.BytesIO()
    large = sum(len(content) for _, content in members) > 10**6
    squeezed = zipfile.ZIP_DEFLATED if large or 0.75 < kind < 0.85 or random.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", squeezed) as new:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name, content in members:
            new.writestr(zipfile.ZipInfo(name), content, squeezed)
    return buffer.getvalue()


def _hostile() -> list[bytes]:
    """Archives that torch reads and that hold what no state dict should."""
    one, brain = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    rank, width = 10**7, 2 * 10**8
    attention, feed_forward = (f"encoder.block.0.layer.{index}" for index in (0, 1))
    twice: list[Any] = []
    for _ in range(60):
        twice = [twice, twice]
    round_trip: list[Any] = []
    round_trip.append(round_trip)
    layer = "blocks.0.attn.qkv_x"
    small = {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(96, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of some of these that they are new or will go
        quantized = torch.quantize_per_tensor(torch.ones(4, 32), 0.1, 0, torch.qint8)
        contents = [
            # a few bytes that claim to be gigabytes
            {f"transformer_blocks.0.attn1.to_{piece}.lora_A.weight": one.expand(rank, 32) for piece in "qkv"}
            | {f"transformer_blocks.0.attn1.to_{piece}.lora_B.weight": one.expand(32, rank) for piece in "qkv"},
            {
                "shared.weight": brain.expand(width, 32),
                "encoder.final_layer_norm.weight": torch.ones(32),
                **{f"{attention}.SelfAttention.{name}.weight": torch.ones(32, 32) for name in "qkvo"},
                f"{attention}.SelfAttention.relative_attention_bias.weight": torch.ones(8, 2),
                f"{attention}.layer_norm.weight": torch.ones(32),
                **{f"{feed_forward}.DenseReluDense.wi_{i}.weight": one.expand(width, 32) for i in (0, 1)},
                f"{feed_forward}.DenseReluDense.wo.weight": one.expand(32, width),
                f"{feed_forward}.layer_norm.weight": torch.ones(32),
            },
            # plain values that grow when they are written out, or have no end
            {"state_dict": small, "x": twice},
            {"state_dict": small, "x": round_trip},
            {"state_dict": small, "kwargs": {"qkv_proj_lora_rank": 4, "qkv_proj_lora_alpha": 10**400}},
            {"state_dict": small, "kwargs": [1], "x": float("nan")},
            # tensors of other kinds
            *(
                small | {f"{layer}.lora_A.weight": tensor}
                for tensor in (
                    torch.sparse_coo_tensor(size=(4, 32)),
                    torch.sparse_coo_tensor(size=(10**6, 10**6)),
                    torch.ones(4, 32).to_sparse_csr(),
                    torch.nested.nested_tensor([torch.ones(4), torch.ones(2)]),
                    torch.empty(4, 32, device="meta"),
                    torch.ones(4, 32, dtype=torch.complex64),
                    torch.ones(4, 32, dtype=torch.bool),
                    torch.ones(32, 4).T,
                    torch.ones(0, 32),
                    torch.nn.Parameter(torch.ones(4, 32)),
                    quantized,
                )
            ),
            # no state dicts
            torch.ones(3),
            [small],
            {0: torch.ones(3)},
            {"state_dict": {}},
            {"state_dict": 1},
            None,
        ]
        archives = [_archive(content) for content in contents]
    for depth in (100, 3000):  # torch searches the message about a deeper one for minutes
        deep = b"\x80\x02}(X\n\0\0\0state_dict}X\1\0\0\0x" + b"]" * depth + b"a" * (depth - 1) + b"u."
        archives += [_with_pickle(archives[0], deep), deep]
    return archives


def _archive(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _with_pickle(data: bytes, content: bytes) -> bytes:
    """The archive with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(
                zipfile.ZipInfo(info.filename), content if info.filename.endswith("data.pkl") else old.read(info)
            )
    return buffer.getvalue()


HOSTILE = _hostile()

CHANGES = {"safetensors": safetensors, "gguf": gguf, "json": folder_json, "pt": archive}
