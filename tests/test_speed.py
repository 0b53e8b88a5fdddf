"Table 3: records of timings, their report, and what is refused."
import csv
import json
from pathlib import Path

import papermill
import pytest
import torch

from cse import Config
from cse.config import ConfigError
from cse.data.images import DataError
from cse.lab.records import load_records
from cse.lab.grid import GridError
from cse.lab.parameters import read_parameters
from cse.extractor import WeightsError
from cse.lab.tables import ReportError, caption, check_records, publish
from cse.lab.latency import TIMED, choose, run_speed, summary, timed_image, times

ROOT = Path(__file__).parent.parent
SMALL = dict(extractor='tf_efficientnet_lite0', weights='packaged', settings=dict(resize=64, crop=64), device='cpu', repeats=10, warmup=1)


@pytest.fixture(scope='module')
def timed(surface, tmp_path_factory):
    "Both forms of CSE, measured once for all tests: folder of results, records, what was printed."
    results = tmp_path_factory.mktemp('results')
    return results, run_speed(data=str(surface), methods='cse', results=str(results), **SMALL)


def test_record(timed, surface):
    results, records = timed
    assert [(r['method'], r['form'], r['extractor']['engine']) for r in records] == [('cse', 'as trained', 'torch'), ('cse', 'fused', 'openvino')]
    assert sorted(load_records(results), key=lambda r: r['form']) == records
    for r in records:
        path = results / 'records' / f'{r["key"]}.json'
        assert json.loads(path.read_text()) == r and str(surface) not in path.read_text()
        assert (r['table'], r['category'], r['images'], r['data']['name']) == (3, 'gravel', ['06.png'], 'photographs')
        assert r['timing']['image'] == [256, 256] and r['timing']['input'] == [64, 64] and len(r['timing']['model_ms']) == len(r['timing']['file_ms']) == 10
        m = r['metrics']
        for name in ('', 'file_'):
            assert 0 < m[f'{name}latency_low_ms'] <= m[f'{name}latency_ms'] <= m[f'{name}latency_high_ms']
            assert m[f'{name}fps'] == pytest.approx(1000 / m[f'{name}latency_ms'], rel=1e-3)
        assert m['latency_ms'] < m['file_latency_ms'] and m['gpu_memory_mb'] is None
        assert r['peak_memory_mb'] > 100 and r['threads'] == torch.get_num_threads() and r['device'] and r['versions']['openvino']
        assert len(r['extractor']['sha256']) == 64
    assert records[0]['scores'] == pytest.approx(records[1]['scores'], rel=1e-4), 'both forms are the same function'


def test_what_is_on_record_is_not_measured_again(timed, surface, monkeypatch, capsys):
    import cse.lab.latency
    results, records = timed
    asked = []
    monkeypatch.setattr(cse.lab.latency, 'measure_apart', lambda method, *a, **kw: asked.append(method) or 1 / 0)
    again = lambda **kw: run_speed(**dict(data=str(surface), methods='cse', results=str(results)) | SMALL | kw)
    assert again() == records and asked == []
    assert capsys.readouterr().out.count('on record') == 2
    for change in (dict(force=True), dict(repeats=11), dict(seeds='[1]'), dict(settings=dict(resize=64, crop=64, engine='torch')),
                   dict(settings=dict(resize=72, crop=64)), dict(weights='random')):
        asked.clear()
        with pytest.raises(GridError, match='2 of 2 measurements failed'): again(**change)
        assert asked == ['cse/as-trained', 'cse/fused'], change
    for name, value in (('processor', lambda device: 'another machine'), ('torch.get_num_threads', lambda: 77)):
        asked.clear()
        with monkeypatch.context() as m, pytest.raises(GridError):
            m.setattr(f'cse.lab.latency.{name}', value)
            again()
        assert len(asked) == 2, name
    assert again() == records


def test_report(timed):
    results, records = timed
    text = publish(records, 3, results)
    for word in ('CSE tf_efficientnet_lite0, as trained', 'CSE tf_efficientnet_lite0, fused', 'RTX 3090 Ti', 'different machines', records[0]['device'], 'thread', 'packaged',
                 'SHA-256', '256×256', '64×64', 'not run', 'openvino', f'{records[1]["metrics"]["latency_ms"]:.1f} ('):
        assert word in text, word
    files = {p.suffix: p for p in (results / 'tables').iterdir()}
    assert set(files) == {'.md', '.csv', '.svg'} and all(p.name.startswith('table3-') for p in files.values())
    lines = list(csv.DictReader(files['.csv'].read_text().splitlines()))
    assert all(line['published'] == line['difference'] == '' for line in lines), 'times of different machines are not compared'
    latency = next(line for line in lines if (line['method'], line['category']) == ('CSE tf_efficientnet_lite0, fused', 'latency (ms)'))
    assert float(latency['ours']) == records[1]['metrics']['latency_ms'] and latency['threads'] == str(records[1]['threads'])
    assert '<svg' in files['.svg'].read_text()


def test_report_says_that_weights_are_random(timed):
    records = [r | dict(extractor=r['extractor'] | dict(name='efficientnet_b3.ra2_in1k', weights='random', tag='random', sha256=None)) for r in timed[1]]
    assert 'efficientnet_b3 with **random weights**' in caption(records, 3)
    assert 'CSE EfficientNet-b3, fused' in publish(records, 3)


def test_times_of_two_machines_do_not_stand_in_one_table(timed):
    one, other = timed[1]
    for change in (dict(device='another'), dict(threads=77), dict(timing=one['timing'] | dict(repeats=99))):
        with pytest.raises(ReportError, match=next(iter(change))): check_records([one, other | change], 3)
    with pytest.raises(ReportError, match='data.fingerprint'): check_records([one, other | dict(data=one['data'] | dict(fingerprint='f'))], 3)


def test_bad_input_is_refused_before_anything_is_measured(surface, tmp_path, monkeypatch):
    import cse.lab.latency
    monkeypatch.setattr(cse.lab.latency, 'time_method', lambda *a, **kw: pytest.fail('something was measured'))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.png').write_bytes(b'broken')
    for error, words, parameters in (
            (ConfigError, "method='patchwork'.*cse/fused", dict(methods='patchwork')),
            (ConfigError, 'no_such_net', dict(extractor='no_such_net')),
            (WeightsError, 'missing.pth.*no such file', dict(weights='missing.pth')),
            (DataError, 'empty.*no images', dict(data=str(tmp_path / 'empty'))),
            (DataError, 'nowhere.*no such folder', dict(data=str(tmp_path / 'nowhere'))),
            (DataError, 'a.png.*not a readable image', dict(data=str(tmp_path / 'broken'))),
            (DataError, 'marble', dict(data=str(surface), categories='marble')),
            (ConfigError, 'epoch', dict(settings=dict(epoch=1))),
            (ConfigError, 'expected JSON', dict(settings='epochs')),
            (ConfigError, 'profile', dict(profile='fast')),
            (ConfigError, 'seeds', dict(seeds=0)),
            (ConfigError, 'repeats', dict(repeats=0)),
            (ConfigError, 'device', dict(device='tpu'))):
        with pytest.raises(error, match=words): run_speed(**dict(data=str(surface)) | SMALL | parameters)


def test_a_process_that_fails_does_not_take_the_others_with_it(timed, surface, tmp_path, monkeypatch, capsys):
    import cse.lab.latency
    real, done = cse.lab.latency.measure_apart, timed[1][0]
    found = dict(times=dict(model=[1.0] * 10, file=[2.0] * 10), score=1.0, memory_mb=1.0, gpu_memory_mb=None, extractor=done['extractor'], form='as trained', size=[64, 64], build=0.0)
    monkeypatch.setattr(cse.lab.latency, 'measure_apart', lambda method, *a, **kw: real(method, *a, **kw | dict(file='gone.png')) if method == 'extractor/as-trained' else found)
    with pytest.raises(GridError, match=r'1 of 2 measurements failed:\n.*extractor/as-trained seed 0: failed, .*gone.png: no such file'):
        run_speed(data=str(surface), methods='extractor', results=str(tmp_path), textures='anything', **SMALL)
    assert [r['metrics']['fps'] for r in load_records(tmp_path)] == [1000]
    assert 'textures: without influence' in capsys.readouterr().out


def test_the_image_comes_from_the_data(surface, tmp_path):
    file, name, category = timed_image(surface)
    assert (file, name, category) == (surface / 'gravel/test/good/06.png', 'photographs', 'gravel')
    assert timed_image(surface / 'gravel/test') == (surface / 'gravel/test/bar/00.png', 'test', 'test')


def test_summary_and_times():
    assert summary(list(range(101))) == dict(latency_ms=50, latency_low_ms=5, latency_high_ms=95, fps=20)
    calls = []
    first, second = times(lambda: calls.append(1), lambda: calls.append(2), repeats=3)
    assert len(first) == len(second) == 3 and calls == [1, 2] * 3


def test_both_forms_agree_with_other_settings_of_the_score(surface):
    config = Config.smoke(resize=64, crop=64, device='cpu', clusters=3, cluster_reduction='max', prototype='nearest', score_axis='channels')
    methods = [TIMED[name](config, 0) for name in choose(['cse'])]
    with torch.no_grad(): one, other = (m.score(m.prepare(timed_image(surface)[0])) for m in methods)
    assert one > 1e-3 and one == pytest.approx(other, rel=1e-4)


def test_table3_notebook_knows_the_parameters_of_all_tables():
    import inspect
    import yaml
    from cse.lab.parameters import run_table
    names = set(inspect.signature(run_table).parameters) - {'table'}
    for path in (ROOT / 'params').glob('*.yml'): names |= set(yaml.safe_load(path.read_text()))
    assert set(read_parameters(dict.fromkeys(names), run_speed)) == names
    with pytest.raises(ConfigError, match='epochs=3: no parameter of this notebook'): read_parameters(dict(epochs=3), run_speed)


def test_table3_notebook(timed, surface, tmp_path):
    "It reads what is on record and writes the table."
    import yaml
    given = yaml.safe_load((ROOT / 'params/smoke.yml').read_text()) | SMALL | dict(data=str(surface), methods='["cse"]', results=str(timed[0]), force=False)
    before = {p: p.read_bytes() for p in (timed[0] / 'records').iterdir()}
    done = papermill.execute_notebook(str(ROOT / 'nbs/tables/table3_speed.ipynb'), str(tmp_path / 'out.ipynb'), given, kernel_name='python3', progress_bar=False)
    shown = json.dumps([c.outputs for c in done.cells if c.cell_type == 'code'])
    assert 'CSE tf_efficientnet_lite0, fused' in shown and 'on record' in shown and 'image/png' in shown
    assert before == {p: p.read_bytes() for p in (timed[0] / 'records').iterdir()}


def test_joined_scores_are_not_timed_as_the_paper(tmp_path):
    with pytest.raises(ConfigError, match='times the method of the paper'): run_speed(profile='clean', results=str(tmp_path))
    assert not list(tmp_path.iterdir())
