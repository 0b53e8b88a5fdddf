"float32 means float32: in every network that is compiled, and in files that others compile."
import ast
import logging
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from cse import CSE, Config, HybridConfig, HybridCSE
from cse.baselines.features import MeanDistance
from cse.classifier import ClassifierDetector
from cse.deploy.export import export, run_exported
from cse.fast.engines import convert_openvino
from cse.fast.openvino import compile_network, openvino_core
from together import SETTINGS, images

pytestmark = pytest.mark.cpu  # OpenVINO computes on the CPU
SOURCES = {p: p.read_text() for p in (Path(__file__).parent.parent / 'cse').rglob('*.py')}
X = torch.from_numpy(images(3)).permute(0, 3, 1, 2)


def hints(compiled):
    return [str(compiled.get_property(f'{name}_HINT')) for name in ('INFERENCE_PRECISION', 'EXECUTION_MODE')]


def lowered(compiled):
    "Kinds of operators that are computed in bfloat16."
    about = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    return [a['layerType'].astype(str) for a in about
            if 'runtimePrecision' in a and a['runtimePrecision'].astype(str) == 'bf16']


def for_bfloat16(path):
    "A file, compiled as a processor with bfloat16 does by default."
    return openvino_core().compile_model(path, 'CPU', dict(INFERENCE_PRECISION_HINT='bf16'))


@pytest.fixture(scope='module')
def has_bfloat16():
    "Can this processor compute in bfloat16?"
    network = convert_openvino(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), [X])
    return bool(lowered(for_bfloat16(network)))


@pytest.fixture
def compiled(monkeypatch):
    "What is compiled in a test, and the options that were given."
    made, compile_model = [], ov.Core.compile_model

    def recorded(core, network, device, options):
        made.append((compile_model(core, network, device, options), options))
        return made[-1][0]

    monkeypatch.setattr(ov.Core, 'compile_model', recorded)
    return made


def test_there_is_one_place_that_compiles():
    calls = [(p.name, node) for p, text in SOURCES.items() for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert [name for name, call in calls if call.func.attr == 'compile_model'] == ['openvino.py']
    sessions = [ast.unparse(call) for _, call in calls if call.func.attr == 'InferenceSession']
    assert sessions == ["onnxruntime.InferenceSession(network, providers=['CPUExecutionProvider'])"]


def test_every_network_is_compiled_for_float32(compiled, tmp_path, monkeypatch):
    "Extractor, compiled detector, exported file; bfloat16 only where the export tries it."
    config = HybridConfig.smoke(**SETTINGS | dict(extractor='resnet10t', engine='openvino'))
    detector = HybridCSE(config).fit(images(8), progress=False)
    expected, path = detector.score(X), export(detector, tmp_path / 'model.xml')
    detector.compile()
    run_exported(path, X)
    tried = [options for _, options in compiled if options['INFERENCE_PRECISION_HINT'] == 'bf16']
    exact = [hints(network) for network, options in compiled if options not in tried]
    assert len(tried) == 1 and len(exact) == 4
    assert all(precision == "<Type: 'float32'>" and 'ACCURACY' in mode for precision, mode in exact)
    monkeypatch.undo()
    assert_float32(path, expected)


def test_bfloat16_is_computed_where_it_is_asked_for(has_bfloat16, compiled):
    detector = CSE(Config.smoke(**SETTINGS, precision='bfloat16')).fit(images(8), progress=False)
    (network, _), = compiled
    assert hints(network)[0] == "<Type: 'bfloat16'>" or not has_bfloat16
    assert bool(lowered(network)) == has_bfloat16 and detector.config.precision == 'bfloat16'


def test_options_of_a_network_may_differ():
    network = convert_openvino(nn.Linear(3, 2), [torch.ones(1, 3)])
    assert compile_network(network, INFERENCE_NUM_THREADS=2).get_property('INFERENCE_NUM_THREADS') == 2


# --- files that others compile

@pytest.mark.parametrize('kind, settings', [
    (CSE, dict(clusters=2, score_axis='channels')), (ClassifierDetector, dict()),
    (MeanDistance, dict(extractor='resnet10t'))])  # it pools
def test_a_file_is_computed_in_float32_wherever_it_is_compiled(kind, settings, tmp_path, caplog):
    detector = kind(Config.smoke(**SETTINGS | settings)).fit(images(8), progress=False)
    path = export(detector, tmp_path / 'model.xml')
    assert 'bfloat16' not in caplog.text
    assert_float32(path, detector.score(X))


def assert_float32(path, expected):
    network = for_bfloat16(path)
    found = network(X.numpy())
    assert lowered(network) == []
    for name, wanted in (('score', expected.image), ('map', expected.map)):
        assert np.abs(found[name] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_file_that_cannot_ask_for_float32_says_so(has_bfloat16, tmp_path, caplog):
    "Layer normalisation is replaced when a file is compiled, and its replacement is not marked."
    settings = SETTINGS | dict(extractor='test_convnext', layers=(2, 3))
    detector = CSE(Config.smoke(**settings)).fit(images(8), progress=False)
    with caplog.at_level(logging.WARNING):
        path = export(detector, tmp_path / 'model.xml')
    assert ("compile it with INFERENCE_PRECISION_HINT='f32'" in caplog.text) == has_bfloat16
    assert np.allclose(run_exported(path, X)[0], detector.score(X).image, rtol=1e-4)
