"The notebooks are the single source: clean, in step with cse/ and README.md, importing one way."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
BIN = Path(sys.executable).parent


def cells(path):
    return json.loads(path.read_text())['cells']


def source(cell):
    return ''.join(cell['source'])


def files(folder, *endings):
    found = [p for p in folder.rglob('*') if p.suffix in endings and '.ipynb_checkpoints' not in p.parts]
    return {p.relative_to(folder): p.read_bytes() for p in found}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    "A copy of the project after nbdev_clean and nbdev_export."
    copy = tmp_path_factory.mktemp('copy')
    for name in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.last_checked')
    for name in ('nbs', 'cse'):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for command in ('nbdev_clean', 'nbdev_export'):
        subprocess.run([BIN / command], cwd=copy, check=True, capture_output=True)
    return copy


@pytest.mark.parametrize('folder, ending', [('nbs', '.ipynb'), ('cse', '.py')])
def test_nothing_changes_when_cleaned_and_exported(prepared, folder, ending):
    mine, fresh = files(ROOT / folder, ending), files(prepared / folder, ending)
    assert len(mine) > 10
    assert mine.keys() == fresh.keys()
    assert [str(p) for p in mine if mine[p] != fresh[p]] == [], 'out of step; run `make prepare`'


@pytest.mark.parametrize('path', sorted((ROOT / 'nbs/tables').glob('*.ipynb')), ids=lambda p: p.stem)
def test_table_notebooks_have_one_cell_of_parameters(path):
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    assert all(isinstance(node, ast.Assign) for node in ast.parse(source(tagged[0])).body)
    assert not any('#| export' in source(c) for c in cells(path)), 'a table notebook exports nothing'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_begin_with_a_title_and_a_sentence(path):
    first = source(cells(path)[0])
    assert re.match(r'# .+\n\n> .+', first), f'{path.name}: expected "# title" and "> one sentence"'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_imports_stand_alone(path):
    "nbdev executes a cell that mixes imports with other code while it builds documentation."
    for cell in cells(path):
        if cell['cell_type'] != 'code' or re.search(r'#\|\s*(hide|exporti?)\b', source(cell)):
            continue
        body = ast.parse(re.sub(r'^%.*$', '', source(cell), flags=re.M)).body
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        assert all(imports) or not any(imports), source(cell)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_hold_no_machine_paths_and_no_errors(path):
    for cell in cells(path):
        outputs = json.dumps(cell.get('outputs', []))
        assert '"output_type": "error"' not in outputs
        found = re.search(r'(?<![\w.])/(home|root|Users|work|tmp|opt)/|site-packages', outputs)
        assert not found, f'{path.name}: an output holds {outputs[found.start():found.start() + 60]}'


# who may import whom: a module imports what stands before it, and in its own wing what has a lower number
ORDER = ['config', 'data', 'model', 'losses', 'defects', 'extractor', 'scoring', 'training', 'metrics',
         'fast', 'detector', 'classifier', 'extensions', 'deploy', 'baselines', 'lab', 'cli']
FOREIGN = 'nbdev', 'fastcore', 'execnb', 'ghapi', 'papermill', 'jupyter'


def modules():
    "Module → place in the order of imports."
    found = {}
    for path in NOTEBOOKS:
        if name := re.search(r'#\| default_exp (\S+)', '\n'.join(map(source, cells(path)))):
            found[name[1]] = ORDER.index(name[1].split('.')[0]), int(path.stem.split('_')[0])
    return found


def imports(module):
    "Names of modules that a module imports anywhere."
    path = ROOT / 'cse' / f'{module.replace(".", "/")}.py'
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ['cse', *module.split('.')][:-node.level] if node.level else []
            yield '.'.join([*above, node.module])


def test_imports_point_one_way():
    places, checked = modules(), 0
    assert {m.split('.')[0] for m in places} == set(ORDER)
    for module, place in places.items():
        for name in imports(module):
            assert name.split('.')[0] not in FOREIGN, f'{module} imports {name}'
            if name.startswith('cse.'):
                checked += 1
                assert places[name.removeprefix('cse.')] < place, f'{module} imports {name}'
    assert checked > 100


def code_lines(node, text):
    "Lines of a definition, without blank ones."
    return sum(bool(line.strip()) for line in text[node.lineno - 1:node.end_lineno])


@pytest.mark.parametrize('module', modules())
def test_definitions_are_short(module):
    text = (ROOT / 'cse' / f'{module.replace(".", "/")}.py').read_text().splitlines()
    for node in ast.parse('\n'.join(text)).body:
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node, text) <= 35, f'{module}.{node.name} is long'
        if isinstance(node, ast.ClassDef):
            assert code_lines(node, text) <= 130, f'{module}.{node.name} is long'
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    assert code_lines(part, text) <= 35, f'{module}.{node.name}.{part.name} is long'


def test_the_root_is_small():
    def count(path):
        lines = path.read_text().splitlines()
        return sum(bool(line.strip()) and not line.startswith('#') for line in lines)
    generated = '__init__.py', '_modidx.py'
    counts = {p.name: count(p) for p in (ROOT / 'cse').glob('*.py') if p.name not in generated}
    assert max(counts.values()) <= 300 and sum(counts.values()) <= 2000 and len(counts) <= 12, counts


def test_import_is_light():
    "`import cse` costs nothing, detectors cost torch; what takes more seconds is loaded when needed."
    code = ('import sys, cse; print(*sys.modules); from cse import CSE; import cse.deploy.saving; '
            'from torch.nn import Linear; from cse.fast.adam import Adam; '
            'adam = Adam(Linear(2, 2).parameters(), fused=True); adam.zero_grad(); adam.step(); '
            'assert "torch._dynamo" not in sys.modules; print(*sys.modules); import cse.lab.runs; '
            'assert "patchcore" in cse.lab.runs.METHODS; print(*sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    first, detectors, then = ({m.split('.')[0] for m in line.split()} for line in done.stdout.splitlines())
    heavy = {'nbdev', 'fastcore', 'execnb', 'IPython', 'ipykernel', 'papermill', 'sklearn', 'pandas',
             'matplotlib', 'seaborn', 'skimage', 'openvino'}
    baselines = {'anomalib', 'lightning', 'geomloss', 'opensimplex'}
    assert 'cse' in first and {'torch', 'timm', 'numpy', 'scipy'} & first == set()
    assert 'torch' in detectors and {'timm', 'torchvision', 'scipy'} & detectors == set()
    assert {'torch', 'timm'} < then and (heavy | baselines) & then == set()
