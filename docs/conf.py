"""Sphinx: pages are Markdown (MyST), functions are documented by their docstrings, and every warning is an error."""

from __future__ import annotations

import re
from typing import Any

import heed

project = "heed"
author = "the heed authors"
copyright = "the heed authors, Apache License 2.0"
version = release = heed.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["*.py"]

# Docstrings write code in single backticks, as Markdown does.
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"heed {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False


def _escape_plain_text(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: outside of code nothing is markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _escape_plain_text, priority=400)  # before napoleon
