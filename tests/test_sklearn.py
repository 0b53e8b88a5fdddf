"A detector among the estimators of scikit-learn, and scores that are indexed."
import logging

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from cse import CSE, CalibratedCSE, Config, HybridConfig, HybridCSE, Scores
from cse.baselines.features import MeanDistance
from cse.classifier import ClassifierDetector
from cse.data.images import DataError, Images
from cse.extensions.calibration import CalibrationError
from cse.fast.scikit_learn import labelled_good
from cse.metrics import auroc
from together import SETTINGS, images

CONFIG = Config.smoke(**SETTINGS)  # of random weights, which are fast
SHARP = Config.smoke(resize=64, crop=64, epochs=1)
QUIET = dict(progress=False)
X = images(24) / 2
Y = np.tile([0, 0, 1], 8)
X[Y == 1, :32] = 1  # every third image is half white
TWO = StratifiedKFold(2)


def ranked(detector, X, y): return auroc(y, detector.score(X).image)


@pytest.fixture(scope='module')
def fitted():
    return CalibratedCSE(SHARP).fit(X, Y, **QUIET, held_out=0.5)


# --- what is asked of an estimator

@pytest.mark.parametrize('kind', [CSE, CalibratedCSE, HybridCSE, ClassifierDetector, MeanDistance])
def test_every_detector_is_an_estimator(kind):
    config = HybridConfig.smoke(**SETTINGS) if kind is HybridCSE else CONFIG
    detector = kind(config, seed=3)
    other = clone(detector)
    assert type(other) is kind and other.get_params() == detector.get_params()
    assert not get_tags(detector).target_tags.required and get_tags(detector).requires_fit
    with pytest.raises(NotFittedError):
        check_is_fitted(detector)
    check_is_fitted(detector.fit(X, Y, **QUIET))
    assert np.array_equal(detector.score_samples(X), -detector.score(X).image)
    with pytest.raises(NotFittedError):
        check_is_fitted(clone(detector))


def test_a_fit_with_labels_is_that_of_the_good_images(fitted, caplog):
    alone = CalibratedCSE(SHARP).fit(X[Y == 0], **QUIET, held_out=0.5)
    assert np.array_equal(alone.score(X).image, fitted.score(X).image)
    assert not fitted.took_part(X[Y == 1]).any() and fitted.took_part(X[Y == 0]).all()
    with caplog.at_level(logging.WARNING):
        for labels in (Y.tolist(), Y == 1, pd.Series(Y), torch.from_numpy(Y), Y.astype(float)):
            assert len(labelled_good(Images(X, CONFIG), labels)) == 16
    assert caplog.text.count('8 of 24 images are labelled as defective') == 5


@pytest.mark.parametrize('labels, words', [
    (Y[:3], r'y: has shape \(3,\); expected a label for each of 24 images'), (1, r'shape \(\)'),
    (np.ones(24, int), 'labels all images as defective'), (2 * Y, 'holds .*2.*; expected 0 for good'),
    (1 - 2 * Y, 'holds .*-1'), (['good'] * 24, 'holds .*good'), (np.full(24, np.nan), 'holds .*nan')])
def test_labels_that_cannot_be_used(labels, words):
    for detector in (CSE(CONFIG), CalibratedCSE(CONFIG), MeanDistance(CONFIG)):
        with pytest.raises(DataError, match=words):
            detector.fit(X, labels, **QUIET)


# --- which way the numbers point

def test_decisions_follow_the_labels(fitted):
    margin, flags = (getattr(fitted, name)(X, alpha=0.2) for name in ('decision_function', 'predict'))
    assert np.array_equal(margin > 0, flags == 1) and flags[Y == 1].all()
    assert fitted.score_samples(X)[Y == 0].mean() > fitted.score_samples(X)[Y == 1].mean()
    with pytest.raises(CalibrationError, match='not calibrated'):
        CalibratedCSE(CONFIG).fit(X[Y == 0], **QUIET).decision_function(X)
    with pytest.raises(CalibrationError, match='cannot promise'):
        fitted.decision_function(X, alpha=0.01)


def test_figures_of_scikit_learn_come_out_right(monkeypatch):
    monkeypatch.setattr(CalibratedCSE.decision_function, '__defaults__', (0.25,))
    monkeypatch.setattr(CalibratedCSE.predict, '__defaults__', (0.25,))
    names = 'roc_auc', 'average_precision', 'balanced_accuracy'
    scoring = {name: name for name in names} | dict(ranked=ranked)
    found = cross_validate(CalibratedCSE(SHARP), X, Y, cv=TWO, scoring=scoring,
                           params=QUIET | dict(held_out=0.5), error_score='raise')
    assert all((found[f'test_{name}'] > 0.7).all() for name in scoring)
    assert np.array_equal(found['test_roc_auc'], found['test_ranked'])


@pytest.mark.parametrize('labels', [None, Y])
def test_score_is_not_taken_for_a_figure_of_merit(labels):
    with pytest.raises(ValueError, match='scoring must return a number'):
        cross_val_score(CSE(CONFIG), X, labels, cv=TWO if labels is not None else 2, params=QUIET)


# --- pipelines and searches

def test_pipelines(fitted):
    double = FunctionTransformer(lambda x: x / 2)
    pipe = make_pipeline(double, CalibratedCSE(SHARP))
    with pytest.raises(NotFittedError):
        pipe.predict(X)
    pipe.fit(2 * X, Y, calibratedcse__progress=False, calibratedcse__held_out=0.5)
    assert np.array_equal(pipe.predict(2 * X, alpha=0.2), fitted.predict(X, alpha=0.2))
    assert np.array_equal(pipe.score_samples(2 * X), fitted.score_samples(X))
    for scores in (pipe.score(2 * X), pipe.score(2 * X, Y)):
        assert np.array_equal(scores.image, fitted.score(X).image)
    assert 'CalibratedCSE' in repr(pipe) and 'CalibratedCSE' in pipe._repr_html_()
    clone(pipe).set_params(calibratedcse__seed=3)


def test_searches_choose_between_settings():
    grid = [dict(seed=[0, 1]), dict(config=[CONFIG.replace(clusters=2)])]
    search = GridSearchCV(CSE(CONFIG), grid, scoring=ranked, cv=TWO).fit(X, Y, **QUIET)
    assert len(search.cv_results_['params']) == 3 and search.best_score_ > 0
    check_is_fitted(search.best_estimator_)
    assert search.best_estimator_.fitted_on['images'] == 16


@pytest.mark.parametrize('kind', ['list', 'tensor', 'paths'])
def test_folds_of_other_kinds_of_images(kind, tmp_path):
    source = dict(list=list(X), tensor=torch.from_numpy(X).permute(0, 3, 1, 2)).get(kind)
    if kind == 'paths':
        source = [tmp_path / f'{i:02}.png' for i in range(len(X))]
        for path, x in zip(source, X): Image.fromarray((255 * x).astype(np.uint8)).save(path)
    (found,) = cross_val_score(CSE(SHARP), source, Y, scoring=ranked, cv=[next(TWO.split(X, Y))],
                               params=QUIET, error_score='raise')
    assert found > 0.9


# --- scores

NAMES = [f'{i}.png' for i in range(5)]
VALUES = np.array([3, 1, 4, 1, 5], np.float32)
INDICES = {
    'mask': VALUES > 2, 'list of booleans': [True, False, True, False, True], 'order': np.argsort(-VALUES),
    'list': [0, 2], 'negative': [-1, -3], 'tensor': torch.tensor([4, 0]), 'slice': slice(1, 4),
    'reversed': slice(None, None, -1), 'one': 3, 'last': -1, 'number': np.int64(2), 'none': [],
    'no mask': np.zeros(5, bool), 'repeated': [1, 1, 1],
    'series': pd.Series(VALUES > 2), 'range': range(0, 5, 2)}


@pytest.mark.parametrize('paths', [NAMES, None], ids=['files', 'arrays'])
@pytest.mark.parametrize('maps', [True, False])
@pytest.mark.parametrize('index', INDICES.values(), ids=INDICES)
def test_scores_are_indexed(index, paths, maps):
    coarse = np.arange(45, dtype=np.float32).reshape(5, 3, 3) if maps else None
    found = Scores(VALUES, coarse, 12, paths)[index]
    rows = np.arange(5)[np.asarray(index) if isinstance(index, (torch.Tensor, range)) else index]
    rows = np.atleast_1d(rows)
    assert isinstance(found, Scores) and len(found) == len(rows)
    assert np.array_equal(found.image, VALUES[rows])
    assert found.paths == (paths and [paths[i] for i in rows])
    assert found.map is None if not maps else found.map.shape == (len(rows), 12, 12)


@pytest.mark.parametrize('index', [5, -6, [0, 9], np.ones(4, bool), (0, 1), 1.5, 'a'])
def test_scores_are_not_indexed_by_anything_else(index):
    with pytest.raises(IndexError):
        Scores(VALUES, None, 12, NAMES)[index]


def test_scores_are_iterated():
    assert [one.paths for one in Scores(VALUES, None, 12, NAMES)] == [[name] for name in NAMES]
