"""Settings of the site: `make docs` builds it from the Markdown in this folder, offline."""

from importlib.metadata import version as installed

project = "SGCD Lake"
author = "The SGCD Lake developers"
release = version = installed("sgcd-lake")

extensions = ["myst_parser"]
myst_heading_anchors = 4  # the links that a code host makes of headings
source_suffix = {".md": "markdown"}
exclude_patterns: list[str] = []
nitpicky = True

html_theme = "furo"
html_title = f"SGCD Lake {release}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
