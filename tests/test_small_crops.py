"At the smallest crop a map has one position, and batch statistics need two images."
import pytest
import torch

from cse import CSE, Config, HybridConfig, HybridCSE
from cse.baselines.mixed_teacher import MixedTeacher
from cse.classifier import ClassifierDetector
from cse.config import ConfigError
from cse.data.images import Images
from cse.fast.cache import FeatureCache
from cse.fast.defects import FastDefectGenerator
from cse.fast.engines import FastExtractor
from cse.fast.pairs import AHEAD, CachedPairs
from cse.training import PairSampler

IMAGES = torch.rand(80, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = dict(epochs=1, resize=32, crop=32, engine='torch', extractor='test_efficientnet',
             weights='random')


@pytest.mark.parametrize('count, given', [
    (4, {}), (13, {}), (13, dict(decoder='joint')), (13, dict(decoder='pretrained')), (5, dict(batch_size=2)),
    (9, dict(batch_size=3, validation_share=0.45)), (13, dict(pair_splits='two', validation_defects='fresh')),
    (13, dict(decoder_freeze='optimiser')), (6, dict(batch_size=1, decoder='none'))], ids=str)
def test_any_number_of_images_is_fitted(count, given):
    found = CSE(Config.smoke(**SMALL | given)).fit(IMAGES[:count], progress=False).score(IMAGES[:3])
    assert torch.from_numpy(found.image).isfinite().all()


def test_the_hybrid_and_the_classifier_are_fitted():
    HybridCSE(HybridConfig.smoke(**SMALL, embedders=2)).fit(IMAGES[:13], progress=False)
    ClassifierDetector(Config.smoke(**SMALL, batch_size=1)).fit(IMAGES[:5], progress=False)


@pytest.mark.parametrize('kind, given, words', [
    (CSE, dict(batch_size=1), 'batch_size=1, crop=32: .* expected batch_size=2, or a crop above 32'),
    (HybridCSE, dict(batch_size=1, decoder='joint'), 'batch_size=1'),
    (CSE, dict(layers=(4,)), r'crop=32, layers=\(4,\): the finest map has one position; .* above 32'),
    (ClassifierDetector, dict(layers=(4,)), 'one position'),
    (MixedTeacher, dict(batch_size=1), 'expected at least two images per batch')], ids=str)
def test_what_cannot_be_trained_is_refused_before_it(kind, given, words, monkeypatch):
    monkeypatch.setattr('cse.fast.session.train', None)
    settings = SMALL | dict(extractor='tf_efficientnet_lite0', weights='packaged') | given
    detector = kind((HybridConfig if kind is HybridCSE else Config).smoke(**settings))
    with pytest.raises(ConfigError, match=words):
        detector.fit(IMAGES[:8], progress=False)


@pytest.fixture(scope='module')
def parts():
    config = Config.smoke(**SMALL, batch_size=4)
    extractor = FastExtractor.from_config(config)
    return extractor, FastDefectGenerator.from_config(config), config


@pytest.mark.parametrize('count, sizes', [
    (18, [4, 4, 5]), (20, [4, 4, 4, 2]), (17, [4, 4, 4]), (AHEAD * 4 + 15, [4] * (AHEAD - 1) + [5])])
def test_a_single_last_pair_joins_the_step_before(parts, count, sizes):
    "Also if it would start the next group of images that pass the extractor together."
    extractor, defects, config = parts
    cache = FeatureCache(Images(IMAGES[:count], config), extractor, config)
    pairs = CachedPairs(cache, extractor, defects, config)
    plain = PairSampler(cache.images, extractor, defects, config)
    batches, expected = list(pairs.training(0)), list(plain.training(0))
    assert [len(batch[2]) for batch in batches] == sizes and len(pairs) == len(sizes)
    assert torch.equal(torch.cat([b[2] for b in batches]), torch.cat([b[2] for b in expected]))
    for k in (0, 1):
        mine, others = (torch.cat([b[k][-1] for b in some]) for some in (batches, expected))
        assert torch.allclose(mine, others, atol=1e-4)
    assert [len(b[2]) for b in CachedPairs(cache, extractor, defects, config, decodes=False).training(0)] == [
        len(b[2]) for b in expected]
