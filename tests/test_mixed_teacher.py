"MixedTeacher: the form of its students, repeatability, the settings of both forms, and a clear word where something cannot be had."
import json
import sys

import numpy as np
import pytest
import torch

from cse.config import Config, ConfigError
from cse.data.images import Images
from cse.data.folders import load_category
from cse.lab.parameters import suited
from cse.extractor import WeightsError
from cse.baselines.mixed_teacher import PEERS, MixedTeacher, ReducedStudent, Students
from cse.training import TrainingError

SMALL = dict(epochs=2, resize=64, crop=64, weights='random', engine='torch')


@pytest.fixture(scope='module')
def images(surface):
    return load_category(surface, 'gravel')


@pytest.fixture(scope='module')
def fitted(images):
    return MixedTeacher(Config.smoke(**SMALL), seed=3).fit(images.train, progress=False)


def test_the_reduced_student_has_the_published_size():
    assert sum(p.numel() for p in ReducedStudent().parameters()) == 317_888
    assert [f.shape[1:] for f in ReducedStudent((24, 40))(torch.rand(1, 3, 64, 64))] == [(24, 8, 8), (40, 4, 4)]


def test_the_same_seed_gives_the_same_scores(images, fitted, capfd):
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = MixedTeacher(Config.smoke(**SMALL, workers=1, cache_mb=0), seed=3).fit(images.train, progress=False)
    first, second = fitted.score(images.test), again.score(images.test)
    assert np.array_equal(first.image, second.image) and np.array_equal(first.map, second.map) and fitted.history == again.history
    assert torch.equal(torch.get_rng_state(), state), 'global generators are left as they were'
    assert capfd.readouterr() == ('', '')
    assert first.map.shape == (6, 64, 64) and np.allclose(first.map.max((1, 2)), first.image) and first.image.std() > 0
    assert np.allclose(fitted.score(images.test[:2]).image, first.image[:2], rtol=1e-4), 'test images have no part in fitting'
    other = MixedTeacher(Config.smoke(**SMALL), seed=4).fit(images.train, progress=False)
    assert not np.allclose(other.score(images.test).image, first.image)


def test_a_student_keeps_its_statistics_after_the_first_epoch(images, fitted):
    count = next(v for k, v in fitted.network.students.state_dict().items() if k.endswith('num_batches_tracked'))
    assert count == 1 and len(fitted.history) == 2 and fitted.best_epoch == 1 and not fitted.network.students.training
    live = MixedTeacher(Config.smoke(**SMALL), seed=3)
    live.config = live.config.replace(embedder_batchnorm='live')
    live.fit(images.train, progress=False)
    assert next(v for k, v in live.network.students.state_dict().items() if k.endswith('num_batches_tracked')) == 2


def test_the_deep_student_starts_as_its_teacher_and_the_teacher_stays(fitted):
    students = Students(fitted.shallow, fitted.extractor)
    assert all(torch.equal(a, b) for a, b in zip(students.deep.state_dict().values(), fitted.extractor.model.state_dict().values()))
    assert all(p.requires_grad for p in students.parameters()) and not any(p.requires_grad for p in fitted.extractor.model.parameters())
    trained = fitted.network.students.deep.state_dict()
    assert not any(torch.equal(v, trained[k]) for k, v in fitted.extractor.model.named_parameters())


def test_the_whole_method_is_one_network(images, fitted):
    "Speed is measured on it."
    prepared = torch.stack(list(Images(images.test[:2], fitted.config)))
    found = fitted.score(images.test[:2])
    with torch.no_grad():
        scores, maps = fitted.fuse()(prepared)
    assert np.allclose(scores, found.image, rtol=1e-4) and np.allclose(maps, found.coarse, rtol=1e-3)


def test_the_compiled_method_scores_the_same(images):
    pytest.importorskip('openvino')
    method = MixedTeacher(Config.smoke(**SMALL | dict(epochs=1, extractor='resnet10t', engine='openvino'))).fit(images.train, progress=False)
    before = method.score(images.test[:2])
    after = method.compile().score(images.test[:2])
    assert np.allclose(before.image, after.image, rtol=1e-3) and np.allclose(before.map, after.map, rtol=1e-2)


def test_the_original_form(images):
    paper = PEERS['mixed_teacher/original'](Config()).config
    assert (paper.extractor, paper.weights, paper.layers, paper.resize, paper.crop) == ('efficientnet_b0.ra_in1k', 'timm', (3, 4), 256, 256)
    assert (paper.epochs, paper.batch_size, paper.lr, paper.max_lr_factor, paper.checkpoint) == (100, 8, 4e-4, 10, 'last')
    assert PEERS['mixed_teacher/original'](Config.smoke()).config.weights == 'timm', 'the packaged weights belong to another network'
    method = PEERS['mixed_teacher/original'](Config.smoke(**SMALL)).fit(images.train, progress=False)
    assert method.extractor.info['name'] == 'efficientnet_b0.ra_in1k' and method.network.students.shallow.model.blocks[1].conv2.out_channels == 128
    assert method.about['shallow_teacher'] == dict(name='resnet18.tv_in1k', weights='random', tag='random', sha256=None) and method.about['published_epochs'] == 100
    assert np.isfinite(method.score(images.test).image).all()
    assert json.dumps(method.about)


def test_weights_of_both_teachers_from_files(images, tmp_path):
    import timm
    files = [tmp_path / 'b0.pth', tmp_path / 'r18.pth']
    for name, file in zip(('efficientnet_b0', 'resnet18'), files):
        torch.save(timm.create_model(name).state_dict(), file)
    config = Config.smoke(**SMALL | dict(epochs=1, extractor='efficientnet_b0', weights=str(files[0])))
    method = MixedTeacher(config, original='efficientnet_b0.ra_in1k', shallow_weights=str(files[1])).fit(images.train, progress=False)
    assert method.about['shallow_teacher']['tag'] == 'r18.pth' and len(method.about['shallow_teacher']['sha256']) == 64
    assert str(tmp_path) not in json.dumps(method.about)


def test_settings_that_were_changed_win_over_those_of_the_method():
    assert MixedTeacher(Config.smoke(epochs=7, lr=1e-3)).config.epochs == 7 and MixedTeacher(Config.smoke()).config.epochs == 4
    for make in PEERS.values():
        settled = make(Config.smoke()).config
        assert make(settled).config == settled


def test_what_cannot_be_had_is_refused(images):
    with pytest.raises(ConfigError, match='only the original form'):
        MixedTeacher(Config.smoke(), shallow_weights='resnet18.safetensors')
    with pytest.raises(WeightsError, match='missing.safetensors'):
        MixedTeacher(Config.smoke(**SMALL), original='efficientnet_b0', shallow_weights='missing.safetensors').fit(images.train, progress=False)
    with pytest.raises(ConfigError, match=r'strides \[16, 16, 16\].*expects 4 and 8'):
        MixedTeacher(Config.smoke(**SMALL | dict(extractor='vit_tiny_patch16_224', layers=(0,), resize=224, crop=224)))
    with pytest.raises(TrainingError, match='epoch .*smaller lr'):
        MixedTeacher(Config.smoke(**SMALL | dict(epochs=20, lr=1e30))).fit(images.train, progress=False)


def test_a_table_of_all_methods_says_which_cannot_take_the_extractor(capsys):
    config = Config.smoke(extractor='vit_tiny_patch16_224', weights='random', layers=(0,))
    assert suited(['cse', 'mixed_teacher', 'mean_distance'], config) == ['cse', 'mean_distance']
    assert capsys.readouterr().out.startswith("mixed_teacher: not run, extractor='vit_tiny_patch16_224': has maps of strides")
    assert suited(['mixed_teacher'], Config.smoke()) == ['mixed_teacher']


def test_it_works_without_anomalib(monkeypatch, images):
    monkeypatch.setitem(sys.modules, 'anomalib', None)
    assert np.isfinite(MixedTeacher(Config.smoke(**SMALL)).fit(images.train, progress=False).score(images.test).image).all()
