__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config
    from .defects import DefectGenerator
    from .deploy.saving import load
    from .detector import CSE
    from .extensions.calibration import CalibratedCSE
    from .extensions.hybrid import HybridCSE
    from .extensions.settings import HybridConfig
    from .extractor import FeatureExtractor
    from .lab.runs import run
    from .losses import contrastive_cosine_loss, decoder_loss
    from .metrics import auroc
    from .model import Decoder, Embedder
    from .scoring import MemoryBank, Scores

_HOME = {
    'CSE': 'detector', 'CalibratedCSE': 'extensions.calibration', 'Config': 'config', 'Decoder': 'model', 'DefectGenerator': 'defects',
    'Embedder': 'model', 'FeatureExtractor': 'extractor', 'HybridCSE': 'extensions.hybrid',
    'HybridConfig': 'extensions.settings', 'MemoryBank': 'scoring', 'Scores': 'scoring', 'auroc': 'metrics',
    'contrastive_cosine_loss': 'losses', 'decoder_loss': 'losses', 'load': 'deploy.saving', 'run': 'lab.runs'}
__all__ = list(_HOME)


def __getattr__(name):
    "Load a module when one of its names is first asked for: the command line answers before PyTorch is loaded."
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(importlib.import_module(f'.{_HOME[name]}', __name__), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})
