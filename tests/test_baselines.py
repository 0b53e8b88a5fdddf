"Baselines: one interface, no test data in fitting, settings in the record, and clear errors."
import copy
import os
import functools
import json
import sys

import numpy as np
import pytest
import torch

from cse.config import Config, ConfigError, fingerprint
from cse.data.images import DataError, Images
from cse.data.folders import load_category
from cse.lab.grid import grid
from cse.lab.timed_methods import TIMED, _openvino
from cse.lab.runs import METHODS, make_method, run, variant
from cse.baselines.anomalib_methods import CFA, FastFlow, PatchCore
from cse.baselines.features import MeanDistance
from cse.baselines.registry import BASELINES

SAME = ('patchcore', 'padim', 'cfa', 'fastflow', 'reverse_distillation')
TINY = Config.smoke(epochs=2, extractor='resnet10t', weights='random', resize=96, crop=96)
TRAINED = ('cfa', 'fastflow', 'reverse_distillation')
SMALL = dict(epochs=1, extractor='resnet18', weights='random', engine='torch', resize=96, crop=96)


@pytest.fixture(scope='module')
def anomalib():
    return pytest.importorskip('anomalib', reason="anomalib is not installed: pip install '.[baselines]'")


@pytest.fixture(scope='module')
def images(surface):
    return load_category(surface, 'gravel')


@pytest.fixture(scope='module')
def fitted(anomalib, images):
    "Methods by name, each fitted once for all tests."
    return functools.cache(lambda name: BASELINES[name](TINY, seed=3).fit(images.train, progress=False))


@pytest.mark.parametrize('name', [*SAME, 'mean_distance'])
def test_a_method_on_the_extractor_of_the_run(fitted, images, name):
    method = fitted(name)
    scores = method.score(images.test)
    assert method.extractor.info['name'] == TINY.extractor and method.config.layers == (3, 4)
    assert np.isfinite(scores.image).all() and scores.image.std() > 0
    assert scores.map.shape == (6, 96, 96) and np.isfinite(scores.map).all()
    assert len(method.history) == (2 if name in TRAINED else 0)
    assert method.best_epoch == (1 if method.history else None)


@pytest.mark.parametrize('name', SAME)
def test_the_same_seed_gives_the_same_scores(fitted, images, name, capfd):
    first = fitted(name).score(images.test)
    capfd.readouterr()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = BASELINES[name](TINY.replace(workers=1), seed=3).fit(images.train, progress=False)
    again = again.score(images.test)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.map, again.map)
    assert torch.equal(torch.get_rng_state(), state), 'global generators are left as they were'
    assert capfd.readouterr() == ('', ''), 'output of others gets through'


def test_patchcore_in_its_original_form_has_1024_channels(anomalib, images):
    small = Config.smoke(weights='random', engine='torch', resize=64, crop=64)
    method = PatchCore(small, original='resnet10t').fit(images.train, progress=False)
    plain = PatchCore(small.replace(extractor='resnet10t', layers=(2, 3)))
    assert method.network.model.memory_bank.shape[1] == method.about['channels'] == 1024
    assert 'channels' not in plain.about and np.isfinite(method.score(images.test).image).all()


def test_reverse_distillation_is_compiled_as_one_network_for_its_time(fitted, images):
    method = fitted('reverse_distillation')
    assert method.extractor.info['name'] == TINY.extractor
    score, info = _openvino(method, 'the scores')
    batch = torch.stack(list(Images(images.test[:2], method.config)))
    assert torch.allclose(score(batch), method.score_batch(batch)[0], rtol=1e-4)
    assert info['engine'] == 'openvino' and info['difference'] < 1e-4


def test_efficient_ad_is_timed_without_training(anomalib):
    timed = TIMED['efficient_ad/small'](Config.smoke(device='cpu'), 0)
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = timed.score(torch.cat([image, image.flip(3)]))
    assert timed.info['name'] == 'efficient_ad_s' and first.isfinite() and first != second


def test_scores_are_those_of_anomalib_on_images(anomalib, images):
    "PatchCore gives the same scores with an extractor of anomalib's own and the same weights."
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    method = PatchCore(Config.smoke(**SMALL, layers=(2, 3))).fit(images.train, progress=False)
    model = PatchcoreModel(['layer2', 'layer3'], 'resnet18', pre_trained=False, num_neighbors=1)
    own = method.extractor.model.model.state_dict()
    assert not model.feature_extractor.feature_extractor.load_state_dict(own, strict=False).missing_keys
    model.memory_bank = method.network.model.memory_bank
    batch = torch.stack(list(Images(images.test, method.config))).to(method.extractor.device)
    with torch.no_grad():
        model.eval().to(batch.device)
        expected = model((batch - method.extractor.model.mean) / method.extractor.model.std)
    found = method.score(images.test)
    assert np.allclose(found.image, expected.pred_score.cpu().numpy(), rtol=1e-3)
    assert np.allclose(found.map, expected.anomaly_map[:, 0].cpu().numpy(), rtol=1e-3, atol=1e-4)


def test_the_chosen_patches_are_those_of_anomalib(anomalib):
    from unittest.mock import patch
    from anomalib.models.components import KCenterGreedy
    from cse.baselines.anomalib import quiet
    from cse.baselines.anomalib_methods import _update_distances
    from cse.baselines.features import global_seed
    features = torch.rand(400, 30, generator=torch.Generator().manual_seed(0))
    def chosen():
        with global_seed(7), quiet():
            return KCenterGreedy(features, 0.2).select_coreset_idxs()
    expected = chosen()
    with patch.object(KCenterGreedy, 'update_distances', _update_distances):
        assert chosen() == expected


def test_original_forms_have_the_settings_of_their_papers(anomalib):
    def settings(name, *names):
        config = make_method(name, Config()).config
        return tuple(getattr(config, n) for n in names)
    wide, small = 'wide_resnet50_2.tv_in1k', 'resnet18.tv_in1k'
    assert settings('patchcore/original', 'layers', 'extractor') == ((2, 3), wide)
    assert settings('padim/original', 'extractor', 'crop') == (small, 224)
    found = settings('cfa/original', 'epochs', 'batch_size', 'lr', 'weight_decay')
    assert found == (30, 4, 1e-3, 5e-4)
    assert settings('fastflow/original', 'epochs', 'batch_size', 'crop') == (500, 32, 256)
    name = 'reverse_distillation/resnet18'
    assert settings(name, 'epochs', 'batch_size', 'lr') == (200, 16, 5e-3)
    assert settings(name, 'crop', 'layers', 'extractor') == (256, (1, 2, 3), small)


def test_settings_that_were_changed_win_over_those_of_the_method(anomalib):
    assert FastFlow(Config.smoke(epochs=3, lr=1e-2)).config.replace(profile='paper').lr == 1e-2
    assert FastFlow(Config.smoke(epochs=3)).config.epochs == 3
    assert FastFlow(Config.smoke()).config.epochs == 10
    wide = 'wide_resnet50_2.tv_in1k'
    given = CFA(Config(extractor='wide_resnet50_2', weights='some.safetensors'), original=wide).config
    assert (given.extractor, given.weights) == ('wide_resnet50_2', 'some.safetensors')
    other = CFA(Config.smoke(), original=wide).config
    assert other.weights == 'timm', 'the packaged weights belong to another network'
    for name in BASELINES:
        settled = make_method(name, Config()).config
        assert make_method(name, settled).config == settled


@pytest.mark.parametrize('layers, decoder', [
    ((1, 2, 3), 'mirrored ResNet'),
    ((2, 3), 'fitted to the features'),
])
def test_reverse_distillation_on_a_resnet(anomalib, images, layers, decoder):
    config = Config.smoke(**SMALL, layers=layers)
    method = make_method('reverse_distillation', config).fit(images.train, progress=False)
    assert method.config.layers == layers and method.about['decoder'] == decoder and len(method.history) == 1
    kind = 'OCBE' if layers == (1, 2, 3) else 'FittedBottleneck'
    assert type(method.network.model.bottleneck).__name__ == kind
    assert np.isfinite(method.score(images.test).image).all()


@pytest.mark.parametrize('shapes', [
    [(8, 7, 7)],
    [(4, 28, 28), (6, 14, 14), (8, 7, 7)],
    [(4, 25, 25), (4, 13, 13), (6, 13, 13), (8, 6, 6)],
])
def test_fitted_bottleneck_and_decoder_return_to_the_shapes(anomalib, shapes):
    from cse.baselines.reverse_distillation import FittedBottleneck, FittedDecoder
    squeezed = FittedBottleneck(shapes)([torch.randn(2, *s) for s in shapes])
    assert squeezed.shape == (2, 16, -(-shapes[-1][1] // 2), -(-shapes[-1][2] // 2))
    restored = FittedDecoder(shapes)(squeezed)
    assert [tuple(r.shape[1:]) for r in restored] == shapes and all((r < 0).any() for r in restored)


def test_reverse_distillation_refuses_maps_too_small_for_a_bottleneck(anomalib, images):
    with pytest.raises(ConfigError, match='2×2 positions.*at least 3×3'):
        method = make_method('reverse_distillation', Config.smoke(**SMALL | dict(resize=64, crop=64)))
        method.fit(images.train, progress=False)


def test_cfa_refuses_fewer_positions_than_neighbours(anomalib, images):
    with pytest.raises(ConfigError, match='crop=32, .* has 2×2 positions; expected at least 6'):
        CFA(Config.smoke(resize=32, crop=32)).fit(images.train, progress=False)


def test_a_grid_of_both_forms(anomalib, surface, tmp_path):
    small = Config.smoke(**SMALL, layers=(2, 3))
    methods = ['mean_distance', 'reverse_distillation']
    records = grid(small, surface, ['gravel'], methods, results=tmp_path, progress=False)
    assert [r['parameters'].get('decoder') for r in records] == [None, 'fitted to the features']


def test_a_record_tells_what_was_run(anomalib, surface, tmp_path):
    config = TINY.replace(epochs=1)
    record = run(config, surface, 'gravel', 'fastflow', results=tmp_path)
    settings = record['config']
    assert record['method'] == 'fastflow'
    assert (settings['batch_size'], settings['lr'], settings['epochs']) == (32, 1e-3, 1)
    parameters = dict(flow_steps=8, conv3x3_only=False, hidden_ratio=1.0, published_epochs=500)
    assert record['parameters'] == parameters and record['versions']['anomalib']
    assert len(record['training']['history']) == 1 and record['metrics']['pixel_auroc'] is not None
    assert run(config, surface, 'gravel', 'fastflow', results=tmp_path) == record, 'a finished run is read'
    padim = run(config, surface, 'gravel', 'padim', results=tmp_path)
    assert padim['training'] == dict(epochs=0, best_epoch=None, history=[])
    assert str(tmp_path) not in json.dumps(record)


def test_a_score_does_not_depend_on_the_images_beside_it(fitted, images):
    "anomalib validates on test images by default. Without them, the number of test images does not matter."
    method = fitted('fastflow')
    whole = method.score(images.test).image
    assert np.allclose(whole[:2], method.score(images.test[:2]).image, rtol=1e-4)


def test_a_diverged_training_run_raises(anomalib, images):
    from cse.training import TrainingError
    with pytest.raises(TrainingError, match='a smaller lr may help'):
        FastFlow(Config.smoke(**SMALL | dict(epochs=30, lr=1e6))).fit(images.train, progress=False)


def test_everything_else_works_without_anomalib(monkeypatch, images):
    monkeypatch.setitem(sys.modules, 'anomalib', None)
    with pytest.raises(ConfigError, match=r"pip install '.\[baselines\]'"):
        variant('patchcore', TINY)
    assert variant('cse', TINY)[1] == TINY
    method = MeanDistance(TINY).fit(images.train, progress=False)
    assert np.isfinite(method.score(images.test).image).all()


def test_names_stay_those_of_the_published_tables():
    assert {'cfa', 'patchcore', 'fastflow', 'padim', 'reverse_distillation'} <= METHODS.keys()
    assert fingerprint(variant('mean_distance', Config())[1]) == fingerprint(Config())


@pytest.mark.parametrize('name', [*SAME, 'mean_distance'])
def test_the_whole_method_is_one_network(fitted, images, name):
    "Speed is measured on this network."
    method = fitted(name)
    prepared = torch.stack(list(Images(images.test[:2], method.config))).to(method.extractor.device)
    with torch.no_grad():
        scores, maps = (t.cpu() for t in method.fuse()(prepared))
    found = method.score(images.test[:2])
    assert np.allclose(scores, found.image, rtol=1e-4)
    assert np.allclose(maps, found.coarse, rtol=1e-3, atol=1e-3)


# `make test`: one that OpenVINO compiles and one that stays in PyTorch; `make robustness`: all
COMPILED = [*SAME, 'mean_distance'] if os.environ.get('ROBUSTNESS_KILLS') else ['patchcore', 'fastflow']


@pytest.mark.parametrize('name', COMPILED)
def test_a_compiled_method_scores_as_before(fitted, images, name, caplog):
    "If OpenVINO fails or its outputs differ, PyTorch computes the head, with a warning."
    before = fitted(name).score(images.test).image
    method = copy.copy(fitted(name)).compile()
    assert np.allclose(method.score(images.test).image, before, rtol=1e-4)
    assert (method._whole is None) == ('PyTorch computes it instead' in caplog.text)
    assert method._whole is not None or name in ('fastflow', 'reverse_distillation'), caplog.text


def test_padim_needs_two_images(anomalib, images):
    with pytest.raises(DataError, match='at least 2'):
        BASELINES['padim'](TINY).fit(images.train[:1], progress=False)
