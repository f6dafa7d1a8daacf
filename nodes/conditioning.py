"""Prompts."""

from comfy_api.latest import io

from . import _host
from .native_clip import encode


class MochiVideoTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return _host.schema(
            node_id="MochiVideoTextEncode",
            display_name="Mochi Video Text Encode",
            category="Mochi Video/conditioning",
            description="A prompt as Mochi was trained to read it: literally, 256 tokens at most. Leave the negative "
            "prompt empty for the model's own null prompt.",
            search_aliases=["clip text encode", "prompt", "t5 encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="A T5, from Mochi Video T5 Loader."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the video shows. Beyond 256 tokens it is cut, and the log says what was cut.",
                ),
                _host.advanced(
                    io.Boolean.Input(
                        "weighting",
                        default=False,
                        tooltip="Read (word:1.2) and embedding:name as the host's own text encode does. Off: text is "
                        "literal, parentheses and all.",
                    )
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Features of 256 tokens and which of them are real.")],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, text: str, weighting: bool) -> io.NodeOutput:
        return io.NodeOutput(encode(clip, text, weighting))
