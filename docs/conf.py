"Settings of Sphinx for `make docs`: notebooks with their stored outputs, nothing loaded from a network."
import re
from importlib.util import find_spec
from pathlib import Path

import latex2mathml.converter
from docutils.nodes import SkipNode

project = 'cse'
author = 'the authors of the cse companion'
extensions = ['myst_nb']
html_theme = 'furo'
html_title = 'cse'
FONT = Path(find_spec('ziamath').origin).parent / 'fonts/STIXTwoMath-Regular.ttf'  # OFL
html_static_path = ['static', str(FONT)]
html_css_files = ['site.css']
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_search_summary = False  # summaries are fetched, which a browser refuses for local files
html_theme_options = dict(navigation_with_keys=True)
pygments_style = 'friendly'
pygments_dark_style = 'native'
templates_path = []
exclude_patterns = []

nb_execution_mode = 'off'
nb_merge_streams = True
nb_render_markdown_format = 'myst'  # tables in outputs
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4
suppress_warnings = [
    'mystnb.unknown_mime_type',
    'misc.highlighting_failure',  # output that is no Python, shown as it is
]

# Formulas become MathML, which browsers draw themselves: no script is loaded, and the font is in the site.
def mathml(formula, block):
    "A formula as MathML, and the number that it carries."
    number = re.search(r'\\tag\{(.*?)\}', formula)
    formula = re.sub(r'\\tag\{.*?\}', '', formula).strip()
    drawn = latex2mathml.converter.convert(formula, display='block' if block else 'inline')
    return drawn, f'({number[1]})' if number else ''


def visit_math(writer, node, block=False):
    "Write a formula. One that cannot be read ends the build."
    drawn, number = mathml(node.astext(), block)
    if block: drawn = f'<div class="formula"><div>{drawn}</div><span>{number}</span></div>'
    writer.body.append(drawn)
    raise SkipNode


def visit_displaymath(writer, node):
    visit_math(writer, node, block=True)


def setup(app):
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_displaymath, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)


html_math_renderer = 'mathml'
