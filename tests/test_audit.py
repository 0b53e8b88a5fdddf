"Every planted error is found, and the committed results hold none."
import functools
import json
import shutil

import pytest

from cse.lab.audit import audit, check_record, identity
from cse.lab.parameters import read_asked, table_records
from cse.lab.records import load_records, reference_folder
from cse.lab.selection import select_pairs, stated_parameters

FOLDERS = {
    3: reference_folder() / 'built-in-smoke',
    4: reference_folder() / 'surfaces-paper-tf_efficientnet_lite0',
    6: reference_folder() / 'text-against-code-surfaces-smoke'}


@functools.cache
def load(table):
    "The records of the reference that a table needs, by key."
    records = load_records(FOLDERS[table])
    if table == 6:
        pairs, _ = select_pairs(records, stated(6))
        records = [r for sides in pairs.values() for side in sides for r in side]
    else:
        records = table_records(records, table, read_asked(FOLDERS[table])[table])
    return {r['key']: r for r in records}


def stated(table):
    "The parameters of the executed notebook of a table."
    notebook, = (FOLDERS[table] / 'notebooks').glob(f'table{table}_*.ipynb')
    return stated_parameters(notebook)


def renamed(records, name):
    "Records as if their images were those of a published data set."
    return [r | {'data': r['data'] | dict(name=name, published=name)} for r in records]


def copy_table(table, tmp_path):
    "A folder of results with one table and its records, one file each."
    for name in ('records', 'notebooks', 'tables'):
        (tmp_path / name).mkdir()
    for key, record in load(table).items():
        (tmp_path / 'records' / f'{key}.json').write_text(json.dumps(record, indent=1))
    asked = {str(n): entry for n, entry in read_asked(FOLDERS[table]).items() if n == table}
    (tmp_path / 'asked.json').write_text(json.dumps(asked))
    for pattern in (f'notebooks/table{table}_*', f'tables/table{table}[.-]*'):
        for path in FOLDERS[table].glob(pattern):
            shutil.copy(path, tmp_path / pattern.split('/')[0])
    return tmp_path


def run_file(folder):
    return min((folder / 'records').glob('cse-*.json'))


def a_side(folder):
    "The record of one side of a pair of Table 6."
    for path in (folder / 'records').glob('*wood*'):
        if json.loads(path.read_text())['config']['prototype'] == 'nearest':
            return path


def timing_file(folder):
    return min((folder / 'records').glob('speed-cse_fused*.json'))


def change(path, edit):
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record, indent=1))


def put(path, value):
    "An edit of the value at a dotted path."
    def edit(record):
        *parents, last = path.split('.')
        for name in parents:
            record = record[name]
        record[int(last) if isinstance(record, list) else last] = value
    return edit


def in_run(edit):
    "A change of one run in a folder of results."
    return lambda folder: change(run_file(folder), edit)


def in_timing(edit):
    "A change of one timing in a folder of results."
    return lambda folder: change(timing_file(folder), edit)


def copy_as(path, name, **changes):
    new = path.with_name(name)
    shutil.copy(path, new)
    change(new, lambda record: record.update(changes))


def scale_first_score(record):
    "A change that alters no rank."
    record['scores'][0] *= 1 + 1e-9


def rename(folder):
    run_file(folder).rename(folder / 'records/better.json')


def truncate(folder):
    path = run_file(folder)
    path.write_text(path.read_text()[:5000])


def copy_csv(folder):
    tables = folder / 'tables'
    shutil.copy(tables / 'table4.csv', tables / 'table5.csv')


def rewrite(pattern, old, new):
    def plant(folder):
        path, = folder.glob(pattern)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    return plant


PLANTED = {  # what is done to a folder of results → a word of the finding
    'a score that changes no rank': (in_run(scale_first_score), 'a 32-bit number'),
    'a score that changes ranks': (in_run(put('scores.0', 1e6)), 'metrics.auroc'),
    'a score that is no number': (in_run(put('scores.0', float('nan'))), 'NaN'),
    'a label': (in_run(put('labels.0', 1)), 'good and defective labels'),
    'a missing score': (in_run(lambda r: r['scores'].pop()), 'record'),
    'a metric': (in_run(put('metrics.auroc', 0.99)), 'metrics.auroc'),
    'a limit of an interval': (in_run(put('metrics.auroc_low', 0.9)), 'metrics.auroc_low'),
    'a pixel metric out of range': (in_run(put('metrics.aupro', 1.5)), 'metrics.aupro'),
    'a setting': (in_run(put('config.epochs', 7)), 'name of the file'),
    'a setting that there is not': (in_run(put('config.epoch', 7)), 'no such setting'),
    'a seed': (in_run(put('seed', 7)), 'name of the file'),
    'a profile': (in_run(put('profile', 'official')), 'profile'),
    'a fingerprint of data': (in_run(put('data.fingerprint', '0' * 16)), 'data.fingerprint'),
    'a fingerprint of textures': (
        in_run(put('textures.fingerprint', '0' * 16)),
        'textures.fingerprint'),
    'a hash of weights': (in_run(put('extractor.sha256', '0' * 64)), 'extractor.sha256'),
    'a missing version': (in_run(put('versions.torch', None)), 'versions.torch'),
    'a schema': (in_run(put('schema', 99)), 'schema'),
    'a shortened history': (
        in_run(lambda r: r['training']['history'].pop()),
        'training.epochs'),
    'a renamed file': (rename, 'name of the file'),
    'a truncated file': (truncate, 'JSONDecodeError'),
    'a list instead of a record': (lambda f: run_file(f).write_text('[]'), 'record'),
    'a copy under another name': (
        lambda f: copy_as(run_file(f), 'copy.json'),
        'the same run again'),
    'a copy with another key': (
        lambda f: copy_as(run_file(f), 'cse-copy.json', key='cse-copy'),
        'the same run again'),
    'a missing record': (lambda f: run_file(f).unlink(), 'CSE,fabric02'),
    'runs of a cell that are missing': (
        lambda f: [p.unlink() for p in (f / 'records').glob('cse-*fabric02*')],
        'record: expected CSE on fabric02'),
    'a cell of a CSV': (
        rewrite('tables/table4*.csv', 'CSE,fabric02,,91.', 'CSE,fabric02,,97.'),
        'CSE,fabric02'),
    'a cell in Markdown': (
        rewrite('tables/table4*.md', '91.1 ±', '97.1 ±'),
        'table4.md: line'),
    'a line of a caption': (
        rewrite('tables/table4*.md', '**not MVTec AD**', 'MVTec AD'),
        'table4.md: line 1:'),
    'a cell shown in a notebook': (
        rewrite('notebooks/table4*.ipynb', '91.1 ±', '97.1 ±'),
        'table shown'),
    'a missing table': (
        lambda f: (f / 'tables/table4.csv').unlink(),
        'the table that its notebook makes'),
    'a table without source': (copy_csv, 'an executed notebook'),
    'seeds that were asked for': (
        rewrite('asked.json', '"seeds": [0, 1, 2]', '"seeds": [0, 1]'),
        'CSE,fabric02'),
    'an environment': (in_run(put('environment.torch', '1.0')), 'name of the file'),
}
PLANTED_TIMINGS = {
    'a time': (in_timing(put('timing.model_ms.0', 1e6)), 'metrics.latency'),
    'a latency': (in_timing(put('metrics.latency_ms', 1.0)), 'metrics.latency_ms'),
    'a machine': (in_timing(put('device', 'RTX 3090 Ti')), 'name of the file'),
    'a copied timing': (
        lambda f: copy_as(timing_file(f), 'speed-copy.json', key='speed-copy'),
        'the same run again'),
    'a missing timing': (lambda f: timing_file(f).unlink(), 'fused'),
}
PLANTED_PAIRS = {
    'a side of a pair': (
        rewrite('tables/table6*.csv', 'batchnorm,fabric02,0,0.', 'batchnorm,fabric02,0,0.9'),
        'fabric02,0,0.99'),
    'a difference': (rewrite('tables/table6*.md', 'largest | -', 'largest | +'), 'largest | +'),
    'a difference shown in a notebook': (
        rewrite('notebooks/table6*.ipynb', 'BGR | +0', 'BGR | +7'),
        'BGR | +7'),
    'the commit of a caption': (rewrite('tables/table6*.md', '**Code**: ', '**Code**: 0'), '**Code**: 0'),
    'a missing side': (lambda f: a_side(f).unlink(), 'prototype: cse on wood'),
}


def test_a_notebook_may_show_more_than_its_table(tmp_path):
    "What stands below the table, such as the comparison with the reference, is none of the audit's business."
    folder = copy_table(4, tmp_path)
    notebook = next((folder / 'notebooks').glob('*.ipynb'))
    book = json.loads(notebook.read_text())
    data = {'text/markdown': ['| method | ours | reference |\n', '|---|---|---|\n', '| CSE | 91.1 | 90.9 |']}
    output = dict(output_type='display_data', data=data, metadata={})
    book['cells'].append(dict(cell_type='code', source=[], outputs=[output]))
    notebook.write_text(json.dumps(book))
    assert audit(folder).ok


@pytest.mark.parametrize('table, records, metrics', [
    (3, 21, 21 * 12 + 8), (4, 24, 24 * 3), (6, 180, 180 * 3)])
def test_results_that_fit_have_no_findings(tmp_path, table, records, metrics):
    report = audit(copy_table(table, tmp_path))
    assert report.ok, report
    assert json.loads(json.dumps(report.to_dict()))['findings'] == []
    assert report.counts['records'] == records
    assert report.counts['metrics recomputed'] == metrics
    assert report.counts['files of tables rebuilt'] == 2


CASES = [
    pytest.param(table, *planted, id=name)
    for table, some in ((4, PLANTED), (3, PLANTED_TIMINGS))
    for name, planted in some.items()]


@pytest.mark.parametrize('table, plant, words', CASES)
def test_planted_errors_are_found(tmp_path, table, plant, words):
    plant(copy_table(table, tmp_path))
    report = audit(tmp_path)
    assert not report.ok
    assert words in str(report).split('findings; checked')[0], report


def test_errors_planted_into_pairs_are_found(tmp_path):
    "All at once, since a table of 180 records takes its time."
    copy_table(6, tmp_path)
    for plant, _ in PLANTED_PAIRS.values():
        plant(tmp_path)
    findings = str(audit(tmp_path)).split('findings; checked')[0]
    for name, (_, words) in PLANTED_PAIRS.items():
        assert words in findings, name


def test_a_run_is_named_by_what_it_holds():
    for record in load_records(FOLDERS[4]):
        assert check_record(json.dumps(record)) == (record, [])
        assert identity(record) == record['key']


@pytest.mark.parametrize('damage, words', [
    (lambda text: text.replace('"seed": 0', '"seed": 7', 1), 'key'),
    (lambda text: text[:-300], 'JSONDecodeError'),
    (lambda text: text + text.splitlines()[0] + '\n', 'the same run again')])
def test_damage_in_a_file_of_many_records_is_found(tmp_path, damage, words):
    (tmp_path / 'records').mkdir()
    text = ''.join(json.dumps(r) + '\n' for r in load(4).values())
    (tmp_path / 'records/table4.jsonl').write_text(damage(text))
    assert words in str(audit(tmp_path))


def test_a_damaged_archive_is_found(tmp_path):
    packed = next(FOLDERS[4].glob('records/*.gz'))
    (tmp_path / 'records').mkdir()
    (tmp_path / 'records' / packed.name).write_bytes(packed.read_bytes()[:2000])
    assert 'not readable' in str(audit(tmp_path)) or 'JSONDecodeError' in str(audit(tmp_path))


def test_weights_from_a_file_are_identified_by_their_hash():
    "A record holds the name of such a file, the key its hash."
    record = json.loads(json.dumps(next(r for r in load(4).values() if r['method'] == 'cse')))
    record['config']['weights'], before = 'net.pth', identity(record)
    record['extractor'] |= dict(weights='file', tag='net.pth', sha256='ab' * 32)
    assert identity(record) != before
    one = identity(record)
    record['extractor']['sha256'] = 'cd' * 32
    assert identity(record) != one


def test_images_of_a_published_data_set_are_found_by_that_name():
    records = list(load(4).values())
    entry = read_asked(FOLDERS[4])[4]
    assert len(table_records(records, 4, entry)) == 24
    assert len(table_records(renamed(records, 'MVTec AD'), 4, entry | dict(data='mvtec_ad'))) == 24
    assert table_records(records, 4, entry | dict(data='elsewhere')) == []
    for changed in (dict(settings={}), dict(textures='others'), dict(seeds=[7]), dict(profile='official')):
        assert table_records(records, 4, entry | changed) == [], changed


def test_pairs_are_in_the_order_of_the_notebook():
    records = list(load(6).values())
    given = stated(6) | dict(rows='prototype', categories='wood,fabric02', seeds='[1, 0]')
    pairs, missing = select_pairs(records, given)
    assert not missing
    for side, prototype in zip(pairs['prototype'], ('centre', 'nearest'), strict=True):
        assert [(r['category'], r['seed']) for r in side] == \
            [('wood', 1), ('wood', 0), ('fabric02', 1), ('fabric02', 0)]
        assert {r['config']['prototype'] for r in side} == {prototype}


def test_incomplete_pairs_are_named():
    records = list(load(6).values())
    lost = ('wood', 'nearest')
    kept = [r for r in records if (r['category'], r['config']['prototype']) != lost]
    pairs, missing = select_pairs(kept, stated(6) | dict(rows='prototype'))
    assert pairs == {}
    assert missing == [f'prototype: cse on wood with seed {seed}' for seed in range(3)]
    assert select_pairs([], stated(6) | dict(rows='prototype')) == ({}, [])


def test_pairs_of_a_published_data_set_are_found_by_that_name():
    records = renamed(list(load(6).values()), 'MVTec AD')
    pairs, _ = select_pairs(records, stated(6) | dict(rows='prototype', data='mvtec_ad'))
    assert [len(side) for side in pairs['prototype']] == [12, 12]


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match='holds no records'):
        audit(tmp_path)


def test_the_reference_fits():
    report = audit(reference_folder())
    assert report.counts['files of tables rebuilt'] >= 26
    assert report.ok, f'\n{report}'
