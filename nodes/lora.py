"""LoRAs, one or several."""

from comfy_api.latest import io

from . import _host
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
                _name_input("lora_name", _host.file_names(FOLDERS)),
                _strength_input("strength"),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str) -> bool | str:
        return _host.valid_lora("lora_name", lora_name, FOLDERS)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> str:
        return _host.stamp((lora_name,), FOLDERS)

    @classmethod
    def execute(cls, model: io.Model.Type, lora_name: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(with_loras(model, [(_host.model_path(lora_name, FOLDERS), strength)]))


class MochiVideoLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = [_host.NO_LORA, *_host.file_names(FOLDERS)]
        inputs = [_model_input()]
        for index in range(1, STACKED + 1):
            pair = [_name_input(f"lora_{index}", names), _strength_input(f"strength_{index}")]
            pair[0].default = _host.NO_LORA
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
    def validate_inputs(cls, lora_1: str, lora_2: str, lora_3: str, lora_4: str) -> bool | str:
        for name, value in {"lora_1": lora_1, "lora_2": lora_2, "lora_3": lora_3, "lora_4": lora_4}.items():
            checked = _host.valid_lora(name, value, FOLDERS, or_none=True)
            if checked is not True:
                return checked
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        names = [str(inputs[f"lora_{index}"]) for index in range(1, STACKED + 1) if inputs.get(f"lora_{index}")]
        return _host.stamp(names, FOLDERS)

    @classmethod
    def execute(cls, model: io.Model.Type, **inputs: object) -> io.NodeOutput:
        chosen = [(str(inputs[f"lora_{index}"]), inputs[f"strength_{index}"]) for index in range(1, STACKED + 1)]
        loras = [(_host.model_path(name, FOLDERS), float(s)) for name, s in chosen if name != _host.NO_LORA]  # pyright: ignore[reportArgumentType]
        return io.NodeOutput(with_loras(model, loras))
