"""How Sphinx builds these pages: Markdown by MyST, the reference from the code itself (``_ext/vocabulary.py``)."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "Hanse"
author = "The Hanse developers"
copyright = "The Hanse developers"  # noqa: A001 - Sphinx's name for it
release = installed_version("hanse")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "vocabulary"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autoclass_content = "class"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"Hanse {release}"
