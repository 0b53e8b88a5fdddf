"Model selection: evidence is kept, test images take no part, bad parameters are refused."
import shutil

import pandas as pd
import pytest
from cse import CSE
from cse.config import ConfigError
from cse.data.builtin import builtin_surfaces
from cse.lab import model_selection
from cse.lab.model_selection import gather_evidence, run_model_selection, select_model


@pytest.fixture
def data(tmp_path):
    "Two surfaces in a folder, one with a name that looks like a number."
    wood = builtin_surfaces(['wood']) / 'wood'
    for name in ('01', 'wood'):
        shutil.copytree(wood, tmp_path / 'data' / name)
    return tmp_path / 'data'


@pytest.fixture
def asked(monkeypatch):
    "The requested evidence; nothing is measured."
    calls = []

    def made_up(paths, defects, config, name, seed):
        calls.append((name, seed, len(paths)))
        for i, candidate in enumerate(model_selection.candidates()):
            yield dict(category=name, seed=seed, candidate=candidate,
                       kind='scars', auroc=0.5 + i / 1000 + 1e-9)

    monkeypatch.setattr(model_selection, '_one_surface', made_up)
    return calls


def test_evidence_is_gathered_once(data, asked, tmp_path):
    first, again = (gather_evidence(str(data), seeds=2, results=str(tmp_path)) for _ in range(2))
    assert [call[:2] for call in asked] == [('01', 0), ('01', 1), ('wood', 0), ('wood', 1)]
    pd.testing.assert_frame_equal(first, again)
    assert select_model(again, '01') == select_model(first, 'wood')
    gather_evidence(str(data), settings=dict(epochs=3), categories='wood', results=str(tmp_path))
    assert len(asked) == 5
    assert len(list((tmp_path / 'evidence').iterdir())) == 5


def test_test_images_take_no_part(data, asked, tmp_path):
    wood = dict(categories='wood', results=str(tmp_path))
    before = gather_evidence(str(data), **wood)
    for part in ('test', 'ground_truth'):
        shutil.rmtree(data / 'wood' / part)
        shutil.copytree(builtin_surfaces(['tile']) / 'tile' / part, data / 'wood' / part)
    pd.testing.assert_frame_equal(before, gather_evidence(str(data), **wood))
    assert len(asked) == 1


def test_an_interrupted_training_run_is_no_evidence(data, monkeypatch, tmp_path):
    def interrupted(self, *args, **kw):
        self.interrupted = True
        return self

    monkeypatch.setattr(CSE, 'fit', interrupted)
    with pytest.raises(KeyboardInterrupt):
        gather_evidence(str(data), categories='wood', results=str(tmp_path))
    assert not list(tmp_path.glob('evidence/*'))


@pytest.mark.parametrize('wrong, words', [
    (dict(categories='wood'), 'two surfaces'),
    (dict(categories='wood,marble'), 'marble'),
    (dict(profiles='fast'), 'fast'),
    (dict(methods='cse,yolo'), 'yolo'),
    (dict(seeds=0), 'seeds'),
    (dict(evidence_seeds='many'), 'seeds'),
    (dict(settings=dict(embedders=3)), 'embedders'),
    (dict(settings=dict(epoch=1)), 'epochs'),
])
def test_refused_before_anything_runs(data, asked, tmp_path, wrong, words):
    parameters = dict(methods='cse', results=str(tmp_path)) | wrong
    with pytest.raises(ValueError, match=words):
        run_model_selection(str(data), **parameters)
    assert not asked and not list(tmp_path.glob('*.json'))


def test_an_unknown_surface_cannot_be_left_out():
    evidence = pd.DataFrame([
        dict(category=category, seed=0, candidate=model_selection.ALONE, kind='scars', auroc=.9)
        for category in ('a', 'b')])
    with pytest.raises(ConfigError, match="'A'"):
        select_model(evidence, 'A')
