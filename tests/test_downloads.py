"`cse data` against a server on this machine: whole, resumed, damaged, hostile, and without room."
import errno
import hashlib
import importlib.util
import io
import os
import random
import shlex
import shutil
import subprocess
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cse.cli import app
from cse.data import downloads
from cse.data.downloads import PUBLISHED, PublishedData, fetch, unpack
from cse.data.folders import MVTEC_COUNTS
from cse.data.images import DataError

NOISE = random.Random(0).randbytes(10_000)
FILES = {'images/a.png': NOISE[:5000], 'images/b.png': NOISE[5000:], 'licence.txt': b'free'}


def tar_bytes(files, mode='w:xz', kind=tarfile.REGTYPE):
    "An archive; for a link the value is where it leads."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type = kind if isinstance(content, str) else tarfile.REGTYPE
            if member.isreg(): member.size = len(content)
            else: member.linkname = content
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return out.getvalue()


ARCHIVE = tar_bytes(FILES)


class Handler(BaseHTTPRequestHandler):
    "Does what its server's `plan` says, and notes what was asked and sent."

    def do_GET(self):
        plan, wanted = self.server.plan, self.headers.get('Range')
        self.server.asked.append(wanted)
        content, status = plan.get('content', ARCHIVE), plan.get('status', 200)
        if plan.get('moved') and self.path != plan['moved']:
            self.send_response(302)
            self.send_header('Location', plan['moved'])
            return self.end_headers()
        if status == 'silent':
            return threading.Event().wait(1)
        start = int(wanted[6:-1]) if wanted and plan.get('ranges', True) else 0
        if start >= len(content): start, status = 0, 416
        if start and status == 200: status = 206
        self.send_response(status)
        self.send_header('Content-Type', plan.get('type', 'application/x-xz'))
        if plan.get('length', True): self.send_header('Content-Length', len(content) - start)
        if status == 206:
            whole = f'bytes {start}-{len(content) - 1}/{len(content)}'
            self.send_header('Content-Range', plan.get('range', whole))
        self.end_headers()
        part = content[start:plan.get('stop')]
        self.server.sent += len(part)
        self.wfile.write(part)

    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def running():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    "The server, with a plan of its own for every test, and a data set that lies there."
    monkeypatch.setenv('no_proxy', '*')
    running.plan, running.asked, running.sent = {}, [], 0

    def check(folder):
        if len(list(folder.glob('images/*.png'))) != 2: raise DataError(f'{folder}: lacks images')

    running.data = PublishedData(
        'Stand-in', 'CC0', 'https://example.org/page', len(ARCHIVE), 'standin', 'DTD', check,
        url=f'http://127.0.0.1:{running.server_port}/standin.tar.xz',
        sha256=hashlib.sha256(ARCHIVE).hexdigest(), part='images')
    monkeypatch.setitem(PUBLISHED, 'dtd', running.data)
    return running


def cse_data(*words, status=0):
    "Standard output and standard error of `cse data`; an error is one sentence."
    done = CliRunner().invoke(app, ['data', *map(str, words)])
    assert done.exit_code == status, (done.output, done.exception)
    lines = done.stderr.strip().splitlines()
    if status: assert lines[-1].startswith('error: ') and 'Traceback' not in done.stderr
    return done.stdout.strip(), lines


def holds_all(folder):
    return {name: (folder / name).read_bytes() for name in FILES} == FILES


def test_one_command_from_nothing_to_the_next_command(server, tmp_path):
    out, lines = cse_data('dtd', '--to', tmp_path / 'new/data')
    folder = tmp_path / 'new/data/standin'
    assert out == f'make tables PROFILE=paper DTD={folder}/images'
    assert holds_all(folder) and sorted(folder.parent.iterdir()) == [folder]
    assert lines[0] == 'note: Stand-in: CC0; 10.3kB, from https://example.org/page'
    assert 'Stand-in: 100%' in '\n'.join(lines)  # the bar comes after licence and size
    missing = [line for line in lines if 'is missing' in line]
    assert len(missing) == 2 and f'cse data mvtec --to {tmp_path}/new/data' in missing[0]
    assert server.asked == [None]


def test_what_is_complete_is_not_fetched_again(server, tmp_path):
    first = fetch('dtd', tmp_path, progress=False, tell=str)
    out, lines = cse_data('dtd', '--to', tmp_path, '-q')
    assert out.endswith(f'DTD={first}') and 'is complete' in lines[1] and len(server.asked) == 1
    assert cse_data('dtd', '--from', first.parent, '-q')[0].endswith(f'DTD={first}')
    (first / 'a.png').unlink()
    _, lines = cse_data('dtd', '--to', tmp_path, status=2)
    assert lines[-1] == f'error: {first.parent}: not Stand-in as it was published (lacks images)'
    assert len(server.asked) == 1 and (first / 'b.png').exists()


def test_a_broken_download_is_resumed_and_no_byte_is_sent_twice(server, tmp_path):
    half = server.plan['stop'] = len(ARCHIVE) // 2
    _, lines = cse_data('dtd', '--to', tmp_path, status=2)
    assert f'the connection ended at byte {half} of {len(ARCHIVE)}' in lines[-1]
    assert (tmp_path / 'standin.part').read_bytes() == ARCHIVE[:half]
    assert os.listdir(tmp_path) == ['standin.part']
    server.plan = {}
    cse_data('dtd', '--to', tmp_path)
    assert server.asked == [None, f'bytes={half}-'] and server.sent == len(ARCHIVE)
    assert holds_all(tmp_path / 'standin') and os.listdir(tmp_path) == ['standin']


def test_a_download_that_has_moved_is_resumed(server, tmp_path):
    (tmp_path / 'standin.part').write_bytes(ARCHIVE[:3000])
    server.plan['moved'] = '/elsewhere.tar.xz'
    cse_data('dtd', '--to', tmp_path)
    assert server.asked == ['bytes=3000-'] * 2 and server.sent == len(ARCHIVE) - 3000
    assert holds_all(tmp_path / 'standin')


def test_a_download_of_unknown_length_is_resumed(server, tmp_path):
    server.plan = dict(stop=100, length=False)
    cse_data('dtd', '--to', tmp_path, status=2)
    server.plan = dict(length=False)
    cse_data('dtd', '--to', tmp_path)
    assert server.sent == len(ARCHIVE) and holds_all(tmp_path / 'standin')


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    (tmp_path / 'standin.part').write_bytes(ARCHIVE[:3000])
    server.plan['ranges'] = False
    _, lines = cse_data('dtd', '--to', tmp_path)
    assert 'note: the server cannot resume; all is fetched again' in lines
    assert server.asked == ['bytes=3000-'] and holds_all(tmp_path / 'standin')


def test_an_archive_that_has_arrived_is_only_unpacked(server, tmp_path):
    (tmp_path / 'standin.part').write_bytes(ARCHIVE)
    left = tmp_path / '.standin.part'  # of a run that was killed
    left.mkdir()
    (left / 'c.png').touch()
    cse_data('dtd', '--to', tmp_path)
    assert server.asked == [] and holds_all(tmp_path / 'standin')
    assert os.listdir(tmp_path) == ['standin'] and len(os.listdir(tmp_path / 'standin/images')) == 2


def test_a_damaged_archive_is_removed(server, tmp_path):
    server.plan['content'] = ARCHIVE[:-1] + b'?'
    _, lines = cse_data('dtd', '--to', tmp_path, status=2)
    assert 'has the SHA-256' in lines[-1] and lines[-1].endswith('the file was removed, try again')
    assert os.listdir(tmp_path) == []
    (tmp_path / 'standin.part').write_bytes(ARCHIVE + b'more')
    assert 'SHA-256' in cse_data('dtd', '--to', tmp_path, status=2)[1][-1]
    server.plan = {}
    cse_data('dtd', '--to', tmp_path)


@pytest.mark.parametrize('plan, words', [
    (dict(status=404), 'HTTP 404 Not Found'),
    (dict(status=503), 'HTTP 503 Service Unavailable'),
    (dict(status='silent'), 'no connection (timed out)'),
    (dict(content=b'<html>moved</html>'), 'holds 18 bytes where'),
    (dict(content=bytes(18), length=False, ranges=False, type='text/html; charset=utf-8'), 'sent a web page'),
    (dict(content=ARCHIVE[:50]), 'holds 50 bytes where'),  # 416 is asked again without a range
    (dict(range='bytes 7-8/*'), "sent the range 'bytes 7-8/*'"),
    (dict(range=f'bytes 200-300/{len(ARCHIVE)}'), 'began at byte 200'),
])
def test_what_a_server_can_do_wrong(server, tmp_path, monkeypatch, plan, words):
    monkeypatch.setattr(downloads, '_TIMEOUT', .1)
    part = tmp_path / 'standin.part'
    part.write_bytes(ARCHIVE[:100])
    server.plan = plan
    _, lines = cse_data('dtd', '--to', tmp_path, '-q', status=2)
    assert words in lines[-1] and 'https://example.org/page' in lines[-1] and '--from' in lines[-1]
    assert part.read_bytes() == ARCHIVE[:100]


@pytest.mark.parametrize('address, words', [
    ('http://127.0.0.1:9', 'Connection refused'), ('http://nowhere.invalid', 'no connection')])
def test_no_network(server, tmp_path, monkeypatch, address, words):
    monkeypatch.setitem(PUBLISHED, 'dtd', replace(server.data, url=address))
    assert words in cse_data('dtd', '--to', tmp_path, status=2)[1][-1]


def write_zip(path, name, link=False):
    with zipfile.ZipFile(path, 'w') as out:
        info = zipfile.ZipInfo(name)
        if link: info.external_attr = 0o120777 << 16
        out.writestr(info, '/etc/passwd')


@pytest.mark.parametrize('files, kind', [
    ({'../evil': b'x'}, None), ({'images/../../evil': b'x'}, None), ({'/evil': b'x'}, None),
    ({'images': '..', 'images/evil': b'x'}, tarfile.SYMTYPE),
    ({'evil': '/etc/passwd'}, tarfile.SYMTYPE), ({'evil': '../evil'}, tarfile.LNKTYPE),
    ({'inside': 'images/a.png'}, tarfile.SYMTYPE),
    ({'evil': ''}, tarfile.FIFOTYPE), ({'evil': ''}, tarfile.CHRTYPE),
    ('../evil', False), ('/evil', False), ('images/evil', True),
])
def test_no_path_leaves_the_folder(server, tmp_path, files, kind):
    archive = tmp_path / 'bad'
    if isinstance(files, dict): archive.write_bytes(tar_bytes(FILES | files, 'w:gz', kind))
    else: write_zip(archive, files, link=kind)
    with pytest.raises(DataError, match='refused, .* (leads out of the folder|is a link or a device)'):
        unpack(archive, tmp_path / 'to/folder', progress=False)
    assert not [p for p in tmp_path.rglob('*') if p.name == 'evil' or p.is_symlink()]
    server.data = replace(server.data, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    PUBLISHED['dtd'] = server.data
    assert 'refused' in cse_data('dtd', '--to', tmp_path / 'data', '--from', archive, status=2)[1][-1]
    assert os.listdir(tmp_path / 'data') == [] and archive.exists()


def test_an_archive_at_hand(server, tmp_path):
    archive = tmp_path / 'by hand (1).tar.xz'
    archive.write_bytes(ARCHIVE)
    cse_data('dtd', '--to', tmp_path / 'data', '--from', archive)
    assert holds_all(tmp_path / 'data/standin') and archive.exists() and server.asked == []
    archive.write_bytes(ARCHIVE[:-9])
    _, lines = cse_data('dtd', '--to', tmp_path / 'other', '--from', archive, status=2)
    assert f'{archive}: has the SHA-256' in lines[-1] and 'removed' not in lines[-1]
    assert archive.exists()
    assert 'not found' in cse_data('dtd', '--from', tmp_path / 'none.zip', status=2)[1][-1]


@pytest.mark.parametrize('content', [
    b'', b'no archive', ARCHIVE[:-500], b'PK\x05\x06' + bytes(18), tar_bytes(FILES, 'w')[:700]])
def test_archives_that_are_damaged_or_hold_something_else(server, tmp_path, content):
    PUBLISHED['dtd'] = replace(server.data, sha256='')  # nothing is known about it
    archive = tmp_path / 'archive'
    archive.write_bytes(content)
    _, lines = cse_data('dtd', '--to', tmp_path / 'data', '--from', archive, status=2)
    assert f'{archive}: ' in lines[-1] and ('damaged' in lines[-1] or 'not Stand-in' in lines[-1])
    assert os.listdir(tmp_path / 'data') == []


def test_a_folder_around_everything_is_taken_off(server, tmp_path):
    PUBLISHED['dtd'] = replace(server.data, sha256='')
    archive = tmp_path / 'a.zip'
    with zipfile.ZipFile(archive, 'w') as out:
        for name, content in FILES.items(): out.writestr(f'release/{name}', content)
    fetch('dtd', tmp_path, archive, progress=False, tell=str)
    assert holds_all(tmp_path / 'standin')


def test_a_disk_that_is_full(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, 'disk_usage', lambda folder: usage)
        _, lines = cse_data('dtd', '--to', tmp_path, status=2)
    assert 'the disk has 10.0kB free; expected 20.6kB' in lines[-1] and server.asked == []

    def full(self, *args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(downloads, '_unpack_tar', full)
        _, lines = cse_data('dtd', '--to', tmp_path, status=2)
    assert lines[-1].endswith('cannot be written (No space left on device)')
    (tmp_path / 'standin.part').unlink()
    (tmp_path / 'standin.part').symlink_to('/dev/full')
    _, lines = cse_data('dtd', '--to', tmp_path, status=2)
    assert lines[-1].endswith('standin.part: cannot be written (No space left on device)')


def test_folders_that_take_no_files_and_paths_that_make_cannot_take(server, tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', '/proc/data'):
        assert 'no file can be written there' in cse_data('dtd', '--to', folder, status=2)[1][-1]
    for folder in ('my data', "don't", 'a$b', 'a;b', '#a'):
        assert '`make` cannot take' in cse_data('dtd', '--to', tmp_path / folder, status=2)[1][-1]
    assert server.asked == [] and os.listdir(tmp_path) == ['file']
    assert 'expected one of mvtec, tilda, dtd' in cse_data('mvtech', status=2)[1][-1]
    assert CliRunner().invoke(app, ['data', 'dtd', '--to', '']).exit_code == 2


def test_interrupted_while_it_unpacks(server, tmp_path, monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(downloads, '_check', interrupted)
        assert 'the same command goes on' in cse_data('dtd', '--to', tmp_path, status=130)[1][-1]
    assert os.listdir(tmp_path) == ['standin.part']
    cse_data('dtd', '--to', tmp_path)
    assert len(server.asked) == 1 and holds_all(tmp_path / 'standin')


# --- the three data sets

def touch(folder, count, name='{:03}.png'):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1): (folder / name.format(i)).touch()


def test_mvtec_is_complete_with_five_surfaces(tmp_path):
    for name, (train, good, bad) in MVTEC_COUNTS.items():
        touch(tmp_path / 'mvtec_ad' / name / 'train/good', train)
        touch(tmp_path / 'mvtec_ad' / name / 'test/good', good)
        touch(tmp_path / 'mvtec_ad' / name / 'test/cut', bad)
    out, _ = cse_data('mvtec', '--to', tmp_path)
    assert out == f"make tables PROFILE=paper MVTEC={tmp_path}/mvtec_ad TABLES='1 3 4 5'"
    (tmp_path / 'mvtec_ad/wood/train/good/001.png').unlink()
    assert 'wood: 246 training' in cse_data('mvtec', '--to', tmp_path, status=2)[1][-1]
    shutil.rmtree(tmp_path / 'mvtec_ad/tile')
    assert 'lacks tile' in cse_data('mvtec', '--to', tmp_path, status=2)[1][-1]


def test_tilda_is_checked_and_not_downloaded(tmp_path):
    _, lines = cse_data('tilda', '--to', tmp_path / 'data', status=2)
    assert 'uni-freiburg.de' in lines[0] and 'give its archive or folder with --from' in lines[-1]
    archive = tmp_path / 'tilda.zip'
    fabrics = 'C1R1', 'C1R3', 'C2R2', 'C2R3', 'C3R1', 'C3R3', 'C4R1', 'C4R3'
    names = [f'{f[:2]}/{f[2:]}/E{e}/{f}E{e}N{n}.TIF' for f in fabrics for e in range(8) for n in range(1, 51)]
    with zipfile.ZipFile(archive, 'w') as out:
        for name in names: out.writestr(name, '')
    out, _ = cse_data('tilda', '--to', tmp_path / 'data', '--from', archive)
    folder = tmp_path / 'data/tilda'
    assert out == f'make tables PROFILE=paper TILDA={folder} TABLES=2'
    (folder / names[0]).unlink()
    assert f'lacks 1 of 400 frames ({Path(names[0]).name.lower()})' in cse_data(
        'tilda', '--from', folder, status=2)[1][-1]


def test_dtd_is_complete_with_5640_images(tmp_path):
    for i in range(47): touch(tmp_path / f'dtd/images/kind{i}', 120, f'kind{i}_{{:04}}.jpg')
    assert cse_data('dtd', '--to', tmp_path)[0] == f'make tables PROFILE=paper DTD={tmp_path}/dtd/images'
    (tmp_path / 'dtd/images/kind3/kind3_0007.jpg').unlink()
    assert 'holds 5639 images' in cse_data('dtd', '--to', tmp_path, status=2)[1][-1]


@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
def test_make_takes_the_line_as_it_is(tmp_path):
    for data in PUBLISHED.values(): (tmp_path / data.folder / data.part).mkdir(parents=True)
    line = downloads.tables_command(tmp_path, tell=pytest.fail)
    command = [*shlex.split(line), '--dry-run', '--no-print-directory']
    root = Path(__file__).parent.parent
    plan = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for path in ('mvtec_ad', 'tilda', 'dtd/images'): assert f"'{tmp_path}/{path}'" in plan
    assert "--profile 'paper'" in plan


@pytest.mark.parametrize('name, package, file', [
    ('mvtec', 'anomalib', 'data/datamodules/image/mvtecad.py'),
    ('dtd', 'anomalib', 'models/image/draem/lightning_model.py'),
    ('dtd', 'torchvision', 'datasets/dtd.py')])
def test_addresses_and_hashes_are_those_of_the_libraries(name, package, file):
    "Read as text, because anomalib takes seconds to import."
    found = importlib.util.find_spec(package)
    if not found: pytest.skip(f'{package} is not installed')
    text = (Path(found.origin).parent / file).read_text().replace('"\n    "', '')
    assert PUBLISHED[name].url in text
    assert package == 'torchvision' or PUBLISHED[name].sha256 in text
