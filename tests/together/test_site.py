"""The documentation as a site: complete, without warnings and dead links, opened by a browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from docs.site import build, cards
from docs.site.links import BrokenLink, Site
from tests.together.test_docs import ROOT
from torchweld.plugins.options import option_rows
from torchweld.problems import TITLES

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not find_spec("mkdocs"):
        pytest.skip("needs mkdocs")
    output = tmp_path_factory.mktemp("site")
    build.build(output)  # a warning of mkdocs is an error
    return output


class References(HTMLParser):
    """What a page refers to and what can be referred to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given:
            (self.loaded if tag == "link" else self.links).append(given["href"])
        if "src" in given:
            self.loaded.append(given["src"])


def pages(site: Path) -> dict[Path, References]:
    # The page for what is not found has links from the root of a server.
    found = (page for page in site.rglob("*.html") if page.name != "404.html")
    return {page: References(page) for page in found}


def leads_nowhere(page: Path, link: str, known: dict[Path, References]) -> bool:
    parts = urlsplit(link)
    if parts.scheme:
        return False
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target not in known:
        return not target.exists()
    return bool(parts.fragment) and unquote(parts.fragment) not in known[target].anchors


# ---- what is in it -------------------------------------------------------------------------------


def test_every_component_has_a_card_with_its_options_and_reasons(site: Path) -> None:
    components = cards.installed()

    assert {"single", "ddp", "torch"} <= {chosen.name for chosen in components}
    for chosen in components:
        page = (site / "components" / f"{chosen.name}.html").read_text("utf-8")
        rows = option_rows(chosen.component.options)
        assert [name for name, _, _ in rows if f"<code>{name}</code>" not in page] == []


def test_every_option_says_what_it_means() -> None:
    without = [
        (chosen.name, name)
        for chosen in cards.installed()
        if (options := chosen.component.options) is not None
        for name, _, _ in option_rows(options)
        if name not in cards.comments(options)
    ]

    assert without == []


def test_a_meaning_goes_on_in_the_next_line() -> None:
    from torchweld.builtin import TorchDataOptions

    found = cards.comments(TorchDataOptions)

    assert found["batch_size"] == "samples a process and step, > 0; needed for a Dataset"
    assert list(found) == [name for name, _, _ in option_rows(TorchDataOptions)]


def test_every_code_has_its_page(site: Path) -> None:
    there = {page.stem for page in (site / "codes").glob("*.html")}

    assert there == {*TITLES, "TW6xx"}


def test_every_page_of_the_repository_is_in_it(site: Path) -> None:
    docs = [page.relative_to(ROOT / "docs") for page in ROOT.glob("docs/**/*.md")]

    assert [page for page in docs if not (site / page.with_suffix(".html")).exists()] == []


# ---- links ---------------------------------------------------------------------------------------


def test_no_link_leads_nowhere(site: Path) -> None:
    known = pages(site)

    dead = [
        (str(page.relative_to(site)), link)
        for page, found in known.items()
        for link in (*found.links, *found.loaded)
        if leads_nowhere(page, link, known)
    ]

    assert dead == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = {link for found in pages(site).values() for link in found.loaded}

    assert [link for link in loaded if urlsplit(link).netloc] == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](b.md)\n")
    site = Site(tmp_path)
    site.add(PurePosixPath("docs/index.md"))

    with pytest.raises(BrokenLink, match=r"docs/index.md refers to 'b.md'"):
        site.collect()


def test_a_dead_anchor_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not find_spec("mkdocs"):
        pytest.skip("needs mkdocs")
    site = Site(tmp_path)
    site.pages = {
        PurePosixPath("index.md"): "# A\n\n[there](b.md#nowhere)\n",
        PurePosixPath("b.md"): "# B\n",
    }
    monkeypatch.setattr(build, "gather", lambda: site)
    monkeypatch.setattr(build, "NAVIGATION", {})

    with pytest.raises(subprocess.CalledProcessError):
        build.build(tmp_path / "out")


# ---- a browser -----------------------------------------------------------------------------------


class Served(SimpleHTTPRequestHandler):
    """Remembers what was asked for and with which status it was answered."""

    answers: list[tuple[str, int]]

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self.answers.append((self.path, int(code)))


@pytest.fixture
def server(site: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    answers: list[tuple[str, int]] = []
    handler = type("Handler", (Served,), {"answers": answers})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site))) as running:
        thread = Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}", answers
        finally:
            running.shutdown()
            thread.join()


def test_a_browser_opens_it_and_finds_all_that_it_asks_for(
    server: tuple[str, list[tuple[str, int]]], tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    address, answers = server
    headless = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    headless += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom"]

    done = subprocess.run(
        [*headless, "--virtual-time-budget=20000", f"{address}/architecture.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip

    assert "<title>How it is made - torchweld</title>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    asked = {path for path, _ in answers}
    assert {"/architecture.svg", "/search/search_index.json"} <= asked
    assert [path for path, code in answers if code >= 400] == []
