"""The documentation builds, whole and without a broken link, into pages that fetch nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browsing import opened_page

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc="?(?:https?:)?//|<link[^>]*rel="?(?:stylesheet|preconnect)"?[^>]*//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mkdocs.yml makes a page that is in no menu, and a link or anchor that leads nowhere, an error."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_fetches_nothing(site: Path) -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in site.glob("*.html")}
    assert pages.keys() >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert [name for name, text in pages.items() if FETCHED.search(text)] == []
    assert "<math" in pages["concepts"]
    assert "borrowed_scale" in pages["api"]  # read off the code


@pytest.mark.slow
def test_the_search_needs_no_server(site: Path, browser: Any) -> None:
    with opened_page(browser, site / "index.html") as (tab, _):
        tab.locator("input.md-search__input").press_sequentially("renoise")
        found = tab.locator(".md-search-result__item a").first
        found.wait_for(timeout=60_000)
        page = found.get_attribute("href").partition("#")[0].partition("?")[0]
        assert "renoise" in (site / page.rpartition("/")[2]).read_text(encoding="utf-8")
