"""README.md from nbs/index.ipynb. Cells tagged `figures` run, to read numbers from results/reference.

`python docs/readme.py` writes both. Nothing is trained: the picture is the stored one.
"""
import json
import re
import sys
from pathlib import Path

import nbformat
from execnb.shell import CaptureShell
from nbconvert import MarkdownExporter
from source import alt_text
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
INDEX = ROOT / 'nbs/index.ipynb'
PICTURES = 'nbs/images'


def source(cell):
    return ''.join(cell['source'])


def with_figures(book):
    "The notebook with fresh outputs of the cells tagged `figures`, and of no others."
    shell, cells = CaptureShell(INDEX), []
    first = min(i for i, cell in enumerate(book['cells']) if 'reference_folder' in source(cell))
    for number, cell in enumerate(book['cells']):
        if number < first or cell['cell_type'] != 'code':
            cells.append(cell)
            continue
        outputs = shell.run(source(cell))
        if shell.exc: raise shell.exc
        quotes = 'figures' in cell['metadata'].get('tags', [])
        cells.append(cell | dict(outputs=[shown(o) for o in outputs]) if quotes else cell)
    return book | dict(cells=cells)


def shown(output):
    "An output of Markdown as notebooks store it."
    text = ''.join(output['data']['text/markdown'])
    data = {'text/markdown': text.splitlines(True), 'text/plain': ['<IPython.core.display.Markdown object>']}
    return dict(data=data, execution_count=None, metadata={}, output_type='execute_result')


def readme(book):
    "Text of the README, and the pictures in it: place in the project → bytes."
    settings = Config()
    settings.RegexRemovePreprocessor.patterns = [r'^\s*#\|\s*hide']
    settings.TagRemovePreprocessor.enabled = True
    settings.TagRemovePreprocessor.remove_input_tags = {'remove_input'}
    resources = dict(output_files_dir=PICTURES, unique_key='README')
    notebook = nbformat.reads(json.dumps(book), 4)
    text, resources = MarkdownExporter(config=settings).from_notebook_node(notebook, resources)
    alts = [alt_text(book['cells'], number) for number, cell in enumerate(book['cells']) if has_picture(cell)]
    text = re.sub(r'!\[\w+\]\(', lambda _: f'![{alts.pop(0)}](', text)
    text = re.sub(r'\]\((?!https?:|#|\.\./|nbs/)', '](nbs/', text).replace('](../', '](')
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+$', '', text, flags=re.M))
    return text.strip() + '\n', resources['outputs']


def has_picture(cell):
    return any('image/png' in output.get('data', {}) for output in cell.get('outputs', []))


def stored(book):
    return json.dumps(book, indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    index = with_figures(json.loads(INDEX.read_text()))
    INDEX.write_text(stored(index))
    text, pictures = readme(index)
    (ROOT / 'README.md').write_text(text)
    for place, picture in pictures.items(): (ROOT / place).write_bytes(picture)
