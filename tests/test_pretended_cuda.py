"Detectors on a pretended GPU: no tensor of the CPU meets one of the GPU, and scores are those of the CPU."
import copy

import numpy as np
import pytest
import torch
from pretend_cuda import UNORDERED, pretended_cuda

import cse
from cse.config import Config
from cse.deploy.export import Whole
from cse.extensions.hybrid import HybridCSE
from cse.fast import engines
from cse.fast.graphs import BATCHES, Graphs
from cse.lab.runs import make_method

IMAGES = torch.rand(10, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CONFIG = Config.smoke(epochs=1, resize=64, crop=64)


@pytest.fixture
def gpu(monkeypatch):
    engines._shared.cache_clear()
    with pretended_cuda(monkeypatch) as called: yield called


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu):
    ours, plain = torch.ones(3, device='cuda'), torch.ones(3)
    assert ours.is_cuda and (ours + 1).is_cuda and not ours.cpu().is_cuda and plain.to('cuda').is_cuda
    for wrong in (lambda: ours + plain, lambda: plain[ours.long() - 1],
                  lambda: torch.rand(3, device='cuda', generator=torch.Generator())):
        with pytest.raises(RuntimeError): wrong()
    with pytest.raises(TypeError): ours.numpy()
    copied = Graphs(lambda x: [x.cpu().to(x.device)])
    assert copied(ours)[0].tolist() == [1, 1, 1] and not hasattr(copied.recorded[(ours.shape,)], 'outputs')


@pytest.fixture(scope='module')
def on_cpu():
    "Scores of a method that PyTorch computes on the CPU."
    found = {}

    def scores(name, **settings):
        key = name, *settings.items()
        if key not in found:
            config = CONFIG.replace(device='cpu', engine='torch', **settings)
            found[key] = make_method(name, config).fit(IMAGES, progress=False).score(IMAGES).image
        return found[key]
    return scores


@pytest.mark.parametrize('name, settings', [
    ('cse', {}), ('cse', dict(decoder='joint', cache_mb=0)), ('hybrid', {}), ('classifier', {}),
    ('padim', {})])
def test_a_method_scores_as_on_the_cpu(name, settings, on_cpu, gpu, caplog):
    expected = on_cpu(name, **settings)
    gpu.clear()
    detector = make_method(name, CONFIG.replace(device='cuda', **settings)).fit(IMAGES, progress=False)
    recorded = {tuple(shape) for shape, in detector.extractor.graphs.recorded}
    assert recorded == {(n, 3, 64, 64) for n in BATCHES}
    for _ in range(2):
        # the covariances of PaDiM from ten images magnify the last bits of the features
        limit = 1e-3 if name == 'padim' else 1e-4
        assert np.allclose(detector.score(IMAGES).image, expected, rtol=limit)
        detector.compile()
    assert not caplog.records and not gpu & UNORDERED  # every graph was recorded, and bits do not change


def test_a_model_moves_between_devices(on_cpu, gpu, tmp_path):
    detector = HybridCSE(CONFIG.replace(device='cuda'))
    detector.fit(IMAGES, progress=False).save(tmp_path/'model')
    there = cse.load(tmp_path/'model', device='cpu', engine='torch')
    back = cse.load(tmp_path/'model', device='cuda')
    assert there.extractor.device.type == 'cpu' and back.extractor.device.type == 'cuda'
    expected = on_cpu('hybrid')
    for other in there, back: assert np.allclose(other.score(IMAGES).image, expected, rtol=1e-4)
    detector.calibrate(1 - IMAGES)
    exported = copy.deepcopy(Whole(detector)).cpu()  # as `export` begins
    with torch.no_grad(): assert np.allclose(exported(IMAGES)[0].numpy(), expected, rtol=1e-4)


def test_a_failing_compiler_is_told_and_the_scores_stay(gpu, monkeypatch, caplog):
    detector = make_method('padim', CONFIG.replace(device='cuda')).fit(IMAGES, progress=False)
    before = detector.score(IMAGES).image

    def no_compiler(network, **how):
        def call(*inputs): raise RuntimeError('Failed to find C compiler')
        return call
    monkeypatch.setattr(torch, 'compile', no_compiler)
    assert np.array_equal(detector.compile().score(IMAGES).image, before)
    assert 'torch.compile fails (Failed to find C compiler)' in caplog.text


def test_fewer_bits_on_request_and_their_difference_on_record(gpu):
    detector = make_method('cse', CONFIG.replace(device='cuda', precision='tf32', deterministic=False))
    detector.fit(IMAGES, progress=False)
    about = detector.extractor.info
    assert about['precision'] == 'tf32' and about['difference'] == 0  # this GPU has no TF32
    assert not torch.are_deterministic_algorithms_enabled()
    seen = []
    detector.extractor._run = lambda images: seen.append(torch.backends.cudnn.allow_tf32) or [images]
    detector.extractor.features(IMAGES)
    assert seen == [True] and not torch.backends.cudnn.allow_tf32  # within the extractor only
    make_method('cse', CONFIG.replace(device='cuda')).fit(IMAGES, progress=False)
    assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(cse.config.ConfigError, match='a number format of CUDA'):
        make_method('cse', CONFIG.replace(device='cpu', precision='tf32')).fit(IMAGES, progress=False)


def test_runs_share_an_extractor_and_compiling_leaves_it_alone(gpu):
    def fitted(): return make_method('padim', CONFIG.replace(device='cuda')).fit(IMAGES, progress=False)
    one, other = fitted(), fitted()
    assert one.extractor is other.extractor
    network = one.extractor._run
    one.compile().score(IMAGES)
    assert other.extractor._run is network
