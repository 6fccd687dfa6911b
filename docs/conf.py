"""Sphinx: Markdown pages beside this file, docstrings of stnerp. `make docs` builds docs/_build/html."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import stnerp

project = "stnerp"
author = "the stnerp authors"
copyright = author
release = version = stnerp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
highlight_language = "none"  # of blocks without a language: commands

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "stnerp"
html_copy_source = False
mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # torch's, of `forward`
napoleon_custom_sections = [("Attributes", "params_style")]  # "layers, width: of the SIREN" are two
napoleon_use_rtype = False
default_role = "code"  # `name` in a docstring is code

# Strict about classes and functions of ours. Other packages' have no inventory here, and aliases of types no page.
nitpick_ignore_regex = [
    (r"py:.*", r"(np|numpy|torch|sitk|SimpleITK|os|pathlib|collections|typing|nn|datetime)\..*"),
    (r"py:.*", r"Path|Any|Callable|Sequence|Mapping|Iterable|Iterator|Literal|tuple\[.*"),
    (r"py:.*", r"(stnerp\.(\w+\.)+)?(ImageLike|LandmarksLike|Kind|Init|Points|DefNet|DicomHeader)"),
]


def as_written(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """|J| is a determinant in our docstrings, no substitution, and phases/*.nii a pattern, no emphasis."""
    lines[:] = [re.sub(r"(?<!\\)\||\*(?=\.)", r"\\\g<0>", line) for line in lines]


def properties_as_written(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A sentence with a colon is a sentence; napoleon takes what stands before it for the property's type."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what == "property" and types:
        lines[:] = [line for line in lines if line not in types]
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def files_named(app: Any, page: str, text: list[str]) -> None:
    """A link to a file that is no page here, [README](../README.md), names it: README (`README.md`)."""
    outwards = r"\[([^\]]+)\]\((?:\.\./)+((?:\w+/)*[\w.]+)\)"
    text[0] = re.sub(outwards, lambda link: link[0] if is_page(link[2]) else f"{link[1]} (`{link[2]}`)", text[0])


def is_page(path: str) -> bool:
    return (Path(__file__).parent / path).exists()


def setup(app: Any) -> None:
    app.connect("source-read", files_named)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon's 500
    app.connect("autodoc-process-docstring", properties_as_written, priority=600)
