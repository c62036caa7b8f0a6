"""The page of vmm report in a browser: what it shows, to the eye by day, by night and in print, to the keyboard, and to
a screen reader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browsing
from command import vmm_here
from documents import write_all

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    done = vmm_here("report", *map(str, write_all(folder).values()), "--output", str(folder / "page.html"))
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browsing() as opened:
        yield opened


@pytest.fixture
def page(browser: Page, path: Path) -> Page:
    browser.open(path.as_uri())
    return browser


#: Contrast of an element's colour against its ground, as WCAG 2.1 has it.
CONTRAST = """
(selector) => {
  const rgb = text => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
                               .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                               .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll(selector)].map(element => {
    let ground = element;
    while (ground && (rgb(getComputedStyle(ground).backgroundColor)[3] === 0)) ground = ground.parentElement;
    const one = light(rgb(getComputedStyle(element).color));
    const other = light(ground ? rgb(getComputedStyle(ground).backgroundColor) : [255, 255, 255]);
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  });
}
"""


def test_nothing_is_loaded_but_the_file_itself(page: Page, path: Path) -> None:
    assert {url for url in page.requests if not url.startswith("data:")} == {path.as_uri()}


def test_every_figure_is_drawn(page: Page) -> None:
    """Each has a size, and lines, bars or cells in it; none is wider than the page."""
    found = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => {const b = s.getBoundingClientRect();"
                          "return [b.width, b.height, s.querySelectorAll('path, use, image').length, b.right]})")
    assert len(found) >= 17
    assert all(width > 600 and height > 80 and marks > 5 and right <= 1000 for width, height, marks, right in found)


@pytest.mark.parametrize(("kind", "scheme"), [("screen", "light"), ("screen", "dark"), ("print", "light"),
                                              ("print", "dark")])
def test_text_can_be_read(kind: str, scheme: str, page: Page) -> None:
    """Contrast of at least 4.5 (WCAG 2.1, AA), in the figures' text too; in print the ground is white."""
    page.media(kind, scheme)
    for selector in ("p", "h1", "h2", "h3", "dd", "dt", "td", "th", "summary", "a", ".warnings li", "svg text"):
        found = page.evaluate(f"({CONTRAST})({selector!r})")
        assert found, selector
        assert min(found) >= 4.5, selector
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (kind == "print" or scheme == "light")


def test_the_ink_of_a_figure_is_the_pages(page: Page) -> None:
    """Axes and letters are drawn in what the text is written in, by night too."""
    for scheme in ("light", "dark"):
        page.media("screen", scheme)
        ink = page.evaluate("getComputedStyle(document.body).color")
        inks = page.evaluate("[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)")
        assert set(inks) == {ink}


def test_it_is_fit_for_the_keyboard(page: Page) -> None:
    """A link past the contents, then the contents; numbers open with a key; and what has the focus is seen."""
    page.key("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    page.key("Tab")
    assert page.evaluate("document.activeElement.closest('nav') !== null")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in range(60):
        page.key("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    assert page.evaluate("document.activeElement.parentElement.open") is False
    page.key("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") is True
    height = "document.activeElement.parentElement.querySelector('table').getBoundingClientRect().height"
    assert page.evaluate(height) > 0


def test_it_is_fit_for_a_screen_reader(page: Page) -> None:
    """Landmarks, headings in order, and each figure an image with a sentence for a name."""
    tree = page.tree()
    roles = [role for role, _ in tree]
    assert {"banner", "navigation", "main", "contentinfo"} <= set(roles)
    assert roles.count("heading") == page.evaluate("document.querySelectorAll('h1, h2, h3').length")
    images = [name for role, name in tree if role in ("img", "image")]
    assert len(images) == page.evaluate("document.querySelectorAll('figure').length")
    assert all(len(name) > 40 for name in images)
    levels: list[int] = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"


def test_numbers_are_printed_where_they_are_unfolded(page: Page) -> None:
    """And figures, facts and warnings always."""
    page.evaluate("document.querySelector('details').open = true")
    page.media("print")
    seen = page.evaluate("[...document.querySelectorAll('details table')].map(t => t.checkVisibility())")
    assert seen[0] is True
    assert len(seen) > 5
    assert not any(seen[1:])
    for selector in ("figure svg", "figcaption p", "dd", ".warnings li"):
        assert page.evaluate(f"[...document.querySelectorAll({selector!r})].every(e => e.checkVisibility())"), selector


@pytest.mark.parametrize("width", [360, 1600])
def test_it_fits_a_narrow_and_a_wide_window(width: int, browser: Page, path: Path) -> None:
    """Only tables and, in a narrow one, figures are wider than it, and scroll in a place of their own; no text has
    room for a few letters only."""
    browser.open(path.as_uri(), width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.querySelectorAll('.wide')].every(w => w.tabIndex === 0 && "
                            "getComputedStyle(w).overflowX === 'auto')")
    widths = browser.evaluate("[...document.querySelectorAll('dd, dt, p')].filter(e => e.textContent.length > 20).map("
                              "e => e.getBoundingClientRect().width)")
    assert min(widths) > 200
