"""The documentation: its examples run, its links lead somewhere, and it leaves no public name out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import doc_page

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


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if has_python(page)], ids=page_id)
def test_python_examples_run(page: Path) -> None:
    result = run_page(page)
    assert result.returncode == 0, result.stdout + result.stderr


def test_wrong_output_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```output\n2\n```\n")
    result = run_page(page)
    assert result.returncode != 0
    assert f"{page}:6: got" in result.stderr


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_id)
def test_every_block_has_a_known_language(page: Path) -> None:
    """A block of another language would be code that no test runs."""
    known = {"python", "output", "cpp", "cmake", "bash", "text", "mermaid"}
    for block in doc_page.blocks(page):
        assert block.language in known or block.language.startswith("{"), f"{page}:{block.line}: {block.language!r}"


# Links.

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
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
            yield f"{link} does not exist"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{link} has no such heading"


@pytest.mark.parametrize("page", ALL_PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#b-title) [c](missing.md) [d](https://example.org/x)\n")
    assert list(broken_links(page)) == ["#b-title has no such heading", "missing.md does not exist"]


# Completeness and generated parts.


def check(root: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` checks before it builds: every public name has its page, and the tables are current."""
    command = [sys.executable, str(root / "docs" / "build.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_public_name_has_its_page_and_tables_are_current() -> None:
    result = check(ROOT)
    assert result.returncode == 0, result.stderr


def test_what_is_missing_or_out_of_date_is_found(tmp_path: Path) -> None:
    for name in ("docs", "include"):
        shutil.copytree(ROOT / name, tmp_path / name)
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme.replace("| soft cap | float32,", "| soft cap | float64,"))
    (tmp_path / "docs" / "api" / "explain.md").unlink()
    page = tmp_path / "docs" / "api" / "cpp.md"
    page.write_text(page.read_text().replace("num_threads", "threads"))
    result = check(tmp_path)
    assert result.returncode == 1
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()] == ["heed.explain", "heed", "README.md"]


# C++.


def cpp_pages() -> list[Path]:
    return [page for page in ALL_PAGES if any(block.language == "cpp" for block in doc_page.blocks(page))]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("page", cpp_pages(), ids=page_id)
def test_cpp_examples_build_and_run(page: Path, tmp_path: Path) -> None:
    """Each C++ block is a whole program. The page's CMake block builds it where CMake and the package are there."""
    programs = [block.text for block in doc_page.blocks(page) if block.language == "cpp"]
    projects = [block.text for block in doc_page.blocks(page) if block.language == "cmake"]
    for i, program in enumerate(programs):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "main.cc").write_text(program)
        (folder / "CMakeLists.txt").write_text(projects[0])
        result = subprocess.run([str(build_cpp(folder))], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def build_cpp(folder: Path) -> Path:
    """Builds the project with the installed CMake package, or only main.cc with the library of HEED_LIB_DIR."""
    build = folder / "build"
    package = subprocess.run([sys.executable, "-m", "heed", "cmake-dir"], capture_output=True, text=True, check=False)
    if package.returncode == 0 and shutil.which("cmake") is not None and "HEED_LIB_DIR" not in os.environ:
        run("cmake", "-S", str(folder), "-B", str(build), f"-Dheed_DIR={package.stdout.strip()}")
        run("cmake", "--build", str(build))
        return build / "example"
    from heed import _lib

    libraries = _lib.library_dir()
    include = ROOT / "include"
    run("c++", "-std=c++20", f"-I{include}", str(folder / "main.cc"), "-o", str(folder / "example"),
        f"-L{libraries}", "-lheed", f"-Wl,-rpath,{libraries}")  # fmt: skip
    return folder / "example"


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
