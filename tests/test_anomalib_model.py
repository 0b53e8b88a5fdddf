"CSE as a model of anomalib: same scores as the library, after a checkpoint and after export."
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip('anomalib', reason="anomalib is not installed: pip install '.[baselines]'")
from cse import CSE, Config  # noqa: E402
from cse.config import ConfigError  # noqa: E402
from cse.data.images import DataError, Images  # noqa: E402
from cse.extractor import WeightsError  # noqa: E402
from cse.baselines.anomalib import quiet  # noqa: E402
from together import in_threads  # noqa: E402

with quiet():
    from anomalib.data import Folder, ImageBatch
    from anomalib.engine import Engine
    from cse.deploy.anomalib_model import Cse, Preparation

SETTINGS = dict(resize=110, crop=96, engine='torch')
RAW = dict(profile='smoke', epochs=1, settings=SETTINGS, post_processor=False, visualizer=False)
CONFIG = Config.smoke(epochs=1, device='cpu', **SETTINGS)


@pytest.fixture(scope='module')
def root(surface):
    return surface / 'gravel'


def quiet_engine(folder):
    return Engine(
        default_root_dir=folder, accelerator='cpu', enable_progress_bar=False, enable_model_summary=False)


@pytest.fixture
def engine(tmp_path):
    return quiet_engine(tmp_path / 'results')


def data(root, **changes):
    folders = dict(
        normal_dir='train/good',
        normal_test_dir='test/good',
        abnormal_dir='test/bar',
        mask_dir='ground_truth/bar',
    )
    options = dict(train_batch_size=4, num_workers=0, val_split_mode='same_as_test')
    return Folder('gravel', root=root, **folders | options | changes)


def files(root):
    return sorted((root / 'test').rglob('*.png'))


def scores(model, engine, root):
    with quiet():
        batches = engine.predict(model, datamodule=data(root))
    found = {path: score.item() for b in batches for path, score in zip(b.image_path, b.pred_score)}
    return np.array([found[str(file)] for file in files(root)], np.float32)


@pytest.fixture(scope='module')
def fitted(root, tmp_path_factory):
    with quiet():
        engine = quiet_engine(tmp_path_factory.mktemp('results'))
        model = Cse(**RAW)
        engine.fit(model, datamodule=data(root))
    return model, engine


@pytest.fixture(scope='module')
def library(root):
    return CSE(CONFIG).fit(root / 'train', progress=False)


def loader(*batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def test_get_model_finds_it_once_it_is_imported():
    from anomalib.models import get_model
    assert type(get_model('cse')) is Cse
    assert get_model('cse', profile='smoke').config.epochs == 10, 'it needs no weights before it is fitted'


def test_scores_and_maps_are_those_of_the_library(fitted, library, root):
    "anomalib shuffles and validates; the result is the same bit by bit."
    model, engine = fitted
    expected = library.score(files(root), batch_size=6)
    assert torch.equal(model.model.prototypes, library.bank.prototypes)
    assert model.history == library.history
    assert np.array_equal(scores(model, engine, root), expected.image)
    with torch.no_grad():
        found = model.eval().model(torch.stack(list(Images(files(root), CONFIG))))
    assert found.anomaly_map.shape == (6, 1, 96, 96)
    assert np.allclose(found.anomaly_map[:, 0], expected.map, atol=1e-6)


def test_prepared_tensors_need_no_pre_processor(library, root, engine):
    "Validation and paths may be absent too."
    images = torch.stack(list(Images(root / 'train', CONFIG)))
    model = Cse(**RAW, pre_processor=False)
    with quiet():
        engine.fit(model, loader(ImageBatch(image=images[:4]), ImageBatch(image=images[4:])))
    assert torch.equal(model.model.prototypes, library.bank.prototypes)


def test_each_fit_starts_afresh(library, root, engine):
    model = Cse(**RAW, seed=1)
    with quiet():
        engine.fit(model, datamodule=data(root))
        other, model.seed = model.model.prototypes, 0
        engine.fit(model, datamodule=data(root))
    assert not torch.equal(other, library.bank.prototypes)
    assert torch.equal(model.model.prototypes, library.bank.prototypes)


def test_a_checkpoint_restores_a_fitted_model(fitted, root):
    model, engine = fitted
    with quiet():
        restored = Cse.load_from_checkpoint(engine.best_model_path)
    assert {'model.prototypes', 'model.embedder.w1'} <= restored.state_dict().keys()
    assert isinstance(restored.pre_processor, Preparation)
    assert np.allclose(scores(restored, engine, root), scores(model, engine, root), atol=1e-6)


def whole(root):
    "Images as in the files, larger than those of the model."
    return torch.stack(list(Images(files(root), Config(resize=0, crop=256))))


def test_an_exported_model_scores_the_same(fitted, root, tmp_path):
    model, engine = fitted
    expected = scores(model, engine, root)
    with quiet():
        path = engine.export(model, 'torch', export_root=tmp_path)
    with torch.no_grad():
        found = torch.load(path, weights_only=False)['model'].eval()(whole(root))
    assert np.abs(found.pred_score.numpy() - expected).max() < 1e-5
    assert found.anomaly_map.shape == (6, 1, 96, 96)


def test_onnx_and_openvino_score_the_same(root, engine, tmp_path, monkeypatch):
    "The file of OpenVINO in float32, also where it is compiled for bfloat16."
    pytest.importorskip('onnxscript', reason="not installed: pip install 'anomalib[openvino]'")
    from cse.fast.openvino import openvino_core
    with quiet():
        model = Cse(**RAW, extractor='resnet10t', weights='random')
        engine.fit(model, datamodule=data(root))
        onnx = engine.export(model, 'onnx', export_root=tmp_path, input_size=(256, 256))
        monkeypatch.setattr(model, 'to_onnx', lambda *args, **options: onnx)
        xml = engine.export(model, 'openvino', export_root=tmp_path, input_size=(256, 256))
    expected = scores(model, engine, root)
    for path, precision in ((onnx, 'f32'), (xml, 'f32'), (xml, 'bf16')):
        compiled = openvino_core().compile_model(str(path), 'CPU', {'INFERENCE_PRECISION_HINT': precision})
        found = compiled(whole(root).numpy())['pred_score']
        assert np.abs(found - expected).max() < 1e-4 * expected.max()


def test_several_threads_get_the_scores_of_their_own_images(fitted):
    model = fitted[0].eval().model
    sets = [torch.rand(n, 3, 96, 96, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 3, 5)]
    with torch.no_grad(): expected = [model(batch).pred_score for batch in sets]
    wrong = []

    @torch.no_grad()
    def work(first):
        for i in range(first, first + 4):
            found = model(sets[i % 4]).pred_score
            if not torch.equal(found, expected[i % 4]): wrong.append(i)

    in_threads(*(partial(work, first) for first in range(8)))
    assert wrong == []


@pytest.mark.parametrize('image, label, message', [
    (torch.rand(4, 3, 72, 72), None, r'batch: has shape \(4, 3, 72, 72\); expected N×3×96×96'),
    (torch.rand(4, 1, 96, 96), None, r'has shape \(4, 1, 96, 96\); expected .* of RGB images'),
    (torch.rand(4, 3, 96, 96), torch.tensor([0, 1, 0, 0]), 'is labelled as anomalous; expected'),
])
def test_training_images_that_cannot_be_used(image, label, message):
    class Items:  # `ImageBatch` refuses grey images itself
        image_path = None
    batch = Items()
    batch.image, batch.gt_label = image, label
    with pytest.raises(DataError, match=message):
        Cse(**RAW).training_step(batch, 0)


def test_too_few_images_and_none(engine):
    few = ImageBatch(image=torch.rand(2, 3, 96, 96))
    with quiet(), pytest.raises(DataError, match='2 defect-free images: expected at least 4'):
        engine.fit(Cse(**RAW, pre_processor=False), loader(few))
    with quiet(), pytest.raises(DataError, match='training set: holds no images'):
        folder = engine._cache.args['default_root_dir']
        engine = Engine(default_root_dir=folder, accelerator='cpu', barebones=True)
        engine.fit(Cse(**RAW), loader())


def test_normalised_and_small_images_are_refused():
    prepare = Preparation(CONFIG).transform
    with pytest.raises(DataError, match=r'expected \[0, 1\], not normalised'):
        prepare(torch.randn(2, 3, 200, 200))
    with pytest.raises(DataError, match='is 80×80 pixels; expected at least crop=96'):
        Preparation(CONFIG.replace(resize=0)).transform(torch.rand(2, 3, 80, 80))


def test_settings_are_checked_and_an_unfitted_model_says_so():
    with pytest.raises(ConfigError, match="did you mean 'clusters'"):
        Cse('smoke', settings=dict(cluster=2))
    with pytest.raises(RuntimeError, match='this model is not fitted'):
        Cse(**RAW).model(torch.rand(1, 3, 96, 96))
    with pytest.raises(WeightsError, match='no such file'):
        Cse('smoke', weights='none.safetensors').fit(torch.rand(6, 3, 224, 224))
    with pytest.raises(ConfigError, match='expected equal height and width'):
        Cse.configure_pre_processor((256, 224))
