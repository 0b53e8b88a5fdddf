"The TILDA release: found by file names, split by a seed, identified by what is used."
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from cse import Config
from cse.config import TILDA_FABRICS, ConfigError, fingerprint
from cse.data.folders import categories, load_category, published_name
from cse.data.folders import category_fingerprint, files_fingerprint
from cse.data.folders import tilda_frames, tilda_split
from cse.data.images import DataError, Images, image_files


def write_release(root, fabric='C1R1', count=4, size=(12, 8), name='{}E{}N{}.TIF'):
    "Frames of one fabric, each kind in a folder of its own, with a text beside each frame."
    rng = np.random.default_rng(0)
    for kind in range(8):
        folder = root / fabric[:2] / fabric[2:] / f'E{kind}'
        folder.mkdir(parents=True)
        for n in range(1, count + 1):
            path = folder / name.format(fabric, kind, n)
            Image.fromarray(rng.integers(0, 255, size[::-1], np.uint8)).save(path)
            path.with_suffix('.txt').write_text('hole, upper left')
    return root


@pytest.fixture
def release(tmp_path):
    return write_release(write_release(tmp_path / 'TILDA'), 'C2R2')


def test_types_are_found_by_the_names_of_their_frames(release):
    assert categories(release) == ['tilda1', 'tilda3']
    category = load_category(release, 'tilda3')
    assert category.name == 'tilda3' and category.masks is None
    assert len(category.train) == 3
    assert Counter(category.defects) == {'good': 1, **{f'E{k}': 4 for k in range(1, 8)}}
    assert category.defects[0] == 'good' and category.labels.tolist() == [0] + [1] * 28
    assert all('C2R2E0N' in p.name for p in category.train + category.test[:1])
    assert all(f'C2R2{d}N' in p.name for p, d in zip(category.test[1:], category.defects[1:]))


def test_the_mapping_is_a_setting(release):
    order = ','.join(reversed(TILDA_FABRICS))
    assert categories(release, Config(tilda_types=order)) == ['tilda6', 'tilda8']
    there = load_category(release, 'tilda8', Config(tilda_types=order))
    usual = load_category(release, 'tilda1')
    assert there.train == usual.train and there.test == usual.test
    assert category_fingerprint(there) == category_fingerprint(usual)


REST = ','.join(TILDA_FABRICS[1:])


@pytest.mark.parametrize('types', ['c1r1', f'c9r9,{REST}', f'c1r3,{REST}', '', ',' * 7])
def test_a_wrong_mapping_is_refused(types):
    with pytest.raises(ConfigError, match='tilda_types=.*expected each of c1r1, c1r3, .* once'):
        Config(tilda_types=types)


WRONG = [
    dict(tilda_types=3),
    dict(tilda_train_share=0),
    dict(tilda_train_share=1.0),
    dict(tilda_split_seed=-1),
    dict(tilda_split_seed=0.5),
]


@pytest.mark.parametrize('values', WRONG)
def test_other_settings_have_limits(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        Config(**values)


def test_which_files_are_used_is_no_part_of_the_fingerprint_of_the_settings():
    types = ','.join(reversed(TILDA_FABRICS))
    changed = dict(tilda_types=types, tilda_train_share=0.5, tilda_split_seed=3)
    assert fingerprint(Config.paper(**changed)) == fingerprint(Config.paper()) == '1d2e24903451'
    assert fingerprint(Config.smoke(**changed)) == fingerprint(Config.smoke()) == '888996ff6b8f'


@pytest.mark.parametrize('seed', range(3))
def test_no_frame_is_in_two_sets(release, seed):
    for share in (0.1, 0.5, 0.9):
        config = Config(tilda_split_seed=seed, tilda_train_share=share)
        category = load_category(release, 'tilda1', config)
        train, test = category.train, category.test
        assert len(set(train) | set(test)) == len(train) + len(test) == 32
        assert category.train and 0 in category.labels


def test_the_published_split_stays_what_it_is():
    train, test = tilda_split('c1r1')
    assert test == [6, 10, 14, 40, 41, 43, 45, 47, 48, 49]
    assert sorted(train + test) == list(range(1, 51))
    assert len({tuple(tilda_split(f)[1]) for f in TILDA_FABRICS}) == 8
    assert tilda_split('c1r1', Config(tilda_split_seed=1)) != (train, test)
    assert [len(part) for part in tilda_split('c1r1', Config(tilda_train_share=0.3))] == [15, 35]
    with pytest.raises(DataError, match='c1r1: 1 good frame; expected at least 2'):
        tilda_split('c1r1', count=1)


def test_a_draw_elsewhere_does_not_move_the_split():
    before = tilda_split('c4r3')
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert tilda_split('c4r3') == before


def test_folders_and_spelling_do_not_matter(release, tmp_path):
    flat = tmp_path / 'flat'
    flat.mkdir()
    for p in image_files(release):
        head, number = p.stem.lower().split('n')
        shutil.copy(p, flat / f'{head}n{int(number):03}.tiff')
    one, other = load_category(release, 'tilda1'), load_category(flat, 'tilda1')
    assert [one.place(p) for p in one.test] == [other.place(p) for p in other.test]
    assert one.place(one.test[-1]) == 'test/E7/c1r1e7n4.tif'
    assert category_fingerprint(one) == category_fingerprint(other)


def test_the_fingerprint_is_that_of_what_is_used(release):
    first = category_fingerprint(load_category(release, 'tilda1'))
    next(release.rglob('C1R1E3N2.txt')).write_text('another word')
    next(release.rglob('C2R2E3N2.TIF')).write_bytes(b'another fabric')
    assert category_fingerprint(load_category(release, 'tilda1')) == first
    assert category_fingerprint(load_category(release, 'tilda1', Config(tilda_split_seed=1))) != first
    Image.new('L', (12, 8)).save(next(release.rglob('C1R1E3N2.TIF')))
    assert category_fingerprint(load_category(release, 'tilda1')) != first


def test_the_fingerprint_in_mvtec_layout_is_that_of_the_folder(surface):
    category = load_category(surface, 'gravel')
    folder = surface / 'gravel'
    assert category_fingerprint(category) == files_fingerprint(image_files(folder), folder)
    assert [category.place(p) for p in category.test[-2:]] == ['test/bar/01.png', 'test/bar/02.png']


def test_a_complete_fabric_is_tilda_and_a_part_is_not(release, tmp_path):
    complete = write_release(tmp_path / 'complete', count=50, size=(2, 2))
    assert published_name(load_category(complete, 'tilda1')) == 'TILDA'
    assert published_name(load_category(complete, 'tilda1', Config(tilda_train_share=0.5))) == 'TILDA'
    assert published_name(load_category(release, 'tilda1')) is None
    for p in complete.rglob('*N50.TIF'):
        p.unlink()
    assert published_name(load_category(complete, 'tilda1')) is None


def test_a_copy_in_mvtec_layout_is_read_as_such(release, tmp_path):
    category = load_category(release, 'tilda1')
    for p in category.train + category.test:
        target = tmp_path / 'copy' / 'tilda1' / category.place(p)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, target)
    copy = load_category(tmp_path / 'copy', 'tilda1')
    assert copy.places is None and sorted(copy.defects) == sorted(category.defects)
    assert category_fingerprint(copy) == category_fingerprint(category)


def test_frames_become_images(tmp_path):
    root = write_release(tmp_path / 'TILDA', 'c3r1', count=1, size=(768, 512))
    write_release(tmp_path / 'rest', 'c3r1', count=2, size=(768, 512))
    for p in (tmp_path / 'rest').rglob('*N2.TIF'):
        p.rename(root / p.name)
    category = load_category(root, 'tilda5')
    for mode in ('square', 'shorter'):
        image = Images(category.train, Config(resize_mode=mode))[0]
        assert image.shape == (3, 224, 224) and torch.equal(image[0], image[2])


def frame(release, name):
    return next(release.rglob(f'{name}.TIF'))


def remove_frame(name):
    return lambda release: frame(release, name).unlink()


def remove_folders(*names):
    def damage(release):
        for name in names:
            shutil.rmtree(release / name)
    return damage


def copy_frame(name):
    return lambda release: shutil.copy(frame(release, 'C1R1E0N1'), release / name)


def keep_first_frames(release):
    for path in release.rglob('C1*N[234].TIF'):
        path.unlink()


DAMAGE = {
    'one frame missing': (
        remove_frame('C1R1E3N2'),
        ['TILDA', 'tilda1 lacks 1 of 32 frames (c1r1e3n2.tif)', 'N1 to N4', 'E0 to E7'],
    ),
    'last frame of a kind missing': (
        remove_frame('C1R1E5N4'),
        ['lacks 1 of 32', 'c1r1e5n4.tif'],
    ),
    'a kind missing': (
        remove_folders('C1/R1/E6'),
        ['lacks 4 of 32', 'c1r1e6n1.tif, c1r1e6n2.tif'],
    ),
    'no good frames': (
        remove_folders('C1/R1/E0'),
        ['lacks 4 of 32', 'c1r1e0n1.tif'],
    ),
    'many missing': (
        remove_folders('C1/R1/E1', 'C1/R1/E2'),
        ['lacks 8 of 32', 'and 3 more'],
    ),
    'one frame of each kind': (
        keep_first_frames,
        ['TILDA', 'lacks 8 of 16', 'c1r1e0n2.tif', 'N1 to N2'],
    ),
    'a frame twice': (
        copy_frame('c1r1e0n01.tif'),
        ['c1r1e0n01.tif', 'the same frame as', 'C1R1E0N1.TIF', 'once'],
    ),
    'an unknown fabric': (
        copy_frame('c9r9e0n1.tif'),
        ['c9r9e0n1.tif', 'not a frame of TILDA', 'c1r1, c1r3'],
    ),
    'an unknown kind': (
        copy_frame('c1r1e8n1.tif'),
        ['c1r1e8n1.tif', 'E0 to E7'],
    ),
    'nothing left': (
        remove_folders('C1', 'C2'),
        ['TILDA', 'holds no category', 'train/good', 'C1R1E0N1.TIF'],
    ),
    'no folder': (
        shutil.rmtree,
        ['TILDA', 'no such folder', 'train/good and test, or a TILDA release'],
    ),
}


@pytest.mark.parametrize('damage, words', DAMAGE.values(), ids=DAMAGE)
def test_damaged_releases(release, damage, words):
    damage(release)
    with pytest.raises(DataError) as refusal:
        load_category(release, 'tilda1')
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize('name', ['tilda9', 'C9R9', 'tilda2', 'c1r1', 'wood'])
def test_unknown_types(release, name):
    with pytest.raises(DataError, match=f"'{name}': not in .*TILDA; expected one of tilda1, tilda3"):
        load_category(release, name)


@pytest.mark.parametrize('data', [b'', b'no picture', b'II*\0'])
def test_unreadable_frame(release, data):
    next(release.rglob('C1R1E2N3.TIF')).write_bytes(data)
    with pytest.raises(DataError, match=r'C1R1E2N3\.TIF: not a readable image .*expected one of .*\.tif'):
        Images(load_category(release, 'tilda1').test, Config()).check()


def test_what_is_no_frame_is_passed_over(release):
    for name in ('C1R1E0N1.png', '._C1R1E0N1.TIF', 'readme.tif', 'C1R1E0N1 copy.TIF'):
        (release / name).write_bytes(b'')
    assert {f: len(v) for f, v in tilda_frames(release).items()} == {'c1r1': 32, 'c2r2': 32}
