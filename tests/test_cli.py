"The command line: several images, other encodings, any file name, and refusals that leave nothing behind."
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import cse
from cse import CSE, Config
from cse.cli import app
from cse.extensions.calibration import CalibratedCSE
from cse.lab.parameters import run_table
from cse.lab.tables import publish

TINY = dict(epochs=1, engine='torch', resize=64, crop=64,
            extractor='test_efficientnet', weights='random')
COMMANDS = list(typer.main.get_command(app).commands)
assert {'fit', 'score', 'watch', 'tables'} < set(COMMANDS)
UNDECODABLE = os.fsdecode(b'kn\xf6t.png')
NAMES = ['plain.png', 'äste.png', '日本.png', 'λ€.png', '🙂.png', 'a, "b".png', 'two\nlines.png', UNDECODABLE]


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    return [write_image(folder / f'{i}.png', i) for i in range(12)]


@pytest.fixture(scope='module')
def model(good, tmp_path_factory):
    detector = CalibratedCSE(Config.smoke(**TINY)).fit(good, progress=False, held_out=0.4)
    return detector.save(tmp_path_factory.mktemp('model') / 'm.cse')


@pytest.fixture(scope='module')
def named(tmp_path_factory):
    "Images with names that few encodings can represent."
    folder = tmp_path_factory.mktemp('named') / 'größe'
    for i, name in enumerate(NAMES):
        write_image(folder / name, 50 + i)
    return folder


def run(*words, charset='utf-8', status=0):
    done = CliRunner(charset=charset).invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == status, done.output
    return done


def scores(*words):
    lines = run('score', *words, '--json', '-q').stdout.splitlines()
    return {i['path']: i['score'] for i in map(json.loads, lines)}


# --- help and version

@pytest.mark.parametrize('words', [[], *([name] for name in COMMANDS)], ids=['cse', *COMMANDS])
def test_help_is_short_and_long_and_plain_text(words):
    short = run(*words, '-h').stdout
    assert short == run(*words, '--help').stdout and short.startswith('Usage') and short.isascii()


def test_version():
    assert run('--version').stdout == f'cse {cse.__version__}\n'
    assert "No such option: -V" in run('-V', status=2).stderr


# --- several images

def test_images_and_folders_are_scored_in_their_order_and_once(good, named, model, tmp_path):
    both = scores(model, good[3], named, good[1], good[3])
    files = [str(good[3]), *sorted(str(named / name) for name in NAMES), str(good[1])]
    assert list(both) == files
    alone = scores(model, named) | scores(model, good[1]) | scores(model, good[3])
    assert both == pytest.approx(alone, rel=1e-4)


def test_overlays_of_several_folders_keep_their_places(good, model, tmp_path):
    for part in ('a/x.png', 'a/deep/x.png', 'b/x.png', 'c.png'):
        shutil.copy(good[0], write_image(tmp_path / 'in' / part, 0))
    inside = tmp_path / 'in'
    cases = (['a', 'b', 'c.png'], ['a/deep/x.png', 'a/x.png', 'b/x.png', 'c.png']), \
        (['a'], ['deep/x.png', 'x.png']), (['a/x.png'], ['x.png']), \
        (['a/deep', 'a/../b'], ['a/deep/x.png', 'b/x.png'])
    for i, (sources, expected) in enumerate(cases):
        run('score', model, *(inside / s for s in sources), '--overlays', tmp_path / str(i), '-q')
        found = (p.relative_to(tmp_path / str(i)).as_posix() for p in (tmp_path / str(i)).rglob('*.png'))
        assert sorted(found) == expected


def test_one_bad_source_among_several(good, model, tmp_path):
    (folder := tmp_path / 'own').mkdir()
    shutil.copy(good[0], folder)
    (broken := folder / 'broken.png').write_bytes(b'')
    done = run('score', model, good[1], broken, folder / '0.png', '-q', status=1)
    assert len(done.stdout.splitlines()) == 6 and done.stdout.count('unreadable') == 1
    assert '1 of 3 images could not be read' in done.stderr
    refused = ([tmp_path / 'nowhere'], 'nowhere'), (['--overlays', folder / 'maps'], 'another one'), \
        (['--csv', good[2]], 'is one of the images')
    for words, expected in refused:
        done = run('score', model, good[2], folder, *words, '-q', status=2)
        assert expected in done.stderr and not done.stdout
    assert "Missing argument 'IMAGES'" in run('score', model, status=2).stderr


# --- encodings

@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'cp437', 'shift_jis', 'utf-16', 'utf-8'])
def test_no_score_is_lost_to_an_encoding(named, model, encoding):
    done = run('score', model, named, '-q', charset=encoding)
    text = done.stdout_bytes.decode(encoding, 'surrogateescape' if encoding == 'utf-8' else 'strict')
    shown = [line.rsplit('/', 1)[1] for line in text.splitlines()[1:-2]]
    expected = scores(model, named)
    for path in sorted(expected, key=expected.get, reverse=True):
        name = path.rsplit('/', 1)[1].replace('\n', '\\n')
        if encoding != 'utf-8':
            name = name.encode(encoding, 'backslashreplace').decode(encoding)
        assert shown.pop(0) == name
    assert not shown and 'Traceback' not in done.stderr


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_every_answer_can_be_printed(named, model, tmp_path, encoding):
    folder = tmp_path / UNDECODABLE / '日本'
    write_image(folder / 'a.png', 99)
    for words in (['show-config', 'paper'], ['score', model, folder, '--csv', folder / 'λ.csv'],
                  ['calibrate', model, named, '-o', folder / 'λ.cse']):
        run(*words, charset=encoding).stdout_bytes.decode(encoding)
    done = run('score', folder, folder, status=2, charset=encoding)
    assert 'kn\\udcf6t.png' in done.stderr and 'no such file' in done.stderr
    assert cse.load(folder / 'λ.cse').calibration and (folder / 'λ.csv').exists()


def test_a_grid_is_not_lost_to_a_name(own_surface, tmp_path, monkeypatch):
    "Odd names of a category and of images do not stop a table."
    category = (own_surface / 'gravel').rename(own_surface / 'λ')
    for part in ('train/good/00.png', 'test/bar/00.png', 'test/good/06.png'):
        path = category / part
        path.rename(path.with_name(UNDECODABLE))
    (category / 'ground_truth/bar/00_mask.png').rename(
        category / 'ground_truth/bar' / UNDECODABLE.replace('.png', '_mask.png'))
    monkeypatch.setattr(sys, 'stdout', out := io.TextIOWrapper(io.BytesIO(), 'ascii'))
    given = dict(profile='smoke', settings=dict(resize=64, crop=64), methods='mean_distance')
    records = run_table(1, data=str(own_surface), results=str(tmp_path / 'results'), **given)
    publish(records, 1, tmp_path / 'results')
    assert b'mean_distance \\u03bb seed 0' in out.buffer.getvalue()
    assert 'λ' in next((tmp_path / 'results/tables').glob('*.md')).read_text(encoding='utf-8')
    category.rename(own_surface / UNDECODABLE)
    with pytest.raises(ValueError, match=r"category='kn\\udcf6t.png': is no text"):
        run_table(1, data=str(own_surface), **given)


# --- what is refused leaves nothing

def test_what_is_refused_makes_no_folder(good, model, tmp_path):
    new, few, none = (tmp_path / name for name in ('new', 'few', 'none'))
    for path in good[:6]:
        shutil.copy(path, write_image(few / path.name, 0))
    settings = [w for name, value in TINY.items() for w in ('--set', f'{name}={value}')]
    refused = [('calibrate', model, few, '-o', new), ('calibrate', model, none, '-o', new / 'deep'),
               ('score', model, none, '--overlays', new), ('score', model, few, none, '--csv', new / 'x.csv')]
    (few / 'broken.png').write_bytes(b'')
    refused += [('fit', few, '-o', new, *settings), ('fit', few, '-o', new, '--held-out', 0, *settings)]
    for words in refused:
        assert 'error: ' in run(*words, '-q', status=2).stderr
        assert not new.exists(), words
    assert 'cannot be written as' in run('export', model, '--to', 'onnx', '-o', new / 'x.y', status=2).stderr
    with pytest.raises(ValueError, match='broken.png'):
        CSE(Config.smoke(**TINY)).fit(few, progress=False, folder=new)
    assert not new.exists()


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    "As in `cse show-config paper | head -1`."
    code = 'from cse.cli import app; app(["show-config", "paper"])'
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, '-c', code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, '')


def test_info_says_what_a_report_of_a_fault_needs():
    found = json.loads(run('info', '--json').stdout)
    assert found['cse'] == cse.__version__ and found['engine'] in ('openvino', 'torch') and found['torch']
    lines = run('info').stdout.splitlines()
    assert [line.split(': ')[0] for line in lines] == list(found) and 'cores' in found['cpu']
