"""Genmo's own `lora.yaml`, read as a configuration of ours.

Of its Python code in texts (`sigma_schedule_python_code`) only what it was shipped with, and lists of numbers, are
understood; nothing is evaluated.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import TrainingError

MARKS = ("init_checkpoint_path", "checkpoint_dir", "train_data_dir")
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
SCHEDULE = re.compile(rf"\s*linear_quadratic_schedule\(\s*(\d+)\s*,\s*({NUMBER})\s*(?:,\s*(\d+)\s*)?\)\s*")
SCALES = re.compile(r"\s*\[([^\[\]]*)\]\s*(?:\*\s*(\d{1,6}))?\s*")
ATTENTION = {"sdpa": "sdpa", "flash": "flash", "sage": "auto"}


def is_reference(values: Mapping[str, Any]) -> bool:
    """Whether these are keys of the reference's configuration."""
    return any(mark in values for mark in MARKS)


def translated(values: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The same in our keys, and notes on what has no meaning here.

    Raises `TrainingError` on a key that the reference does not have, or on code that is not understood.
    """
    return _Translation(values).whole()


class _Translation:
    def __init__(self, values: Mapping[str, Any]):
        self.values, self.notes = values, []

    def whole(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        top = self._group(
            "",
            self.values,
            *MARKS,
            "attention_mode",
            "single_video_mode",
            "wandb",
            "optimizer",
            "model",
            "training",
            "sample",
        )
        for mark in MARKS:
            if not isinstance(top.get(mark), str):
                raise TrainingError(f"The configuration has {mark} = {top.get(mark)!r}", "it must be a path", "Add it")
        training = self._group(
            "training",
            top.get("training"),
            "model_dtype",
            "warmup_steps",
            "num_qkv_checkpoint",
            "num_ff_checkpoint",
            "num_post_attn_checkpoint",
            "num_steps",
            "save_interval",
            "caption_dropout",
            "grad_clip",
            "save_safetensors",
        )
        if top.get("wandb"):
            self.notes.append("wandb: metrics go to metrics.jsonl and TensorBoard")
        if training.get("save_safetensors") is False:
            self.notes.append("training.save_safetensors: only safetensors are written")
        kind, lora = self._model(top.get("model"))
        ours: dict[str, Any] = {
            "dataset": self._path(top["train_data_dir"]),
            "output": self._path(top["checkpoint_dir"]),
            "kind": kind,
            "model": {
                "dit": self._path(top["init_checkpoint_path"]),
                "attention": ATTENTION.get(top.get("attention_mode") or "sdpa", "auto"),
                "dtype": training.get("model_dtype", "bf16"),
            },
            "data": {"single_clip": bool(top.get("single_video_mode", False))},
            "optimizer": self._optimizer(top.get("optimizer")),
        }
        if lora:
            ours["lora"] = lora
        names = {"num_steps": "steps", "save_interval": "save_every", "grad_clip": "grad_clip"}
        ours |= {our: training[their] for their, our in names.items() if training.get(their) is not None}
        if training.get("caption_dropout") is not None:
            ours["data"]["caption_dropout"] = training["caption_dropout"]
        ours["optimizer"]["warmup"] = training.get("warmup_steps") or 0
        checkpoints = {"num_qkv_checkpoint": "qkv", "num_ff_checkpoint": "feed_forward"}
        checkpoints["num_post_attn_checkpoint"] = "post_attention"
        ours["memory"] = {our: training[their] for their, our in checkpoints.items() if training.get(their) is not None}
        self._samples(top.get("sample"), ours)
        return ours, tuple(self.notes)

    def _model(self, values: Any) -> tuple[str, dict[str, Any]]:
        model = self._group("model", values, "type", "kwargs")
        parts = ("rank", "alpha", "dropout")
        names = [f"{kind}_proj_lora_{part}" for kind in ("qkv", "out") for part in parts]
        kwargs = self._group("model.kwargs", model.get("kwargs"), *names)
        if model.get("type", "lora") != "lora":
            return "full", {}
        lora = {}
        for kind in ("qkv", "out"):
            said = {part: kwargs.get(f"{kind}_proj_lora_{part}") for part in parts}
            lora[kind] = {"rank": said["rank"] or 0, "alpha": said["alpha"], "dropout": said["dropout"] or 0.0}
            if said["rank"] and said["alpha"] is None:
                self.notes.append(f"model.kwargs.{kind}_proj_lora_alpha is not there: the rank is taken")
        return "lora", lora

    def _optimizer(self, values: Any) -> dict[str, Any]:
        said = self._group("optimizer", values, "lr", "weight_decay", "betas")
        names = {"lr": "rate", "weight_decay": "weight_decay", "betas": "betas"}
        return {our: said[their] for their, our in names.items() if said.get(their) is not None}

    def _samples(self, values: Any, ours: dict[str, Any]) -> None:
        if not values:
            return
        sample = self._group("sample", values, "interval", "output_dir", "decoder_path", "prompts", "seed", "kwargs")
        kwargs = self._group(
            "sample.kwargs",
            sample.get("kwargs"),
            "height",
            "width",
            "num_frames",
            "num_inference_steps",
            "sigma_schedule_python_code",
            "cfg_schedule_python_code",
        )
        if sample.get("decoder_path"):
            ours["model"]["vae"] = self._path(sample["decoder_path"])
        samples = {
            "every": sample.get("interval") or 0,
            "prompts": sample.get("prompts") or (),
            "seed": sample.get("seed"),
            "height": kwargs.get("height"),
            "width": kwargs.get("width"),
            "frames": kwargs.get("num_frames"),
            "steps": kwargs.get("num_inference_steps"),
            **self._schedule(kwargs.get("sigma_schedule_python_code")),
            **self._scales(kwargs.get("cfg_schedule_python_code")),
        }
        ours["samples"] = {name: value for name, value in samples.items() if value is not None}
        self.notes.append("sample.output_dir: samples go to the folder samples of the output")

    def _schedule(self, code: Any) -> dict[str, Any]:
        if code is None:
            return {}
        match = SCHEDULE.fullmatch(str(code))
        if match is None:
            raise self._code("sample.kwargs.sigma_schedule_python_code", code, "linear_quadratic_schedule(64, 0.025)")
        linear = None if match[3] is None else int(match[3])
        return {"steps": int(match[1]), "threshold": float(match[2]), "linear_steps": linear}

    def _scales(self, code: Any) -> dict[str, Any]:
        """`[6.0] * 32 + [4.5] * 32` as `6.0*32, 4.5*32`."""
        if code is None:
            return {}
        items = []
        for part in str(code).split("+"):
            match = SCALES.fullmatch(part)
            numbers = [] if match is None else [one.strip() for one in match[1].split(",")]
            if match is None or not all(re.fullmatch(NUMBER, one) for one in numbers):
                raise self._code("sample.kwargs.cfg_schedule_python_code", code, "[6.0] * 64")
            count = int(match[2] or 1)
            items += [f"{numbers[0]}*{count}"] if len(numbers) == 1 else numbers * count
        return {"cfg_schedule": ", ".join(items)}

    def _code(self, name: str, code: Any, example: str) -> TrainingError:
        return TrainingError(
            f"{name} is {code!r}", f"code is not run; only forms such as {example} are understood", f"Use {example}"
        )

    def _group(self, name: str, values: Any, *known: str) -> dict[str, Any]:
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise TrainingError(f"{name} is {values!r}", f"it must have keys: {', '.join(known)}", "Correct it")
        for key in values:
            if key not in known:
                where = f"{name}.{key}" if name else str(key)
                raise TrainingError(
                    f"The configuration has {where}",
                    f"the reference knows {', '.join(known)} there",
                    "Remove it, or write the configuration in this library's keys",
                )
        return dict(values)

    def _path(self, text: str) -> str:
        """A path with the reference's `${key}` filled in."""
        return re.sub(r"\$\{(\w+)\}", lambda match: str(self.values.get(match[1], match[0])), text)
