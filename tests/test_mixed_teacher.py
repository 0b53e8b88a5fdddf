"MixedTeacher: its students, repeatability, the settings of both forms, and errors."
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
from cse.baselines.mixed_teacher import MixedTeacher, ReducedStudent, Students
from cse.baselines.registry import BASELINES
from cse.training import TrainingError

ORIGINAL = BASELINES['mixed_teacher/original']
SMALL = dict(epochs=2, resize=64, crop=64, weights='random', engine='torch')


@pytest.fixture(scope='module')
def images(surface):
    return load_category(surface, 'gravel')


@pytest.fixture(scope='module')
def fitted(images):
    return MixedTeacher(Config.smoke(**SMALL), seed=3).fit(images.train, progress=False)


def test_the_reduced_student_has_the_published_size():
    assert sum(p.numel() for p in ReducedStudent().parameters()) == 317_888
    maps = ReducedStudent((24, 40))(torch.rand(1, 3, 64, 64))
    assert [f.shape[1:] for f in maps] == [(24, 8, 8), (40, 4, 4)]


def test_the_same_seed_gives_the_same_scores(images, fitted, capfd):
    torch.manual_seed(2)
    state = torch.get_rng_state()
    config = Config.smoke(**SMALL, workers=1, cache_mb=0)
    again = MixedTeacher(config, seed=3).fit(images.train, progress=False)
    first, second = fitted.score(images.test), again.score(images.test)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.map, second.map)
    assert fitted.history == again.history
    assert torch.equal(torch.get_rng_state(), state), 'global generators are left as they were'
    assert capfd.readouterr() == ('', '')
    assert first.map.shape == (6, 64, 64) and first.image.std() > 0
    assert np.allclose(first.map.max((1, 2)), first.image)
    alone = fitted.score(images.test[:2]).image
    assert np.allclose(alone, first.image[:2], rtol=1e-4), 'scores depend on other images'
    other = MixedTeacher(Config.smoke(**SMALL), seed=4).fit(images.train, progress=False)
    assert not np.allclose(other.score(images.test).image, first.image)


def batches_tracked(students):
    state = students.state_dict()
    return next(v for k, v in state.items() if k.endswith('num_batches_tracked'))


def test_a_student_keeps_its_statistics_after_the_first_epoch(images, fitted):
    students = fitted.network.students
    assert batches_tracked(students) == 1 and not students.training
    assert len(fitted.history) == 2 and fitted.best_epoch == 1
    live = MixedTeacher(Config.smoke(**SMALL), seed=3)
    live.config = live.config.replace(embedder_batchnorm='live')
    live.fit(images.train, progress=False)
    assert batches_tracked(live.network.students) == 2


def test_the_deep_student_starts_as_its_teacher_and_the_teacher_stays(fitted):
    students = Students(fitted.shallow, fitted.extractor)
    teacher = fitted.extractor.model
    pairs = zip(students.deep.state_dict().values(), teacher.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.requires_grad for p in students.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    trained = fitted.network.students.deep.state_dict()
    assert not any(torch.equal(v, trained[k]) for k, v in teacher.named_parameters())


def test_the_whole_method_is_one_network(images, fitted):
    "Speed is measured on this network."
    prepared = torch.stack(list(Images(images.test[:2], fitted.config)))
    found = fitted.score(images.test[:2])
    with torch.no_grad():
        scores, maps = (t.cpu() for t in fitted.fuse()(prepared.to(fitted.extractor.device)))
    assert np.allclose(scores, found.image, rtol=1e-4) and np.allclose(maps, found.coarse, rtol=1e-3)


@pytest.mark.cpu
def test_the_compiled_method_scores_the_same(images):
    pytest.importorskip('openvino')
    config = Config.smoke(**SMALL | dict(epochs=1, extractor='resnet10t', engine='openvino'))
    method = MixedTeacher(config).fit(images.train, progress=False)
    before = method.score(images.test[:2])
    after = method.compile().score(images.test[:2])
    assert np.allclose(before.image, after.image, rtol=1e-3) and np.allclose(before.map, after.map, rtol=1e-2)


def test_the_original_form(images):
    paper = ORIGINAL(Config()).config
    b0 = 'efficientnet_b0.ra_in1k'
    assert (paper.extractor, paper.weights, paper.layers) == (b0, 'timm', (3, 4))
    assert (paper.resize, paper.crop) == (256, 256)
    assert (paper.epochs, paper.batch_size, paper.checkpoint) == (100, 8, 'last')
    assert (paper.lr, paper.max_lr_factor) == (4e-4, 10)
    assert ORIGINAL(Config.smoke()).config.weights == 'timm', 'the packaged weights belong to another network'
    method = ORIGINAL(Config.smoke(**SMALL)).fit(images.train, progress=False)
    assert method.extractor.info['name'] == b0
    student = method.network.students.shallow.model
    assert student.blocks[1].conv2.out_channels == 128
    teacher = dict(name='resnet18.tv_in1k', weights='random', tag='random', sha256=None)
    assert method.about['shallow_teacher'] == teacher
    assert method.about['published_epochs'] == 100
    assert np.isfinite(method.score(images.test).image).all()
    assert json.dumps(method.about)


def test_weights_of_both_teachers_from_files(images, tmp_path):
    import timm
    files = [tmp_path / 'b0.pth', tmp_path / 'r18.pth']
    for name, file in zip(('efficientnet_b0', 'resnet18'), files):
        torch.save(timm.create_model(name).state_dict(), file)
    config = Config.smoke(**SMALL | dict(epochs=1, extractor='efficientnet_b0', weights=str(files[0])))
    method = ORIGINAL(config, shallow_weights=str(files[1])).fit(images.train, progress=False)
    teacher = method.about['shallow_teacher']
    assert teacher['tag'] == 'r18.pth' and len(teacher['sha256']) == 64
    assert str(tmp_path) not in json.dumps(method.about)


def test_settings_that_were_changed_win_over_those_of_the_method():
    assert MixedTeacher(Config.smoke(epochs=7, lr=1e-3)).config.epochs == 7
    assert MixedTeacher(Config.smoke()).config.epochs == 4
    for make in (MixedTeacher, ORIGINAL):
        settled = make(Config.smoke()).config
        assert make(settled).config == settled


def test_what_cannot_be_had_is_refused(images):
    with pytest.raises(ConfigError, match='only the original form'):
        MixedTeacher(Config.smoke(), shallow_weights='resnet18.safetensors')
    with pytest.raises(WeightsError, match='missing.safetensors'):
        method = ORIGINAL(Config.smoke(**SMALL), shallow_weights='missing.safetensors')
        method.fit(images.train, progress=False)
    with pytest.raises(ConfigError, match=r'strides \[16, 16, 16\].*expects 4 and 8'):
        transformer = dict(extractor='vit_tiny_patch16_224', layers=(0,))
        MixedTeacher(Config.smoke(**SMALL | transformer | dict(resize=224, crop=224)))
    with pytest.raises(TrainingError, match='epoch .*smaller lr'):
        MixedTeacher(Config.smoke(**SMALL | dict(epochs=20, lr=1e30))).fit(images.train, progress=False)


def test_a_table_of_all_methods_says_which_cannot_take_the_extractor(capsys):
    config = Config.smoke(extractor='vit_tiny_patch16_224', weights='random', layers=(0,))
    assert suited(['cse', 'mixed_teacher', 'mean_distance'], config) == ['cse', 'mean_distance']
    expected = "mixed_teacher: not run, extractor='vit_tiny_patch16_224': has maps of strides"
    assert capsys.readouterr().out.startswith(expected)
    assert suited(['mixed_teacher'], Config.smoke()) == ['mixed_teacher']


def test_it_works_without_anomalib(monkeypatch, images):
    monkeypatch.setitem(sys.modules, 'anomalib', None)
    method = MixedTeacher(Config.smoke(**SMALL)).fit(images.train, progress=False)
    assert np.isfinite(method.score(images.test).image).all()
