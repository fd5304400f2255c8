"""What the README says about the tree, the environment and the commands is true of the tree. Its code: test_docs.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import doc_page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# Read by scripts or tests, or made by the preprocessor, rather than by the library.
_SOURCES = [*(ROOT / "src").rglob("*.cc"), *(ROOT / "python" / "heed").rglob("*.py")]
_READ = re.compile(r"(?:getenv\(|environment\(|environ\.get\(|environ\[)[\"'](HEED_\w+)[\"']")


def section(title: str) -> str:
    _, _, rest = README.read_text().partition(f"\n## {title}\n")
    assert rest, f"README.md has no section {title!r}"
    return rest.split("\n## ")[0]


def test_environment_variables_are_those_that_the_library_reads() -> None:
    listed = set(re.findall(r"^\| `(HEED_\w+)`", section("Environment variables"), re.MULTILINE))
    read = {name for path in _SOURCES for name in _READ.findall(path.read_text())}
    assert listed == read


def test_the_map_names_what_is_there() -> None:
    block = next(block for block in doc_page.blocks(README) if block.language == "text")
    pattern = re.compile(r"^[\w/]+|(?<=, )\w+/")
    paths = [path for line in block.text.splitlines() for path in pattern.findall(line)]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).is_dir()] == []


def test_make_targets_that_are_named_exist() -> None:
    text = "\n".join(page.read_text() for page in [README, *(ROOT / "docs").rglob("*.md")])
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_scripts_that_are_named_exist() -> None:
    text = "\n".join(page.read_text() for page in [README, *(ROOT / "docs").rglob("*.md")])
    for name in set(re.findall(r"scripts/\w+\.\w+", text)):
        assert (ROOT / name).is_file(), name


def test_the_c_library_named_in_the_limits_is_that_of_the_wheel() -> None:
    wheels = list((ROOT / "dist").glob("heed-*.whl"))
    glibc = subprocess.run(["getconf", "GNU_LIBC_VERSION"], capture_output=True, text=True, check=False).stdout
    if wheels and glibc.strip() == "glibc 2.36":
        assert "manylinux_2_36" in section("Limits")
        assert all("manylinux_2_36" in wheel.name for wheel in wheels)
