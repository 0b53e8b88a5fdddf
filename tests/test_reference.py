"Runs beside the reference: what is equal, what is not, and what cannot be compared."
import gzip
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cse.cli import app
from cse.config import ConfigError
from cse.lab import parameters
from cse.lab import reference as module
from cse.lab.parameters import note_asked, read_asked, run_table, table_records
from cse.lab.records import load_records, reference_folder, write_packed
from cse.lab.regenerate import Progress, options_of, planned, print_tables, regenerate, start_over
from cse.lab.reproduction import Spread, band, compare, compare_table
from cse.lab.reference import copy_notebook, promote
from cse.lab.tables import publish

ROOT = Path(__file__).parent.parent
SMALL = {'epochs': 1, 'resize': 64, 'crop': 64}


def command(*words):
    "What a command of `cse` prints, and its exit status."
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope='module')
def asked(surface, textures):
    "Parameters of runs that take no time."
    return dict(data=str(surface), textures=str(textures), settings=SMALL, device='cpu')


@pytest.fixture(scope='module')
def made(asked, tmp_path_factory):
    "A folder with Table 4 of a small surface, two seeds."
    folder = tmp_path_factory.mktemp('runs') / 'photographs-smoke'
    run_table(4, **asked, methods='classifier,cse', seeds=2, results=str(folder))
    return folder


@pytest.fixture
def runs(made, tmp_path):
    "The same in a folder of the test's own."
    return Path(shutil.copytree(made, tmp_path / made.name))


@pytest.fixture
def reference(made, tmp_path):
    "The same, packed as a reference."
    folder = tmp_path / 'reference' / made.name
    write_packed(folder, 'table4', load_records(made))
    shutil.copy(made / 'asked.json', folder)
    return folder


def edit(folder, change):
    "Change every record of a folder of runs."
    for file in sorted((folder / 'records').glob('*.json')):
        record = json.loads(file.read_text())
        change(record)
        file.write_text(json.dumps(record))


def put(path, value):
    def change(record):
        *parents, last = path.split('.')
        for name in parents:
            record = record[name]
        record[last] = value
    return change


def ask(folder, table=4, **changes):
    "Change the request of a table in a folder."
    file = folder / 'asked.json'
    entry, = json.loads(file.read_text()).values()
    file.write_text(json.dumps({table: entry | changes}))


def test_the_same_runs_are_equal_to_the_last_bit(runs, reference):
    found = compare(runs, reference)
    assert found.ok and all(cell.identical for cell in found.cells)
    bands = sorted(cell.band for cell in found.cells if cell.category != 'mean')
    allowed = ' to '.join(dict.fromkeys(f'{band:.1f}' for band in (bands[0], bands[-1])))
    assert str(found).splitlines() == [
        f'Table 4: 2 of 2 cells reproduced, largest difference 0.0 points ({allowed} allowed), '
        '2 to the last bit',
        'all: 2 of 2 cells reproduced']
    done = command('compare', runs, reference)
    assert done.exit_code == 0 and 'all: 2 of 2' in done.stdout
    cells = json.loads(command('compare', runs, reference, '--json').stdout)['cells']
    assert {c['category'] for c in cells} == {'gravel', 'mean'}


@pytest.mark.parametrize('change, words', [
    (put('config.lr', 0.1), 'lr = 0.1 instead of'),
    (put('config.train_axis', 'channels'), 'train_axis = channels instead of positions'),
    (put('metrics.auroc', 0.123), 'the AUROC does not follow from the scores'),
    (put('data.fingerprint', '0' * 16), 'other images'),
    (put('textures.fingerprint', '0' * 16), 'other textures'),
    (put('extractor.sha256', '0' * 64), 'other weights')])
def test_another_experiment_is_no_reproduction(reference, made, change, words):
    "Differences that are not due to chance are reported."
    entry = read_asked(reference)[4]
    records = table_records(load_records(reference), 4, entry)
    changed = json.loads(json.dumps(records))
    for record in changed:
        change(record)
    cells = compare_table(changed, records, 4, Spread(seed=1., machine=1.))
    assert not any(cell.reproduced for cell in cells) and all(words in cell.note for cell in cells)


def timed(change=lambda name, ms: ms):
    "Cells of the reference's times, compared with the same times after a change."
    folder = reference_folder() / 'built-in-smoke'
    records = table_records(load_records(folder), 3, read_asked(folder)[3])
    changed = json.loads(json.dumps(records))
    for record in changed:
        metrics = record['metrics']
        name = f"{record['method']} {record['form']}"
        metrics['latency_low_ms'] = change(name, metrics['latency_low_ms'])
    return compare_table(changed, records, 3), changed, records


def test_a_slower_machine_is_no_slower_method():
    cells, *_ = timed(lambda name, ms: 3 * ms)
    assert len(cells) == 21 and all(cell.reproduced for cell in cells)


@pytest.mark.parametrize('slow', ['cse fused', 'extractor fused', 'mixed_teacher as trained'])
def test_only_the_method_that_is_slower_is_told(slow):
    "Each of them, the bare extractor too, on a machine of half the speed."
    cells, *_ = timed(lambda name, ms: 2 * ms * (2 if name == slow else 1))
    told = [cell for cell in cells if not cell.reproduced]
    assert len(told) == 1 and told[0].apart == pytest.approx(2)


def test_two_times_do_not_tell_how_fast_a_machine_is():
    _, changed, records = timed()
    cells = compare_table(changed[:2], records, 3)
    assert len(cells) == 2
    assert not any(cell.reproduced for cell in cells) and all('at least 3' in cell.note for cell in cells)


def test_scores_that_rank_otherwise_are_told(runs, reference):
    from cse.metrics import auroc

    def turn(record):
        record['scores'] = [-score for score in record['scores']]
        record['metrics']['auroc'] = float(auroc(record['labels'], record['scores']))

    edit(runs, turn)
    found = compare(runs, reference)
    done = command('compare', runs, reference)
    assert not found.ok and done.exit_code == 1
    assert 'in the reference' in done.stdout and 'to the last bit' not in done.stdout


def test_two_points_off_everywhere_show_in_the_mean():
    "Each surface alone may differ by two points, their mean may not."
    alone, _ = band((1., 0.6), [0], [0])
    mean, _ = band((1., 0.6), [0], [0], cells=5)
    assert alone > 2 > mean


def test_a_run_that_is_missing_is_told(runs, reference):
    for file in (runs / 'records').glob('classifier-*'):
        file.unlink()
    lines = str(compare(runs, reference)).splitlines()
    assert lines[0].startswith('Table 4: 1 of 2 cells') and 'Classifier, gravel: not run' in lines[1]


def test_other_seeds_have_a_wider_band():
    same, shared = band((1., 0.5), [0, 1], [0, 1])
    other, none = band((1., 0.5), [2, 3], [0, 1])
    assert (shared, none) == ([0, 1], []) and other == 2 * same


WRONG = {  # what is done to the runs and to the reference → what is said
    'runs that are not there': (lambda r, f: shutil.rmtree(r), 'holds no runs of a table'),
    'an empty folder': (lambda r, f: (shutil.rmtree(r), r.mkdir()), 'holds no runs of a table'),
    'a damaged list of what was asked': (
        lambda r, f: (r / 'asked.json').write_text('{"4": '), 'asked.json: is damaged'),
    'a list of another form': (lambda r, f: (r / 'asked.json').write_text('[1]'), 'asked.json: is damaged'),
    'a list that lacks the data': (lambda r, f: ask(r, data=None), 'asked.json: is damaged (data=None'),
    'a list without a list': (lambda r, f: ask(r, seeds=3), 'seeds=3, expected list'),
    'a list with an unknown setting': (lambda r, f: ask(r, settings={'epoch': 1}), "did you mean 'epochs'"),
    'a list with an unknown profile': (lambda r, f: ask(r, profile='quick'), "damaged (profile='quick'"),
    'a list with an unknown table': (lambda r, f: ask(r, 9), 'has none of the tables'),
    'a list that is no text': (
        lambda r, f: (r / 'asked.json').write_bytes(b'{"\xff": 1}'), 'asked.json: is damaged'),
    'a list that is a folder': (
        lambda r, f: ((r / 'asked.json').unlink(), (r / 'asked.json').mkdir()), 'asked.json'),
    'a damaged list of the reference': (lambda r, f: ask(f, textures=1), 'textures=1, expected str'),
    'a record without scores': (lambda r, f: edit(r, put('scores', None)), 'scores=None, expected list'),
    'a record with a value of another kind': (
        lambda r, f: edit(r, put('data.test_good', '3')), "data.test_good='3', expected int"),
    'an empty record': (lambda r, f: next(r.glob('records/*')).write_text('{"schema": 2}'), 'key=None'),
    'an empty record of the reference': (
        lambda r, f: next(f.glob('records/*')).write_text('{"schema": 2}\n'), 'line 1: key=None'),
    'an empty spread': (lambda r, f: (f.parent / 'spread.csv').touch(), 'spread.csv: is damaged'),
    'a spread of something else': (
        lambda r, f: (f.parent / 'spread.csv').write_text('a,b\n1,2\n'), 'spread.csv: is damaged'),
    'a spread without machines': (
        lambda r, f: (f.parent / 'spread.csv').write_text('varied,method,sd\nseed,CSE,1\n'), 'is damaged'),
    'a damaged record': (lambda r, f: next(r.glob('records/*.json')).write_text('{'), 'is no JSON'),
    'a record of another version': (
        lambda r, f: edit(r, put('schema', 1)), 'expected a record of schema'),
    'a reference that is not there': (lambda r, f: shutil.rmtree(f), 'has none of the tables'),
    'a reference that is a file': (
        lambda r, f: (shutil.rmtree(f), f.write_text('')), 'has none of the tables'),
    'a damaged reference': (
        lambda r, f: next(f.glob('records/*')).write_text('{"schema": 2'), 'holds no JSON lines'),
    'a reference of another version': (
        lambda r, f: next(f.glob('records/*')).write_text('{"schema": 1}\n'), 'expected a record of schema'),
    'a broken archive': (
        lambda r, f: (f / 'records/more.jsonl.gz').write_bytes(gzip.compress(b'{}')[:-9]),
        'holds no JSON lines'),
    'other settings': (
        lambda r, f: (f / 'asked.json').write_text(
            (f / 'asked.json').read_text().replace('"epochs": 1', '"epochs": 2')), 'settings='),
    'other data': (
        lambda r, f: (f / 'asked.json').write_text(
            (f / 'asked.json').read_text().replace('"photographs"', '"others"')), 'data='),
    'another profile': (
        lambda r, f: (f / 'asked.json').write_text(
            (f / 'asked.json').read_text().replace('"smoke"', '"paper"')), 'profile=')}


@pytest.mark.parametrize('damage, words', WRONG.values(), ids=WRONG)
def test_what_cannot_be_compared_is_said_in_one_sentence(runs, reference, damage, words):
    damage(runs, reference)
    done = command('compare', runs, reference)
    assert done.exit_code == 2 and words in sentence(done)


def sentence(done):
    "The one line that a command has to say about a wrong use."
    line, = done.stderr.splitlines()
    assert line.startswith('error: ') and 'Traceback' not in done.output
    return line


@pytest.fixture(scope='module')
def published(made, tmp_path_factory):
    "The same with its table, as if the source had no uncommitted changes."
    folder = shutil.copytree(made, tmp_path_factory.mktemp('published') / made.name)
    edit(folder, put('dirty', False))
    publish(table_records(load_records(folder), 4, read_asked(folder)[4]), 4, folder)
    (folder / 'notebooks').mkdir()
    return folder


NOT_FIT = {  # what is done to the runs → exit status of the audit, and what is said
    'no folder': (shutil.rmtree, 2, 'holds no records'),
    'a file': (lambda r: (shutil.rmtree(r), r.write_text('')), 2, 'holds no records'),
    'no records': (lambda r: shutil.rmtree(r / 'records'), 2, 'holds no records'),
    'a damaged list': (lambda r: (r / 'asked.json').write_text('{'), 2, 'asked.json: is damaged'),
    'a list without a list': (lambda r: ask(r, methods=3), 2, 'methods=3, expected list'),
    'another version': (lambda r: edit(r, put('schema', 1)), 1, 'schema: expected 2, found 1'),
    'mixed data': (lambda r: edit(r, put('data.fingerprint', '0' * 16)), 1, 'name of the file: expected'),
    'a damaged notebook': (
        lambda r: (r / 'notebooks/table4.ipynb').write_text('{'), 1, 'file: expected an executed notebook'),
    'a notebook of another form': (
        lambda r: (r / 'notebooks/table4.ipynb').write_text('[]'), 1, 'expected an executed notebook'),
    'a table that is no text': (
        lambda r: (r / 'tables/table4.md').write_bytes(b'\xff'), 1, 'tables/table4.md: line 1')}


def test_a_copy_of_a_notebook_shortens_folders_and_keeps_columns(tmp_path):
    source = 'data = "/mnt/tiles"\nmethods = "cse,cse/paper"'
    cell = dict(cell_type='code', metadata=dict(tags=['parameters']), source=source, outputs=[])
    (tmp_path / 'run.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={})))
    copy_notebook(tmp_path / 'run.ipynb', tmp_path / 'copy.ipynb')
    copied = json.loads((tmp_path / 'copy.ipynb').read_text())['cells'][0]['source']
    assert copied == source.replace('/mnt/', '')


@pytest.mark.parametrize('damage, status, words', NOT_FIT.values(), ids=NOT_FIT)
def test_what_does_not_fit_is_told_and_is_not_promoted(
        published, tmp_path, monkeypatch, damage, status, words):
    runs = Path(shutil.copytree(published, tmp_path / published.name))
    damage(runs)
    done = command('audit', runs)
    assert done.exit_code == status and words in (done.stdout if status == 1 else sentence(done))
    assert ('the audit has' if status == 1 else words) in promoted(monkeypatch, runs, tmp_path / 'reference')
    assert not (tmp_path / 'reference').exists()


def promoted(monkeypatch, *words):
    "What `make reference` says to a wrong use."
    *words, folder = words
    monkeypatch.setattr(module, 'reference_folder', lambda: folder)
    monkeypatch.setattr(sys, 'argv', ['', *map(str, words)])
    with pytest.raises(SystemExit) as end:
        module.main()
    line, = str(end.value).splitlines()
    assert line.startswith('error: ')
    return line


def test_what_make_reference_refuses(published, tmp_path, monkeypatch, record_property):
    (tmp_path / 'file').touch()
    new = tmp_path / 'new/reference'
    cases = (
        (new, 'expected one folder'), (published, published, new, 'expected one folder'),
        ('', new, 'holds no records'), (tmp_path / 'file', new, 'holds no records'),
        (published, Path('/proc/reference'), 'no file can be written'),
        (published, tmp_path / 'file', 'no file can be written'),
        (published, published.parent, 'is the reference'))
    record_property('bad_input', len(cases))
    for *words, expected in cases:
        assert expected in promoted(monkeypatch, *words), words
    assert not new.exists() and compare(published, promote(published, new)).ok


def test_wrong_uses_of_tables_end_before_the_first_run(surface, tmp_path, made, record_property):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.tex').write_text('')
    cases = (
        ((9,), 'table 9'),
        ((1, '--data', tmp_path / 'nowhere'), 'nowhere'),
        ((1, '--data', surface, '--results', tmp_path / 'file/x'), 'no file can be written'),
        ((1, '--data', surface, '--notebooks', tmp_path, '--results', tmp_path / 'r'), 'is missing'),
        ((1, '--data', surface, '--results', tmp_path / 'mine', '--fresh'), 'thesis.tex'),
        ((1, '--data', surface / 'gravel/train/good/00.png'), 'no such folder'),
        ((1, '--data', surface, '--textures', tmp_path / 'nowhere'), 'nowhere: no such folder'),
        ((2, '--tilda', tmp_path / 'nowhere'), 'nowhere: no such folder'),
        ((1, '--data', surface, '--results', tmp_path / 'file'), 'no file can be written'),
        ((1, '--data', surface, '--results', '/proc/x'), 'no file can be written'),
        ((1, '--data', surface, '--results', reference_folder()), 'is the reference'),
        ((4, '--data', surface, '--results', made, '--profile', 'paper'), "profile='smoke', not 'paper'"),
        ((4, '--data', surface, '--results', made, '--weights', tmp_path / 'net.pth'), 'net.pth'),
        ((1, '--weights', tmp_path / 'net.pth', '--results', tmp_path / 'r'), 'no such file'),
        ((1, '--profile', 'quick', '--results', tmp_path / 'r'), "profile='quick'"),
        ((1, '--device', 'tpu', '--results', tmp_path / 'r'), "device='tpu'"),
        ((1, '--categories', 'granite', '--results', tmp_path / 'r'), "'granite'"),
        ((1, '--categories', 'wood,textile1', '--results', tmp_path / 'r'), 'not both in one table'),
        ((5, '--methods', 'classifier/none', '--results', tmp_path / 'r'), 'and one of paper, '),
        ((1, '--results', reference_folder(), '--fresh'), 'is the reference'),
        ((1, '--results', reference_folder() / 'surfaces-smoke', '--fresh'), 'is the reference'),
        ((1, '--seeds', '1.7', '--results', tmp_path / 'r'), 'seeds='),
        ((1, '--methods', 'patchwork', '--results', tmp_path / 'r'), 'patchwork'),
        ((4, '--data', surface, '--results', made), 'expected another folder'),
        ((1, '--scheduler', 'thousands', '--results', tmp_path / 'r'), 'scheduler='))
    record_property('bad_input', len(cases))
    for words, expected in cases:
        done = command('tables', *words)
        assert done.exit_code == 2 and expected in sentence(done), (words, done.output)
        assert not (tmp_path / 'r').exists()
    assert (tmp_path / 'mine/thesis.tex').exists() and (reference_folder() / 'README.md').exists()


def test_finished_runs_are_kept_and_started_over_on_request(asked, tmp_path, capsys):
    options = asked | dict(methods='mean_distance', profile='smoke', seeds='1', results=str(tmp_path / 'r'))
    first, = regenerate([1], options, quiet=True)
    key = next((tmp_path / 'r/records').iterdir())
    time = key.stat().st_mtime_ns
    assert print_tables([1], options | dict(tilda='', categories='')) == []
    assert key.stat().st_mtime_ns == time and '1 on record before' in capsys.readouterr().err
    start_over(tmp_path / 'r')
    again, = regenerate([1], options, quiet=True)
    assert key.stat().st_mtime_ns != time and again[2]['rows'] == first[2]['rows']


def test_the_line_of_progress_counts_records(asked, tmp_path):
    given = {n: options_of(n, asked | dict(methods='', profile='smoke', results=str(tmp_path)), False)
             for n in (1, 4, 5)}
    plan = planned(given, tmp_path)
    assert len(plan) == 5 and all(seconds > 0 for seconds in plan.values())
    (tmp_path / 'records').mkdir()
    progress = Progress(plan, tmp_path)
    assert progress.line().startswith('0 of 5 runs done, 5 left, about')
    for key in list(plan)[:3]:
        (tmp_path / f'records/{key}.json').write_text('{}')
    assert progress.line().startswith('3 of 5 runs done, 2 left')


def test_a_table_shows_what_failed_and_what_nobody_asked_for(own_surface, textures, tmp_path):
    from conftest import write_category
    write_category(own_surface, 'brick')
    (own_surface / 'brick/test/bar/00.png').write_bytes(b'broken')
    options = dict(data=str(own_surface), textures=str(textures), settings=SMALL, profile='smoke', seeds='1',
                   methods='mean_distance,padim', results=str(tmp_path / 'r'), device='cpu')
    (number, text, table, failure), = regenerate([1], options, quiet=True)
    assert '2 of 4 runs failed' in failure and text.count('not run') == 2
    assert 'PatchCore' not in text.split('Published numbers')[0]
    assert 'not run' in (tmp_path / 'r/tables/table1.md').read_text()


def test_methods_and_seeds_of_several_calls_stand_in_one_table(asked, tmp_path):
    given = asked | dict(results=str(tmp_path))
    run_table(1, **given, methods='mean_distance')
    records = run_table(1, **given, methods='padim', seeds=2)
    assert sorted((r['method'], r['seed']) for r in records) == \
        [('mean_distance', 0), ('padim', 0), ('padim', 1)]
    with pytest.raises(ConfigError, match='expected another folder of results'):
        run_table(1, **given | dict(settings=SMALL | {'epochs': 2}), methods='padim')


def test_two_that_ask_at_once_are_both_noted(tmp_path, monkeypatch):
    "The second request comes after the first one has read the file and before it writes."
    entry = dict(profile='smoke', settings={}, textures='t', data='d', categories=['wood'], seeds=[0])
    read, others = parameters.read_asked, []

    def read_slowly(results):
        found = read(results)
        if not others:
            given = entry | dict(methods=['cse'])
            others.append(threading.Thread(target=note_asked, args=(tmp_path, 2), kwargs=given))
            others[0].start()
            others[0].join(0.2)
        return found

    monkeypatch.setattr(parameters, 'read_asked', read_slowly)
    note_asked(tmp_path, 1, **entry, methods=['padim'])
    others[0].join()
    assert {table: entry['methods'] for table, entry in read(tmp_path).items()} == {1: ['padim'], 2: ['cse']}
    start_over(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize('change', [dict(code='other'), dict(device='A GPU'), dict(torch='1.0')])
def test_a_run_of_another_environment_is_no_run_of_this_one(asked, tmp_path, monkeypatch, change):
    from cse.lab import runs
    given = asked | dict(results=str(tmp_path), methods='mean_distance')
    first, = run_table(1, **given)
    usual = runs.environment
    monkeypatch.setattr(runs, 'environment', lambda *args: usual(*args) | change)
    other, = run_table(1, **given)
    assert other['key'] != first['key'] and len(load_records(tmp_path)) == 2


def test_baselines_carry_only_their_own_settings(asked, tmp_path):
    given = asked | dict(methods='padim')
    one, = run_table(1, **given | dict(results=str(tmp_path / 'a')))
    two, = run_table(1, **given | dict(results=str(tmp_path / 'b'), textures='',
                                       settings=SMALL | {'decoder': 'none', 'contrastive_weight': 3}))
    assert one['key'] == two['key'] and 'decoder' not in one['config']
    assert one['textures']['name'] == 'none' and one['environment']['anomalib']


def test_only_clean_complete_runs_become_the_reference(published, tmp_path):
    runs, reference = Path(shutil.copytree(published, tmp_path / published.name)), tmp_path / 'reference'
    edit(runs, put('dirty', True))
    with pytest.raises(ConfigError, match='uncommitted changes'):
        promote(runs, reference)
    edit(runs, put('dirty', False))
    target = promote(runs, reference)
    assert compare(runs, target).ok and (reference / 'README.md').exists()
    for file in sorted((runs / 'records').glob('*seed1*')):
        file.unlink()
    note = read_asked(runs)[4] | dict(seeds=[0])
    (runs / 'asked.json').unlink()
    note_asked(runs, 4, **note)
    publish(table_records(load_records(runs), 4, note), 4, runs)
    with pytest.raises(ConfigError, match='lacks 2 runs'):
        promote(runs, reference)
    with pytest.raises(ConfigError, match='holds no records'):
        promote(tmp_path / 'nothing', reference)


@pytest.mark.parametrize('target, variable', [
    ('tables', 'ROWS=prototype'), ('tables', 'FORCE=1'), ('benchmark', 'SEEDS=3'), ('report', 'DATA=x'),
    ('reference', 'SEEDS=2'), ('model-selection', 'PROFILE=paper'), ('text-against-code', 'METHODS=all')])
def test_make_refuses_what_a_target_does_not_take(target, variable):
    venv = ROOT / 'tests'  # nothing is installed, and nothing is run
    words = 'make', '--dry-run', '--old-file', f'{venv}/.ready', target, variable, f'VENV={venv}'
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f'make {target} does not take {variable.split("=")[0]}' in done.stderr


def test_the_quoted_spread_is_that_of_the_reference():
    import pandas as pd
    frame = pd.read_csv(reference_folder() / 'spread.csv')
    assert set(frame.varied) == {'seed', 'machine'} and np.isfinite(frame.sd).all()
