"Folders, masks and values in other conventions: read correctly, refused, or reported."
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

from cse.cli import app
from cse.config import Config, fingerprint
from cse.data.folders import category_fingerprint, load_category, prepare_masks, read_masks
from cse.data.good_images import good_images
from cse.data.images import Images, as_image, read_image
from cse.data.reading import IMAGE_SUFFIXES, DataError, image_files
from cse.deploy.export import _in_range
from cse.deploy.evaluation import evaluation
from cse.detector import CSE
from cse.fast.scorer import Scorer
from cse.scoring import Scores

SMALL = Config.smoke(resize=48, crop=48)
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
RGB = np.stack([PIXELS, PIXELS // 2, PIXELS // 3], 2)


def write(root, *names, pixels=PIXELS):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name)


def text(caplog):
    return '\n'.join(record.getMessage() for record in caplog.records)


# --- folders named otherwise

PAIRS = ['OK NG', 'ok nok', 'Ok Ng', 'normal abnormal', 'NORMAL Anomaly', 'Good bad', 'GOOD Defects',
         'pass fail', 'Passed FAILED', 'ok ko', 'good not_good', 'OK notOK', 'ok_front def_front',
         'defect-free defective', 'NoDefects Scratches', 'undamaged damaged', 'IO n.i.O.', 'OK-1 NG-1',
         'Negative Positive', 'accepted rejected', 'good scratch', 'train test', 'OKParts NGParts']


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('deep', ['', 'line 1/'])
def test_good_and_bad_side_by_side_are_refused(tmp_path, pair, deep):
    good, bad = pair.split()
    write(tmp_path, f'{deep}{good}/0.png', f'{deep}{bad}/0.png')
    with pytest.raises(DataError, match='more than defect-free images') as refusal:
        good_images(tmp_path, SMALL)
    assert str(refusal.value).endswith(f'such as {deep}{bad}/0.png; expected {tmp_path}/{deep}{good}')
    assert good_images(tmp_path / deep / good, SMALL).paths == [str(tmp_path / deep / good / '0.png')]


@pytest.mark.parametrize('names', [
    ('0.png', 'NG/0.png'), ('0.png', 'good/1.png'), ('monday/0.png', 'defects/0.png'),
    ('ok_0.png', 'ng_0.png'), ('part 1 good.png', 'part 2 bad.png'), ('C1R1E0N1.TIF', 'C1R1E3N1.TIF'),
    ('train/0.png', 'test/0.png'), ('images/0.png', 'masks/0.png'), ('Train/Good/0.png', 'Test/Good/0.png'),
    ('wood/train/good/0.png', 'wood/test/good/0.png', 'wood/test/hole/0.png')])
def test_other_mixtures_are_refused(tmp_path, names):
    write(tmp_path, *names)
    with pytest.raises(DataError, match='more than defect-free images'):
        CSE(SMALL).fit(tmp_path, progress=False)


@pytest.mark.parametrize('names', [
    ('0.png', '1.png'), ('monday/0.png', 'tuesday/0.png'), ('OK/0.png', 'OK/day 2/1.png'),
    ('a/OK/0.png', 'b/OK/0.png'), ('good/0.png', 'good (2)/0.png'), ('pass1/0.png', 'pass2/0.png'),
    ('train/good/0.png',), ('default/0.png', 'anguish/1.png'), ('OK/0.png', '.NG/0.png'),
    ('C1R1E0N1.TIF', 'C1R1E0N2.TIF')])
def test_folders_of_good_images_are_taken_whole(tmp_path, names):
    write(tmp_path, *names)
    seen = [name for name in names if '.NG' not in name]
    assert len(good_images(tmp_path, SMALL)) == len(seen)


def test_skipped_files_are_counted_in_one_line(tmp_path, caplog):
    write(tmp_path, 'a.png', 'b/c.png', '.hidden.png', '@eaDir/t.png', '@eaDir/deep/t.png')
    for name in ('a.txt', 'b/c.TXT', 'b/photo.heic', 'README', 'Thumbs.db'):
        (tmp_path / name).touch()
    (tmp_path / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    assert len(Images(tmp_path, SMALL)) == 2
    line, = caplog.records
    assert line.getMessage().startswith(f'{tmp_path}: skipped files: 9 (3 hidden')
    for part in ('2 .txt', '1 .heic', '1 .db', '1 without ending', '1 broken link'):
        assert part in line.getMessage()
    caplog.clear()
    assert len(image_files(tmp_path / 'b')) == 1 and 'skipped files: 2 (1 .txt, 1 .heic)' in text(caplog)
    (tmp_path / 'b/c.png').unlink()
    with pytest.raises(DataError, match=r'holds no images \(1 .txt, 1 .heic\)'):
        image_files(tmp_path / 'b')


def test_each_ending_that_pillow_can_write_is_read_from_a_folder(tmp_path, caplog):
    Image.init()
    for suffix in IMAGE_SUFFIXES:
        if Image.registered_extensions()[suffix] in Image.SAVE:
            for mode in ('RGB', 'L', '1'):
                try:
                    Image.fromarray(RGB).convert(mode).save(tmp_path / f'{suffix[1:]}{suffix.upper()}')
                    break
                except (OSError, ValueError):
                    pass
    found = Images(tmp_path, SMALL)
    assert len(found) >= 27 and not caplog.records
    assert len(torch.cat(list(found.batches()))) == len(found)


@pytest.mark.parametrize('name', ['phone.jpg', 'phone.MPO', 'phone.jpeg'])
def test_the_first_picture_of_a_phone_is_read_and_told(tmp_path, caplog, name):
    image, preview = Image.fromarray(RGB), Image.fromarray(RGB[::2, ::2])
    image.save(tmp_path / 'plain.jpg', quality=100)
    for i in range(3):
        image.save(tmp_path / f'{i}{name}', format='MPO', save_all=True, append_images=[preview], quality=100)
    images = Images([tmp_path / f'{i}{name}' for i in range(3)], SMALL.replace(workers=1))
    assert torch.equal(read_image(images.paths[0]), read_image(tmp_path / 'plain.jpg'))
    caplog.clear()
    images.check()
    line, = caplog.records
    assert f'0{name}: holds 2 pictures; the first is read' in line.getMessage()
    assert torch.equal(as_image(Image.open(images.paths[1])), read_image(tmp_path / 'plain.jpg'))


def test_films_are_still_refused(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1])]
    for name in ('a.gif', 'a.webp', 'a.tif', 'a.png'):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(DataError, match='holds 2 frames'):
            read_image(tmp_path / name)
        with pytest.raises(DataError, match='holds 2 frames'):
            as_image(Image.open(tmp_path / name))


def test_rarer_formats_count_for_the_fingerprint_where_they_are_used(surface, own_surface):
    before = category_fingerprint(load_category(surface, 'gravel'))
    folder = own_surface / 'gravel'
    write(folder, 'preview.gif', 'notes/plan.pgm')
    assert category_fingerprint(load_category(own_surface, 'gravel')) == before
    write(folder, 'train/good/99.gif')
    assert category_fingerprint(load_category(own_surface, 'gravel')) != before


# --- masks

MASK = np.zeros((48, 64), np.uint8)
MASK[20:32, 24:40] = 255


@pytest.fixture
def category(tmp_path):
    "A category with one defective image. The test writes its mask."
    write(tmp_path, *(f'c/{part}/good/{i}.png' for part in ('train', 'test') for i in range(4)))
    write(tmp_path, 'c/test/hole/a 1.png')
    (tmp_path / 'c/ground_truth/hole').mkdir(parents=True)
    return tmp_path / 'c'


def put(folder, mask, name='a 1_mask.png'):
    path = folder / 'ground_truth/hole' / name
    path.parent.mkdir(exist_ok=True)
    (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)


AS_IT_IS = Config.smoke(resize=0, crop=48)


def masks_of(folder, config=AS_IT_IS):
    return read_masks(load_category(folder.parent, 'c'), config)[-1]


def central(mask):
    "What the crop of 48 leaves of 48×64 pixels."
    return mask[:, 8:-8]


@pytest.mark.parametrize('name', [
    'a 1_mask.png', 'a 1_mask.PNG', 'a 1_mask.bmp', 'a 1_mask.BMP', 'a 1_mask.tif', 'a 1.tiff', 'a 1.bmp',
    'a 1.gif', 'A 1_Mask.png', 'A 1.Png', 'a 1_mask.pgm', 'a 1_mask.webp', 'a 1_MASK.jp2', 'a 1_mask.jpg'])
def test_a_mask_may_have_any_ending_and_case(category, name):
    put(category, MASK, name)
    assert np.array_equal(masks_of(category), central(MASK > 0))


def test_the_usual_mask_comes_first_and_two_others_are_refused(category):
    put(category, 255 - MASK, 'a 1.bmp')
    put(category, MASK)
    assert np.array_equal(masks_of(category), central(MASK > 0))
    (category / 'ground_truth/hole/a 1_mask.png').unlink()
    put(category, MASK, 'a 1.tif')
    with pytest.raises(DataError, match=r'holds a 1.bmp and a 1.tif for .*a 1.png; expected one mask'):
        masks_of(category)
    put(category, MASK, 'a 1_mask.TIF')
    (category / 'ground_truth/hole/notes.txt').touch()
    assert np.array_equal(masks_of(category), central(MASK > 0))


def with_part(value, rows=slice(2, 12)):
    "The mask with another region of its own value."
    mask = MASK.copy()
    mask[rows, 10:30] = value
    return mask


def coloured(*colours):
    "Background, the region of the mask, another region."
    kinds = (MASK > 0) + 2 * (with_part(1) == 1)
    return np.array(colours, np.uint8)[kinds]


def palette(*colours):
    image = Image.fromarray(((MASK > 0) + 2 * (with_part(1) == 1)).astype(np.uint8)).convert('P')
    image.putpalette([value for colour in colours for value in colour])
    return image


BOTH = with_part(255) > 0
LABELS = {
    '100 and 255': (with_part(100), BOTH),
    '1 and 255': (with_part(1), BOTH),
    '128 and 255': (with_part(128), BOTH),
    '254 and 255': (with_part(254), BOTH),
    'touching': (with_part(100, slice(2, 20)), with_part(100, slice(2, 20)) > 0),
    'index 1': (MASK // 255, MASK > 0),
    'indices 1 and 2': ((MASK > 0) + 2 * (with_part(1) == 1).astype(np.uint8), BOTH),
    'half grey': (MASK // 2, MASK > 0),
    'dark background': (np.maximum(MASK, 20), MASK > 0),
    'background of 1': (np.maximum(MASK, 1), MASK > 0),
    '16 bits': ((MASK // 255).astype(np.uint16) * 3, MASK > 0),
    'white of 16 bits': (MASK.astype(np.uint16) * 257, MASK > 0),
    'one bit': (Image.fromarray(MASK).convert('1'), MASK > 0),
    'red and green': (coloured((0, 0, 0), (255, 0, 0), (0, 255, 0)), BOTH),
    'blue and dark green': (coloured((0, 0, 0), (0, 0, 255), (0, 60, 0)), BOTH),
    'on purple': (coloured((68, 1, 84), (253, 231, 37), (33, 145, 140)), BOTH),
    'palette': (palette((0, 0, 0), (128, 0, 0), (0, 128, 0)), BOTH),
    'faint palette': (palette((0, 0, 0), (1, 1, 1), (2, 2, 2)), BOTH),
    'palette in another order': (
        Image.fromarray(coloured((0, 0, 0), (200, 0, 9), (0, 0, 255))).quantize(3), BOTH),
    'opaque': (Image.fromarray(MASK).convert('RGBA'), MASK > 0),
    'everything': (np.full_like(MASK, 255), np.ones_like(MASK, bool)),
}


@pytest.mark.parametrize('mask, expected', LABELS.values(), ids=LABELS)
def test_everything_that_is_no_background_is_a_defect(category, caplog, mask, expected):
    put(category, mask)
    assert np.array_equal(masks_of(category), central(expected))
    assert not caplog.records


DRAWN = Image.fromarray(MASK)
EDGES = {
    'smoothed': np.asarray(DRAWN.reduce(2).resize((64, 48), Image.Resampling.BILINEAR)),
    'enlarged': np.asarray(DRAWN.reduce(4).resize((64, 48), Image.Resampling.BICUBIC)),
    'a little noise': np.where(MASK > 0, 254, 1) + (np.indices(MASK.shape).sum(0) % 2).astype(np.uint8),
}


@pytest.mark.parametrize('mask', EDGES.values(), ids=EDGES)
def test_soft_edges_and_noise_are_cut_at_half_as_ever(category, mask, caplog):
    put(category, mask.astype(np.uint8))
    assert np.array_equal(masks_of(category), central(mask > 127))
    assert not caplog.records


def test_masks_with_many_greys_are_cut_at_half_and_told(category, caplog):
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    put(category, ramp)
    assert np.array_equal(masks_of(category), central(ramp > 127))
    assert 'more than 32 greys (what is darker than half counts as good): 1 of 1, ' in text(caplog)


@pytest.mark.parametrize('mask, words', [
    (MASK * 0, 'marks nothing, its largest value is 0; expected 1'),
    (MASK * 0 + 90, 'marks nothing'),
    (coloured((255, 255, 255), (255, 0, 0), (0, 0, 255)), 'holds no dark background'),
    (with_part(255) // 2 + 128, 'holds no dark background, its darkest value is 0.5'),
    (palette((255, 255, 255), (200, 0, 0), (0, 0, 200)), 'holds no dark background'),
    (MASK.T, r'is 48×64 pixels; expected 64×48 as .*a 1.png'),
    (MASK[::2, ::2], r'is 32×24 pixels; expected 64×48'),
    (Image.fromarray(np.dstack([RGB, MASK])), 'partly transparent'),
    (Image.fromarray(MASK / np.float32(255)), 'floating-point')])
def test_masks_that_say_nothing_clear_are_refused(category, mask, words):
    put(category, mask, 'a 1_mask.tiff')
    with pytest.raises(DataError, match=words):
        masks_of(category)


def test_several_masks_of_an_image(category):
    "As in MVTec LOCO AD: a folder of masks, each with a value of its own."
    for i, value in enumerate((255, 254, 90)):
        part = np.zeros_like(MASK)
        part[10 * i:10 * i + 5, 20:40] = value
        put(category, part, f'a 1/00{i}.png')
    found = masks_of(category)
    assert found.sum() == 3 * 5 * 20 and found[0, 12] and found[10, 12] and found[20, 12]
    assert category_fingerprint(load_category(category.parent, 'c'))
    put(category, MASK.T, 'a 1/003.png')
    with pytest.raises(DataError, match=r'a 1/003.png: is 48×64 pixels'):
        masks_of(category)


def turned(folder, orientation, pixels):
    "An image that is stored turned, and shown as `pixels` are."
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(pixels).save(folder / 'test/hole/a 1.png', exif=tag)
    stored = Image.fromarray(pixels)
    stored.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(stored))


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_a_mask_is_turned_with_its_image(category, orientation, caplog):
    stored = np.stack([MASK // 3, MASK, MASK], 2)
    stored[:5, :7] = 255
    shown = turned(category, orientation, stored)
    expected = Images([category / 'test/hole/a 1.png'], Config.smoke(resize=48, crop=48))[0]
    put(category, stored[..., 0])
    drawn_stored = masks_of(category, SMALL)
    put(category, shown[..., 0])
    assert np.array_equal(drawn_stored, masks_of(category, SMALL)) and not caplog.records
    assert (drawn_stored & (expected[1].numpy() > 0.5)).sum() > 0.95 * drawn_stored.sum()


@pytest.mark.parametrize('orientation, pixels', [(2, MASK), (3, MASK), (4, MASK), (6, MASK[:, :48])])
def test_orientations_that_the_size_leaves_open_are_told(category, caplog, orientation, pixels):
    turned(category, orientation, pixels)
    put(category, pixels)
    masks_of(category, SMALL)
    assert 'as it is stored and as it is shown (taken as shown): 1 of 1, ' in text(caplog)


@pytest.mark.parametrize('second', ['a 1.bmp', 'a 1.JPG', 'day 2/a 1.png', 'A 1.png'])
def test_a_mask_that_fits_two_images_is_told(category, caplog, second):
    write(category, f'test/hole/{second}')
    put(category, MASK)
    found = load_category(category.parent, 'c')
    assert found.masks[-1] == found.masks[-2]
    line, = caplog.records
    assert '1 masks fit several images, ' in line.getMessage() and second in line.getMessage()


LOST = {'vanished': (slice(20, 21), slice(24, 25)), 'cropped': (slice(10, 30), slice(0, 6)),
        'kept': (slice(10, 30), slice(20, 40)), 'corner': (slice(0, 2), slice(0, 2))}


@pytest.fixture
def lossy(category):
    "Masks of which one vanishes when it is resized, two are cropped, one stays."
    for i, part in enumerate(LOST.values(), 1):
        mask = np.zeros_like(MASK)
        mask[part] = 255
        write(category, f'test/hole/a {i}.png')
        put(category, mask, f'a {i}_mask.png')
    return category


def test_masks_that_are_lost_are_counted_and_told(lossy, caplog):
    config = Config.smoke(resize=40, crop=32, resize_mode='shorter')
    _, told = prepare_masks(load_category(lossy.parent, 'c'), config)
    assert {note: [p.name for p in paths] for note, paths in told.items()} == {
        'vanished': ['a 1_mask.png'], 'cropped': ['a 2_mask.png', 'a 4_mask.png']}
    assert not caplog.records
    read_masks(load_category(lossy.parent, 'c'), config)
    assert 'c: masks that vanish when they are resized' in text(caplog)
    assert 'do not see their defects): 2 of 4, ' in text(caplog)


class Stub:
    "Scores without a network."
    interrupted = False
    config = Config.smoke(resize=40, crop=32, resize_mode='shorter')

    def score(self, images, progress=False):
        count = len(images)
        maps = np.random.default_rng(0).random((count, 4, 4)).astype(np.float32)
        return Scores(np.arange(count, dtype=np.float32), maps, 32, list(map(str, images)))


def test_evaluate_tells_which_masks_are_lost(lossy, monkeypatch):
    given = {}
    monkeypatch.setattr('cse.deploy.saving.load', lambda folder, **other: given.update(other) or Stub())
    done = CliRunner().invoke(app, ['evaluate', 'model', str(lossy), '--quiet', '--bits', '12'])
    assert done.exit_code == 0 and given['bits'] == 12
    assert done.stdout.startswith('8 images: 4 good') and 'at the threshold' not in done.stdout
    for told in ('that vanish when they are resized', 'in the border that is cropped'):
        assert f'note: masks {told} (pixel metrics do not see their defects): ' in done.stderr
    (lossy / 'test/hole/a 3.png').unlink()
    found, _ = evaluation(Stub(), load_category(lossy.parent, 'c'))
    assert found['masks_cropped'] == 2 and 'pixel_auroc' not in found


# --- values

def save_inverted(path, values):
    tifffile.imwrite(path, values.astype(np.uint16), photometric='miniswhite')


def grey(path, bits=0):
    return read_image(path, bits)[0].numpy()


EXPECTED = PIXELS / 255.0
WIDE = {
    '10 bits in 16, PNG': ('a.png', 10, lambda v, p: Image.fromarray(v.astype(np.uint16)).save(p)),
    '12 bits in 16, PNG': ('a.png', 12, lambda v, p: Image.fromarray(v.astype(np.uint16)).save(p)),
    '14 bits in 16, TIFF': ('a.tif', 14, lambda v, p: tifffile.imwrite(p, v.astype(np.uint16))),
    '12 bits in 16, other byte order': (
        'a.tif', 12, lambda v, p: tifffile.imwrite(p, v.astype(np.uint16), byteorder='>')),
    '8 bits in 16': ('a.tif', 8, lambda v, p: tifffile.imwrite(p, v.astype(np.uint16))),
    '8 bits in 32': ('a.tif', 8, lambda v, p: tifffile.imwrite(p, v.astype(np.uint32))),
    '12 bits in 32, signed': ('a.tif', 12, lambda v, p: tifffile.imwrite(p, v.astype(np.int32))),
    '20 bits in 32': ('a.tif', 20, lambda v, p: tifffile.imwrite(p, v.astype(np.uint32))),
    '12 bits in PGM of 16': ('a.pgm', 12, lambda v, p: Image.fromarray(v.astype(np.int32)).save(p)),
    '12 bits in JPEG 2000 of 16': ('a.jp2', 12, lambda v, p: Image.fromarray(v.astype(np.uint16)).save(p)),
    '0 is white, 16 bits': ('a.tif', 16, lambda v, p: save_inverted(p, 65535 - v)),
    '0 is white, 12 bits in 16': ('a.tif', 12, lambda v, p: save_inverted(p, 4095 - v)),
}


@pytest.mark.parametrize('name, bits, save', WIDE.values(), ids=WIDE)
def test_bits_say_what_is_white(tmp_path, name, bits, save):
    values = (EXPECTED * (2**bits - 1)).round().astype(np.int64)
    save(values, tmp_path / name)
    assert np.allclose(grey(tmp_path / name, bits), EXPECTED, atol=0.5 / (2**bits - 1) + 1e-6)
    config = Config.smoke(resize=0, crop=48, bits=bits)
    assert np.allclose(Images(tmp_path, config)[0][0], central(EXPECTED), atol=1e-3)


def test_files_that_state_their_white_need_no_bits(tmp_path):
    values = (EXPECTED * 4095).round().astype(np.uint16)
    rows = '\n'.join(' '.join(map(str, row)) for row in values.tolist())
    (tmp_path / 'plain.pgm').write_text(f'P2\n64 48\n4095\n{rows}\n')
    (tmp_path / 'raw.pgm').write_bytes(b'P5\n64 48\n4095\n' + values.astype('>u2').tobytes())
    (tmp_path / 'twelve.tif').write_bytes(packed_tiff(values))
    for path in tmp_path.iterdir():
        for bits in (0, 12, 10):
            assert np.allclose(grey(path, bits), EXPECTED, atol=2e-4), path
    imagecodecs = pytest.importorskip('imagecodecs')
    codes = imagecodecs.jpeg2k_encode(values, level=0, reversible=True, bitspersample=12)
    (tmp_path / 'twelve.jp2').write_bytes(codes)
    assert np.allclose(grey(tmp_path / 'twelve.jp2', 12), EXPECTED, atol=5e-4)


def packed_tiff(values):
    "A little TIFF with 12 bits a sample: two values in three bytes."
    pairs = values.reshape(-1, 2).astype(int)
    data = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    height, width = values.shape
    data = data.astype(np.uint8).tobytes()
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, height),
            (279, len(data))]
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + struct.pack('<I', 0) + data


def test_arrays_and_images_in_memory_take_bits_too():
    values = (EXPECTED * 1023).round().astype(np.uint16)
    for image in (values, values[..., None], np.stack([values] * 3, 2), Image.fromarray(values),
                  Image.fromarray(values.astype(np.int32))):
        assert np.allclose(as_image(image, bits=10)[0], EXPECTED, atol=1e-3)
        found = Images([image], Config.smoke(resize=0, crop=48, bits=10))[0]
        assert np.allclose(found[2], central(EXPECTED), atol=1e-3)
        with pytest.raises(DataError, match='image: holds values from 0 to 1023; expected 0 to 511'):
            as_image(image, bits=9)
    assert torch.equal(as_image(PIXELS, bits=10), as_image(PIXELS))  # 8 bits are 8 bits


@pytest.mark.parametrize('name, words, save', [
    ('a.png', 'from 0 to 65535; expected 0 to 4095',
     lambda p: Image.fromarray(PIXELS.astype(np.uint16) * 257).save(p)),
    ('a.tif', 'from -3 to', lambda p: tifffile.imwrite(p, PIXELS.astype(np.int16) - 3)),
    ('a.tif', 'colour image with 16 bits', lambda p: tifffile.imwrite(p, RGB.astype(np.uint16))),
    ('a.png', 'colour image with 16 bits', lambda p: p.write_bytes(rgb16())),
    ('a.ppm', 'colour image with 16 bits',
     lambda p: p.write_bytes(b'P6\n64 48\n65535\n' + RGB.astype('>u2').tobytes()))])
def test_values_that_bits_do_not_fit_are_refused(tmp_path, name, words, save):
    save(tmp_path / name)
    with pytest.raises(DataError, match=words):
        read_image(tmp_path / name, bits=12)


def rgb16():
    "A PNG with colours of 16 bits, which Pillow reads and does not write."
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + row.tobytes() for row in RGB.astype('>u2'))
    head = struct.pack('>IIBBBBB', 64, 48, 16, 2, 0, 0, 0)
    parts = chunk(b'IHDR', head), chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def test_colours_of_8_bits_are_read_whatever_bits_say(tmp_path):
    for name in ('a.png', 'a.tif', 'a.ppm', 'a.jp2', 'a.bmp', 'a.gif'):
        write(tmp_path, name, pixels=PIXELS if name == 'a.gif' else RGB)
        assert torch.equal(read_image(tmp_path / name, bits=12), read_image(tmp_path / name))


class Brightness(Scorer):
    "Needs no network."
    config = Config.smoke(resize=48, crop=48, anomaly_map='none')
    _fitted = True

    def score_batch(self, images):
        return images.mean((1, 2, 3)), images.mean(1)


@pytest.mark.parametrize('save', [
    lambda p: tifffile.imwrite(p, PIXELS.astype(np.uint32)),
    lambda p: tifffile.imwrite(p, PIXELS.astype(np.uint16) * 4),
    lambda p: tifffile.imwrite(p, PIXELS.astype(np.uint16) * 16),
    lambda p: save_inverted(p, 65535 - PIXELS * 4.),
    lambda p: tifffile.imwrite(p, RGB.astype(np.uint16) * 16),
    lambda p: Image.fromarray(PIXELS // 20).save(p)])
def test_nearly_black_images_are_told_at_scoring(tmp_path, caplog, save):
    write(tmp_path, 'a.png', 'b.png')
    (tmp_path / 'c.png').write_text('no image')
    save(tmp_path / 'd.tif')
    Brightness().score(tmp_path)
    line = caplog.records[-1].getMessage()
    assert line.startswith('images: 1 of 4 nearly black') and f'such as {tmp_path}/d.tif' in line
    assert '`--bits 12`' in line
    caplog.clear()
    Brightness().score([tmp_path / 'a.png', tmp_path / 'b.png'])
    assert not caplog.records


def test_bits_are_a_setting_that_changes_nothing_unless_it_is_given():
    assert fingerprint(Config(bits=0)) == fingerprint(Config()) != fingerprint(Config(bits=12))
    for wrong in (-1, 25, 1.5, '12'):
        with pytest.raises(ValueError, match='bits='):
            Config(bits=wrong)


def test_the_command_line_takes_bits(tmp_path, monkeypatch):
    given = []
    def refuse(*args, **settings):
        given.append(settings.get('bits'))
        raise DataError('enough')
    monkeypatch.setattr('cse.deploy.fitting.fit_config', refuse)
    monkeypatch.setattr('cse.deploy.saving.load', refuse)
    monkeypatch.setattr('cse.deploy.runtime.open_detector', lambda *args: refuse(bits=args[-1]))
    Image.new('L', (8, 8)).save(tmp_path / 'a.png')
    folder = str(tmp_path)
    for line in (['fit', folder, '-o', f'{folder}/m'], ['score', 'm', folder],
                 ['calibrate', 'm', folder, '-o', f'{folder}/m']):
        assert CliRunner().invoke(app, [*line, '--bits', '12']).exit_code == 2
    assert CliRunner().invoke(app, ['score', 'm', folder]).exit_code == 2
    assert given == [12, 12, 12, 0]


def test_a_calibration_keeps_its_bits(tmp_path, monkeypatch):
    class Calibrated(Stub):
        calibration, history, best_epoch, fitted_on = None, [], 0, {}

        def calibrate(self, folder, progress):
            pass

        def save(self, folder):
            (folder / 'bits').write_text(str(self.config.bits))

    def load(folder, **other):
        detector = Calibrated()
        detector.config = Config.smoke(**other)
        return detector
    monkeypatch.setattr('cse.deploy.saving.load', load)
    monkeypatch.setattr('cse.deploy.runtime.has_runtime', lambda folder: True)
    (tmp_path / 'model.json').write_text('{"config": {"device": "cpu", "weights": "packaged"}}')
    monkeypatch.setattr('cse.deploy.fitting.check_promise', lambda *args: None)
    Image.new('L', (8, 8)).save(tmp_path / 'a.png')
    done = CliRunner().invoke(app, ['calibrate', str(tmp_path), str(tmp_path), '--bits', '12'])
    assert done.exit_code == 0, done.output
    assert (tmp_path / 'bits').read_text() == '12'


@pytest.mark.parametrize('images', [
    RGB[None].transpose(0, 3, 1, 2), torch.from_numpy(RGB.copy()).permute(2, 0, 1)[None],
    RGB[None].transpose(0, 3, 1, 2) / np.float32(255), RGB[None].transpose(0, 3, 1, 2) / 255])
def test_the_exported_runner_takes_uint8_and_floats_up_to_1(images):
    found = _in_range(np.asarray(images))
    assert found.dtype == np.float32 and np.allclose(found[0, 0], EXPECTED)


@pytest.mark.parametrize('images, words', [
    (RGB.astype(np.uint16), 'have type uint16'), (RGB.astype(int), 'have type int64'),
    (RGB > 9, 'have type bool'), (RGB.astype(np.float32), 'from 0 to 255; expected'),
    (RGB / -255, r'expected \[0, 1\]'), (RGB * np.nan, r'expected \[0, 1\]'), (RGB / 250, 'to 1.02')])
def test_the_exported_runner_refuses_other_values(images, words):
    with pytest.raises(DataError, match=words):
        _in_range(images)
