__version__ = "0.1.0"

from .config import Config
from .detector import CSE
from .experiments import run
from .scoring import Scores
