"""LoRAs, one or several."""

from typing import Any

from comfy_api.latest import io

from . import _checks, _host, native_files
from .native_lora import with_loras

CATEGORY = "Mochi Video/loaders"
FOLDERS = ("loras",)
STACKED = 4


def _model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="From Mochi Video DiT Loader, or from another LoRA.")


def _name_input(name: str, options: list[str]) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=options,
        tooltip="A Mochi LoRA from models/loras, of any trainer: genmo, diffusers and PEFT, kohya.",
    )


def _strength_input(name: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=-20.0,
        max=20.0,
        step=0.01,
        tooltip="1 is as it was trained, 0 is off, below 0 is away from it.",
    )


class MochiVideoLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoLoraLoader",
            display_name="Mochi Video LoRA Loader",
            category=CATEGORY,
            description="Adds a LoRA to the model at the strength it was trained for, times yours. Works on every "
            "weight format; chain several in any order.",
            search_aliases=["load lora", "lora model only"],
            inputs=[
                _model_input(),
                _name_input("lora_name", native_files.file_names(FOLDERS)),
                _strength_input("strength"),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return native_files.no_such_lora("lora_name", lora_name, FOLDERS) or True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> str:
        return native_files.stamp((lora_name,), FOLDERS)

    @classmethod
    def execute(cls, model: io.Model.Type, lora_name: str, strength: float) -> io.NodeOutput:
        _checks.at_run(cls, lora_name=lora_name, strength=strength)
        return io.NodeOutput(with_loras(model, [(native_files.model_path(lora_name, FOLDERS), strength)]))


class MochiVideoLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [native_files.NO_LORA, *native_files.file_names(FOLDERS)]
        inputs = [_model_input()]
        for index in range(1, STACKED + 1):
            pair = [_name_input(f"lora_{index}", names), _strength_input(f"strength_{index}")]
            pair[0].default = native_files.NO_LORA
            inputs += pair if index <= 2 else [_host.advanced(one) for one in pair]
        return _host.schema(
            node_id="MochiVideoLoraStack",
            display_name="Mochi Video LoRA Stack",
            category=CATEGORY,
            description=f"Adds up to {STACKED} LoRAs to the model, each at its strength; their order does not matter.",
            search_aliases=["multi lora", "several loras"],
            inputs=inputs,
            outputs=[io.Model.Output(tooltip="The model with the LoRAs.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        lora_1: str | None = None,
        lora_2: str | None = None,
        lora_3: str | None = None,
        lora_4: str | None = None,
    ) -> bool | str:
        names = {"lora_1": lora_1, "lora_2": lora_2, "lora_3": lora_3, "lora_4": lora_4}
        wrong = (native_files.no_such_lora(name, value, FOLDERS, or_none=True) for name, value in names.items())
        return next(filter(None, wrong), "") or True

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        names = [str(inputs[f"lora_{index}"]) for index in range(1, STACKED + 1) if inputs.get(f"lora_{index}")]
        return native_files.stamp(names, FOLDERS)

    @classmethod
    def execute(cls, model: io.Model.Type, **inputs: Any) -> io.NodeOutput:
        _checks.at_run(cls, **inputs)
        loras = []
        for index in range(1, STACKED + 1):
            name, strength = inputs[f"lora_{index}"], inputs[f"strength_{index}"]
            if name != native_files.NO_LORA:
                loras.append((native_files.model_path(name, FOLDERS), strength))
        return io.NodeOutput(with_loras(model, loras))
