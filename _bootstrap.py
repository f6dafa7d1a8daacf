"""Gives `mochi_core` one import name.

ComfyUI imports a pack under its file-system path. Classes of a package imported that way cannot be unpickled in
another process, and two copies of one class are not the same class; so the package beside this file is registered
as top-level `mochi_core`.
"""

import importlib.util
import re
import sys
from pathlib import Path

PACK = Path(__file__).parent
INIT = PACK / "mochi_core" / "__init__.py"


def register_core() -> None:
    """Makes `import mochi_core` mean this pack's copy. Raises `ImportError` when another version is installed."""
    loaded = sys.modules.get("mochi_core")
    if loaded is not None:
        _refuse_another(Path(loaded.__file__ or ""))
        return
    installed = importlib.util.find_spec("mochi_core")
    if installed is not None and installed.origin:
        _refuse_another(Path(installed.origin))
    spec = importlib.util.spec_from_file_location("mochi_core", INIT, submodule_search_locations=[str(INIT.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mochi_core"] = module
    spec.loader.exec_module(module)


def _refuse_another(other: Path) -> None:
    if other.exists() and other.samefile(INIT):
        return
    ours, theirs = _version(INIT), _version(other)
    if ours != theirs:
        raise ImportError(
            f"mochi_core {theirs} is installed at {other.parent}, but this pack brings mochi_core {ours}: there can be "
            "only one. Run `pip uninstall mochi-video`, or install the same version of both."
        )


def _version(init: Path) -> str:
    match = (
        re.search(r'^__version__ = "([^"]+)"', init.read_text(encoding="utf-8"), re.MULTILINE)
        if init.exists()
        else None
    )
    return match[1] if match else "of an unknown version"
