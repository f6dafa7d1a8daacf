"""The pack as it is published: what the registry's own tools, and tools that test packs, say of it.

All of it runs without a network: `comfy node validate` and `pack`, comfy-import-guard against the sources of the
ComfyUI that is there, and comfy-test's levels against that ComfyUI, running, with nothing in it but the published
files. They see this folder's tracked files and those that could be: no virtual environment, no cache.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mochi_core
from scripts import comfyui
from tests.conftest import missing_peer

PUBLISHED_FOLDERS = {"js", "locales", "mochi_core", "nodes", "workflows"}
PUBLISHED_FILES = {
    ".comfyignore",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "__init__.py",
    "_bootstrap.py",
    "pyproject.toml",
    "requirements.txt",
}
# Types, which say nothing to a page, and what made the embedded checkpoint.
ONLY_CHECKS = ("js/types/", "mochi_core/training/tiny/")
# What makes the pack run with nothing to download.
EMBEDDED = {
    "mochi_core/assets/tiny/mochi_video_tiny_dit.safetensors",
    "mochi_core/assets/tiny/mochi_video_tiny_t5.safetensors",
    "mochi_core/assets/tiny/mochi_video_tiny_vae.safetensors",
    "mochi_core/assets/tiny/tokenizer.json",
}

LEVELS = ("syntax", "hazards", "install", "registration", "javascript", "instantiation")
CONFIG = f"[test]\nlevels = {json.dumps(LEVELS)}\n"
# comfy-test makes the nodes in a process of its own, which does not tell ComfyUI that there is no GPU.
WITHOUT_GPU = """
import os, sys
if os.path.isfile("comfy/options.py"):
    sys.path.insert(0, os.getcwd())
    import comfy.options
    comfy.options.enable_args_parsing()
    sys.argv.append("--cpu")
"""

SECONDS = 120


def needed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        missing_peer(f"{package} is not installed: run `make setup`")


def git(*arguments: str, cwd: Path) -> bytes:
    settings = ("-c", "safe.directory=*", "-c", "user.name=test", "-c", "user.email=test@localhost")
    return subprocess.run(["git", *settings, *arguments], cwd=cwd, check=True, capture_output=True).stdout


def tracked() -> list[str]:
    """This folder's files as git lists them: tracked, and new ones that it does not ignore."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=comfyui.REPO).decode()
    return sorted({name for name in listed.split("\0") if name and (comfyui.REPO / name).is_file()})


@dataclass
class Published:
    """The published files in the custom nodes of a folder that looks like a ComfyUI, and how tools are run on them."""

    export: Path
    base: Path
    home: Path

    @property
    def pack(self) -> Path:
        return self.base / "custom_nodes" / "mochi-video"

    def run(self, module: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """A tool by its module, told not to report to anybody, with a home of its own."""
        needed(module.partition(".")[0])
        quiet = {"HOME": str(self.home), "XDG_CONFIG_HOME": str(self.home), "DO_NOT_TRACK": "1"}
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            env={**os.environ, **quiet, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("registry")
    made = Published(folder / "export", folder / "base", folder / "home")
    made.home.mkdir()
    for name in tracked():
        (made.export / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(comfyui.REPO / name, made.export / name)
    git("init", "--quiet", cwd=made.export)
    git("add", "--all", cwd=made.export)
    done = made.run("comfy_cli", "--skip-prompt", "node", "pack", cwd=made.export)
    assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(made.export / "node.zip") as archive:
        archive.extractall(made.pack)
    (made.export / "node.zip").unlink()
    return made


@pytest.fixture(scope="module")
def metadata() -> Any:
    """pyproject.toml as the registry reads it."""
    needed("comfy_cli")
    from comfy_cli.registry.config_parser import extract_node_configuration

    return extract_node_configuration(str(comfyui.REPO / "pyproject.toml"))


@pytest.fixture(scope="module")
def pyproject() -> Any:
    needed("tomlkit")
    import tomlkit

    return tomlkit.parse((comfyui.REPO / "pyproject.toml").read_text(encoding="utf-8"))


# What the registry says


def test_the_registry_finds_nothing_to_complain_about(published: Published) -> None:
    done = published.run("comfy_cli", "--skip-prompt", "node", "validate", cwd=published.export)
    assert done.returncode == 0, done.stdout
    assert "All validation checks passed" in done.stdout
    assert "Warning" not in done.stdout


def test_the_registry_would_find_a_call_of_eval(published: Published, tmp_path: Path) -> None:
    shutil.copytree(published.pack, tmp_path / "pack")
    (tmp_path / "pack" / "nodes" / "careless.py").write_text('eval("1")\n')
    done = published.run("comfy_cli", "--skip-prompt", "node", "validate", cwd=tmp_path / "pack")
    assert "careless.py" in done.stdout


def test_the_registry_reads_who_publishes_what_for_which_hosts(metadata: Any) -> None:
    project, pack = metadata.project, metadata.tool_comfy
    assert project.name == "mochi-video"  # frozen: the registry and people's graphs know the pack by it
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", pack.publisher_id)
    assert pack.display_name == "Mochi Video"
    assert project.description
    assert project.license.text == "Apache-2.0"
    assert project.supported_comfyui_version == f">={comfyui.VERSION}"  # the oldest host that the tests run on


def test_the_version_is_semantic_and_the_same_for_the_registry_and_for_python(metadata: Any) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata.project.version)
    assert metadata.project.version == mochi_core.__version__


def test_the_registry_accepts_every_system_and_accelerator_that_is_named(metadata: Any, pyproject: Any) -> None:
    named = pyproject["project"]["classifiers"]
    accepted = [f"Operating System :: {value}" for value in metadata.project.supported_os]
    accepted += [f"Environment :: {value}" for value in metadata.project.supported_accelerators]
    assert accepted
    assert sorted(accepted) == sorted(one for one in named if one.startswith(("Operating System", "Environment")))


def test_every_classifier_is_one_that_the_package_index_knows(pyproject: Any) -> None:
    needed("trove_classifiers")
    from trove_classifiers import classifiers

    assert set(pyproject["project"]["classifiers"]) <= classifiers


def test_the_page_s_files_are_named_once(pyproject: Any) -> None:
    assert "web" not in pyproject["tool"]["comfy"]  # the pack's own WEB_DIRECTORY would serve them a second time


def test_what_hosts_lack_is_a_part_of_what_the_library_needs_and_never_torch(pyproject: Any) -> None:
    lines = (comfyui.REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert set(required) <= set(pyproject["project"]["dependencies"])
    assert not [line for line in required if line.startswith("torch")]


# What is published


def test_what_runs_is_published_and_nothing_else(published: Published) -> None:
    files = {str(path.relative_to(published.pack).as_posix()) for path in published.pack.rglob("*") if path.is_file()}
    runs = {name for name in tracked() if name.partition("/")[0] in PUBLISHED_FOLDERS | PUBLISHED_FILES}
    runs -= {name for name in runs if name.startswith(ONLY_CHECKS)}
    assert sorted(runs - files) == [], "left out, though it runs"
    assert sorted(files - runs) == [], "published, though it does not run"
    assert files >= EMBEDDED | PUBLISHED_FILES


# What hosts say


def guarded(published: Published, cache: Path) -> dict[str, Any]:
    """What comfy-import-guard found of the pack in `base`."""
    arguments = ("--json", "--quiet", "--offline", "--cache-dir", str(cache), "check", "--strict", "--no-update")
    where = ("--comfy-dir", str(published.base), "--target", "HEAD")
    done = published.run("comfy_import_guard.cli", *arguments, *where, cwd=cache)
    (found,) = json.loads(done.stdout)["packs"]
    assert done.returncode == (0 if found["verdict"] == "SAFE" else 1)
    return found


@pytest.fixture(scope="module")
def sources(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's sources in a git repository, where comfy-import-guard looks for them."""
    cache = tmp_path_factory.mktemp("guard")
    repository = cache / "ComfyUI"
    folders = shutil.ignore_patterns("*.json", "*.txt", "*.model", "*.pyc", "__pycache__")
    shutil.copytree(comfyui_path / "comfy", repository / "comfy", ignore=folders)
    git("init", "--quiet", cwd=repository)
    git("add", "--all", cwd=repository)
    git("commit", "--quiet", "--message", "host", cwd=repository)
    return cache


def test_all_that_we_import_and_call_of_the_host_is_there_and_takes_our_arguments(
    published: Published, sources: Path
) -> None:
    found = guarded(published, sources)
    assert found["references"] > 50
    assert found["verdict"] == "SAFE", found


def test_an_import_that_the_host_does_not_have_would_be_found(
    published: Published, sources: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "custom_nodes" / "mochi-video"
    shutil.copytree(published.pack, pack)
    with (pack / "nodes" / "size.py").open("a") as file:
        file.write("\nfrom comfy.utils import no_such_thing\n")
    found = guarded(Published(published.export, tmp_path, published.home), sources)
    assert [row["dotted"] for row in found["breaking"]] == ["comfy.utils.no_such_thing"]


@dataclass
class Attached:
    """What comfy-test said, and how the host described its nodes."""

    said: str
    object_info: dict[str, Any]


def graphs() -> list[Path]:
    return sorted((comfyui.REPO / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def attached(published: Published, comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Attached:
    """comfy-test attached to a host that has the published pack and nothing else."""
    needed("comfy_test")
    folder = tmp_path_factory.mktemp("comfy-test")
    (folder / "sitecustomize.py").write_text(WITHOUT_GPU)
    for path in comfyui_path.iterdir():  # it looks for the host's code around the pack
        if path.suffix == ".py" or (path / "__init__.py").exists() or path.name.startswith("comfy"):
            (published.base / path.name).symlink_to(path)
    (folder / "comfy-test.toml").write_text(CONFIG)
    with comfyui.Host(published.base, published.base / "output", folder / "server.log") as host:
        done = published.run(
            "comfy_test",
            "run",
            "--config",
            str(folder / "comfy-test.toml"),
            "--server-url",
            f"http://127.0.0.1:{host.port}",
            cwd=published.pack,
            PYTHONPATH=os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
            COMFY_TEST_LOGS_DIR=str(folder),
            COMFY_TEST_WORKSPACE_DIR=str(folder / "workspaces"),
        )
        return Attached(done.stdout, host.get("/object_info"))


@pytest.mark.parametrize("level", LEVELS)
def test_the_published_pack_passes_this_level_of_comfy_test(attached: Attached, level: str) -> None:
    assert f"[{level.upper()}] PASSED" in attached.said, attached.said[-4000:]


def test_comfy_test_sees_no_hazard_that_is_more_than_a_matter_of_judgement(attached: Attached) -> None:
    assert re.findall(r"^=== ([A-D]) -- ", attached.said, re.MULTILINE) in ([], ["D"])


def readable(object_info: dict[str, Any], workflow: dict[str, Any]) -> dict[str, Any]:
    """Descriptions of nodes in the words that comfy-test's validator knows, which are older than every node of ours.

    It takes a COMBO for a socket, so that all widgets after one get each other's values, and knows neither notes nor
    the widget that pages put beside a seed. Whoever runs the workflow is taken to have the files it names.
    """
    values = [value for node in workflow["nodes"] for value in node.get("widgets_values", [])]
    files = [value for value in values if isinstance(value, str) and re.search(r"\.\w+$|/$", value)]
    found: dict[str, Any] = {}
    for name, info in object_info.items():
        inputs: dict[str, Any] = {}
        for group in ("required", "optional"):
            for key, (kind, *rest) in info["input"].get(group, {}).items():
                options = rest[0] if rest else {}
                choices = options.get("options", []) if kind == "COMBO" else kind
                inputs[key] = [[*choices, *files] if isinstance(choices, list) else kind, options]
                if options.get("control_after_generate"):
                    inputs[f"{key}: control"] = [["fixed", "increment", "decrement", "randomize"], {}]
        found[name] = {**info, "input": {"required": inputs}}
    return found | {note: {"name": note, "input": {}, "output": []} for note in ("Note", "MarkdownNote")}


@pytest.mark.parametrize("graph", graphs(), ids=lambda path: path.stem)
def test_workflows_have_only_nodes_links_and_values_that_the_host_takes(attached: Attached, graph: Path) -> None:
    from comfy_test.comfyui.validator import WorkflowValidation

    workflow = json.loads(graph.read_text(encoding="utf-8"))
    validation = WorkflowValidation(readable(attached.object_info, workflow))
    assert [str(error) for error in validation.validate(workflow).errors] == []
    ours = [node for node in workflow["nodes"] if re.fullmatch(r"MochiVideo\w+Loader", node["type"])]
    ours[0]["widgets_values"][0] = "no such choice"
    (error,) = validation.validate(workflow).errors
    assert "no such choice" in str(error)
