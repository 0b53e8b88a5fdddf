"What has the wrong type is refused by an error that names it."
import math
import re

import numpy as np
import pytest
import torch

import cse
from cse import CSE, Config
from cse.config import ConfigError
from cse.data.images import Images
from cse.deploy.export import export, run_exported
from cse.extensions.calibration import CalibratedCSE, Calibration, CalibrationError
from cse.lab.parameters import run_table

IMAGES = torch.rand(10, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CONFIG = Config.smoke(epochs=1, engine='torch', resize=64, crop=64,
                      extractor='test_efficientnet', weights='random')
TEN = Calibration(np.arange(10))
NO_NUMBERS = ['0.2', b'0.2', None, [0.2], (), {}, 0.2j, object(), np.array([0.2, 0.3]), torch.rand(2),
              math.nan, True]


def kind(value):
    "The name of a case; the value itself may look different in every process."
    return type(value).__name__


def refused(kind, words):
    return pytest.raises(kind, match=re.escape(words))


@pytest.fixture(scope='module')
def detector():
    return CalibratedCSE(CONFIG).fit(IMAGES, progress=False, held_out=0.4)


@pytest.mark.parametrize('value', NO_NUMBERS, ids=kind)
def test_no_rate_and_no_share(detector, value, monkeypatch):
    monkeypatch.setattr(CSE, 'score', None)  # before images are read
    for call in (lambda: detector.predict(IMAGES, alpha=value), lambda: TEN.threshold(value),
                 lambda: TEN.flags([1], value), lambda: TEN.allowed(value)):
        with refused(CalibrationError, f'alpha={value!r}: expected a number between 0 and 1'):
            call()
    with refused(CalibrationError, f'level={value!r}'):
        TEN.false_alarm_range(0.3, level=value)
    with refused(ConfigError, f'held_out={value!r}: expected a share'):
        CalibratedCSE(CONFIG).fit(IMAGES, progress=False, held_out=value)


@pytest.mark.parametrize('value', [v for v in NO_NUMBERS if v is not True] + [2.5, 0, -1], ids=kind)
def test_no_number_of_images(detector, value):
    with refused(ConfigError, f'batch_size={value!r}: expected a whole number'):
        detector.score(IMAGES, batch_size=value)
    if value is not None:
        with refused(CalibrationError, f'tested={value!r}: expected a number of images'):
            TEN.false_alarm_range(0.3, tested=value)


def test_numbers_of_all_kinds_are_numbers(detector):
    for alpha in (0.25, np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25)):
        assert TEN.threshold(alpha) == TEN.threshold(0.25)
    assert len(detector.score(IMAGES, batch_size=np.int64(3))) == len(IMAGES)
    assert TEN.false_alarm_range(0.3, tested=np.int32(5)) == TEN.false_alarm_range(0.3, 5)


@pytest.mark.parametrize('value', ['abc', ['a', 'b'], [1, 'x'], object(), {}, 0.2j, [[1], [2, 3]]], ids=kind)
def test_no_scores(value):
    for call in (Calibration, TEN.p_values, lambda scores: TEN.flags(scores, 0.3)):
        with pytest.raises(CalibrationError, match='expected numbers'):
            call(value)


@pytest.mark.parametrize('value', [3, 2.5, [1], b'x', {}], ids=kind)
def test_no_path(detector, value, tmp_path):
    calls = dict(folder=lambda: detector.save(value), path=lambda: export(detector, value)), \
        dict(folder=lambda: cse.load(value), path=lambda: run_exported(value, IMAGES)), \
        dict(folder=lambda: CSE(CONFIG).fit(IMAGES, progress=False, folder=value or 1))
    for group in calls:
        for name, call in group.items():
            with pytest.raises(ConfigError, match=f'{name}=.*: expected the path of a file or folder'):
                call()
    for name in ('data', 'textures', 'results'):
        with pytest.raises(ConfigError, match=f'{name}=.*: expected the path'):
            run_table(1, **{name: value or 1}, categories='wood', methods='cse', settings={'epochs': 1})


@pytest.mark.parametrize('given, words', [
    (dict(categories=3), "category '3': expected one of carpet"), (dict(categories=['3']), "category '3'"),
    (dict(categories='granite'), "'granite': expected one of"), (dict(profile=[1]), r'profile=\[1\]'),
    (dict(methods=[1]), "method='1'"), (dict(methods=3), "method='3'"), (dict(seeds=1.5), 'seeds=1.5'),
    (dict(seeds='a'), "seeds='a'"), (dict(scheduler=3), 'scheduler=3'),
    (dict(settings=[1]), r'settings=\[1\]'), (dict(device=3), 'device=3'),
    (dict(extractor=3), 'extractor=3')], ids=kind)
def test_tables(given, words, tmp_path):
    arguments = dict(categories='wood', results=str(tmp_path / 'new')) | given
    with pytest.raises(ConfigError, match=words):
        run_table(1, **arguments)
    assert not (tmp_path / 'new').exists()


def test_formats_and_sizes(detector, tmp_path):
    for value in ([1], 3, object()):
        with pytest.raises(ConfigError, match='cannot be written as'):
            export(detector, tmp_path / 'x.onnx', value)
    with pytest.raises(ConfigError, match="batch_size='3'"):
        next(Images(IMAGES, CONFIG).batches('3'))
