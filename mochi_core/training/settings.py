"""Settings from YAML: every key known, every value of its type, and the nearest right key where one is wrong.

Settings are frozen dataclasses; a dataclass within one is a group of keys.
"""

import contextlib
import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import TrainingError

Settings = TypeVar("Settings")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
LONGEST = 1_000_000


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, as plain values. Raises `TrainingError` when it cannot be read."""
    path = Path(path)
    try:
        if path.stat().st_size > LONGEST:
            raise ValueError(f"it has more than {LONGEST} bytes")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read ({error})", "it must be a YAML file", "Correct it") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds {type(content).__name__}", "it must hold keys with values", "Correct it")
    return content


def settings(kind: type[Settings], values: Any, name: str = "") -> Settings:
    """`values` as settings of a kind; `name` is where in the file they stand.

    Raises `TrainingError`, or what the dataclass raises.
    """
    known = {field.name: field for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    if not isinstance(values, Mapping):
        raise TrainingError(
            f"{name or 'The configuration'} is {values!r}", f"it must have keys: {', '.join(known)}", "Correct it"
        )
    hints = get_type_hints(kind)
    given = {}
    for key, value in values.items():
        if key not in known:
            raise TrainingError(
                f"The configuration has {_join(name, key)}",
                f"there is no such key; {name or 'the top'} knows {', '.join(known)}",
                _nearest(str(key), list(known)),
            )
        given[key] = _value(hints[key], value, _join(name, key))
    lacking = [key for key, field in known.items() if key not in given and _required(field)]
    if lacking:
        raise TrainingError(
            f"The configuration lacks {', '.join(_join(name, key) for key in lacking)}", "it must be there", "Add it"
        )
    return kind(**given)


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [one for one in arguments if one is not type(None)]
        return _value(hint, value, name)
    if is_dataclass(hint):
        return settings(hint, {} if value is None else value, name)  # pyright: ignore[reportArgumentType]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TrainingError(f"{name} is {value!r}", "it must be a list", "Write it as [a, b]")
        inner = arguments[0]
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise TrainingError(f"{name} is {value!r}", f"it must have {len(arguments)} items", "Correct it")
        return tuple(_value(inner, one, f"{name}[{index}]") for index, one in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise TrainingError(f"{name} is {value!r}", "it must have keys with values", "Correct it")
        return {str(key): _value(arguments[1], one, _join(name, str(key))) for key, one in value.items()}
    return _plain(hint, value, name)


def _plain(hint: type, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 takes 2e-4, which everybody writes, for text.
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if not fits or (hint is float and not math.isfinite(value)):  # pyright: ignore
        raise TrainingError(f"{name} is {value!r}", f"it must be {WORDS[hint]}", "Correct it")
    return value


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else "Remove it"


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def checked(name: str, holds: bool, value: Any, rule: str, remedy: str) -> None:
    """Raises `TrainingError` unless a setting holds to its rule."""
    if not holds:
        raise TrainingError(f"{name} is {value!r}", f"it must be {rule}", remedy)
