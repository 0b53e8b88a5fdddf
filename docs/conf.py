"Settings of Sphinx for `make docs`: notebooks with their stored outputs, nothing loaded from a network."
import re
from html import escape

from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml

project = 'cse'
author = 'the authors of the cse companion'
extensions = ['myst_nb']
html_theme = 'furo'
html_title = 'cse'
html_static_path = ['static']
html_css_files = ['site.css']
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # summaries are fetched, which a browser refuses for local files
html_theme_options = dict(navigation_with_keys=True)
pygments_style = 'friendly'
pygments_dark_style = 'native'
templates_path = []
exclude_patterns = []

nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
suppress_warnings = [
    'mystnb.unknown_mime_type',
    'misc.highlighting_failure',  # output that is no Python, shown as it is
]

# Formulas become MathML, which browsers draw themselves: no script and no font is loaded.
UNKNOWN_TO_DOCUTILS = {r'\dots': r'\ldots', r'\Big': '', '…': r'\ldots'}


def mathml(formula, block):
    "A formula as MathML, and the number that it carries."
    number = re.search(r'\\tag\{(.*?)\}', formula)
    formula = re.sub(r'\\tag\{.*?\}', '', formula).strip()
    for theirs, ours in UNKNOWN_TO_DOCUTILS.items():
        formula = re.sub(re.escape(theirs) + r'(?![A-Za-z])', lambda _, ours=ours: ours, formula)
    return tex2mathml(formula, as_block=block), f'({number[1]})' if number else ''


def visit_math(writer, node, block=False):
    "Write a formula; what cannot be read is a warning, and shown as it is."
    from docutils import nodes
    from sphinx.util import logging
    try:
        drawn, number = mathml(node.astext(), block)
    except MathError as error:
        logging.getLogger(__name__).warning('formula %r: %s', node.astext(), error, location=node)
        drawn, number = f'<code>{escape(node.astext())}</code>', ''
    if block:
        drawn = f'<div class="formula"><div>{drawn}</div><span>{number}</span></div>'
    writer.body.append(drawn)
    raise nodes.SkipNode


def visit_displaymath(writer, node):
    visit_math(writer, node, block=True)


def setup(app):
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_displaymath, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


html_math_renderer = 'mathml'
