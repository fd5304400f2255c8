"""Sphinx: pages are Markdown (MyST), functions are documented by their docstrings, and every warning is an error."""

from __future__ import annotations

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

html_theme = "furo"
html_title = f"heed {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
