"Grids that are killed, run twice at once, or find no room: no record is lost or damaged."
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
from mean_method import Mean

from cse import CSE
from cse.config import Config, ConfigError
from cse.data.files import check_writable
from cse.fast.session import SavedState
from cse.lab.comparison import comparison
from cse.lab.grid import GridError, grid
from cse.lab.records import RECORD_SCHEMA, load_records
from cse.lab.runs import METHODS, run
from cse.training import TrainingError

KILLS = int(os.environ.get('ROBUSTNESS_KILLS', 2))
SEEDS = min(KILLS, 99) if KILLS > 5 else 6  # a kill comes after about one run; seed 99 cannot succeed
SMALL = Config.smoke(resize=40, crop=32, anomaly_map='none')
PROCESSES = multiprocessing.get_context('forkserver')  # a server imports PyTorch once for all of them
PROCESSES.set_forkserver_preload(['cse.lab.grid'])


def run_grid(data, results, count, seconds, limit, sender):
    "A grid in a process of its own, which can write no file larger than a limit."
    METHODS['mean'] = Mean
    os.environ['CSE_TEST_SECONDS'] = str(seconds)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sender.send('ready')
    failure = ''
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            grid(SMALL, data, ['gravel'], ['mean'], range(count), progress=False, results=results)
        except GridError as e:
            failure = str(e)
    sender.send((failure, err.getvalue()))


def start(data, results, count=SEEDS, seconds=0.15, limit=None):
    "A grid that is about to begin, and the pipe for its outcome."
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run_grid, args=(data, results, count, seconds, limit, sender))
    process.start()
    sender.close()
    assert receiver.recv() == 'ready'
    return process, receiver


def finish(process, receiver):
    "Failure and warnings of a grid."
    told = receiver.recv()
    process.join()
    assert process.exitcode == 0
    return told


def contents(results):
    "What the records say, without times, machine and memory."
    names = 'method', 'category', 'seed', 'config', 'labels', 'scores', 'metrics'
    return {r['key']: [r[name] for name in names] for r in load_records(results)}


@pytest.fixture(scope='module')
def undisturbed(surface, tmp_path_factory):
    results = tmp_path_factory.mktemp('undisturbed')
    assert finish(*start(surface, results, seconds=0)) == ('', '')
    assert len(contents(results)) == SEEDS
    return results


def test_killed_grids_lose_nothing(surface, undisturbed, tmp_path, record_property):
    draws, kept, expected = random.Random(0), 0, contents(undisturbed)
    for _ in range(KILLS):
        process, _ = start(surface, tmp_path)
        time.sleep(draws.uniform(0, 0.3 if KILLS > 5 else 1))
        process.kill()
        process.join()
        records = contents(tmp_path)
        assert len(records) >= kept
        assert all(expected[key] == said for key, said in records.items())
        kept = len(records)
    finish(*start(surface, tmp_path, seconds=0))
    assert contents(tmp_path) == expected
    mine, theirs = (comparison(load_records(folder), 1) for folder in (tmp_path, undisturbed))
    assert mine.equals(theirs)
    record_property('kills', KILLS)


def test_two_grids_at_once_on_one_folder(surface, undisturbed, tmp_path):
    for grids in [start(surface, tmp_path, seconds=0.05) for _ in range(2)]:
        assert finish(*grids) == ('', '')
    assert contents(tmp_path) == contents(undisturbed)
    assert not list((tmp_path / 'records').glob('.*.tmp'))


def die_while_writing(data, results):
    "A run whose process is killed when the record is written, but not yet in its place."
    METHODS['mean'] = Mean
    replace = os.replace

    def replace_or_die(old, new):
        if 'records' in str(new):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = replace_or_die
    run(SMALL, data, 'gravel', 'mean', results=results)


def test_a_run_killed_while_it_writes_leaves_no_record(surface, tmp_path, monkeypatch):
    process = PROCESSES.Process(target=die_while_writing, args=(surface, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert load_records(tmp_path) == [] and list(tmp_path.rglob('*.json')) == []
    monkeypatch.setitem(METHODS, 'mean', Mean)
    record = run(SMALL, surface, 'gravel', 'mean', results=tmp_path)
    assert load_records(tmp_path) == [record]


def test_full_disk_leaves_no_half_record(surface, undisturbed, tmp_path):
    failure, _ = finish(*start(surface, tmp_path, 2, limit=1500))
    assert 'File too large' in failure and '2 of 2 runs failed' in failure
    assert not list((tmp_path / 'records').iterdir())
    finish(*start(surface, tmp_path, 2))
    records, expected = contents(tmp_path), contents(undisturbed)
    assert len(records) == 2
    assert all(expected[key] == said for key, said in records.items())


def test_pictures_that_cannot_be_written_cost_no_record(surface, undisturbed, tmp_path):
    failure, warnings = finish(*start(surface, tmp_path, 2, limit=5000))
    assert not failure and warnings.count('the record is kept without pictures') == 2
    assert len(contents(tmp_path)) == 2 and not list((tmp_path / 'pictures').iterdir())


def test_a_full_disk_ends_no_training(caplog):
    state = SavedState('/dev/full', 'a key')
    for _ in range(2):
        state.write(weights=torch.zeros(9))
    assert [r.message for r in caplog.records] == [
        '/dev/full: cannot be written (No space left on device); '
        'training continues, but cannot be resumed from here']


def test_training_that_diverges_names_the_learning_rate():
    detector = CSE(Config.smoke(lr=100., resize=64, crop=64, epochs=3, engine='torch'))
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TrainingError, match='epoch 0: .* a smaller lr may help'):
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
    'schema': lambda text: text.replace(f'"schema": {RECORD_SCHEMA}', '"schema": 1'),
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
    assert json.loads(whole.read_text())['schema'] == RECORD_SCHEMA
