"""Sphinx configuration: `make docs`, warnings are errors, no network."""

import subprocess
import sys
from pathlib import Path

import bcd

project = "blockdescent"
author = "the blockdescent authors"
project_copyright = "2026, the blockdescent authors"
version = release = bcd.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_parser"]
html_theme = "furo"
html_title = f"blockdescent {version}"
exclude_patterns = ["_build"]
templates_path = ["_templates"]
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc shows types
numpydoc_show_class_members = False
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]


def setup(app):
    """Run the scripts of the gallery, whose output and pictures its page includes."""
    subprocess.run([sys.executable, str(Path(__file__).parent / "gallery" / "run.py")], check=True)
