"A script that starts processes without `if __name__ == '__main__':` gets one sentence."
import subprocess
import sys
import threading
import types

import pytest

from cse.config import ConfigError
from cse.lab.scheduling import check_main_guard, is_guarded

RUN = 'list(run_tasks(abs, [Task("one", (-1,))], "processes:2"))'
IMPORT = 'from cse.lab.scheduling import Task, run_tasks\n'
START = f'{IMPORT}{RUN}\n'
UNGUARDED = {
    'plain': START,
    'function': f'{IMPORT}def go(): {RUN}\nfor k in range(2): go()\n',
    'another if': f'import sys\nif len(sys.argv):\n  exec({START!r})\n',
    'class': f'{IMPORT}class Table:\n  runs = {RUN}\n',
    'guard elsewhere': f'if __name__ == "__main__":\n  pass\n{START}',
    'import': 'import plain\n',
}


def start(path, *arguments):
    return subprocess.run([sys.executable, *arguments, path.name], cwd=path.parent, capture_output=True,
                          text=True, timeout=60)


@pytest.mark.parametrize('name', UNGUARDED)
def test_scripts_without_a_guard(tmp_path, name):
    for file, text in UNGUARDED.items():
        (tmp_path / f'{file}.py').write_text(text)
    done = start(tmp_path / f'{name}.py')
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and len(done.stderr.splitlines()) < 30
    assert f"{name}.py, line" in last and last.endswith("under `if __name__ == '__main__':`")


def test_processes_that_cannot_start_end_in_a_sentence(tmp_path):
    "The script mentions a guard, but has none."
    (script := tmp_path / 's.py').write_text(f'if "parent_process":\n  exec({START!r})\n')
    done = start(script)
    assert done.returncode == 1 and len(done.stderr.splitlines()) < 40
    assert '__main__' in done.stderr.splitlines()[-1] and 'did not start' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('source, line, expected', [
    ('if __name__ == "__main__":\n    go()', 2, True), ("if '__main__' == __name__: go()", 1, True),
    ('x = 1\nif __name__ == "__main__" and x:\n    for k in range(3):\n        go(k)\n', 4, True),
    ('if __name__ != "__main__":\n    pass\nelse:\n    go()', 4, True),
    ('with x:\n    if __name__ == "__main__":\n        go()', 3, True),
    ('import multiprocessing\nif multiprocessing.parent_process() is None:\n    go()', 3, True),
    ('go()', 1, False), ('if x:\n    go()', 2, False), ('if __name__ == "__main__": pass\ngo()', 2, False),
    ('"__main__"\ngo()', 2, False)])
def test_guards(source, line, expected):
    assert is_guarded(source, line) == expected


def test_where_nothing_is_imported_again_nothing_is_refused(tmp_path, monkeypatch):
    (script := tmp_path / 's.py').write_text('check()\n')

    def check_in(**about):
        module = types.ModuleType('__main__')
        vars(module).update(about, check=lambda: check_main_guard('processes'))
        monkeypatch.setitem(sys.modules, '__main__', module)
        exec(compile('check()', about.get('__file__', 'cell'), 'exec'), vars(module))

    check_in()  # a notebook, or python -c
    check_in(__file__=str(tmp_path / 'zip' / 'gone.py'))  # not readable
    for file in (str(script), '<stdin>'):
        with pytest.raises(ConfigError, match=r'line 1, starts processes'):
            check_in(__file__=file)
    thread = threading.Thread(target=check_main_guard, args=['processes'])
    thread.start()
    thread.join()
