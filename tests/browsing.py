"""A page of ours in a real browser, which must not complain about it nor ask for anything but local files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def opened_page(browser: Any, path: Path, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """(a tab with the page, addresses that it asked for)."""
    tab, asked, wrong = browser.new_page(**options), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(path.as_uri())
    yield tab, asked
    assert not wrong
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    tab.context.close()
