"A category small enough for tests: crops of a photograph, with a pasted bar as defect."
import os
import shutil
from pathlib import Path

import pytest

import torch

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', choices=('cpu', 'cuda', 'pretended'), help=(
        "what device='auto' means: the CPU, a GPU of this machine, or the one of pretend_cuda.py, for a "
        'single file without processes and threads'))


def pytest_configure(config):
    if config.option.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # also for processes that a test starts
    else:
        os.environ.setdefault('CSE_SHARE_GPU', '1')  # tests may run side by side
    if config.option.device == 'cuda' and not torch.cuda.is_available():
        raise pytest.UsageError('--device cuda: PyTorch finds no GPU on this machine')


def pytest_collection_modifyitems(config, items):
    "Leave out the tests of another device."
    other = 'gpu' if config.option.device == 'cpu' else 'cpu'
    left_out = [item for item in items if item.get_closest_marker(other)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope='session', autouse=True)
def pretended(pytestconfig):
    "The pretended GPU, if asked for."
    if pytestconfig.option.device != 'pretended':
        yield
        return
    import torch._dynamo  # noqa: F401 - it looks at the functions of torch.cuda, which are replaced below
    from pretend_cuda import pretended_cuda
    with pytest.MonkeyPatch.context() as patch, pretended_cuda(patch):
        yield


def photograph(name):
    "A photograph that scikit-image ships."
    import skimage.data
    from PIL import Image
    return Image.open(Path(skimage.data.__file__).parent / f'{name}.png')


def write_category(root, name='gravel', train=6):
    "Crops of a photograph in MVTec layout: good ones, and three with a pasted bar."
    from PIL import Image
    photo, folder = photograph(name), root / name
    for part in ('train/good', 'test/good', 'test/bar', 'ground_truth/bar'):
        (folder / part).mkdir(parents=True)
    for i in range(train + 3):
        x, y = 32 * (i % 8), 100 * (i // 8)
        part = 'train' if i < train else 'test'
        photo.crop((x, y, x + 256, y + 256)).save(folder / part / 'good' / f'{i:02}.png')
    for i in range(3):
        image, mask = photo.crop((i * 40, 200, i * 40 + 256, 456)), Image.new('L', (256, 256))
        box = (60, 100 + 10 * i, 200, 120 + 10 * i)
        image.paste(200, box)
        mask.paste(255, box)
        image.save(folder / 'test/bar' / f'{i:02}.png')
        mask.save(folder / 'ground_truth/bar' / f'{i:02}_mask.png')
    return root


@pytest.fixture(scope='session')
def photographs():
    "The grey photographs, by name, as arrays."
    import numpy as np
    return {name: np.asarray(photograph(name)) for name in ('gravel', 'brick', 'grass')}


@pytest.fixture(scope='session')
def surface(tmp_path_factory):
    "A folder with one category, `gravel`, that no test changes."
    return write_category(tmp_path_factory.mktemp('data') / 'photographs')


@pytest.fixture
def own_surface(surface, tmp_path):
    "The same in a folder of the test's own."
    return Path(shutil.copytree(surface, tmp_path / 'photographs'))


@pytest.fixture(scope='session')
def textures(tmp_path_factory):
    "A folder of three texture images."
    import skimage.data
    folder = tmp_path_factory.mktemp('textures')
    for name in ('brick', 'grass', 'coffee'):
        shutil.copy(Path(skimage.data.__file__).parent / f'{name}.png', folder)
    return folder


def run_notebook(path, parameters):
    "Outputs of the cells of a notebook, run in this process: to start a kernel takes seconds."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    shell, outputs = CaptureShell(path), []
    for cell in read_nb(path).cells:
        if cell.cell_type != 'code':
            continue
        outputs += shell.run(cell.source)
        if shell.exc:
            raise shell.exc
        if 'parameters' in cell.metadata.get('tags', []):
            shell.user_ns.update(parameters)
    return outputs


@pytest.fixture(scope='session')
def tiny():
    "The smoke profile, two epochs on small crops."
    from cse import Config
    return Config.smoke(epochs=2, resize=96, crop=96)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    "Escape file names that are invalid text, so that pytest-xdist can send a report."
    report = yield
    def printable(text): return text.encode(errors='backslashreplace').decode()
    if report.failed: report.longrepr = printable(str(report.longrepr))
    report.sections = [(name, printable(text)) for name, text in report.sections]
    return report


def pytest_terminal_summary(terminalreporter):
    "Counts of the campaigns, when `make robustness` or `make cluster-test` asks for them."
    passed = terminalreporter.stats.get('passed', [])
    if os.environ.get('CLUSTER_RUNS'):
        for line in properties(passed, 'cluster'):
            terminalreporter.write_line(f'cluster: {line}')
    if os.environ.get('ROBUSTNESS_KILLS'):
        terminalreporter.write_line(robustness(passed, terminalreporter.stats.get('failed', [])))


def properties(reports, name):
    "What tests have recorded under a name."
    return [value for report in reports for key, value in report.user_properties if key == name]


BAD_INPUT = (  # parts of the names of tests, each with one bad input
    'test_bad_input.py', 'test_wrong_types.py::test_no', 'test_wrong_types.py::test_tables', 'mistakes',
    'that_are_no_images', 'constructor_refuses', 'detector_that_cannot_be', 'one_bad_image', 'may_raise',
    'could_mean_several_things', 'labels_are_checked', 'cannot_be_compared', 'does_not_fit')


def robustness(passed, failed):
    "One line of counts."
    from test_properties import EXAMPLES
    def count(*words):
        return sum(any(word in report.nodeid for word in words) for report in passed)
    def noted(name):
        return sum(map(int, properties(passed, name)))
    bad_input = count(*BAD_INPUT) + noted('bad_input')
    return (f'robustness: {bad_input} cases of bad input, {noted("damaged")} damaged model files, '
            f'{count("test_damaged_record")} damaged records, '
            f'{count("test_properties.py")} properties of {EXAMPLES} examples each, '
            f'{noted("kills")} grids and {noted("watches")} watches killed, '
            f'{noted("thread_calls")} calls in threads, '
            f'{noted("process_calls")} in other processes, {noted("scored")} images in flat memory, '
            f'{len(failed)} failures')
