"Every page of the site in headless Chromium, wide and on a phone, after `make docs` has built it."
import json
import os
import re
import time
from pathlib import Path

import pytest

from chromium import chromium

ROOT = Path(__file__).parent.parent
SITE = ROOT / 'docs/_build/html'
PAGES = sorted(p for p in SITE.rglob('*.html') if p.name not in ('genindex.html', 'search.html'))
WIDTHS = {1280: False, 390: True}  # width in pixels → a phone?
pytestmark = pytest.mark.skipif(
    'SITE' not in os.environ, reason='`make docs` opens the pages that it has built')


@pytest.fixture(scope='module')
def browser():
    with chromium() as browser:
        yield browser


def resize(browser, width):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
        width=width, height=900, deviceScaleFactor=1, mobile=WIDTHS[width]))


def asked_for(browser):
    "Addresses that the browser has asked for."
    messages = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    return {m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent'}


FAULTS = '''
const images = [...document.images], page = document.documentElement;
const article = document.querySelector('article'), prose = article.cloneNode(true);
prose.querySelectorAll('pre, code, math').forEach(part => part.remove());
return {
  wide: page.scrollWidth > innerWidth ? `${page.scrollWidth} of ${innerWidth} pixels` : '',
  broken: images.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
  unnamed: images.filter(i => !i.alt.trim() || i.alt.includes('/')).map(i => i.src),
  directives: article.innerText.match(/^#\\|.*$/gm) || [],
  raw: prose.textContent.match(/\\$\\$|\\\\(frac|sum)|\\|---/g) || [],
};'''


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(SITE)))
def test_page(browser, page):
    "No page is wider than its screen, lacks a picture, shows an error or uses a network."
    found = {}
    for width in sorted(WIDTHS, reverse=True):
        resize(browser, width)
        if not found: browser.get(page.as_uri())
        found[f'{width} pixels'] = browser.execute_script(FAULTS)
    said = [e['message'] for e in browser.get_log('browser') if e['level'] in ('SEVERE', 'WARNING')]
    kinds = {url.split(':')[0] for url in asked_for(browser)}  # read before anything fails: logs go on
    assert not any(fault for faults in found.values() for fault in faults.values()), found
    assert said == [] and kinds <= {'file', 'data', 'blob'}


def test_all_kinds_of_pages_are_there():
    names = {str(p.relative_to(SITE)) for p in PAGES}
    notebooks = {p.relative_to(ROOT).with_suffix('.html') for p in (ROOT / 'nbs').rglob('*.ipynb')}
    notebooks -= {p for p in notebooks if p.stem == 'index' or '.ipynb_checkpoints' in p.parts}
    modules = {f'api/cse.{".".join(p.relative_to(ROOT / "cse").with_suffix("").parts)}.html'
               for p in (ROOT / 'cse').rglob('*.py') if not p.name.startswith('_')}
    assert {str(p) for p in notebooks} | modules | {'index.html', 'CONTRIBUTING.html'} <= names


def wait(browser, script, seconds=20):
    "The value of an expression, once it is true."
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(f'return {script}')):
        assert time.monotonic() < end, f'{script}: not within {seconds} s'
        time.sleep(0.1)
    return value


def test_search_works_on_local_files(browser):
    resize(browser, 1280)
    browser.get((SITE / 'search.html').as_uri() + '?q=perlin')
    found = wait(browser, '[...document.querySelectorAll("#search-results li a")].map(a => a.href)')
    assert any('02_defects' in link for link in found)


def test_formulas_are_drawn_without_a_script(browser):
    browser.get((SITE / 'nbs/05_losses.html').as_uri())
    blocks = '[...document.querySelectorAll("math[display=block]")]'
    sizes = browser.execute_script(f'return {blocks}.map(m => m.getBoundingClientRect().height)')
    assert len(sizes) >= 5 and min(sizes) > 15


def test_dark_mode(browser):
    "Text stands out from its background in both."
    def colours():
        script = 'const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]'
        return [sum(map(int, re.findall(r'\d+', c)[:3])) for c in browser.execute_script(script)]
    for scheme, darker in ('light', 0), ('dark', 1):
        browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(
            features=[dict(name='prefers-color-scheme', value=scheme)]))
        browser.get((SITE / 'index.html').as_uri())
        found = colours()
        assert found[darker] < 120 and found[1 - darker] > 500, f'{scheme}: {found}'
