"The detector in use: all kinds of input, decisions, interrupted training runs, saved files, commands."
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sklearn.base import clone
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import cse
from cse import CSE, Config, HybridConfig, HybridCSE
from cse.cli import app
from cse.config import ConfigError
from cse.data.builtin import builtin_surfaces
from cse.data.files import is_device
from cse.data.folders import load_category
from cse.data.good_images import image_hashes
from cse.data.images import DataError, Images, read_image
from cse.data.model_files import SCHEMA, ModelError, checksum
from cse.deploy.export import ExportError, export
from cse.extensions.calibration import CalibratedCSE, Calibration, CalibrationError
from cse.extensions.hybrid import PatchGaussians
from cse.fast.session import SavedState
from test_tilda import write_release

LONG = bool(os.environ.get('ROBUSTNESS_KILLS'))  # `make robustness` tries more
SMALL = dict(epochs=2, engine='torch', resize=104, crop=96)
TINY = SMALL | dict(resize=72, crop=64, extractor='test_efficientnet', weights='random')
FILES = 'model.json', 'model.safetensors'


@pytest.fixture(scope='module')
def wood():
    return builtin_surfaces(['wood']) / 'wood'


@pytest.fixture(scope='module')
def category(wood, tmp_path_factory):
    "A part of the surface: 10 good and 8 defective test images, and no more training images than needed."
    root = tmp_path_factory.mktemp('category') / 'wood'
    tests = sorted((wood / 'test/good').iterdir())[:10], sorted((wood / 'test/knot').iterdir())
    masks = [wood / 'ground_truth/knot' / f'{path.stem}_mask.png' for path in tests[1]]
    for path in (*sorted((wood / 'train/good').iterdir())[:4], *tests[0], *tests[1], *masks):
        target = root / path.relative_to(wood)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


@pytest.fixture(scope='module')
def good(wood):
    return sorted((wood / 'train/good').iterdir())[:24]


@pytest.fixture(scope='module')
def detector(good):
    return CalibratedCSE(Config.smoke(**SMALL)).fit(good, progress=False, held_out=0.4)


@pytest.fixture(scope='module')
def plain(good):
    "A detector that is not calibrated."
    return CalibratedCSE(Config.smoke(**TINY)).fit(good, progress=False)


@pytest.fixture(scope='module')
def saved(detector, tmp_path_factory):
    return detector.save(tmp_path_factory.mktemp('saved') / 'wood.cse')


@pytest.fixture(scope='module')
def hybrid(good):
    config = HybridConfig.smoke(**TINY, density_layers=(2, 3), embedders=2)
    return HybridCSE(config).fit(good, progress=False)


@pytest.fixture(scope='module')
def single(hybrid, good):
    "A detector like those before schema 5."
    return HybridCSE(hybrid.config.replace(density_patch=1, density_norm='none')).fit(good, progress=False)


def run(*words):
    "A command of the command line."
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def run_json(*words):
    return json.loads(run(*words, '--json', '-q').stdout)


def scored(*words):
    "What `cse score` prints for each image."
    return [json.loads(line) for line in run('score', *words, '--json', '-q').stdout.splitlines()]


def copied(folder, to):
    "A saved detector in a folder of the test's own."
    to.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy(folder / name, to)
    return to


# --- images of every kind

def test_every_kind_of_input_scores_alike(detector, good):
    files, expected = good[:3], detector.score(good[:3]).image
    opened = [Image.open(f).convert('RGB') for f in files]
    arrays = [np.asarray(i) for i in opened]
    tensors = torch.stack([read_image(f) for f in files])
    pairs = list(zip(tensors, range(3)))
    floats = np.stack(arrays) / np.float32(255)
    kinds = dict(strings=[str(f) for f in files], pil=opened, arrays=arrays, batch=np.stack(arrays),
                 floats=floats, tensor=tensors, dataset=pairs,
                 loader=DataLoader(pairs, batch_size=2, shuffle=True))
    for name, images in kinds.items():
        assert np.allclose(detector.score(images).image, expected, rtol=1e-4), name
    for single in (files[0], str(files[0]), opened[0], arrays[0]):
        assert np.allclose(detector.score(single).image, expected[:1], rtol=1e-4)


def test_images_of_the_size_of_the_crop_are_prepared_like_files(detector, tmp_path):
    array = np.random.default_rng(0).integers(256, size=(96, 96, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / 'small.png')
    by_file = Images(tmp_path, detector.config)[0]
    tensor = torch.from_numpy(array).permute(2, 0, 1)[None]
    for images in (array, Image.fromarray(array), tensor, tensor / 255):
        assert torch.equal(Images(images, detector.config)[0], by_file)
    prepared = Images(by_file[None], detector.config, prepared=True)
    assert torch.equal(prepared[0], by_file)
    assert detector.score(prepared).image == detector.score(array).image


def test_grey_arrays_of_8_and_16_bits():
    grey = np.arange(64 * 64).reshape(64, 64)
    config = Config(resize=40, crop=32)
    eight, sixteen = (grey // 16).astype(np.uint8), (grey // 16 * 257).astype(np.uint16)
    expected = Images(eight, config)[0]
    assert torch.allclose(expected, Images(sixteen, config)[0], atol=1e-6)
    same = Images(eight[..., None], config)[0]
    assert torch.equal(Images(Image.fromarray(eight), config)[0], same)
    assert len(Images(np.stack([eight] * 5), config)) == 5


@pytest.mark.parametrize('bad, words', [
    (np.zeros((64, 64, 4), np.uint8), r'\(64, 64, 4\)'), (np.zeros((64, 64), np.int32), 'int32'),
    (np.full((64, 64), 2.0), r'\[0, 1\]'), ([object()], 'object'), (7, 'int')])
def test_arrays_that_are_no_images_are_refused(bad, words):
    with pytest.raises(DataError, match=words):
        Images(bad, Config(resize=40, crop=32)).check()


def test_nearly_black_images_are_told(good, caplog):
    dark = [np.asarray(Image.open(g).convert('L')).astype(np.uint16) * 16 for g in good[:6]]  # 12 bits in 16
    CSE(Config.smoke(**TINY)).fit([Image.fromarray(d) for d in dark], progress=False)
    assert 'no value is above 0.0' in caplog.text


# --- fitting

def test_prototypes_go_where_the_head_goes(detector):
    head = detector.head().double()
    assert head.bank.prototypes.dtype == head.bank._matrix.dtype == torch.float64
    assert detector.bank.prototypes.dtype == torch.float32


def test_a_folder_of_more_than_good_images_is_refused(detector, wood):
    for folder in (wood, str(wood), wood.parent):
        for learn in (CSE(Config.smoke(**SMALL)).fit, copy.copy(detector).calibrate):
            with pytest.raises(DataError, match='expected .*train/good'):
                learn(folder)


@pytest.mark.parametrize('given, words', [
    (dict(seed='a'), "seed='a'"), (dict(seed=None), 'seed=None'), (dict(seed=1.5), 'seed=1.5'),
    (dict(config='smoke'), "config='smoke'"), (dict(config=Config.smoke), 'expected a Config')])
def test_constructor_refuses_what_it_cannot_use(detector, given, words):
    other = clone(detector)
    for make in (CSE, other.set_params):
        with pytest.raises(ConfigError, match=words):
            make(**given)
    assert other.get_params() == detector.get_params()


def test_a_seed_of_numpy_is_the_same_seed():
    seed = CSE(Config.smoke(), seed=np.int64(3)).seed
    assert seed == 3 and type(seed) is int


def test_a_refused_fit_leaves_the_detector_as_it_was(detector, good, tmp_path):
    detector, before = copy.copy(detector), repr(detector)
    scores = detector.score(good[:2]).image
    (broken := tmp_path / 'broken.png').write_bytes(good[0].read_bytes()[:99])
    cases = ((good, 3, 'held_out=3'), (good, '0.2', "held_out='0.2'"), (good[:3], 0, 'at least 4'),
             ([*good, broken], 0, 'broken.png'))
    for images, held_out, words in cases:
        with pytest.raises((ConfigError, DataError), match=words):
            detector.fit(images, progress=False, held_out=held_out)
    assert repr(detector.set_params()) == before
    assert np.array_equal(detector.score(good[:2]).image, scores)
    few = '2 defect-free images: expected at least 4.*held_out=0.2 keeps 2 of the 4 images'
    with pytest.raises(DataError, match=few):
        detector.fit(good[:4], progress=False, held_out=0.2)


def test_scikit_learn_habits(detector):
    other = clone(detector)
    assert other.config == detector.config and other.get_params() == detector.get_params()
    assert 'not fitted' in repr(other) and 'calibrated on' in repr(detector)
    assert other.set_params(seed=3).seed == 3
    with pytest.raises(ConfigError, match='epochs'):
        other.set_params(epochs=3)
    with pytest.raises(RuntimeError, match='not fitted'):
        other.score([])


# --- calibration

def test_decisions_follow_the_calibration(detector, wood):
    images = sorted((wood / 'test').rglob('*.png'))[::6]
    p, scores, n = detector.p_values(images), detector.score(images).image, len(detector.calibration)
    for alpha in (0.1, 0.5):
        flagged = detector.predict(images, alpha)
        assert set(flagged) <= {0, 1}
        assert np.array_equal(flagged, scores > detector.calibration.threshold(alpha))
        assert np.array_equal(flagged == 1, p <= alpha + 1e-12)
    with pytest.raises(CalibrationError, match=f'{n} calibration images'):
        detector.predict(images, 0.01)


def test_held_out_images_take_no_part_in_fitting(detector, plain, good):
    assert detector.fitted_on['images'] + len(detector.calibration) == len(good)
    other, fresh = copy.copy(plain), sorted(good[0].parents[2].glob('test/good/*'))[:5]
    with pytest.raises(CalibrationError, match='not calibrated'):
        other.predict(good[:1])
    with pytest.raises(DataError, match='5 of 5 images took part in fitting'):
        other.calibrate(good[:5])
    assert other.fitted_on['images'] == len(good) and len(other.calibrate(fresh).calibration) == 5
    for share in (-0.1, 1, 1.5):
        with pytest.raises(ConfigError, match='held_out'):
            CalibratedCSE(Config.smoke(**SMALL)).fit(good, progress=False, held_out=share)


def test_images_that_took_part_in_fitting_are_known(detector, saved, category, good, tmp_path):
    other = sorted((category / 'test/knot').iterdir())[:2]
    expected = [True] * len(good) + [False] * 2  # fitted on some, calibrated on the others
    assert detector.took_part([*good, *other]).tolist() == expected
    known = np.isin(image_hashes(Images(good, detector.config)), detector.seen['fitted'])
    assert known.sum() == detector.fitted_on['images'] < len(good)
    assert cse.load(saved).took_part(good).all()
    names = np.array([str(g) for g in good])[~known]  # an array of names
    assert len(copy.copy(detector).calibrate(names).calibration) == (~known).sum()
    with pytest.raises(DataError, match=f'{known.sum()} of {len(good)} images took part in fitting'):
        detector.calibrate(good)
    shutil.copytree(category, tmp_path / 'wood')
    for path in good[:3]:
        shutil.copy(path, tmp_path / 'wood/test/good' / f'again-{path.name}')
    done = run('evaluate', saved, tmp_path / 'wood', '--json', '-q')
    assert json.loads(done.stdout)['took_part'] == 3 and 'the figures are too good' in done.stderr


# --- interrupted training runs

def test_interrupted_run_leaves_no_record(surface, tmp_path, monkeypatch):
    from cse import training
    from cse.lab import runs
    validate, epochs = training.validate, []

    def stop(*args):
        epochs.append(1)
        if len(epochs) > 1:
            raise KeyboardInterrupt
        return validate(*args)

    monkeypatch.setattr(training, 'validate', stop)
    with pytest.raises(KeyboardInterrupt):
        runs.run(Config.smoke(**TINY), surface, 'gravel', results=tmp_path)
    assert epochs and not list((tmp_path / 'records').glob('*.json'))


KILLED = '''
import json, os, signal, sys
from cse import CSE, Config
from cse.fast.session import SavedState
settings, files, folder, last = json.loads(sys.argv[1])
write = SavedState.write
def killed(self, **state):
    write(self, **state)
    if len(state['history']['epochs']) == last: os.kill(os.getpid(), signal.SIGKILL)
SavedState.write = killed
CSE(Config.smoke(**settings)).fit(files, progress=False, folder=folder)
'''


@pytest.mark.parametrize('last', (1, 3, 7) if LONG else (3,))
def test_killed_training_is_taken_up_where_it_stopped(good, tmp_path, last):
    settings, folder, files = TINY | dict(epochs=8), tmp_path / 'wood.cse', good[:12]
    words = json.dumps([settings, [str(f) for f in files], str(folder), last])
    assert subprocess.run([sys.executable, '-c', KILLED, words]).returncode == -signal.SIGKILL
    assert not (folder / 'model.json').exists()
    state = torch.load(folder / 'training.pt', weights_only=True)
    assert len(state['history']['epochs']) == last
    config = Config.smoke(**settings)
    resumed, whole = (CSE(config).fit(files, progress=False, folder=f) for f in (folder, None))
    assert resumed.history == whole.history and len(whole.history) == 8
    assert torch.equal(resumed.bank.prototypes, whole.bank.prototypes)
    assert sorted(p.name for p in folder.iterdir()) == list(FILES)


def stop_after_writing(monkeypatch, name='training'):
    "Ctrl-C after the first epoch whose state goes into a file of this name."
    write = SavedState.write

    def stop(self, **state):
        write(self, **state)
        if self.path.stem == name:
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedState, 'write', stop)


def test_training_of_other_images_is_not_taken_up(good, tmp_path, monkeypatch):
    def fit(images=good, seed=0):
        return CSE(Config.smoke(**TINY), seed=seed).fit(images, progress=False, folder=tmp_path)

    stop_after_writing(monkeypatch)
    first, again = fit(), cse.load(tmp_path)
    assert first.interrupted and len(first.history) == 1
    assert again.score(good[:1]).image == first.score(good[:1]).image
    assert again.interrupted and repr(again) == repr(first) and 'epoch 1 of 1, interrupted' in repr(again)
    commands = ('score', tmp_path, good[0]), ('export', tmp_path, '-o', tmp_path / 'wood.txt')
    for words in commands:
        assert f'note: {tmp_path}: its training was interrupted' in run(*words).stderr
    assert 'holds a detector' not in run('fit', good[0].parent, '-o', tmp_path, '--held-out', 2).stderr
    monkeypatch.undo()
    for other in (dict(images=good[1:]), dict(seed=1)):
        with pytest.raises(RuntimeError, match='training.pt: belongs to a training'):
            fit(**other)
    (tmp_path / 'training.pt').write_bytes(b'nothing of the kind')
    with pytest.raises(RuntimeError, match='delete it to start again'):
        fit()


def test_training_is_taken_up_in_the_second_embedder(hybrid, good, tmp_path, monkeypatch):
    def fit():
        return HybridCSE(hybrid.config).fit(good, progress=False, folder=tmp_path)

    stop_after_writing(monkeypatch, 'training-1')
    first = fit()
    assert first.interrupted and len(first.embedders) == 2
    assert cse.load(tmp_path).score(good[:1]).image == first.score(good[:1]).image
    monkeypatch.undo()
    again = fit()
    assert not again.interrupted and not list(tmp_path.glob('training*'))
    assert np.array_equal(again.score(good).image, hybrid.score(good).image)
    one, two = (e.blocks[0][0].weight for e in hybrid.embedders)
    assert not torch.equal(one, two)


def test_only_states_of_the_training_are_removed(good, tmp_path):
    (mine := tmp_path / 'training_set.pt').write_text('not ours')
    CSE(Config.smoke(**TINY)).fit(good[:6], progress=False, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*FILES, mine.name]
    assert mine.read_text() == 'not ours'


# --- saved detectors

# the first schema that has a value
LATER = {'class': 4, 'interrupted': 3, 'seen': 3, 'fitted_on': 2, 'calibration': 2, 'sha256': 2}
DENSITY = dict(density_layers=[], density_channels=60, density_share=0.005, embedding_weight=0.25,
               embedders=1)  # settings that every configuration had


def write_old(detector, folder, schema, profile):
    "Write a detector as an earlier version did."
    about = json.loads((detector.save(folder) / 'model.json').read_text())
    config = (DENSITY if schema < 4 else {}) | about['config'] | dict(profile=profile)
    if schema < 4:
        del config['bits']
    for name in ('density_patch', 'density_norm'):
        config.pop(name, None)
    about = {k: v for k, v in about.items() if LATER.get(k, 1) <= schema}
    about |= dict(schema=schema, config=config)
    if schema > 1:
        about['sha256'] = checksum(about)
    (folder / 'model.json').write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize('schema', [1, 2, 3, 4])
def test_detectors_of_earlier_versions_load_as_what_they_are(detector, single, good, tmp_path, schema):
    for fitted, profile in ((detector, 'smoke'), (single, 'clean')):
        again = cse.load(write_old(fitted, tmp_path / profile, schema, profile))
        assert type(again) is type(fitted) and again.config == fitted.config and not again.interrupted
        assert np.array_equal(again.score(good).image, fitted.score(good).image)
    assert isinstance(CSE.load(tmp_path / 'smoke'), CalibratedCSE)
    assert bool(cse.load(tmp_path / 'smoke', bits=12).calibration) == (schema > 1)
    assert cse.load(tmp_path / 'smoke', bits=12).config == detector.config.replace(bits=12)


def test_saved_detectors_load_and_are_calibrated_anew(detector, saved, good, wood, tmp_path):
    again = cse.load(saved)
    assert repr(again) == repr(detector)
    assert np.array_equal(again.predict(good, 0.25), detector.predict(good, 0.25))
    for schema in (1, 2):
        old = write_old(detector, tmp_path / f'old{schema}', schema, 'smoke')
        done = run('calibrate', old, wood / 'test/good', '-o', tmp_path / f'new{schema}', '-q')
        assert 'threshold from 20 others' in done.stdout
        assert type(cse.load(tmp_path / f'new{schema}')) is CalibratedCSE


def test_tensors_of_a_saved_detector_are_what_was_fitted(saved):
    about = json.loads((saved / 'model.json').read_text())
    data = (saved / 'model.safetensors').read_bytes()
    assert hashlib.sha256(data).hexdigest() == about['tensors_sha256']
    assert about['class'] == 'CalibratedCSE' and sorted(p.name for p in saved.iterdir()) == list(FILES)


@pytest.mark.parametrize('change, words', [
    (dict(schema=SCHEMA + 1), 'a newer version wrote it'), (dict(schema=True), 'reads 1 to'),
    (dict(seed=7), 'was changed'), (dict(calibration=[9.0]), 'was changed'),
    (dict(tensors_sha256='0'), 'was changed'), (dict(config=None), 'was changed'),
    (dict(schema=1), 'was changed'), ({'class': 'HybridCSE'}, 'was changed')])
def test_changed_model_is_refused(saved, tmp_path, change, words):
    folder = copied(saved, tmp_path)
    about = json.loads((saved / 'model.json').read_text())
    assert about['sha256'] == checksum(about)
    (folder / 'model.json').write_text(json.dumps(about | change))
    with pytest.raises(ModelError, match=words):
        cse.load(folder)


@pytest.mark.parametrize('change, words', [
    (dict(config=[]), 'expected dict'), (dict(config=dict(epochs='many')), "epochs='many'"),
    (dict(seed='a'), "seed='a'"), (dict(channels=['a']), 'channels='), (dict(channels=7), 'channels=7'),
    (dict(extractor={}), 'other weights'), (dict(history=3), 'history=3'),
    (dict(best_epoch=None), 'best_epoch=None')])
def test_wrong_values_without_a_checksum_are_refused(detector, tmp_path, change, words):
    folder = write_old(detector, tmp_path, 1, 'smoke')
    about = json.loads((folder / 'model.json').read_text())
    (folder / 'model.json').write_text(json.dumps(about | change))
    with pytest.raises(ModelError, match=words):
        cse.load(folder)


def test_what_is_no_saved_detector_is_refused(saved, tmp_path):
    with pytest.raises(ModelError, match='Not a directory; expected a folder'):
        cse.load(saved / 'model.json')
    with pytest.raises(ModelError, match='holds a CalibratedCSE; expected a HybridCSE'):
        HybridCSE.load(saved)
    (tmp_path / 'model.json').write_text('[' * 10**5)
    (tmp_path / 'model.safetensors').touch()
    with pytest.raises(ModelError, match='is not JSON'):
        cse.load(tmp_path)
    (tmp_path / 'model.json').unlink()
    (tmp_path / 'model.json').mkdir()
    with pytest.raises(ModelError, match='Is a directory; expected a folder'):
        cse.load(tmp_path)


def test_any_changed_byte_of_a_saved_detector_is_refused(saved, tmp_path, record_property):
    draws, count = np.random.default_rng(0), 100 if LONG else 12
    for name in FILES:
        folder = copied(saved, tmp_path)
        whole = (saved / name).read_bytes()
        for place in draws.integers(len(whole), size=count):
            changed = bytes([whole[place] ^ int(draws.integers(1, 256))]) + whole[place + 1:]
            damaged = whole[:place] + (changed if draws.random() < 0.8 else b'')
            (folder / name).write_bytes(damaged)
            try:
                loaded = cse.load(folder)
            except ModelError as e:
                assert str(folder) in str(e)
            else:  # white space
                assert name == 'model.json' and json.loads(damaged) == json.loads(whole), loaded
    record_property('damaged', 2 * count)


def test_a_full_disk_names_the_file(detector, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'model.safetensors'}'"):
        detector.save(tmp_path)
    assert not any(tmp_path.iterdir())


# --- the hybrid detector

def test_a_saved_hybrid_detector_scores_alike(hybrid, good, tmp_path):
    "Gaussians of other maps than the embedder's; without its Gaussians a file is refused."
    scores = hybrid.score(good)
    assert hybrid.extractor.layers == (2, 3, 4) and list(hybrid.embedder.channels) == [48, 64]
    assert scores.coarse.shape[1:] == (8, 8) and (scores.coarse >= 0).all()
    assert np.array_equal(cse.load(hybrid.save(tmp_path)).score(good).image, scores.image)
    about = json.loads((tmp_path / 'model.json').read_text())
    tensors = load_tensors((tmp_path / 'model.safetensors').read_bytes())
    data = save_tensors({k: v for k, v in tensors.items() if not k.startswith('density')})
    (tmp_path / 'model.safetensors').write_bytes(data)
    about['tensors_sha256'] = hashlib.sha256(data).hexdigest()
    (tmp_path / 'model.json').write_text(json.dumps(about | dict(sha256=checksum(about))))
    with pytest.raises(ModelError, match='density_layers'):
        cse.load(tmp_path)


@pytest.mark.cpu
@pytest.mark.skipif(not find_spec('openvino'), reason='needs OpenVINO')
def test_the_hybrid_detector_in_the_other_engine(hybrid, good, tmp_path):
    expected = hybrid.score(good).image
    fast = cse.load(hybrid.save(tmp_path), engine='openvino')
    assert np.allclose(fast.score(good).image, expected, atol=1e-3)
    assert np.allclose(fast.compile().score(good).image, expected, atol=1e-3)


def test_without_weight_for_the_embedding_the_largest_distance_decides(hybrid, good):
    alone = copy.copy(hybrid)
    alone.config, alone._head = hybrid.config.replace(embedding_weight=0.0), None
    images = torch.stack([Images(good, alone.config)[i] for i in range(6)])
    with torch.no_grad():
        features = alone.extractor(images)
        maps = alone.density([features[i] for i in alone.config.density_places])
    distances = maps.amax((1, 2)).cpu().numpy()
    assert (np.argsort(alone.score(good[:6]).image) == np.argsort(distances)).all()


@pytest.mark.parametrize('density', [(4,), (2, 3, 4), (1, 4)])
def test_the_gaussians_may_have_any_layers(good, tmp_path, density):
    settings = TINY | dict(layers=(2, 3))
    alone = CSE(Config.smoke(**settings)).fit(good, progress=False)
    both = HybridCSE(HybridConfig.smoke(**settings, density_layers=density)).fit(good, progress=False)
    assert both.extractor.layers == tuple(sorted({2, 3, *density}))
    for name, expected in alone.embedder.state_dict().items():
        assert torch.allclose(both.embedder.state_dict()[name], expected, atol=1e-4), name
    again = cse.load(both.save(tmp_path / 'model'))
    assert np.allclose(again.score(good[:4]).image, both.score(good[:4]).image, atol=1e-4)


@pytest.mark.parametrize('norm, seen', [
    ('finest', [False, True]), ('all', [False, False]), ('none', [True, True])])
def test_light_and_contrast_of_an_image_are_seen_in_maps_that_are_not_normalised(norm, seen):
    generator = torch.Generator().manual_seed(0)
    features = [torch.rand(40, 6, size, size, generator=generator) for size in (8, 4)]
    gaussians = PatchGaussians(norm=norm)
    gaussians.fit(features, torch.arange(30), torch.arange(30, 40))
    usual = gaussians(features)
    for i, expected in enumerate(seen):
        brighter = [2 * f + 1 if i == j else f for j, f in enumerate(features)]
        assert torch.allclose(usual, gaussians(brighter), rtol=1e-2) != expected


def test_a_map_that_one_patch_covers_is_not_normalised():
    "The mean of a normalised map is 0, whatever the image shows."
    features = [torch.rand(40, 6, 2, 2, generator=torch.Generator().manual_seed(0))]
    gaussians = PatchGaussians()
    usual = gaussians.fit(features, torch.arange(30), torch.arange(30, 40))
    assert gaussians([5 * features[0][:4]]).min() > usual.max()


def test_baselines_get_the_maps_of_the_embedding_only(good):
    from cse.baselines.features import MeanDistance
    baseline = MeanDistance(HybridConfig.smoke(**TINY)).fit(good, progress=False)
    assert baseline.extractor.layers == (3, 4)


@pytest.mark.parametrize('settings', [
    dict(layers=()), dict(layers=(4, 3)), dict(density_layers=(1.5,)), dict(density_layers=(3, 2)),
    dict(density_layers=()), dict(density_patch=2), dict(density_norm='batch'),
    dict(embedding_weight=-1), dict(embedders=0),
    dict(split_seed=-2)])
def test_settings_of_the_hybrid_detector_that_cannot_be(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        HybridConfig(**settings)


# --- export

def test_export_says_what_it_cannot_do(detector, tmp_path):
    for bad, to in ((tmp_path / 'wood.txt', ''), (tmp_path / 'wood.onnx', 'openvino')):
        with pytest.raises(ConfigError, match='expected a file ending in'):
            export(detector, bad, to)
    with pytest.raises(RuntimeError, match='not fitted'):
        export(CSE(Config.smoke()), tmp_path / 'wood.xml')


def pretend_export(monkeypatch, detector, factors=(1, 1)):
    "Replace the export: empty files, with the scores of the detector times a factor."
    def write(path):
        path.touch()
        path.with_suffix('.bin').touch()

    def scored(path, images):
        assert path.exists()
        found = detector.score(Images(images, detector.config, prepared=True))
        return [factor * values for factor, values in zip(factors, (found.image, found.map))]

    monkeypatch.setattr('cse.deploy.export._openvino', lambda *args: write)
    monkeypatch.setattr('cse.deploy.export.run_exported', scored)


@pytest.mark.parametrize('factors, name', [((1.01, 1), 'scores'), ((1, 1.01), 'maps')])
def test_an_export_that_scores_differently_is_not_kept(detector, tmp_path, monkeypatch, factors, name):
    pretend_export(monkeypatch, detector, factors)
    with pytest.raises(ExportError, match=f'{name} differ from the detector by 1.0e-02'):
        export(detector, tmp_path / 'wood.xml')
    assert not list(tmp_path.iterdir())


# --- the command line

def test_help_does_not_load_pytorch():
    code = ("import sys\nfrom typer.testing import CliRunner\nfrom cse.cli import app\n"
            "assert 'export' in CliRunner().invoke(app, ['--help']).output\n"
            "print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_command_line(category, saved, tmp_path):
    folder, csv, maps = category / 'test/knot', tmp_path / 'out.csv', tmp_path / 'maps'
    files = sorted(p.name for p in folder.iterdir())
    found = scored(saved, folder, '--alpha', 0.1)
    names = 'path', 'decision', 'relative_score', 'score', 'p_value'
    assert [tuple(i) for i in found] == [names] * len(files)
    done = run('score', saved, folder, '--alpha', 0.1, '--csv', csv, '--overlays', maps, '-q')
    assert done.exit_code == 0
    assert done.stdout.endswith(f' of {len(files)} flagged (false-alarm rate at most 10 %)\n')
    assert len(csv.read_text().splitlines()) == 1 + len(files)
    assert sorted(p.name for p in maps.iterdir()) == files
    about = run_json('evaluate', saved, category, '--alpha', 0.1)
    assert {'auroc', 'false_positive_rate', 'detection_rate', 'pixel_auroc', 'aupro'} < about.keys()
    assert about['images'] == 18 and about['map_cells'] == '3×3'
    for command in (('score', saved, folder), ('evaluate', saved, category)):
        few = run(*command, '--alpha', 0.001, '-q')
        assert 'cannot promise' in few.stderr and few.exit_code == 2


def test_settings_of_a_profile_are_shown():
    paper = run('show-config', 'paper', '--json')
    assert json.loads(paper.stdout) == Config.paper().to_dict()
    joined = run('show-config', 'smoke', '--method', 'hybrid')
    assert 'density_layers = (2, 3)' in joined.stdout and 'density' not in paper.stdout


def test_the_method_is_fitted_and_read_again(good, tmp_path):
    (folder := tmp_path / 'good').mkdir()
    for path in good[:8]:
        shutil.copy(path, folder)
    small = [w for name, value in TINY.items() for w in ('--set', f'{name}={value}')]
    for method, kind in (('cse', CalibratedCSE), ('hybrid', HybridCSE)):
        model = tmp_path / method
        about = run_json('fit', folder, '-o', model, '--method', method, '--held-out', 0.3, *small)
        assert about['images'] + about['calibration_images'] == 8 and about['epochs'] == 2
        assert type(cse.load(model)) is kind and len(scored(model, folder)) == 8


def test_calibration_anew(category, saved, tmp_path):
    model, other, folder = copied(saved, tmp_path / 'wood.cse'), tmp_path / 'other.cse', tmp_path / 'few'
    few = sorted((category / 'test/good').iterdir())[:9]
    scores = scored(saved, category / 'test/good')
    folder.mkdir()
    for path in few:
        shutil.copy(path, folder)
    about = run_json('calibrate', model, folder, '-o', other)
    assert about['calibration_images'] == 9 and about['smallest_alpha'] == 0.1
    assert (model / 'model.json').read_bytes() == (saved / 'model.json').read_bytes()
    expected = sorted(image['score'] for image in scores[:9])
    assert np.allclose(cse.load(other).calibration.scores, expected, rtol=1e-4)
    assert run('calibrate', model, folder, '-q', '--force').exit_code == 0  # it promises less
    assert len(cse.load(model).calibration) == 9
    assert (model / 'model.safetensors').read_bytes() == (saved / 'model.safetensors').read_bytes()
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links/far').symlink_to(folder)
    (folder / 'back').symlink_to(tmp_path / 'links')  # in a circle
    assert run_json('calibrate', model, tmp_path / 'links')['calibration_images'] == 9
    (folder / 'back').unlink()
    assert run_json('evaluate', model, category)['took_part'] == 9
    (folder / 'broken.png').write_bytes(b'')
    before, done = (model / 'model.json').read_bytes(), run('calibrate', model, folder, '-q')
    assert done.exit_code == 2 and 'broken.png' in done.stderr
    assert (model / 'model.json').read_bytes() == before


def test_a_detector_without_a_threshold_scores_only(good, plain, category, tmp_path):
    "A `CSE` of the library has no calibration at all."
    bare = CSE(plain.config).fit(good[:6], progress=False).save(tmp_path)
    assert set(scored(bare, good[0])[0]) == {'path', 'score'}
    assert 'auroc' in run_json('evaluate', bare, category)
    done = run('calibrate', bare, category / 'test/good', '-q')
    assert done.exit_code == 2 and 'has no threshold' in done.stderr
    assert 'not calibrated' in run('score', bare, good[0], '--alpha', 0.05, '-q').stderr


def test_a_tilda_fabric_is_fitted_and_evaluated_with_one_split(tmp_path):
    release, model = write_release(tmp_path / 'tilda', count=10, size=(120, 110)), tmp_path / 'model'
    small = [w for name, value in (TINY | dict(epochs=1, tilda_train_share=0.6)).items()
             for w in ('--set', f'{name}={value}')]
    about = run_json('fit', release / 'tilda1', '-o', model, '--held-out', 0, *small)
    found = run_json('evaluate', model, release / 'tilda1')
    assert about['images'] == 6 and found['good'] == 4 and found['images'] == 74 and 'took_part' not in found


def test_a_fabric_of_a_tilda_release_is_evaluated(saved, tmp_path):
    release = write_release(tmp_path / 'tilda')
    about = run_json('evaluate', saved, release / 'tilda1')
    assert about['images'] == len(load_category(release, 'tilda1').test)
    assert 0 <= about['auroc'] <= 1 and 'aupro' not in about
    done = run('evaluate', saved, release / 'tilda2')
    assert done.exit_code == 2 and "'tilda2': not in" in done.stderr


@pytest.mark.parametrize('scale', [1e-3, 1e3])
def test_more_false_alarms_than_chance_explains_are_told(detector, category, tmp_path, scale):
    odd = copy.copy(detector)
    odd.calibration = Calibration(detector.calibration.scores * scale)
    done = run('evaluate', odd.save(tmp_path), category, '--alpha', 0.2, '--json')
    about = json.loads(done.stdout)
    told, high = 'cse calibrate' in done.stderr, about['false_positive_high']
    assert told == (about['false_positive_rate'] > high) == (scale < 1)
    assert about['false_positive_low'] < 0.2 < high < 1


def test_who_asks_for_decisions_without_a_calibration_is_refused(plain, good, tmp_path):
    model = plain.save(tmp_path / 'm.cse')
    asked = run('score', model, good[0], '--alpha', 0.05, '-q')
    silent = run('score', model, good[0], '-q')
    assert 'not calibrated' in asked.stderr and not silent.stderr
    assert asked.exit_code == 2 and silent.exit_code == 0
    assert silent.stdout.endswith('1 image scored; no verdicts without a threshold, run `cse calibrate`\n')
    for option in ('--html', '--overlays'):
        drawn = run('score', model, good[0], option, tmp_path / 'new')
        assert drawn.exit_code == 2 and f'{option}: this detector is not calibrated' in drawn.stderr


# --- what the command line writes

def test_a_pipe_is_written_and_a_link_is_kept(wood, saved, tmp_path):
    image, pipe, link = next((wood / 'test/good').iterdir()), tmp_path / 'pipe', tmp_path / 'link.csv'
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / 'far.csv')
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        found = scored(saved, image, '--csv', pipe)
        assert len(read.result(60).splitlines()) == 1 + len(found) == 2 and pipe.is_fifo()
    assert run('score', saved, image, '--csv', link, '-q').exit_code == 0
    assert link.is_symlink() and str(image) in (tmp_path / 'far.csv').read_text()
    assert is_device('/dev/stdout')
    assert not any(is_device(path) for path in (tmp_path, link, tmp_path / 'none'))


@pytest.mark.parametrize('option, words', [
    ('--csv', 'is a folder'), ('--overlays', 'no file can be written there')])
def test_places_that_cannot_be_written_are_found_before_the_work(saved, wood, tmp_path, option, words):
    place = tmp_path if option == '--csv' else saved / 'model.json'
    done = run('score', saved, wood / 'test', option, place)
    assert done.exit_code == 2 and words in done.stderr
    assert str(place) in done.stderr and 'scoring' not in done.stderr


def test_unreadable_images_do_not_cost_the_others(wood, saved, tmp_path):
    (folder := tmp_path / 'images').mkdir()
    for i, path in enumerate(sorted((wood / 'test/good').iterdir())[:3]):
        (folder / f'{i}.png').write_bytes(path.read_bytes()[:None if i else 99])
    done = run('score', saved, folder, '--json', '-q', '--overlays', tmp_path / 'maps')
    images = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and images[0]['score'] is None and images[1]['score'] > 0
    assert '1 of 3 images could not be read' in done.stderr
    assert len(list((tmp_path / 'maps').iterdir())) == 2


def test_any_file_name_is_written(wood, saved, tmp_path):
    image = os.fsencode(tmp_path) + b'/kn\xf6t.png'
    with open(image, 'wb') as file:
        file.write(next((wood / 'test/good').iterdir()).read_bytes())
    assert run('score', saved, tmp_path, '--csv', tmp_path / 'out.csv', '-q').exit_code == 0
    assert image in (tmp_path / 'out.csv').read_bytes()
    done = run('score', saved, tmp_path, '-q')
    assert done.exit_code == 0 and image in done.stdout_bytes


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
@pytest.mark.parametrize('place', [
    'cse.detector.CSE.score', 'PIL.Image.Image.save', 'csv.DictWriter.writerows'])
def test_scores_outlive_what_cannot_be_written(category, saved, tmp_path, monkeypatch, error, place):
    def fail(*args, **kw):
        raise error

    monkeypatch.setattr(place, fail)
    csv, maps, knots = tmp_path / 'out.csv', tmp_path / 'maps', category / 'test/knot'
    done = run('score', saved, knots, '--csv', csv, '--overlays', maps, '-q')
    written, scored = 'Image' in place, 'CSE' not in place
    assert csv.exists() == written
    if isinstance(error, KeyboardInterrupt):
        assert done.exit_code == 130
        assert ('the scores are written' if written else 'no scores were written') in done.stderr
        return
    assert done.exit_code == (1 if scored else 2)
    if written:
        assert 'maps/000.png: could not be written (No space left on device)' in done.stderr
        assert ' more' in done.stderr
    elif scored:
        assert 'out.csv: could not be written (No space left on device)' in done.stderr
        assert len(list(maps.iterdir())) == len(list(knots.iterdir()))


def test_images_and_detectors_are_not_written_over(wood, saved, tmp_path):
    image, model = tmp_path / 'good/a.png', copied(saved, tmp_path / 'wood.cse')
    image.parent.mkdir()
    shutil.copy(next((wood / 'test/good').iterdir()), image)
    cases = (('--csv', image, 'is one of the images'),
             ('--csv', model / 'model.json', 'lies in the folder of the detector'),
             ('--overlays', image.parent, 'another one'))
    for option, place, words in cases:
        done = run('score', model, image, option, place, '-q')
        assert done.exit_code == 2 and words in done.stderr and not done.stdout
    assert run('score', model, image, '-q').exit_code == 0 and [*image.parent.iterdir()] == [image]
    done = run('fit', image.parent, '-o', model)
    assert f'{model}: holds a detector' in done.stderr and '--force' in done.stderr
    assert done.exit_code == 2


def test_an_unreadable_test_image_does_not_cost_the_evaluation(category, saved, tmp_path, monkeypatch):
    category = Path(shutil.copytree(category, tmp_path / 'wood'))
    (broken := next((category / 'test/knot').iterdir())).write_bytes(b'')
    done = run('evaluate', saved, category, '--json', '-q')
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found['unreadable'] == 1 and found['images'] == 17
    assert '1 of 18 images could not be read' in done.stderr and 0 <= found['aupro'] <= 1
    (mask := category / f'ground_truth/knot/{broken.stem}_mask.png').write_bytes(b'')
    monkeypatch.setattr(CSE, 'score', None)  # masks are read before
    done = run('evaluate', saved, category)
    assert done.exit_code == 2 and str(mask) in done.stderr


MISTAKES = [
    ('fit nowhere -o x', 'no such folder'), ('fit {wood} -o x --set epochs', 'NAME=VALUE'),
    ('fit {wood} -o x --set epochs=-1', 'epochs=-1'), ('fit {wood} -o x --profile best', 'best'),
    ('fit {wood} -o x --set layers=(3,4) --set grey_textures=True --set epochs=-1', 'epochs=-1'),
    ('fit {wood} -o x --method cse --set density_layers=(3,)', 'density_layers'),
    ('fit {wood} -o x --method best', 'expected one of cse, hybrid'),
    ('fit {wood}/train/good -o x --textures nowhere', 'no such folder'),
    ('fit {wood}/train/good -o x --weights nothing.pth', 'no such file'),
    ('fit {wood}/train/good -o x --held-out 2', '--held-out 2'),
    ('fit {wood} -o x --set profile=paper', '--profile'), ('fit {wood} -o x', 'wood/train/good'),
    ('fit {wood}/.. -o x', '/train/good'), ('fit {wood}/test -o x', '{wood}/test/good'),
    ('fit _ -o x', 'is empty'), ('score {saved} _', 'is empty'), ('score {saved} {wood} --csv _', 'is empty'),
    ('score nowhere {wood}', 'no such file'), ('score {saved} nowhere', 'no such folder'),
    ('score {saved} {wood} --device abacus', 'abacus'),
    ('score {saved} {wood}/test --overlays {wood}/test/maps', 'another one'),
    ('score {saved} {wood}/test --alpha 5', 'between 0 and 1'),
    ('score {saved}/model.json {wood}', 'expected a folder'),
    ('evaluate {saved} {wood}/train', 'train'), ('evaluate {saved} {wood} --alpha 5', 'between 0 and 1'),
    ('evaluate {saved} nowhere', 'nowhere/train/good: no such folder'),
    ('export {saved} --to tflite', 'tflite'), ('export {saved} -o x.txt', 'x.txt'),
    ('calibrate {saved} {wood}', 'wood/train/good'), ('calibrate {saved} {wood}/test', '{wood}/test/good'),
    ('calibrate {saved} {wood}/train/good', 'took part in fitting'),
    ('calibrate {saved} nowhere', 'no such folder'), ('calibrate nowhere {wood}/test/good', 'no such file'),
    ('calibrate {saved} {wood}/test/good -o {saved}/model.json', 'no file can be written there'),
    ('tables 9', '9'), ('tables 1 --methods patchwork', 'patchwork'), ('tables 1 --seeds many', 'many'),
    ('show-config best', 'best'), ('show-config paper --method best', 'cse, hybrid')]


@pytest.mark.parametrize('words, expected', MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistakes_on_the_command_line_end_in_a_sentence(wood, saved, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    words = [w.format(wood=wood, saved=saved) for w in words.split()]
    done = run(*('' if w == '_' else w for w in words))
    assert done.exit_code == 2 and expected.format(wood=wood) in done.stderr
    assert 'Traceback' not in done.stderr and not (tmp_path / 'x').exists()


# --- tables and export by commands

def test_results_on_stdout_and_progress_on_stderr(tmp_path):
    command = 'tables', 1, '--categories', 'wood', '--methods', 'mean_distance', '--results', tmp_path
    done = run(*command)
    assert done.exit_code == 0 and done.stdout.startswith('**Table 1')
    assert '1 of 1 runs done' in done.stderr and 'runs done' not in done.stdout
    assert done.stdout.rstrip().endswith('all: 1 of 1 cells reproduced')
    table, = json.loads(run(*command, '--json').stdout)['tables']
    row, = (r for r in table['rows'] if r['category'] == 'wood' and r['ours'] is not None)
    assert table['table'] == 1 and 'built-in' in table['caption'] and f"{row['ours']:.1f}" in done.stdout


def test_the_files_of_an_export_are_named(plain, tmp_path, monkeypatch):
    pretend_export(monkeypatch, plain)
    files = [tmp_path / f'wood{ending}' for ending in ('.xml', '.bin')]
    model = plain.save(tmp_path / 'wood.cse')
    done = run('export', model, '--to', 'openvino', '--json')
    expected = dict(file=str(files[0]), files=[str(f) for f in files],
                    notes=str(tmp_path / 'wood.xml.md'), format='openvino')
    assert json.loads(done.stdout) == expected and all(f.is_file() for f in files)


def test_several_tables_keep_what_is_their_own(tmp_path, monkeypatch):
    from cse.lab.grid import GridError
    common = '--categories', 'wood', '--json', '--results', tmp_path / 'results'
    own = '--methods', 'mean_distance', '--tilda', 'nowhere'
    done = run('tables', 1, 2, *common, *own)
    assert done.exit_code == 2 and 'nowhere' in done.stderr
    assert not (tmp_path / 'results/records').exists(), 'a wrong folder is told before the first run'
    asked = {}

    def fail(number, **given):
        asked[number] = given
        raise GridError('not run here')

    monkeypatch.setattr('cse.lab.regenerate.run_table', fail)
    done = run('tables', 1, 2, *common)
    assert done.exit_code == 1 and json.loads(done.stdout) == dict(tables=[], failed=[1, 2])
    assert [asked[n]['categories'] for n in (1, 2)] == ['wood', '']
    run('tables', 2, '--categories', 'textile1', '--results', tmp_path / 'results')
    assert asked[2]['categories'] == 'textile1'
