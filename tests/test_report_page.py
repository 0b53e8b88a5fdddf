"The report page is complete, loads nothing and is small; it works in headless Chromium."
import base64
import gzip
import json
import os
import random
import re
import shutil
import time
from html.parser import HTMLParser

import pytest

from chromium import chromium
from cse.lab.parameters import read_asked
from cse.lab.records import load_records, reference_folder
from cse.lab.report_page import write_page
from cse.lab.published import PUBLISHED

REFERENCE = reference_folder()
SCREENSHOTS = REFERENCE.parent / 'report/screenshots'
CAMPAIGN = 'ROBUSTNESS_KILLS' in os.environ  # of `make robustness`
COUNT = 600 if CAMPAIGN else 60


def sheet(path):
    "A picture of as many bytes as a contact sheet may have."
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient('L').resize((296, 456)).save(path, 'webp')
    path.write_bytes((path.read_bytes() + random.Random(str(path)).randbytes(12_000))[:12_000])


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "The reference, with a picture of one run of CSE."
    folder = tmp_path_factory.mktemp('report') / 'results'
    shutil.copytree(REFERENCE, folder, ignore=shutil.ignore_patterns('notebooks', 'evidence', 'tables'))
    key = next(
        r['key']
        for r in load_records(folder / 'built-in-smoke')
        if r['key'].startswith('cse-built-in_surfaces-wood-smoke')
        and r['config']['decoder'] == 'random'
    )
    sheet(folder / f'built-in-smoke/pictures/{key}.webp')
    return folder


def all_records(results):
    "Records of all folders, each once, by key."
    return {r['key']: r for folder in sorted(results.glob('*/records')) for r in load_records(folder.parent)}


@pytest.fixture(scope='module')
def page(results):
    return write_page(results)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def payload(page):
    packed = json.loads(re.search(r'packed = (\{.*?\});', page.read_text())[1])
    return {k: gzip.decompress(base64.b64decode(v)).decode() for k, v in packed.items()}


def test_the_page_loads_nothing(page):
    text = page.read_text()
    for tag, attributes in Elements(text).found:
        loads = [
            v
            for k, v in attributes.items()
            if k in ('src', 'srcset', 'data', 'poster') or k == 'href' and tag != 'a'
        ]
        assert all(v.startswith(('data:', '#')) for v in loads), (tag, attributes)
    assert not re.search(r'@import|url\(\s*["\']?(?!data:)', text)
    policy = next(
        a['content']
        for t, a in Elements(text).found
        if a.get('http-equiv') == 'Content-Security-Policy'
    )
    assert "default-src 'none'" in policy and 'http' not in policy


def test_every_run_and_table_is_there(results, page):
    data, records = json.loads(payload(page)['data']), all_records(results)
    assert [r['key'] for r in data['runs']] == sorted(records)
    for view in data['runs']:
        record = records[view['key']]
        assert data['configs'][view['config']] == record['config']
        assert data['versions'][view['versions']] == record['versions']
    sections = [a for t, a in Elements(page.read_text()).found if t == 'section']
    assert {int(a['data-table']) for a in sections if 'data-table' in a} == set(PUBLISHED)
    assert {a['id'] for a in sections} == {
        *(f'table{n}-{f.parent.name}' for f in results.glob('*/asked.json') for n in read_asked(f.parent)),
        'runs'
    }
    points = {k for t in data['tables'] for s in t['series'] for k in s['keys']}
    assert points <= records.keys() and len(points) > 100


def test_numbers_on_other_images_are_labelled(page):
    for section in re.findall(r'<section id="table.*?</section>', page.read_text(), re.S):
        number = int(re.search('data-table="(.)"', section)[1])
        label = re.search('<li class="other">(.*?)</li>', section)[1]
        words = 'measured on' if number == 3 else f'not {PUBLISHED[number].data}'
        assert words in label
        assert 'paper –' not in section
        assert 'MVTec AD' not in re.search('<h2>(.*?)</h2>', section)[1]


def test_tables_without_runs_show_the_paper(tmp_path):
    source = REFERENCE / 'surfaces-official-tf_efficientnet_lite0'
    for name in ('asked.json', 'records/table1.jsonl.gz'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / name, tmp_path / name)
    text = write_page(tmp_path).read_text()
    assert text.count('no runs yet') == 4 and text.count('not run') > 50 and 'paper 99.8' in text


def test_many_records_with_pictures(results, tmp_path):
    records = [r for r in load_records(results / 'built-in-smoke') if 'timing' not in r]
    folder = tmp_path / 'results'
    (folder / 'records').mkdir(parents=True)
    shutil.copy(results / 'built-in-smoke/asked.json', folder)
    for i in range(COUNT):
        record = records[i % len(records)]
        if i >= len(records):
            record = record | dict(
                seed=record['seed'] + 100 * i, key=f'{record["key"]}-{i}',
                scores=[s * (1 + i / 1000) for s in record['scores']])
        (folder / 'records' / f'{record["key"]}.json').write_text(json.dumps(record))
        sheet(folder / 'pictures' / f'{record["key"]}.webp')
    start = time.perf_counter()
    page = write_page(folder)
    took, size = time.perf_counter() - start, page.stat().st_size / 1e6
    print(f'{COUNT} records with a picture each: {took:.1f} s, {size:.1f} MB')
    assert took < 60 and size < 15
    assert len(json.loads(payload(page)['data'])['pictures']) == COUNT


@pytest.fixture(scope='module')
def browser():
    if not CAMPAIGN:
        pytest.skip('a browser opens the page in `make robustness`')
    with chromium('--hide-scrollbars') as browser:
        browser.set_window_size(1280, 1000)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        yield browser


def wait(browser, script, seconds=60):
    "The value of an expression, once it is true."
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(f'return {script}')):
        assert time.monotonic() < end, f'{script}: not within {seconds} s'
        time.sleep(0.1)
    return value


def shoot(browser, name):
    time.sleep(0.3)
    assert browser.save_screenshot(str(SCREENSHOTS / f'{name}.png'))


@pytest.fixture
def opened(browser, page):
    "The page, in light colours and at the width of a desk."
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    browser.execute_cdp_cmd(
        'Emulation.setEmulatedMedia',
        dict(features=[dict(name='prefers-color-scheme', value='light')])
    )
    browser.get('about:blank')
    for kind in ('browser', 'performance'):
        browser.get_log(kind)
    browser.get(page.as_uri())
    wait(browser, 'document.documentElement.dataset.ready')
    yield browser
    assert [e for e in browser.get_log('browser') if e['level'] in ('SEVERE', 'WARNING')] == []
    messages = [json.loads(e['message'])['message'] for e in browser.get_log('performance')]
    asked = {
        m['params']['request']['url']
        for m in messages
        if m['method'] == 'Network.requestWillBeSent'
    }
    assert {u.split(':')[0] for u in asked} <= {'file', 'blob', 'data'}
    assert [u for u in asked if u.startswith('file')] == [page.as_uri()]


def colour(browser):
    return browser.execute_script('return getComputedStyle(document.body).backgroundColor')


def open_run(browser, key):
    browser.execute_script(f'location.hash = "run={key}"')
    wait(
        browser,
        'document.querySelector("dialog").open && document.querySelectorAll('
        '"#losses .scatterlayer path, #scores .barlayer path").length > 2'
    )


def test_it_loads_and_draws(opened):
    shoot(opened, 'light')
    tables = opened.find_elements('css selector', 'table.dataTable')
    assert len(tables) > 10
    plots = opened.find_elements('css selector', 'section[data-table] .plot')
    for name in [e.get_attribute('id') for e in plots]:
        opened.execute_script(
            f'document.getElementById("{name}").scrollIntoView({{block: "center"}})'
        )
        wait(opened, f'document.querySelectorAll("#{name} .scatterlayer .point").length > 3')
    shoot(opened, 'plot')


def test_points_are_named_when_hovered_and_lead_to_their_run(opened):
    from selenium.webdriver import ActionChains
    opened.execute_script('document.querySelector(".plot").scrollIntoView({block: "center"})')
    point = wait(opened, 'document.querySelector(".plot .scatterlayer .point")')
    ActionChains(opened).move_to_element(point).perform()
    words = wait(opened, 'document.querySelector(".plot .hoverlayer .hovertext")?.textContent')
    assert 'seed 0' in words and '%' in words and 'built-in surfaces' in words
    shoot(opened, 'hover')
    ActionChains(opened).move_to_element(point).click().perform()
    wait(opened, 'document.querySelector("dialog").open')


def test_tables_are_sorted(opened):
    table = opened.find_elements('css selector', '#table1-built-in-smoke table')[0]
    head = table.find_elements('css selector', 'thead th:nth-child(4)')[0]

    def values():
        cells = table.find_elements('css selector', 'tbody td:nth-child(4)')
        return [float(cell.text.split()[0]) for cell in cells]

    before = values()
    opened.execute_script('arguments[0].scrollIntoView({block: "center"})', head)
    assert sorted(before) != before
    for order in sorted(before), sorted(before, reverse=True):
        head.click()
        end = time.monotonic() + 20
        while values() != order and time.monotonic() < end:
            time.sleep(0.1)
        assert values() == order
    search = opened.find_element('css selector', '#runs input[type=search]')
    search.send_keys('padim textile')
    rows = opened.find_elements('css selector', '#all tbody tr')
    records = [r for r in load_records(REFERENCE / 'built-in-smoke')
               if r['key'].startswith('padim-built-in_textiles-')]
    assert len(rows) == len(records) and all('PaDiM' in row.text for row in rows)
    opened.execute_script('document.querySelector("#runs").scrollIntoView()')
    shoot(opened, 'runs')


def test_a_run_is_opened_and_closed(opened, results):
    key = next(results.glob('*/pictures/*')).stem
    open_run(opened, key)
    text = opened.find_element('id', 'detail').text
    for words in (
            'CSE on wood, seed 0', 'built-in surfaces, not the images of the paper',
            '91.9 %', 'Good, highest scores', 'Configuration', key,
            'Built-in surfaces, drawn by this project'):
        assert words in text, words
    assert opened.execute_script('return document.querySelector(".sheet").naturalWidth') == 296
    shoot(opened, 'run')
    opened.find_element('id', 'close').click()
    assert opened.execute_script(
        'return !document.querySelector("dialog").open && !location.hash'
    )
    opened.find_element('css selector', 'section[data-table="1"] tbody td a').click()
    wait(opened, 'document.querySelector("dialog").open')
    assert 'No pictures' in opened.find_element('id', 'detail').text
    timing = next(k for k in all_records(results) if k.startswith('speed-cse_fused'))
    opened.execute_script(f'location.hash = "run={timing}"')
    wait(opened, 'document.querySelectorAll("#calls .scatterlayer .point").length > 20')
    shoot(opened, 'timing')


def test_light_and_dark(opened, page):
    light = colour(opened)
    opened.find_element('id', 'theme').click()
    dark = colour(opened)
    assert light == 'rgb(255, 255, 255)' and max(map(int, re.findall(r'\d+', dark))) < 60
    shoot(opened, 'dark')
    open_run(opened, next(page.parent.parent.glob('*/pictures/*')).stem)
    shoot(opened, 'dark-run')
    opened.execute_cdp_cmd(
        'Emulation.setEmulatedMedia',
        dict(features=[dict(name='prefers-color-scheme', value='dark')])
    )
    opened.get(page.as_uri())
    wait(opened, 'document.documentElement.dataset.ready')
    assert colour(opened) == dark


def test_a_phone_has_no_horizontal_scroll(opened, page):
    opened.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride',
        dict(width=360, height=780, deviceScaleFactor=2, mobile=True)
    )
    opened.get(page.as_uri())
    wait(opened, 'document.documentElement.dataset.ready')
    assert opened.execute_script('return document.documentElement.scrollWidth') == 360
    shoot(opened, 'phone')
    opened.execute_script('document.querySelector(".scroll").scrollIntoView()')
    wait(opened, 'document.querySelectorAll(".plot .scatterlayer .point").length > 3')
    shoot(opened, 'phone-table')
    open_run(opened, next(page.parent.parent.glob('*/pictures/*')).stem)
    dialog = opened.find_element('css selector', 'dialog')
    assert dialog.get_property('scrollWidth') == dialog.get_property('clientWidth')
    assert opened.execute_script('return document.documentElement.scrollWidth') == 360
    shoot(opened, 'phone-run')
