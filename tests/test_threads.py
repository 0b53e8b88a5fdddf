"One detector in several threads and processes: every call gets the scores of its own images."
import copy
import gc
import io
import multiprocessing
import os
import pickle
import threading
from functools import partial

import joblib
import numpy as np
import pytest
import torch
from torch import nn

import cse
from cse import CSE, CalibratedCSE, Config, HybridConfig, HybridCSE
from cse.data.forks import between_forks
from cse.data.images import Images
from cse.deploy.export import export, run_exported
from cse.extensions.calibration import Calibration
from cse.fast import engines
from together import LONG, SETTINGS, images, in_child, in_threads, score_often, torch_threads

THREADS, CALLS = 8, 500 if LONG else 5
PROCESSES, PROCESS_CALLS = (4, 200) if LONG else (2, 3)
SETS = [images(n, seed=n) for n in (1, 2, 3, 8, 9, 16, 17, 5)]
BATCH = SETS[4]
FORMS = ['as fitted', 'compiled', 'torch', 'hybrid'] + ['torch compiled'] * LONG
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')


@pytest.fixture(scope='module')
def fitted():
    return CalibratedCSE(Config.smoke(**SETTINGS)).fit(images(16), progress=False, held_out=0.4)


@pytest.fixture(scope='module')
def saved(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp('models') / 'model')


@pytest.fixture(scope='module')
def forms(fitted, saved):
    "The forms in which a detector scores."
    made = {'as fitted': fitted, 'compiled': copy.deepcopy(fitted).compile(),
            'torch': cse.load(saved, engine='torch'),
            'hybrid': HybridCSE(HybridConfig.smoke(**SETTINGS)).fit(images(16), progress=False)}
    if LONG:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
            made['torch compiled'] = cse.load(saved, engine='torch').compile()
    return made


@pytest.fixture(scope='module')
def exported(fitted, tmp_path_factory):
    "From a batch to the scores of an exported file, which is compiled for each call."
    path = export(fitted, tmp_path_factory.mktemp('exported') / 'model.xml')
    return lambda batch: run_exported(path, prepared(batch))[0]


def prepared(batch):
    return torch.stack(list(Images(batch, Config.smoke(**SETTINGS))))


# --- threads

def count_in_threads(score, sets, calls):
    "Calls of several threads that gave the scores of a single one."
    alone, equal = [score(batch) for batch in sets], []

    def work(first):
        for which in range(first, first + calls):
            which %= len(sets)
            equal.append(np.array_equal(score(sets[which]), alone[which]))

    in_threads(*(partial(work, first) for first in range(THREADS)))
    return sum(equal)


@pytest.mark.parametrize('name', FORMS)
def test_every_thread_gets_the_scores_of_its_own_images(forms, name, record_property):
    detector = forms[name]
    assert count_in_threads(lambda batch: detector.score(batch).image, SETS, CALLS) == THREADS * CALLS
    record_property('thread_calls', THREADS * CALLS)


@pytest.mark.cpu
def test_exported_files_in_threads(exported, record_property):
    calls = 20 if LONG else 1
    assert count_in_threads(exported, SETS[:3], calls) == THREADS * calls
    record_property('thread_calls', THREADS * calls)


@pytest.mark.cpu
def test_threads_that_meet_compile_a_network_once(fitted, monkeypatch):
    made, compile_network = [], engines.compile_network

    def counted(*args, **options):
        made.append(compile_network(*args, **options))
        return made[-1]

    monkeypatch.setattr(engines, 'compile_network', counted)
    detector, expected = copy.deepcopy(fitted), fitted.score(SETS[1]).image
    ready, found = threading.Barrier(4), []

    def work():
        ready.wait()
        found.append(detector.score(SETS[1]).image)

    in_threads(*[work] * 4)
    assert len(made) == 1 and all(np.array_equal(f, expected) for f in found)


@pytest.mark.cpu
def test_a_request_that_fails_is_not_used_again(fitted):
    network = copy.deepcopy(fitted.extractor)
    network(prepared(SETS[0]))
    (compiled,) = network._compiled.values()
    with pytest.raises(RuntimeError, match='shape'):
        compiled(torch.rand(1, 3, 2, 2))
    assert len(compiled.requests) == 0
    assert torch.equal(network(prepared(SETS[2]))[0], fitted.extractor(prepared(SETS[2]))[0])


def test_a_calibration_and_its_images_stay_together(fitted):
    "Some threads calibrate again while others read what would be saved."
    detector, sets = copy.deepcopy(fitted), [images(n, seed=n) for n in (4, 6)]
    pairs = set()

    def calibrate(batch):
        for _ in range(8): detector.calibrate(batch)

    def look():
        for _ in range(400):
            about = detector.about()
            pairs.add((len(about['calibration']), len(about['seen']['calibrated'])))

    in_threads(partial(calibrate, sets[0]), partial(calibrate, sets[1]), look, look)
    assert pairs <= {(n, n) for n in (4, 6, len(fitted.calibration))}


def test_a_decision_uses_one_calibration(fitted, monkeypatch):
    "Another thread calibrates while this one scores."
    detector = copy.deepcopy(fitted)
    expected, score = detector.predict(SETS[3], alpha=0.2), detector.score

    def slow(batch):
        detector.calibration = Calibration([0.0])
        return score(batch)

    monkeypatch.setattr(detector, 'score', slow)
    assert np.array_equal(detector.predict(SETS[3], alpha=0.2), expected)


def test_detectors_are_fitted_and_loaded_side_by_side(fitted, saved):
    "Weights that are drawn at random come out as in one thread."
    expected, found = fitted.score(SETS[3]).image, []
    alone = CSE(Config.smoke(**SETTINGS)).fit(images(16), progress=False).score(SETS[3]).image

    def load(): found.append((cse.load(saved).score(SETS[3]).image, expected))

    def fit():
        detector = CSE(Config.smoke(**SETTINGS)).fit(images(16), progress=False)
        found.append((detector.score(SETS[3]).image, alone))

    in_threads(load, fit, load, fit, load)
    assert len(found) == 5 and all(np.array_equal(a, b) for a, b in found)


def resident():
    "Megabytes of this process in memory."
    with open('/proc/self/statm') as file: pages = int(file.read().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs /proc')
def test_memory_stays_flat(fitted, record_property):
    "Threads come and go, as in a web server that starts one for each call."
    calls, batch = (1250 if LONG else 40), images(16)

    def score_all(calls):
        for _ in range(calls): in_threads(partial(fitted.score, batch))

    score_all(max(calls // 5, 20))
    before = resident()
    score_all(calls)
    assert resident() - before < 16
    record_property('scored', 16 * calls)


# --- copies

@pytest.mark.parametrize('name', FORMS)
def test_a_pickled_detector_scores_alike(forms, name):
    detector = forms[name]
    expected, saved = detector.score(BATCH).image, io.BytesIO()
    joblib.dump(detector, saved)
    saved.seek(0)
    copies = joblib.load(saved), pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector)
    for other in copies[:1 if 'compiled' in name and not LONG else 3]:
        assert np.array_equal(other.score(BATCH).image, expected)
        assert repr(other) == repr(detector) and other.extractor.info == detector.extractor.info


def test_a_detector_travels_as_a_future_of_dask(fitted):
    from distributed.protocol import deserialize, serialize
    other = deserialize(*serialize(fitted))
    assert np.array_equal(other.score(BATCH).image, fitted.score(BATCH).image)
    assert np.array_equal(other.predict(BATCH, alpha=0.2), fitted.predict(BATCH, alpha=0.2))
    assert other.took_part(images(16)).all()


def test_a_detector_that_is_not_fitted_is_pickled_too(fitted):
    other = pickle.loads(pickle.dumps(CalibratedCSE(Config.smoke(**SETTINGS))))
    other.fit(images(16), progress=False, held_out=0.4)
    assert np.array_equal(other.score(BATCH).image, fitted.score(BATCH).image)


# --- forks

@pytest.mark.cpu
@needs_fork
@pytest.mark.parametrize('name', FORMS)
@pytest.mark.parametrize('threads', [1, 2] if LONG else [2])
def test_a_forked_child_scores_like_its_parent(forms, name, threads):
    detector = forms[name]
    with torch_threads(threads):
        expected = detector.score(BATCH).image
        for _ in range(10 if LONG else 1):
            assert np.array_equal(in_child(lambda: detector.score(BATCH).image), expected)
        assert np.array_equal(detector.score(BATCH).image, expected)


@pytest.mark.cpu
@needs_fork
@pytest.mark.parametrize('name', FORMS if LONG else ['as fitted', 'torch'])
def test_a_fork_waits_for_threads_that_score(forms, name):
    detector, over = forms[name], threading.Event()
    expected = detector.score(BATCH).image

    def score():
        while not over.is_set(): detector.score(BATCH)

    def fork():
        try:
            for _ in range(20 if LONG else 2):
                assert np.array_equal(in_child(lambda: detector.score(BATCH).image), expected)
        finally:
            over.set()

    in_threads(score, score, score, fork)


@pytest.mark.cpu
@needs_fork
def test_what_a_forked_child_can_do(fitted, exported):
    "Score, calibrate, decide, compile, run an exported file, start threads, and fork again."
    expected = fitted.score(BATCH).image, exported(BATCH)

    def everything():
        found, threads = [], []
        in_threads(*[lambda: threads.append(fitted.score(BATCH).image)] * 4)
        found += [np.array_equal(image, expected[0]) for image in threads]
        found.append(np.array_equal(exported(BATCH), expected[1]))
        found.append(np.allclose(copy.deepcopy(fitted).compile().score(BATCH).image, expected[0], rtol=1e-5))
        found.append(len(copy.deepcopy(fitted).calibrate(images(6, 6)).calibration) == 6)
        found.append(np.array_equal(in_child(lambda: fitted.score(BATCH).image), expected[0]))
        return found

    assert in_child(everything) == [True] * 8


@pytest.mark.cpu
@needs_fork
def test_a_child_may_free_the_networks_of_its_parent():
    networks = [engines.compile_openvino(nn.Linear(3, 2), [torch.ones(1, 3)])]
    networks[0](torch.ones(1, 3))

    def free():
        networks.clear()
        gc.collect()
        return 'alive'

    assert in_child(free) == 'alive'
    free()


@pytest.mark.cpu
@needs_fork
def test_a_child_compiles_after_its_parent_freed_a_network():
    "Threads of OpenVINO that wait in the parent for their next network do not exist in a child."
    kept, freed = (engines.compile_openvino(nn.Linear(3, 2), [torch.ones(1, 3)]) for _ in range(2))
    expected = kept(torch.ones(1, 3))[0]
    del freed
    gc.collect()

    def compiled():
        again = pickle.loads(pickle.dumps(kept))
        return torch.equal(again(torch.ones(1, 3))[0], expected)

    assert in_child(compiled) is True


@pytest.mark.cpu
@needs_fork
def test_a_thread_may_fork_while_it_computes():
    with between_forks(), between_forks():
        assert in_child(lambda: between_forks.running) == 1
    assert between_forks.running == 0 and in_child(lambda: between_forks.running) == 0


# --- processes

def count_equal(pool, detector):
    "Calls of several processes whose scores are those of this one."
    batches = [images(n, seed=n) for n in (1, 9, 4)]
    expected = [detector.score(batch).image for batch in batches]
    found = sum(pool.starmap(score_often, [(detector, batches, expected, PROCESS_CALLS)] * PROCESSES))
    assert score_often(detector, batches, expected, 3) == 3, 'sending a detector changes it'
    return found


def several(forms):
    return list(forms.values())[:None if LONG else 2]


@pytest.mark.cpu
@needs_fork
def test_forked_processes(forms, record_property):
    for detector in several(forms)[:None if LONG else 1]:
        with multiprocessing.get_context('fork').Pool(PROCESSES) as pool:
            assert count_equal(pool, detector) == PROCESSES * PROCESS_CALLS
        record_property('process_calls', PROCESSES * PROCESS_CALLS)


@pytest.mark.parametrize('method', ['spawn'] + ['forkserver'] * LONG)
def test_started_processes(forms, method, record_property):
    "They import everything again, and build the networks again."
    with multiprocessing.get_context(method).Pool(PROCESSES if LONG else 1) as pool:
        for detector in several(forms):
            assert count_equal(pool, detector) == PROCESSES * PROCESS_CALLS
            record_property('process_calls', PROCESSES * PROCESS_CALLS)


@pytest.mark.skipif(not LONG, reason='make robustness')
def test_workers_of_joblib_and_dask(fitted, record_property):
    from distributed import Client
    expected = fitted.score(BATCH).image
    jobs = [joblib.delayed(score_often)(fitted, [BATCH], [expected], PROCESS_CALLS)] * 4
    assert sum(joblib.Parallel(2, backend='loky')(jobs)) == 4 * PROCESS_CALLS
    with Client(n_workers=2, threads_per_worker=2, dashboard_address=None) as client:
        config = Config.smoke(**SETTINGS)
        learned = client.submit(CalibratedCSE(config).fit, images(16), progress=False, held_out=0.4)
        job = score_often, learned, [BATCH], [expected], PROCESS_CALLS
        futures = [client.submit(*job, pure=False) for _ in range(4)]
        assert sum(client.gather(futures)) == 4 * PROCESS_CALLS
        assert np.array_equal(learned.result().score(BATCH).image, expected)
    record_property('process_calls', 8 * PROCESS_CALLS)
