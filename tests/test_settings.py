"Every row on which text and released code disagree: both values behave as described."
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from cse import CSE, Config
from cse.config import fingerprint
from cse.data.images import Images
from cse.data.seeds import seeded
from cse.defects import KINDS, DefectGenerator
from cse.extensions.hybrid import HybridConfig
from cse.fast.cache import FeatureCache
from cse.fast.defects import FastDefectGenerator
from cse.fast.engines import FastExtractor
from cse.fast.model import FastEmbedder
from cse.fast.pairs import CachedPairs
from cse.losses import as_vectors, contrastive_cosine_loss, reduce_loss
from cse.model import Decoder, Embedder, freeze
from cse.scoring import MemoryBank
from cse.training import make_decoder, make_embedder, make_optimizer, pair_splits, prepare_decoder, train

PAPER, OFFICIAL = Config.paper(), Config.official()
CROP = 96


@pytest.fixture(scope='module')
def parts(photographs):
    "What a training run needs, on twelve tiles of gravel."
    config = Config.smoke(epochs=2, batch_size=4, resize=CROP, crop=CROP)
    photo = torch.tensor(photographs['gravel']).float() / 255
    corners = [(y, x) for y in range(0, 400, 100) for x in range(0, 300, 100)]
    tiles = torch.stack([photo[y:y + CROP, x:x + CROP].expand(3, -1, -1) for y, x in corners])
    extractor = FastExtractor.from_config(config)
    cache = FeatureCache(Images(tiles, config), extractor, config)
    textures = torch.rand(4, 3, CROP, CROP, generator=seeded(0, 'textures'))
    defects = FastDefectGenerator(textures)
    return SimpleNamespace(config=config, extractor=extractor, cache=cache, defects=defects)


def decoder_of(parts, config):
    "A decoder as it enters a training run, and the embedder and the pairs beside it."
    pairs = CachedPairs(parts.cache, parts.extractor, parts.defects, config)
    device = parts.extractor.device
    embedder = make_embedder(parts.cache.channels, config, 0, FastEmbedder).to(device)
    decoder = make_decoder(parts.cache.channels, config, 0)
    if decoder is not None:
        decoder.to(device)
    return prepare_decoder(decoder, embedder, pairs, config), embedder, pairs


def trained(parts, **changes):
    "Embedder, epochs and losses of the steps of a training run."
    config = parts.config.replace(**changes)
    decoder, embedder, pairs = decoder_of(parts, config)
    history = train(embedder, decoder, pairs, config)
    return SimpleNamespace(network=embedder, history=history.epochs, steps=torch.cat(history.steps))


@pytest.fixture(scope='module')
def usual(parts):
    "A training run with the settings of the paper."
    return trained(parts)


def test_profiles_take_the_values_of_their_sources():
    rows = dict(
        epochs=(100, 50), validation_share=(0.3, 0.2), max_lr_factor=(10, 10), cycle_momentum=(False, True),
        weight_decay=(1e-5, 1e-5), weight_decay_scope=('all', 'embedder'),
        train_axis=('positions', 'columns'), score_axis=('positions', 'channels'),
        loss_reduction=('sum', 'sum'), embedder_batchnorm=('live', 'frozen'),
        decoder_freeze=('gradients', 'optimiser'), pair_splits=('one', 'two'),
        validation_defects=('fixed', 'fresh'), prototype=('centre', 'nearest'),
        cluster_reduction=('min', 'max'), texture_channels=('rgb', 'bgr'),
        anomaly_map=('squared', 'squared'), lr=(4e-4, 4e-4), batch_size=(8, 8),
        contrastive_weight=(10, 10), clusters=(1, 1), decoder=('random', 'random'),
        resize=(256, 256), crop=(224, 224), extractor=('efficientnet_b3.ra2_in1k',) * 2)
    for name, values in rows.items():
        assert (getattr(PAPER, name), getattr(OFFICIAL, name)) == values, name


def test_the_fingerprint_of_the_records_stays_what_it_is():
    assert fingerprint(Config.smoke()) == '888996ff6b8f'  # that of the records in results/


def test_each_setting_that_decides_changes_the_fingerprint():
    hybrid = (
        dict(density_channels=50), dict(embedders=2), dict(density_layers=(2, 4)),
        dict(density_patch=1), dict(density_norm='none'), dict(split_seed=0))
    found = {fingerprint(HybridConfig.smoke(**changes)) for changes in (dict(), *hybrid)}
    assert len(found | {fingerprint(Config.smoke())}) == 8


def test_parameters_of_the_networks():
    assert sum(p.numel() for p in Embedder([136, 384], 64).parameters()) == 178_228
    assert sum(p.numel() for p in Decoder([136, 384], 64).parameters()) == 101_176


def test_epochs_and_validation_share(parts, usual):
    assert (len(usual.history), len(trained(parts, epochs=1).history)) == (2, 1)
    assert [len(pair_splits(50, c, 0)[2]) for c in (PAPER, OFFICIAL)] == [15, 10]


def test_one_cycle_moves_the_momentum_only_where_it_should():
    def betas(config):
        optimizer, schedule = make_optimizer(Embedder([8, 8]), None, config, 10)
        values, rates = [], []
        for step in range(10):
            values.append(optimizer.param_groups[0]['betas'][0])
            rates.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            if step < 9:
                schedule.step()
        assert max(rates) == pytest.approx(10 * config.lr)
        return values
    assert set(betas(PAPER)) == {0.9}
    official = betas(OFFICIAL)
    assert official[0] == official[-1] == pytest.approx(0.95)
    assert min(official) == pytest.approx(0.85, abs=0.01)


def test_weight_decay_concerns_the_trained_weights():
    def decays(config):
        optimizer, _ = make_optimizer(Embedder([8, 8]), Decoder([8, 8]), config, 8)
        return [group['weight_decay'] for group in optimizer.param_groups]
    assert [decays(config) for config in (PAPER, OFFICIAL)] == [[1e-5, 1e-5], [1e-5, 0]]


def cosines(z, w):
    "Mean cosine of two embeddings, by axis."
    columns, channels = F.cosine_similarity(z, w, dim=3), F.cosine_similarity(z, w, dim=1)
    positions = F.cosine_similarity(z.flatten(2), w.flatten(2), dim=2)
    return dict(positions=positions.mean(1), columns=columns.mean((1, 2)), channels=channels.mean((1, 2)))


def test_axes_of_the_cosine():
    z, w = (torch.randn(2, 64, 7, 7, generator=seeded(i)) for i in range(2))
    for axis, value in cosines(z, w).items():
        loss = contrastive_cosine_loss(z, w, torch.zeros(2), axis)
        assert torch.allclose(loss, 1 - value, atol=1e-6)
        bank = MemoryBank(axis=axis).fit(w[:1])
        assert torch.allclose(bank.score(z[:1]), 1 - value[:1], atol=1e-5)
    with pytest.raises(ValueError, match='rows'):
        as_vectors(z, 'rows')


def test_training_uses_the_axis(parts, usual):
    assert not torch.allclose(trained(parts, train_axis='columns').steps, usual.steps)


def test_reduction_over_the_batch(parts, usual):
    assert reduce_loss(torch.ones(8)) == 8 and reduce_loss(torch.ones(8), 'mean') == 1
    assert not torch.allclose(trained(parts, loss_reduction='mean').steps[1:], usual.steps[1:])


def test_batchnorm_after_the_first_epoch(parts):
    changes = (dict(), dict(embedder_batchnorm='frozen'), dict(embedder_batchnorm='frozen', epochs=1))
    runs = [trained(parts, checkpoint='last', **c) for c in changes]
    live, frozen, one = (int(run.network.blocks[0][2].num_batches_tracked) for run in runs)
    assert live == 2 * frozen and frozen == one > 0


@pytest.mark.parametrize('how', ['gradients', 'optimiser'])
def test_a_fixed_decoder_passes_gradients_on(parts, how):
    decoder, _, _ = decoder_of(parts, parts.config.replace(decoder_freeze=how))
    u = torch.rand(4, 64, 14, 14, device=parts.extractor.device, requires_grad=True)
    decoder(u)[1].sum().backward()
    norms = [m for m in decoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    has_gradients = any(p.grad is not None for p in decoder.parameters())
    drifting = any(m.running_mean is not None and m.running_mean.abs().sum() > 0 for m in norms)
    assert has_gradients == drifting == (how == 'optimiser')
    assert decoder.training and u.grad is not None


def test_both_ways_to_fix_a_decoder_compute_the_same(parts, usual):
    other = trained(parts, decoder_freeze='optimiser')
    assert torch.allclose(other.steps, usual.steps, rtol=1e-4)


def test_splits_of_the_pairs():
    one, two = pair_splits(40, PAPER, 0), pair_splits(40, PAPER.replace(pair_splits='two'), 0)
    assert one[0] is one[1] and not set(one[1].tolist()) & set(one[2].tolist())
    shared = set(two[1].tolist()) & set(two[2].tolist())
    assert shared, 'an image trains in one stream and validates in the other'


def test_fresh_validation_defects_move_the_criterion(parts):
    "With defects drawn again each epoch, it changes even if the weights hardly do."
    still = dict(lr=1e-9, epochs=4, embedder_batchnorm='frozen')

    def span(defects):
        history = trained(parts, validation_defects=defects, **still).history
        losses = [epoch['validation_loss'] for epoch in history][1:]
        return max(losses) - min(losses)

    assert span('fixed') < 1e-3 < 1e-2 < span('fresh')


def test_prototype_and_clusters():
    z = torch.randn(20, 4, 3, 3, generator=seeded(0))
    centre, nearest = (MemoryBank(prototype=p).fit(z).prototypes[0] for p in ('centre', 'nearest'))
    assert torch.allclose(centre, z.mean(0), atol=1e-6)
    assert torch.equal(nearest, z[(z - centre).flatten(1).norm(dim=1).argmin()])
    banks = [MemoryBank(3, reduction=r).fit(z, seed=1) for r in ('min', 'max')]
    d = banks[0].distances(z)
    assert torch.equal(banks[0].score(z), d.amin(1)) and torch.equal(banks[1].score(z), d.amax(1))
    one = [MemoryBank(1, reduction=r).fit(z).score(z) for r in ('min', 'max')]
    assert torch.equal(*one)


def texture_of_three_levels():
    return torch.stack([torch.full((CROP, CROP), v) for v in (0.2, 0.5, 0.9)])[None]


def test_channels_of_textures():
    def pasted(**options):
        return DefectGenerator(texture_of_three_levels(), **options).texture(0, CROP)[:, 0, 0]
    assert torch.allclose(pasted(), torch.tensor([0.2, 0.5, 0.9]))
    assert torch.allclose(pasted(channels='bgr'), torch.tensor([0.9, 0.5, 0.2]))


def test_grey_textures_are_grey_after_the_augmentations_too():
    def spread(grey):
        defects = FastDefectGenerator(texture_of_three_levels(), grey=grey)
        corrupted, _, kinds = defects(torch.zeros(24, 3, CROP, CROP), seeded(0))
        textural = corrupted[kinds == KINDS.index('textural')]
        assert textural.amax() > 0.1
        return (textural.amax(1) - textural.amin(1)).amax().item()
    assert spread(True) < 1e-6 < 0.1 < spread(False)


def test_anomaly_map_is_the_released_code_s():
    z = torch.randn(5, 64, 7, 7, generator=seeded(0))
    bank = MemoryBank().fit(z)
    expected = 0.5 * (bank.prototypes[0] - z[0]).square().sum(0) / 49
    assert torch.allclose(bank.maps(z[:1])[0], expected)


def fitted(surface, config, **options):
    return CSE(config, **options).fit(surface / 'gravel/train/good', progress=False)


def test_anomaly_map_can_be_left_out(surface, tiny):
    assert fitted(surface, tiny.replace(anomaly_map='none')).score(surface / 'gravel/test').map is None


@pytest.mark.parametrize('mode', ['none', 'pretrained', 'joint', 'random'])
def test_decoder_modes(parts, mode):
    config = parts.config.replace(decoder=mode, epochs=1)
    decoder, _, _ = decoder_of(parts, config)
    assert len(trained(parts, decoder=mode, epochs=1).history) == 1
    if mode == 'none':
        assert decoder is None
        return
    start, _, _ = decoder_of(parts, config.replace(decoder='joint'))
    moved = not all(torch.equal(a, b) for a, b in zip(decoder.parameters(), start.parameters()))
    assert moved == (mode == 'pretrained')
    assert all(p.requires_grad == (mode == 'joint') for p in decoder.parameters())


def test_scores_depend_on_the_seed_and_not_on_workers_or_memory(surface, textures, tiny):
    def scores(seed=5, **changes):
        config = tiny.replace(epochs=1, **changes)
        detector = fitted(surface, config, textures=textures, seed=seed)
        return detector.score(surface / 'gravel/test').image
    first = scores(workers=1)
    assert (scores(workers=4) == first).all()
    assert (scores(workers=2, cache_mb=0) == first).all()
    assert (scores(seed=6) != first).any()


def test_freeze_refuses_another_word():
    with pytest.raises(ValueError, match='thaw'):
        freeze(Decoder([8, 8]), 'thaw')
