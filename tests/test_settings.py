"Every row on which text and released code disagree: both values behave as described."
import pytest
import torch
from torch.nn import functional as F

from cse import CSE, Config
from cse.config import fingerprint
from cse.data.images import Images
from cse.data.seeds import seeded
from cse.defects import KINDS, DefectGenerator
from cse.fast.cache import FeatureCache
from cse.extractor import FeatureExtractor
from cse.losses import as_vectors, contrastive_cosine_loss, reduce_loss
from cse.model import Decoder, Embedder, freeze
from cse.scoring import MemoryBank
from cse.training import make_decoder, make_optimiser, pair_splits, train

PAPER, OFFICIAL = Config.paper(), Config.official()


@pytest.fixture(scope='module')
def parts(surface):
    "What a training needs, on twelve images of noise-free gravel."
    import skimage.data
    config = Config.smoke(epochs=3, batch_size=4)
    photo = torch.from_numpy(skimage.data.gravel()).float() / 255
    tiles = torch.stack([photo[y:y + 224, x:x + 224].expand(3, -1, -1) for y in range(0, 288, 72) for x in range(0, 288, 96)])
    extractor = FeatureExtractor.from_config(config)
    textures = torch.rand(4, 3, 224, 224, generator=seeded(0, 'textures'))
    return config, FeatureCache(Images(tiles, config), extractor, config), extractor, DefectGenerator(textures)


def trained(parts, **changes):
    config, cache, extractor, defects = parts
    return train(cache, extractor, defects, config.replace(**changes))


def test_profiles_take_the_values_of_their_sources():
    rows = dict(epochs=(100, 50), validation_share=(0.3, 0.2), max_lr_factor=(10, 10), cycle_momentum=(False, True), weight_decay=(1e-5, 1e-5),
                weight_decay_scope=('all', 'embedder'), train_axis=('positions', 'columns'), score_axis=('positions', 'channels'),
                loss_reduction=('sum', 'sum'), embedder_batchnorm=('live', 'frozen'), decoder_freeze=('gradients', 'optimiser'),
                pair_splits=('one', 'two'), validation_defects=('fixed', 'fresh'), prototype=('centre', 'nearest'), cluster_reduction=('min', 'max'),
                texture_channels=('rgb', 'bgr'), anomaly_map=('squared', 'squared'), lr=(4e-4, 4e-4), batch_size=(8, 8), contrastive_weight=(10, 10),
                clusters=(1, 1), decoder=('random', 'random'), resize=(256, 256), crop=(224, 224), extractor=('efficientnet_b3.ra2_in1k',) * 2)
    for name, values in rows.items():
        assert (getattr(PAPER, name), getattr(OFFICIAL, name)) == values, name


def test_idle_settings_are_no_part_of_a_run():
    assert fingerprint(Config.smoke(density_channels=50, embedding_weight=2.0)) == fingerprint(Config.smoke()) == '888996ff6b8f'  # that of the records in results/
    assert len({fingerprint(Config.clean(**c)) for c in ({}, dict(density_channels=50), dict(embedders=2), dict(density_layers=(2, 4)), dict(split_seed=0))}) == 5


def test_parameters_of_the_networks():
    assert sum(p.numel() for p in Embedder([136, 384], 64).parameters()) == 178_228
    assert sum(p.numel() for p in Decoder([136, 384], 64).parameters()) == 101_176


def test_epochs_and_validation_share(parts):
    assert len(trained(parts, epochs=2).history) == 2
    assert [len(pair_splits(50, c, 0)[2]) for c in (PAPER, OFFICIAL)] == [15, 10]


def test_one_cycle_moves_the_momentum_only_where_it_should():
    def betas(config):
        optimiser, schedule = make_optimiser(Embedder([8, 8]), None, config.replace(epochs=10), 8)
        values, rates = [], []
        for step in range(10):
            values.append(optimiser.param_groups[0]['betas'][0])
            rates.append(optimiser.param_groups[0]['lr'])
            optimiser.step()
            if step < 9:
                schedule.step()
        assert max(rates) == pytest.approx(10 * config.lr)
        return values
    assert set(betas(PAPER)) == {0.9}
    official = betas(OFFICIAL)
    assert official[0] == pytest.approx(0.95) and min(official) == pytest.approx(0.85, abs=0.01) and official[-1] == pytest.approx(0.95)


def test_weight_decay_concerns_the_trained_weights():
    both = [[g['weight_decay'] for g in make_optimiser(Embedder([8, 8]), Decoder([8, 8]), c, 8)[0].param_groups] for c in (PAPER, OFFICIAL)]
    assert both == [[1e-5, 1e-5], [1e-5, 0]]


def test_axes_of_the_cosine(parts):
    z = torch.randn(2, 64, 7, 7, generator=seeded(0))
    w = torch.randn(2, 64, 7, 7, generator=seeded(1))
    expected = dict(positions=F.cosine_similarity(z.reshape(2, 64, 49), w.reshape(2, 64, 49), dim=2).mean(1),
                    columns=F.cosine_similarity(z, w, dim=3).mean((1, 2)), channels=F.cosine_similarity(z, w, dim=1).mean((1, 2)))
    for axis, value in expected.items():
        assert torch.allclose(contrastive_cosine_loss(z, w, torch.zeros(2), axis), 1 - value, atol=1e-6)
        bank = MemoryBank(axis=axis).fit(w[:1])
        assert torch.allclose(bank.score(z[:1]), 1 - value[:1], atol=1e-5)
    assert not torch.allclose(trained(parts, train_axis='columns').steps, trained(parts).steps)
    with pytest.raises(ValueError, match='rows'):
        as_vectors(z, 'rows')


def test_reduction_over_the_batch(parts):
    assert reduce_loss(torch.ones(8)) == 8 and reduce_loss(torch.ones(8), 'mean') == 1
    assert not torch.allclose(trained(parts, loss_reduction='mean').steps[1:], trained(parts).steps[1:])


def test_batchnorm_after_the_first_epoch(parts):
    live, frozen = trained(parts, checkpoint='last'), trained(parts, checkpoint='last', embedder_batchnorm='frozen')
    one = trained(parts, checkpoint='last', embedder_batchnorm='frozen', epochs=1)
    counts = [int(t.network.blocks[0][2].num_batches_tracked) for t in (live, frozen, one)]
    assert counts[0] == 3 * counts[1] and counts[1] == counts[2] > 0


def test_decoder_is_kept_fixed_in_two_ways(parts):
    config, cache, extractor, _ = parts
    features = [f[:4] for f in cache.features]
    for how in ('gradients', 'optimiser'):
        decoder = make_decoder(cache, torch.arange(8), config.replace(decoder_freeze=how), 0, extractor.device)
        u = torch.rand(4, 64, 14, 14, requires_grad=True)
        decoder(u)[1].sum().backward()
        has_gradients = any(p.grad is not None for p in decoder.parameters())
        drifting = any(m.running_mean is not None and m.running_mean.abs().sum() > 0 for m in decoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert (has_gradients, drifting) == ((False, False) if how == 'gradients' else (True, True))
        assert decoder.training and u.grad is not None
    assert len(features) == 2
    a, b = trained(parts), trained(parts, decoder_freeze='optimiser')
    assert torch.allclose(a.steps, b.steps, rtol=1e-4), 'the two ways compute the same'


def test_splits_of_the_pairs():
    one, two = pair_splits(40, PAPER, 0), pair_splits(40, PAPER.replace(pair_splits='two'), 0)
    assert one[0] is one[1] and not set(one[1].tolist()) & set(one[2].tolist())
    assert set(two[1].tolist()) & set(two[2].tolist()), 'an image trains in one stream and validates in the other'


def test_validation_defects(parts):
    "Drawn anew, the criterion moves even where the weights hardly do."
    still = dict(lr=1e-9, epochs=4, embedder_batchnorm='frozen')
    fixed, fresh = ([h['validation_loss'] for h in trained(parts, validation_defects=v, **still).history][1:] for v in ('fixed', 'fresh'))
    assert max(fixed) - min(fixed) < 1e-3 < 1e-2 < max(fresh) - min(fresh)


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


def test_channels_and_grey_of_textures():
    texture = torch.stack([torch.full((224, 224), v) for v in (0.2, 0.5, 0.9)])[None]
    place = torch.zeros(1, dtype=torch.long)
    images = torch.zeros(1, 3, 224, 224)
    pasted = lambda **kw: DefectGenerator(texture, **kw)._texture(place, images)[0, :, 0, 0]
    assert torch.allclose(pasted(), torch.tensor([0.2, 0.5, 0.9])) and torch.allclose(pasted(channels='bgr'), torch.tensor([0.9, 0.5, 0.2]))
    def spread(grey):
        corrupted, _, kinds = DefectGenerator(texture, grey=grey)(torch.zeros(24, 3, 224, 224), seeded(0))
        textural = corrupted[kinds == KINDS.index('textural')]
        assert textural.amax() > 0.1
        return (textural.amax(1) - textural.amin(1)).amax().item()
    assert spread(True) < 1e-6 < 0.1 < spread(False), 'grey after the augmentations too'


def test_anomaly_map_is_the_released_code_s(parts):
    z = torch.randn(5, 64, 7, 7, generator=seeded(0))
    bank = MemoryBank().fit(z)
    assert torch.allclose(bank.maps(z[:1])[0], 0.5 * (bank.prototypes[0] - z[0]).square().sum(0) / 49)


def test_anomaly_map_can_be_left_out(surface, textures, tiny):
    detector = CSE(tiny.replace(anomaly_map='none', epochs=1), textures=textures).fit(surface / 'gravel/train/good', progress=False)
    assert detector.score(surface / 'gravel/test').map is None


@pytest.mark.parametrize('mode', ['none', 'pretrained', 'joint', 'random'])
def test_decoder_modes(parts, mode):
    config, cache, extractor, _ = parts
    decoder = make_decoder(cache, torch.arange(8), config.replace(decoder=mode), 0, extractor.device)
    start = make_decoder(cache, torch.arange(8), config.replace(decoder='joint'), 0, extractor.device)
    if mode == 'none':
        assert decoder is None
        return
    moved = not all(torch.equal(a, b) for a, b in zip(decoder.parameters(), start.parameters()))
    assert moved == (mode == 'pretrained')
    assert all(p.requires_grad == (mode == 'joint') for p in decoder.parameters())
    assert len(trained(parts, decoder=mode).history) == 3


def test_same_seed_same_scores_whatever_the_workers(surface, textures, tiny):
    folder = surface / 'gravel'
    runs = [CSE(tiny.replace(workers=w, cache_mb=mb), textures=textures, seed=5).fit(folder / 'train/good', progress=False).score(folder / 'test')
            for w, mb in ((1, 1024), (4, 1024), (2, 0))]
    other = CSE(tiny, textures=textures, seed=6).fit(folder / 'train/good', progress=False).score(folder / 'test')
    assert (runs[0].image == runs[1].image).all() and (runs[0].image == runs[2].image).all()
    assert (runs[0].image != other.image).any()


def test_freeze_refuses_another_word():
    with pytest.raises(ValueError, match='thaw'):
        freeze(Decoder([8, 8]), 'thaw')
