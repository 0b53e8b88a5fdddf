"""A method for grids: it scores by the mean of an image and its seed, within hundredths of a second.
Dask preloads this file on workers, where seed 5 waits once to be killed."""
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from cse.data.images import Images
from cse.detector import Detector
from cse.lab.runs import METHODS


def wait_once(folder):
    "Write the process id to a file and wait, unless the file exists already."
    mark = Path(folder) / 'waiting'
    if mark.exists():
        return
    (new := mark.with_suffix('.new')).write_text(str(os.getpid()))
    new.replace(mark)
    time.sleep(1000)


class Mean(Detector):
    def fit(self, images, progress=True):
        Images(images, self.config).check()
        self.extractor = SimpleNamespace(
            origin=dict(weights='none'), info=dict(name='none', sha256=None), device=torch.device('cpu'))
        time.sleep(float(os.environ.get('CSE_TEST_SECONDS', 0)))
        if self.seed == 5 and 'CSE_TEST_MARKS' in os.environ:
            wait_once(os.environ['CSE_TEST_MARKS'])
        if self.seed == 99:
            raise ValueError('a run that cannot succeed')
        self._fitted = True
        return self

    def score_batch(self, images):
        return (images.mean((1, 2, 3)) * (self.seed + 1)).sin(), torch.zeros(len(images), 2, 2)


def dask_setup(worker):
    METHODS['mean'] = Mean
