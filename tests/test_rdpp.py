"RD++: losses by hand, noise, equal scores from equal seeds, settings of the original, and errors."
import sys

import numpy as np
import pytest
import torch

from cse.config import Config, ConfigError
from cse.data.images import Images
from cse.data.folders import load_category
from cse.data.seeds import seeded
from cse.baselines.rdpp import RDpp, add_noise, contrast_loss, cosine_loss, losses
from cse.baselines.rdpp import octave_noise, simplex_noise, transport_loss
from cse.baselines.registry import BASELINES

SMALL = dict(
    epochs=2,
    extractor='tf_efficientnet_lite0',
    weights='random',
    engine='torch',
    layers=(2, 3),
    resize=128,
    crop=128,
)


@pytest.fixture(scope='module')
def packages():
    for name in ('anomalib', 'geomloss'):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[baselines]'")


@pytest.fixture(scope='module')
def images(surface):
    return load_category(surface, 'gravel')


@pytest.fixture(scope='module')
def fitted(packages, images):
    return RDpp(Config.smoke(**SMALL), seed=3).fit(images.train, progress=False)


def test_the_same_seed_gives_the_same_scores(fitted, images, capfd):
    torch.manual_seed(1)
    state, first = torch.get_rng_state(), fitted.score(images.test)
    again = RDpp(fitted.config.replace(workers=1), seed=3).fit(images.train, progress=False)
    assert again.history == fitted.history and torch.equal(torch.get_rng_state(), state)
    second = again.score(images.test)
    assert np.array_equal(first.image, second.image) and np.array_equal(first.map, second.map)
    other = RDpp(fitted.config, seed=4).fit(images.train, progress=False).score(images.test)
    assert not np.array_equal(first.image, other.image)
    assert capfd.readouterr() == ('', ''), 'output of others gets through'


def test_a_network_from_features_to_scores(fitted, images):
    found = fitted.score(images.test)
    assert found.map.shape == (6, 128, 128) and np.isfinite(found.map).all() and found.image.std() > 0
    with torch.no_grad():
        prepared = torch.stack(list(Images(images.test[:2], fitted.config)))
        scores, maps = (t.cpu() for t in fitted.fuse()(prepared.to(fitted.extractor.device)))
    assert np.allclose(scores, found.image[:2], rtol=1e-4)
    assert np.allclose(maps, found.map[:2], rtol=1e-3, atol=1e-4)
    names = ['contrast', 'distillation', 'epoch', 'loss', 'reconstruction', 'transport']
    assert [sorted(h) for h in fitted.history] == [names] * 2
    assert fitted.best_epoch == 1


def test_the_map_adds_distances_and_smooths_them(fitted, images):
    from scipy.ndimage import gaussian_filter
    with torch.no_grad():
        features = fitted.extractor(Images(images.test, fitted.config)[0][None])
        network = fitted.head()
        restored = network.restore(network.project(features))
        expected = 0
        for f, r in zip(features, restored):
            distance = 1 - (f * r).sum(1) / (f.norm(dim=1) * r.norm(dim=1))
            enlarged = torch.nn.functional.interpolate(
                distance[:, None], (128, 128), mode='bilinear', align_corners=True)
            expected = expected + enlarged[0, 0]
        found = network(*features)[1][0].cpu()
    assert np.allclose(found, gaussian_filter(expected.cpu().numpy(), 4, mode='mirror'), atol=1e-4)


def test_losses_by_hand(packages):
    def maps(purpose):
        return [torch.randn(3, 4, n, n, generator=seeded(0, purpose, n)) for n in (4, 2)]
    clean, noisy, projected, noisy_projected, restored = map(maps, range(5))
    noisy[0] = projected[0] + 0.1 * noisy[0]  # near enough for the margin
    def cosines(a, b):
        a, b = (m.double().reshape(3, -1).numpy() for m in (a, b))
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    distillation = sum((1 - cosines(a, b)).mean() for a, b in zip(restored, clean))
    reconstruction = sum((1 - cosines(a, b)).mean() for a, b in zip(noisy_projected, projected))
    contrast = sum(np.maximum(cosines(a, b) - 0.5, 0).mean() for a, b in zip(noisy, projected))
    order = torch.tensor([2, 0, 1])
    found = losses(clean, noisy, projected, noisy_projected, restored, order)
    assert contrast > 0.3 and abs(found['transport']) < 1e-6
    loss = distillation + 0.2 * (0.01 * reconstruction + 0.1 * contrast) / 1.11
    expected = dict(loss=loss, distillation=distillation, reconstruction=reconstruction, contrast=contrast)
    assert {k: found[k].item() for k in expected} == pytest.approx(expected, rel=1e-5)
    assert cosine_loss(restored, clean) == found['distillation']
    assert contrast_loss(noisy, projected) == found['contrast']
    assert transport_loss(projected, order) == found['transport']


def test_noise_is_that_of_the_library():
    library = pytest.importorskip('opensimplex').OpenSimplex(11)
    points = np.random.default_rng(0).uniform(-20, 20, (300, 3))
    expected = np.array([library.noise3(*p) for p in points])
    found = simplex_noise(points, library._perm)
    assert np.abs(found - expected).max() < 1e-4 and np.abs(found).max() > 0.4


@pytest.mark.parametrize('size', [64, 224, 256])
def test_noise_lies_in_one_rectangle(size):
    image = torch.full((3, size, size), 0.5)
    changed = [(add_noise(image, seeded(0, 'noise', i)) != image).any(0) for i in range(20)]
    sides = [(int(c.any(1).sum()), int(c.any(0).sum())) for c in changed]
    assert len(set(sides)) > 5
    for mask, (h, w) in zip(changed, sides):
        assert all(round(size * 10 / 256) <= side <= size // 8 for side in (h, w))
        assert mask.float().mean() * size ** 2 >= 0.95 * h * w
    assert (image == 0.5).all(), 'the image itself is unchanged'
    first, again = (octave_noise(9, 7, seeded(0, 'a')) for _ in range(2))
    assert torch.equal(first, again)


def test_settings(packages):
    original = BASELINES['rdpp/original'](Config())
    plain, smoke = RDpp(Config()), RDpp(Config.smoke())
    images = dict(resize=256, crop=256)
    network = dict(extractor='wide_resnet50_2.tv_in1k', layers=(1, 2, 3))
    training = dict(epochs=100, batch_size=16, lr=5e-3, weight_decay=0.0)
    assert original.config == Config(**images, **network, **training)
    assert plain.config.extractor == Config().extractor
    assert (plain.config.layers, plain.config.crop) == ((3, 4), 224)
    assert (smoke.config.epochs, smoke.about['published_epochs']) == (6, 100)
    assert original.about['decoder'] == 'mirrored ResNet'
    assert plain.about['decoder'] == 'fitted to the features'
    for method in (RDpp, BASELINES['rdpp/original']):
        settled = method(Config()).config
        assert method(settled).config == settled


def test_what_is_refused(packages, images, monkeypatch):
    with pytest.raises(ConfigError, match='at least 3×3'):
        config = Config.smoke(**SMALL | dict(layers=(4,), resize=64, crop=64))
        RDpp(config).fit(images.train, progress=False)
    from cse.training import TrainingError
    with pytest.raises(TrainingError, match='a smaller lr may help'):
        RDpp(Config.smoke(**SMALL | dict(lr=1e30))).fit(images.train, progress=False)
    monkeypatch.setitem(sys.modules, 'geomloss', None)
    with pytest.raises(ConfigError, match=r"pip install '.\[baselines\]'"):
        RDpp(Config.smoke())


def test_a_batch_of_one_image(packages, images):
    method = RDpp(Config.smoke(**SMALL | dict(epochs=1), batch_size=5)).fit(images.train, progress=False)
    assert np.isfinite(method.score(images.test).image).all()
