"""Sphinx settings. Build with `make docs`; a warning is an error."""

import importlib.metadata
import inspect

import horizonplan

project = "horizonplan"
author = "horizonplan authors"
copyright = author
release = importlib.metadata.version("horizonplan")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a dataclass's fields are documented once, under "Attributes:"

html_theme = "furo"
html_title = "horizonplan"

MODULE = """
## `{name}`

```{{eval-rst}}
.. automodule:: {name}
   :members:
   :imported-members:
```
"""


def add_public_modules(app, docname, source):
    """Append a section to the reference for each module among the public names; autodoc passes over modules."""
    if docname == "reference":
        public = [getattr(horizonplan, name) for name in getattr(horizonplan, "__all__", ())]
        source[0] += "".join(MODULE.format(name=module.__name__) for module in public if inspect.ismodule(module))


def setup(app):
    """Connect the above."""
    app.connect("source-read", add_public_modules)
