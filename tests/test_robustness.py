"Grids that are killed, run twice at once, or find no room: no record is lost or damaged."
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from cse import CSE
from cse.config import Config, ConfigError
from cse.data.files import check_writable
from cse.lab.grid import grid
from cse.lab.records import load_records
from cse.lab.runs import run
from cse.lab.comparison import comparison
from cse.training import Progress, TrainingError

KILLS = int(os.environ.get('ROBUSTNESS_KILLS', 2))
SEEDS = 12

# a grid of runs that take tenths of a second: the method scores by the mean of an image and its seed
GRID = '''
import sys, time
from types import SimpleNamespace
import torch
from cse.config import Config
from cse.data.images import Images
from cse.detector import Detector
from cse.lab.grid import grid
from cse.lab.runs import METHODS

class Mean(Detector):
    def fit(self, images, progress=True):
        Images(images, self.config).check()
        self.extractor = SimpleNamespace(
            origin=dict(weights="none"), info=dict(name="none", sha256=None), device=torch.device("cpu"))
        time.sleep(0.15)
        self._fitted = True
        return self

    def _scored(self, images):
        return (images.mean((1, 2, 3)) * (self.seed + 1)).sin(), torch.zeros(len(images), 2, 2)

METHODS["mean"] = Mean
data, results, count = sys.argv[1:]
print("ready", flush=True)
small = Config.smoke(resize=40, crop=32)
grid(small, data, ["gravel"], ["mean"], list(range(int(count))), progress=False, results=results)
'''


def start(data, results, count=SEEDS, **kw):
    command = [sys.executable, '-c', GRID, str(data), str(results), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def start_with_limit(data, results, limit):
    "A grid of two runs that can write no file larger than so many bytes."
    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return start(data, results, 2, preexec_fn=set_limit)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def told(results):
    "Contents of the records, without times, machine and memory."
    names = 'method', 'category', 'seed', 'config', 'labels', 'scores', 'metrics'
    return {r['key']: [r[name] for name in names] for r in load_records(results)}


@pytest.fixture(scope='module')
def undisturbed(surface, tmp_path_factory):
    results = tmp_path_factory.mktemp('undisturbed')
    finish(start(surface, results))
    assert len(told(results)) == SEEDS
    return results


def test_killed_grids_lose_nothing(surface, undisturbed, tmp_path, record_property):
    draws, kept = random.Random(0), 0
    for _ in range(KILLS):
        process = start(surface, tmp_path)
        assert process.stdout.readline() == 'ready\n'
        time.sleep(draws.uniform(0, 0.6 if KILLS > 5 else 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        records = told(tmp_path)
        assert len(records) >= kept
        assert all(told(undisturbed)[key] == said for key, said in records.items())
        kept = len(records)
    finish(start(surface, tmp_path))
    assert told(tmp_path) == told(undisturbed)
    mine, theirs = (comparison(load_records(folder), 1) for folder in (tmp_path, undisturbed))
    assert mine.equals(theirs)
    record_property('kills', KILLS)


def test_two_grids_at_once_on_one_folder(surface, undisturbed, tmp_path):
    for process in [start(surface, tmp_path) for _ in range(2)]:
        finish(process)
    assert told(tmp_path) == told(undisturbed)
    assert not list((tmp_path / 'records').glob('.*.tmp'))


def test_full_disk_leaves_no_half_record(surface, undisturbed, tmp_path):
    process = start_with_limit(surface, tmp_path, 1500)
    _, err = process.communicate(timeout=300)
    assert process.returncode and 'File too large' in err and 'runs failed' in err
    assert not list((tmp_path / 'records').iterdir())
    finish(start(surface, tmp_path, 2))
    records, expected = told(tmp_path), told(undisturbed)
    assert len(records) == 2
    assert all(expected[key] == said for key, said in records.items())


def test_pictures_that_cannot_be_written_cost_no_record(surface, undisturbed, tmp_path):
    err = finish(start_with_limit(surface, tmp_path, 5000))
    assert err.count('the record is kept without pictures') == 2, err
    assert len(told(tmp_path)) == 2 and not list((tmp_path / 'pictures').iterdir())


def test_a_full_disk_ends_no_training(caplog):
    state = Progress('/dev/full', 'a key')
    for _ in range(2):
        state.write(weights=torch.zeros(9))
    assert [r.message for r in caplog.records] == [
        '/dev/full: cannot be written (No space left on device); '
        'the training goes on, but could not be taken up again from here']


def test_a_training_that_leaves_the_numbers_names_the_learning_rate():
    detector = CSE(Config.smoke(lr=100., resize=64, crop=64, epochs=3))
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TrainingError, match='epoch 0: .* a smaller lr than 100.* may help'):
        detector.fit(images, progress=False)


@pytest.mark.parametrize('part', ['records', 'pictures'])
def test_folder_that_cannot_be_written_is_found_before_the_work(surface, tmp_path, part):
    (tmp_path / part).write_text('a file')
    started = time.perf_counter()
    with pytest.raises(ConfigError, match='no file can be written there'):
        run(Config.smoke(), surface, 'gravel', results=tmp_path)
    with pytest.raises(ConfigError, match='no file can be written there'):
        grid(Config.smoke(), surface, ['gravel'], results=tmp_path, progress=False)
    assert time.perf_counter() - started < 10
    with pytest.raises(ConfigError, match='/proc'):
        check_writable('/proc/records')
    if os.geteuid():  # root writes anywhere
        (folder := tmp_path / 'sealed').mkdir(mode=0o500)
        with pytest.raises(ConfigError, match='sealed'):
            check_writable(folder)


DAMAGE = {
    'cut': lambda text: text[:len(text) // 2],
    'empty': lambda text: '',
    'schema': lambda text: text.replace('"schema": 1', '"schema": 2'),
    'list': lambda text: '[]',
    'zeros': lambda text: '\x00' * 50,
}


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_damaged_record_is_named_and_not_averaged(undisturbed, tmp_path, damage):
    whole = sorted((undisturbed / 'records').glob('*.json'))[0]
    (tmp_path / 'records').mkdir()
    (tmp_path / 'records' / whole.name).write_text(damage(whole.read_text()))
    with pytest.raises(ValueError, match=whole.name):
        load_records(tmp_path)
    assert json.loads(whole.read_text())['schema'] == 1
