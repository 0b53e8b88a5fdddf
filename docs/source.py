"""The sources of the site: pages and notebooks, laid out as in the project and ready for Sphinx.

`python docs/source.py FOLDER` writes them. Notebooks keep their stored outputs and are not run.
"""
import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path

from api import api_pages

ROOT = Path(__file__).parent.parent
NBS, REFERENCE = ROOT / 'nbs', ROOT / 'results/reference'
INDEX = NBS / 'index.ipynb'  # whose text is the README
WINGS = 'data', 'fast', 'extensions', 'baselines', 'deploy', 'lab'
COPIED = '.png', '.svg', '.csv', '.cff'


def source(cell):
    return ''.join(cell['source'])


def toctree(entries, caption='', hidden=False):
    "A table of contents for Sphinx."
    options = [f':caption: {caption}'] * bool(caption) + [':hidden:'] * hidden
    return '\n'.join(['```{toctree}', ':maxdepth: 1', *options, '', *entries, '```', ''])


def find(link, page):
    "The place in the project to which a link leads; None if there is none."
    # executed notebooks of the reference keep the links that they had among the tables
    for folder in (page.parent, NBS / 'tables', NBS / 'lab'):
        place = Path(os.path.normpath(folder / link))
        if place in (INDEX, ROOT / 'README.md'): return ROOT / 'index.md'
        if place == REFERENCE: return REFERENCE / 'README.md'
        if place.parent == REFERENCE and place.is_dir(): return place / 'index.md'
        if place.is_file(): return place
    return None


def relinked(text, page):
    "Markdown whose links lead to pages and files of the site. Other local links become plain text."
    def lead(match):
        path, _, anchor = match[3].partition('#')
        if not path or re.match(r'\w+:', path): return match[0]
        if not (place := find(path, page)): return match[2]
        place = os.path.relpath(place, page.parent) + (f'#{anchor}' if anchor else '')
        return f'{match[1]}[{match[2]}]({place})'
    words = r'(?:[^\[\]]|\[[^\]]*\])*'
    parts = re.split(r'(```.*?```)', text, flags=re.S)
    parts[::2] = [re.sub(rf'(!?)\[({words})\]\(([^)\s]+)\)', lead, part) for part in parts[::2]]
    return ''.join(parts)


def plain(text):
    "Markdown without its marks, on one line."
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return ' '.join(re.sub(r'[*`$>#]', '', text).split())


def alt_text(cells, number):
    "Alternative text for the pictures of a cell: the caption below them, or else the last sentence above."
    below = source(cells[number + 1]).strip() if number + 1 < len(cells) else ''
    if caption := re.match(r'\*([^*]+)\*(\n\n|$)', below): return plain(caption[1])
    above = [source(c) for c in cells[:number] if c['cell_type'] == 'markdown'][-1]
    return plain(re.split(r'(?<=[.:])\s+', above.strip())[-1]).rstrip(':')


def shown_outputs(cell, page):
    "Outputs whose Markdown leads to pages of the site."
    for output in cell.get('outputs', []):
        data = dict(output.get('data', {}))
        if 'text/markdown' in data: data['text/markdown'] = relinked(''.join(data['text/markdown']), page)
        yield output | (dict(data=data) if data else {})


def shown_cells(cells, page):
    "Cells without hidden ones and without directives; pictures get an alternative text."
    for number, cell in enumerate(cells):
        if cell['cell_type'] == 'markdown':
            yield cell | dict(source=relinked(source(cell), page))
            continue
        code = re.sub(r'^#\|.*\n?', '', source(cell), flags=re.M).strip('\n')
        outputs = list(shown_outputs(cell, page))
        if re.search(r'^#\|\s*hide\b', source(cell), re.M) or not (code or outputs): continue
        metadata = cell['metadata']
        if any(kind.startswith('image/') for o in outputs for kind in o.get('data', {})):
            metadata = metadata | dict(mystnb=dict(image=dict(alt=alt_text(cells, number))))
        yield cell | dict(source=code, metadata=metadata, outputs=outputs)


def notebook(path):
    "A notebook as it is shown, with a link to the description of its module."
    book = json.loads(path.read_text())
    cells = list(shown_cells(book['cells'], path))
    directives = '\n'.join(source(c) for c in book['cells'] if c['cell_type'] == 'code')
    if found := re.search(r'^#\|\s*default_exp (\S+)', directives, re.M):
        place = os.path.relpath(ROOT / f'api/cse.{found[1]}.md', path.parent)
        words = f'Exported as [`cse.{found[1]}`]({place}).'
        cells.insert(1, dict(cell_type='markdown', id='exported', metadata={}, source=words))
    metadata = book['metadata'] | (dict(orphan=True) if path.is_relative_to(REFERENCE) else {})
    return json.dumps(book | dict(cells=cells, metadata=metadata))


def markdown(path):
    "A page of Markdown, with a title if it has none."
    text = relinked(path.read_text(), path)
    if text.startswith('# '): return text
    bold = re.match(r'\*\*(.+?)\.?\*\*', text)
    title = bold[1] if bold else path.stem.replace('-', ' ').capitalize()
    return f'---\norphan: true\n---\n\n# {title}\n\n{text}'


def wing_page(folder, title, words):
    "Contents of a folder of notebooks."
    return f'# {title}\n\n{words}\n\n' + toctree(p.stem for p in sorted(folder.glob('*.ipynb')))


def reference_page(folder):
    "Contents of a folder of the reference: its tables and its executed notebooks."
    text = f'---\norphan: true\n---\n\n# {folder.name}\n'
    for title, pattern in dict(Tables='**/*.md', Notebooks='notebooks/*.ipynb').items():
        found = [p.relative_to(folder) for p in sorted(folder.glob(pattern))]
        if found: text += f'\n## {title}\n\n' + ''.join(f'- [{p.stem}]({p})\n' for p in found)
    return text


def start_page():
    "The README, with the contents of the site."
    chapters = [f'nbs/{p.stem}' for p in sorted(NBS.glob('[01]*.ipynb'))]
    tutorials = [f'nbs/tutorials/{p.stem}' for p in sorted(NBS.glob('tutorials/*.ipynb'), reverse=True)]
    contents = {
        'Start': chapters[:1],
        'The method': chapters[1:11],
        'Tables': ['nbs/tables/index', 'results/reference/README'],
        'For engineers': [*tutorials, *chapters[11:]],
        'Wings': [f'nbs/{wing}/index' for wing in WINGS],
        'Reference': ['api/index', 'CONTRIBUTING', 'CHANGELOG']}
    text = relinked((ROOT / 'README.md').read_text(), ROOT / 'README.md')
    return text + '\n' + '\n'.join(toctree(entries, name, hidden=True) for name, entries in contents.items())


def pages():
    "Place in the project → text, for every page of the site."
    found = {ROOT / 'index.md': start_page()}
    for path in [*sorted(NBS.rglob('*.ipynb')), *sorted(REFERENCE.rglob('*.ipynb'))]:
        if path != INDEX and '.ipynb_checkpoints' not in path.parts: found[path] = notebook(path)
    for path in [*sorted(REFERENCE.rglob('*.md')), ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']:
        found[path] = markdown(path)
    for folder in sorted(p for p in REFERENCE.iterdir() if p.is_dir()):
        found[folder / 'index.md'] = reference_page(folder)
    for wing in WINGS:
        words = ast.get_docstring(ast.parse((ROOT / f'cse/{wing}/__init__.py').read_text()))
        found[NBS / wing / 'index.md'] = wing_page(NBS / wing, wing.capitalize(), words)
    words = 'Each notebook regenerates a table. The outputs here come from runs that take seconds.'
    found[NBS / 'tables/index.md'] = wing_page(NBS / 'tables', 'Table notebooks', words)
    return found | {ROOT / 'api' / name: text for name, text in api_pages(ROOT).items()}


def write(folder):
    "Write pages that have changed, the files they show, and remove what is no longer there."
    texts = pages()
    beside = [*REFERENCE.rglob('*'), *(NBS / 'images').iterdir(), ROOT / 'CITATION.cff']
    files = [p for p in beside if p.suffix in COPIED]
    wanted = {folder / p.relative_to(ROOT) for p in [*texts, *files]}
    for old in [p for p in folder.rglob('*') if p.is_file() and p not in wanted]: old.unlink()
    for place, text in texts.items():
        copy = folder / place.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text: copy.write_text(text)
    for file in files:
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)


if __name__ == '__main__':
    write(Path(sys.argv[1]))
