"Table 3: records of timings, their report, and what is refused."
import csv
import inspect
import json
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import cse.lab.latency
import cse.lab.turns
import cse.lab.workers
from cse import Config
from cse.config import ConfigError
from cse.data.images import DataError
from cse.extractor import WeightsError
from cse.lab.audit import check_record
from cse.lab.latency import SpeedError, run_speed, summary, timed_image
from cse.lab.benchmark import times
from cse.lab.grid import GridError
from cse.lab.records import load_records
from cse.lab.parameters import read_parameters, run_table
from cse.lab.published import ReportError
from cse.lab.tables import facts, publish
from cse.lab.comparison import check_records, median_interval
from cse.lab.timed_methods import TIMED, choose
from cse.lab.turns import timed_call
from conftest import run_notebook

ROOT = Path(__file__).parent.parent
SIZE = dict(resize=64, crop=64)
SMALL = dict(extractor='tf_efficientnet_lite0', weights='packaged', settings=SIZE,
             device='cpu', repeats=10, warmup=1, rounds=2)
FUSED = 'CSE tf_efficientnet_lite0, fused'


@pytest.fixture(scope='module')
def timed(surface, tmp_path_factory):
    "Both forms of CSE, measured once for all tests: folder of results, records."
    results = tmp_path_factory.mktemp('results')
    return results, run_speed(data=str(surface), methods='cse', results=str(results), **SMALL)


def test_record(timed, surface):
    results, records = timed
    forms = [(r['method'], r['form'], r['extractor']['engine']) for r in records]
    assert forms == [('cse', 'as trained', 'torch'), ('cse', 'fused', 'openvino')]
    assert sorted(load_records(results), key=lambda r: r['form']) == records
    assert records[0]['scores'] == pytest.approx(records[1]['scores'], rel=1e-4)


def test_a_record_holds_no_path_and_every_time(timed, surface):
    results, records = timed
    for r in records:
        text = (results / 'records' / f'{r["key"]}.json').read_text()
        assert json.loads(text) == r and str(surface) not in text
        image = r['table'], r['category'], r['images'], r['data']['name']
        assert image == (3, 'gravel', ['06.png'], 'photographs')
        assert r['timing']['image'] == [256, 256] and r['timing']['input'] == [64, 64]
        calls = r['timing']['calls']
        assert len(calls) == 2 and all(0 < count <= 5 for count in calls)
        assert len(r['timing']['model_ms']) == len(r['timing']['file_ms']) == sum(calls)
        assert r['timing']['run'] == records[0]['timing']['run'] and r['timing']['left_out'] == {}
        assert r['peak_memory_mb'] > 100 and r['threads'] == torch.get_num_threads()
        assert r['device'] and r['versions']['openvino'] and len(r['extractor']['sha256']) == 64


def test_metrics_of_a_record(timed):
    for r in timed[1]:
        m = r['metrics']
        for name in ('', 'file_'):
            for low, high in (('low', 'high'), ('from', 'to')):
                ends = m[f'{name}latency_{low}_ms'], m[f'{name}latency_{high}_ms']
                assert 0 < ends[0] <= m[f'{name}latency_ms'] <= ends[1]
            assert m[f'{name}fps'] == pytest.approx(1000 / m[f'{name}latency_ms'], rel=1e-3)
        assert m['latency_ms'] < m['file_latency_ms']
        assert m['gpu_memory_mb'] is m['gpu_latency_ms'] is m['gpu_batch_fps'] is None
        batches, fps = r['timing']['batch_ms'], m['batch_fps'] # none on a machine that is too busy
        assert len(batches) <= 2 and r['timing']['batch_size'] == 32 and bool(batches) == bool(fps)
        assert not fps or fps == pytest.approx(32000 * len(batches) / sum(batches), rel=1e-3)


@pytest.fixture
def measured(timed, surface, monkeypatch):
    "Runs Table 3 on the records of `timed`; returns the methods that would be measured again."
    asked = []

    def refuse(names, *args, **kw):
        asked.extend(names)
        raise ZeroDivisionError

    monkeypatch.setattr(cse.lab.latency, 'measure_together', refuse)

    def run(**changes):
        usual = dict(data=str(surface), methods='cse', results=str(timed[0])) | SMALL
        asked.clear()
        return run_speed(**usual | changes), list(asked)

    run.asked = asked
    return run


def test_what_is_on_record_is_not_measured_again(timed, measured, capsys):
    assert measured() == (timed[1], [])
    assert capsys.readouterr().out.count('on record') == 2


@pytest.mark.parametrize('change', [dict(force=True), dict(repeats=11), dict(rounds=3), dict(seeds='[1]')])
def test_other_parameters_are_measured_anew(measured, change):
    with pytest.raises(GridError, match='2 of 2 measurements failed'):
        measured(**change)
    assert measured.asked == ['cse/as-trained', 'cse/fused']


@pytest.mark.parametrize('change', [
    dict(weights='random'), dict(settings=SIZE | dict(engine='torch')),
    dict(settings=dict(resize=72, crop=64))])
def test_other_settings_belong_in_another_folder(measured, tmp_path, change):
    with pytest.raises(ConfigError, match='expected another folder of results'):
        measured(**change)
    with pytest.raises(GridError, match='2 of 2 measurements failed'):
        measured(**change, results=str(tmp_path))
    assert measured.asked == ['cse/as-trained', 'cse/fused']


@pytest.mark.parametrize('name, value', [
    ('processor', lambda device: 'another machine'), ('torch.get_num_threads', lambda: 77)])
def test_another_machine_is_measured_anew(measured, monkeypatch, name, value):
    with monkeypatch.context() as patch, pytest.raises(GridError):
        patch.setattr(f'cse.lab.latency.{name}', value)
        measured()
    assert len(measured.asked) == 2


def test_report(timed):
    results, records = timed
    text = publish(records, 3, results)
    median = f'{records[1]["metrics"]["latency_ms"]:.1f} ('
    for word in (FUSED, 'CSE tf_efficientnet_lite0, as trained', 'RTX 3090 Ti', 'different machines',
                 records[0]['device'], 'thread', 'packaged', 'SHA-256', '256×256', '64×64',
                 'openvino', median, '95 % interval', '2 rounds',
                 f'**Run**: {records[0]["timing"]["run"]}'):
        assert word in text, word
    files = {p.suffix: p for p in (results / 'tables').iterdir()}
    assert set(files) == {'.md', '.csv', '.svg'}
    assert all(p.stem == 'table3' for p in files.values())
    assert 'not run' not in text, 'what was not asked for is left out'
    assert '<svg' in files['.svg'].read_text()


def test_rows_of_the_report(timed, tmp_path):
    records = timed[1]
    publish(records, 3, tmp_path)
    file = next((tmp_path / 'tables').glob('*.csv'))
    lines = list(csv.DictReader(file.read_text().splitlines()))
    for line in lines:
        assert line['published'] == line['difference'] == '', 'times of two machines are compared'
    latency = next(line for line in lines
                   if (line['method'], line['category']) == (FUSED, 'latency (ms)'))
    assert float(latency['ours']) == records[1]['metrics']['latency_ms']
    assert latency['threads'] == str(records[1]['threads'])


def test_report_says_that_weights_are_random(timed):
    random = dict(name='efficientnet_b3.ra2_in1k', weights='random', tag='random', sha256=None)
    records = [r | dict(extractor=r['extractor'] | random) for r in timed[1]]
    assert 'efficientnet_b3 with **random weights**' in facts(records, 3)['Extractor']
    assert 'CSE EfficientNet-b3, fused' in publish(records, 3)


def test_times_of_two_machines_do_not_stand_in_one_table(timed):
    one, other = timed[1]
    timing = one['timing'] | dict(repeats=99)
    for change in (dict(device='another'), dict(threads=77), dict(timing=timing)):
        with pytest.raises(ReportError, match=next(iter(change))):
            check_records([one, other | change], 3)
    data = one['data'] | dict(fingerprint='f')
    with pytest.raises(ReportError, match='data.fingerprint'):
        check_records([one, other | dict(data=data)], 3)


@pytest.mark.parametrize('error, words, parameters', [
    (ConfigError, "method='patchwork'.*cse/fused", dict(methods='patchwork')),
    (ConfigError, 'no_such_net', dict(extractor='no_such_net')),
    (WeightsError, 'missing.pth.*no such file', dict(weights='missing.pth')),
    (DataError, 'empty.*no images', dict(data='empty')),
    (DataError, 'nowhere.*no such folder', dict(data='nowhere')),
    (DataError, 'a.png.*not a readable image', dict(data='broken')),
    (DataError, 'marble', dict(categories='marble')),
    (ConfigError, 'epoch', dict(settings=dict(epoch=1))),
    (ConfigError, 'expected JSON', dict(settings='epochs')),
    (ConfigError, 'profile', dict(profile='fast')),
    (ConfigError, 'seeds', dict(seeds=0)),
    (ConfigError, 'repeats', dict(repeats=0)),
    (ConfigError, 'rounds', dict(rounds=0)),
    (ConfigError, 'device', dict(device='tpu')),
])
def test_bad_input_is_refused_before_anything_is_measured(
        surface, tmp_path, monkeypatch, error, words, parameters):
    def measured(*args, **kw): pytest.fail('something was measured')
    monkeypatch.setattr(cse.lab.latency, 'time_methods', measured)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.png').write_bytes(b'broken')
    if 'data' in parameters:
        parameters = dict(data=str(tmp_path / parameters['data']))
    with pytest.raises(error, match=words):
        run_speed(**dict(data=str(surface)) | SMALL | parameters)


# A process that answers as that of a method does, with invented times, in a fraction of a second.
# It notes what it does in a file, dies at its turn if it is named `rdpp`, and prints to disturb the answers.
STUB = textwrap.dedent("""
    import os, time
    from pathlib import Path
    from cse.lab.workers import serve
    log = Path(os.environ['STUB_LOG'])
    MS = eval(os.environ['STUB_MS'])
    def note(*words):
        with log.open('a') as file: print(*words, file=file)
    def about(name):
        if name == 'fastflow/original-fused': return dict(left_out='the engine cannot run it')
        info = dict(name=name.split('/')[0], weights='random', tag='random', sha256=None, engine='torch')
        return dict(score=1.0, memory_mb=1.0, gpu_memory_mb=None, extractor=info, build=0.0, size=[64, 64],
                    form='fused' if name.endswith('fused') else 'as trained')
    def handle(do, name='', names=(), **asked):
        print('a library says something')
        os.write(1, b'and so does one in C\\n')
        note(do, 'begins', name or names[0])
        time.sleep(0.02)
        note(do, 'ends', name or names[0])
        if do == 'build': return {name: about(name) for name in names}
        if name.startswith('rdpp'): raise SystemExit('out of memory')
        ms = MS.get(name, 10.)
        return dict(model=[[ms, None]] * 2, file=[[ms + 1, None]] * 2, batch=[[32 * ms, None]])
    serve(handle)
""")


@pytest.fixture
def stub(monkeypatch, surface, tmp_path):
    "Runs Table 3 with processes that invent their times; `.log` tells what they did, `.started` holds them."
    log, started = tmp_path / 'log', []

    class Noted(cse.lab.workers.Worker):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr(cse.lab.workers, 'Worker', Noted)
    monkeypatch.setattr(cse.lab.turns, '_CODE', STUB)
    monkeypatch.setenv('STUB_LOG', str(log))

    def run(methods, ms=None, **changes):
        monkeypatch.setenv('STUB_MS', repr(ms or {}))
        log.write_text('')
        usual = dict(data=str(surface), results=str(tmp_path / 'results')) | SMALL
        return run_speed(methods=methods, **usual | changes)

    run.results, run.started = tmp_path / 'results', started
    run.log = lambda: [line.split() for line in log.read_text().splitlines()]
    yield run
    assert all(worker.process.returncode is not None for worker in started), 'a process is left behind'


def test_methods_take_turns_one_at_a_time(stub):
    stub('cse,extractor,padim', rounds=3)
    log = stub.log()
    turns = [line[1:] for line in log if line[0] == 'turn']
    names = choose(['cse', 'extractor', 'padim'])
    assert turns == [[when, name] for _ in range(3) for name in names for when in ('begins', 'ends')]
    builds = [line[1] for line in log if line[0] == 'build']
    at_once = [builds[:i].count('begins') - builds[:i].count('ends') for i in range(len(builds) + 1)]
    assert len(stub.started) == 3 and max(at_once) <= 2
    assert log.index(['turn', 'begins', names[0]]) == len(builds), 'a turn begins before all are built'


def test_the_others_are_measured_when_a_process_dies(stub, capsys):
    why = r'2 of 4 measurements failed:\n.*rdpp/original seed 0: failed, ended with status 1: out of memory'
    with pytest.raises(GridError, match=why):
        stub('rdpp,padim', textures='anything')
    assert {r['method'] for r in load_records(stub.results)} == {'padim'}
    said = capsys.readouterr().out
    assert 'textures: no effect' in said and 'padim/original seed 0: 10.0 ms (10.0–10.0), 100.0 FPS' in said


def test_a_form_that_cannot_be_compiled_is_left_out(stub, capsys):
    records = stub('fastflow')
    line = 'fastflow/original-fused seed 0: left out, the engine cannot run it'
    assert line in capsys.readouterr().out and [r['form'] for r in records] == ['as trained']
    assert 'fastflow/original-fused (the engine cannot run it)' in facts(records, 3)['Left out']
    assert stub('fastflow') == records and not stub.log(), 'it is not tried again'
    assert line in capsys.readouterr().out


def test_one_that_is_missing_is_measured_together_with_all(stub):
    first = stub('padim')
    both = stub('padim,cfa')
    assert {r['timing']['run'] for r in both} != {r['timing']['run'] for r in first}
    assert len({r['timing']['run'] for r in both}) == 1 and len(both) == 4
    assert '| FPS, batch 32 |' in publish(both, 3)
    mixed = stub('cse')
    assert len(mixed) == 6 and 'different runs' in publish(mixed, 3, stub.results)
    assert facts(mixed, 3)['Runs of the benchmark'].startswith('2; only rows of the same run')
    assert 'different runs' not in publish(both, 3)


def test_a_part_that_is_slower_than_the_whole_is_refused(stub):
    with pytest.raises(SpeedError, match='cse/fused took .* extractor/fused, .* idle machine'):
        stub('cse,extractor', {'cse/fused': 5., 'extractor/fused': 6.})
    assert not load_records(stub.results), 'nothing of such a run is kept'
    assert len(stub('cse,extractor', {'cse/fused': 6., 'extractor/fused': 5.})) == 4


def test_ctrl_c_ends_all_processes(stub, monkeypatch):
    def interrupted(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(cse.lab.turns, '_take_turns', interrupted)
    with pytest.raises(KeyboardInterrupt):
        stub('cse,padim')
    assert len(stub.started) == 2 and not list(stub.results.glob('records/*'))


def test_a_file_that_is_gone(tmp_path):
    "What a method raises is told by its process."
    process = cse.lab.turns._Process()
    found = process.build(['extractor/as-trained'], torch.get_num_threads(), Config.smoke(
        **SIZE, extractor='resnet10t', weights='random', device='cpu').to_dict(),
        file=str(tmp_path / 'gone.png'), seed=0, warmup=0)
    assert 'gone.png: no such file' in found['extractor/as-trained']['error']


def test_events_of_a_gpu(monkeypatch, timed, surface):
    "The path of a GPU, with a clock that stands in for its events."
    class Event:
        count = 0
        def record(self): Event.count += 1; self.at = Event.count
        def elapsed_time(self, other): return 5. * (other.at - self.at)

    waited = []
    monkeypatch.setitem(cse.lab.turns._GPU, 'cpu', (waited.append, Event))
    ms, between = timed_call(lambda: None, torch.device('cpu'))
    assert between == 5 and ms >= 0 and len(waited) == 2
    turns = [dict(model=[[8., 5.]], file=[[9., 6.]], batch=[[64., 32.]])] * 6
    found = dict(turns=turns, gpu_memory_mb=1., size=[64, 64])
    metrics = cse.lab.latency._metrics(found)
    assert (metrics['latency_ms'], metrics['gpu_latency_ms']) == (8, 5)
    assert (metrics['batch_fps'], metrics['gpu_batch_fps']) == (500, 1000)
    timing = cse.lab.latency._timing(found, timed_image(surface)[0], timed[1][0]['timing'])
    assert timing['model_gpu_ms'] == [5.] * 6 and timing['batch_gpu_ms'] == [32.] * 6
    record = timed[1][0] | dict(metrics=metrics, timing=timing)
    assert check_record(json.dumps(record), record['key'])[1] == []
    assert 'GPU events (ms)' in publish([record], 3) and '5.0 (5.0–5.0)' in publish([record], 3)


def test_an_audit_computes_the_metrics_again(stub):
    text = json.dumps(stub('padim')[0])
    key = json.loads(text)['key']
    assert check_record(text, key)[1] == []
    for name in ('latency_ms', 'latency_to_ms', 'file_latency_from_ms', 'batch_fps'):
        record = json.loads(text)
        record['metrics'][name] += 1
        assert [what for what, *_ in check_record(json.dumps(record), key)[1]] == [f'metrics.{name}']


def test_the_image_comes_from_the_data(surface):
    first = surface / 'gravel/test/good/06.png'
    assert timed_image(surface) == (first, 'photographs', 'gravel')
    folder = surface / 'gravel/test'
    assert timed_image(folder) == (folder / 'bar/00.png', 'test', 'test')


def test_summary_and_times():
    expected = dict(latency_ms=50, latency_low_ms=5, latency_high_ms=95, fps=20)
    expected |= dict(latency_from_ms=50, latency_to_ms=50)
    assert summary([list(range(101))]) == expected
    rounds = [[1, 2, 9], [3], [4, 4], [5], [6, 6], [7]]
    assert summary(rounds)['latency_ms'] == 4.5
    assert median_interval([2, 3, 4, 5, 6, 7]) == (4.5, 2, 7)
    assert median_interval(range(20)) == (9.5, 5, 14), 'as tables of the binomial distribution say'
    calls = []
    first, second = times(lambda: calls.append(1), lambda: calls.append(2), repeats=3)
    assert len(first) == len(second) == 3 and calls == [1, 2] * 3


def test_both_forms_agree_with_other_settings_of_the_score(surface):
    network = dict(extractor='resnet10t', weights='random', device='cpu')
    config = Config.smoke(**SIZE, **network, clusters=3, cluster_reduction='max',
                          prototype='nearest', score_axis='channels')
    forms = [TIMED[name](config, 0) for name in choose(['cse'])]
    file = timed_image(surface)[0]
    with torch.no_grad():
        one, other = (form.score(form.prepare(file)).item() for form in forms)
    assert one > 1e-3 and one == pytest.approx(other, rel=1e-4)


def test_table3_notebook_knows_the_parameters_of_all_tables():
    names = set(inspect.signature(run_table).parameters) - {'table'}
    for path in (ROOT / 'params').glob('*.yml'):
        names |= set(yaml.safe_load(path.read_text()))
    assert set(read_parameters(dict.fromkeys(names), run_speed)) == names
    with pytest.raises(ConfigError, match='epochs=3: no parameter of this notebook'):
        read_parameters(dict(epochs=3), run_speed)


def test_table3_notebook(timed, surface):
    "It reads what is on record and writes the table."
    given = yaml.safe_load((ROOT / 'params/smoke.yml').read_text()) | SMALL
    given |= dict(data=str(surface), methods='["cse"]', results=str(timed[0]), force=False)
    before = {p: p.read_bytes() for p in (timed[0] / 'records').iterdir()}
    shown = json.dumps(run_notebook(ROOT / 'nbs/tables/table3_speed.ipynb', given))
    assert FUSED in shown and 'on record' in shown and 'image/png' in shown
    assert before == {p: p.read_bytes() for p in (timed[0] / 'records').iterdir()}


def test_a_hybrid_score_is_not_timed_as_the_paper(tmp_path):
    with pytest.raises(ConfigError, match="method='hybrid': no timing"):
        run_speed(methods='hybrid', results=str(tmp_path))
    assert not list(tmp_path.iterdir())
