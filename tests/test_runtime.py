"A saved detector without PyTorch: the same pixels, the same scores, and PyTorch where it cannot be used."
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cse import CalibratedCSE, Config, HybridConfig, HybridCSE
from cse.data.images import read_image, resize_crop
from cse.data.model_files import ModelError
from cse.data.reading import DataError, read_values
from cse.deploy import runtime
from cse.deploy.runtime import (
    ABOUT, NETWORK, WEIGHTS, Runtime, RuntimeUnavailable, open_detector, prepare_values, save_runtime)
from together import SETTINGS, images, in_threads

pytestmark = pytest.mark.cpu  # OpenVINO computes on the CPU


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Six images of different sizes and modes."
    folder, noise = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i, (height, width) in enumerate([(64, 64), (80, 120), (200, 90), (65, 64), (300, 300)]):
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f'{i}.png')
    Image.fromarray(noise.integers(0, 65536, (90, 70), np.uint16)).save(folder / '5.png')
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope='module', params=['cse', 'hybrid'])
def saved(request, tmp_path_factory):
    "A detector and its folder, with a compiled form."
    kind, config = dict(cse=(CalibratedCSE, Config), hybrid=(HybridCSE, HybridConfig))[request.param]
    detector = kind(config.smoke(**SETTINGS)).fit(images(16), progress=False, held_out=0.4)
    folder = detector.save(tmp_path_factory.mktemp(request.param) / 'model')
    assert save_runtime(detector, folder)
    return detector, folder


@pytest.mark.parametrize('resize, mode, crop', [
    (64, 'square', 64), (72, 'square', 64), (72, 'shorter', 64), (152, 'shorter', 152), (0, 'square', 64)])
def test_the_same_pixels(files, resize, mode, crop):
    config = Config(resize=resize, resize_mode=mode, crop=crop)
    for path in files:
        expected = resize_crop(read_image(path), config).numpy()
        assert np.abs(prepare_values(read_values(path)[0], config) - expected).max() < 2e-5


def test_an_image_smaller_than_the_crop_is_refused(files):
    values = read_values(files[0])[0]
    with pytest.raises(DataError, match='a.png: is 64×64 pixels; expected at least crop=104'):
        prepare_values(values, Config(resize=0, crop=104), 'a.png')


def test_the_same_scores_maps_and_decisions(saved, files):
    detector, folder = saved
    found, expected = Runtime(folder).score(files), detector.score(files)
    assert np.allclose(found.image, expected.image, rtol=1e-4, atol=1e-4 * np.abs(expected.image).max())
    assert found.coarse.shape == expected.coarse.shape and found.paths == expected.paths
    assert np.abs(found.map - expected.map).max() < 1e-3 * expected.map.max()
    assert found[2:4].paths == files[2:4] and len(found[[0]]) == 1
    calibration = Runtime(folder).calibration
    assert np.allclose(calibration.scores, detector.calibration.scores, rtol=0,
                       atol=2e-4 * np.abs(detector.calibration.scores).max())
    assert np.array_equal(calibration.peaks, detector.calibration.peaks)


def test_what_calibrated_is_not_flagged_by_rounding(saved):
    detector, folder = saved
    light, kept = Runtime(folder).calibration, detector.calibration
    usual = kept.scores[kept.scores <= kept.threshold(0.5)]
    assert not light.flags(usual + 5e-5 * np.abs(kept.scores).max(), 0.5).any()


@pytest.mark.parametrize('spoil', [
    lambda s, m: (s * np.nan, m), lambda s, m: (s, m * 5), lambda s, m: (s * 1.01, m)])
def test_a_form_that_computes_something_else_is_not_kept(saved, tmp_path, monkeypatch, caplog, spoil):
    detector, folder = saved
    copy, usual = changed(folder, tmp_path, 'x', b''), runtime.Requests.__call__
    own = detector.extractor.network((64, 64)).requests
    monkeypatch.setattr(runtime.Requests, '__call__', lambda self, *inputs:
                        usual(self, *inputs) if self is own else spoil(*usual(self, *inputs)))
    assert not save_runtime(detector, copy)
    assert 'PyTorch will score (scores differ by' in caplog.text
    assert not any((copy / name).exists() for name in (ABOUT, NETWORK, WEIGHTS))


def test_unreadable_and_dark_images(saved, files, tmp_path, caplog):
    _, folder = saved
    (tmp_path / 'text.png').write_text('no image')
    Image.new('L', (64, 64), 3).save(tmp_path / 'dark.png')
    odd = [str(tmp_path / 'text.png'), files[0], str(tmp_path / 'dark.png')]
    found = Runtime(folder).score(odd)
    assert np.isnan(found.image).tolist() == [True, False, False]
    assert '1 of 3 images have no score' in caplog.text and '1 of 3 nearly black' in caplog.text
    assert np.array_equal(found.image[1:2], Runtime(folder).score(files[:1]).image)
    for sources, why in (([odd[0]], 'text.png: not a readable image'), ([], 'at least one')):
        with pytest.raises(DataError, match=why):
            Runtime(folder).score(sources)


def test_several_threads_get_their_own_scores(saved, files):
    light = Runtime(saved[1])
    expected = [light.score([path]).image for path in files]
    wrong = []

    def work(start):
        for i in range(start, start + 12):
            i %= len(files)
            if not np.array_equal(light.score([files[i]]).image, expected[i]): wrong.append(i)

    in_threads(*[lambda start=start: work(start) for start in range(4)])
    assert wrong == []


def changed(folder, tmp_path, name, content):
    "A copy of a model in which one file is another one, or missing."
    copy = tmp_path / 'copy'
    copy.mkdir()
    for path in folder.iterdir(): (copy / path.name).write_bytes(path.read_bytes())
    if content is None: (copy / name).unlink()
    else: (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize('name, content, why', [
    (ABOUT, None, 'has no compiled form; `cse fit` and `cse calibrate` add one'),
    (ABOUT, b'{}', 'from another detector, copy the folder again'),
    (ABOUT, b'[', 'has no compiled form; `cse fit` and `cse calibrate` add one'),
    (NETWORK, None, 'runtime.xml: is missing or damaged, copy it again'),
    (NETWORK, b'<net/>', 'runtime.xml: is missing or damaged, copy it again'),
    (WEIGHTS, b'', 'runtime.bin: is missing or damaged, copy it again')])
def test_where_it_cannot_be_used_pytorch_scores(saved, files, tmp_path, caplog, name, content, why):
    detector, folder = saved
    copy = changed(folder, tmp_path, name, content)
    with pytest.raises(RuntimeUnavailable, match=why):
        Runtime(copy)
    found = open_detector(copy)
    assert type(found) is type(detector) and f'{why}; PyTorch scores instead' in caplog.text
    assert np.array_equal(found.score(files).image, detector.score(files).image)


def test_a_compiled_form_of_tensors_before_is_not_used(saved, tmp_path):
    detector, folder = saved
    about = json.loads((folder / ABOUT).read_text())
    copy = changed(folder, tmp_path, ABOUT, json.dumps(about | dict(tensors_sha256='0' * 64)).encode())
    with pytest.raises(RuntimeUnavailable, match='from another detector'):
        Runtime(copy)
    detector.save(copy)
    assert save_runtime(detector, copy) and Runtime(copy).score(images_of(copy))


def images_of(folder):
    path = folder / 'x.png'
    Image.new('RGB', (64, 64), 'white').save(path)
    return [path]


def test_no_model_and_other_devices(saved, tmp_path):
    with pytest.raises(ModelError, match='model.json: no such file'):
        open_detector(tmp_path)
    assert isinstance(open_detector(saved[1]), Runtime)
    assert not isinstance(open_detector(saved[1], weights='random'), Runtime)


def test_a_network_that_cannot_be_converted_leaves_a_warning(saved, tmp_path, monkeypatch, caplog):
    detector, folder = saved
    copy = changed(folder, tmp_path, 'x', b'')

    def fail(*args): raise RuntimeError('No conversion rule found\nat length')

    monkeypatch.setattr('cse.fast.engines.convert_openvino', fail)
    with caplog.at_level(logging.WARNING):
        assert not save_runtime(detector, copy)
    assert 'has no compiled form, so PyTorch will score (No conversion rule found)' in caplog.text
    assert not (copy / NETWORK).exists()


QUICK = '''
import sys
from cse.cli import app
try: app(sys.argv[1:])
except SystemExit as end: status = end.code
heavy = {'torch', 'timm', 'scipy', 'sklearn', 'pandas', 'matplotlib'} & sys.modules.keys()
sys.exit(f'imported {heavy}' if heavy else status)
'''


def test_the_command_scores_without_pytorch(saved, files):
    command = [sys.executable, '-c', QUICK, 'score', saved[1], *files[:2], '--quiet', '--json']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first['path'], second['path']) == tuple(files[:2]) and first['decision'] in ('good', 'defective')
