"""Configuration of Sphinx; ``sphinx-build -W docs docs/_build`` builds the pages without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from skdim import __version__

project = "skdim"
author = "the skdim developers"
html_show_copyright = False
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "sphinx_gallery.gen_gallery", "myst_parser"]
exclude_patterns = ["_build"]
default_role = "py:obj"

autodoc_member_order = "bysource"
# numpydoc's sections name the types, with shapes and dtypes.
autodoc_typehints = "none"
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"(^|/)(?!plot_)\w+\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "reference_url": {"skdim": None},
}

html_theme = "pydata_sphinx_theme"
html_title = f"skdim {release}"
html_show_sourcelink = False
html_theme_options = {"navbar_align": "left", "show_prev_next": False, "footer_start": [], "footer_end": []}
