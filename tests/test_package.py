"The package: source archive, wheel from the archive, installation of the wheel, and the command in use."
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BESIDE = 'LICENSE', 'MANIFEST.in', 'README.md', 'settings.ini', 'setup.py'
INI = ConfigParser(delimiters=['='])
INI.read(ROOT / 'settings.ini')
SETTINGS = INI['DEFAULT']
NAME = f"{SETTINGS['lib_name']}-{SETTINGS['version']}"


def build(kind, folder, target):
    "A source archive or a wheel, made by setuptools in the folder of the source, as `python -m build` does."
    code = f'from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})'
    subprocess.run([sys.executable, '-c', code], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A folder with the source archive, and the wheel that was made from it."
    folder = tmp_path_factory.mktemp('package')
    source, out = folder / 'checkout', folder / 'out'
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    shutil.copytree(ROOT / 'cse', source / 'cse', ignore=ignore)
    for name in BESIDE:
        shutil.copy(ROOT / name, source)
    for part in ('tests/test_house.py', 'tests/conftest.py', 'nbs/11_cli.ipynb', 'params/smoke.yml',
                 'results/runs/x.json', 'cse/lab/notes.txt', 'cse/out.npy', 'build/lib/cse/old.py'):
        (source / part).parent.mkdir(parents=True, exist_ok=True)  # what a checkout holds besides
        (source / part).write_text('{}')
    build('sdist', source, out)
    with tarfile.open(out / f'{NAME}.tar.gz') as archive:
        archive.extractall(folder, filter='data')
    build('wheel', folder / NAME, out)
    return out


def library():
    "The files of the library: modules, templates of pages, the marker of types."
    found = (p for p in (ROOT / 'cse').rglob('*') if p.suffix in ('.py', '.html', '.typed'))
    return {p.relative_to(ROOT).as_posix() for p in found if '.ipynb_checkpoints' not in p.parts}


def test_the_source_archive_holds_what_it_is_built_from(built):
    with tarfile.open(built / f'{NAME}.tar.gz') as archive:
        files = {m.name.removeprefix(f'{NAME}/') for m in archive.getmembers() if m.isfile()}
    made = {f for f in files if f.startswith('cse.egg-info/')} | {'PKG-INFO', 'setup.cfg'}
    assert {'cse/py.typed', 'cse/lab/report_page.html', 'cse/cli.py'} < library()
    assert files - made == library() | set(BESIDE)


def test_the_wheel_holds_the_library_and_nothing_else(built):
    wheel = zipfile.ZipFile(next(built.glob('*.whl')))
    about = f'{NAME}.dist-info/'
    files = set(wheel.namelist())
    assert {f for f in files if not f.startswith(about)} == library()
    assert {f.removeprefix(about) for f in files - library()} == {
        'METADATA', 'WHEEL', 'RECORD', 'entry_points.txt', 'top_level.txt', 'licenses/LICENSE'}
    for name in library():
        assert wheel.read(name) == (ROOT / name).read_bytes()
    assert 'cse = cse.cli:app' in wheel.read(f'{about}entry_points.txt').decode()


def test_the_wheel_asks_for_the_minimal_requirements(built):
    wheel = zipfile.ZipFile(next(built.glob('*.whl')))
    found = Parser().parsestr(wheel.read(f'{NAME}.dist-info/METADATA').decode())
    needs = [need for need in found.get_all('Requires-Dist') if 'extra ==' not in need]
    assert sorted(needs) == sorted(shlex.split(SETTINGS['requirements']))
    extras = {name.removesuffix('_requirements') for name in SETTINGS if name.endswith('_requirements')}
    assert set(found.get_all('Provides-Extra')) == extras
    assert found['Requires-Python'] == f">={SETTINGS['min_python']}"
    assert found.get_payload().startswith('# cse')


@pytest.fixture(scope='module')
def installed(built):
    """A fresh virtual environment with the wheel.

    The requirements come from the environment of the tests. Its editable installation does not count,
    because files that end in .pth are read in the environment's own folder only."""
    folder = built.parent / 'venv'
    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path('purelib', vars=dict(base=str(folder))))
    (own / 'requirements.pth').write_text(sysconfig.get_path('purelib') + '\n')
    pip = [sys.executable, '-m', 'pip', '--python', folder / 'bin/python', 'install', '--quiet']
    subprocess.run([*pip, '--no-deps', '--no-index', '--no-compile', next(built.glob('*.whl'))], check=True)
    return folder


ODD = '日本'.encode() + b'\xf6.png'  # no text in any locale
USE = f'NAME = {ODD!r}' + '''
import os, sys
from pathlib import Path
import cse.cli, cse.lab.machine
from cse.data.builtin import write_surfaces
assert Path(cse.__file__).is_relative_to(sys.prefix), cse.__file__
root = write_surfaces('data', ['wood'], train=10, good=4, defective=4) / 'wood'
next((root / 'test/good').iterdir()).rename(root / 'test/good' / os.fsdecode(NAME))
assert cse.lab.machine.source_hash()
small = ['--set', 'epochs=1', '--set', 'resize=64', '--set', 'crop=64', '--held-out', '0.4']
for words in (['fit', f'{root}/train/good', '-o', 'wood.cse', *small],
              ['score', 'wood.cse', *map(str, (root / 'test').iterdir()), '--alpha', '0.3',
               '--html', 'report.html']):
    cse.cli.app([*words, '-q'], standalone_mode=False)
'''


def test_the_wheel_is_fitted_and_scores(installed, tmp_path):
    "In the locale C, where a file name is bytes: they are printed as they are."
    environment = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    environment |= dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')

    def call(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)

    version = call(installed / 'bin/cse', '--version')
    assert (version.stdout.decode(), version.returncode) == (f"cse {SETTINGS['version']}\n", 0)
    done = call(installed / 'bin/python', '-c', USE)
    assert done.returncode == 0, done.stderr.decode()
    about, found, rest = done.stdout.partition(b'saved in wood.cse')
    _, head, *lines, meaning, summary = rest.splitlines()
    assert found and about.startswith(b'fitted on 6 images, threshold from 4 others')
    assert head.split() == [b'verdict', b'relative', b'score', b'p-value', b'image'] and len(lines) == 8
    assert sum(line.endswith(b' data/wood/test/good/' + ODD) for line in lines) == 1
    assert all(line.startswith((b'good ', b'defective ')) for line in lines)
    assert (tmp_path / 'report.html').stat().st_size > 50_000
    assert meaning.startswith(b'relative score: ') and b' of 8 flagged ' in summary
