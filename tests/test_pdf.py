"""The book as one PDF."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from npmerge import book


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A book of two pages, the first one in a folder as ours."""
    stage = tmp_path / "source"
    (stage / "book").mkdir(parents=True)
    (stage / "_config.yml").write_text("title: Small\nexecute: {execute_notebooks: 'off'}\n")
    (stage / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters: [{file: book/two}]\n"
    )
    (stage / "book" / "index.md").write_text("# One\n\nThe first page.\n")
    (stage / "book" / "two.md").write_text("# Two\n\n$a + b$\n")
    return tmp_path


@pytest.mark.chromium
def test_all_pages_are_printed_into_one_file(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import browser  # which finds one

    found = browser.find()
    monkeypatch.setattr(book, "BROWSERS", (found,))
    pdf = book.make_pdf(small)
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 1
    assert b"/Title (Small" in content or b"Small" in content
    assert {one.name for one in small.iterdir()} == {"source", "book.pdf", "pdf.log"}


def test_without_a_book_or_a_browser_it_says_what_is_missing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(book.BookError, match="there is no book in"):
        book.make_pdf(tmp_path / "nowhere")
    monkeypatch.setattr(book, "BROWSERS", ("no-such-browser",))
    with pytest.raises(book.BookError, match="no browser to print with was found"):
        book.make_pdf(small)
