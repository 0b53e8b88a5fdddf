"`make gpu-check`: its lines, its record and its exit status; its parts on a pretended GPU."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pretend_cuda import pretended_cuda

from cse.fast import engines
from cse.lab import gpu_check
from cse.lab.gpu_check import PARTS, TARGETS, Part, Setup, child, finish, fresh, line, measured

ROOT = Path(__file__).parent.parent
SETUP = Setup(device='cuda')


def test_without_a_gpu_nothing_is_installed(tmp_path):
    command = ['make', '--no-print-directory', 'gpu-check', f'VENV={tmp_path}/venv']
    done = subprocess.run(
        command, cwd=ROOT, text=True, capture_output=True, env=os.environ | dict(PATH='/usr/bin:/bin'))
    assert done.returncode and done.stdout == '' and not list(tmp_path.iterdir())
    assert 'needs an NVIDIA GPU and its driver' in done.stderr.splitlines()[0]


@pytest.mark.parametrize('built, visible, words', [
    (None, None, 'is built without CUDA'), ('13.0', '', "finds no GPU here; CUDA_VISIBLE_DEVICES=''"),
    ('13.0', None, 'finds no GPU here; expected one')])
def test_what_is_missing_is_named(monkeypatch, built, visible, words):
    monkeypatch.setattr(torch.version, 'cuda', built)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert words in end.value.code


def fails(setup, seconds):
    raise ValueError('no such thing')


def gives(name, value):
    "A part that gives a value."
    return Part(lambda setup, seconds: {name: (value, {'single': [value]})}, 9, (name,))


@pytest.mark.parametrize('parts, status', [
    ([gives('tf32', 0.9), gives('graphs', 1e-7)], 0), ([gives('tf32', 1.1), gives('float32', 2)], 1),
    ([Part(fails, 9, ('graphs',)), gives('float32', 3)], 1)])
def test_lines_record_and_status(monkeypatch, tmp_path, capsys, parts, status):
    monkeypatch.setattr(gpu_check, 'PARTS', parts)
    monkeypatch.setattr(gpu_check, 'missing', str)
    monkeypatch.setattr('cse.lab.scheduling._card', lambda index: 'GPU-of-a-test')
    monkeypatch.setenv('CSE_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(gpu_check, 'about_gpu', lambda setup: dict(card='a card', data='wood'))
    monkeypatch.setattr(gpu_check, 'reference_folder', lambda: tmp_path)
    monkeypatch.setattr(sys, 'argv', ['-c', '', ''])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert int(end.value.code) == status
    _, *lines = capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / 'gpu.json').read_text())
    assert written['card'] == 'a card' and list(map(line, written['rows'])) == lines and len(lines) == 2
    if parts[0].function is fails:
        assert lines[0] == f'{TARGETS["graphs"].what}: failed, ValueError: no such thing'
        assert lines[1] == 'one image, float32: 3 ms (target ≤ 3, before 5.0 ms): reached'
    else:
        assert written['rows'][0]['measured']['single'] == [written['rows'][0]['value']]
        assert lines[0].endswith('reached' if status == 0 else 'NOT reached')


def test_a_part_has_a_time_limit(tmp_path):
    "All its processes end with it."
    code = ('import subprocess, sys; from pathlib import Path; '
            'sleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"]); '
            f'Path("{tmp_path}/pid").write_text(str(sleep.pid)); print("begun", flush=True); sleep.wait()')
    outputs = []

    def hangs(setup, seconds):
        try:
            finish([sys.executable, '-c', code], seconds)
        except subprocess.TimeoutExpired as e:
            outputs.append(e.output)
            raise

    row, = measured(Part(hangs, 1, ('tf32',)), SETUP)
    assert line(row) == 'one image, tf32: failed, took longer than 1 s' and outputs == ['begun\n']
    status, end = Path(f'/proc/{(tmp_path / "pid").read_text()}/stat'), time.monotonic() + 10
    while status.exists() and ' Z ' not in status.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not status.exists() or ' Z ' in status.read_text()
    row, = measured(gives('tf32', 1), SETUP, seconds=0)
    assert 'no time was left' in line(row) and row['reached'] is False


def test_a_fresh_process_gets_the_setup_and_answers_in_json(monkeypatch, capsys):
    def look(setup, precision):
        print('a library talks')
        return dict(device=setup.device, precision=precision)

    def here(command, seconds):
        monkeypatch.setattr(sys, 'argv', command[2:])
        child()
        return 0, capsys.readouterr().out, ''

    monkeypatch.setitem(gpu_check.MEASUREMENTS, 'look', look)
    monkeypatch.setattr(gpu_check, 'finish', here)
    assert fresh('look', SETUP, 9, 'tf32') == dict(device='cuda', precision='tf32')
    monkeypatch.setattr(gpu_check, 'finish', lambda *a: (1, '', 'Traceback\nRuntimeError: CUDA error\n\n'))
    with pytest.raises(RuntimeError, match='^RuntimeError: CUDA error$'):
        fresh('look', SETUP, 9, 'tf32')


def test_a_number_format_on_a_pretended_gpu(monkeypatch, caplog):
    engines._shared.cache_clear()
    monkeypatch.setattr(engines, 'BATCHES', (1,))  # others are recorded when they come
    with pretended_cuda(monkeypatch):
        rows = [row for part in PARTS if 'tf32' in part.rows
                for row in measured(part, Setup(device='cuda', quick=True))]
    assert [line(row) for row in rows if row.get('error')] == [] and not caplog.records
    values = {row['name']: row['value'] for row in rows}
    assert len(values) == 3 and values['tf32_scores'] < 1e-5  # it has no TF32
