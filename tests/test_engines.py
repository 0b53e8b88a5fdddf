"Engines, caches and folders: what goes wrong there ends in a message and a documented fall-back."
import logging
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

import cse.extractor
from cse import CSE, Config
from cse.data.files import cache_folder
from cse.data.images import Images
from cse.fast.engines import EngineError, FastExtractor, compile_openvino

LITE = dict(name='tf_efficientnet_lite0', weights='packaged')
LONG = bool(os.environ.get('ROBUSTNESS_KILLS'))  # `make robustness` tries more
SMALL = dict(name='test_efficientnet', weights='random', layers=(0, 1))  # converted at once
SETTINGS = dict(extractor='test_efficientnet', weights='random', resize=104, crop=96, epochs=1)
IMAGES = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
PREPARED = Images(IMAGES, Config.smoke(**SETTINGS), prepared=True)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CSE_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture(scope='module')
def good(surface):
    return surface / 'gravel/train/good'


@pytest.fixture(scope='module')
def fitted(good, textures):
    return CSE(Config.smoke(**SETTINGS), textures=textures).fit(good, progress=False)


def close(a, b):
    differences = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True)]
    return max(differences) < 1e-4


@pytest.fixture(scope='module')
def plain():
    "The packaged network in PyTorch."
    return FastExtractor(**LITE, engine='torch')


@pytest.fixture(scope='module')
def converted():
    "The packaged network in OpenVINO."
    return FastExtractor(**LITE, engine='openvino')


@pytest.mark.cpu
@pytest.mark.parametrize('size', [(96, 96), (64, 128)])
def test_engines_agree(plain, converted, size):
    images = torch.rand(2, 3, *size)
    assert close(converted(images), plain(images))
    assert converted.info['engine'] == 'openvino' and 0 < converted.info['difference'] < 1e-4
    assert plain.info['engine'] == 'torch' and plain.info['difference'] is None


@pytest.mark.parametrize('engine', ['torch', 'openvino'] if LONG else ['torch'])
def test_random_efficientnet_b3_runs(engine):
    extractor = FastExtractor('efficientnet_b3', 'random', engine=engine)
    found = extractor(IMAGES[:1])
    assert [tuple(f.shape[1:]) for f in found] == [(136, 6, 6), (384, 3, 3)]
    with torch.no_grad():
        assert close(found, extractor.model(IMAGES[:1].to(extractor.device)))


@pytest.mark.cpu
def test_without_the_package(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    extractor = FastExtractor(**SMALL)
    with caplog.at_level(logging.WARNING):
        assert len(extractor(IMAGES)) == 2
    assert extractor.info['engine'] == 'torch' and 'PyTorch computes it instead' in caplog.text
    with pytest.raises(EngineError, match="use engine='torch'"):
        FastExtractor(**SMALL, engine='openvino')(IMAGES)


@pytest.mark.cpu
def test_an_extractor_that_cannot_be_converted(monkeypatch, caplog, own_cache):
    import openvino

    def fail(*args, **kw):
        raise RuntimeError('No conversion rule found for operations: aten::odd')

    monkeypatch.setattr(openvino, 'convert_model', fail)
    extractor = FastExtractor(**SMALL)
    with caplog.at_level(logging.WARNING):
        extractor(IMAGES)
    assert extractor.engine == 'torch' and 'aten::odd' in caplog.text
    with pytest.raises(EngineError, match='aten::odd'):
        FastExtractor(**SMALL, engine='openvino')(IMAGES)


@pytest.mark.cpu
def test_a_network_that_computes_something_else_is_refused(monkeypatch, own_cache):
    def odd(model, *args):
        return lambda *x: [f * 1.01 for f in model(*x)]

    monkeypatch.setattr('cse.fast.engines.compile_openvino', odd)
    with pytest.raises(EngineError, match='differ from PyTorch by 1.0e-02'):
        FastExtractor(**SMALL, engine='openvino')(IMAGES)


@pytest.mark.cpu
def test_the_first_run_computes_what_later_runs_do(own_cache):
    first, later = (FastExtractor(**SMALL)(IMAGES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, later))


@pytest.mark.cpu
@pytest.mark.parametrize('damage', ['text', 'short', 'gone', 'zeros'] if LONG else ['text', 'zeros'])
def test_a_damaged_compiled_network_is_written_again(own_cache, damage):
    before = FastExtractor(**SMALL)(IMAGES)
    (path,) = (cache_folder() / 'openvino').glob('*.xml')
    weights = path.with_suffix('.bin')

    whole = weights.read_bytes()
    half = len(whole) // 2
    if damage == 'text':
        path.write_text('<net')
    if damage == 'short':
        weights.write_bytes(b'short')
    if damage == 'gone':
        weights.unlink()
    if damage == 'zeros':
        weights.write_bytes(whole[:half // 2] + bytes(half) + whole[half // 2 + half:])
    for _ in range(2):
        extractor = FastExtractor(**SMALL)
        assert close(extractor(IMAGES), before) and extractor.engine == 'openvino'
    assert weights.read_bytes() == whole


@pytest.mark.cpu
def test_bfloat16_on_request_only(plain, converted):
    exact = converted(IMAGES)
    assert close(exact, plain(IMAGES))
    fast = FastExtractor(**LITE, precision='bfloat16')(IMAGES)
    assert all(f.dtype == torch.float32 for f in fast)
    autocast = FastExtractor(**LITE, engine='torch', precision='bfloat16')(IMAGES)
    assert not close(autocast, exact), 'autocast changes the result'


@pytest.mark.cpu
def test_compile_openvino_takes_several_inputs():
    class Sum(torch.nn.Module):
        def forward(self, a, b):
            return a + b, a - b

    run = compile_openvino(Sum(), [torch.rand(1, 2), torch.rand(1, 2)])
    a, b = torch.rand(20, 2), torch.rand(20, 2)
    total, difference = run(a, b)
    assert torch.allclose(total, a + b) and torch.allclose(difference, a - b)


def test_the_fused_network_scores_like_the_detector(fitted):
    expected = fitted.score(PREPARED)
    with torch.inference_mode():
        scores, maps = (t.cpu() for t in fitted.fuse()(IMAGES.to(fitted.extractor.device)))
        literal = fitted.bank.score(fitted.embedder(fitted.extractor(IMAGES))[1]).cpu()
    assert np.allclose(scores, expected.image, rtol=1e-4)
    assert np.allclose(maps, expected.coarse, rtol=1e-3, atol=1e-5)
    assert np.allclose(literal, expected.image, rtol=1e-4)
    compiled = fitted.compile().score(PREPARED)
    assert fitted._whole and np.allclose(compiled.image, expected.image, rtol=1e-4)


@pytest.mark.cpu
def test_a_detector_that_cannot_be_compiled_scores_as_before(fitted, monkeypatch, caplog):
    expected = fitted.score(PREPARED).image

    def odd(*args):
        return lambda *x: [torch.full((len(x[0]),), 9.), torch.zeros(len(x[0]), 3, 3)]

    monkeypatch.setattr('cse.fast.engines.compile_openvino', odd)
    monkeypatch.setattr(fitted, '_whole', None)
    assert np.allclose(fitted.compile().score(PREPARED).image, expected, rtol=1e-6)
    assert 'outputs differ' in caplog.text
    monkeypatch.setattr(fitted.extractor, 'exact', True)
    with pytest.raises(EngineError, match='outputs differ'):
        fitted.compile()


@pytest.mark.cpu
def test_compiling_for_the_torch_engine(good, textures, monkeypatch):
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    config = Config.smoke(**SETTINGS, engine='torch')
    detector = CSE(config, textures).fit(good, progress=False)
    expected = detector.score(PREPARED)
    found = detector.compile().score(PREPARED)
    assert isinstance(detector._head, torch._dynamo.OptimizedModule)
    assert np.allclose(found.image, expected.image, rtol=1e-5)


@pytest.mark.cpu
def test_a_failed_conversion_leaves_logging_alone():
    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.cosine_similarity(x, x.flip(1), dim=1)

    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with pytest.raises(Exception, match='No conversion rule'):
        compile_openvino(Odd().eval(), [torch.rand(1, 3, 4, 4)])
    assert (root.level, root.handlers) == before


def test_only_what_is_fitted_is_compiled():
    with pytest.raises(RuntimeError, match='not fitted'):
        CSE(Config.smoke()).compile()


def test_a_file_that_vanishes_costs_only_its_own_score(fitted, own_surface, caplog):
    paths = sorted((own_surface / 'gravel/test').rglob('*.png'))
    whole = fitted.score(paths)
    paths[2].unlink()
    paths[4].write_bytes(b'damaged')
    with caplog.at_level(logging.WARNING):
        partial = fitted.score(paths)
    assert np.isnan(partial.image[[2, 4]]).all()
    assert '2 of 6 images have no score' in caplog.text and paths[2].name in caplog.text
    others = [0, 1, 3, 5]
    assert np.array_equal(partial.image[others], whole.image[others])
    with pytest.raises(ValueError, match='2 of 2 images have no score'):
        fitted.score([paths[2], paths[4]])


def test_images_of_mixed_sizes_are_brought_to_one(fitted):
    mixed = [torch.rand(3, 96, 96), torch.rand(3, 300, 200), torch.rand(1, 64, 64)]
    assert len(fitted.score(mixed)) == 3


def test_results_come_in_input_order(fitted, surface):
    paths = sorted((surface / 'gravel').rglob('good/*.png'))
    forward, backward = (fitted.score(p, batch_size=2) for p in (paths, paths[::-1]))
    assert forward.paths == backward.paths[::-1]
    assert np.allclose(forward.image, backward.image[::-1], rtol=1e-5)


def test_scores_of_many_images_do_not_hold_them(fitted, surface):
    "Only the score and a 3×3 map of an image are kept."
    scores = fitted.score(surface / 'gravel/test')
    assert scores.coarse.shape == (6, 3, 3) and scores.map.shape == (6, 96, 96)


def test_devices(monkeypatch):
    monkeypatch.setattr(cse.extractor, 'pick_device', lambda device: torch.device('meta'))
    with pytest.raises(ValueError, match="engine='openvino' runs on the CPU"):
        FastExtractor.from_config(Config.smoke(engine='openvino'))


SIGNAL_AFTER_TWO_NETWORKS = '''
import signal
import torch
from torch import nn
from cse.fast.engines import compile_openvino
first, second = (compile_openvino(nn.Linear(3, 2), [torch.ones(1, 3)]) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print('handled'))
signal.raise_signal(signal.SIGUSR1)
'''


@pytest.mark.cpu
@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='signals of POSIX only')
def test_signals_arrive_after_networks_are_freed():
    "Two cores of OpenVINO, freed in the order in which they were made, leave no stack for signals."
    ended = subprocess.run([sys.executable, '-c', SIGNAL_AFTER_TWO_NETWORKS], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, 'handled\n'), ended.stderr
