"""`mochi_core` has one name, and two versions of it never meet."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
REGISTER = "import sys; sys.path.insert(0, {pack!r}); import _bootstrap; _bootstrap.register_core(); "
SHOW = "import mochi_core; print(mochi_core.__file__)"


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    # -S -E: nothing installed, so that only `path` can bring another copy
    return subprocess.run(
        [sys.executable, "-S", "-E", "-c", f"import sys; sys.path.insert(0, {str(path)!r}); {code}"],
        capture_output=True,
        text=True,
        cwd=path,
    )


def pack(folder: Path, version: str) -> Path:
    """A pack of this shape with nothing in it but a version."""
    (folder / "mochi_core").mkdir(parents=True)
    (folder / "mochi_core" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    (folder / "_bootstrap.py").write_text((REPO / "_bootstrap.py").read_text())
    return folder


def test_the_packs_own_copy_is_registered(tmp_path: Path) -> None:
    ours = pack(tmp_path / "ours", "1.0.0")
    done = run(REGISTER.format(pack=str(ours)) + SHOW, tmp_path)
    assert done.stdout.strip() == str(ours / "mochi_core" / "__init__.py"), done.stderr


def test_registering_twice_is_harmless(tmp_path: Path) -> None:
    ours = pack(tmp_path / "ours", "1.0.0")
    done = run(REGISTER.format(pack=str(ours)) * 2 + SHOW, tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_installed_copy_of_the_same_version_is_fine(tmp_path: Path) -> None:
    ours, installed = pack(tmp_path / "ours", "1.0.0"), pack(tmp_path / "installed", "1.0.0")
    done = run(f"sys.path.insert(0, {str(installed)!r}); " + REGISTER.format(pack=str(ours)) + SHOW, tmp_path)
    assert done.returncode == 0, done.stderr


def test_another_version_is_refused_whether_installed_or_already_imported(tmp_path: Path) -> None:
    ours, installed = pack(tmp_path / "ours", "1.0.0"), pack(tmp_path / "installed", "2.0.0")
    for before in ("", "import mochi_core; "):
        code = f"sys.path.insert(0, {str(installed)!r}); {before}import importlib.util as u; "
        code += f"s = u.spec_from_file_location('_bootstrap', {str(ours / '_bootstrap.py')!r}); "
        code += "b = u.module_from_spec(s); s.loader.exec_module(b); b.register_core()"
        done = run(code, tmp_path)
        assert "mochi_core 2.0.0 is installed at" in done.stderr
        assert "this pack brings mochi_core 1.0.0" in done.stderr and "pip uninstall mochi-video" in done.stderr
