"`cse fit` for an engineer: what it says first, what it holds out, what it refuses, what it leaves behind."
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

import cse
from cse.cli import app
from cse.config import PROFILES, Config, from_profile
from cse.data.reading import image_files
from cse.deploy import fitting
from cse.deploy.fitting import fit_lines, unusual_images
from cse.deploy.runtime import Runtime
from cse.extensions.decisions import Calibration, images_needed
from cse.extensions.hybrid import HybridCSE
from cse.extractor import WeightsError, load_model

SMALL = ['--set', 'epochs=1', '--set', 'resize=64', '--set', 'crop=64', '--device', 'cpu',
         '--extractor', 'test_efficientnet', '--weights', 'random']


def run(*words, status=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == status, done.output
    return done


def refused(*words):
    "One line, of two sentences at most, and nothing on standard output."
    done = run(*words, status=2)
    lines = [line for line in done.stderr.replace('\r', '\n').splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and not done.stdout and lines[0].count('. ') <= 1
    return lines[0]


def write(folder, count, size=(64, 64), same=False):
    folder.mkdir(parents=True)
    for i in range(count):
        values = np.random.default_rng(0 if same else i).integers(90, 160, (*size[::-1], 3), np.uint8)
        Image.fromarray(values).save(folder / f'{i:02}.png')
    return folder


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp('data') / 'good', 30)


@pytest.fixture(scope='module')
def fitted(good, tmp_path_factory):
    "A detector, and what the command said."
    model = tmp_path_factory.mktemp('model') / 'my part.cse'
    return model, run('fit', good, '-o', model, *SMALL)


# --- what is held out

def test_images_kept_aside_promise_five_percent_where_they_can():
    kept = [fitting.images_kept(n) for n in range(4, 600)]
    assert kept == sorted(kept)
    for n, k in enumerate(kept, 4):
        assert k == 0 and n < 6 or 2 <= k <= n // 3 and (k >= 19 or n < 57)
    assert [fitting.images_kept(n) for n in (30, 60, 300)] == [10, 19, 60]
    assert fitting.images_wanted(0.05) == 57 and fitting.images_kept(fitting.images_wanted(0.01)) == 99


@pytest.mark.parametrize('kept', [0, 2, 10, 18, 19, 98, 99, 500])
def test_what_can_be_promised_is_said_in_two_sentences(kept):
    text = fitting.promise(kept)
    assert text.count('. ') <= 1 and ('5 %' in text) == (kept > 0)
    assert ('1 in' in text) == (0 < kept < images_needed(0.05))


# --- the profile

def test_inspection_is_the_smoke_profile_without_a_border_on_finer_maps():
    changed = {name for name in Config.smoke().to_dict()
               if getattr(from_profile('inspection'), name) != getattr(Config.smoke(), name)}
    assert changed == {'profile', 'resize', 'layers'}
    assert (from_profile('inspection').resize, from_profile('inspection').layers) == (224, (2, 3))
    assert fitting.method_of('inspection') == 'hybrid' and fitting.method_of('smoke') == 'cse'
    assert fitting.method_of('paper', 'hybrid') == 'hybrid'
    assert 'density_layers' in run('show-config', 'inspection').stdout
    assert 'density_layers' not in run('show-config', 'inspection', '--method', 'cse').stdout


def test_a_border_that_is_cut_off_is_told(good):
    images = fitting.good_files(good)
    def told(**settings):
        return str(fitting.Plan(images, Config.smoke(**settings), 'cse', 0))
    assert 'the outer 23 % cut off' in told() and 'whole' not in told()
    assert 'used whole at 224×224' in told(resize=224) and 'central 224×224 pixels' in told(resize=0)
    assert 'central square' in told(resize_mode='shorter')
    assert 'about' in told() and 'about' not in told(extractor='test_efficientnet')


# --- a fit

def test_a_fit_is_planned_shown_and_summed_up(fitted, good):
    model, done = fitted
    plan = done.stderr.splitlines()[0]
    assert '30 images of 64×64 pixels, used whole at 64×64, 10 kept aside' in plan and 'hybrid' in plan
    phases = 'reading', 'textures', 'extractor', 'features', 'training'
    shown = [done.stderr.find(phase) for phase in phases]
    assert -1 < shown[0] and shown == sorted(shown)
    lines = done.stdout.splitlines()
    assert lines[0].startswith('fitted on 20 images, threshold from 10 others, in ')
    assert '1 in 11' in lines[1] and '57' in lines[1]
    assert lines[-1].endswith(f"cse score '{model}' NEW_IMAGES")
    detector = cse.load(model)
    assert type(detector) is HybridCSE and detector.config.profile == 'inspection'
    assert f'threshold: {detector.calibration.threshold(0.1):.4g}' in lines[2]
    assert detector.fitted_on['sizes'] == Runtime(model).fitted_on['sizes'] == [[64, 64], [64, 64]]
    assert Image.open(model / 'unusual.jpg').size == (4 * 208 + 8, 3 * 244 + 8)
    assert str(model / 'unusual.jpg') in lines[3]
    assert Runtime(model).calibration.scores == pytest.approx(detector.calibration.scores, rel=1e-2)


def test_images_far_from_the_others_are_named():
    "Each kind is compared with its own: held-out images score higher than fitted ones."
    scores = np.concatenate([np.linspace(0.1, 0.2, 20), [0.9], np.linspace(0.5, 0.7, 9), [3.0]])
    calibration = Calibration(scores[21:])
    rows = unusual_images([f'{i}.png' for i in range(31)], scores, calibration)
    assert [Path(row['path']).stem for row in rows if row['far_out']] == ['30', '20']
    about = dict(images=21, calibration_images=10, threshold=3.0, model='part.cse')
    about |= dict(unusual=rows, sheet='x.jpg')
    assert 'x.jpg: 30.png, 20.png score far above the other good images' in fit_lines(about)
    names = [f'{i}.png' for i in range(29)]
    usual = unusual_images(names, np.delete(scores, [20, 30]), Calibration(scores[21:30]))
    assert not any(row['far_out'] for row in usual)
    assert 'most unusual good images: 28.png' in fit_lines(about | dict(unusual=usual))


def test_one_object_on_standard_output(good, tmp_path):
    options = '--json', '-q', '--method', 'cse', '--held-out', 0.2
    done = run('fit', good, '-o', tmp_path / 'm', *options, *SMALL)
    about = json.loads(done.stdout)
    assert about['images'] == 24 and about['calibration_images'] == 6 and not done.stderr
    assert about['alpha'] == about['smallest_alpha'] == 1 / 7
    aside = [row for row in about['unusual'] if row['kept_aside']]
    assert aside[0]['relative_score'] == 1 and len(aside) == 4 and len(about['unusual']) == 12
    names = {row['path'] for row in about['unusual']}
    assert len(names) == 12 and names < {str(path) for path in good.iterdir()}


def test_scores_of_the_fit_are_those_of_the_detector(good):
    config = from_profile('inspection', epochs=1, resize=64, crop=64, device='cpu', engine='torch',
                          extractor='test_efficientnet', weights='random')
    detector = HybridCSE(config).fit(good, progress=False, held_out=1 / 3)
    again = detector.score(detector.good.paths).image
    assert np.allclose(again, detector.good.image, rtol=1e-3, atol=1e-3)
    assert sorted(detector.good.image[-10:]) == pytest.approx(detector.calibration.scores)


def test_a_sheet_of_odd_images(tmp_path):
    grey = np.random.default_rng(0).integers(0, 4096, (40, 300), np.uint16)
    names = 'x' * 80 + '.png', '日本.png'
    for name in names:
        Image.fromarray(grey).save(tmp_path / name)
    rows = [dict(path=str(tmp_path / name), kept_aside=False, relative_score=None) for name in names]
    fitting.save_sheet(rows, tmp_path / 'sheet.jpg', bits=12)
    sheet = np.asarray(Image.open(tmp_path / 'sheet.jpg').convert('L')).astype(float)
    assert sheet.shape == (252, 840) and sheet[95:115, 20:200].std() > 10  # a picture, and not a black one


def test_a_threshold_that_promises_less_is_set_on_request_only(fitted, tmp_path):
    model = Path(shutil.copytree(fitted[0], tmp_path / 'model'))
    before = cse.load(model).calibration
    few, more = write(tmp_path / 'few', 8, (70, 64)), write(tmp_path / 'more', 12, (64, 70))
    message = refused('calibrate', model, few)
    assert 'comes from 10 images' in message and 'down to 9.09 %' in message and '--force' in message
    assert 'no less than 11.1 %' in message
    assert cse.load(model).calibration.scores == pytest.approx(before.scores)
    old = f'replaced: threshold {before.threshold(0.1):.4g} from 10 images, false-alarm rate at most 9.09 %'
    assert old in run('calibrate', model, more, '-q').stdout
    about = json.loads(run('calibrate', model, few, '--force', '-q', '--json').stdout)
    assert about['replaced']['calibration_images'] == 12 and about['calibration_images'] == 8


# --- what is refused, before PyTorch is needed

def test_images_that_cannot_be_used_are_told_together(tmp_path, monkeypatch):
    folder = write(tmp_path / 'good', 12)
    cut = (folder / '00.png').read_bytes()[:3000]
    for i in (3, 5, 7):
        (folder / f'{i:02}.png').write_bytes(cut)
    told = '3 of 12 images cannot be used (03.png, 05.png, 07.png): '
    message = refused('fit', folder, '-o', tmp_path / 'm', '-q', *SMALL)
    assert told in message and message.count('not a readable image') == 1
    monkeypatch.setitem(sys.modules, 'cse.deploy.saving', None)
    for i in range(6, 12):
        (folder / f'{i:02}.png').write_bytes(b'')  # known by its head
    message = refused('fit', folder, '-o', tmp_path / 'm', '-q', *SMALL)
    assert '8 of 12 images cannot be used (03.png, 05.png, 06.png, 07.png, 08.png and 3 more): ' in message
    assert not (tmp_path / 'm').exists()


def test_profiles_are_listed():
    lines = run('show-config').stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*fitting.PROFILES, 'next:']
    assert set(fitting.PROFILES) == set(PROFILES)
    assert json.loads(run('show-config', '--json').stdout) == fitting.PROFILES

def test_a_detector_is_replaced_on_request_only(fitted, good, tmp_path, monkeypatch):
    model = Path(shutil.copytree(fitted[0], tmp_path / 'model'))
    before = (model / 'model.json').read_bytes()
    monkeypatch.setattr('cse.extensions.hybrid.HybridCSE.fit', None)
    assert '--force' in refused('fit', good, '-o', model, *SMALL)
    assert '--force' in refused('calibrate', fitted[0], good, '-o', model)
    (model / 'training.pt').touch()
    fitting.check_free(model, resumed=True)  # its training goes on
    assert '--force' in refused('calibrate', fitted[0], good, '-o', model)
    (file := tmp_path / 'x.onnx').write_bytes(b'mine')
    assert '--force' in refused('export', fitted[0], '-o', file)
    assert file.read_bytes() == b'mine' and (model / 'model.json').read_bytes() == before
    monkeypatch.undo()
    (model / 'training.pt').unlink()
    run('fit', good, '-o', model, '--force', '-q', '--seed', 1, *SMALL)
    assert cse.load(model).seed == 1


@pytest.mark.parametrize('words, expected', [
    (('{three}',), '3 images; expected at least 4, and 57 or more'),
    (('{category}',), '{category}/train/good'),
    (('{good}', '--set', 'epoch=3'), "did you mean 'epochs'?"), (('{good}', '--set', 'qqq=3'), 'show-config'),
    (('{good}', '--set', 'embeders=3'), "'embedders'"), (('{good}', '--held-out', 'few'), 'expected auto'),
    (('{good}', '--held-out', '-0.1'), 'expected auto'), (('{good}', '--method', 'best'), 'cse, hybrid')])
def test_mistakes_are_answered_without_loading_anything(words, expected, good, tmp_path, monkeypatch):
    places = dict(good=good, three=write(tmp_path / 'three', 3), category=tmp_path / 'wood')
    write(tmp_path / 'wood/train/good', 4)
    monkeypatch.setitem(sys.modules, 'cse.deploy.saving', None)
    message = refused('fit', *(w.format(**places) for w in words), '-o', tmp_path / 'm', '-q')
    assert expected.format(**places) in message and 'Settings:' not in message
    assert not (tmp_path / 'm').exists()


def test_one_image_many_times_is_told(tmp_path, caplog):
    run('fit', write(tmp_path / 'same', 12, same=True), '-o', tmp_path / 'm', '-q', *SMALL)
    same, copies = (record.getMessage() for record in caplog.records)
    assert 'all 8 are the same, pixel by pixel' in same and '4 of 4 calibration images are copies' in copies


def test_sizes_of_images_are_told(tmp_path):
    folder = write(tmp_path / 'sizes', 4)
    Image.new('RGB', (200, 100)).save(folder / 'large.png')
    (folder / 'broken.png').write_bytes(b'')
    plan = fitting.Plan(fitting.good_files(folder), Config.smoke(), 'cse', 0)
    assert '6 images of 64×64 to 200×100 pixels' in str(plan)
    few, = plan.notes
    assert few.startswith('6 images show little') and not fitting.Plan([folder] * 30, None, 'cse', 0).notes


@pytest.mark.parametrize('typed, meant', [
    ('predict', 'score'), ('Infer', 'score'), ('detect', 'score'), ('train', 'fit'), ('test', 'evaluate'),
    ('evalute', 'evaluate'), ('scoer', 'score')])
def test_other_names_of_commands_lead_to_ours(typed, meant):
    assert refused(typed, 'a', 'b').endswith(f'{typed}: no such command; did you mean `cse {meant}`?')


def test_a_command_like_no_other():
    assert '`cse --help`' in refused('xyzzy')


def test_weights_out_of_reach_are_told_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr('timm.create_model', None)
    with pytest.raises(WeightsError, match='^use weights=.*packaged.*resnet18.*cannot be reached'):
        load_model('resnet18.a1_in1k', 'timm', (3, 4))


def test_a_detector_is_no_folder_of_images(fitted, good, tmp_path):
    inside = Path(shutil.copytree(good, tmp_path / 'parts'))
    shutil.copytree(fitted[0], inside / 'part.cse')
    assert (inside / 'part.cse/unusual.jpg').exists()
    assert len(image_files(inside)) == len(image_files(good))
    assert 'is the folder of a detector' in refused('score', fitted[0], fitted[0])
    assert 'is the folder of the images' in refused('fit', inside, '-o', inside, *SMALL)
