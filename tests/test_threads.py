"A fitted detector is used by several threads at once."
import threading

import numpy as np
import pytest
import torch

from cse import CSE, Config

SMALL = dict(resize=64, crop=64, epochs=1)


@pytest.fixture(scope='module', params=['as fitted', 'compiled'])
def detector(request):
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector = CSE(Config.smoke(**SMALL)).fit(images, progress=False)
    return detector.compile() if request.param == 'compiled' else detector


def test_every_thread_gets_the_scores_of_its_own_images(detector):
    sizes, wrong = [1, 3, 9, 16], []
    sets = [torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in sizes]
    alone = [detector.score(images).image for images in sets]

    def score(images, expected):
        for _ in range(4):
            found = detector.score(images).image
            if not np.array_equal(found, expected): wrong.append(np.abs(found - expected).max())

    threads = [threading.Thread(target=score, args=pair) for pair in list(zip(sets, alone)) * 2]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert wrong == []
