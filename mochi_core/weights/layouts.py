"""How files name their weights, as data: which parts of the model a file holds, and by which rules its names and rows
become ours (genmo's).

A part is recognised by names that no other part has, never by the name of the file. A rule says which weight of ours
comes from which of theirs: one, or several whose rows lie below each other, perhaps with its halves swapped.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import WeightsError
from . import formats
from .architecture import depth_of
from .checkpoint import NAMES_SHOWN, Checkpoint
from .formats import Entry, Weight


@dataclass(frozen=True)
class Rule:
    """`ours` is made of `theirs`: names without `.weight` and `.bias`, which both sides have alike."""

    ours: str
    theirs: tuple[str, ...]
    swap: bool = False


Rules = tuple[Rule, ...]


@dataclass(frozen=True)
class Layout:
    """One way to name a part. `rules(names)` are those for a file with these names; None when the names are ours."""

    title: str
    markers: tuple[str, ...]
    rules: Callable[[Iterable[str]], Rules] | None = None


@dataclass(frozen=True)
class Part:
    """One network of the model: the ways it is named, the prefixes files put it behind, and what else files with it
    hold that it has no use for (by how those names start)."""

    title: str
    layouts: tuple[Layout, ...]
    prefixes: tuple[str, ...]
    unused: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        return self.layouts[0].markers

    def found_in(self, names: Iterable[str]) -> "Found | None":
        """Where and how `names` holds this part, None when it does not."""
        names = set(names)
        for layout in self.layouts:
            for prefix in self.prefixes:
                if all(prefix + marker in names for marker in layout.markers):
                    return Found(self, layout, prefix)
        return None


@dataclass(frozen=True)
class Found:
    """A part in a file."""

    part: Part
    layout: Layout
    prefix: str

    def owns(self, name: str) -> bool:
        """Whether the file's weight called `name` is this part's."""
        return name.startswith(self.prefix) and not name[len(self.prefix) :].startswith(self.part.unused)


# diffusers' names


def diffusers_dit(depth: int) -> Rules:
    """diffusers' names for a DiT of `depth` blocks."""
    rules = [
        Rule("pos_frequencies", ("pos_frequencies",)),
        Rule("x_embedder.proj", ("patch_embed.proj",)),
        Rule("t_embedder.mlp.0", ("time_embed.timestep_embedder.linear_1",)),
        Rule("t_embedder.mlp.2", ("time_embed.timestep_embedder.linear_2",)),
        *(Rule(f"t5_y_embedder.{name}", (f"time_embed.pooler.{name}",)) for name in ("to_kv", "to_q", "to_out")),
        Rule("t5_yproj", ("time_embed.caption_proj",)),
        Rule("final_layer.mod", ("norm_out.linear",), swap=True),
        Rule("final_layer.linear", ("proj_out",)),
    ]
    for block in range(depth):
        ours, theirs = f"blocks.{block}", f"transformer_blocks.{block}"
        attention = f"{theirs}.attn1"
        is_last = block == depth - 1
        rules += [
            Rule(f"{ours}.mod_x", (f"{theirs}.norm1.linear",)),
            Rule(f"{ours}.mod_y", (f"{theirs}.norm1_context.linear{'_1' if is_last else ''}",)),
            Rule(f"{ours}.attn.qkv_x", tuple(f"{attention}.to_{name}" for name in "qkv")),
            Rule(f"{ours}.attn.qkv_y", tuple(f"{attention}.add_{name}_proj" for name in "qkv")),
            Rule(f"{ours}.attn.q_norm_x", (f"{attention}.norm_q",)),
            Rule(f"{ours}.attn.k_norm_x", (f"{attention}.norm_k",)),
            Rule(f"{ours}.attn.q_norm_y", (f"{attention}.norm_added_q",)),
            Rule(f"{ours}.attn.k_norm_y", (f"{attention}.norm_added_k",)),
            Rule(f"{ours}.attn.proj_x", (f"{attention}.to_out.0",)),
            Rule(f"{ours}.attn.proj_y", (f"{attention}.to_add_out",)),
        ]
        for mlp, feed_forward in (("mlp_x", "ff"), ("mlp_y", "ff_context")):
            rules += [
                Rule(f"{ours}.{mlp}.w1", (f"{theirs}.{feed_forward}.net.0.proj",), swap=True),
                Rule(f"{ours}.{mlp}.w2", (f"{theirs}.{feed_forward}.net.2",)),
            ]
    return tuple(rules)


def _res_block(ours: str, theirs: str, index: int) -> list[Rule]:
    """A residual block of the VAE; one with attention keeps it beside its block in diffusers' naming."""
    block, attention = f"{theirs}.resnets.{index}", f"{theirs}.attentions.{index}"
    return [
        Rule(f"{ours}.stack.0", (f"{block}.norm1.norm_layer",)),
        Rule(f"{ours}.stack.2", (f"{block}.conv1.conv",)),
        Rule(f"{ours}.stack.3", (f"{block}.norm2.norm_layer",)),
        Rule(f"{ours}.stack.5", (f"{block}.conv2.conv",)),
        Rule(f"{ours}.attn_block.norm", (f"{theirs}.norms.{index}.norm_layer",)),
        Rule(f"{ours}.attn_block.attn.qkv", tuple(f"{attention}.to_{name}" for name in "qkv")),
        Rule(f"{ours}.attn_block.attn.out", (f"{attention}.to_out.0",)),
    ]


def diffusers_decoder(blocks: Sequence[int]) -> Rules:
    """diffusers' names for a decoder with so many residual blocks in each stage, from the latents on."""
    first, *middle, last = blocks
    rules = [Rule("blocks.0.0", ("conv_in",)), Rule("output_proj", ("proj_out",))]
    for index in range(first):
        rules += _res_block(f"blocks.0.{index + 1}", "block_in", index)
    for stage, count in enumerate(middle):
        for index in range(count):
            rules += _res_block(f"blocks.{stage + 1}.blocks.{index}", f"up_blocks.{stage}", index)
        rules.append(Rule(f"blocks.{stage + 1}.proj", (f"up_blocks.{stage}.proj",)))
    for index in range(last):
        rules += _res_block(f"blocks.{len(middle) + 1}.{index}", "block_out", index)
    return tuple(rules)


def diffusers_encoder(blocks: Sequence[int]) -> Rules:
    """diffusers' names for an encoder with so many residual blocks in each stage, from the pixels on."""
    first, *middle, last = blocks
    rules = [
        Rule("layers.0", ("proj_in",)),
        Rule("output_norm", ("norm_out.norm_layer",)),
        Rule("output_proj", ("proj_out",)),
    ]
    for index in range(first):
        rules += _res_block(f"layers.{1 + index}", "block_in", index)
    for stage, count in enumerate(middle):
        layer = f"layers.{1 + first + stage}.layers"
        rules.append(Rule(f"{layer}.0", (f"down_blocks.{stage}.conv_in.conv",)))
        for index in range(count):
            rules += _res_block(f"{layer}.{index + 1}", f"down_blocks.{stage}", index)
    for index in range(last):
        rules += _res_block(f"layers.{1 + first + len(middle) + index}", "block_out", index)
    return tuple(rules)


def _diffusers_dit_of(names: Iterable[str]) -> Rules:
    return diffusers_dit(depth_of(names, "transformer_blocks."))


def _diffusers_stages(names: Iterable[str], stage: str) -> list[int]:
    names = list(names)
    middle = [depth_of(names, f"{stage}.{index}.resnets.") for index in range(depth_of(names, f"{stage}."))]
    return [depth_of(names, "block_in.resnets."), *middle, depth_of(names, "block_out.resnets.")]


def _diffusers_decoder_of(names: Iterable[str]) -> Rules:
    return diffusers_decoder(_diffusers_stages(names, "up_blocks"))


def _diffusers_encoder_of(names: Iterable[str]) -> Rules:
    return diffusers_encoder(_diffusers_stages(names, "down_blocks"))


# T5 as llama.cpp names it


def llama_t5(layers: int) -> Rules:
    """llama.cpp's names for a T5 encoder of so many layers. Only the first has position biases, shared by all."""
    rules = [Rule("shared", ("token_embd",)), Rule("encoder.final_layer_norm", ("enc.output_norm",))]
    for layer in range(layers):
        attention, feed_forward = (f"encoder.block.{layer}.layer.{index}" for index in (0, 1))
        theirs = f"enc.blk.{layer}"
        rules += [Rule(f"{attention}.SelfAttention.{name}", (f"{theirs}.attn_{name}",)) for name in "qkvo"]
        rules += [
            Rule(f"{attention}.SelfAttention.relative_attention_bias", (f"{theirs}.attn_rel_b",)),
            Rule(f"{attention}.layer_norm", (f"{theirs}.attn_norm",)),
            Rule(f"{feed_forward}.DenseReluDense.wi_0", (f"{theirs}.ffn_gate",)),
            Rule(f"{feed_forward}.DenseReluDense.wi_1", (f"{theirs}.ffn_up",)),
            Rule(f"{feed_forward}.DenseReluDense.wo", (f"{theirs}.ffn_down",)),
            Rule(f"{feed_forward}.layer_norm", (f"{theirs}.ffn_norm",)),
        ]
    return tuple(rules)


# The parts

DIT_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer/", "transformer.")
DIT = Part(
    "a Mochi DiT",
    (
        Layout("genmo", ("pos_frequencies", "t5_yproj.weight", "blocks.0.attn.qkv_x.weight")),
        Layout(
            "diffusers",
            ("pos_frequencies", "time_embed.caption_proj.weight", "transformer_blocks.0.attn1.add_q_proj.weight"),
            _diffusers_dit_of,
        ),
    ),
    DIT_PREFIXES,
)
VAE_PREFIXES = ("", "vae.", "vae/", "first_stage_model.")
DECODER = Part(
    "a Mochi VAE decoder",
    (
        Layout("genmo", ("blocks.0.0.weight", "blocks.1.proj.weight")),
        Layout("diffusers", ("conv_in.weight", "up_blocks.0.proj.weight"), _diffusers_decoder_of),
    ),
    (*(f"{prefix}decoder." for prefix in VAE_PREFIXES), *VAE_PREFIXES),
)
ENCODER = Part(
    "a Mochi VAE encoder",
    (
        Layout("genmo", ("layers.0.weight", "output_norm.weight")),
        Layout("diffusers", ("proj_in.weight", "down_blocks.0.conv_in.conv.weight"), _diffusers_encoder_of),
    ),
    (*(f"{prefix}encoder." for prefix in VAE_PREFIXES), *VAE_PREFIXES),
)
T5 = Part(
    "a T5 text encoder",
    (
        Layout("Hugging Face", ("shared.weight", "encoder.final_layer_norm.weight")),
        Layout(
            "llama.cpp", ("token_embd.weight", "enc.blk.0.attn_q.weight"), lambda n: llama_t5(depth_of(n, "enc.blk."))
        ),
    ),
    ("", "text_encoders.t5xxl.transformer.", "text_encoder/", "text_encoder.", "t5xxl.transformer."),
    # A whole T5 has a decoder too; the embedding may be there twice; hosts keep things of their own beside it.
    unused=("decoder.", "dec.", "lm_head.", "output.", "encoder.embed_tokens.", "spiece_model", "logit_scale"),
)

PARTS = (DIT, DECODER, ENCODER, T5)


def find(checkpoint: Checkpoint, part: Part) -> Found:
    """Where and how the file holds `part`. Raises `WeightsError` that says what the file holds instead."""
    found = part.found_in(checkpoint.names)
    if found is not None:
        return found
    held = [other.title for other in PARTS if other.found_in(checkpoint.names) is not None]
    names = ", ".join(checkpoint.names[:NAMES_SHOWN]) or "no tensors"
    if "general.architecture" in checkpoint.metadata:
        names = f"a GGUF of architecture {checkpoint.metadata['general.architecture']!r}: {names}"
    raise WeightsError(
        f"{checkpoint.path} is not {part.title}: it holds {' and '.join(held) if held else f'another model ({names})'}",
        f"{part.title} has tensors such as {', '.join(part.markers)}",
        "Choose another file" + (", or load this one where it belongs" if held else ""),
    )


def read(checkpoint: Checkpoint, found: Found) -> dict[str, Entry]:
    """The part's weights under our names; what no rule knows keeps its own, so that an error can name it.

    Weights of other parts that the file holds too are left out.
    """
    others = [other for part in PARTS if part is not found.part for other in [part.found_in(checkpoint.names)] if other]
    inner = {
        name[len(found.prefix) :]: entry
        for name, entry in checkpoint.entries.items()
        if found.owns(name) and not any(_more_special(other, found) and other.owns(name) for other in others)
    }
    if found.layout.rules is None:
        return inner
    return applied(found.layout.rules(inner), inner)


def _more_special(other: Found, found: Found) -> bool:
    """Whether `other` lies inside what `found`'s prefix covers: a part without prefix beside parts with one."""
    return other.prefix != found.prefix and other.prefix.startswith(found.prefix)


def applied(rules: Rules, theirs: Mapping[str, Entry]) -> dict[str, Entry]:
    """Weights by our names. A weight of which only some pieces are there keeps those under their own names."""
    taken: set[str] = set()
    ours: dict[str, Entry] = {}
    for rule in rules:
        for ending in (".weight", ".bias", ""):
            names = [f"{name}{ending}" for name in rule.theirs]
            if all(name in theirs for name in names):
                shapes = {theirs[name].shape for name in names}
                if len(shapes) > 1 or ((len(names) > 1 or rule.swap) and () in shapes):
                    raise WeightsError(
                        f"{', '.join(names)} have shapes {', '.join(map(str, sorted(shapes)))}",
                        f"what becomes {rule.ours}{ending} must be rows, of each as many",
                        "Get the file again",
                    )
                ours[f"{rule.ours}{ending}"] = _made([theirs[name] for name in names], rule.swap)
                taken.update(names)
    return ours | {name: entry for name, entry in theirs.items() if name not in taken}


def _made(pieces: Sequence[Entry], swap: bool) -> Entry:
    if len(pieces) == 1 and not swap:
        return pieces[0]

    def load() -> Weight:
        weight = formats.joined([piece.load() for piece in pieces])
        return formats.swapped(weight) if swap else weight

    height = sum(piece.shape[0] for piece in pieces)
    kinds = [piece.kind for piece in pieces]
    strange = [kind for kind in kinds if not formats.is_floating(kind)]
    alike = len(set(kinds)) == 1 and pieces[0].scales is None
    kind = strange[0] if strange else kinds[0] if alike else formats.UNPACKED
    return Entry((height, *pieces[0].shape[1:]), kind, load)


def reversed_by(rules: Rules, ours: Mapping[str, Entry]) -> dict[str, Entry]:
    """The other way: weights by their names. Raises `WeightsError` on a weight that no rule knows."""
    theirs: dict[str, Entry] = {}
    known = {f"{rule.ours}{ending}": (rule, ending) for rule in rules for ending in (".weight", ".bias", "")}
    for name, entry in ours.items():
        if name not in known:
            raise WeightsError(f"{name} has no name in the other layout", "every weight needs one", "Report this file")
        rule, ending = known[name]
        height = entry.shape[0] // len(rule.theirs)
        for index, their_name in enumerate(rule.theirs):
            theirs[f"{their_name}{ending}"] = _piece(entry, index * height, height, rule)
    return theirs


def _piece(entry: Entry, start: int, height: int, rule: Rule) -> Entry:
    if len(rule.theirs) == 1 and not rule.swap:
        return entry

    def load() -> Weight:
        weight = formats.swapped(entry.load()) if rule.swap else entry.load()
        return weight if len(rule.theirs) == 1 else formats.rows(weight, start, start + height)

    return Entry((height, *entry.shape[1:]), entry.kind, load)
