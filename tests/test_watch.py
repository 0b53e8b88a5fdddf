"Watching a folder: every image once, whatever happens to the process, the disk and the folder."
import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cse.deploy.watch as module
from cse.cli import app
from cse.config import ConfigError
from cse.data.reading import DataError
from cse.deploy.watch import (
    Journal, Outlet, Watcher, link_image, move_image, open_inbox, summary, watch)
from cse.extensions.decisions import Calibration

GOOD, DEFECTIVE = 100, 250
KILLS = int(os.environ.get('ROBUSTNESS_KILLS', 0))


def score(paths, progress=False):
    "Brightness of images, as a detector returns it."
    values = np.full(len(paths), np.nan)
    for i, path in enumerate(paths):
        with suppress(OSError, SyntaxError):
            values[i] = np.asarray(Image.open(path)).mean() / 255
    if np.isnan(values).all():
        count = len(paths)
        raise DataError(f'{count} of {count} images have no score: {paths[0]}: not a readable image')
    return SimpleNamespace(image=values)


DETECTOR = SimpleNamespace(score=score, calibration=Calibration(np.linspace(0.1, 0.6, 40)))


class Line:
    "A watched folder, what was printed, and a restart."
    def __init__(self, folder, **options):
        self.folder, self.printed, self.options = folder, [], options
        self.detector, self.patience, self.existing = DETECTOR, 0, True
        folder.mkdir(exist_ok=True)
        self.start()

    def start(self):
        options = self.options
        inbox = open_inbox(self.folder, options.get('journal'), options.get('flagged'), self.existing)
        outlet = Outlet(inbox.journal, self.emit, options.get('keep'), options.get('flagged'))
        self.watcher = Watcher(self.detector, inbox, outlet, patience=self.patience)

    def emit(self, text):
        if text:
            self.printed.append(json.loads(text))

    def write(self, name, value=GOOD, renamed=False):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name('.new')
        Image.new('L', (8, 8), value).save(hidden, 'bmp')
        if renamed:
            os.utime(hidden, (1e9, 1e9))
        hidden.rename(path)
        if not renamed:
            path.write_bytes(path.read_bytes())  # written in place
        return path

    def look(self, times=2):
        for _ in range(times):
            self.watcher.look()
        return [os.path.relpath(row['path'], self.folder) for row in self.printed]


@pytest.fixture
def line(tmp_path):
    return Line(tmp_path / 'line')


def test_an_image_is_taken_when_it_is_complete(line):
    whole = line.write('a.bmp').read_bytes()
    path = line.folder / 'a.bmp'
    for size in (10, len(whole) // 2, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        os.utime(path, (size, size))
        path.write_bytes(path.read_bytes())  # a rename would count as complete
        assert line.look(1) == [], size
    assert line.look(1) == ['a.bmp'] and line.look() == ['a.bmp']


def test_a_renamed_image_is_taken_at_once(line):
    line.write('sub/a.bmp', renamed=True)
    assert line.look(1) == ['sub/a.bmp']


def test_names_that_are_passed_over(line):
    for name in ('.a.bmp', '~a.bmp', 'a~.bmp', 'a.bmp~', 'a.part.bmp', 'a.bmp.part', 'a.TMP.bmp', 'a.txt',
                 '.hidden/a.bmp', '@eaDir/a.bmp', 'x.tmp/a.bmp', 'IMAGE~1.BMP'):
        line.write(name)
    assert line.look() == ['IMAGE~1.BMP']


def test_links_and_circles(line, tmp_path):
    other = tmp_path / 'other'
    image = Line(other).write('b.bmp')
    (line.folder / 'deep/er').mkdir(parents=True)
    for name, target in (('deep/er/up', line.folder), ('linked', other), ('gone.bmp', other / 'no.bmp')):
        (line.folder / name).symlink_to(target)
    os.mkfifo(line.folder / 'pipe.bmp')
    assert line.look() == [f'linked/{image.name}']


def test_every_image_once_also_after_a_restart(line):
    for i in range(5):
        line.write(f'{i}.bmp')
    assert len(line.look()) == 5
    line.start()
    line.write('new.bmp')
    assert line.look(3)[5:] == ['new.bmp']
    line.write('new.bmp', DEFECTIVE)  # another image under the same name
    assert line.look(3)[6:] == ['new.bmp']
    assert [row['decision'] for row in line.printed[-2:]] == ['good', 'defective']


def test_a_journal_that_was_cut_off(line):
    for i in range(3):
        line.write(f'{i}.bmp')
    line.look()
    journal = line.folder / '.cse-watch.jsonl'
    content = journal.read_bytes()
    for cut in range(len(content) - 1, content.rindex(b'\n', 0, -1), -1):
        journal.write_bytes(content[:cut])
        line.printed.clear()
        line.start()
        assert line.look() in (['2.bmp'], []) and line.look() == line.look()
        assert [json.loads(row)[0] for row in journal.read_bytes().splitlines() if row.endswith(b']')]
        line.start()
        line.printed.clear()
        assert line.look() == []


@pytest.mark.parametrize('before', ['emit', 'keep', 'journal'])
def test_a_crash_loses_no_image_and_prints_one_twice_at_most(tmp_path, monkeypatch, before):
    class Crash(BaseException):
        pass

    flagged = tmp_path / 'flagged'
    line = Line(tmp_path / 'line', keep=move_image, flagged=flagged)
    for i in range(4):
        line.write(f'{i}.bmp', DEFECTIVE)
    outlet, done = line.watcher.outlet, []
    place, name = dict(emit=(outlet, 'emit'), keep=(outlet, 'keep'), journal=(Journal, 'add'))[before]
    original = getattr(place, name)

    def crashes(*arguments):
        done.append(arguments)
        if len(done) == 3:
            raise Crash
        return original(*arguments)

    monkeypatch.setattr(place, name, crashes)
    with pytest.raises(Crash):
        line.look()
    monkeypatch.undo()
    line.start()
    counts = Counter(line.look())
    assert set(counts) == {f'{i}.bmp' for i in range(4)}
    assert sorted(counts.values()) == ([1, 1, 1, 2] if before == 'keep' else [1, 1, 1, 1])
    assert len(list(flagged.iterdir())) == 4 and not list(line.folder.glob('*.bmp'))


def test_an_image_written_while_it_is_scored_is_scored_again(line):
    path = line.write('a.bmp')

    def slow(paths):
        found = score(paths)
        if path.stat().st_mtime != 5:
            line.write('a.bmp', DEFECTIVE)
            os.utime(path, (5, 5))
        return found

    line.watcher.detector = SimpleNamespace(score=slow)
    assert line.look(2) == [] and line.look(2) == ['a.bmp']
    assert line.printed[0]['decision'] == 'defective'


def test_an_unreadable_image_is_reported_once(line, monkeypatch):
    now = [0.]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    line.watcher.patience = 5
    for name in ('broken.bmp', 'late.bmp'):
        (line.folder / name).write_bytes(b'BM')
    line.write('good.bmp')
    assert line.look(3) == ['good.bmp']
    now[0] = 4.9
    line.write('late.bmp')
    (line.folder / 'gone.bmp').write_bytes(b'BM')
    assert set(line.look(2)) == {'good.bmp', 'late.bmp'}
    (line.folder / 'gone.bmp').unlink()
    now[0] = 20
    assert line.look(3)[2:] == ['broken.bmp']
    row = line.printed[2]
    assert row['score'] is row['decision'] is None and 'broken.bmp: not a readable image' in row['error']
    assert line.watcher.outlet.counts == dict(images=2, unreadable=1)
    assert len(line.look(3)) == 3
    line.start()
    assert line.look(3)[3:] == ['broken.bmp'], 'the next start tries again'


def test_images_that_are_there_at_the_start_can_be_passed_over(tmp_path):
    line = Line(tmp_path / 'line')
    line.write('old.bmp')
    line.existing = False
    line.start()
    line.write('new.bmp')
    assert line.look() == ['new.bmp']
    line.existing = True
    line.start()
    assert line.look() == ['new.bmp']


def test_what_waits_lies_in_the_folder(line, monkeypatch):
    monkeypatch.setattr(module, 'AT_ONCE', 20)
    for i in range(50):
        line.write(f'{i:02}.bmp', renamed=True)
    sizes = []
    line.watcher.detector = SimpleNamespace(score=lambda paths: sizes.append(len(paths)) or score(paths))
    assert line.look(1) == [f'{i:02}.bmp' for i in range(20)] and len(line.watcher.inbox.waiting) == 20
    assert line.look(2) == [f'{i:02}.bmp' for i in range(50)], 'oldest first'
    assert sizes == [16, 4, 16, 4, 10]


def test_images_that_have_left_are_forgotten_once_they_are_many(line, monkeypatch):
    monkeypatch.setattr(module, 'SPARE', 10)
    journal = line.watcher.inbox.journal
    for i in range(40):
        path = line.write(f'{i}.bmp', renamed=True)
        assert len(line.look(1)) == i + 1 and len(journal.known) <= 13
        path.unlink()
    assert len(line.printed) == 40


# --- flagged images

def test_flagged_images_are_moved_and_never_overwrite(tmp_path):
    line = Line(tmp_path / 'line', keep=move_image, flagged=tmp_path / 'line/flagged')
    for value in (250, 240, GOOD):
        line.write('sub/a.bmp', value)
        line.look()
    found = {str(p.relative_to(line.folder)) for p in line.folder.rglob('*.bmp')}
    assert found == {'sub/a.bmp', 'flagged/sub/a.bmp', 'flagged/sub/a-1.bmp'}
    assert Image.open(line.folder / 'flagged/sub/a.bmp').getpixel((0, 0)) == 250
    assert line.watcher.outlet.counts == dict(images=3, flagged=2)


def test_flagged_images_are_linked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = Line(Path('line'), keep=link_image, flagged=Path('flagged'))
    Path('flagged').mkdir()
    Path('flagged/a.bmp').write_bytes(b'of another program')
    for value in (250, 240):  # one name, one link
        path = line.write('a.bmp', value)
        line.look()
    other, link = sorted(Path('flagged').iterdir(), reverse=True)
    assert other.read_bytes() == b'of another program'
    assert link.name == 'a-1.bmp' and link.is_symlink() and link.resolve() == path.resolve()
    assert line.watcher.outlet.counts == dict(images=2, flagged=2)


def other_disk(source, target):
    "Files get no second name in the folder of another disk."
    if Path(source).parent != Path(target).parent:
        raise OSError(errno.EXDEV, 'Invalid cross-device link')
    os_link(source, target)


def one_name(*_):
    "Files of some disks have one name only."
    raise OSError(errno.EPERM, 'Operation not permitted')


os_link = os.link


@pytest.mark.parametrize('link', [os_link, other_disk, one_name])
def test_a_move_to_every_kind_of_disk(tmp_path, monkeypatch, link):
    monkeypatch.setattr(os, 'link', link)
    line, far = Line(tmp_path / 'line'), tmp_path / 'far'
    for value, written, name in ((7, 10, 'a.bmp'), (8, 10, 'a-1.bmp'), (8, 20, 'a-2.bmp')):
        source = line.write('a.bmp', value)
        os.utime(source, (5, written))
        target = move_image(source, far / 'a.bmp')
        assert target == far / name and target.stat().st_mtime == written
        assert not source.exists() and Image.open(target).getpixel((0, 0)) == value
    assert len(os.listdir(far)) == 3
    line.write('b.bmp', 9)
    source = line.folder / 'link.bmp'
    source.symlink_to('b.bmp')
    target = move_image(source, far / 'link.bmp')
    assert Image.open(target).getpixel((0, 0)) == 9 and not source.is_symlink()


@pytest.mark.parametrize('move', [move_image, link_image])
def test_a_move_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, move):
    def full(source, target):
        if move is move_image:
            Path(target).write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'link', other_disk)
    monkeypatch.setattr(shutil, 'copyfile', full)
    monkeypatch.setattr(os, 'symlink', full)
    source = Line(tmp_path / 'line').write('a.bmp')
    content = source.read_bytes()
    with pytest.raises(OSError, match='No space'):
        move(source, tmp_path / 'far/a.bmp')
    assert source.read_bytes() == content
    assert os.listdir(tmp_path / 'far') == []
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        move_image(tmp_path / 'no.bmp', tmp_path / 'far/no.bmp')
    assert not (tmp_path / 'far/no.bmp').exists()


def test_a_folder_from_which_nothing_can_be_moved_keeps_its_images(tmp_path, monkeypatch):
    def sealed():
        raise PermissionError(errno.EACCES, 'Permission denied')

    source = Line(tmp_path / 'line').write('a.bmp')
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(type(source), 'unlink', lambda p, **_: sealed() if p == source else os.unlink(p))
        move_image(source, tmp_path / 'far/a.bmp')
    assert source.exists() and os.listdir(tmp_path / 'far') == []


def killed(step, work):
    "Was a forked child killed at its STEPth system call? False if it ended before."
    child = os.fork()
    if not child:
        calls = count(1)

        def die(event, _):
            if event.startswith(('open', 'os.', 'half')) and next(calls) == step:
                os._exit(9)

        try:
            work(lambda: sys.addaudithook(die))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def copy_in_halves(source, target):
    content = Path(source).read_bytes()
    with open(target, 'wb', buffering=0) as file:
        file.write(content[:20])
        sys.audit('half')
        file.write(content[20:])


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('keep, link', [
    (move_image, os_link), (move_image, other_disk), (move_image, one_name), (link_image, os_link)])
def test_a_kill_at_any_step_neither_loses_nor_doubles_an_image(tmp_path, monkeypatch, keep, link):
    monkeypatch.setattr(os, 'link', link)
    monkeypatch.setattr(shutil, 'copyfile', copy_in_halves)
    line = Line(tmp_path / 'line', keep=keep, flagged=tmp_path / 'flagged')
    (tmp_path / 'flagged').mkdir()
    Image.new('L', (8, 8), 1).save(tmp_path / 'flagged/0.bmp')

    def look(armed):
        "The kill comes at a step after the line is printed."
        line.watcher.outlet.emit = lambda text: text and armed()
        line.watcher.look()

    for step in count():
        line.write(f'{step}.bmp', DEFECTIVE, renamed=True)
        was_killed = killed(step + 1, look)
        line.start()
        line.look(1)
        if not was_killed: break
    moved = [f'{i}.bmp' for i in range(1, step + 1)] + ['0.bmp', '0-1.bmp']
    assert step >= 3 and sorted(os.listdir(tmp_path / 'flagged')) == sorted(moved)
    assert {Image.open(tmp_path / 'flagged' / name).getpixel((0, 0)) for name in moved[:-2]} == {DEFECTIVE}
    left = [p.name for p in line.folder.glob('*.bmp')]
    assert left == [] if keep is move_image else len(left) == step + 1


def test_trouble_with_flagged_images_is_told_once(tmp_path, capsys):
    works = []

    def keep(source, target):
        if not works:
            raise OSError(errno.ENOSPC, 'No space left on device')

    line = Line(tmp_path / 'line', keep=keep, flagged=tmp_path / 'flagged')
    for i in range(3):
        line.write(f'{i}.bmp', DEFECTIVE)
    assert len(line.look()) == 3 and line.watcher.outlet.counts['left'] == 3
    works.append(True)
    line.write('4.bmp', DEFECTIVE)
    line.look()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and 'No space left' in told[0] and 'works again' in told[1]
    assert '3 flagged ones not moved or linked' in summary(line.watcher.outlet.counts, 1)


# --- what goes wrong outside

def test_a_folder_that_goes_and_comes_back(line, tmp_path, capsys):
    line.write('a.bmp')
    line.look()
    line.folder.rename(tmp_path / 'away')
    assert line.look(3) == ['a.bmp']
    line.folder.mkdir()  # a share that is not mounted
    assert line.look(2) == ['a.bmp']
    line.folder.rmdir()
    (tmp_path / 'away').rename(line.folder)
    line.write('b.bmp')
    assert line.look(3) == ['a.bmp', 'b.bmp']
    told = capsys.readouterr().err
    assert told.count('waiting for it') == told.count('works again') == 1
    line.folder.rename(tmp_path / 'away')
    line.folder.mkdir()  # between two looks
    assert line.look(3) == ['a.bmp', 'b.bmp']
    assert capsys.readouterr().err.count('is another folder now') == 1


def full_disk(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_under_standard_output(line, capsys):
    buffer, room = [], [False]

    def emit(text):
        if text:
            buffer.append(text)
        if not room[0]:
            full_disk()
        while buffer:
            line.printed.append(json.loads(buffer.pop(0)))

    line.watcher.outlet.emit = emit
    for i in range(20):
        line.write(f'{i:02}.bmp')
    assert line.look(5) == [] and len(buffer) == 1, 'the others wait in the folder'
    room[0] = True
    assert sorted(line.look(3)) == [f'{i:02}.bmp' for i in range(20)]
    assert capsys.readouterr().err.count('\n') == 2
    line.watcher.outlet.emit = lambda text: (_ for _ in ()).throw(BrokenPipeError(errno.EPIPE, 'Broken pipe'))
    line.write('new.bmp')
    with pytest.raises(BrokenPipeError):
        line.look()


def test_a_line_is_printed_whole_or_its_rest_is_kept(monkeypatch):
    written, room = bytearray(), [3, None, 0, 4, 1000, 1000]

    class Full:
        def write(self, data):
            most = room.pop(0)
            if most is None:
                return None  # a pipe that is not read
            if not most:
                full_disk()
            written.extend(data[:most])
            return len(data[:most])

    stdout = SimpleNamespace(flush=lambda: None, buffer=SimpleNamespace(raw=Full()))
    monkeypatch.setattr(sys, 'stdout', stdout)
    emit, failed = module.Printer(), []
    for text in ('first line', '', '', 'second line'):
        try:
            emit(text)
        except OSError as e:
            failed.append(e.errno)
    assert failed == [errno.EAGAIN, errno.ENOSPC] and written == b'first line\nsecond line\n'


def test_a_full_disk_under_the_journal(line, monkeypatch, capsys):
    monkeypatch.setattr(Journal, 'write', full_disk)
    for i in range(3):
        line.write(f'{i}.bmp')
    assert len(line.look()) == 3
    monkeypatch.undo()
    line.write('4.bmp')
    line.look()
    assert capsys.readouterr().err.count('\n') == 2
    line.start()
    assert len(line.look()) == 4


def test_a_line_of_the_journal_that_found_half_its_room(tmp_path, monkeypatch):
    journal, image = Journal(tmp_path / 'j'), module.Arrival('a.bmp', 3, 5, 5)

    class Half:
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def write(self, data): return journal.path.write_bytes(data[:5])

    monkeypatch.setattr(module, 'open', lambda *a, **k: Half(), raising=False)
    with pytest.raises(OSError, match='No space'):
        journal.add(image)
    monkeypatch.undo()
    journal.write()
    again = Journal(journal.path)
    again.load()
    assert image in again and len(again.known) == 1


def test_a_subfolder_that_cannot_be_read_is_told(line, monkeypatch, capsys):
    line.write('a.bmp')
    (line.folder / 'closed').mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith('closed'):
            raise PermissionError(errno.EACCES, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', closed)
    assert line.look(3) == ['a.bmp']
    assert capsys.readouterr().err.count('closed: cannot be read (Permission denied)') == 1


def test_places_that_cannot_be_used(tmp_path):
    folder = tmp_path / 'line'
    folder.mkdir()
    (tmp_path / 'file').write_text('not a folder')
    (tmp_path / 'table.csv').write_text('path,score\na,1\nb,2\n')
    cases = [(tmp_path / 'no', None, None, DataError, 'no such folder'),
             (folder, tmp_path / 'file/j', None, ConfigError, 'with --journal'),
             (folder, folder, None, ConfigError, 'with --journal'),
             (folder, tmp_path / 'table.csv', None, ConfigError, 'is not a journal'),
             (folder, None, tmp_path / 'file/x', ConfigError, 'no file can be written'),
             (folder, None, folder, ConfigError, 'contains the watched folder'),
             (folder, None, tmp_path, ConfigError, 'contains the watched folder')]
    for place, journal, flagged, error, words in cases:
        with pytest.raises(error, match=words):
            open_inbox(place, journal, flagged)
    assert (tmp_path / 'table.csv').read_text().startswith('path,score')


# --- the loop and the command

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_watch_after_the_batch(line, number, monkeypatch, capsys):
    for i in range(40):
        line.write(f'{i}.bmp', renamed=True)
    handler = signal.getsignal(number)

    def emit(text):
        line.emit(text)
        if len(line.printed) == 3:
            os.kill(os.getpid(), number)

    line.watcher.outlet.emit = emit
    assert watch(line.watcher, every=0.01)['images'] == len(line.printed) == 16
    assert '16 images scored, 0 flagged' in capsys.readouterr().err
    assert signal.getsignal(number) is handler
    monkeypatch.setattr(module, 'AT_ONCE', 10)
    line.start()
    assert watch(line.watcher, every=0.01, once=True)['images'] == 24


def test_once_leaves_what_arrives_later(line):
    line.write('a.bmp')

    def emit(text):
        line.emit(text)
        line.write(f'{len(line.printed)}.bmp')

    line.watcher.outlet.emit = emit
    assert watch(line.watcher, every=0.01, once=True)['images'] == 1


@pytest.fixture
def run(monkeypatch):
    detector = SimpleNamespace(**vars(DETECTOR))
    monkeypatch.setattr('cse.deploy.commands._open', lambda *_: detector)

    def run(*words, status=0):
        done = CliRunner().invoke(app, ['watch', 'wood.cse', *map(str, words)])
        assert done.exit_code == status, done.output
        return done

    run.detector = detector
    return run


def test_the_command(line, tmp_path, run):
    line.write('good.bmp')
    bad = line.write('bad.bmp', DEFECTIVE)
    (line.folder / 'broken.bmp').write_bytes(b'BM')
    mode = stat.S_IMODE(bad.stat().st_mode)
    options = '--once', '--every', 0.01, '--patience', 0, '--move', tmp_path / 'flagged'
    done = run(line.folder, *options, status=1)
    rows = {Path(row['path']).name: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == {'good.bmp', 'bad.bmp', 'broken.bmp'}
    assert list(rows['bad.bmp']) == ['time', 'path', 'score', 'relative_score', 'p_value', 'decision']
    assert rows['bad.bmp']['relative_score'] > 1 > rows['good.bmp']['relative_score']
    assert rows['bad.bmp']['time'][-6] in '+-' and 'error' in rows['broken.bmp']
    assert not bad.exists() and stat.S_IMODE((tmp_path / 'flagged/bad.bmp').stat().st_mode) == mode
    assert '2 images scored, 1 flagged, 1 unreadable' in done.stderr
    done = run(line.folder, *options, status=1)
    assert json.loads(done.stdout)['path'] == str(line.folder / 'broken.bmp'), 'tried again'
    assert '1 images could not be read' in done.stderr and '1 images are done already' in done.stderr
    (line.folder / 'broken.bmp').unlink()
    done = run(line.folder, *options)
    assert done.stdout == '' and '1 images are done already' in done.stderr
    run.detector.calibration = None
    line.write('new.bmp')
    row = json.loads(run(line.folder, *options[:3]).stdout)
    assert row['score'] and row['decision'] is row['relative_score'] is None


@pytest.mark.parametrize('words, message', [
    (['--alpha', 0.001], 'cannot promise'), (['--alpha', 2], 'between 0 and 1'),
    (['--move', 'm', '--link', 'l'], 'expected one of them')])
def test_what_the_command_refuses(line, run, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in run(line.folder, '--once', *words, status=2).stderr
    run.detector.calibration = None
    assert 'not calibrated' in run(line.folder, '--once', '--link', 'l', status=2).stderr


def test_one_watch_a_journal(line, run, tmp_path):
    line.write('a.bmp', renamed=True)
    with line.watcher.inbox.journal.alone():
        refused = run(line.folder, '--once', status=2)
        assert 'another `cse watch` works with this journal' in refused.stderr and not refused.stdout
        done = run(line.folder, '--once', '--journal', tmp_path / 'own.jsonl')
        assert json.loads(done.stdout)['path'] == str(line.folder / 'a.bmp')
    link = tmp_path / 'link'
    link.symlink_to(line.folder)
    with line.watcher.inbox.journal.alone():
        assert 'another' in run(link, '--once', status=2).stderr
    assert run(line.folder, '--once').stdout and not run(line.folder, '--once').stdout
    assert run(line.folder, '--once', '--journal', os.devnull).stdout


# --- a process that is killed, in `make robustness`

FAKE = """
import sys
from types import SimpleNamespace
import numpy as np
import cse.deploy.commands
from cse.cli import app
from cse.extensions.decisions import Calibration

def score(paths):
    return SimpleNamespace(image=np.full(len(paths), 0.9))

fake = SimpleNamespace(score=score, calibration=Calibration(np.linspace(0.1, 0.5, 40)))
cse.deploy.commands._open = lambda *_: fake
app(['watch', 'wood.cse', *sys.argv[1:], '--every', '0.01', '--once'])
"""


@pytest.mark.skipif(not KILLS, reason='runs in `make robustness`')
def test_a_process_that_is_killed_loses_no_image(line, tmp_path, record_property):
    flagged, rows, kills, written = tmp_path / 'flagged', [], 0, 0
    command = sys.executable, '-c', FAKE, line.folder, '--move', flagged
    for stop in [*random.Random(0).choices(range(1, 60), k=KILLS), 10**6]:
        for _ in range(60):
            line.write(f'{written}.bmp', renamed=True)
            written += 1
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while text := process.stdout.readline():
                rows.append(json.loads(text)['path'])
                stop -= 1
                if not stop:
                    process.kill()
                    kills += 1
            assert process.wait() == (0 if stop > 0 else -9)
    counts = Counter(rows)
    assert kills == KILLS and len(counts) == written
    assert counts.total() - written <= kills, 'a kill prints at most one line again'
    assert len(os.listdir(flagged)) == written and not list(line.folder.glob('*.bmp'))
    record_property('watches', kills)
