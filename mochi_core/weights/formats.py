"""How a weight is stored: plain, in 8-bit floats with a scale, or packed in blocks. Each becomes floats when asked.

What belongs together in a file (a weight, its scale; packed bytes under a name of their own) is one entry here, under
the weight's own name.

Matrices are rows (output features) by columns (input features); no format mixes rows, so joining, splitting and
swapping rows never needs the floats.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import WeightsError
from .blocks import BLOCK_FORMATS, BlockFormat, Packed, quantize
from .files import TYPE_NAMES, Reader

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
PLAIN = ("F64", "F32", "F16", "BF16")
# What a matrix of floats can be made into, to be smaller.
QUANTIZED = ("fp8", "fp8_scaled", "q8_0", "q4_0")
# The types of numbers that are no weights, as readers name them.
NO_WEIGHTS = re.compile(r"BOOL|[UIC]\d+|F4|F6_\w+|F8_(?!E4M3$|E5M2$)\w+|torch\..*")
# What is made of unlike or scaled pieces: it comes in float32.
UNPACKED = "unpacked"
# The marker that a file of scaled 8-bit floats has, behind the model's prefix; and the names of a weight's companions,
# older and newer.
SCALED_MARKER = "scaled_fp8"
SCALES = ("scale_weight", "weight_scale")
INPUT_SCALES = ("scale_input", "input_scale")
QUANT_CONF = "comfy_quant"
QUANT_METADATA = "_quantization_metadata"
LARGEST_CONF = 2**16
# Packed blocks in safetensors: `<layer>.Q8_0_qweight` holds the bytes of `<layer>.weight`.
PACKED_SUFFIXES = {f".{name}_qweight": BLOCK_FORMATS[name] for name in ("Q8_0", "Q4_0")}


@dataclass(frozen=True)
class Scaled:
    """A matrix in 8-bit floats times a scale: one for all, or one for each row (`rows x 1`).

    `input_scale` is what activations are divided by before an 8-bit matrix product, when the file has one;
    `wide_product` is for files that ask for products in 16 bits.
    """

    data: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None = None
    wide_product: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.data.to(torch.float32) * self.scale).to(dtype)


Weight = torch.Tensor | Scaled | Packed


@dataclass(frozen=True)
class Entry:
    """A weight that is not read yet. `kind` is its type's name, such as `BF16`, `F8_E4M3 scaled` or `Q4_K`.

    `scales` tells of a scaled weight what a writer must know before it is read.
    """

    shape: tuple[int, ...]
    kind: str
    load: Callable[[], Weight]
    scales: "Scales | None" = None

    @property
    def is_plain(self) -> bool:
        return self.kind in PLAIN


def stand_in(entry: Entry) -> Weight:
    """A weight of the entry's shape and kind without its values, on the meta device: nothing is read."""
    meta = torch.device("meta")
    kind = entry.kind.removesuffix(" scaled")
    if entry.kind in BLOCK_FORMATS:
        block = BLOCK_FORMATS[entry.kind]
        rows, columns = entry.shape
        return Packed(torch.empty(rows, columns // block.values * block.bytes, dtype=torch.uint8, device=meta), block)
    weight = torch.empty(entry.shape, dtype=FLOAT8.get(kind, torch.float32), device=meta)
    if entry.scales is None:
        return weight
    return Scaled(weight, torch.empty(entry.scales.shape, device=meta))


@dataclass(frozen=True)
class Scales:
    """What stands beside a scaled weight: the shape of its scale, and the fields of `Scaled` of the same names."""

    shape: tuple[int, ...]
    has_input_scale: bool
    wide_product: bool


def is_floating(kind: str) -> bool:
    """Whether a type is one of floats, however packed, that can be read; whole numbers are not."""
    return not NO_WEIGHTS.fullmatch(kind)


def is_quantized(weight: Weight) -> bool:
    """Whether a layer must turn this weight into floats before it can compute with it."""
    return not isinstance(weight, torch.Tensor) or weight.dtype in FLOAT8.values()


def plain(weight: Weight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight as floats: in `dtype`, or as it is stored; what has no dtype of its own comes in float32."""
    if isinstance(weight, torch.Tensor):
        return weight if dtype is None else weight.to(dtype)
    return weight.dequantized(dtype or torch.float32)


def entries(reader: Reader, source: str) -> dict[str, Entry]:
    """Everything in a file by the weights' own names. Raises `WeightsError` when companions do not belong together."""
    names = set(reader.names)
    markers = {name.removesuffix(SCALED_MARKER): reader.shape(name) for name in names if name.endswith(SCALED_MARKER)}
    wide = tuple(prefix for prefix, shape in markers.items() if math.prod(shape) == 2)
    confs = _confs(reader, names, source)
    found: dict[str, Entry] = {}
    for name in reader.names:
        layer, _, last = name.rpartition(".")
        if last in (*SCALES, *INPUT_SCALES, QUANT_CONF) and f"{layer}.weight" in names:
            continue
        if last == SCALED_MARKER:
            continue
        suffix = next((suffix for suffix in PACKED_SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None:
            target = name.removesuffix(suffix) + ".weight"
            if target in names:
                raise WeightsError(f"{source} holds {target} twice", "it must be packed or not", "Get the file again")
            found[target] = _packed_entry(reader, name, PACKED_SUFFIXES[suffix], source)
            continue
        scales = [f"{layer}.{ending}" for ending in SCALES if f"{layer}.{ending}" in names]
        if last == "weight" and (len(scales) > 1 or (layer in confs and not scales)):
            raise WeightsError(
                f"{source} has {len(scales)} scales for {name}",
                "a scaled weight has one scale",
                "This quantisation is not read: get the file in another format",
            )
        if last == "weight" and scales:
            is_wide = confs.get(layer, name.startswith(wide))
            found[name] = _scaled_entry(reader, name, scales[0], _first(names, layer, INPUT_SCALES), is_wide, source)
        else:
            found[name] = Entry(reader.shape(name), reader.type_name(name), lambda name=name: reader.tensor(name))
    return found


def _packed_entry(reader: Reader, name: str, block: BlockFormat, source: str) -> Entry:
    shape = reader.shape(name)
    if reader.type_name(name) != "U8" or len(shape) != 2 or shape[1] % block.bytes:
        raise WeightsError(
            f"{source} has {name} of shape {shape} in {reader.type_name(name)}",
            f"{block.name} is bytes, {block.bytes} for each {block.values} weights of a row",
            "Get the file again",
        )

    def load() -> Packed:
        data = reader.tensor(name)
        assert isinstance(data, torch.Tensor)
        return Packed(data, block)

    return Entry((shape[0], shape[1] // block.bytes * block.values), block.name, load)


def _first(names: set[str], layer: str, endings: Sequence[str]) -> str | None:
    return next((f"{layer}.{ending}" for ending in endings if f"{layer}.{ending}" in names), None)


def _scaled_entry(
    reader: Reader, name: str, scale_name: str, input_name: str | None, wide_product: bool, source: str
) -> Entry:
    shape, scale_shape = reader.shape(name), reader.shape(scale_name)
    one_for_all, one_for_each = ((), (1,), (1, 1)), (shape[:1], (*shape[:1], 1))
    fits = scale_shape in one_for_all or (len(shape) == 2 and scale_shape in one_for_each)
    if reader.type_name(name) not in (*FLOAT8, *PLAIN) or reader.type_name(scale_name) not in PLAIN or not fits:
        raise WeightsError(
            f"{source} has {name} in {reader.type_name(name)} with a scale of shape {scale_shape}",
            "scaled weights are floats with one scale, or one for each row",
            "This quantisation is not read: get the file in another format",
        )
    if input_name and (reader.type_name(input_name) not in PLAIN or math.prod(reader.shape(input_name)) != 1):
        raise WeightsError(
            f"{source} has {input_name} of shape {reader.shape(input_name)} in {reader.type_name(input_name)}",
            "activations have one scale",
            "Get the file again",
        )

    wanted = () if scale_shape in one_for_all else (shape[0], 1)

    def load() -> Scaled:
        data, scale = reader.tensor(name), reader.tensor(scale_name)
        given = reader.tensor(input_name) if input_name else None
        assert isinstance(data, torch.Tensor) and isinstance(scale, torch.Tensor)
        scale = scale.to(torch.float32).reshape(wanted)
        if not (scale.isfinite() & (scale >= 0)).all():
            raise WeightsError(
                f"{source} has {scale_name} with values such as {scale.min().item()}",
                "scales must be finite and not negative",
                "The file is damaged: download it again",
            )
        if isinstance(given, torch.Tensor):
            given = given.to(torch.float32).reshape(())
        return Scaled(data, scale, given, wide_product)  # pyright: ignore[reportArgumentType]

    about = Scales(wanted, input_name is not None, wide_product)
    return Entry(shape, f"{reader.type_name(name)} scaled", load, about)


def _confs(reader: Reader, names: set[str], source: str) -> dict[str, bool]:
    """Newer files say a layer's format in JSON, in a tensor beside it or for all layers in the metadata.

    Returns which layers have one, and whether their products want 16 bits. Raises `WeightsError` when a format is not
    scaled 8-bit floats: it would be read wrongly.
    """
    said: dict[str, object] = {}
    try:
        if QUANT_METADATA in reader.metadata:
            layers = json.loads(reader.metadata[QUANT_METADATA])["layers"]
            said |= {layer: conf for layer, conf in layers.items() if f"{layer}.weight" in names}
        for name in names:
            if name.endswith(f".{QUANT_CONF}"):
                if reader.type_name(name) != "U8" or math.prod(reader.shape(name)) > LARGEST_CONF:
                    raise ValueError(f"{name} must be a text")
                data = reader.tensor(name)
                said[name.removesuffix(f".{QUANT_CONF}")] = json.loads(bytes(data.flatten().tolist()))  # pyright: ignore
        formats = {layer: conf["format"] for layer, conf in said.items()}  # pyright: ignore[reportIndexIssue]
        wide = {layer: bool(conf.get("full_precision_matrix_mult")) for layer, conf in said.items()}  # pyright: ignore
        if not all(isinstance(format, str) for format in formats.values()):
            raise TypeError("a format is a name")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(
            f"{source} has an unreadable {QUANT_CONF} or {QUANT_METADATA} ({error!r})",
            "they must be JSON that names formats",
            "Get the file again",
        ) from error
    for layer, format in formats.items():
        if format not in ("float8_e4m3fn", "float8_e5m2"):
            raise WeightsError(
                f"{source} has {layer} of format {format!r}",
                "float8_e4m3fn and float8_e5m2 are read",
                "Get the file in another format",
            )
    return wide


# Rows


def joined(weights: Sequence[Weight]) -> Weight:
    """Matrices or vectors below each other: plain or packed ones as they are when they are alike, else float32."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if all(isinstance(w, Packed) for w in weights):
        packed = [w for w in weights if isinstance(w, Packed)]
        if len({w.format.name for w in packed}) == 1:
            return Packed(torch.cat([w.data for w in packed]), packed[0].format)
    if all(isinstance(w, torch.Tensor) for w in weights):
        tensors = [w for w in weights if isinstance(w, torch.Tensor)]
        if len({t.dtype for t in tensors}) == 1:
            return torch.cat(tensors)
    return torch.cat([plain(w, torch.float32) for w in weights])


def rows(weight: Weight, start: int, stop: int) -> Weight:
    """Some rows of a matrix or vector."""
    if isinstance(weight, Packed):
        return Packed(weight.data[start:stop], weight.format)
    if isinstance(weight, Scaled):
        scale = weight.scale if weight.scale.ndim == 0 else weight.scale[start:stop]
        return Scaled(weight.data[start:stop], scale, weight.input_scale, weight.wide_product)
    return weight[start:stop]


def swapped(weight: Weight) -> Weight:
    """The lower half of the rows above the upper half."""
    half = weight.shape[0] // 2
    return joined([rows(weight, half, 2 * half), rows(weight, 0, half)])


# Making


def quantized_float8(weight: torch.Tensor, scaled: bool) -> Weight:
    """A matrix in e4m3; `scaled` so that its largest value is the largest that e4m3 holds.

    Raises `WeightsError` when it has values that are not numbers.
    """
    limits = torch.finfo(torch.float8_e4m3fn)
    wide = weight.to(torch.float32)
    if not wide.isfinite().all():
        raise WeightsError("A weight to store in 8 bits is not finite", "it must be numbers", "Get the file again")
    if not scaled:
        return wide.clamp(limits.min, limits.max).to(torch.float8_e4m3fn)
    scale = (wide.abs().max() / limits.max).clamp(min=torch.finfo(torch.float32).tiny)
    return Scaled((wide / scale).clamp(limits.min, limits.max).to(torch.float8_e4m3fn), scale)


def quantized(weight: torch.Tensor, format: str) -> Weight:
    """A matrix in one of the formats of `QUANTIZED`. Raises `WeightsError` when it cannot hold the values."""
    if format.startswith("fp8"):
        return quantized_float8(weight, scaled=format == "fp8_scaled")
    return quantize(weight, BLOCK_FORMATS[format.upper()])


def kind_of(weight: Weight) -> str:
    """The name of a weight's type, as `Entry.kind` has it."""
    if isinstance(weight, Packed):
        return weight.format.name
    if isinstance(weight, Scaled):
        return f"{TYPE_NAMES[weight.data.dtype]} scaled"
    return TYPE_NAMES.get(weight.dtype, str(weight.dtype))


def kinds(found: Mapping[str, Entry]) -> dict[str, int]:
    """How many weights there are of each type."""
    counts: dict[str, int] = {}
    for entry in found.values():
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
    return counts
