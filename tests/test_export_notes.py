"The page beside an exported file: its sample prepares and scores images as the detector does."
import hashlib
import io
import re
import sys
from contextlib import chdir, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cse import Config
from cse.config import ConfigError
from cse.data.images import Images
from cse.deploy.export import _check_notes, export, export_notes
from cse.extensions.decisions import Calibration


def run_sample(page, image, folder, monkeypatch):
    "What the sample in Python prints for an image."
    sample, = re.findall('```python\n(.*?)```', page, re.S)
    printed = io.StringIO()
    monkeypatch.setattr(sys, 'argv', ['sample.py', str(image)])
    with chdir(folder), redirect_stdout(printed):
        exec(sample, {})
    return printed.getvalue().split()


def write_images(folder):
    "Images of several kinds, of which none has the size of the detector."
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (75, 110, 3), np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(colours).save(folder / 'colours.png')
    Image.fromarray(colours).save(folder / 'turned.jpg', exif=turned)
    Image.fromarray(colours[..., 0]).save(folder / 'grey.bmp')
    Image.fromarray(colours).quantize(16).save(folder / 'palette.png')
    Image.fromarray(rng.integers(0, 4096, (200, 90), np.uint16)).save(folder / '16bit.png')
    Image.fromarray(rng.integers(0, 4096, (66, 66), np.uint16)).save(folder / '16bit.tif')
    return sorted(folder.iterdir())


@pytest.mark.parametrize('to', ['onnx', 'openvino'])
def test_the_sample_prepares_images_as_the_library_does(tmp_path, monkeypatch, to):
    import onnxruntime
    import openvino
    given = []

    def network(images):
        given.append(images)
        return dict(score=np.zeros(1, np.float32), map=np.zeros((1, 48, 48), np.float32))

    class Session:
        def __init__(self, path): assert path == 'it\'s "$1".onnx'
        def run(self, names, inputs): return [network(inputs['image'])[name] for name in names]

    monkeypatch.setattr(onnxruntime, 'InferenceSession', Session)
    monkeypatch.setattr(openvino, 'Core', lambda: SimpleNamespace(compile_model=lambda *_: network))
    path = tmp_path / ('it\'s "$1"' + dict(onnx='.onnx', openvino='.xml')[to])
    for ending in ('.onnx', '.xml', '.bin'):
        path.with_suffix(ending).write_bytes(b'network')
    (tmp_path / 'images').mkdir()
    images = write_images(tmp_path / 'images')
    for mode, resize, bits in (('square', 64, 12), ('shorter', 64, 0), ('shorter', 48, 0), ('square', 0, 0)):
        config = Config.smoke(resize=resize, crop=48, resize_mode=mode, bits=bits)
        page = export_notes(SimpleNamespace(config=config), path, to)
        assert 'not calibrated' in page and hashlib.sha256(b'network').hexdigest() in page
        for image, expected in zip(images, Images(images, config)):
            assert run_sample(page, image, tmp_path, monkeypatch) == ['0.0']
            found = given.pop()
            assert found.dtype == np.float32 and found.shape == (1, 3, 48, 48)
            assert np.abs(found[0] - expected.numpy()).max() < 5e-6, (image.name, mode, resize)


def test_the_page_says_which_rate_holds(tmp_path):
    detector = SimpleNamespace(config=Config.smoke(), calibration=Calibration(np.arange(9), np.arange(9)))
    path = SimpleNamespace(name='a.onnx', open=lambda mode: io.BytesIO(b''))
    page = export_notes(detector, path, 'onnx')
    assert 'false-alarm rate | 10 %' in page and 'colours of the map | none up to 4, full from 8 on' in page
    assert '$' not in page and '\n\n\n' not in page
    (tmp_path / 'a.md').write_text(page)
    _check_notes(tmp_path / 'a.md')  # its own page may be replaced


@pytest.mark.parametrize('score', [0, -1e-4, 3e5])
def test_the_sample_divides_where_all_good_images_score_alike(tmp_path, monkeypatch, score):
    import onnxruntime
    found = [np.float32([score]), np.zeros((1, 48, 48), np.float32)]
    monkeypatch.setattr(onnxruntime, 'InferenceSession', lambda path: SimpleNamespace(run=lambda *_: found))
    calibration = Calibration(np.full(20, np.float32(score)), np.zeros(20))
    detector = SimpleNamespace(config=Config.smoke(resize=64, crop=48), calibration=calibration)
    (tmp_path / 'a.onnx').write_bytes(b'network')
    page = export_notes(detector, tmp_path / 'a.onnx', 'onnx')
    image, *_ = write_images(tmp_path)
    _, relative, decision = run_sample(page, image, tmp_path, monkeypatch)
    assert float(relative) == pytest.approx(1, abs=0.05) and decision == 'good'
    usual, threshold = (float(n) for n in re.search(r'double usual = (.*), threshold = (.*);', page).groups())
    assert usual < threshold


def test_another_file_is_not_replaced_by_the_page(tmp_path):
    (tmp_path / 'wood.xml.md').write_text('# What I know about wood\n')
    with pytest.raises(ConfigError, match='wood.xml.md: exists already'):
        export(SimpleNamespace(config=Config.smoke()), tmp_path / 'wood.xml')
    assert [p.name for p in tmp_path.iterdir()] == ['wood.xml.md']
