"Images that appear twice: a calibration on copies promises too much, and equal images have no variance."
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from cse import Config, HybridConfig, HybridCSE
from cse.data.good_images import find_copies, image_hash, small_pictures
from cse.data.images import Images
from cse.data.seeds import seeded, split
from cse.extensions.calibration import CalibratedCSE

TINY = dict(epochs=1, engine='torch', resize=64, crop=64, extractor='test_efficientnet',
            weights='random')


def surface(seed, side=96):
    "Stripes of one pattern and any phase, and noise: pictures of one surface."
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    values = 128 + 40 * np.sin(x / 3 + random.uniform(0, 6)) + 20 * np.sin(y / 5)
    values = values + random.normal(0, 8, (side, side))
    return np.clip(np.stack([values, 0.9 * values, 0.8 * values], 2), 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    "Twenty different images."
    (folder := tmp_path / 'good').mkdir()
    for i in range(20):
        Image.fromarray(surface(i)).save(folder / f'{i:02}.png')
    return folder


def warnings_of(call, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        call()
    return [r.getMessage() for r in caplog.records if 'promises too much' in r.getMessage()]


def fit(images, seed=0, **given):
    return CalibratedCSE(Config.smoke(**TINY), seed=seed).fit(images, progress=False, **given)


def test_different_images_are_no_copies(folder, caplog):
    assert warnings_of(lambda: fit(folder, held_out=0.4), caplog) == []
    assert warnings_of(lambda: fit(folder).calibrate(
        [surface(i) for i in range(50, 60)]), caplog) == []


@pytest.mark.parametrize('ending, options', [
    ('.png', {}), ('.bmp', {}), ('.tiff', {}), ('.webp', dict(lossless=True)), ('.jpg', dict(quality=90))])
def test_copies_across_the_split_are_told(folder, caplog, ending, options):
    "Copies with another name, and in another format."
    for i in range(20):
        Image.open(folder / f'{i:02}.png').save(folder / f'copy{i:02}{ending}', **options)
    told, = warnings_of(lambda: fit(folder, held_out=0.3), caplog)
    found = int(told.split()[0])
    assert f'{found} of 12 calibration images are copies' in told and found >= 8
    copy, original = re.search(r'(\d\d)\.\w+ of .*?(\d\d)\.\w+\)', told).groups()
    assert copy == original


def test_each_copy_is_counted_once(caplog):
    kept = split(40, 0.3, seeded(0, 'held out'))[1].tolist()
    both = sum(i + 20 in kept for i in kept)  # the second of them is a copy of the first
    told, = warnings_of(lambda: fit([surface(i) for i in range(20)] * 2, held_out=0.3), caplog)
    assert both and told.startswith(f'{12 - both} of 12 calibration images are copies')


def test_copies_among_calibration_images_are_told(folder, caplog):
    detector = fit(folder)
    three = [surface(50), surface(51), surface(50)]
    told, = warnings_of(lambda: detector.calibrate(three), caplog)
    assert told.startswith('1 of 3 calibration images are copies') and len(detector.calibration) == 3
    many = [Image.fromarray(surface(60))] * 30
    assert warnings_of(lambda: detector.calibrate(many), caplog)[0].startswith('29 of 30')


def test_what_has_no_detail_is_no_copy_of_another():
    config = Config.smoke(**TINY)
    flat = torch.linspace(0.2, 0.8, 12)[:, None, None, None].repeat(1, 3, 64, 64)
    images = torch.stack([*Images(flat, config)])
    assert find_copies([image_hash(i) for i in images], small_pictures(images), 12) == {}


# --- no variance

def scores(detector, *seeds):
    found = detector.score([surface(seed) for seed in seeds])
    assert np.isfinite(found.image).all() and np.isfinite(found.map).all()
    return found.image


@pytest.mark.parametrize('count, given', [
    (12, {}), (4, {}), (12, dict(held_out=0.3)), (9, dict(embedders=2))])
def test_a_hybrid_fitted_on_identical_images_scores_and_says_so(caplog, count, given):
    settings = {k: v for k, v in given.items() if k != 'held_out'}
    detector = HybridCSE(HybridConfig.smoke(**TINY, **settings))
    with caplog.at_level(logging.WARNING):
        detector.fit([surface(0)] * count, progress=False, held_out=given.get('held_out', 0))
    assert 'are the same, pixel by pixel' in caplog.text
    same, other = scores(detector, 0, 1)
    assert same < other


@pytest.mark.parametrize('seeds', [[0, 1] * 6, [0] * 11 + [1], [0, 1] * 2])
def test_a_hybrid_fitted_on_few_different_images_ranks(caplog, seeds):
    detector = HybridCSE(HybridConfig.smoke(**TINY)).fit([surface(s) for s in seeds], progress=False)
    assert 'pixel by pixel' not in caplog.text
    first, second, bad = scores(detector, 0, 1, 2)
    assert max(first, second) < bad and abs(bad) < 1e9
