"""Large photos are decoded once, a stopped classifier continues, and the answer can be looked into."""

import csv
import dataclasses
import io
import json
import shutil
import signal
import warnings

import numpy as np
import pytest
from comparing import ONE_SEED, QUICK, classify, write_augmented
from comparing import answered as answered
from comparing import first_answer as first_answer
from comparing import folder as folder
from comparing import pictures as pictures
from drawing import MAX_WAIT, as_command_line, command, wait_until
from PIL import Image
from test_bad_input import files_below

from noisecutmix.compare.copies import reduce_photos
from noisecutmix.compare.figures import count_confusions, draw_gained_and_lost, plot_confusions
from noisecutmix.photos import find_photos

SENT_BY_SLURM = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
LARGE = [*QUICK, "--crop_scale=0.2", "--rows", "none", "--baseline=none", "--seeds=2", "--epochs=2"]


def enlarge_photos(folder, suffix="jpg", size=(400, 320)):
    """Replace the photos of 32 pixels by larger ones."""
    for part in ("train", "test"):
        for file in sorted((folder / part).rglob("*.png")):
            with Image.open(file) as image:
                image.resize(size, Image.Resampling.BICUBIC).save(file.with_suffix(f".{suffix}"), quality=95)
            if suffix != "png":
                file.unlink()


@pytest.fixture
def count_decodings(monkeypatch):
    """A list of the photos that are decoded."""
    from noisecutmix.photos.opening import open_photo

    opened = []

    def open_and_count(file, min_side=None):
        opened.append(file)
        return open_photo(file, min_side)

    monkeypatch.setattr("noisecutmix.photos.listing.open_photo", open_and_count)
    return opened


def test_each_large_photo_is_decoded_once(folder, count_decodings, monkeypatch):
    monkeypatch.setattr("noisecutmix.compare.items.KEPT_PIXELS", 0)
    enlarge_photos(folder, "png")
    classify(folder, *LARGE)
    assert len(count_decodings) == len(set(count_decodings)) == 54
    assert not (folder / "out" / "copies").exists()


def test_a_copy_shows_all_that_a_crop_could_show(folder):
    """Its shorter side is the classifier's side over the root of the smallest crop; its levels are the photo's."""
    enlarge_photos(folder)
    classify(folder, *LARGE, "--keep_copies")
    copies = list((folder / "out" / "copies").iterdir())
    assert len(copies) == 54
    assert {Image.open(copy).size for copy in copies} == {(90, 72)}  # 32 / 0.2 ** 0.5
    photos = find_photos(folder / "train")
    hashes = [f"{index}" for index in range(len(photos.files))]
    reduced = reduce_photos(photos, hashes, folder / "copies", 72)
    for index in range(len(photos.files)):
        whole = photos.open(index).resize((90, 72), Image.Resampling.LANCZOS)
        assert np.abs(np.subtract(reduced.open(index).convert("L"), whole.convert("L"), dtype=float)).mean() < 3
    small = reduce_photos(photos, hashes, folder / "none", 256)  # of photos that are hardly larger
    assert not any(small.copies) and small.open(0) == photos.open(0) and not (folder / "none").exists()


def test_missing_and_damaged_copies_are_made_again(folder, count_decodings):
    enlarge_photos(folder)
    photos = find_photos(folder / "train")
    hashes = [f"{index}" for index in range(len(photos.files))]
    reduced = reduce_photos(photos, hashes, folder / "copies", 72)
    content = {copy: copy.read_bytes() for copy in reduced.copies}
    reduced.copies[0].unlink()
    reduced.copies[1].write_bytes(content[reduced.copies[1]][:-100])
    reduced.copies[2].write_bytes(b"")
    before = [np.asarray(Image.open(io.BytesIO(content[copy]))) for copy in reduced.copies[:3]]
    for index in range(3):  # while another process has removed them
        assert np.array_equal(reduced.open(index), before[index])
    count_decodings.clear()
    reduce_photos(photos, hashes, folder / "copies", 72)
    assert len(count_decodings) == 3
    assert {copy: copy.read_bytes() for copy in reduced.copies} == content


def test_a_comparison_that_began_without_copies_continues_without(folder, count_decodings):
    enlarge_photos(folder)
    record = folder / "out" / "classify.json"
    first = classify(folder, *LARGE)
    content = json.loads(record.read_text())
    del content["options"]["reduced_photos"]
    shutil.rmtree(folder / "out")
    record.parent.mkdir()
    record.write_text(json.dumps(content))
    count_decodings.clear()
    assert classify(folder, *LARGE)["rows"].keys() == first["rows"].keys()
    assert len(count_decodings) > 54 and not (folder / "out" / "copies").exists()


@pytest.mark.slow
def test_a_kill_amid_the_copies_changes_no_result(folder, start):
    """Two processes continue, and share what is left."""
    enlarge_photos(folder, size=(2000, 1600))
    with as_command_line("noisecutmix.compare", *LARGE, "--output_dir=whole", folder=folder) as main:
        main()
    process, copies = start(command("noisecutmix.compare", *LARGE)), folder / "out" / "copies"
    wait_until(lambda: copies.exists() and len(list(copies.iterdir())) >= 5, process)
    process.kill()
    process.communicate()
    assert not list((folder / "out" / "results").iterdir())
    two = [start(command("noisecutmix.compare", *LARGE)) for _ in range(2)]
    outputs = [process.communicate(timeout=MAX_WAIT) for process in two]
    assert [process.returncode for process in two] == [0, 0], outputs
    results = [(folder / name / "results.json").read_bytes() for name in ("out", "whole")]
    assert results[0] == results[1] and not copies.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, *SENT_BY_SLURM])
def test_a_stopped_classifier_continues_after_its_last_step(folder, start, number):
    """The result, and the steps of its log, are those of an uninterrupted run."""
    arguments = [*QUICK, "--rows", "cutmix", "--baseline=cutmix", "--seeds=1", "--epochs=30", "--num_workers=1"]
    with as_command_line("noisecutmix.compare", *arguments, "--output_dir=whole", folder=folder) as main:
        main()
    process = start(command("noisecutmix.compare", *arguments))
    log = folder / "out" / "logs" / "cutmix_seed0.csv"
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= 20, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=MAX_WAIT)
    assert process.returncode == 128 + number and "run the same command again" in errors and "Traceback" not in errors
    assert [file.name for file in (folder / "out" / "states").iterdir()] == ["cutmix_seed0.pt"]
    steps_before = log.read_text().count("\n") - 1
    assert 20 <= steps_before < 90
    with open(log, "a") as file:  # steps after the state, as of a killed process
        file.write(f"{steps_before + 1},0,0,0\n{steps_before + 2},0,0")
    lines = log.read_bytes().splitlines()[:15]
    classify(folder, *arguments)
    assert log.read_bytes() == (folder / "whole" / "logs" / "cutmix_seed0.csv").read_bytes()
    assert log.read_bytes().splitlines()[:15] == lines
    for name in ("results.json", "results/predictions_cutmix_seed0.npy"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert not (folder / "out" / "states").exists()
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 91)) and float(rows[-1]["epoch"]) == 30
    assert float(rows[-1]["learning_rate"]) < float(rows[30]["learning_rate"]) <= 0.05


def test_a_stop_after_the_last_step_loses_no_step(folder, monkeypatch):
    from noisecutmix.compare.classifier import Classifier

    def stop(*_):
        raise KeyboardInterrupt

    arguments = [*QUICK, "--rows", "none", "--baseline=none", "--seeds=1", "--epochs=2"]
    expected = classify(folder, *arguments, "--output_dir=whole")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Classifier, "predict", stop)
        classify(folder, *arguments)
    log = folder / "out" / "logs" / "none_seed0.csv"
    before = log.read_bytes()
    assert classify(folder, *arguments) == expected
    assert log.read_bytes() == before


def test_the_work_of_commands_with_other_rows_is_left_alone(folder):
    """Several commands share a folder; the first one that ends has to leave what the others need."""
    state = folder / "out" / "states" / "mixup_seed7.pt"
    begun = folder / "out" / "results" / ".predictions_mixup_seed7.npy.0123.tmp"
    enlarge_photos(folder)
    classify(folder, *LARGE, "--epochs=1", "--seeds=1", "--keep_copies")
    copies = len(list((folder / "out" / "copies").iterdir()))
    state.parent.mkdir()
    for file in (state, begun):
        file.write_bytes(b"in work")
    classify(folder, *LARGE, "--epochs=1", "--seeds=2")
    assert state.exists() and begun.exists() and len(list((folder / "out" / "copies").iterdir())) == copies
    state.unlink(), begun.unlink()
    classify(folder, *LARGE, "--epochs=1", "--seeds=2")
    assert not (folder / "out" / "copies").exists() and not state.parent.exists()


def test_a_log_that_is_locked_ends_no_training(folder, monkeypatch):
    """As a spreadsheet locks it on Windows."""
    (folder / "out" / "logs" / "none_seed0.csv").mkdir(parents=True)
    classify(folder, *QUICK, "--rows", "none", "--baseline=none", "--seeds=1", "--epochs=1")


def test_a_damaged_state_is_not_used(folder, capsys):
    arguments = [*QUICK, "--rows", "cutmix", "--baseline=cutmix", "--seeds=1", "--epochs=2"]
    (folder / "out" / "states").mkdir(parents=True)
    (folder / "out" / "states" / "cutmix_seed0.pt").write_bytes(b"half of it")
    classify(folder, *arguments)
    assert "cutmix_seed0.pt is damaged and not used" in capsys.readouterr().err


def test_files_of_killed_processes_are_cleared_at_the_end(answered):
    left = answered / "out" / "results" / ".predictions_none_seed0.npy.0123.tmp"
    left.write_bytes(b"")
    classify(answered, *ONE_SEED)
    assert not left.exists() and len(list((answered / "out" / "results").iterdir())) == 2


def test_the_table_so_far_is_shown(answered, capsys):
    (answered / "out" / "results" / "predictions_cutmix_seed0.npy").unlink()
    record = answered / "out" / "classify.json"  # of a GPU, while this machine has none
    content = json.loads(record.read_text())
    content["options"]["dtype"] = "float16"
    record.write_text(json.dumps(content))
    before = files_below(answered)
    capsys.readouterr()
    classify(answered, *ONE_SEED, "--seeds=2", "--report")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| none | 1 of 2 | ") and lines[3] == "| cutmix | 0 of 2 |  |"
    assert files_below(answered) == before


def test_confusions_are_shares_of_a_class():
    predicted = np.array([[0, 1, 1, 2], [0, 0, 1, 2]])
    confusions = count_confusions(predicted, np.array([0, 0, 1, 1]), 4)
    assert confusions[:2].tolist() == [[75, 25, 0, 0], [0, 50, 50, 0]] and not confusions[2:].any()


@pytest.mark.parametrize("num_classes", [4, 40])
def test_confusions_are_plotted(num_classes):
    rng = np.random.default_rng(0)
    values = {row: 100 * rng.dirichlet(np.ones(num_classes), num_classes) for row in ("cutmix", "ours")}
    plot = plot_confusions(values, [f"class {label}" for label in range(num_classes)])
    assert Image.open(io.BytesIO(plot)).width > 700
    assert plot == plot_confusions(values, [f"class {label}" for label in range(num_classes)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of letters that the font lacks
        odd_names = [r"$\frac$", "翠鳥", "Zaunkönig", "x" * 50] * (num_classes // 4)
        plot_confusions({"none": np.zeros((num_classes, num_classes))}, odd_names)


def test_gained_and_lost_pictures_are_those_of_most_classifiers(folder):
    """Three seeds: a picture counts if two name it right in one row and none or one in the other."""
    test = find_photos(folder / "test")
    test = dataclasses.replace(test, files=test.files[:5], labels=(0, 1, 2, 0, 1))
    right, wrong = np.array(test.labels), (np.array(test.labels) + 1) % 3
    none = np.stack([wrong, np.where([1, 0, 0, 0, 0], right, wrong), np.where([1, 0, 1, 1, 1], right, wrong)])
    ours = np.stack([np.where([1, 1, 1, 0, 0], right, wrong)] * 3)
    none[:, 3] = right[3]
    grid = draw_gained_and_lost(test, {"none": none, "ours": ours}, "none", "ours", np.array([1.5, 2, 3]))
    # pictures 1 and 2 are gained, 3 is lost; 0 is right and 4 wrong in most classifiers of both
    assert grid.width == 2 * (256 + 12) + 12
    assert draw_gained_and_lost(test, {"none": ours, "ours": ours}, "none", "ours", None) is None


def test_a_comparison_leaves_its_figures(folder):
    write_augmented(folder / "aug2")
    rows = ["--rows", "none", "ours", "--baseline=none", "--seeds=1", "--epochs=1"]
    classify(folder, "--augmented=ours=aug2", *rows)
    assert Image.open(folder / "out" / "confusion.png").width > 500
    (folder / "out" / "gained_lost.png").write_bytes(b"of another baseline")
    classify(folder, "--augmented=ours=aug2", *rows, "--rows", "none")
    assert not (folder / "out" / "gained_lost.png").exists()
