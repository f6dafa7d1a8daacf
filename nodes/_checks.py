"""What is wrong with a node's inputs: said when a prompt is queued, and once more when it runs.

Each function returns what is wrong with a value, or the empty text: `a(...) or b(...) or True` answers the host's
`validate_inputs`. When a prompt is queued, a value that comes over a wire is None and passes; `at_run` looks again.

The host checks neither options nor ranges of inputs that `validate_inputs` names, and repeats its answer for each.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from comfy_api.latest import io

from mochi_core.errors import MochiError

# How many options an error lists, and how much of a value it quotes.
OPTIONS_SHOWN = 12
LONGEST_QUOTE = 300


class InputError(ValueError):
    """An input that was found to be wrong when its node ran."""


def quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def not_among(**choices: tuple[str | None, Iterable[str]]) -> str:
    """Of values that must be among their options: `name=(value, options)`."""
    for name, (value, options) in choices.items():
        options = list(options)
        if value is not None and value not in options:
            shown = ", ".join(options[:OPTIONS_SHOWN]) + (", ..." if len(options) > OPTIONS_SHOWN else "")
            return f"{name} is {quoted(value)}: it must be one of {shown}. Choose one of them."
    return ""


def out_of_range(node: type[io.ComfyNode], **values: float | None) -> str:
    """Of numbers that must lie in the range of their input; NaN lies in none."""
    ranges = {
        one.id: (one.min, one.max) for one in node.define_schema().inputs if getattr(one, "max", None) is not None
    }
    for name, value in values.items():
        # What is no number at all the host refuses by itself.
        if name not in ranges or not isinstance(value, int | float):
            continue
        least, most = ranges[name]
        if not least <= value <= most:
            return f"{name} is {value}: it must be from {least} to {most}. Use a number of that range."
    return ""


def refused_by(check: Callable[..., Any], *values: Any) -> str:
    """Of values that must fit together: what `check(*values)` has against them."""
    if None in values:
        return ""
    try:
        check(*values)
    except MochiError as error:
        return str(error)
    return ""


def at_run(node: type[io.ComfyNode], **inputs: Any) -> None:
    """What a node does first: all inputs are known now, and the host lets NaN pass. Raises `InputError`."""
    for name, value in inputs.items():
        if value is None:
            raise InputError(f"{name} is null: it must have a value. Leave it out for its default, or set it.")
    named = inspect.signature(node.validate_inputs).parameters
    answer = node.validate_inputs(**{name: value for name, value in inputs.items() if name in named})
    wrong = answer if answer is not True else out_of_range(node, **inputs)
    if wrong:
        raise InputError(wrong)
