"Table 3: records of timings, their report, and what is refused."
import csv
import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml

import cse.lab.latency
from cse import Config
from cse.config import ConfigError
from cse.data.images import DataError
from cse.extractor import WeightsError
from cse.lab.latency import TIMED, choose, run_speed, summary, timed_image
from cse.lab.benchmark import times
from cse.lab.grid import GridError
from cse.lab.records import load_records
from cse.lab.parameters import read_parameters, run_table
from cse.lab.published import ReportError
from cse.lab.tables import facts, publish
from cse.lab.comparison import check_records
from conftest import run_notebook

ROOT = Path(__file__).parent.parent
SIZE = dict(resize=64, crop=64)
SMALL = dict(extractor='tf_efficientnet_lite0', weights='packaged', settings=SIZE,
             device='cpu', repeats=10, warmup=1)
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
        assert len(r['timing']['model_ms']) == len(r['timing']['file_ms']) == 10
        assert r['peak_memory_mb'] > 100 and r['threads'] == torch.get_num_threads()
        assert r['device'] and r['versions']['openvino'] and len(r['extractor']['sha256']) == 64


def test_metrics_of_a_record(timed):
    for r in timed[1]:
        m = r['metrics']
        for name in ('', 'file_'):
            low, high = m[f'{name}latency_low_ms'], m[f'{name}latency_high_ms']
            assert 0 < low <= m[f'{name}latency_ms'] <= high
            assert m[f'{name}fps'] == pytest.approx(1000 / m[f'{name}latency_ms'], rel=1e-3)
        assert m['latency_ms'] < m['file_latency_ms'] and m['gpu_memory_mb'] is None


@pytest.fixture
def measured(timed, surface, monkeypatch):
    "Runs Table 3 on the records of `timed`; returns the methods that would be measured again."
    asked = []

    def refuse(method, *args, **kw):
        asked.append(method)
        raise ZeroDivisionError

    monkeypatch.setattr(cse.lab.latency, 'measure_apart', refuse)

    def run(**changes):
        usual = dict(data=str(surface), methods='cse', results=str(timed[0])) | SMALL
        asked.clear()
        return run_speed(**usual | changes), list(asked)

    run.asked = asked
    return run


def test_what_is_on_record_is_not_measured_again(timed, measured, capsys):
    assert measured() == (timed[1], [])
    assert capsys.readouterr().out.count('on record') == 2


@pytest.mark.parametrize('change', [dict(force=True), dict(repeats=11), dict(seeds='[1]')])
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
                 'openvino', median):
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
    (ConfigError, 'device', dict(device='tpu')),
])
def test_bad_input_is_refused_before_anything_is_measured(
        surface, tmp_path, monkeypatch, error, words, parameters):
    def measured(*args, **kw): pytest.fail('something was measured')
    monkeypatch.setattr(cse.lab.latency, 'time_method', measured)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.png').write_bytes(b'broken')
    if 'data' in parameters:
        parameters = dict(data=str(tmp_path / parameters['data']))
    with pytest.raises(error, match=words):
        run_speed(**dict(data=str(surface)) | SMALL | parameters)


def test_the_other_methods_are_measured_when_one_fails(
        timed, surface, tmp_path, monkeypatch, capsys):
    real, extractor = cse.lab.latency.measure_apart, timed[1][0]['extractor']
    found = dict(times=dict(model=[1.0] * 10, file=[2.0] * 10), score=1.0, memory_mb=1.0,
                 gpu_memory_mb=None, extractor=extractor, form='as trained', size=[64, 64], build=0.0)

    def half(method, *args, **kw):
        if method == 'extractor/fused': return found
        return real(method, *args, **kw | dict(file='gone.png'))

    monkeypatch.setattr(cse.lab.latency, 'measure_apart', half)
    why = (r'1 of 2 measurements failed:\n'
           r'.*extractor/as-trained seed 0: failed, .*gone.png: no such file')
    with pytest.raises(GridError, match=why):
        run_speed(data=str(surface), methods='extractor', results=str(tmp_path),
                  textures='anything', **SMALL)
    assert [r['metrics']['fps'] for r in load_records(tmp_path)] == [1000]
    assert 'textures: no effect' in capsys.readouterr().out


def test_the_image_comes_from_the_data(surface):
    first = surface / 'gravel/test/good/06.png'
    assert timed_image(surface) == (first, 'photographs', 'gravel')
    folder = surface / 'gravel/test'
    assert timed_image(folder) == (folder / 'bar/00.png', 'test', 'test')


def test_summary_and_times():
    expected = dict(latency_ms=50, latency_low_ms=5, latency_high_ms=95, fps=20)
    assert summary(list(range(101))) == expected
    calls = []
    first, second = times(lambda: calls.append(1), lambda: calls.append(2), repeats=3)
    assert len(first) == len(second) == 3 and calls == [1, 2] * 3


def test_both_forms_agree_with_other_settings_of_the_score(surface):
    network = dict(extractor='resnet10t', weights='random', device='cpu')
    config = Config.smoke(**SIZE, **network, clusters=3, cluster_reduction='max',
                          prototype='nearest', score_axis='channels')
    scorers = [TIMED[name](config, 0) for name in choose(['cse'])]
    file = timed_image(surface)[0]
    with torch.no_grad():
        one, other = (scorer.score(scorer.prepare(file)) for scorer in scorers)
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
