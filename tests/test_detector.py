"""The detector in other hands: inputs of all kinds, decisions, interrupted trainings, saved files, and the command line."""
import copy, hashlib, json, os, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load, save
from sklearn.base import clone
from torch.utils.data import DataLoader
from typer.testing import CliRunner
from cse import CSE, Config
from cse.cli import app
from cse.config import ConfigError
from cse.data.images import DataError, Images, read_image
from cse.data.files import is_device
from cse.data.folders import load_category
from cse.data.model_files import ModelError
from cse.detector import _checksum
from cse.lab.grid import GridError
from cse.deploy.export import ExportError, export, run_exported
from cse.extensions.calibration import Calibration, CalibrationError
from cse.data.builtin import builtin_surfaces
from test_tilda import write_release

SMALL = dict(epochs=2, device='cpu', engine='torch')


@pytest.fixture(scope='module')
def wood(): return builtin_surfaces(['wood']) / 'wood'


@pytest.fixture(scope='module')
def good(wood): return sorted((wood / 'train/good').iterdir())[:24]


@pytest.fixture(scope='module')
def detector(good): return CSE(Config.smoke(**SMALL)).fit(good, progress=False, held_out=0.4)


@pytest.fixture(scope='module')
def saved(detector, tmp_path_factory): return detector.save(tmp_path_factory.mktemp('saved') / 'wood.cse')


def cse(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_every_kind_of_input_scores_alike(detector, good):
    files, expected = good[:3], detector.score(good[:3]).image
    opened = [Image.open(f).convert('RGB') for f in files]
    arrays = [np.asarray(i) for i in opened]
    tensors = torch.stack([read_image(f) for f in files])
    kinds = dict(strings=[str(f) for f in files], pil=opened, arrays=arrays, batch=np.stack(arrays), floats=np.stack(arrays) / np.float32(255), tensor=tensors, dataset=list(zip(tensors, range(3))),
                 loader=DataLoader(list(zip(tensors, range(3))), batch_size=2, shuffle=True))
    for name, images in kinds.items(): assert np.allclose(detector.score(images).image, expected, rtol=1e-4), name
    for single in (files[0], str(files[0]), opened[0], arrays[0]): assert np.allclose(detector.score(single).image, expected[:1], rtol=1e-4)


def test_images_of_the_size_of_the_crop_are_prepared_like_files(detector, tmp_path):
    array = np.random.default_rng(0).integers(256, size=(224, 224, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / 'small.png')
    by_file = Images(tmp_path, detector.config)[0]
    assert torch.equal(Images(array, detector.config)[0], by_file) and torch.equal(Images(Image.fromarray(array), detector.config)[0], by_file)
    assert torch.equal(Images(by_file[None], detector.config)[0], by_file)  # a tensor of that size is prepared already


def test_interrupted_run_leaves_no_record(surface, tmp_path, monkeypatch):
    from cse import experiments, training
    def validate(self, network, losses_of, epoch):
        if epoch: raise KeyboardInterrupt
        return 1.0, dict(variance=1.0, between_images=1.0, dimensions=1.0)
    monkeypatch.setattr(training._Validation, '__call__', validate)
    with pytest.raises(KeyboardInterrupt): experiments.run(Config.smoke(**SMALL), surface, 'gravel', results=tmp_path)
    assert not list((tmp_path / 'records').glob('*.json'))


def test_prototypes_go_where_the_head_goes(detector):
    head = detector.head().double()
    assert head.bank.prototypes.dtype == torch.float64 and head.bank._matrix.dtype == torch.float64 and detector.bank.prototypes.dtype == torch.float32


def test_grey_arrays_of_8_and_16_bits():
    grey = np.arange(64 * 64).reshape(64, 64)
    config = Config(resize=40, crop=32)
    eight, sixteen = (grey // 16).astype(np.uint8), (grey // 16 * 257).astype(np.uint16)
    assert torch.allclose(Images(eight, config)[0], Images(sixteen, config)[0], atol=1e-6)
    assert torch.equal(Images(Image.fromarray(eight), config)[0], Images(eight[..., None], config)[0]) and len(Images(np.stack([eight] * 5), config)) == 5


@pytest.mark.parametrize('bad, words', [(np.zeros((64, 64, 4), np.uint8), '(64, 64, 4)'), (np.zeros((64, 64), np.int32), 'int32'), (np.full((64, 64), 2.0), '[0, 1]'), ([object()], 'object'), (7, 'int')])
def test_arrays_that_are_no_images_are_refused(bad, words):
    with pytest.raises(DataError, match=words.replace('(', r'\(').replace(')', r'\)').replace('[', r'\[')): Images(bad, Config(resize=40, crop=32)).check()


def test_decisions_follow_the_calibration(detector, wood):
    images = sorted((wood / 'test').rglob('*.png'))[::4]
    p, scores, n = detector.p_values(images), detector.score(images).image, len(detector.calibration)
    for alpha in (0.1, 0.5):
        flagged = detector.predict(images, alpha)
        assert set(flagged) <= {0, 1} and np.array_equal(flagged, scores > detector.calibration.threshold(alpha)) and np.array_equal(flagged == 1, p <= alpha + 1e-12)
    with pytest.raises(CalibrationError, match=f'{n} calibration images'): detector.predict(images, 0.01)


def test_held_out_images_take_no_part_in_fitting(detector, good):
    assert detector.fitted_on['images'] + len(detector.calibration) == len(good)
    other = CSE(Config.smoke(**SMALL)).fit(good, progress=False)
    with pytest.raises(CalibrationError, match='not calibrated'): other.predict(good[:1])
    with pytest.raises(DataError, match='5 of 5 images took part in fitting'): other.calibrate(good[:5])
    assert other.fitted_on['images'] == len(good) and len(other.calibrate(sorted(good[0].parents[2].glob('test/good/*'))[:5]).calibration) == 5
    for share in (-0.1, 1, 1.5):
        with pytest.raises(ConfigError, match='held_out'): CSE(Config.smoke(**SMALL)).fit(good, progress=False, held_out=share)


def test_a_folder_of_more_than_good_images_is_refused(detector, wood):
    for folder in (wood, str(wood), wood.parent):
        for learn in (CSE(Config.smoke(**SMALL)).fit, copy.copy(detector).calibrate):
            with pytest.raises(DataError, match='expected .*train/good'): learn(folder)


@pytest.mark.parametrize('given, words', [(dict(seed='a'), "seed='a'"), (dict(seed=None), 'seed=None'), (dict(seed=1.5), 'seed=1.5'), (dict(config='smoke'), "config='smoke'"), (dict(config=Config.smoke), 'expected a Config')])
def test_constructor_refuses_what_it_cannot_use(detector, given, words):
    copy = clone(detector)
    for make in (CSE, copy.set_params):
        with pytest.raises(ConfigError, match=words): make(**given)
    assert copy.get_params() == detector.get_params()


def test_a_seed_of_numpy_is_the_same_seed():
    seed = CSE(Config.smoke(), seed=np.int64(3)).seed
    assert seed == 3 and type(seed) is int


def test_a_refused_fit_leaves_the_detector_as_it_was(detector, good, tmp_path):
    detector, before, scores = copy.copy(detector), repr(detector), detector.score(good[:2]).image
    (tmp_path / 'broken.png').write_bytes(good[0].read_bytes()[:99])
    for images, held_out, words in ((good, 3, 'held_out=3'), (good, '0.2', "held_out='0.2'"), (good[:3], 0, 'at least 4'), ([*good, tmp_path / 'broken.png'], 0, 'broken.png')):
        with pytest.raises((ConfigError, DataError), match=words): detector.fit(images, progress=False, held_out=held_out)
    assert repr(detector.set_params()) == before and np.array_equal(detector.score(good[:2]).image, scores)
    with pytest.raises(DataError, match='2 defect-free images: expected at least 4.*held_out=0.2 keeps 2 of the 4 images'): detector.fit(good[:4], progress=False, held_out=0.2)


def test_scikit_learn_habits(detector):
    copy = clone(detector)
    assert copy.config == detector.config and copy.get_params() == detector.get_params() and 'not fitted' in repr(copy) and 'calibrated on' in repr(detector)
    assert copy.set_params(seed=3).seed == 3
    with pytest.raises(ConfigError, match='epochs'): copy.set_params(epochs=3)
    with pytest.raises(RuntimeError, match='not fitted'): copy.score([])


def test_killed_training_is_taken_up_where_it_stopped(good, tmp_path):
    listed, folder, config = tmp_path / 'list.json', tmp_path / 'wood.cse', Config.smoke(**SMALL | dict(epochs=15))
    listed.write_text(json.dumps([str(f) for f in good[:12]]))
    code = f'import json; from cse import CSE, Config; CSE(Config.smoke(**{SMALL | dict(epochs=15)})).fit(json.load(open({str(listed)!r})), progress=False, folder={str(folder)!r})'
    process = subprocess.Popen([sys.executable, '-c', code])
    while not (folder / 'training.pt').exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (folder / 'model.json').exists()
    done = len(torch.load(folder / 'training.pt', weights_only=True)['history'])
    assert 0 < done < 15
    resumed, whole = CSE(config).fit(good[:12], progress=False, folder=folder), CSE(config).fit(good[:12], progress=False)
    assert resumed.history == whole.history and torch.equal(resumed.bank.prototypes, whole.bank.prototypes) and sorted(p.name for p in folder.iterdir()) == ['model.json', 'model.safetensors']


def test_training_of_other_images_is_not_taken_up(good, tmp_path, monkeypatch):
    from cse import training
    def stop(self, **state): write(self, **state); raise KeyboardInterrupt
    write = training.Progress.write
    monkeypatch.setattr(training.Progress, 'write', stop)
    first = CSE(Config.smoke(**SMALL)).fit(good, progress=False, folder=tmp_path)
    again = CSE.load(tmp_path)
    assert first.interrupted and len(first.history) == 1 and again.score(good[:1]).image == first.score(good[:1]).image
    assert again.interrupted and repr(again) == repr(first) and 'epoch 1 of 1, interrupted' in repr(again)
    for done in (cse('score', tmp_path, good[0]), cse('export', tmp_path, '-o', tmp_path / 'wood.txt')): assert f'note: {tmp_path}: its training was interrupted' in done.stderr
    assert 'will replace' not in cse('fit', good[0].parent, '-o', tmp_path, '--held-out', 2).stderr
    monkeypatch.undo()
    for other in (lambda: CSE(Config.smoke(**SMALL)).fit(good[1:], progress=False, folder=tmp_path), lambda: CSE(Config.smoke(**SMALL), seed=1).fit(good, progress=False, folder=tmp_path)):
        with pytest.raises(RuntimeError, match='training.pt: belongs to a training'): other()
    (tmp_path / 'training.pt').write_bytes(b'nothing of the kind')
    with pytest.raises(RuntimeError, match='delete it to start anew'): CSE(Config.smoke(**SMALL)).fit(good, progress=False, folder=tmp_path)


def test_saved_detectors_of_all_versions_load(detector, saved, good, wood, tmp_path):
    again = CSE.load(saved)
    assert repr(again) == repr(detector) and np.array_equal(again.predict(good, 0.25), detector.predict(good, 0.25))
    about = json.loads((saved / 'model.json').read_text())
    (tmp_path / 'model.safetensors').write_bytes((saved / 'model.safetensors').read_bytes())
    about.pop('interrupted')
    second = about | dict(schema=2)
    for old in ({k: v for k, v in about.items() if k not in ('fitted_on', 'calibration', 'sha256')} | dict(schema=1), second | dict(sha256=_checksum(second))):
        (tmp_path / 'model.json').write_text(json.dumps(old))
        again = CSE.load(tmp_path)
        assert np.array_equal(again.score(good).image, detector.score(good).image) and not again.interrupted
        assert 'calibrated on 20' in cse('calibrate', tmp_path, wood / 'test/good', '-o', tmp_path / 'new', '-q').stdout


@pytest.mark.parametrize('change, words', [
    (dict(schema=4), 'a newer one wrote it'), (dict(schema=True), 'reads 1 to'), (dict(seed=7), 'was changed'), (dict(calibration=[9.0]), 'was changed'), (dict(tensors_sha256='0'), 'was changed'), (dict(config=None), 'was changed'), (dict(schema=1), 'was changed')])
def test_changed_model_is_refused(saved, tmp_path, change, words):
    for name in ('model.json', 'model.safetensors'): (tmp_path / name).write_bytes((saved / name).read_bytes())
    about = json.loads((saved / 'model.json').read_text())
    assert about['sha256'] == _checksum(about)
    (tmp_path / 'model.json').write_text(json.dumps(about | change))
    with pytest.raises(ModelError, match=words): CSE.load(tmp_path)


@pytest.mark.parametrize('change, words', [(dict(config=[]), 'expected dict'), (dict(config=dict(epochs='many')), "epochs='many'"), (dict(seed='a'), "seed='a'"), (dict(channels=['a']), 'channels='), (dict(channels=7), 'channels=7'),
    (dict(extractor={}), 'other weights'), (dict(history=3), 'history=3'), (dict(best_epoch=None), 'best_epoch=None')])
def test_wrong_values_without_a_checksum_are_refused(saved, tmp_path, change, words):
    about = json.loads((saved / 'model.json').read_text())
    (tmp_path / 'model.safetensors').write_bytes((saved / 'model.safetensors').read_bytes())
    (tmp_path / 'model.json').write_text(json.dumps({k: v for k, v in about.items() if k != 'sha256'} | dict(schema=1) | change))
    with pytest.raises(ModelError, match=words): CSE.load(tmp_path)


def test_what_is_no_saved_detector_is_refused(saved, tmp_path):
    with pytest.raises(ModelError, match='Not a directory; expected a folder'): CSE.load(saved / 'model.json')
    (tmp_path / 'model.json').write_text('[' * 10**5)
    (tmp_path / 'model.safetensors').touch()
    with pytest.raises(ModelError, match='is no JSON'): CSE.load(tmp_path)
    (tmp_path / 'model.json').unlink()
    (tmp_path / 'model.json').mkdir()
    with pytest.raises(ModelError, match='Is a directory; expected a folder'): CSE.load(tmp_path)


def test_any_changed_byte_of_a_saved_detector_is_refused(saved, tmp_path, record_property):
    draws = np.random.default_rng(0)
    for name in ('model.json', 'model.safetensors'):
        whole = (saved / name).read_bytes()
        (tmp_path / {'model.json': 'model.safetensors', 'model.safetensors': 'model.json'}[name]).write_bytes((saved / {'model.json': 'model.safetensors', 'model.safetensors': 'model.json'}[name]).read_bytes())
        for place in draws.integers(len(whole), size=60):
            damaged = whole[:place] + (bytes([whole[place] ^ int(draws.integers(1, 256))]) + whole[place + 1:] if draws.random() < 0.8 else b'')
            (tmp_path / name).write_bytes(damaged)
            try: loaded = CSE.load(tmp_path)
            except ModelError as e: assert str(tmp_path) in str(e)
            else: assert name == 'model.json' and json.loads(damaged) == json.loads(whole), loaded # white space
    record_property('damaged', 120)


def test_command_line(wood, saved, tmp_path):
    folder = wood / 'test/knot'
    found = json.loads(cse('score', saved, folder, '--alpha', 0.1, '--json', '-q').stdout)
    assert [set(i) for i in found['images']] == [{'path', 'score', 'p_value', 'decision'}] * len(list(folder.iterdir()))
    done = cse('score', saved, folder, '--alpha', 0.1, '--csv', tmp_path / 'out.csv', '--overlays', tmp_path / 'maps', '-q')
    assert done.exit_code == 0 and not done.stdout and len((tmp_path / 'out.csv').read_text().splitlines()) == 1 + len(found['images']) and sorted(p.name for p in (tmp_path / 'maps').iterdir()) == sorted(f'{p.name}.png' for p in folder.iterdir())
    about = json.loads(cse('evaluate', saved, wood, '--alpha', 0.1, '--json', '-q').stdout)
    assert {'auroc', 'false_positive_rate', 'detection_rate', 'pixel_auroc', 'aupro'} < about.keys() and about['images'] == 60 and about['map_cells'] == '7×7'
    assert json.loads(cse('show-config', 'paper', '--json').stdout) == Config.paper().to_dict()
    for few in (cse('score', saved, folder, '--alpha', 0.001, '-q'), cse('evaluate', saved, wood, '--alpha', 0.001, '-q')): assert 'no decisions' in few.stderr and few.exit_code == 0


def test_calibration_anew(detector, wood, saved, tmp_path):
    shutil.copytree(saved, model := tmp_path / 'wood.cse')
    few, scores = sorted((wood / 'test/good').iterdir())[:9], json.loads(cse('score', saved, wood / 'test/good', '--json', '-q').stdout)['images']
    (folder := tmp_path / 'few').mkdir()
    for path in few: shutil.copy(path, folder)
    about = json.loads(cse('calibrate', model, folder, '-o', tmp_path / 'other.cse', '--json', '-q').stdout)
    assert about['calibration_images'] == 9 and about['smallest_alpha'] == 0.1 and (model / 'model.json').read_bytes() == (saved / 'model.json').read_bytes()
    assert np.allclose(CSE.load(tmp_path / 'other.cse').calibration.scores, sorted(i['score'] for i in scores[:9]), rtol=1e-4)
    assert cse('calibrate', model, folder, '-q').exit_code == 0 and len(CSE.load(model).calibration) == 9 and (model / 'model.safetensors').read_bytes() == (saved / 'model.safetensors').read_bytes()
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links/far').symlink_to(folder)
    (folder / 'back').symlink_to(tmp_path / 'links') # in a circle
    assert json.loads(cse('calibrate', model, tmp_path / 'links', '--json', '-q').stdout)['calibration_images'] == 9
    (folder / 'back').unlink()
    shutil.copytree(wood, again := tmp_path / 'wood')
    assert json.loads(cse('evaluate', model, again, '--json', '-q').stdout)['took_part'] == 9
    (folder / 'broken.png').write_bytes(b'')
    before, done = (model / 'model.json').read_bytes(), cse('calibrate', model, folder, '-q')
    assert done.exit_code == 2 and 'broken.png' in done.stderr and (model / 'model.json').read_bytes() == before


def test_images_that_took_part_in_fitting_are_known(detector, saved, wood, good, tmp_path):
    assert detector.took_part([*good, *sorted((wood / 'test/knot').iterdir())[:2]]).tolist() == [True] * len(good) + [False] * 2 # fitted on some, calibrated on the others
    known = np.isin(detector._hashes(Images(good, detector.config)), detector.seen['fitted'])
    assert known.sum() == detector.fitted_on['images'] < len(good) and CSE.load(saved).took_part(good).all()
    assert len(copy.copy(detector).calibrate(np.array([str(g) for g in good])[~known]).calibration) == (~known).sum() # an array of names
    with pytest.raises(DataError, match=f'{known.sum()} of {len(good)} images took part in fitting'): detector.calibrate(good)
    shutil.copytree(wood, tmp_path / 'wood')
    for path in good[:3]: shutil.copy(path, tmp_path / 'wood/test/good' / f'again-{path.name}')
    done = cse('evaluate', saved, tmp_path / 'wood', '--json', '-q')
    assert json.loads(done.stdout)['took_part'] == 3 and 'the figures flatter' in done.stderr


def test_a_tilda_fabric_is_fitted_and_evaluated_with_one_split(tmp_path):
    release = write_release(tmp_path / 'tilda', count=10, size=(300, 260))
    settings = [w for pair in ('epochs=1', 'resize=224', 'tilda_train_share=0.6', 'engine=torch') for w in ('--set', pair)]
    about = json.loads(cse('fit', release / 'tilda1', '-o', tmp_path / 'model', '--held-out', 0, '--json', '-q', *settings).stdout)
    found = json.loads(cse('evaluate', tmp_path / 'model', release / 'tilda1', '--json', '-q').stdout)
    assert about['images'] == 6 and found['good'] == 4 and found['images'] == 74 and 'took_part' not in found


def test_only_states_of_the_training_are_removed(good, tmp_path):
    (mine := tmp_path / 'training_set.pt').write_text('not ours')
    CSE(Config.smoke(**SMALL)).fit(good[:6], progress=False, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.json', 'model.safetensors', 'training_set.pt'] and mine.read_text() == 'not ours'


def test_nearly_black_images_are_told(good, caplog):
    dark = [(np.asarray(Image.open(g).convert('L')).astype(np.uint16) * 16) for g in good[:6]] # 12 bits in 16
    CSE(Config.smoke(**SMALL)).fit([Image.fromarray(d) for d in dark], progress=False)
    assert 'nearly black, no value is above 0.0' in caplog.text


def test_more_false_alarms_than_chance_explains_are_told(detector, wood, tmp_path):
    odd = copy.copy(detector)
    for scale in (1e-3, 1e3):
        odd.calibration = Calibration(detector.calibration.scores * scale)
        done = cse('evaluate', odd.save(tmp_path), wood, '--alpha', 0.2, '--json')
        about = json.loads(done.stdout)
        assert ('cse calibrate' in done.stderr) == (about['false_positive_rate'] > about['false_positive_high']) == (scale < 1) and about['false_positive_low'] < 0.2 < about['false_positive_high'] < 1


def test_a_pipe_is_written_and_a_link_is_kept(wood, saved, tmp_path):
    image, pipe, link = next((wood / 'test/good').iterdir()), tmp_path / 'pipe', tmp_path / 'link.csv'
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / 'far.csv')
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        found = json.loads(cse('score', saved, image, '--csv', pipe, '--json', '-q').stdout)['images']
        assert len(read.result(60).splitlines()) == 1 + len(found) == 2 and pipe.is_fifo()
    assert cse('score', saved, image, '--csv', link, '-q').exit_code == 0 and link.is_symlink() and str(image) in (tmp_path / 'far.csv').read_text()
    assert is_device('/dev/stdout') and not is_device(tmp_path) and not is_device(link) and not is_device(tmp_path / 'none')


@pytest.mark.parametrize('option, words', [('--csv', 'is a folder'), ('--overlays', 'no file can be written there')])
def test_places_that_cannot_be_written_are_found_before_the_work(saved, wood, tmp_path, option, words):
    place = tmp_path if option == '--csv' else saved / 'model.json'
    done = cse('score', saved, wood / 'test', option, place)
    assert done.exit_code == 2 and words in done.stderr and str(place) in done.stderr and 'scoring' not in done.stderr


def test_results_on_stdout_and_progress_on_stderr(saved, tmp_path):
    done = cse('tables', 1, '--categories', 'wood', '--methods', 'mean_distance', '--results', tmp_path)
    assert done.exit_code == 0 and done.stdout.startswith('**Table 1') and '[1/1] mean_distance wood' in done.stderr and '[1/1]' not in done.stdout
    table, = json.loads(cse('tables', 1, '--categories', 'wood', '--methods', 'mean_distance', '--results', tmp_path, '--json').stdout)['tables']
    row, = (r for r in table['rows'] if r['category'] == 'wood' and r['ours'] is not None)
    assert table['table'] == 1 and 'built-in' in table['caption'] and f"{row['ours']:.1f}" in done.stdout
    done = cse('export', saved, '--to', 'openvino', '-o', tmp_path / 'wood.xml', '--json')
    assert json.loads(done.stdout) == dict(file=str(tmp_path / 'wood.xml'), files=[str(tmp_path / 'wood.xml'), str(tmp_path / 'wood.bin')], format='openvino') and (tmp_path / 'wood.bin').is_file()


def test_several_tables_keep_what_is_their_own(tmp_path, monkeypatch):
    done = cse('tables', 1, 2, '--categories', 'wood', '--methods', 'mean_distance', '--tilda', 'nowhere', '--results', tmp_path, '--json')
    assert done.exit_code == 2 and 'nowhere' in done.stderr and [t['table'] for t in json.loads(done.stdout)['tables']] == [1]
    asked = {}
    def fail(number, **given):
        asked[number] = given
        raise GridError('not run here')
    monkeypatch.setattr('cse.lab.runs.run_table', fail)
    done = cse('tables', 1, 2, '--categories', 'wood', '--json')
    assert done.exit_code == 1 and json.loads(done.stdout) == dict(tables=[], failed=[1, 2]) and [asked[n]['categories'] for n in (1, 2)] == ['wood', '']
    cse('tables', 2, '--categories', 'textile1')
    assert asked[2]['categories'] == 'textile1'


def test_unreadable_images_do_not_cost_the_others(wood, saved, tmp_path):
    (folder := tmp_path / 'images').mkdir()
    for i, path in enumerate(sorted((wood / 'test/good').iterdir())[:3]): (folder / f'{i}.png').write_bytes(path.read_bytes()[:None if i else 99])
    done = cse('score', saved, folder, '--json', '-q', '--overlays', tmp_path / 'maps')
    images = json.loads(done.stdout)['images']
    assert done.exit_code == 1 and images[0]['score'] is None and images[1]['score'] > 0 and '1 of 3 images could not be read' in done.stderr and len(list((tmp_path / 'maps').iterdir())) == 2


def test_any_file_name_is_written(wood, saved, tmp_path):
    image = os.fsencode(tmp_path) + b'/kn\xf6t.png'
    with open(image, 'wb') as file: file.write(next((wood / 'test/good').iterdir()).read_bytes())
    assert cse('score', saved, tmp_path, '--csv', tmp_path / 'out.csv', '-q').exit_code == 0 and image in (tmp_path / 'out.csv').read_bytes()
    done = subprocess.run([sys.executable, '-c', 'from cse.cli import app; app()', 'score', saved, tmp_path, '-q'], capture_output=True)
    assert done.returncode == 0 and image in done.stdout


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
@pytest.mark.parametrize('place', ['CSE.score', 'PIL.Image.Image.save', 'csv.DictWriter.writerows'])
def test_scores_outlive_what_cannot_be_written(wood, saved, tmp_path, monkeypatch, error, place):
    def fail(*args, **kw): raise error
    monkeypatch.setattr({'CSE.score': 'cse.detector.CSE.score'}.get(place, place), fail)
    done = cse('score', saved, wood / 'test/knot', '--csv', tmp_path / 'out.csv', '--overlays', tmp_path / 'maps', '-q')
    written = place == 'PIL.Image.Image.save'
    assert (tmp_path / 'out.csv').exists() == written and done.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1 if place != 'CSE.score' else 2)
    if isinstance(error, KeyboardInterrupt): assert ('the scores are written' if written else 'no scores were written') in done.stderr
    elif written: assert 'maps/000.png.png: could not be written (No space left on device)' in done.stderr and ' more' in done.stderr
    elif place != 'CSE.score': assert 'out.csv: could not be written (No space left on device)' in done.stderr and len(list((tmp_path / 'maps').iterdir())) == len(list((wood / 'test/knot').iterdir()))


def test_a_full_disk_names_the_file(detector, tmp_path, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'model.safetensors'}'"): detector.save(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_fabric_of_a_tilda_release_is_evaluated(saved, tmp_path):
    release = write_release(tmp_path / 'tilda')
    about = json.loads(cse('evaluate', saved, release / 'tilda1', '--json', '-q').stdout)
    assert about['images'] == len(load_category(release, 'tilda1').test) and 0 <= about['auroc'] <= 1 and 'aupro' not in about
    done = cse('evaluate', saved, release / 'tilda2')
    assert done.exit_code == 2 and "'tilda2': not in" in done.stderr


def test_images_and_detectors_are_not_written_over(wood, saved, tmp_path):
    image, model = tmp_path / 'good/a.png', tmp_path / 'wood.cse'
    shutil.copytree(saved, model)
    image.parent.mkdir()
    shutil.copy(next((wood / 'test/good').iterdir()), image)
    for option, place, words in (('--csv', image, 'is one of the images'), ('--csv', model / 'model.json', 'lies in the detector'), ('--overlays', image.parent, 'another one')):
        done = cse('score', model, image, option, place, '-q')
        assert done.exit_code == 2 and words in done.stderr and not done.stdout
    assert cse('score', model, image, '-q').exit_code == 0 and [*image.parent.iterdir()] == [image]
    done = cse('fit', image.parent, '-o', model)
    assert f'note: {model}: holds a detector, which this one will replace' in done.stderr and done.exit_code == 2


def test_an_unreadable_test_image_does_not_cost_the_evaluation(wood, saved, tmp_path, monkeypatch):
    shutil.copytree(wood, category := tmp_path / 'wood')
    (broken := next((category / 'test/knot').iterdir())).write_bytes(b'')
    done = cse('evaluate', saved, category, '--json', '-q')
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found['unreadable'] == 1 and found['images'] == 59 and '1 of 60 images could not be read' in done.stderr and 0 <= found['aupro'] <= 1
    (mask := category / f'ground_truth/knot/{broken.stem}_mask.png').write_bytes(b'')
    monkeypatch.setattr(CSE, 'score', None) # masks are read before
    done = cse('evaluate', saved, category)
    assert done.exit_code == 2 and str(mask) in done.stderr


def test_who_asks_for_decisions_hears_why_there_are_none(detector, good, tmp_path):
    plain = copy.copy(detector)
    plain.calibration = None
    plain.save(tmp_path)
    asked, silent = cse('score', tmp_path, good[0], '--alpha', 0.05, '-q'), cse('score', tmp_path, good[0], '-q')
    assert 'not calibrated' in asked.stderr and not silent.stderr and asked.exit_code == silent.exit_code == 0


@pytest.mark.parametrize('words, expected', [
    (('fit', 'nowhere', '-o', 'x'), 'no such folder'), (('fit', '{wood}', '-o', 'x', '--set', 'epochs'), 'NAME=VALUE'), (('fit', '{wood}', '-o', 'x', '--set', 'epochs=-1'), 'epochs=-1'), (('fit', '{wood}', '-o', 'x', '--set', 'layers=(3, 4)', '--set', 'grey_textures=True', '--set', 'epochs=-1'), 'epochs=-1'),
    (('fit', '{wood}', '-o', 'x', '--profile', 'best'), 'best'), (('fit', '{wood}/train/good', '-o', 'x', '--textures', 'nowhere'), 'no such folder'), (('fit', '{wood}/train/good', '-o', 'x', '--weights', 'nothing.pth'), 'no such file'),
    (('fit', '{wood}/train/good', '-o', 'x', '--held-out', '2'), 'held_out'), (('score', 'nowhere', '{wood}'), 'no such file'), (('score', '{saved}', 'nowhere'), 'no such folder'), (('score', '{saved}', '{wood}', '--device', 'abacus'), 'abacus'),
    (('evaluate', '{saved}', '{wood}/train'), 'train'), (('export', '{saved}', '--to', 'tflite'), 'tflite'), (('export', '{saved}', '-o', 'x.txt'), 'x.txt'), (('score', '{saved}', '{wood}/test', '--overlays', '{wood}/test/maps'), 'another one'), (('score', '{saved}', '{wood}/test', '--alpha', '5'), 'between 0 and 1'),
    (('fit', '{wood}', '-o', 'x', '--set', 'profile=paper'), '--profile'), (('tables', '9'), '9'), (('tables', '1', '--methods', 'patchwork'), 'patchwork'),
    (('tables', '1', '--seeds', 'many'), 'many'), (('show-config', 'best'), 'best'), (('fit', '{wood}', '-o', 'x'), 'wood/train/good'), (('fit', '{wood}/..', '-o', 'x'), '/train/good'),
    (('score', '{saved}', ''), 'is empty'), (('fit', '', '-o', 'x'), 'is empty'), (('evaluate', '{saved}', 'nowhere'), 'nowhere/train/good: no such folder'), (('score', '{saved}/model.json', '{wood}'), 'expected a folder'),
    (('evaluate', '{saved}', '{wood}', '--alpha', '5'), 'between 0 and 1'), (('calibrate', '{saved}', '{wood}'), 'wood/train/good'), (('calibrate', '{saved}', '{wood}/test'), '{wood}/test/good'), (('calibrate', '{saved}', '{wood}/train/good'), 'took part in fitting'), (('fit', '{wood}/test', '-o', 'x'), '{wood}/test/good'), (('calibrate', '{saved}', 'nowhere'), 'no such folder'), (('calibrate', 'nowhere', '{wood}/test/good'), 'no such file'),
    (('calibrate', '{saved}', '{wood}/test/good', '-o', '{saved}/model.json'), 'no file can be written there')])
def test_mistakes_on_the_command_line_end_in_a_sentence(wood, saved, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    done = cse(*(w.format(wood=wood, saved=saved) for w in words))
    assert done.exit_code == 2 and expected.format(wood=wood) in done.stderr and 'Traceback' not in done.stderr and not (tmp_path / 'x').exists()


def test_help_does_not_load_pytorch():
    code = "import sys\nfrom typer.testing import CliRunner\nfrom cse.cli import app\nassert 'export' in CliRunner().invoke(app, ['--help']).output\nprint(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_export_says_what_it_cannot_do(detector, tmp_path, monkeypatch):
    for bad, to in ((tmp_path / 'wood.txt', ''), (tmp_path / 'wood.onnx', 'openvino')):
        with pytest.raises(ConfigError, match='expected a file ending in'): export(detector, bad, to)
    monkeypatch.setattr('cse.deploy.export.TOLERANCE', 0)
    with pytest.raises(ExportError, match='scores differ'): export(detector, tmp_path / 'wood.xml')
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match='not fitted'): export(CSE(Config.smoke()), tmp_path / 'wood.xml')


def test_joined_scores(good, detector, tmp_path):
    "Gaussians of other maps than the embedder's: saved, exported and computed by the other engine they score alike; without them a file is refused."
    joined = CSE(Config.clean(**SMALL, density_layers=(2, 3), embedders=2)).fit(good, progress=False)
    scores = joined.score(good)
    assert joined.extractor.layers == (2, 3, 4) and joined.embedder.channels == detector.embedder.channels and scores.coarse.shape[1:] == (28, 28) and (scores.coarse >= 0).all()
    joined.save(tmp_path)
    assert np.array_equal(CSE.load(tmp_path).score(good).image, scores.image)
    if find_spec('openvino'):
        assert np.allclose(CSE.load(tmp_path, engine='openvino').score(good).image, scores.image, atol=1e-3)
        assert np.allclose(CSE.load(tmp_path, engine='openvino').compile().score(good).image, scores.image, atol=1e-3)
        images = torch.stack([Images(good, joined.config)[i] for i in range(3)])
        assert np.allclose(run_exported(export(joined, tmp_path / 'joined.xml'), images)[0], scores.image[:3], atol=1e-3)
    about = json.loads((tmp_path / 'model.json').read_text())
    data = save({k: v for k, v in load((tmp_path / 'model.safetensors').read_bytes()).items() if not k.startswith('density')})
    (tmp_path / 'model.safetensors').write_bytes(data)
    about['tensors_sha256'] = hashlib.sha256(data).hexdigest()
    (tmp_path / 'model.json').write_text(json.dumps(about | dict(sha256=_checksum(about))))
    with pytest.raises(ModelError, match='density_layers'): CSE.load(tmp_path)


def test_training_is_taken_up_in_the_second_embedder(good, tmp_path, monkeypatch):
    from cse import training
    write = training.Progress.write
    def stop(self, **state):
        write(self, **state)
        if self.path.stem == 'training-1': raise KeyboardInterrupt
    monkeypatch.setattr(training.Progress, 'write', stop)
    first = CSE(Config.clean(**SMALL, embedders=2)).fit(good, progress=False, folder=tmp_path)
    assert first.interrupted and len(first.embedders) == 2 and CSE.load(tmp_path).score(good[:1]).image == first.score(good[:1]).image
    monkeypatch.undo()
    again, whole = (CSE(Config.clean(**SMALL, embedders=2)).fit(good, progress=False, folder=folder) for folder in (tmp_path, None))
    assert not again.interrupted and np.array_equal(again.score(good).image, whole.score(good).image) and not list(tmp_path.glob('training*'))
    assert not torch.equal(whole.embedders[0].blocks[0][0].weight, whole.embedders[1].blocks[0][0].weight)


def test_joined_scores_are_those_of_their_parts(good):
    "No weight for the embedding: the largest distance alone decides. Competitors and the classifier get the maps of `layers` only."
    alone = CSE(Config.clean(**SMALL, embedding_weight=0.0)).fit(good, progress=False)
    with torch.no_grad(): distances = alone.density(alone.extractor(torch.stack([Images(good, alone.config)[i] for i in range(6)]))).amax((1, 2)).numpy()
    assert (np.argsort(alone.score(good[:6]).image) == np.argsort(distances)).all()
    from cse.baselines.features import MeanDistance
    assert MeanDistance(Config.clean(**SMALL)).fit(good, progress=False).extractor.layers == (3, 4)


@pytest.mark.parametrize('settings', [dict(layers=()), dict(layers=(4, 3)), dict(layers=(2, 3), density_layers=(4,)), dict(density_layers=(1.5,)), dict(density_layers=(3, 2)), dict(embedding_weight=-1), dict(embedders=2), dict(split_seed=-2)])
def test_settings_of_joined_scores_that_cannot_be(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))): Config(**settings)


def test_tensors_of_a_saved_detector_are_what_was_fitted(saved):
    about = json.loads((saved / 'model.json').read_text())
    assert hashlib.sha256((saved / 'model.safetensors').read_bytes()).hexdigest() == about['tensors_sha256'] and sorted(p.name for p in saved.iterdir()) == ['model.json', 'model.safetensors']
