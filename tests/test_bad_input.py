"Bad input is refused before any training, in words, and leaves no record."
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from cse import CSE, Config
from cse.config import ConfigError
from cse.data.images import DataError, Images, read_image
from cse.data.folders import load_category, read_masks, texture_images
from cse.defects import DefectGenerator
from cse.deploy.export import ExportError, export
from cse.data.builtin import builtin_textures
from cse.lab.grid import grid
from cse.lab.parameters import run_table
from cse.lab.records import load_records
from cse.lab.runs import run


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    "A refusal that comes after training has started is too late."
    def fail(*args, **kw):
        pytest.fail('training started')
    monkeypatch.setattr('cse.fast.session.train', fail)


def remove(root, *parts):
    for part in parts:
        shutil.rmtree(root / 'gravel' / part)


def replace(root, part, data):
    (root / 'gravel' / part).write_bytes(data)


def alpha(root, part):
    Image.new('RGBA', (256, 256), (9, 9, 9, 100)).save(root / 'gravel' / part)


def floats(root, part):
    path = root / 'gravel' / part
    values = np.random.default_rng(0).random((256, 256), np.float32)
    Image.fromarray(values).save(path.with_suffix('.tiff'))
    path.unlink()


def black(root, part):
    Image.new('L', (256, 256)).save(root / 'gravel' / part)


def no_images(root):
    remove(root, 'train/good')
    (root / 'gravel/train/good').mkdir()


def beside(root):
    shutil.copy(root / 'gravel' / TRAIN, root / 'gravel/test/x.png')


def half_mask(root):
    Image.new('L', (128, 256), 255).save(root / 'gravel' / MASK)


def cut(root, part):
    replace(root, part, (root / 'gravel' / part).read_bytes()[:4000])


def floats_without_masks(root):
    floats(root, TEST)
    remove(root, 'ground_truth')


def only_one(root):
    for path in sorted((root / 'gravel/train/good').iterdir())[1:]:
        path.unlink()


TRAIN, TEST, MASK = 'train/good/00.png', 'test/bar/00.png', 'ground_truth/bar/00_mask.png'
UNREADABLE = ['00.png', 'not a readable image']
DAMAGE = {
    'no category folder': (lambda r: remove(r, '.'), ['photographs', 'no category']),
    'no root': (shutil.rmtree, ['photographs', 'no such folder']),
    'no train folder': (lambda r: remove(r, 'train'), ['no category', 'train/good']),
    'empty train folder': (no_images, ['train/good', 'holds no images']),
    'no test folder': (lambda r: remove(r, 'test'), ['gravel/test', 'no such folder']),
    'no defects': (lambda r: remove(r, 'test/bar', 'ground_truth'),
                   ['no defective images', 'beside test/good']),
    'no good test images': (lambda r: remove(r, 'test/good'), ['test/good', 'no images']),
    'image beside the folders': (beside, ['x.png', 'test/good or test/<kind of defect>']),
    'missing mask': (lambda r: (r / 'gravel' / MASK).unlink(), ['no mask', '00.png', '00_mask.png']),
    'damaged mask': (lambda r: replace(r, MASK, b'no mask'), ['00_mask.png', 'not a readable image']),
    'mask of another size': (half_mask, ['bar/00_mask.png: is 128×256 pixels', 'test/bar/00.png']),
    'black mask': (lambda r: black(r, MASK), ['bar/00_mask.png: marks nothing', 'value is 0', 'white']),
    'truncated training image': (lambda r: cut(r, TRAIN), UNREADABLE),
    'text as training image': (lambda r: replace(r, TRAIN, b'hello'), UNREADABLE),
    'empty training image': (lambda r: replace(r, TRAIN, b''), UNREADABLE),
    'truncated test image': (lambda r: cut(r, TEST), ['bar/00.png', 'not a readable image']),
    'transparent training image': (lambda r: alpha(r, TRAIN), ['00.png', 'transparent']),
    'floating-point test image': (floats_without_masks, ['00.tiff', 'floating-point']),
    'one training image': (only_one, ['1 defect-free image:', 'at least 4']),
}


@pytest.mark.parametrize('damage, words', DAMAGE.values(), ids=DAMAGE)
def test_damaged_categories(own_surface, textures, tmp_path, tiny, damage, words):
    damage(own_surface)
    with pytest.raises(ValueError) as refusal:
        run(tiny, own_surface, 'gravel', textures=textures, results=tmp_path / 'results')
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert load_records(tmp_path / 'results') == []
    assert not list((tmp_path).rglob('*.tmp'))


def test_the_first_folder_below_test_says_what_an_image_is(own_surface, tiny):
    "Deeper folders do not matter, and files that systems hide beside images are left out."
    test = own_surface / 'gravel/test'
    for part in ('good/day2', 'bar/good', 'good/.thumbnails', 'good/@eaDir', '__MACOSX/bar'):
        (test / part).mkdir(parents=True)
        shutil.copy(own_surface / 'gravel' / TEST, test / part)
    found = load_category(own_surface, 'gravel')
    assert found.defects == ['good'] * 4 + ['bar'] * 4
    assert found.place(found.test[3]) == 'test/good/day2/00.png'
    assert [p.name[:2] for p in found.masks[4:]] == ['00', '01', '02', '00']
    (own_surface / 'gravel/ground_truth/bar/good').mkdir()
    Image.new('L', (256, 256), 255).save(own_surface / 'gravel/ground_truth/bar/good/00.png')
    assert read_masks(load_category(own_surface, 'gravel'), tiny)[-1].all()  # as deep as its image


def test_image_smaller_than_the_crop(own_surface, textures, tmp_path, tiny):
    with pytest.raises(ValueError, match=r'\.png: is 256×256 pixels; expected at least crop=512'):
        run(tiny.replace(resize=0, crop=512), own_surface, 'gravel', textures=textures, results=tmp_path)


def test_converted_images(tmp_path):
    "Documented conversions: 16-bit grey, palette, opaque alpha, one bit, orientation."
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / 'sixteen.png')
    sixteen = read_image(tmp_path / 'sixteen.png')
    assert sixteen.max() == 1 and sixteen.unique().numel() == 65536
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))

    def pixels(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    expected = pixels(rgb) / 255
    rgb.convert('RGBA').save(tmp_path / 'opaque.png')
    assert torch.equal(read_image(tmp_path / 'opaque.png'), expected)
    palette = rgb.quantize(16)
    palette.save(tmp_path / 'palette.png')
    assert torch.equal(read_image(tmp_path / 'palette.png') * 255, pixels(palette.convert('RGB')))
    Image.new('1', (40, 30), 1).save(tmp_path / 'bit.png')
    bit = read_image(tmp_path / 'bit.png')
    assert bit.shape == (3, 30, 40) and bit.min() == 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (40, 30)).save(tmp_path / 'turned.jpg', exif=exif)
    assert read_image(tmp_path / 'turned.jpg').shape == (3, 40, 30)


def test_several_frames(tmp_path):
    frames = [Image.new('L', (64, 64), v) for v in (1, 2)]
    frames[0].save(tmp_path / 'two.tiff', save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match='two.tiff: holds 2 frames'):
        read_image(tmp_path / 'two.tiff')


SMALL = dict(resize=72, crop=64)
GOOD = torch.rand(6, 3, 64, 64)
TENSORS = {
    'NaN': (torch.cat([GOOD[:4], GOOD[4:5] * torch.nan, GOOD[5:]]), 'image 4: holds NaN'),
    'infinite': (GOOD / 0, 'NaN or infinite'),
    'range 0 to 255': (GOOD * 255, r'expected \[0, 1\]'),
    'negative': (GOOD - 0.5, r'expected \[0, 1\]'),
    'one image without batch': (GOOD[0], 'expected N×3×H×W'),
    'four channels': (torch.rand(6, 4, 64, 64), '3×H×W'),
    'whole numbers': ((GOOD * 9).long(), 'int64'),
    'no images': (GOOD[:0], 'at least one'),
    'too few': (GOOD[:3], 'at least 4'),
    'a number': (3, 'int'),
    'text in a list': (['a.png', 'b.png', 'c.png', 'd.png'], 'a.png: no such file'),
    'missing folder': ('nowhere', 'nowhere: no such folder'),
    'empty path': ('', "'': no such folder"),
    'array with its channels first': (np.zeros((3, 256, 200), np.uint8), r'\(3, 256, 200\); is it C×H×W'),
    'arrays with a side of 0': (
        np.zeros((6, 0, 256, 3), np.uint8), r'image 0: is an array of shape \(0, 256, 3\)'),
    'tensors with a side of 0': (GOOD[..., :0], r'image 0: has shape \(3, 64, 0\)'),
}


@pytest.mark.parametrize('images, words', TENSORS.values(), ids=TENSORS)
def test_fit_refuses(images, words, textures):
    with pytest.raises(ValueError, match=words):
        CSE(Config.smoke(**SMALL), textures=textures).fit(images, progress=False)


def test_empty_paths_and_batches():
    with pytest.raises(DataError, match="'': no such folder"):
        load_category('', 'gravel')
    with pytest.raises(ConfigError, match='batch_size=0'):
        next(Images(GOOD, Config()).batches(0))
    generator = DefectGenerator.from_config(Config(**SMALL), '')  # '' means no textures
    assert np.array_equal(generator.textures, builtin_textures(64))


def test_a_column_of_a_table_is_a_list(surface):
    import pandas as pd
    files = sorted((surface / 'gravel/train/good').iterdir())
    assert Images(pd.Series(files, index=range(9, 15)), Config()).paths == list(map(str, files))


def test_textures(tmp_path):
    with pytest.raises(ValueError, match='holds no images'):
        texture_images(tmp_path)
    (tmp_path / 'a.jpg').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='a.jpg: not a readable image'):
        texture_images(tmp_path)
    tensors = torch.zeros(0, 3, 64, 64), torch.zeros(5, 64, 64), GOOD * 255, GOOD.numpy() * np.nan
    for wrong in (*tensors, tmp_path / 'absent'):
        with pytest.raises(ValueError, match='textures|no such folder'):
            CSE(Config.smoke(**SMALL), textures=wrong).fit(GOOD, progress=False)


SETTINGS = [
    (dict(epochs=0), 'epochs=0'), (dict(epochs='5'), "epochs='5'"), (dict(epochs=True), 'epochs=True'),
    (dict(lr=float('nan')), 'lr=nan'), (dict(lr=-1), 'lr=-1'), (dict(lr=0), 'lr=0'),
    (dict(decoder='trained'), "'none', 'pretrained', 'joint', 'random'"), (dict(layers=()), 'layers'),
    (dict(layers=(1.5,)), 'layers'), (dict(validation_share=1.5), 'validation_share=1.5'),
    (dict(crop=300), 'crop=300'), (dict(clusters=0), 'clusters=0'), (dict(device=None), 'device=None'),
    (dict(epoch=3), "did you mean 'epochs'")]


@pytest.mark.parametrize('values, words', SETTINGS, ids=[w for _, w in SETTINGS])
def test_settings(values, words):
    for make in (Config, Config.paper, Config.smoke, Config().replace):
        with pytest.raises(ValueError) as refusal:
            make(**values)
        assert words in str(refusal.value)


RUNS = [
    (dict(profile='quick'), "profile='quick'"), (dict(methods='patchwork'), "method='patchwork'"),
    (dict(categories='granite'), "'granite'"), (dict(seeds=0), 'seeds=0'),
    (dict(seeds='many'), "seeds='many'"), (dict(seeds='0'), "seeds='0'"), (dict(seeds='[]'), "seeds='[]'"),
    (dict(methods=''), 'nothing to run'), (dict(settings={'clusters': 99}), 'clusters=99'),
    (dict(settings={'layers': [2, 4]}), 'layers=(2, 4)'), (dict(settings={'epoch': 1}), 'epoch=1'),
    (dict(settings='{'), 'settings='), (dict(categories='["gravel"'), 'categories='),
    (dict(device='tpu'), "device='tpu'"), (dict(device='cuda:99'), "device='cuda:99'"),
    (dict(extractor='resnet1'), "extractor='resnet1'"), (dict(weights='absent.pth'), 'absent.pth'),
    (dict(extractor='resnet18'), 'packaged'), (dict(settings={'layers': [9]}), 'layers=(9,)'),
    (dict(textures='nowhere'), 'nowhere'), (dict(settings={'crop': 100, 'resize': 100}), 'multiple of 8')]


@pytest.mark.parametrize('values, words', RUNS, ids=[str(v) for v, _ in RUNS])
def test_tables(surface, textures, tmp_path, values, words):
    arguments = dict(data=str(surface), textures=str(textures), results=str(tmp_path)) | values
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        run_table(1, **arguments)
    assert words in str(refusal.value), refusal.value
    assert load_records(tmp_path) == []


def test_export_refuses_before_any_work(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder.onnx').mkdir()
    cases = ((dict(anomaly_map='none'), 'wood.xml', "wood.xml: .* anomaly_map='none'"),
             ({}, 'file/wood.xml', 'no file can be written'), ({}, 'folder.onnx', 'is a folder'))
    for settings, path, words in cases:
        with pytest.raises(ConfigError, match=words):
            export(CSE(Config.smoke(**settings)), tmp_path / path)


def test_export_to_a_full_disk_does_not_blame_the_detector(tmp_path, monkeypatch):
    def full(path):
        raise RuntimeError('iostream error')
    monkeypatch.setattr('cse.deploy.export.Whole', lambda detector: torch.nn.Identity())
    monkeypatch.setattr('cse.deploy.export._about', lambda detector: {})
    monkeypatch.setattr('cse.deploy.export._openvino', lambda *args: full)
    detector = SimpleNamespace(config=Config.smoke(), score=lambda images: None)
    with pytest.raises(ExportError, match=r'wood.xml: cannot be written \(iostream error\)'):
        export(detector, tmp_path / 'wood.xml')
    assert not list(tmp_path.iterdir())


def test_unknown_category_stops_a_grid_before_its_first_run(surface, textures, tmp_path, tiny):
    with pytest.raises(ValueError, match='granite.*gravel'):
        grid(tiny, surface, ['gravel', 'granite'], textures=textures, results=tmp_path, progress=False)
    assert load_category(surface, 'gravel').name == 'gravel'


NOTEBOOKS = Path(__file__).parent.parent / 'nbs/tables'
PARAMETERS = [
    ('table1_mvtec', dict(epoch=3), 'epoch=3: no parameter of this notebook'),
    ('table1_mvtec', dict(profile='quick', results='results'), "profile='quick'"),
    ('table1_mvtec', dict(seeds=-1), 'seeds=-1'), ('table1_mvtec', dict(categories='granite'), "'granite'"),
    ('table1_mvtec', dict(settings='epochs=3'), 'settings='),
    ('table2_tilda', dict(data='nowhere'), 'nowhere: no such folder'),
    ('table2_tilda', dict(profile=3), 'profile=3'), ('table3_speed', dict(methods='camera'), "'camera'"),
    ('table3_speed', dict(seeds='zero'), "seeds='zero'"),
    ('table4_classifier', dict(methods='classifier/none'), 'decoder modes'),
    ('table5_decoder', dict(settings={'decoder': 'none'}), 'one place'),
    ('table5_decoder', dict(device='tpu'), "device='tpu'"),
    ('false_alarm_rates', dict(held_out=2), 'held_out=2'), ('false_alarm_rates', dict(alphas=[0]), 'alphas'),
    ('false_alarm_rates', dict(methods='cse'), "methods='cse': no parameter of this notebook")]


@pytest.mark.parametrize('name, given, words', PARAMETERS, ids=[f'{n} {g}' for n, g, _ in PARAMETERS])
def test_notebook_parameters(tmp_path, monkeypatch, name, given, words):
    "Parameters as papermill injects them, after the tagged cell, but in this process."
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with pytest.raises(ValueError) as refusal:
        for cell in nbformat.read(NOTEBOOKS / f'{name}.ipynb', 4).cells:
            if cell.cell_type != 'code':
                continue
            exec(cell.source, namespace)
            if 'parameters' in cell.metadata.get('tags', []):
                namespace.update(given)
    assert words in str(refusal.value), refusal.value
    assert not list(tmp_path.iterdir())
