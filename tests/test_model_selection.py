"Choices on training images alone: what is kept, what is refused, and that no test image has a say."
import shutil

import pandas as pd
import pytest
from cse import CSE, choice
from cse.config import ConfigError
from cse.data.builtin import builtin_surfaces


@pytest.fixture
def data(tmp_path):
    "Two surfaces in a folder, one with a name that looks like a number."
    for name in ('01', 'wood'): shutil.copytree(builtin_surfaces(['wood']) / 'wood', tmp_path / 'data' / name)
    return tmp_path / 'data'


@pytest.fixture
def asked(monkeypatch):
    "What evidence was asked for; none of it is measured."
    calls = []
    def made_up(paths, defects, config, name, seed):
        calls.append((name, seed, len(paths)))
        for i, candidate in enumerate(choice.candidates()): yield dict(category=name, seed=seed, candidate=candidate, kind='scars', auroc=0.5 + i / 1000 + 1e-9)
    monkeypatch.setattr(choice, '_one_surface', made_up)
    return calls


def test_evidence_is_gathered_once(data, asked, tmp_path):
    first, again = (choice.gather_evidence(str(data), seeds=2, results=str(tmp_path)) for _ in range(2))
    assert [call[:2] for call in asked] == [('01', 0), ('01', 1), ('wood', 0), ('wood', 1)]
    pd.testing.assert_frame_equal(first, again)
    assert choice.choose(again, '01') == choice.choose(first, 'wood')
    choice.gather_evidence(str(data), settings=dict(epochs=3), categories='wood', results=str(tmp_path))
    assert len(asked) == 5 and len(list((tmp_path / 'evidence').iterdir())) == 5


def test_test_images_have_no_say(data, asked, tmp_path):
    before = choice.gather_evidence(str(data), categories='wood', results=str(tmp_path))
    for part in ('test', 'ground_truth'):
        shutil.rmtree(data / 'wood' / part)
        shutil.copytree(builtin_surfaces(['tile']) / 'tile' / part, data / 'wood' / part)
    pd.testing.assert_frame_equal(before, choice.gather_evidence(str(data), categories='wood', results=str(tmp_path)))
    assert len(asked) == 1


def test_an_interrupted_training_is_no_evidence(data, monkeypatch, tmp_path):
    monkeypatch.setattr(CSE, 'fit', lambda self, *args, **kw: setattr(self, 'interrupted', True) or self)
    with pytest.raises(KeyboardInterrupt): choice.gather_evidence(str(data), categories='wood', results=str(tmp_path))
    assert not (tmp_path / 'evidence').exists() or not list((tmp_path / 'evidence').iterdir())


@pytest.mark.parametrize('wrong, words', [(dict(categories='wood'), 'two surfaces'), (dict(categories='wood,marble'), 'marble'), (dict(profiles='fast'), 'fast'), (dict(methods='cse,yolo'), 'yolo'),
                                          (dict(seeds=0), 'seeds'), (dict(evidence_seeds='many'), 'seeds'), (dict(settings=dict(embedders=3)), 'embedders'), (dict(settings=dict(epoch=1)), 'epochs')])
def test_refused_before_anything_runs(data, asked, tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words): choice.run_choice(str(data), results=str(tmp_path), **dict(methods='cse') | wrong)
    assert not asked and not list(tmp_path.glob('*.json'))


def test_a_typo_leaves_nobody_out():
    evidence = pd.DataFrame([dict(category=c, seed=0, candidate=choice.ALONE, kind='scars', auroc=.9) for c in ('a', 'b')])
    with pytest.raises(ConfigError, match="'A'"): choice.choose(evidence, 'A')
