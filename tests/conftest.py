"A category small enough for tests: crops of photographs that scikit-image ships, with a pasted bar as defect."
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')  # the tests are those of the CPU
import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))


def write_category(root, name='gravel', train=6):
    import skimage.data
    from PIL import Image
    photo = Image.open(Path(skimage.data.__file__).parent / f'{name}.png')
    for part in ('train/good', 'test/good', 'test/bar', 'ground_truth/bar'):
        (root / name / part).mkdir(parents=True)
    for i in range(train + 3):
        x, y = 32 * (i % 8), 100 * (i // 8)
        photo.crop((x, y, x + 256, y + 256)).save(root / name / ('train' if i < train else 'test') / 'good' / f'{i:02}.png')
    for i in range(3):
        image, mask = photo.crop((i * 40, 200, i * 40 + 256, 456)), Image.new('L', (256, 256))
        box = (60, 100 + 10 * i, 200, 120 + 10 * i)
        image.paste(200, box)
        mask.paste(255, box)
        image.save(root / name / 'test' / 'bar' / f'{i:02}.png')
        mask.save(root / name / 'ground_truth' / 'bar' / f'{i:02}_mask.png')
    return root


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


@pytest.fixture(scope='session')
def tiny():
    "The smoke profile with two epochs."
    from cse import Config
    return Config.smoke(epochs=2)


def pytest_terminal_summary(terminalreporter):
    "Counts of the campaigns, when `make robustness` or `make cluster-test` asks for them."
    if os.environ.get('CLUSTER_RUNS'):
        for line in [v for r in terminalreporter.stats.get('passed', []) for k, v in r.user_properties if k == 'cluster']:
            terminalreporter.write_line(f'cluster: {line}')
    if not os.environ.get('ROBUSTNESS_KILLS'):
        return
    passed = terminalreporter.stats.get('passed', [])
    count = lambda word: sum(word in r.nodeid for r in passed)
    noted = lambda name: sum(int(v) for r in passed for k, v in r.user_properties if k == name)
    from test_properties import EXAMPLES
    terminalreporter.write_line(f'robustness: {count("test_bad_input.py") + count("mistakes") + count("that_are_no_images")} cases of bad input, {noted("damaged")} damaged model files, {count("test_damaged_record")} damaged records, '
                                f'{count("test_properties.py")} properties of {EXAMPLES} examples each, {noted("kills")} grids killed, {len(terminalreporter.stats.get("failed", []))} failures')
