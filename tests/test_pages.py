"What a newcomer reads: numbers from the reference, short sentences, links that lead somewhere."
import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'docs'))
import readme  # noqa: E402

INDEX = ROOT / 'nbs/index.ipynb'
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'results/reference').rglob('*.md'))]


def prose(path):
    "The Markdown of a page, that of outputs included."
    if path.suffix == '.md': return path.read_text(encoding='utf-8')
    parts = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'markdown': parts.append(''.join(cell['source']))
        parts += [''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', [])]
    return '\n\n'.join(parts)


def without_code(text):
    return re.sub(r'```.*?```', '', text, flags=re.S)


# --- README and its figures

@pytest.fixture(scope='module')
def index():
    "The notebook of the README as it is stored, and with figures read from the reference now."
    stored = json.loads(INDEX.read_text(encoding='utf-8'))
    return stored, readme.with_figures(stored)


def test_figures_are_those_of_the_reference(index):
    stored, fresh = index
    for old, new in zip(stored['cells'], fresh['cells']):
        if 'figures' not in old['metadata'].get('tags', []): continue
        old, new = (''.join(c['outputs'][0]['data']['text/markdown']) for c in (old, new))
        assert old == new, 'a quoted figure is not that of its record; run `make prepare`'
    quoted = [c for c in stored['cells'] if 'figures' in c['metadata'].get('tags', [])]
    assert len(quoted) == 3


def test_readme_is_its_notebook(index):
    text, pictures = readme.readme(index[0])
    assert text == (ROOT / 'README.md').read_text(encoding='utf-8'), 'out of step; run `make prepare`'
    assert pictures and all((ROOT / place).read_bytes() == data for place, data in pictures.items())


def test_readme_is_short_and_shows_a_result_first():
    text = (ROOT / 'README.md').read_bytes().decode()
    assert len(text.encode()) <= 8000
    pictures = re.findall(r'!\[(.*?)\]\(', text)
    assert pictures and all(len(alt.split()) > 5 for alt in pictures)
    assert len(text[:text.index('![')].splitlines()) < 10


def test_figures_in_prose_are_linked():
    "A figure that a notebook of the README writes by hand would not follow its record."
    for cell in json.loads(INDEX.read_text())['cells']:
        if cell['cell_type'] == 'markdown':
            assert not re.search(r'\d\.\d (%|points|times)|\d ± \d', without_code(''.join(cell['source'])))


QUOTED = re.compile(r'\[(?=[-−+]?\d)([^\]]+)\]\(([^)\s#]*results/[^)\s#]+\.(?:md|csv))\)')


@pytest.mark.parametrize('path', [*PAGES, *NOTEBOOKS], ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_quoted_figures_stand_in_the_table_they_link_to(path):
    for words, link in QUOTED.findall(prose(path)):
        table = (path.parent / link).read_text(encoding='utf-8').replace('−', '-')
        for number in re.findall(r'[-−]?\d+(?:\.\d+)?', words):
            number = number.replace('−', '-')
            assert re.search(rf'(?<![\d.]){re.escape(number)}(?![\d.]*\d)', table), f'{words}: not in {link}'


# --- sentences

def sentences(text):
    "Sentences of a page, without code, tables and formulas; a formula or a piece of code is one word."
    text = re.sub(r'^(\|.*|#.*|@.*)$', '', without_code(text), flags=re.M)
    text = re.sub(r'\$\$.*?\$\$', '\n\n', text, flags=re.S)
    text = re.sub(r'`[^`]*`|\$[^$]*\$', 'x', text)
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    for part in re.split(r'\n\s*\n|^\s*[-*>] ', text, flags=re.M):
        yield from re.split(r'(?<=[.!?])[*_]*\s+', ' '.join(part.split()))


@pytest.mark.parametrize('path', [ROOT / 'README.md', ROOT / 'nbs/00_one_page.ipynb'], ids=lambda p: p.stem)
def test_sentences_are_short(path):
    found = list(sentences(prose(path)))
    assert len(found) > 30
    long = [s for s in found if len(re.findall(r'[^\W_][\w’\'-]*', s)) > 30]
    assert long == []


CAPTION = re.compile(r'^(?:\*(?!\*)([^*]+)\*|(\*\*(?:Table \d|Model|False).*))$', re.M)


@pytest.mark.parametrize('path', [*PAGES, *NOTEBOOKS], ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_captions_are_two_sentences(path):
    "Below a figure in italics, or above a table after its title; the rest unfolds."
    for figure, table in CAPTION.findall(prose(path)):
        words = figure or re.sub(r'^\*\*.*?\*\*', '', table)
        assert len(words.split()) <= 50 and len(re.findall(r'(?<!\bEq)[.!?](?=\s|$)', words)) <= 2, words


# --- links

def anchors(text):
    "Anchors of the headings of a page, as GitHub and the site make them."
    for heading in re.findall(r'^#{1,6} (.+)$', without_code(text), re.M):
        heading = unicodedata.normalize('NFKC', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)).lower()
        yield re.sub(r'[^\w\- ]', '', heading).strip().replace(' ', '-')


@pytest.mark.parametrize('path', [*PAGES, *NOTEBOOKS], ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_links_lead_somewhere(path):
    text, broken = prose(path), []
    links = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`\n]*`', '', without_code(text)))
    for link in links:
        place, _, anchor = link.partition('#')
        if re.match(r'\w+:', link): continue
        target = path.parent / place if place else path
        if not target.exists(): broken.append(link)
        elif anchor and anchor not in anchors(prose(target)): broken.append(link)
    assert broken == []
    assert links or path.stem not in ('README', 'index', 'CONTRIBUTING')
