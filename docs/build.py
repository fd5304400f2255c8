"""Builds the documentation into build/docs: `make docs`, or `python docs/build.py`.

`python docs/build.py --check` only checks, without Sphinx, that every public name has its page and that the generated
tables are current. Both fail on what is missing; the build also fails on every warning, broken links included.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import support_table

import heed

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
OUTPUT = ROOT / "build" / "docs"

_DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception):: heed\.([\w.]+)(?:\(\))?$", re.MULTILINE)
_CPP_NAME = re.compile(
    r"^(?:(?:enum class|class HEED_API|struct) (?P<type>\w+)|HEED_API [^;(]*?(?P<function>\w+)\()", re.MULTILINE
)


def missing_python_pages() -> list[str]:
    """Public names of the package that lack the page api/NAME.md made from their docstring, and those of its modules
    that lack a place on any page.
    """
    problems = []
    documented = {name for page in (DOCS / "api").glob("*.md") for name in _DIRECTIVE.findall(page.read_text())}
    for module in (heed.ops, heed.jit):
        for name in module.__all__:
            full_name = f"{module.__name__.removeprefix('heed.')}.{name}"
            if full_name not in documented:
                problems.append(f"heed.{full_name}: no page of docs/api documents it")
            if not (getattr(module, name).__doc__ or "").strip():
                problems.append(f"heed.{full_name}: it has no docstring")
    for name in heed.__all__:
        if name.startswith("__") or isinstance(getattr(heed, name), ModuleType):
            continue
        page = DOCS / "api" / f"{name}.md"
        if not page.is_file():
            problems.append(f"heed.{name}: docs/api/{name}.md is missing")
        elif name not in _DIRECTIVE.findall(page.read_text()):
            problems.append(f"heed.{name}: docs/api/{name}.md does not document it")
        if not (getattr(heed, name).__doc__ or "").strip():
            problems.append(f"heed.{name}: it has no docstring")
    return problems


def missing_cpp_names() -> list[str]:
    """Public C++ names that docs/api/cpp.md does not mention."""
    page = (DOCS / "api" / "cpp.md").read_text()
    headers = "".join(path.read_text() for path in sorted((ROOT / "include" / "heed").glob("*.h")))
    names = [match["type"] or match["function"] for match in _CPP_NAME.finditer(headers)]
    return [f"heed::{n}: docs/api/cpp.md does not mention it" for n in names if not re.search(rf"\b{n}\b", page)]


def check() -> int:
    """Prints what is missing or out of date; returns the number of problems."""
    problems = missing_python_pages() + missing_cpp_names()
    for path in support_table.outdated():
        problems.append(f"{path.relative_to(ROOT)}: its support table is out of date: run python docs/support_table.py")
    for problem in problems:
        print(f"docs: {problem}", file=sys.stderr)
    return len(problems)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the documentation into build/docs.")
    parser.add_argument("--check", action="store_true", help="check names and tables only; needs no Sphinx")
    if check():
        return 1
    if parser.parse_args().check:
        return 0
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--nitpicky", "--builder", "html"]
    doctrees = ["--doctree-dir", str(ROOT / "build" / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, *doctrees, str(DOCS), str(OUTPUT)]
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        print(f"docs: {OUTPUT.relative_to(ROOT)}/index.html")
    return status


if __name__ == "__main__":
    sys.exit(main())
