"""Sphinx settings: `make docs` builds the pages, without a network."""

from importlib.metadata import version as installed

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx_gallery.sorting import ExplicitOrder

project = "RepScope"
author = copyright = "The RepScope developers"
version = release = installed("repscope")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"
myst_heading_anchors = 3

# Of extras that the documentation is built without.
autodoc_mock_imports = ["lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "within_subsection_order": ExplicitOrder(
        [
            "plot_spectrum_of_your_model.py",
            "plot_effective_rank_definitions.py",
            "plot_sparsity_curve.py",
            "plot_paired_comparison.py",
        ]
    ),
    "abort_on_example_error": True,
    "min_reported_time": 60,
    "show_memory": False,
    "write_computation_times": False,
}

html_theme = "furo"
html_title = f"RepScope {release}"
html_show_sourcelink = False
html_math_renderer = "mathml"


# Browsers draw MathML by themselves; MathJax would be fetched at every reading.
def _inline_math(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise SkipNode


def _block_math(translator, node):
    formula = tex2mathml(node.astext(), as_block=True)
    # Room above and below, or the theme's scrolling box shows a scroll bar.
    translator.body.append(f'<div style="padding: 0.3em 0">{formula}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
