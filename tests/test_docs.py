"""The documentation tells the truth: the site builds without a warning, every link leads somewhere, its examples run,
and the messages that it explains are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from docs_examples import examples
from places import TOP

from ipc.layout import ExitReason

DOCS = TOP / "docs"
_FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """Where it leads, what it fetches, and what can be led to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if name := given.get("id") or (given.get("name") if tag == "a" else None):
            self.anchors.add(name)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in _FETCHED and given.get("rel") not in ("canonical", "next", "prev") and _FETCHED[tag] in given:
            self.fetched.append(given[_FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=TOP,
                          capture_output=True, text=True, timeout=240, check=False,
                          env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":     # its links are of the place where the site is
            continue
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if there.is_dir():
                there /= "index.html"
            name = unquote(parts.fragment)
            if not there.is_file() or (name and name != "__top" and there in pages
                                       and name not in pages[there].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert len(pages) > 50
    assert not dead


def test_a_page_fetches_nothing_from_elsewhere(pages: dict[Path, Page]) -> None:
    assert not [link for page in pages.values() for link in page.fetched if urlsplit(link).netloc]


@pytest.mark.parametrize(("page", "said"), [
    ("configuration.html", ["dirty_ring_size", "max_interval", "niceness of the vCPU processes", "GuestConfig | None"]),
    ("machine-report.html", ["ring_full_exits", "seconds in the guest, at ring-full, throttled"]),
    ("messages.html", ["TakeLease", "RebuildRing", "RoundEnd"]),
    ("cli-help.html", ["--on-timeout", "vmm snapshot restore", "vmm migrate start", "usage: vmm demo"]),
    ("configs/index.html", ["quickstart", "workload: stamp"])])
def test_references_have_what_the_code_has(site: Path, page: str, said: list[str]) -> None:
    text = re.sub(r"<[^>]+>", "", (site / page).read_text()).lower()
    assert [each for each in said if each.lower() not in text] == []
    assert "&lt;!-- fields" not in text
    assert "&lt;!-- help" not in text


def slug(heading: str) -> str:
    """As where the repository is read."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip().lower().replace(" ", "-")


def test_the_readme_leads_somewhere() -> None:
    text = (TOP / "README.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        path, _, name = (link[0] or link[1]).partition("#")
        there = TOP / path
        assert there.exists(), path
        if name:
            headings = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE)
            assert name in map(slug, headings), link


def test_the_two_commands_are_as_they_were() -> None:
    commands = re.findall(r"^    (\.ci/env .*)", (TOP / "README.md").read_text(), re.MULTILINE)
    assert commands == [".ci/env vmm launch configs/quickstart.yaml", ".ci/env pytest"]


def source() -> str:
    """Of the program; a text that goes on in the next line is one."""
    files = [path for folder in ("ipc", "workers", "vmm") for path in (TOP / folder).rglob("*.py")]
    return "\n".join(re.sub(r'"\s*\n\s*[fr]?"', "", path.read_text()) for path in [*files, TOP / ".ci" / "env"])


def test_messages_that_are_explained_are_there() -> None:
    """Between what differs (capitals) every part of them."""
    text = source()
    page = (DOCS / "troubleshooting.md").read_text()
    messages = [m for line in re.findall(r"^\*\*`.*\*\*", page, re.MULTILINE) for m in re.findall(r"`([^`]+)`", line)]
    parts = [part.strip(" :;()?'") for m in messages for part in re.split(r"\b[A-Z]{2,}\b(?!_)|\bN\b|/dev/\w+", m)]
    reasons = [reason.name.lower().replace("_", "-") for reason in ExitReason]
    unknown = [part for part in parts if len(part) > 3 and part not in text and part not in reasons]
    assert len(messages) > 40
    assert not unknown


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    found = re.search(r"^ +```python\n(.*?)^ +```", (TOP / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    done = subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(found[1])], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\d+ pages dirtied since\n", done.stdout)


@pytest.mark.parametrize("page", ["tutorial.md", "howto/own-guest.md", "howto/two-hosts.md"])
def test_examples_run(page: str, tmp_path: Path) -> None:
    """In one folder, one after the other, as somebody would type them. ``vmm`` is this program."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "vmm").symlink_to(Path(sys.executable).parent / "vmm")
    folder = tmp_path / "here"
    folder.mkdir()
    found = list(examples((DOCS / page).read_text()))
    assert found
    for example in found:
        if example.needs and shutil.which(example.needs) is None:
            pytest.skip(f"not installed: {example.needs}")
        done = subprocess.run(["bash", "-eu", "-c", example.text], cwd=folder, capture_output=True,
                              text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
                              env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"})
        assert done.returncode == example.status, f"{page}:{example.line}\n{done.stdout}{done.stderr}"
