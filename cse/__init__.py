__version__ = "0.1.0"

from .config import Config
from .defects import DefectGenerator
from .features import FeatureExtractor
from .model import Decoder, Embedder
from .losses import contrastive_cosine_loss, decoder_loss
from .scoring import MemoryBank, Scores
from .detector import CSE
from .metrics import auroc
from .experiments import run

__all__ = ['CSE', 'Config', 'Decoder', 'DefectGenerator', 'Embedder', 'FeatureExtractor', 'MemoryBank', 'Scores', 'auroc', 'contrastive_cosine_loss',
           'decoder_loss', 'run']
