"""The documentation: its examples run, its links lead somewhere, and it leaves no public name out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import doc_page
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALL_PAGES = [ROOT / "README.md", *PAGES]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(page: Path) -> subprocess.CompletedProcess[str]:
    """Runs a page's Python blocks in a process of its own, with four CPU devices for JAX."""
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
    command = [sys.executable, str(ROOT / "tests" / "doc_page.py"), str(page)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def has_python(page: Path) -> bool:
    return any(block.language == "python" for block in doc_page.blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if has_python(page)], ids=page_id)
def test_python_examples_run(page: Path) -> None:
    result = run_page(page)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_id)
def test_every_block_has_a_known_language(page: Path) -> None:
    """A block of another language would be code that no test runs."""
    known = {"python", "output", "cpp", "cmake", "bash", "text", "mermaid"}
    for block in doc_page.blocks(page):
        assert block.language in known or block.language.startswith("{"), f"{page}:{block.line}: {block.language!r}"


# Links.

_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that both GitHub and Sphinx give a page's headings."""
    headings = _HEADING.findall(doc_page.prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in _LINK.findall(doc_page.prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{page_id(page)}: {link} does not exist"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{page_id(page)}: {link} has no such heading"


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#b-title) [c](missing.md) [d](https://example.org/x)\n")
    found = [re.sub(r"^.*: ", "", problem) for problem in _broken(page)]
    assert found == ["#b-title has no such heading", "missing.md does not exist"]


def _broken(page: Path) -> list[str]:
    return [problem.replace(str(page), "page") for problem in broken_links(page)]


# Completeness and generated parts.


def run_check(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCS / name), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_public_name_has_its_page_and_tables_are_current() -> None:
    result = run_check("build.py")
    assert result.returncode == 0, result.stderr
