"""The pages of the book, as files and in a browser."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import browser
import pytest
from playwright.async_api import Browser, Page, async_playwright

from npmerge.report.ledger import ENTRIES

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TABS = 4
"""Pages open at a time: each mostly waits for the browser to have nothing more to load."""
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
CHAPTERS = (
    "book/index", "book/method", "book/protocol", "book/claims", "book/numbers", "book/reexecute", "book/api",
)  # fmt: skip
# Attributes that make the browser load something, and those that the reader can follow.
LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
FOLLOWED = {("a", "href")}

Result = TypeVar("Result")

pytestmark = pytest.mark.book


@dataclass
class Parsed(HTMLParser):
    """The links, loaded files and anchors of a page, and the classes of its elements."""

    followed: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if (tag, name) in FOLLOWED:
                self.followed.append(value)
            if (tag, name) in LOADED:
                self.loaded.append(value)
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value)
            if name == "class":
                self.classes.update(value.split())


def pages(html: Path) -> list[Path]:
    """Every page, but for the templates that the theme leaves under _static."""
    return [p for p in sorted(html.rglob("*.html")) if "_static" not in p.relative_to(html).parts]


@pytest.fixture(scope="session")
def parsed(html: Path) -> dict[Path, Parsed]:
    result = {}
    for page in pages(html):
        result[page.resolve()] = parser = Parsed()
        parser.feed(page.read_text(encoding="utf-8"))
    return result


def broken(page: Path, link: str, parsed: dict[Path, Parsed]) -> bool:
    """Whether an internal link of a page leads to no file, or to no anchor in its page."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return True
    anchors = parsed[target].anchors if target in parsed else set()
    return parts.fragment not in {"", "top"} and unquote(parts.fragment) not in anchors


def test_every_chapter_is_there(html: Path) -> None:
    notebooks = Path(__file__).parent.parent.glob("notebooks/*.ipynb")
    chapters = [*CHAPTERS, *(f"notebooks/{notebook.stem}" for notebook in notebooks)]
    assert [c for c in chapters if not (html / f"{c}.html").is_file()] == []
    assert any(c.startswith("notebooks/") for c in chapters)


def test_every_internal_link_and_anchor_resolves(parsed: dict[Path, Parsed]) -> None:
    dead = [
        f"{page.name}: {link}"
        for page, parser in parsed.items()
        for link in [*parser.followed, *parser.loaded]
        if broken(page, link, parsed)
    ]
    assert dead == []


def test_a_dead_link_and_a_dead_anchor_are_found(parsed: dict[Path, Parsed]) -> None:
    page = next(page for page in parsed if page.name == "method.html")
    assert broken(page, "nowhere.html", parsed)
    assert broken(page, "protocol.html#nowhere", parsed)
    assert broken(page, "#nowhere", parsed)
    assert not broken(page, "protocol.html", parsed)


def test_pages_load_nothing_from_another_host(parsed: dict[Path, Parsed]) -> None:
    foreign = [
        f"{p.name}: {u}"
        for p, parser in parsed.items()
        for u in parser.loaded
        if urlsplit(u).netloc
    ]
    assert foreign == []


def test_the_first_page_has_a_line_for_every_claim_and_says_at_which_scale(html: Path) -> None:
    page = unescape((html / "book" / "index.html").read_text(encoding="utf-8"))
    text = page.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    assert [one.text for one in ENTRIES if one.text not in text] == []
    assert "at the paper's own scale" in text
    assert "% report card" not in text


def test_records_can_be_downloaded(html: Path) -> None:
    found = {path.name for path in (html / "_downloads").rglob("*.*")}
    assert {"numbers.csv", "records.zip"} <= found


def test_no_cell_shows_an_error(parsed: dict[Path, Parsed]) -> None:
    """A stored error output raises no warning when the book is built."""
    failed = {"traceback", "cell_error", "output_error"}
    assert [page.name for page, parser in parsed.items() if parser.classes & failed] == []


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and keeps no log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, served on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def site(html: Path) -> Iterator[str]:
    with served(html) as address:
        yield address


def in_chromium(work: Callable[[Browser], Awaitable[Result]]) -> Result:
    """What some work with the browser comes to."""

    async def main() -> Result:
        async with async_playwright() as playwright:
            path = browser.ensure()
            async with await playwright.chromium.launch(executable_path=path, args=FLAGS) as opened:
                return await work(opened)

    return asyncio.run(main())


MATHS = """async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    const raw = document.querySelectorAll('.math').length;
    return {
        expected: raw,
        rendered: document.querySelectorAll('.math mjx-container').length,
        errors: document.querySelectorAll('mjx-merror, mjx-container [data-mml-node="merror"]').length,
    };
}"""
LAYOUT = """() => ({
    page: document.scrollingElement.scrollWidth,
    window: window.innerWidth,
    wide: [...document.querySelectorAll('body *')]
        .filter(e => e.scrollWidth > window.innerWidth && getComputedStyle(e).overflowX === 'visible')
        .slice(-3).map(e => e.tagName + '.' + e.className),
})"""
IMAGES = """async () => {
    const images = [...document.images];
    images.forEach(i => { i.loading = 'eager'; });
    await Promise.all(images.map(i => i.decode().catch(() => null)));
    return images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src);
}"""


async def faults(tab: Page, site: str, url: str) -> list[str]:
    """Open a page and say what is wrong with it."""
    found: list[str] = []
    tab.on("console", lambda m: found.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda error: found.append(f"script: {error}"))
    tab.on("requestfailed", lambda r: found.append(f"failed: {r.url}"))
    tab.on("response", lambda r: found.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    tab.on(
        "request",
        lambda r: None if r.url.startswith((site, "data:")) else found.append(f"foreign: {r.url}"),
    )
    await tab.goto(url, wait_until="networkidle")
    maths = await tab.evaluate(MATHS)
    if maths["errors"] or maths["expected"] != maths["rendered"]:
        found.append(f"mathematics: {maths}")
    text = await tab.inner_text("article" if await tab.query_selector("article") else "body")
    if r"\(" in text or r"\[" in text:
        found.append("mathematics: raw TeX in the text")
    layout = await tab.evaluate(LAYOUT)
    if layout["page"] > layout["window"]:
        found.append(f"horizontal scroll: {layout}")
    found += [f"image: {source}" for source in await tab.evaluate(IMAGES)]
    return found


@pytest.mark.chromium
@pytest.mark.parametrize("size", SIZES)
def test_every_page_opens_without_fault(html: Path, site: str, size: str) -> None:
    """No console error, failed or foreign request, horizontal scroll, broken image or unrendered formula.

    The pages of source code are all alike, so on the phone one of them stands for the others.
    """
    width, height = SIZES[size]
    sources = [page for page in pages(html) if "_modules" in page.parts]
    left_out = sources[1:] if size == "phone" else []
    names = [p.relative_to(html).as_posix() for p in pages(html) if p not in left_out]

    async def work(chromium: Browser) -> dict[str, list[str]]:
        context = await chromium.new_context(viewport={"width": width, "height": height})
        few = asyncio.Semaphore(TABS)

        async def opened(name: str) -> list[str]:
            async with few, await context.new_page() as tab:
                return await faults(tab, site, f"{site}/{name}")

        return dict(zip(names, await asyncio.gather(*map(opened, names)), strict=True))

    found = in_chromium(work)
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.chromium
def test_mathematics_is_drawn(site: str) -> None:
    async def work(chromium: Browser) -> int:
        tab = await chromium.new_page()
        await tab.goto(f"{site}/book/method.html", wait_until="networkidle")
        rendered: int = (await tab.evaluate(MATHS))["rendered"]
        return rendered

    assert in_chromium(work) > 20


@pytest.mark.chromium
def test_the_pictures_of_the_chapters_move(site: str) -> None:
    async def work(chromium: Browser) -> None:
        tab = await chromium.new_page()
        await tab.goto(f"{site}/notebooks/01_same_data.html")
        slider = tab.locator(".npm-interactive input[type=range]").first
        told = slider.locator("xpath=ancestor::*[contains(@class, 'npm-interactive')]").locator(
            "output"
        )
        before = await told.inner_text()
        await slider.fill("0")
        assert await told.inner_text() != before
        await tab.get_by_role("button", name="Align").click()
        assert await tab.get_by_role("button", name="Put back").is_visible()

    in_chromium(work)


@pytest.mark.chromium
def test_a_faulty_page_is_found(tmp_path: Path) -> None:
    """Each check of the browser test can fail."""
    (tmp_path / "index.html").write_text(
        "<script>console.error('boom')</script><img src='missing.png'><span class='math'>\\(x\\)</span>"
        "<div style='width:3000px'>wide</div><script src='http://127.0.0.2:9/foreign.js'></script>",
        encoding="utf-8",
    )

    async def work(chromium: Browser) -> list[str]:
        return await faults(await chromium.new_page(), site, f"{site}/index.html")

    with served(tmp_path) as site:
        found = " ".join(in_chromium(work))
    for fault in (
        "boom",
        "404",
        "mathematics",
        "raw TeX",
        "horizontal scroll",
        "image:",
        "foreign:",
        "failed:",
    ):
        assert fault in found
