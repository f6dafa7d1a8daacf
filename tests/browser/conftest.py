"""One real ComfyUI and one real browser for all browser tests; each test has a tab of its own."""

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser

import scripts.page as driving
from scripts import comfyui
from scripts.page import Canvas
from tests.conftest import missing_peer


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfyui.Host]:
    if not (comfyui.path() / "main.py").exists():
        missing_peer(f"no ComfyUI at {comfyui.path()}: run `make setup`")
    base = tmp_path_factory.mktemp("comfyui")
    logs = comfyui.REPO / ".cache" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "browser-tests.log"
    log.write_bytes(b"")
    with comfyui.Host(base, base / "output", log) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if driving.chromium() is None:
        missing_peer("no Chromium: run `make setup` as root on Debian, or set CHROMIUM to one")
    with driving.browser() as running:
        yield running


RENDERERS = {"params": [False, True], "ids": ["litegraph", "nodes-2"]}


@pytest.fixture(**RENDERERS)
def vue(request: pytest.FixtureRequest) -> bool:
    """Which of the host's two renderers draws the nodes. Tests that take `canvas` run in both."""
    return request.param


@pytest.fixture
def opened(host: comfyui.Host, browser: Browser) -> Iterator[Callable[..., Canvas]]:
    """`opened(vue=..., locale=...)`: a new tab with the page in it. At the end none may have complained."""
    tabs: list[Canvas] = []

    def open_tab(**options: object) -> Canvas:
        tabs.append(Canvas(browser, host, **options))  # pyright: ignore[reportArgumentType]
        return tabs[-1]

    yield open_tab
    errors = [error for tab in tabs for error in tab.errors]
    for tab in tabs:
        tab.close()
    assert not errors


@pytest.fixture
def canvas(opened: Callable[..., Canvas], vue: bool) -> Canvas:
    return opened(vue=vue)


@pytest.fixture(scope="module", **RENDERERS)
def one_tab(host: comfyui.Host, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Canvas]:
    """One tab for all tests of a file, as it takes some seconds to open one."""
    tab = Canvas(browser, host, vue=request.param)
    yield tab
    tab.close()


@pytest.fixture
def shared(one_tab: Canvas) -> Iterator[Canvas]:
    """That tab, for tests that only drop files and edit them. At the end of each it may not have complained."""
    yield one_tab
    errors, one_tab.errors[:] = list(one_tab.errors), []
    one_tab.page.keyboard.press("Escape")
    assert not errors
