"What the tests of threads and processes share."
import os
import pickle
import select
import signal
import threading

import numpy as np
import torch

LONG = bool(os.environ.get('ROBUSTNESS_KILLS'))  # `make robustness` tries more
SETTINGS = dict(extractor='test_efficientnet', weights='random', resize=64, crop=64, epochs=1)


def images(count, seed=0):
    "Noise, N×64×64×3."
    return np.random.default_rng(seed).random((count, 64, 64, 3), np.float32)


def score_often(detector, batches, expected, calls):
    "In how many calls the scores are the expected ones. Also runs in other processes."
    found = 0
    for call in range(calls):
        which = call % len(batches)
        found += np.array_equal(detector.score(batches[which]).image, expected[which])
    return found


def in_threads(*works):
    "Run functions side by side; the first error comes back."
    errors = []

    def run(work):
        try:
            work()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if errors: raise errors[0]


def in_child(work, limit=60):
    "What a function returns in a forked child, which must answer within a time."
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(sender, pickle.dumps(work()))
        except BaseException as e:
            os.write(sender, pickle.dumps(f'{type(e).__name__}: {e}'))
        os._exit(0)
    os.close(sender)
    if not select.select([receiver], [], [], limit)[0]: os.kill(child, signal.SIGKILL)
    with open(receiver, 'rb') as file: answer = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert answer, f'the child ended with {status}' if status != -signal.SIGKILL else 'the child hangs'
    return pickle.loads(answer)


class torch_threads:
    "A number of threads in PyTorch, for a while."
    def __init__(self, count): self.count = count

    def __enter__(self):
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *exception): torch.set_num_threads(self.before)
