"On a GPU: the same bits twice, graphs, number formats, threads, copies, and models that move to the CPU."
import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch

import cse
from cse import CSE, Config, HybridConfig, HybridCSE
from cse.config import ConfigError
from cse.data.images import Images
from cse.extractor import pick_device
from together import SETTINGS, images, in_threads

pytestmark = pytest.mark.gpu
CONFIG = Config.smoke(**SETTINGS | dict(epochs=3))
BATCH = images(9)


def fit(seed=0, **changes):
    return CSE(CONFIG.replace(**changes), seed=seed).fit(images(16), progress=False)


@pytest.fixture(scope='module')
def fitted():
    return fit()


@pytest.fixture(scope='module')
def prepared(fitted):
    "The batch, where the detector computes."
    return torch.stack(list(Images(BATCH, CONFIG))).to(fitted.extractor.device)


def test_auto_is_the_gpu(fitted):
    assert fitted.extractor.device.type == fitted.bank.prototypes.device.type == 'cuda'
    assert fitted.extractor.info['engine'] == 'torch' and fitted.extractor.graphs.recorded


def test_the_same_seed_gives_the_same_bits(fitted):
    again = fit()
    assert again.history == fitted.history
    assert torch.equal(again.bank.prototypes, fitted.bank.prototypes)
    assert np.array_equal(again.score(BATCH).image, fitted.score(BATCH).image)
    assert not np.array_equal(fit(seed=1).score(BATCH).image, fitted.score(BATCH).image)


@torch.no_grad()
def test_graphs_compute_what_eager_pytorch_does(fitted, prepared):
    extractor = fitted.extractor
    for found, expected in zip(extractor(prepared), extractor.features(prepared)):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    expected = fitted.head()(*extractor.features(prepared))[0].cpu()
    for detector in fitted, copy.deepcopy(fitted).compile():
        assert torch.allclose(detector.score_batch(prepared)[0].cpu(), expected, rtol=1e-4)


def test_fewer_bits_change_scores_a_little():
    one, other = fit(extractor='resnet10t'), fit(extractor='resnet10t', precision='tf32')
    assert other.extractor.info['precision'] == 'tf32' and not one.extractor.info['difference']
    if torch.cuda.get_device_capability() >= (8, 0):  # older ones have no TF32
        assert 0 < other.extractor.info['difference'] < 0.05
        assert not np.array_equal(one.score(BATCH).image, other.score(BATCH).image)
    fit()  # the next fit is in float32 again
    assert not torch.backends.cudnn.allow_tf32


def test_threads_score_at_once_on_streams_of_their_own(fitted):
    sets = [images(n, seed=n) for n in (1, 9, 3, 17)]
    for detector in fitted, copy.deepcopy(fitted).compile():
        expected, found = [detector.score(batch).image for batch in sets], []

        def work(detector, expected, found, first):
            with torch.cuda.stream(torch.cuda.Stream()):
                for which in (first, 1 - first, first + 2, 3 - first) * 5:
                    found.append(np.array_equal(detector.score(sets[which]).image, expected[which]))

        in_threads(*(partial(work, detector, expected, found, first) for first in (0, 1)))
        assert len(found) == 40 and all(found)


def test_a_compiled_detector_is_copied(fitted):
    compiled = copy.deepcopy(fitted).compile()
    expected = compiled.score(BATCH).image
    for other in copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled)):
        assert other.extractor.device.type == 'cuda'
        assert np.allclose(other.score(BATCH).image, expected, rtol=1e-5)


def test_a_model_of_the_gpu_is_read_on_the_cpu(tmp_path):
    detector = HybridCSE(HybridConfig.smoke(**SETTINGS)).fit(images(16), progress=False)
    detector.save(tmp_path)
    expected = detector.score(BATCH).image
    there = cse.load(tmp_path, device='cpu')
    assert there.extractor.device.type == 'cpu'
    for other in there, cse.load(tmp_path):
        assert np.allclose(other.score(BATCH).image, expected, rtol=1e-3)


@pytest.mark.parametrize('device', ['cuda:{}', 'cuda:99'])
def test_a_gpu_that_is_not_there_is_refused(device):
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f'this machine has {count} CUDA devices'):
        fit(device=device.format(count))
    assert pick_device(f'cuda:{count - 1}').index == count - 1
