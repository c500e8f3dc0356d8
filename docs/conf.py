# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Settings of the documentation, which `make docs` builds."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mmgcp  # noqa: E402  (from this folder's parent)

project = 'mmgcp'
author = 'The mmgcp authors'
copyright = f'2026, {author}'
release = version = mmgcp.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
source_suffix = ['.md']
exclude_patterns = ['_build']

myst_heading_anchors = 3
myst_enable_extensions = ['colon_fence', 'deflist']

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # docstrings say what types arguments have
autodoc_preserve_defaults = True

html_theme = 'furo'
html_title = f'mmgcp {release}'
html_static_path = ['_static']
html_theme_options = dict(sidebar_hide_name=False)


def setup(app):
    """Let docstrings write absolute values as they are read: to Sphinx, bars mark substitutions."""
    def escape(_app, _what, _name, _object, _options, lines):
        lines[:] = [line.replace('|', '\\|') for line in lines]
    app.connect('autodoc-process-docstring', escape)
