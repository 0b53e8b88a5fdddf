"""What holds for any input: preparation of images, masks, losses, scores and decisions."""
import os

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cse.config import Config, ConfigError
from cse.data.images import Images, resize_crop
from cse.data.seeds import seeded, split
from cse.extensions.calibration import Calibration, CalibrationError
from cse.fast.defects import FastDefectGenerator, draw_masks
from cse.fast.head import FastBank
from cse.losses import contrastive_cosine_loss, decoder_loss, similarity
from cse.metrics import auroc, auroc_interval
from cse.scoring import MemoryBank, enlarge_maps

EXAMPLES = 60 if os.environ.get('ROBUSTNESS_KILLS') else 12  # `make robustness` tries more
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck),
                derandomize=True)
seeds, axes = st.integers(0, 2**31), st.sampled_from(['positions', 'columns', 'channels'])
SETTING = st.one_of(st.none(), st.integers(-10, 10**6), st.floats(), st.text(max_size=8), st.booleans(),
                    st.lists(st.integers(), max_size=3))
numbers, grades = st.floats(-1e3, 1e3), st.lists(st.integers(-5, 5), min_size=2, max_size=40)


def noise(*shape, seed):
    return torch.rand(*shape, generator=seeded(seed, 'property'))


def normal(*shape, seed, name):
    return torch.randn(*shape, generator=seeded(seed, name))


@many
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([32, 40, 64]),
       st.sampled_from(['square', 'shorter']), seeds)
def test_prepared_images_keep_range_and_size(height, width, crop, mode, seed):
    config = Config(resize=crop + 3, crop=crop, resize_mode=mode)
    image = resize_crop(noise(3, height, width, seed=seed), config)
    assert image.shape == (3, crop, crop) and 0 <= image.min() and image.max() <= 1
    flat = torch.full((3, height, width), 0.3)
    assert torch.allclose(resize_crop(flat, config), torch.tensor(0.3), atol=1e-6)


@many
@given(st.integers(4, 300), st.floats(0.01, 0.9), seeds)
def test_splits_share_out_every_image_once(count, share, seed):
    parts, again = (split(count, share, seeded(seed, 'split')) for _ in range(2))
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert min(map(len, parts)) >= 2
    assert all(torch.equal(a, b) for a, b in zip(parts, again))


@many
@given(st.lists(st.integers(0, 255), min_size=27, max_size=27))
def test_arrays_and_tensors_are_the_same_images(values):
    array = np.array(values, np.uint8).reshape(3, 3, 3).repeat(14, 0).repeat(14, 1)
    config = Config(resize=40, crop=32)
    expected = Images(torch.from_numpy(array).permute(2, 0, 1)[None], config)[0]
    assert torch.equal(Images(array, config)[0], expected)
    assert torch.equal(Images([array.astype(np.float32) / np.float32(255)], config)[0], expected)


@many
@given(seeds, st.integers(1, 4), st.sampled_from([64, 96]))
def test_defects_stay_within_their_masks(seed, count, side):
    images, textures = noise(count, 3, side, side, seed=seed), noise(5, 3, side, side, seed=seed + 1)

    def generators():
        return [seeded(seed, 'defect', i) for i in range(count)]

    corrupted, masks, kinds = FastDefectGenerator(textures)(images, generators())
    assert set(masks.unique().tolist()) <= {0, 1}
    assert (masks.flatten(1).mean(1) >= 100 / 224**2 - 1e-6).all()
    assert 0 <= kinds.min() and kinds.max() <= 2
    outside = (masks == 0).expand_as(images)
    assert torch.equal(corrupted[outside], images[outside])
    assert 0 <= corrupted.min() and corrupted.max() <= 1 + 1e-6
    alone = FastDefectGenerator(textures)(images[-1:], generators()[-1:])[0]
    assert torch.allclose(alone[0], corrupted[-1], atol=1e-5)  # a draw belongs to its image, not to the batch


@many
@given(seeds, st.integers(16, 96))
def test_masks_have_an_area_at_any_size(seed, side):
    masks, values = draw_masks(side, [seeded(seed, 'mask')])
    assert masks.shape == (1, 1, side, side)
    assert 100 / 224**2 <= masks.mean() < 1 and values.abs().max() < 2


@many
@given(seeds, axes, st.floats(0.1, 100))
def test_contrastive_loss_knows_directions_only(seed, axis, scale):
    a, b = (normal(4, 6, 3, 3, seed=seed, name=name) for name in 'ab')
    defective = torch.tensor([0, 1, 0, 1])
    loss = contrastive_cosine_loss(a, b, defective, axis)
    assert (loss >= -1e-6).all() and (loss <= torch.tensor([2, 1, 2, 1]) + 1e-6).all()
    assert torch.allclose(contrastive_cosine_loss(scale * a, b, defective, axis), loss, atol=1e-5)
    assert torch.allclose(contrastive_cosine_loss(b, a, defective, axis), loss, atol=1e-6)
    assert torch.allclose(similarity(a, a, axis), torch.ones(4), atol=1e-5)
    opposite = contrastive_cosine_loss(a, -a, defective, axis)
    assert torch.allclose(opposite, torch.tensor([2., 0, 2, 0]), atol=1e-5)


@many
@given(seeds, st.integers(1, 3))
def test_decoder_loss_is_zero_for_a_perfect_reconstruction(seed, layers):
    sides = [4 * 2**i for i in reversed(range(layers))]
    maps = [normal(2, 5, side, side, seed=seed, name=side) for side in sides]
    other = [torch.randn(m.shape, generator=seeded(seed, 'other', i)) for i, m in enumerate(maps)]
    assert decoder_loss(maps, maps).abs().max() < 1e-5
    assert torch.allclose(decoder_loss([-m for m in maps], maps), torch.tensor(2.), atol=1e-5)
    assert (decoder_loss(other, maps) > 0).all() and (decoder_loss(other, maps) < 2).all()


@many
@given(seeds, axes, st.integers(1, 5))
def test_scores_are_distances_to_the_nearest_prototype(seed, axis, clusters):
    z = normal(8, 6, 3, 3, seed=seed, name='z')
    bank = MemoryBank(clusters, prototype='nearest', axis=axis).fit(z)
    distances = [1 - similarity(z, p[None].expand_as(z), axis) for p in bank.prototypes]
    expected, scores = torch.stack(distances, 1), bank.score(z)
    assert torch.allclose(bank.distances(z), expected, atol=1e-5)
    assert torch.allclose(scores, expected.amin(1), atol=1e-5)
    assert (scores >= -1e-6).all() and (scores <= 2 + 1e-5).all()
    fast = FastBank(bank)
    assert torch.allclose(fast.distances(z), expected, atol=1e-5) and (fast.score(z) >= 0).all()
    assert bank.score(bank.prototypes).abs().max() < 1e-5 and (bank.maps(z) >= 0).all()


@many
@given(seeds, st.integers(2, 9), st.integers(16, 64))
def test_enlarged_maps_stay_between_their_extremes(seed, cells, size):
    coarse = noise(2, cells, cells, seed=seed)
    large = enlarge_maps(coarse, size)
    assert large.shape == (2, size, size)
    assert large.min() >= coarse.min() - 1e-5 and large.max() <= coarse.max() + 1e-5


@many
@given(st.lists(numbers, min_size=1, max_size=80), st.lists(numbers, min_size=1, max_size=20),
       st.floats(0.001, 0.999))
def test_flagged_images_are_those_with_small_p_values(calibration, scores, alpha):
    c, count = Calibration(calibration), len(calibration) + 1
    p = c.p_values(scores)
    assert (p >= 1 / count - 1e-12).all() and (p <= 1).all()
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p)) if scores[i] > scores[j]]
    assert all(p[i] <= p[j] for i, j in pairs)
    try:
        threshold = c.threshold(alpha)
    except CalibrationError:
        assert alpha * count < 1
    else:
        assert np.array_equal(np.array(scores) > threshold, p <= alpha + 1e-9)
        assert (np.array(calibration) > threshold).sum() <= alpha * count


@many
@given(grades, grades)
def test_auroc_is_the_share_of_pairs_in_order(good, bad):
    labels, scores = [0] * len(good) + [1] * len(bad), good + bad
    pairs = np.mean([[(b > g) + (b == g) / 2 for g in good] for b in bad])
    low, high = auroc_interval(labels, scores)
    assert abs(auroc(labels, scores) - pairs) < 1e-12
    assert 0 <= low <= pairs + 1e-12 and pairs - 1e-12 <= high <= 1
    assert abs(auroc(labels, [-s for s in scores]) - (1 - pairs)) < 1e-12


@many
@given(st.sampled_from(sorted(Config.__dataclass_fields__)), SETTING)
def test_a_setting_is_taken_or_refused_by_name(name, value):
    try:
        config = Config(**{name: value})
    except ConfigError as e:
        assert name in str(e)
    else:
        assert Config.from_dict(config.to_dict()) == config
