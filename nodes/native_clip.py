"""The host's T5, of any size, as its CLIP, with Mochi's prompt rules.

The host's tokenizer keeps its conventions ((word:1.2), embedding:name); ours adds the model's: 256 tokens, and no
token at all for the empty prompt.
"""

import inspect
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.genmo
import comfy.text_encoders.t5
import folder_paths
import torch

from mochi_core.config import TextConfig
from mochi_core.errors import ConditioningError, ConfigError
from mochi_core.text.conditioning import warn_of_cut
from mochi_core.text.tokenizer import END_ID, MAX_TOKENS, PAD_ID, TOKENIZER_NAMES, Tokenizer, Tokens, read_tokenizer
from mochi_core.weights.build import open_t5
from mochi_core.weights.formats import Weight, plain

from . import _host
from .native_weights import fill_native, quantized_options, wanted, weight_dtype

CLIP_NAME = "t5xxl"
NULL_PROMPT = [(PAD_ID, 1.0)] * MAX_TOKENS
HOST_TOKENIZER = Path(inspect.getfile(comfy.text_encoders.genmo)).parent / "t5_tokenizer"


class _HuggingFaceFace:
    """Our tokenizer as the host calls a transformers one."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.all_ids(text)}

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.vocabulary()


def tokenizer_class(tokenizer: Tokenizer, width: int) -> type:
    """A class that the host can make its tokenizer of."""

    class MochiT5Tokens(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}):
            class Face:
                from_pretrained = staticmethod(lambda path, **_: _HuggingFaceFace(tokenizer))

            super().__init__(
                "mochi",
                tokenizer_class=Face,
                embedding_directory=embedding_directory,
                embedding_size=width,
                embedding_key=CLIP_NAME,
                pad_with_end=False,
                has_start_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=MAX_TOKENS,
                tokenizer_data=tokenizer_data,
            )

        def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> list[list[tuple]]:
            if not text:
                return [[(*pair, 0) if return_word_ids else pair for pair in NULL_PROMPT]]
            (tokens,) = super().tokenize_with_weights(text, return_word_ids, **options)
            cut = [token[0] for token in tokens[MAX_TOKENS - 1 : -1] if isinstance(token[0], int)]
            warn_of_cut(Tokens((), tokenizer.text_of(cut)))
            return [within_limit(tokens)]

        def literal(self, text: str) -> list[list[tuple]]:
            """`text` as it stands, parentheses and all."""
            if not text:
                return [NULL_PROMPT]
            tokens = tokenizer(text)
            warn_of_cut(tokens)
            return [[(token, 1.0) for token in tokens.padded_ids]]

    class MochiTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}):
            super().__init__(embedding_directory, tokenizer_data, clip_name=CLIP_NAME, tokenizer=MochiT5Tokens)

    return MochiTokenizer


def text_model_class(config: TextConfig) -> type:
    """A class that the host can make its text encoder of."""
    host_config = {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "model_type": "t5",
    }

    class MochiT5(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] = {}):
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=host_config,
                special_tokens={"end": END_ID, "pad": PAD_ID},
                model_class=comfy.text_encoders.t5.T5,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options,
            )

        def process_tokens(self, tokens: list[list[Any]], device: torch.device) -> tuple[Any, ...]:
            """The host's, but an end token inside the text ends nothing: only the padding at the end is masked."""
            embeds, mask, _, *rest = super().process_tokens(tokens, device)
            padding = [sum(1 for _ in takewhile(_is_padding, reversed(row))) for row in tokens]
            places = torch.arange(mask.shape[1], device=mask.device)
            mask = torch.stack([places < mask.shape[1] - count for count in padding]).to(mask.dtype)
            return embeds, mask, mask.sum(1).tolist(), *rest

    class MochiTextModel(comfy.sd1_clip.SD1ClipModel):
        def __init__(
            self,
            weights: Mapping[str, Weight],
            device: Any = "cpu",
            dtype: Any = None,
            model_options: dict[str, Any] = {},
        ):
            super().__init__(
                device=device, dtype=dtype, name=CLIP_NAME, clip_model=MochiT5, model_options=model_options
            )
            # Here, for the host looks at the weights, and may load them to a device, as soon as this is made.
            fill_native(self.t5xxl.transformer, weights)

        def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> Any:
            if token_weight_pairs[CLIP_NAME] == [NULL_PROMPT]:
                device = _host.intermediate_device()
                mask = torch.zeros(1, MAX_TOKENS, dtype=torch.int64, device=device)
                return torch.zeros(1, MAX_TOKENS, config.d_model, device=device), None, {"attention_mask": mask}
            return super().encode_token_weights(token_weight_pairs)

    return MochiTextModel


def _is_padding(token: Any) -> bool:
    return isinstance(token, int) and token == PAD_ID


class _Target:
    """What the host's CLIP is made of."""

    def __init__(self, config: TextConfig, weights: Mapping[str, Weight], tokenizer: Tokenizer):
        self.clip = text_model_class(config)
        self.tokenizer = tokenizer_class(tokenizer, config.d_model)
        self.params: dict[str, Any] = {"weights": weights}


def tokenizer_beside(path: str) -> Path | None:
    """The tokenizer that belongs to a T5 folder: in it, or in `tokenizer` beside it as diffusers has it."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if any((place / name).is_file() for name in TOKENIZER_NAMES):
            return place
    return None


def load_clip(path: str, tokenizer_path: str | Path, dtype: torch.dtype | None) -> comfy.sd.CLIP:
    """The host's CLIP object around the T5 of a file. Raises `MochiError` kinds on a bad file."""
    file = open_t5(path)
    config = file.config
    fixed = (config.relative_attention_num_buckets, config.relative_attention_max_distance, config.feed_forward_proj)
    if fixed != (32, 128, "gated-gelu"):
        raise ConfigError(
            f"{path} is a T5 with {fixed[0]} position buckets to distance {fixed[1]} and {fixed[2]} layers",
            "the host's T5 has 32 buckets to distance 128 and gated-gelu layers",
            "Use a T5 v1.1 encoder",
        )
    tokenizer = read_tokenizer(tokenizer_path)
    largest = max(tokenizer.vocabulary().values())
    if largest >= config.vocab_size:
        raise ConditioningError(
            f"The tokenizer {tokenizer_path} has token {largest}",
            f"this T5 knows {config.vocab_size}",
            "Choose the tokenizer that belongs to it",
        )
    weights = wanted(file.entries, dtype)
    if not isinstance(weights["shared.weight"], torch.Tensor):  # an embedding cannot stay packed
        weights["shared.weight"] = plain(weights["shared.weight"], torch.bfloat16)
    # Built on the CPU whatever the host would choose: the file's tensors become the parameters.
    held = weight_dtype(weights) or torch.bfloat16
    options = {"dtype": held, "initial_device": torch.device("cpu"), **quantized_options(weights)}
    return comfy.sd.CLIP(
        _Target(config, weights, tokenizer),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options=options,
    )


def encode(clip: Any, text: str, weighting: bool) -> Any:
    """A prompt as CONDITIONING, literal unless `weighting`. Raises `ConditioningError` when `clip` is no T5."""
    tokenizer = getattr(getattr(clip, "tokenizer", None), f"clip_{CLIP_NAME}", None)
    if tokenizer is None:
        raise ConditioningError(
            f"The CLIP has no {CLIP_NAME} tokenizer",
            "Mochi's prompts are encoded by a T5",
            "Load one with Mochi Video T5 Loader, or the host's CLIP loader with type mochi",
        )
    if not weighting and hasattr(tokenizer, "literal"):
        return clip.encode_from_tokens_scheduled({CLIP_NAME: tokenizer.literal(text)})
    # A CLIP of the host's own knows no literal text but escaped parentheses, and neither of Mochi's prompt rules.
    tokens = clip.tokenize(text if weighting else text.replace("(", "\\(").replace(")", "\\)"))
    tokens[CLIP_NAME] = [within_limit(row) for row in tokens[CLIP_NAME]]
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if not text:
        conditioning = [
            [torch.zeros_like(features), {**options, "attention_mask": torch.zeros_like(options["attention_mask"])}]
            for features, options in conditioning
        ]
    return conditioning


def within_limit(tokens: list[tuple]) -> list[tuple]:
    """At most 256 tokens, the end token last."""
    return tokens if len(tokens) <= MAX_TOKENS else tokens[: MAX_TOKENS - 1] + tokens[-1:]
