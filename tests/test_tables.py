"Table notebooks from papermill to the files in results."
import json
from pathlib import Path
from types import SimpleNamespace

import papermill
import pytest

from cse.config import ConfigError
from cse.lab.records import load_records
from cse.lab.runs import run
from cse.lab.grid import GridError, grid
from cse.lab.parameters import read_asked, run_table
from cse.lab.tables import render

ROOT = Path(__file__).parent.parent
TABLES = ROOT / 'nbs/tables'
TABLE1 = TABLES / 'table1_mvtec.ipynb'
SMALL = {'epochs': 1, 'resize': 64, 'crop': 64}


def execute(notebook, out, **parameters):
    return papermill.execute_notebook(
        str(notebook), str(out), parameters, kernel_name='python3', progress_bar=False
    )


def texts(notebook):
    return '\n'.join(
        str(o.get('text', '')) + str(o.get('data', {}))
        for c in notebook.cells
        if c.cell_type == 'code'
        for o in c.outputs
    )


def run_cells(notebook, **parameters):
    "Run the code of a notebook in this process, with parameters after its own."
    variables = {}
    for cell in json.loads(notebook.read_text())['cells']:
        if cell['cell_type'] == 'code':
            exec(''.join(cell['source']), variables)
        if 'parameters' in cell['metadata'].get('tags', []):
            variables.update(parameters)


@pytest.fixture(scope='module')
def table1(surface, textures, tmp_path_factory):
    "Table 1 through papermill: what it shows, its results, and its parameters."
    folder = tmp_path_factory.mktemp('table1')
    parameters = dict(
        data=str(surface), textures=str(textures), categories='["gravel"]',
        settings=SMALL, seeds='2', results=str(folder / 'results'))
    done = execute(TABLE1, folder / 'out.ipynb', **parameters)
    return SimpleNamespace(shown=texts(done), results=folder / 'results', parameters=parameters)


def test_table1_from_a_folder(table1):
    records = load_records(table1.results)
    assert [r['seed'] for r in records] == [0, 1]
    for record in records:
        assert record['config']['epochs'] == 1
        assert (record['data']['name'], record['data']['published']) == ('photographs', None)
    mean = 100 * sum(r['metrics']['auroc'] for r in records) / 2
    words = 'photographs', 'smoke', 'tf_efficientnet_lite0', 'gravel', 'epochs'
    for word in (f'{mean:.1f}', *words):
        assert word in table1.shown, f'{word} is not in the table or its caption'
    written = {p.suffix: p for p in (table1.results / 'tables').iterdir()}
    assert set(written) == {'.md', '.csv', '.svg'}
    assert 'not run' not in table1.shown, 'what was not asked for is left out'
    assert f'{mean:.1f}' in written['.md'].read_text()


def test_a_table_is_made_again_without_a_run(table1):
    records, tables = (table1.results / name for name in ('records', 'tables'))
    stamps = {p: p.stat().st_mtime_ns for p in records.iterdir()}
    before = {p: p.read_bytes() for p in tables.iterdir()}
    run_cells(TABLE1, **table1.parameters)
    assert stamps == {p: p.stat().st_mtime_ns for p in records.iterdir()}
    assert before == {p: p.read_bytes() for p in tables.iterdir()}


def test_tables_4_and_5_share_the_runs_of_cse(surface, textures, tmp_path, capsys):
    parameters = dict(
        data=str(surface), textures=str(textures), categories='',
        settings=SMALL, results=str(tmp_path))
    run_cells(TABLES / 'table4_classifier.ipynb', **parameters)
    assert '[2/2] cse gravel seed 0: AUROC' in capsys.readouterr().out
    run_cells(TABLES / 'table5_decoder.ipynb', **parameters)
    line, = (line for line in capsys.readouterr().out.splitlines() if '[4/4]' in line)
    assert 'cse/random gravel seed 0' in line and 'on record' in line
    records = load_records(tmp_path)
    assert sorted((r['method'], r['config']['decoder']) for r in records) == \
        [('classifier', 'random'), ('cse', 'joint'), ('cse', 'none'),
         ('cse', 'pretrained'), ('cse', 'random')]
    table4, table5 = (p.read_text() for p in sorted((tmp_path / 'tables').glob('*.md')))
    assert 'Classifier' in table4 and 'not run' not in table4 + table5
    for mode in ('no decoder', 'trained before', 'trained together', 'random'):
        assert mode in table5


def test_table2_takes_a_release_of_tilda(textures, tmp_path):
    from test_tilda import write_release
    release = write_release(tmp_path / 'TILDA', 'C2R2', count=5, size=(96, 64))
    records = run_table(
        2, str(release), str(textures), settings=SMALL, results=str(tmp_path / 'results')
    )
    assert [r['category'] for r in records] == ['tilda3']
    data = records[0]['data']
    assert (data['train'], data['test_good'], data['test_defective']) == (4, 1, 35)
    good, defective, *_ = records[0]['images']
    assert good.startswith('test/good/c2r2e0n') and defective == 'test/E1/c2r2e1n1.tif'
    other = dict(textures=str(textures), settings=SMALL | {'tilda_split_seed': 1})
    with pytest.raises(ConfigError, match='expected another folder of results'):
        run_table(2, str(release), **other, results=str(tmp_path / 'results'))
    again = run_table(2, str(release), **other, results=str(tmp_path / 'others'))
    assert again[0]['key'] != records[0]['key'], 'another split is another run'


def test_built_in_textiles_are_no_surfaces_of_table_1():
    from cse.lab.runs import resolve_data
    from cse.lab.parameters import default_categories
    assert default_categories(None, 1) == ['carpet', 'grid', 'leather', 'tile', 'wood']
    assert default_categories(None, 2) == [f'textile{i}' for i in range(1, 9)]
    assert resolve_data(None, ['wood'])[1] != resolve_data(None, ['textile1'])[1]


@pytest.mark.parametrize('name, message', [
    ('classifier/none', 'expected classifier/ and one of paper, official, smoke, repaired, inspection$'),
    ('cse/frozen', 'expected cse/ and one of paper, .*, random$'),
    ('cse/', 'expected cse/ and one of paper, .*, random$'),
    ('patchcore/papers', 'expected patchcore/ and one of paper, .*, inspection$'),
    ('patchwork/paper', "'classifier'"),
    ('patchwork', "'classifier'"),
    ('cse/random', 'expected each once')])
def test_unknown_columns_are_refused_before_any_run(surface, tiny, tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        grid(tiny, surface, ['gravel'], ['cse', name], results=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('table, parameters, message', [
    (1, dict(methods='cse/none'), 'columns of Table 5'),
    (5, dict(methods='cse/none', settings={'decoder': 'joint'}), 'expected it in one place'),
    (5, dict(methods='cse/repaired'), 'columns of Table 5 are decoder modes'),
    (1, dict(methods='cse,cse/smoke'), 'expected each once'),
    (1, dict(categories='wood,textile1'), 'not both in one table'),
    (1, dict(settings='[1]'), 'expected JSON')])
def test_contradicting_parameters_are_refused_before_any_run(
        tmp_path, table, parameters, message):
    with pytest.raises(ValueError, match=message):
        run_table(table, results=str(tmp_path / 'results'), **parameters)
    assert not (tmp_path / 'results').exists()


def test_one_table_compares_profiles(surface, tmp_path):
    given = dict(data=str(surface), settings=SMALL, results=str(tmp_path))
    names = 'cse,cse/repaired,cse/official,hybrid/repaired,mean_distance,mean_distance/repaired'
    records = run_table(1, methods=names, **given)
    layers = {(r['method'], r.get('trained_as')): r['config']['layers'] for r in records}
    finer = {name for name, used in layers.items() if used == [3]}
    assert len(layers) == 6 and finer == {(name, 'repaired') for name in ('cse', 'hybrid', 'mean_distance')}
    by = {r.get('trained_as'): r for r in records if r['method'] == 'cse'}
    assert by['official']['config']['train_axis'] == 'columns' != by[None]['config']['train_axis']
    assert {r['config']['epochs'] for r in by.values()} == {1}, 'a changed setting stays'
    assert by[None]['metrics'] != by['repaired']['metrics']
    table = str(render(records, 1, read_asked(tmp_path)[1]))
    assert '| CSE | ' in table and '| CSE, profile repaired | ' in table
    assert '| mean distance, profile repaired | ' in table and 'layers = (3,) instead of (3, 4)' in table
    assert by['repaired']['key'].startswith('cse_repaired-') and by[None]['key'].startswith('cse-')
    assert run_table(1, methods='cse/repaired', **given)[0] == by['repaired'], 'read from its record'


def test_papermill_stops_at_an_unknown_parameter(tmp_path):
    message = 'epochs=3: no parameter of this notebook'
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        execute(TABLE1, tmp_path / 'out.ipynb', epochs=3)


@pytest.mark.parametrize('notebook', sorted(TABLES.glob('*.ipynb')), ids=lambda p: p.stem)
def test_unknown_parameters_are_refused(notebook):
    with pytest.raises(ConfigError, match='epochs=3: no parameter of this notebook'):
        run_cells(notebook, epochs=3)


@pytest.mark.parametrize('change, words', [
    (dict(force='perhaps'), 'force=.perhaps.: expected true or false'),
    (dict(seeds='1.7'), 'seeds=.1.7.: expected a number of seeds'),
    (dict(seeds=[1.7]), 'expected a number of seeds'),
    (dict(seeds=-1), 'expected a number of seeds'),
    (dict(seeds=True), 'expected a number of seeds')])
def test_parameters_mean_what_they_say(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        run_table(1, categories='wood', methods='mean_distance', results=str(tmp_path), **change)
    assert not list(tmp_path.glob('records/*'))


def test_false_from_papermill_is_false(surface, tmp_path):
    given = dict(data=str(surface), methods='mean_distance', settings=SMALL, results=str(tmp_path))
    first, = run_table(1, **given)
    again, = run_table(1, **given, force='false')
    assert again == first
    once_more, = run_table(1, **given, force='true')
    assert once_more['time'] >= first['time'] and once_more['seconds'] != first['seconds']


def test_parameters_files_are_known_to_the_notebooks():
    import inspect
    known = set(inspect.signature(run_table).parameters)
    for path in (ROOT / 'params').glob('*.yml'):
        names = {
            line.split(':')[0]
            for line in path.read_text().splitlines()
            if line and not line.startswith('#')
        }
        assert names <= known


def test_the_other_runs_go_on_when_one_fails(own_surface, textures, tmp_path, tiny, capsys):
    from conftest import write_category
    write_category(own_surface, 'brick')
    (own_surface / 'brick/test/bar/00.png').write_bytes(b'broken')
    with pytest.raises(GridError, match=r'1 of 2 runs failed(.|\n)*brick(.|\n)*00\.png'):
        grid(tiny, own_surface, ['brick', 'gravel'], textures=textures, results=tmp_path)
    told = capsys.readouterr()
    assert 'failed, DataError' in told.out and 'Traceback' not in told.err
    assert [r['category'] for r in load_records(tmp_path)] == ['gravel']


def test_force_runs_again(surface, textures, tmp_path, tiny):
    first = run(tiny, surface, 'gravel', textures=textures, results=tmp_path)
    again = run(tiny, surface, 'gravel', textures=textures, results=tmp_path, force=True)
    assert first['scores'] == again['scores'], 'the same seed gives the same scores, bit for bit'
    assert first['time'] != again['time'] or first['seconds'] != again['seconds']
    assert len(load_records(tmp_path)) == 1


def test_a_weights_file_is_recorded_by_name_and_hash(surface, textures, tmp_path):
    import timm
    from safetensors.torch import save_file
    from cse import Config
    (tmp_path / 'folder').mkdir()
    path = tmp_path / 'folder' / 'some.safetensors'
    save_file(timm.create_model('resnet10t').state_dict(), path)
    config = Config.smoke(**SMALL, extractor='resnet10t', weights=str(path))
    record = run(config, surface, 'gravel', textures=textures, results=tmp_path / 'results')
    assert record['config']['weights'] == record['extractor']['tag'] == 'some.safetensors'
    assert len(record['extractor']['sha256']) == 64
    assert str(tmp_path) not in json.dumps(record)
    path.rename(tmp_path / 'some.safetensors')
    moved = run(
        config.replace(weights=str(tmp_path / 'some.safetensors')),
        surface,
        'gravel',
        textures=textures,
        results=tmp_path / 'results'
    )
    assert moved == record, 'the same weights in another place are the same run'


def test_record_is_complete(surface, textures, tmp_path, tiny):
    record = run(tiny, surface, 'gravel', textures=textures, results=tmp_path, table=1, seed=3)
    (path,) = (tmp_path / 'records').iterdir()
    assert json.loads(path.read_text()) == record
    assert path.stem == record['key'] and 'gravel' in path.stem and 'seed3' in path.stem
    assert len(record['scores']) == len(record['labels']) == len(record['images']) == 6
    assert record['labels'] == [0, 0, 0, 1, 1, 1] and record['images'][0] == 'test/good/06.png'
    assert record['data'] == dict(
        name='photographs',
        published=None,
        fingerprint=record['data']['fingerprint'],
        train=6,
        test_good=3,
        test_defective=3
    )
    assert len(record['extractor']['sha256']) == 64 and record['extractor']['tag'] == 'packaged'
    metrics = record['metrics']
    assert 0 <= metrics['auroc_low'] <= metrics['auroc'] <= metrics['auroc_high'] <= 1
    assert record['metrics']['pixel_auroc'] is not None and record['metrics']['aupro'] is not None
    assert len(record['training']['history']) == 2
    parts = {'read', 'extractor', 'defects', 'embedder', 'fit', 'score', 'total'}
    assert parts <= record['seconds'].keys()
    assert record['peak_memory_mb'] > 100 and record['versions']['torch']
    for trace in (str(tmp_path), str(surface)):
        assert trace not in path.read_text()
