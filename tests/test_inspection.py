"Verdicts, overlays, the report and evaluation: what an engineer sees of a detector."
import ast
import csv
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from chromium import chromium
from cse import Config
from cse.cli import app
from cse.config import ConfigError
from cse.data.images import resize_crop
from cse.deploy.inspection import score_rows, table
from cse.deploy.pictures import looked_at, overlay_files, read_photo, save_overlays
from cse.deploy.report import bars, roc_points, write_report
from cse.extensions.decisions import Calibration, Scale
from cse.metrics import auroc

CAMPAIGN = 'ROBUSTNESS_KILLS' in os.environ  # of `make robustness`
CONFIG = Config.smoke(resize=64, crop=48, resize_mode='square')
GOOD = Calibration(np.arange(40) / 40, peaks=np.arange(40) / 40)


class Detector:
    "Scores an image by the number in its name; nothing is kept but scores and coarse maps."
    interrupted = False
    fitted_on = dict(images=160)

    def __init__(self, calibration=GOOD, config=CONFIG):
        self.calibration, self.config, self.calls = calibration, config, 0

    def score(self, paths, progress=False):
        self.calls += 1
        assert all(isinstance(path, str) for path in paths)
        found = [float(m[0]) if (m := re.search(r'\d+(?=\.\w+$)', path)) else 0 for path in paths]
        image = np.float32(found) / 10
        image[['unreadable' in path for path in paths]] = np.nan
        coarse = np.repeat(image, 16).reshape(-1, 4, 4) * np.eye(4, dtype=np.float32)
        return SimpleNamespace(image=image, coarse=coarse, paths=paths)


@pytest.fixture
def detector(monkeypatch):
    "What every command loads; a test may change it."
    found = Detector()
    for reader in ('saving.load', 'runtime.open_detector'):
        monkeypatch.setattr(f'cse.deploy.{reader}', lambda *args, **other: found)
    return found


def draw(path, size=(64, 64), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(path.name)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


@pytest.fixture
def images(tmp_path):
    "Good parts 1 to 6, defective ones 8 to 30; 10 is the threshold, nearly."
    for name in ('good/1', 'good/6', 'good/12', 'bad/8', 'bad/20', 'bad/30'):
        draw(tmp_path / f'parts/{name}.png')
    return tmp_path / 'parts'


def run(*words, status=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == status, done.output
    return done


# --- without PyTorch

def imported(module, seen):
    "Modules of this project that come with one, and packages that come with them."
    path = Path('cse', *module.split('.')[1:])
    source = (Path(__file__).parent.parent / path).with_suffix('.py')
    for node in ast.parse(source.read_text()).body:  # not inside of functions
        names = [alias.name for alias in getattr(node, 'names', [])] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ['.'.join([*module.split('.')[:-node.level], node.module]) if node.level else node.module]
        for name in set(names) - seen:
            seen.add(name)
            if name.startswith('cse.'):
                imported(name, seen)
    return seen


@pytest.mark.parametrize('name', ['inspection', 'pictures', 'report'])
def test_what_scores_and_draws_imports_no_pytorch(name):
    found = {module.split('.')[0] for module in imported(f'cse.deploy.{name}', set())}
    heavy = {'torch', 'timm', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'skimage', 'torchvision'}
    assert {'numpy', 'cse'} <= found and not heavy & found


# --- the table and its files

def test_the_worst_come_first_and_the_promise_is_told(detector, images):
    lines = run('score', 'model', images).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:7]] == ['defective'] * 3 + ['good'] * 3
    assert [line.rsplit('/', 1)[1] for line in lines[1:7]] == [f'{n}.png' for n in (30, 20, 12, 8, 6, 1)]
    assert lines[7].startswith('relative score: 0 is usual') and 'p-value: ' in lines[7]
    assert lines[8] == '3 of 6 flagged (false-alarm rate at most 5 %)'
    detector.calibration = Calibration(GOOD.scores[:9])
    assert 'at most 10 %, the least that 9 calibration images can promise; 5 % needs 19' in \
        run('score', 'model', images).stdout
    assert '(false-alarm rate at most 20 %)' in run('score', 'model', images, '--alpha', 0.2).stdout


def test_a_rate_that_cannot_be_promised_is_refused_before_the_work(detector, images):
    labelled = '--good', images / 'good', '--bad', images / 'bad'
    for alpha, words in ((0.001, 'cannot promise'), (5, 'between 0 and 1')):
        for command in (['score', 'model', images], ['evaluate', 'model', *labelled]):
            assert words in run(*command, '--alpha', alpha, status=2).stderr
    assert not detector.calls


def test_files_have_all_images_in_the_order_given(detector, images, tmp_path):
    draw(images / 'unreadable 5.png')
    given = [images / 'bad', images / 'unreadable 5.png', images / 'good']
    done = run('score', 'model', *given, '--csv', tmp_path / 'x.csv', status=1)
    assert 'x.csv' not in done.stdout and '1 of 7 images could not be read' in done.stderr
    rows = list(csv.DictReader((tmp_path / 'x.csv').open()))
    assert list(rows[0]) == ['path', 'decision', 'relative_score', 'score', 'p_value']
    assert [Path(row['path']).stem for row in rows] == ['20', '30', '8', 'unreadable 5', '1', '12', '6']
    assert rows[0]['score'] == '2.0' and rows[3]['score'] == '' and rows[3]['decision'] == 'unreadable'
    assert max(len(value) for row in rows for name, value in row.items() if name != 'path') <= 10
    lines = run('score', 'model', *given, '--json', '--csv', tmp_path / 'x.csv', status=1).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    empty = dict(decision='unreadable')  # what CSV has for null
    assert [{k: str(empty.get(k, '') if v is None else v) for k, v in row.items()} for row in found] == rows
    assert 'written: ' in run('score', 'model', images / 'good', '--csv', tmp_path / 'x.csv').stderr
    quiet = run('score', 'model', images / 'good', '--csv', tmp_path / 'x.csv', '-q')
    assert quiet.output == '1 of 3 flagged (false-alarm rate at most 5 %)\n'


def test_thousands_of_images_print_twenty():
    rows = [dict(path=f'{i}.png', decision='good', relative_score=i / 9, score=i) for i in range(5000)]
    lines = table(rows).splitlines()
    assert len(lines) == 22 and lines[1].endswith('4999.png') and '4980 more' in lines[-1]


@pytest.mark.parametrize('words, expected', [
    (['--csv', '{}/x', '--html', '{}/x'], '--csv and --html: both are'),
    (['--html', '{}/parts/good/1.png'], 'is one of the images'), (['--html', '{}/parts'], 'is a folder'),
    (['--html', 'model/x.html'], 'lies in the folder of the detector'),
    (['--overlays', '{}/parts/maps'], 'another one'), (['--overlays', '{}'], 'would replace the image')])
def test_nothing_is_written_over_what_is_there(detector, images, tmp_path, words, expected):
    places = [word.format(tmp_path) for word in words]
    sources = [draw(tmp_path / 'other/1.png').parent, images / 'good', images / 'bad']
    if 'another one' in expected:
        sources = [images]
    assert expected in run('score', 'model', *sources, *places, status=2).stderr
    assert not detector.calls


# --- overlays

@pytest.mark.parametrize('mode, resize, crop', [
    ('square', 64, 48), ('square', 48, 48), ('shorter', 64, 48), ('shorter', 48, 48), ('square', 0, 48)])
@pytest.mark.parametrize('size', [(96, 96), (200, 80), (61, 130)])
def test_the_part_that_is_looked_at_is_that_of_the_detector(mode, resize, crop, size):
    "Measured on an image whose values are its coordinates."
    config = Config.smoke(resize=resize, crop=crop, resize_mode=mode)
    width, height = size
    x, y = ((torch.arange(n) + 0.5) / n for n in size)
    x, y = x.expand(height, width), y[:, None].expand(height, width)
    seen = resize_crop(torch.stack([x, y, 0 * x]), config)
    part = looked_at(size, config)
    edges = [seen[i].mean(i) for i in (0, 1)]  # of pixels' centres
    for i, edge in enumerate(edges):
        pixel = (part[i + 2] - part[i]) / crop
        assert abs(edge[1] - 1.5 * pixel - part[i]) < 0.01
        assert abs(edge[-2] + 1.5 * pixel - part[i + 2]) < 0.01


def test_a_clean_image_stays_clean_alone_and_among_others(images, tmp_path):
    paths, scale = [str(images / name) for name in ('good/1.png', 'bad/30.png')], Scale(GOOD, 0.05)
    whole = CONFIG.replace(resize=48)
    for several in (paths[:1], paths):
        scores = Detector().score(several)
        files = overlay_files(several, [images], tmp_path / str(len(several)))
        assert save_overlays(scores, scale, whole, files) == []
        clean = np.asarray(Image.open(files[0]))
        assert (clean == np.asarray(read_photo(paths[0], whole, 1024)[0])).all()
    original = np.asarray(Image.open(paths[1]))
    drawn = np.asarray(Image.open(files[1]))
    assert (drawn[4, 4] != original[4, 4]).any() and (drawn[4, 60] == original[4, 60]).all()


def test_outside_of_the_line_the_original_is_kept(images, tmp_path):
    path = draw(images / '99.png', (128, 64))
    files = overlay_files([str(path)], [images], tmp_path / 'maps')
    save_overlays(Detector().score([str(path)]), Scale(GOOD, 0.05), CONFIG, files)
    drawn, original = (np.asarray(Image.open(p)) for p in (files[0], path))
    inside = np.zeros(drawn.shape[:2], bool)
    inside[8:56, 16:112] = True  # the centre 48 of 64
    assert drawn.shape == original.shape and (drawn[~inside] == original[~inside]).all()
    assert (drawn[8, 16:112] == 0).all() and (drawn[9, 17:111] == 255).all()


def test_overlays_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('in').mkdir()
    paths = ['in/x.jpg', 'in/x.png', 'in/x.jpg.png', 'in/X.tif', 'in/b/x.jpg', 'in/a.b.png']
    files = overlay_files(paths, [Path('in')], Path('maps'))
    assert [f.as_posix() for f in files] == [
        'maps/x.jpg-2.png', 'maps/x.png', 'maps/x.jpg.png', 'maps/X.tif.png', 'maps/b/x.png', 'maps/a.b.png']
    with pytest.raises(ConfigError, match='would replace the image in/x.png'):
        overlay_files(['in/x.png'], [Path('in')], Path('in'))


def test_an_old_calibration_draws_no_maps(detector, images, tmp_path):
    detector.calibration = Calibration(GOOD.scores)
    done = run('score', 'model', images, '--overlays', tmp_path / 'maps', status=2)
    assert 'calibrate it again' in done.stderr and not detector.calls
    run('score', 'model', images, '--html', tmp_path / 'x.html', '-q')
    page = (tmp_path / 'x.html').read_text()
    assert 'calibrated before maps had a scale' in page and '"map"' not in page and page.count('id="p') == 6


def test_files_of_every_kind_are_drawn(detector, tmp_path):
    folder = tmp_path / 'in'
    for mode in ('L', 'P', 'RGBA', 'CMYK', '1'):
        draw(folder / f'{mode}30.{"jpg" if mode == "CMYK" else "png"}', (90, 60), mode)
    Image.fromarray(np.full((60, 90), 4095, np.uint16)).save(folder / 'twelve30.png')
    turned = Image.Exif()
    turned[0x0112] = 6
    draw(folder / 'turned30.jpg', (60, 90)).rename(folder / 'stored.jpg')
    Image.open(folder / 'stored.jpg').save(folder / 'turned30.jpg', exif=turned)
    (folder / 'stored.jpg').unlink()
    draw(folder / 'long30.png', (4000, 50))
    detector.config = CONFIG.replace(bits=12)
    run('score', 'model', folder, '--overlays', tmp_path / 'maps', '--html', tmp_path / 'x.html')
    sizes = {path.stem: Image.open(path).size for path in (tmp_path / 'maps').iterdir()}
    assert sizes.pop('long30') == (1024, 13) and set(sizes.values()) == {(90, 60)} and len(sizes) == 7
    rows = json.loads(re.search(r'id="rows">(.*?)</script>', (tmp_path / 'x.html').read_text())[1])
    assert {tuple(row['size']) for row in rows} == {(90, 60), (320, 4)}


# --- the report

class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_report_loads_nothing_and_escapes_everything(detector, tmp_path):
    names = '<img src=x onerror=alert(1)>20.png', '</script><b>30.png', '$rows 2.png'
    names = *names, os.fsdecode(b'kn\xf6t1.png')  # no text in any encoding
    sources = [draw(tmp_path / 'in' / name) for name in names]
    page = tmp_path / 'x.html'
    run('score', tmp_path / '<i>m.cse', *sources, '--html', page)
    text = page.read_text(encoding='utf-8')
    assert '<img src=x' not in text and '<i>m' not in text and '&lt;i&gt;m.cse' in text
    for tag, attributes in Elements(text).found:
        loads = [v for k, v in attributes.items() if k in ('src', 'srcset', 'href')]
        assert all(v.startswith('data:') for v in loads), (tag, attributes)
    policy = next(a['content'] for t, a in Elements(text).found if 'http-equiv' in a)
    assert "default-src 'none'" in policy and 'http' not in policy
    rows = json.loads(re.search(r'id="rows">(.*?)</script>', text)[1])
    assert [row['decision'] for row in rows] == ['defective', 'defective', 'good', 'good']
    assert rows[2]['path'].endswith('$rows 2.png')
    assert '2 of 4 images flagged' in text and '160 good images' in text


def test_a_vanished_image_costs_only_its_picture(images, tmp_path):
    paths = [str(path) for path in sorted(images.rglob('*.png'))]
    found = Detector()
    scores, scale = found.score(paths), Scale(GOOD, 0.05)
    (images / 'bad/8.png').unlink()
    rows = score_rows(scores, GOOD, scale)
    assert write_report(tmp_path / 'x.html', found, Path('m'), scale, scores, rows) == []
    text = (tmp_path / 'x.html').read_text()
    assert len(re.findall('id="p[0-9]+"', text)) == 5 and '8.png' in text
    failed, = save_overlays(scores, scale, CONFIG, [tmp_path / f'{i}.png' for i in range(6)])
    assert '8.png: no such file' in failed


def test_histogram_and_curve_agree_with_counts():
    values = np.random.default_rng(0).normal(0.8, 0.7, 500).round(1)
    counts = bars(values, -2, 4)
    assert counts.sum() == 500 and counts[30:].sum() == (values > 1).sum()  # 1 itself is not above
    labels = np.random.default_rng(1).integers(0, 2, 500)
    false_alarms, found = roc_points(labels, values)
    assert np.trapezoid(found, false_alarms) == pytest.approx(auroc(labels, values))


# --- evaluation

def test_folders_and_tables_of_labels_give_the_same_figures(detector, images, tmp_path):
    lines = [f'parts/{p.relative_to(images)};{label}' for kind, label in (('good', 'OK'), ('bad', 'n.i.O.'))
             for p in sorted((images / kind).iterdir())]
    (tmp_path / 'labels.csv').write_text('\ufeffPath;Label\n' + '\n'.join(lines))
    given = ['--good', images / 'good', '--bad', images / 'bad'], ['--labels', tmp_path / 'labels.csv'], \
        ['--good', images / 'good/1.png', '--good', images / 'good/6.png', '--good', images / 'good/12.png',
         '--bad', images / 'bad']
    found = [json.loads(run('evaluate', 'model', *words, '--json', '-q').stdout) for words in given]
    assert found[0] == found[1] == found[2]
    about = found[0]
    assert (about['images'], about['good'], about['misses'], about['false_alarms']) == (6, 3, 1, 1)
    assert [Path(m['path']).name for m in about['missed']] == ['8.png']
    assert [Path(m['path']).name for m in about['falsely_flagged']] == ['12.png']
    assert about['auroc'] == pytest.approx(8 / 9) and 'pixel_auroc' not in about
    text = run('evaluate', 'model', *given[0], '--html', tmp_path / 'x.html').stdout
    assert re.search(r'defective +2 +1 .*\ngood +1 +2 ', text)
    assert '1 miss, ' in text and '1 false alarm, ' in text
    page = (tmp_path / 'x.html').read_text()
    assert '1 miss and 1 false alarm in 6 images' in page
    assert 'ROC curve' in page and '"label": "defective"' in page


@pytest.mark.parametrize('words, expected', [
    ('', 'expected one of a CATEGORY'), ('{}/parts --labels {}/x.csv', 'expected one of a CATEGORY'),
    ('--good {}/parts/good', '--bad: is missing'), ('--bad {}/parts/bad', '--good: is missing'),
    ('--good {}/parts/good --bad {}/parts', 'as good and as bad'),
    ('--labels {}/none.csv', 'cannot be read'), ('--labels {}/parts', 'cannot be read'),
    ('--labels {}/x.csv', "x.csv, line 3: label 'perhaps'"),
    ('--good {}/parts/good --bad {}/none', 'no such folder'), ('{}/parts', 'train/good: no such folder'),
    ('--good {}/parts/good --bad {}/parts/bad --html {}/parts/good/1.png', 'is one of the images')])
def test_labels_are_checked_before_the_detector_is_read(images, tmp_path, monkeypatch, words, expected):
    monkeypatch.setattr('cse.deploy.saving.load', None)
    (tmp_path / 'x.csv').write_text('path,label\nparts/good/1.png,0\nparts/good/6.png,perhaps\n')
    assert expected in run('evaluate', 'model', *words.replace('{}', str(tmp_path)).split(), status=2).stderr


@pytest.mark.parametrize('command', [
    ['score', 'model', '{}'], ['evaluate', 'model', '--good', '{}/good', '--bad', '{}/bad']])
def test_images_of_another_size_than_the_fitted_ones_are_told(detector, images, tmp_path, command):
    command = [word.format(images) for word in command]
    told = 'differ from those of the fit'
    assert told not in run(*command).stderr  # a detector of an earlier version knows no sizes
    detector.fitted_on = dict(images=160, sizes=[[60, 64], [64, 70]])
    assert told not in run(*command).stderr
    for name, size in (('good/2', (300, 60)), ('bad/25', (20, 20))):
        draw(images / f'{name}.png', size)
    done = run(*command, '--html', tmp_path / 'x.html', '-q')
    assert '2 of 8 images differ from those of the fit (60×64 to 64×70 pixels)' in done.stderr
    assert done.stderr.count(told) == 1 and told in (tmp_path / 'x.html').read_text()
    assert not run(*command, '--json', '-q').stdout.count(told)


def test_a_series_unlike_the_calibration_is_told(detector, images, tmp_path):
    "Half of the calibration images score below 0; a series of ten in which none does was taken otherwise."
    series = tmp_path / 'series'
    for i in range(7, 16):
        draw(series / f'{i}.png')
    told = 'these images were taken in another way'
    assert told not in run('score', 'model', series).stderr  # nine say nothing
    draw(series / '16.png')
    done = run('score', 'model', series, '--html', tmp_path / 'x.html', '-q')
    assert done.stderr.count(told) == 1 and told in (tmp_path / 'x.html').read_text()
    assert told not in run('score', 'model', series, images).stderr  # some look as usual


def test_false_alarms_beyond_chance_are_told_without_progress_too(detector, images):
    for i in range(13, 30):
        draw(images / f'good/{i}.png')
    done = run('evaluate', 'model', '--good', images / 'good', '--bad', images / 'bad', '-q')
    assert 'more than chance explains' in done.stderr and 'like these test images' in done.stderr


def test_folders_that_may_be_swapped_are_told(detector, images):
    for i in range(13, 40):
        draw(images / f'bad/{i}.png')
    good, bad = ('--good', images / 'good'), ('--bad', images / 'bad')
    assert 'swapped' not in run('evaluate', 'model', *good, *bad).stderr
    done = run('evaluate', 'model', '--bad', good[1], '--good', bad[1], '--json', '-q')
    assert '--good and --bad, or the labels, are swapped' in done.stderr
    assert json.loads(done.stdout)['auroc'] < 0.1  # computed as requested, with a warning


@pytest.mark.parametrize('command', ['score', 'calibrate', 'evaluate', 'watch'])
def test_a_detector_in_the_place_of_the_images_is_told(images, tmp_path, monkeypatch, command):
    monkeypatch.setattr('cse.deploy.saving.load', None)
    (tmp_path / 'part.cse').mkdir()
    (tmp_path / 'part.cse/model.json').touch()
    meant = f'`cse {command} {tmp_path}/part.cse {images}`'
    assert meant in run(command, images, tmp_path / 'part.cse', status=2).stderr


def test_overlays_replace_overlays_only(detector, images, tmp_path):
    command = 'score', 'model', images / 'good', '--overlays', tmp_path / 'maps', '-q'
    run(*command)
    run(*command)
    draw(next((tmp_path / 'maps').rglob('*.png')))
    assert 'exists and is not an overlay' in run(*command, status=2).stderr


# --- in a browser, with `make robustness`

@pytest.fixture(scope='module')
def browser():
    if not CAMPAIGN:
        pytest.skip('a browser opens the report in `make robustness`')
    with chromium() as browser:
        yield browser


@pytest.fixture(scope='module')
def page(surface, tmp_path_factory):
    "A thousand images with labels."
    files = sorted((surface / 'gravel').rglob('test/*/*.png'))
    rng = np.random.default_rng(0)
    image = rng.gamma(2, 0.4, 1000).astype(np.float32)
    coarse = rng.random((1000, 28, 28), np.float32) * image[:, None, None]
    scores = SimpleNamespace(image=image, coarse=coarse, paths=[str(files[i % 6]) for i in range(1000)])
    scale = Scale(GOOD, 0.05)
    rows = score_rows(scores, GOOD, scale)
    for i, row in enumerate(rows):
        row['label'] = 'good' if i % 3 else 'defective'
    figures = dict(images=1000, good=666, misses=1, false_alarms=2, auroc=0.5, auroc_low=0.4, auroc_high=0.6,
                   false_positive_rate=0.1, detection_rate=0.2)
    path = tmp_path_factory.mktemp('report') / 'report.html'
    assert write_report(path, Detector(), Path('gravel.cse'), scale, scores, rows, figures, ['a note']) == []
    assert path.stat().st_size < 30e6
    return path


def shown(browser, css):
    return browser.execute_script(f"return [...document.querySelectorAll('{css}')].map(x => x.textContent)")


def test_a_thousand_images_open_and_can_be_sorted_and_filtered(browser, page):
    start = time.perf_counter()
    browser.get(page.as_uri())
    assert browser.execute_script('return document.documentElement.dataset.ready') == 'yes'
    took = time.perf_counter() - start
    print(f'1,000 images: {page.stat().st_size / 1e6:.1f} MB, open in {took:.1f} s')
    assert took < 3
    click = "document.querySelector('{}').click()".format
    assert shown(browser, '.card .tag.wrong')[:3] == ['miss'] * 3  # mistakes first
    browser.execute_script(click('[data-kind=alarm]'))
    assert set(shown(browser, '.card .tag.wrong')) == {'false alarm'}
    for css in ('#view', '[data-kind=all]', '[data-order=worst]'):
        browser.execute_script(click(css))
    falling = [float(text) for text in shown(browser, '#table td:nth-child(3)')]
    assert falling == sorted(falling, reverse=True) and len(falling) >= 48
    browser.execute_script(click('[data-order=best]'))
    rising = [float(text) for text in shown(browser, '#table td:nth-child(3)')]
    assert rising == sorted(rising) and rising[0] < falling[-1]
    browser.find_element('id', 'search').send_keys('bar/01')
    assert shown(browser, '#count')[0].endswith(' of 1000 images')
    assert set(shown(browser, 'td.file')) == {'bar/01.png'}
    assert browser.get_log('browser') == []


def test_images_open_with_the_keyboard_and_fit_a_phone(browser, page):
    from selenium.webdriver.common.keys import Keys
    for width, scheme in ((1280, 'light'), (390, 'dark')):
        browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
            width=width, height=844, deviceScaleFactor=1, mobile=width < 600))
        browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(
            features=[dict(name='prefers-color-scheme', value=scheme)]))
        browser.get(page.as_uri())
        assert browser.execute_script('return document.documentElement.scrollWidth') <= width
        browser.find_element('css selector', '.card').send_keys(Keys.ENTER)
        first = shown(browser, 'dialog .path')
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert shown(browser, 'dialog .top span') == ['2 of 1000']
        photo = browser.execute_script("return document.querySelector('dialog img').naturalWidth")
        assert photo > 0 and first
        browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert not browser.execute_script("return document.querySelector('dialog').open")
        assert browser.execute_script("return [...document.images].every(x => x.hasAttribute('alt'))")
        assert browser.get_log('browser') == []
