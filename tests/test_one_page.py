"The library computes what the one-page notebook computes: same weights and images in, same numbers out."
import ast
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from cse.defects import perlin_noise
from cse.losses import contrastive_cosine_loss, decoder_loss, total_loss
from cse.model import Decoder, Embedder, freeze
from cse.scoring import MemoryBank, enlarge_maps

NOTEBOOK = Path(__file__).parent.parent / 'nbs/00_one_page.ipynb'
CHANNELS = [12, 20]


def is_table(node):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') in ('STRUCTURAL', 'TEXTURAL')


@pytest.fixture(scope='module')
def page():
    "Imports, functions, classes and augmentations of the notebook, by name. Nothing is trained."
    cells = json.loads(NOTEBOOK.read_text())['cells']
    source = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    kept = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if isinstance(node, kept) or is_table(node)]
    names = {}
    exec(compile(tree, NOTEBOOK.name, 'exec'), names)
    return names


def copy_weights(source, target):
    "Weights and statistics in the order in which both modules hold them."
    values = source.state_dict().values()
    target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))


def draw_features(count):
    fine, coarse = CHANNELS
    shapes = (count, fine, 14, 14), (count, coarse, 7, 7)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.fixture(scope='module')
def pair(page):
    "Networks of the notebook and the library with the same weights, in double precision; features of pairs."
    torch.manual_seed(0)
    theirs = page['Embedder'](sum(CHANNELS)).double(), page['Decoder'](*CHANNELS).double()
    ours = Embedder(CHANNELS).double(), Decoder(CHANNELS).double()
    with torch.no_grad():
        theirs[0].train()(draw_features(32))  # statistics that are not those of a fresh module
        for parameter in theirs[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for source, target in zip(theirs, ours):
        copy_weights(source, target)
    freeze(ours[1])
    return theirs, ours, draw_features(8), draw_features(8)


def close(actual, expected):
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('training', [True, False])
def test_embeddings_and_reconstructions(pair, training):
    (embedder, decoder), (own_embedder, own_decoder), first, _ = pair
    with torch.no_grad():
        u, z = embedder.train(training)(first)
        own_u, own_z = own_embedder.train(training)(first)
        close(own_u, u)
        close(own_z, z)
        close(own_decoder(u), decoder(u))
    assert u.std() > 0.1 and z.shape == (8, 64, 7, 7)


def test_sizes_are_those_of_the_paper(page):
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert size(page['Embedder'](136 + 384)) == 178_228
    assert size(page['Decoder'](136, 384)) == 101_176
    assert not any(p.requires_grad for p in page['Decoder'](136, 384).parameters())


def test_losses(page, pair):
    (embedder, decoder), (own_embedder, own_decoder), first, second = pair
    y = torch.arange(8) % 2 == 0
    page.update(embedder=embedder.eval(), decoder=decoder)
    with torch.no_grad():
        (u, z1), (_, z2) = own_embedder.eval()(first), own_embedder(second)
        contrastive, rebuilt = contrastive_cosine_loss(z1, z2, y), own_decoder(u)
        reconstruction = decoder_loss(rebuilt, first)
        close(contrastive, page['contrastive_loss'](z1, z2, y))
        close(reconstruction, page['reconstruction_loss'](rebuilt, first))
        close(total_loss(contrastive, reconstruction), page['pair_loss'](first, second, y))


def test_gradients(page, pair):
    (embedder, decoder), (own_embedder, own_decoder), first, second = pair
    y = torch.arange(8) < 3
    page.update(embedder=embedder.train(), decoder=decoder)
    page['pair_loss'](first, second, y).sum().backward()
    (u, z1), (_, z2) = own_embedder.train()(first), own_embedder(second)
    losses = total_loss(contrastive_cosine_loss(z1, z2, y), decoder_loss(own_decoder(u), first))
    losses.sum().backward()
    for own, other in zip(own_embedder.parameters(), embedder.parameters(), strict=True):
        assert other.grad.abs().max() > 1e-3
        close(own.grad, other.grad)


def test_prototype_scores_and_maps(page):
    torch.manual_seed(1)
    good = 1 + torch.randn(10, 64, 7, 7)
    test = 1 + torch.randn(5, 64, 7, 7) * torch.linspace(0.1, 3, 5).view(-1, 1, 1, 1)
    bank, prototype = MemoryBank().fit(good), good.mean(0)
    scores = page['score'](prototype, test)
    assert scores.min() < 0.3 < scores.max()
    close(bank.prototypes[0], prototype)
    close(bank.score(test), scores)
    close(enlarge_maps(bank.maps(test), 224), page['anomaly_map'](prototype, test))


@pytest.mark.parametrize('cells', [(1, 1), (4, 32), (16, 2)])
def test_perlin_noise(page, cells):
    rows, columns = cells
    angles = 2 * math.pi * torch.rand(33, 33, generator=torch.Generator().manual_seed(2))
    noise = page['perlin_noise'](angles[:rows + 1, :columns + 1])
    close(perlin_noise(224, cells, angles), noise)
    assert noise.std() > 0.1


def test_a_corrupted_image_shows_its_source_under_the_mask(page):
    torch.manual_seed(3)
    image, source, noise = torch.rand(3, 224, 224), torch.rand(3, 224, 224), page['draw_noise']()
    close(page['paste'](image, source, noise), torch.where(noise > 0.5, source, image))


def test_masks_are_not_smaller_than_100_pixels(page):
    random.seed(0)
    torch.manual_seed(0)
    sizes = [int((page['draw_noise']() > 0.5).sum()) for _ in range(50)]
    assert min(sizes) >= 100


@pytest.mark.parametrize('kind', ['structural', 'textural', 'blurry'])
def test_sources_are_images(page, kind):
    random.seed(0)
    torch.manual_seed(0)
    page.update(textures=torch.randint(256, (3, 3, 224, 224), dtype=torch.uint8))
    image = torch.rand(3, 224, 224)
    for _ in range(10):
        source = page[kind](image)
        assert source.shape == image.shape and 0 <= source.min() and source.max() <= 1
        assert (source - image).abs().mean() > 0.01
