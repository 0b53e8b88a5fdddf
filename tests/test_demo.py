"The demo page: what it says about an image, and that it works in a browser and loads nothing else."
import asyncio
import json
import os
import socket
import threading
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from chromium import chromium
from cse.cli import app
from cse.config import Config, ConfigError
from cse.data.images import read_image, resize_crop
from cse.data.reading import DataError
from cse.deploy import demo
from cse.extensions.decisions import Calibration, Scale
from cse.scoring import Scores

CONFIG = Config.smoke(resize=64, crop=48)
SMALL = np.linspace(0.1, 0.5, 39)


def score(paths, progress=False):
    "Brightness of an image and of its places, as a detector returns them."
    maps = []
    for path in paths:
        try:
            maps.append(resize_crop(read_image(path), CONFIG, path).mean(0).numpy())
        except DataError as e:
            raise DataError(f'1 of 1 images have no score: {e}') from e
    maps = np.stack(maps)
    return Scores(maps.mean((1, 2)), maps[:, ::4, ::4], 48, paths)


DETECTOR = SimpleNamespace(score=score, config=CONFIG, calibration=Calibration(SMALL, SMALL + 0.1))


@pytest.fixture
def image(tmp_path):
    "A dark image with a bright square in its middle."
    picture = Image.new('L', (128, 64), 70)
    picture.paste(250, (54, 22, 74, 42))
    picture.save(tmp_path / 'a <b>.png')
    return tmp_path / 'a <b>.png'


def test_an_image_has_the_score_of_its_file(image):
    found = demo.inspect(DETECTOR, image)
    assert found.score == score([image]).image[0] and found.name == image.name
    assert found.photo.mode == 'RGB' and found.coarse.shape == (12, 12) and found.seconds > 0


def test_errors_are_sentences_that_name_the_file(tmp_path):
    (tmp_path / 'x<y.png').write_bytes(b'no image')
    found = demo._found(DETECTOR, str(tmp_path / 'x<y.png'))
    text, picture, bars = demo.answers(DETECTOR, found, 5)
    assert 'role="alert"' in text and 'x&lt;y.png: not a readable image' in text
    assert picture is None and bars == '' and str(tmp_path) not in text
    nothing = SimpleNamespace(image=np.array([np.nan]))
    with pytest.raises(DataError, match='cannot be read'):
        demo.inspect(SimpleNamespace(score=lambda paths: nothing, config=CONFIG), tmp_path / 'x<y.png')
    assert demo.answers(DETECTOR, demo._found(DETECTOR, None), 5) == ('', None, '')


def test_the_false_alarm_rate_changes_the_verdict_and_the_map(image):
    Image.open(image).point(lambda v: v * 2).save(image)
    found = demo.inspect(DETECTOR, image)
    found.score = float(SMALL[-3] + 1e-6)
    shown = {rate: demo.answers(DETECTOR, found, rate) for rate in (2.5, 20)}
    assert '>good<' in shown[2.5][0] and '>defective<' in shown[20][0]
    assert 'a &lt;b&gt;.png: ' in shown[20][0] and '<b>20 %</b>' in shown[20][0]
    for text, picture, bars in shown.values():
        assert picture.size == found.photo.size and ET.fromstring(text.join(['<div>', '</div>']))
        assert ET.fromstring(bars).tag == 'svg'
    assert np.asarray(shown[2.5][1]).astype(int).sum() > np.asarray(shown[20][1]).astype(int).sum()


def changed_inside(found, scale):
    "The pixels that the map changes, inside the frame around the inspected part."
    changed = (np.asarray(demo.drawn(found, scale)) != np.asarray(found.photo)).any(2)
    across, down = (slice(int(n * low) + 3, int(n * high) - 3)
                    for n, low, high in zip(found.photo.size, found.part, found.part[2:]))
    return changed[down, across]


def test_a_clean_image_stays_clean(image):
    scale = Scale(DETECTOR.calibration, 0.05)
    found = demo.inspect(DETECTOR, image)
    found.coarse = np.full((12, 12), scale.transparent)
    assert not changed_inside(found, scale).any()
    found.coarse[3:5, 3:5] = scale.full
    changed = changed_inside(found, scale)
    assert changed.any() and not changed[len(changed) * 2 // 3:].any()


def test_detectors_without_calibration_or_maps(image):
    found = demo.inspect(DETECTOR, image)
    plain = SimpleNamespace(score=score, config=CONFIG)
    text, picture, bars = demo.answers(plain, found, 5)
    assert 'not calibrated' in text and 'threshold' not in text and bars == '' and picture == found.photo
    found.coarse = None
    text, picture, bars = demo.answers(DETECTOR, found, 5)
    assert picture == found.photo and bars


@pytest.mark.parametrize('own', [-50, 0.1, 0.3, 0.5, 0.9, 50])
@pytest.mark.parametrize('scores', [SMALL, [0.3], [0.3] * 30, [0, 1000.]])
def test_every_score_has_a_place_in_the_histogram(scores, own):
    calibration = Calibration(scores)
    drawing = ET.fromstring(demo.histogram(calibration, Scale(calibration, 0.1), own))
    for node in drawing.iter():
        for name in ('x', 'x1', 'x2'):
            assert 0 <= float(node.get(name, 1)) <= 480
        assert float(node.get('height', 0)) <= 100 and 'nan' not in str(node.attrib)
    counts = [int(t.text.split()[0]) for t in drawing.iter('title')]
    assert sum(counts) == len(scores)


@pytest.mark.parametrize('count', [1, 2, 27, 39, 95, 1000])
def test_the_slider_begins_at_what_can_be_promised(count):
    calibration = Calibration(np.arange(count))
    lowest = demo.lowest_rate(calibration)
    calibration.allowed(min(lowest / 100, 0.999))
    assert 0 <= lowest / 100 - calibration.smallest <= 0.001


def test_places_where_no_page_can_be_served(monkeypatch):
    monkeypatch.setattr(demo, 'find_spec', lambda name: name)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f'127.0.0.1:{port}: the page cannot be served here'):
            demo.check_demo('127.0.0.1', port)
    demo.check_demo('127.0.0.1', port)
    with pytest.raises(ConfigError, match='no.such.host.example'):
        demo.check_demo('no.such.host.example', port)
    monkeypatch.setattr(demo, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='demo.. in the checkout'):
        demo.check_demo('127.0.0.1', port)
    done = CliRunner().invoke(app, ['demo', 'wood.cse', '--port', str(port)])
    assert done.exit_code == 2 and "pip install '.[demo]' in the checkout" in done.stderr


def test_every_answer_carries_the_policy():
    async def answer(scope, receive, send):
        await send(dict(type='http.response.start', status=200, headers=[(b'a', b'b')]))
        await send(dict(type='http.response.body', body=b''))

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(demo._with_policy(answer)({}, None, send))
    headers = dict(sent[0]['headers'])
    assert headers[b'a'] == b'b' and b"default-src 'self'" in headers[b'content-security-policy']
    assert sent[1] == dict(type='http.response.body', body=b'')


# --- the page, in `make robustness` and where Gradio is installed

@pytest.fixture
def browser():
    if not ('ROBUSTNESS_KILLS' in os.environ and find_spec('gradio')):
        pytest.skip("runs in `make robustness` where the extra demo is installed: pip install '.[demo]'")
    with chromium('--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream') as browser:
        yield browser


def asked_for(browser):
    "Addresses that the page has asked for, but for data in the page itself."
    messages = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    urls = [m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent']
    return [url for url in urls if not url.startswith(('data:', 'blob:', 'chrome:'))]


def test_the_page_in_a_browser(browser, image, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    serving = threading.Thread(
        target=demo.serve, args=(DETECTOR, 'wood.cse', '127.0.0.1', port), daemon=True)
    serving.start()
    wait = WebDriverWait(browser, 60, ignored_exceptions=(Exception,))

    def find(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def opened(browser):
        browser.get(f'http://127.0.0.1:{port}')
        return True

    def says(*words):
        wait.until(lambda browser: all(w in browser.find_element(By.TAG_NAME, 'body').text for w in words))

    image = image.rename(tmp_path / 'plate.png')
    wait.until(opened)
    wait.until(lambda _: find('input[type=file]'))
    find('input[type=file]')[0].send_keys(str(image))
    says(image.name, 'relative score', 'ms')
    number = find('input[type=number]')[0]
    assert number.get_attribute('min') == '2.5' and number.get_attribute('value') == '5'
    expected = demo.answers(DETECTOR, demo.inspect(DETECTOR, image), 5)[0]
    assert ('defective' in expected) == ('defective' in browser.find_element(By.TAG_NAME, 'body').text)
    find('button[aria-label="Clear"], button[title="Clear"], button[aria-label="Remove Image"]')[0].click()
    wait.until(lambda _: find('input[type=file]'))
    (tmp_path / 'broken.png').write_bytes(b'no image')
    find('input[type=file]')[0].send_keys(str(tmp_path / 'broken.png'))
    says('broken.png: not a readable image')
    urls = asked_for(browser)
    assert urls and [url for url in urls if not url.startswith(f'http://127.0.0.1:{port}/')] == []
    severe = [entry['message'] for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']
    assert [message for message in severe if 'Content Security Policy' in message] == []
