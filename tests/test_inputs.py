"Images of every kind: one rule for all, loaders are obeyed, and one bad image costs only its own score."
import io
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler, Subset,
    SubsetRandomSampler, TensorDataset, WeightedRandomSampler, default_collate)

import cse
from cse import CSE, Config
from cse.baselines.features import MeanDistance
from cse.data.images import DataError, Images, as_images, resize_crop
from cse.extensions.calibration import CalibratedCSE

CONFIG = Config.smoke(resize=40, crop=32, epochs=1, extractor='test_efficientnet',
                      weights='random', engine='torch')
PIXELS = np.random.default_rng(0).integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
TENSORS = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255
PAIRS = [(image, i) for i, image in enumerate(TENSORS)]
CHOSEN = [7, 2, 9, 4, 0]


def prepared(source, config=CONFIG, **options):
    return torch.stack(list(Images(source, config, **options)))


EXPECTED = prepared(list(PIXELS))


@pytest.fixture(scope='module')
def detector():
    return CalibratedCSE(CONFIG).fit(PAIRS, progress=False, held_out=0.4)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f'{i:02}.png')
    return sorted(folder.iterdir())


class Items(Dataset):
    "Gives its values, and raises those that are errors."
    def __init__(self, values):
        self.values, self.asked = values, []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        self.asked.append((i, threading.get_ident()))
        if isinstance(self.values[i], Exception):
            raise self.values[i]
        return self.values[i]


class Stream(IterableDataset):
    def __init__(self, values):
        self.values = values

    def __iter__(self):
        for value in self.values:
            if isinstance(value, Exception):
                raise value
            yield value


class FirstOfEachBatch(DataLoader):
    def __iter__(self):
        for images, labels in super().__iter__():
            yield images[:1], labels[:1]


# --- what a loader says

def even(items):
    return [item for item in items if item[1] % 2 == 0]


LOADERS = {
    'sampler': (lambda: DataLoader(PAIRS, sampler=CHOSEN), CHOSEN),
    'random sampler': (lambda: DataLoader(PAIRS, sampler=SubsetRandomSampler(CHOSEN)), sorted(CHOSEN)),
    'sampler of tensors': (
        lambda: DataLoader(PAIRS, sampler=SubsetRandomSampler(torch.tensor(CHOSEN))), sorted(CHOSEN)),
    'weights of zero': (
        lambda: DataLoader(PAIRS, sampler=WeightedRandomSampler([0, 1] + 10 * [0], 4)), [1] * 4),
    'batch sampler': (lambda: DataLoader(PAIRS, batch_sampler=BatchSampler(CHOSEN, 2, True)), CHOSEN[:4]),
    'random batches': (
        lambda: DataLoader(PAIRS, batch_sampler=BatchSampler(SubsetRandomSampler(CHOSEN), 2, False)),
        sorted(CHOSEN)),
    'list of batches': (lambda: DataLoader(PAIRS, batch_sampler=[[3], [1, 2]]), [3, 1, 2]),
    'last batch dropped': (lambda: DataLoader(PAIRS, batch_size=5, drop_last=True), range(10)),
    'shuffle': (lambda: DataLoader(PAIRS, batch_size=5, shuffle=True), range(12)),
    'no batches': (lambda: DataLoader(PAIRS, batch_size=None, sampler=CHOSEN), CHOSEN),
    'batches at once': (
        lambda: DataLoader(TensorDataset(TENSORS), batch_size=None,
                           sampler=BatchSampler(CHOSEN, 2, False)), CHOSEN),
    'keys': (lambda: DataLoader(dict(a=PIXELS[5], b=PIXELS[6]), sampler=['b', 'a']), [6, 5]),
    'collate selects': (
        lambda: DataLoader([dict(image=t) for t in TENSORS], 5, sampler=CHOSEN,
                           collate_fn=lambda items: torch.stack([x['image'] for x in items])), CHOSEN),
    'collate drops': (
        lambda: DataLoader(PAIRS, 5, collate_fn=lambda items: default_collate(even(items))),
        range(0, 12, 2)),
    'collate drops, shuffled': (
        lambda: DataLoader(PAIRS, 5, shuffle=True, collate_fn=even), range(0, 12, 2)),
    'collate drops all of a batch': (
        lambda: DataLoader(PAIRS, sampler=[1, 3, 4], collate_fn=even), [4]),
    'collate without batches': (
        lambda: DataLoader(PAIRS, batch_size=None, sampler=RandomSampler(PAIRS),
                           collate_fn=lambda item: item[0]), range(12)),
    'its own order': (lambda: FirstOfEachBatch(PAIRS, batch_size=5), [0, 5, 10]),
    'iterable': (lambda: Stream(PAIRS[:5]), range(5)),
    'iterable in a loader': (lambda: DataLoader(Stream(PAIRS[:5]), batch_size=2), range(5)),
    'iterable, last batch dropped': (
        lambda: DataLoader(Stream(PAIRS[:5]), batch_size=2, drop_last=True), range(4)),
    'iterable without batches': (lambda: DataLoader(Stream(PIXELS[:5]).values, batch_size=None), range(5)),
    'subset': (lambda: Subset(PAIRS, CHOSEN), CHOSEN),
    'subset in a loader': (lambda: DataLoader(Subset(PAIRS, CHOSEN), 2, shuffle=True), CHOSEN),
    'joined': (lambda: ConcatDataset([Subset(PAIRS, [8]), Subset(PAIRS, CHOSEN)]), [8, *CHOSEN]),
}


@pytest.mark.parametrize('make, indices', LOADERS.values(), ids=LOADERS)
def test_a_loader_is_obeyed(make, indices):
    assert torch.equal(prepared(make()), EXPECTED[list(indices)])


def test_excluded_images_are_not_even_read():
    data = Items([RuntimeError('an image that was left out')] * 5 + PAIRS[:6])
    for options in (dict(sampler=SubsetRandomSampler(range(5, 11))), dict(batch_sampler=[range(5, 11)]),
                    dict(sampler=range(5, 11), collate_fn=list)):
        fitted = MeanDistance(CONFIG).fit(DataLoader(data, **options), progress=False)
        assert fitted.fitted_on == {} and fitted._fitted
        assert torch.equal(prepared(DataLoader(data, **options)), EXPECTED[:6])
    assert {i for i, _ in data.asked} == set(range(5, 11))


def test_a_part_of_a_loader_is_held_out():
    fitted = CalibratedCSE(CONFIG).fit(DataLoader(PAIRS, sampler=range(10)), progress=False, held_out=0.4)
    assert fitted.fitted_on['images'] == 6 and len(fitted.calibration) == 4
    assert fitted.took_part(PAIRS).tolist() == [True] * 10 + [False] * 2
    for loader in (Stream(PAIRS), DataLoader(PAIRS, 5, shuffle=True), DataLoader(PAIRS, 5, collate_fn=list)):
        part = Images(loader, CONFIG).subset([7, 2])
        assert torch.equal(torch.stack(list(part)), EXPECTED[[7, 2]])


def test_a_loader_with_processes():
    def halves(items):
        return torch.stack([image for image, _ in items])
    loader = DataLoader(PAIRS, 5, num_workers=1, collate_fn=halves)
    assert torch.equal(prepared(loader), EXPECTED)


@pytest.mark.parametrize('batch', [
    dict(image=TENSORS[:2]), tuple(zip(*PAIRS[:2])), [list(TENSORS[:2]), list(TENSORS[:2])],
    [TENSORS[0], torch.zeros(2)], [TENSORS[0], 1], None, 'text'], ids=lambda batch: type(batch).__name__)
def test_batches_that_could_mean_several_things_are_refused(batch):
    with pytest.raises(DataError, match='loader: its batch is a .*expected N×3×H×W'):
        Images(DataLoader(PAIRS, 2, collate_fn=lambda items: batch), CONFIG)


def test_what_a_loader_cannot_give_is_told(detector):
    with pytest.raises(DataError, match='got none'):
        Images(DataLoader(PAIRS, sampler=[]), CONFIG)
    for source in (Stream([*PAIRS[:4], OSError('stream broke')]),
                   DataLoader(Items([*PAIRS[:4], OSError('stream broke')]), 2, collate_fn=list)):
        for call in (detector.score, detector.fit):
            with pytest.raises(DataError, match=r'image 4 or later: cannot be read \(OSError: stream broke'):
                call(source)
    with pytest.raises(DataError, match="image 0: .*'DataLoader' object is not subscriptable"):
        Images(Subset(DataLoader(PAIRS), [0]), CONFIG).check()


# --- the same pixels, the same image

SAME = {
    'array': PIXELS, 'floats': PIXELS / 255, 'list of arrays': list(PIXELS),
    'PIL': [Image.fromarray(p) for p in PIXELS], 'tensor': TENSORS, 'list of tensors': list(TENSORS),
    'bytes': torch.from_numpy(PIXELS).permute(0, 3, 1, 2), 'gradients': TENSORS.clone().requires_grad_(),
    'Dataset': TensorDataset(TENSORS), 'loader': DataLoader(PAIRS, 5),
}


@pytest.mark.parametrize('config', [
    CONFIG, CONFIG.replace(resize=32), CONFIG.replace(resize=64), CONFIG.replace(resize=0),
    CONFIG.replace(resize_mode='shorter')], ids=lambda c: f'{c.resize} {c.resize_mode}')
def test_the_same_pixels_are_the_same_image(config, files):
    expected = prepared(files, config)
    for kind, source in SAME.items():
        assert torch.allclose(prepared(source, config), expected, atol=1e-6), kind
    again = torch.stack([resize_crop(image, config) for image in TENSORS])
    assert torch.equal(expected, again)


def test_the_same_pixels_score_the_same(detector, files):
    expected = detector.score(files).image
    for kind, source in SAME.items():
        assert np.allclose(detector.score(source).image, expected, rtol=1e-4), kind
        assert np.allclose(detector.anomaly_map(source), detector.anomaly_map(files), rtol=1e-3), kind
    ready = Images(EXPECTED, CONFIG, prepared=True)
    assert np.array_equal(detector.score(ready).image, expected)
    for source in (ready, files, PIXELS):  # fitted on tensors
        assert detector.took_part(source).all()
    assert 'prepared=True' in CSE.fit.__doc__ and 'prepared=True' in CSE.score.__doc__


def test_prepared_images_are_taken_as_they_are(files, detector):
    kinds = EXPECTED, list(EXPECTED), EXPECTED.permute(0, 2, 3, 1).numpy(), TensorDataset(EXPECTED)
    for ready in (*kinds, DataLoader(TensorDataset(EXPECTED), 5)):
        assert torch.equal(prepared(ready, prepared=True), EXPECTED)
    ready = Images(EXPECTED, CONFIG, prepared=True)
    assert as_images(ready, CONFIG.replace(resize=64)) is ready
    assert torch.equal(ready.subset([3, 1])[1], EXPECTED[1])
    other = torch.rand(4, 3, 48, 32)
    with pytest.raises(DataError, match='image 0: is 32×48 pixels; expected 32×32'):
        Images(other, CONFIG, prepared=True).check()
    for settings, words in ((dict(resize=64), 'resize=64; expected 40'),
                            (dict(crop=40), 'crop=40; expected 32'),
                            (dict(resize_mode='shorter'), 'resize_mode=shorter; expected square')):
        images = Images(files, CONFIG.replace(**settings))
        for call in (detector.score, detector.fit, detector.calibrate, detector.took_part):
            with pytest.raises(DataError, match=words):
                call(images)


# --- one image that fails alone

def pil(path, cut=None):
    "A PIL image that is not decoded yet, and perhaps cut off."
    return Image.open(io.BytesIO(path.read_bytes()[:cut]))


def closed_image(path):
    image = Image.open(path)
    image.close()
    return image


def closed_file(path):
    with open(path, 'rb') as file:
        return Image.open(file)


BAD = {
    'truncated': (lambda f: pil(f, 300), 'image 3: .*truncated'),
    'closed image': (closed_image, 'image 3: .*closed image'),
    'closed file': (closed_file, 'image 3: .*closed file'),
    'None': (lambda f: None, 'image 3: is a NoneType'),
    'NaN': (lambda f: float('nan'), 'image 3: is a float'),
    'empty tuple': (lambda f: (), 'image 3: .*IndexError'),
    'no pixels': (lambda f: np.zeros((0, 5, 3), np.uint8), r'image 3: .*\(0, 5, 3\)'),
    'transparent': (lambda f: Image.new('RGBA', (32, 32)), 'image 3: is partly transparent'),
    'no values': (lambda f: torch.zeros(3, 8, 8, device='meta'), 'image 3: .*meta'),
    'missing file': (lambda f: f.parent / 'none.png', 'none.png: no such file'),
    'dict': (lambda f: dict(image=f), 'image 3: is a dict'),
}


@pytest.mark.parametrize('make, words', BAD.values(), ids=BAD)
def test_one_bad_image_costs_only_its_own_score(detector, files, caplog, make, words):
    images = [pil(files[0]), PIXELS[1], files[2], make(files[3]), PAIRS[4], str(files[5]), TENSORS[6]]
    scores = detector.score(images, batch_size=2).image
    expected = detector.score(files[:7], batch_size=2).image
    assert np.isnan(scores).tolist() == [i == 3 for i in range(7)]
    assert np.allclose(np.delete(scores, 3), np.delete(expected, 3), rtol=1e-4)
    assert '1 of 7 images have no score' in caplog.text
    with pytest.raises(DataError, match=words):
        detector.fit(images, progress=False)


@pytest.mark.parametrize('error', [
    OSError('gone'), KeyError('gone'), IndexError('gone'), StopIteration('gone'), AttributeError('gone'),
    MemoryError('gone'), RuntimeError('gone'), EOFError()], ids=lambda e: type(e).__name__)
def test_an_item_of_a_dataset_may_raise(detector, caplog, error):
    data = Items([*PAIRS[:3], error, *PAIRS[4:]])
    for source, place in ((data, 3), (DataLoader(data, sampler=[9, 3, 5]), 1), (Subset(data, [2, 3]), 1)):
        assert np.flatnonzero(np.isnan(detector.score(source).image)).tolist() == [place]
    why = f'{type(error).__name__}: {error}'.split('\n')[0] if error.args else 'EOFError'
    assert f'image 3: cannot be read ({why}); expected an image' in caplog.text
    for source in (data, DataLoader(data, sampler=[9, 3, 5, 0, 1])):
        with pytest.raises(DataError, match=f'image 3: cannot be read .{type(error).__name__}'):
            detector.fit(source, progress=False)


def test_ctrl_c_in_a_dataset_is_no_bad_image(detector):
    class Interrupted(Items):
        def __getitem__(self, i):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        detector.score(Interrupted(PAIRS))


def test_held_out_images_keep_their_names():
    data = Items([*PAIRS[:10], OSError('gone'), PAIRS[11]])
    part = Images(data, CONFIG).subset([2, 10])
    assert len(part) == 2 and data.asked == []
    with pytest.raises(DataError, match='image 10: cannot be read'):
        part.check()


def test_datasets_are_read_in_order_by_the_caller():
    data = Items(PAIRS)
    list(Images(data, CONFIG.replace(workers=4)).batches(2))
    assert data.asked == [(i, threading.get_ident()) for i in range(12)]


def test_a_pil_image_is_decoded_by_one_thread_at_a_time():
    pixels = np.random.default_rng(0).integers(256, size=(300, 300, 3), dtype=np.uint8)
    expected = prepared(pixels)
    for ending in ('PNG', 'JPEG'):
        Image.fromarray(pixels).save(file := io.BytesIO(), ending)
        for _ in range(3):
            found = next(Images([Image.open(file)] * 8, CONFIG.replace(workers=8)).batches(8))
            assert (found == found[0]).all()
        assert ending == 'JPEG' or torch.equal(found[:1], expected)


# --- tables

def test_a_column_of_paths_is_read(files):
    table = pd.DataFrame(dict(path=files, label=0))
    mixed = table.sample(frac=1, random_state=0)
    for source in (table.path, table.path.values, table.path.astype(str), table.set_index('path').index,
                   table.path.astype('category'), list(files), np.array(files, dtype=object)):
        assert Images(source, CONFIG).paths == [str(f) for f in files]
    assert Images(mixed.path, CONFIG).paths == [str(f) for f in mixed.path]
    for source in (table.values, table[['path']].values, list(table.itertuples(index=False))):
        assert torch.equal(prepared(source), EXPECTED)
    assert len(Images(np.array(str(files[0])), CONFIG)) == 1


def test_tables_and_what_has_no_order_are_refused(files, detector):
    table = pd.DataFrame(dict(path=files, label=0))
    cases = ((table, r"DataFrame; expected one column, such as images\['path'\]"),
             (table[['path']], 'DataFrame'), (dict(enumerate(files)), r'dict; .*list\(images.values\(\)\)'),
             ({str(f): f for f in files}, 'dict'), (dict(path=files), 'dict'), (set(files), 'got a set'),
             ((f for f in files), 'got a generator'), (dict(enumerate(files)).values(), 'dict_values'))
    for source, words in cases:
        for call in (detector.score, detector.fit, detector.p_values, detector.calibrate):
            with pytest.raises(DataError, match=words):
                call(source)
    with pytest.raises(DataError, match='image 0: is a dict'):
        detector.fit(table.to_dict('records'))


def test_a_missing_value_in_a_column_is_one_image(detector, files, caplog):
    for column in (pd.Series([*files[:3], None]), pd.Series([*map(str, files[:3]), None], dtype='string')):
        assert np.isnan(detector.score(column).image).tolist() == [False] * 3 + [True]
    assert cse.data.images.DataError is DataError and 'image 3: is a' in caplog.text
