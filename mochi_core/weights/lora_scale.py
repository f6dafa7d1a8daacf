"""How strong a LoRA is: what its file says of alpha and rank, in the ways that trainers say it."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import LoraError
from . import files
from .files import TYPE_NAMES

log = logging.getLogger(__name__)

PEFT_METADATA = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"
# What PEFT takes when a config does not say alpha.
PEFT_ALPHA = 8
GENMO_KINDS = ("qkv_proj", "out_proj")
# PEFT's patterns are regular expressions. These parts of them cannot keep a machine busy for ever, if few repeat.
MOST_REPEATS = 2
SAFE_PATTERN = re.compile(r"\^?(?:[\w.-]|\\\.|\\d\+?|\[0-9\]\+?|\.\*|\.\+)+\$?")


class Scales:
    """`alpha / rank` of each layer of a file, as it was trained."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        """Raises `LoraError` when what the file says cannot be understood: nothing is guessed then."""
        self.path = path
        self.genmo = _parsed_json(path, metadata.get("kwargs"), "kwargs")
        self.peft = _peft_config(path, metadata)
        self.told = False

    def __call__(self, target: str, spelling: str, rank: int, alpha: torch.Tensor | None) -> float:
        """The scale of our layer `target`, which the file calls `spelling`; `alpha` is the file's tensor for it."""
        if alpha is not None:
            if alpha.numel() != 1 or alpha.dtype not in TYPE_NAMES:
                raise self._wrong(f"an alpha of shape {tuple(alpha.shape)} in {alpha.dtype} for {spelling}")
            return self._ratio(alpha.item(), rank)
        if self.peft is not None:
            return self._peft_scale(self.peft, spelling, rank)
        if self.genmo is not None:
            return self._genmo_scale(self.genmo, target, rank)
        if not self.told:
            log.info("%s says nothing of alpha for %s: taken as trained with alpha = rank", self.path, spelling)
            self.told = True
        return 1.0

    def _genmo_scale(self, kwargs: Mapping[str, Any], target: str, rank: int) -> float:
        """genmo keeps one rank and alpha for all q, k, v projections, another for all output projections.

        It trains no other layers. Those that another trainer put into its format have the scale that both kinds share.
        """
        kinds = ("qkv_proj",) if ".attn.qkv_" in target else ("out_proj",) if ".attn.proj_" in target else GENMO_KINDS
        ratios = set()
        for kind in kinds:
            alpha, said = kwargs.get(f"{kind}_lora_alpha", rank), kwargs.get(f"{kind}_lora_rank", rank)
            if said != rank:
                raise self._wrong(f"{kind}_lora_rank = {said!r} and alpha = {alpha!r}, but {target} has rank {rank}")
            ratios.add(self._ratio(alpha, rank))
        if len(ratios) > 1:
            raise self._wrong(f"two scales, {sorted(ratios)}, and not which is that of {target}")
        return ratios.pop()

    def _peft_scale(self, config: Mapping[str, Any], spelling: str, rank: int) -> float:
        alpha = self._by_pattern(config, "alpha_pattern", spelling, config.get("lora_alpha", PEFT_ALPHA))
        said = self._by_pattern(config, "rank_pattern", spelling, config.get("r", rank))
        stabilised = config.get("use_rslora", False)
        if said != rank:
            raise self._wrong(f"rank {said!r} for {spelling}, whose tensors have rank {rank}")
        if not isinstance(stabilised, bool):
            raise self._wrong(f"use_rslora = {stabilised!r}")
        return self._ratio(alpha, math.sqrt(rank) if stabilised else rank)

    def _by_pattern(self, config: Mapping[str, Any], name: str, spelling: str, usual: Any) -> Any:
        """What the first pattern that fits a layer gives, by PEFT's rule for them."""
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise self._wrong(f"{name} = {str(patterns)[:80]}")
        for pattern, value in patterns.items():
            repeats = pattern.count("*") + pattern.count("+")
            if len(pattern) > 200 or repeats > MOST_REPEATS or not SAFE_PATTERN.fullmatch(pattern):
                raise self._wrong(f"{name} with {pattern[:80]!r}, which is not understood")
            # PEFT's own expression: an anchored pattern means the whole name, which may have prefixes in a file.
            if re.match(rf"(.*\.)?(?:{pattern.removeprefix('^').removesuffix('$')})$", spelling):
                return value
        return usual

    def _ratio(self, alpha: Any, rank: float) -> float:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise self._wrong(f"alpha = {str(alpha)[:80]}")
        try:
            scale = alpha / rank
        except OverflowError:  # a whole number that no float can hold
            scale = math.inf
        if not math.isfinite(scale):
            raise self._wrong(f"a scale of {scale}")
        return scale

    def _wrong(self, what: str) -> LoraError:
        return LoraError(
            f"{self.path} says {what}",
            "rank and alpha must be numbers that fit its tensors",
            "The file or its config is damaged: get it again",
        )


def _parsed_json(path: Path, text: str | None, name: str) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    return _as_object(path, values, name, text)


def _as_object(path: Path, values: Any, name: str, text: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise LoraError(f"{path} has {name} = {text[:80]!r}", "it must be a JSON object", "Get the file again")
    return values


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's settings: inside the file as diffusers writes them, or in the JSON that PEFT writes beside it."""
    values = _parsed_json(path, metadata.get(PEFT_METADATA), PEFT_METADATA)
    if values is not None:
        own = {name.removeprefix("transformer."): v for name, v in values.items() if name.startswith("transformer.")}
        return own or {name: value for name, value in values.items() if "." not in name} or None
    beside = path / PEFT_CONFIG if path.is_dir() else path.with_name(PEFT_CONFIG)
    if not beside.is_file() or not _belongs(path):
        return None
    values = files.read_json(beside)
    return _as_object(path, values, PEFT_CONFIG, str(values))


def _belongs(path: Path) -> bool:
    """Whether the config in a folder is this file's: it is PEFT's, or there is no other."""
    return path.is_dir() or path.stem.startswith("adapter_model") or len(list(path.parent.glob("*.safetensors"))) == 1
