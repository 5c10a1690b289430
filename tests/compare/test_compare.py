"""noisecutmix.compare compares classifiers honestly, whatever stops it and however many processes share the work.

The pictures are coloured noise, so that a tiny model of timm learns the classes within seconds.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import types

import numpy as np
import pytest
import torch
from comparing import NAMES, ONE_SEED, QUICK, classify, results_of, wait_for_results, write_augmented, write_colours
from comparing import answered as answered
from comparing import first_answer as first_answer
from comparing import folder as folder
from comparing import pictures as pictures
from drawing import MAX_WAIT, as_command_line, command, offline_environment, write_photos
from PIL import Image
from test_bad_input import files_below

from noisecutmix.compare.__main__ import create_parser, parse
from noisecutmix.compare.report import explain_gain, may_have_seen_share
from noisecutmix.compare.sets import find_generator
from noisecutmix.compare.statistics import summarize
from noisecutmix.errors import InputError, RunError
from noisecutmix.photos import find_photos, split_photos


def test_rows_are_compared_with_the_baseline_seed_by_seed(folder, capsys):
    results = classify(folder, "--augmented=ours=aug", "--epochs=2", "--seeds=3")
    rows = results["rows"]
    assert list(rows) == ["none", "cutmix", "ours", "cutmix+ours"]
    for row in rows.values():
        differences = np.subtract(row["top1"], rows["cutmix"]["top1"])
        assert len(differences) == 3
        assert row["difference"] == pytest.approx(differences.mean())
        assert row["standard_error"] > differences.std(ddof=1) / 3**0.5  # the test pictures are a sample, too
        differences = np.subtract(row["per_class"], rows["cutmix"]["per_class"])
        assert row["per_class_difference"] == pytest.approx(differences.mean())
    assert rows["ours"]["real_pictures"] == 24 and rows["ours"]["real_pictures_of_generator"] is None
    with open(folder / "out" / "per_class.csv", encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    assert [line["class"] for line in classes] == sorted(NAMES)
    for name, row in rows.items():
        mean = np.mean([float(line[f"{name} accuracy"]) for line in classes])
        assert mean == pytest.approx(row["per_class_mean"], abs=0.02)
        difference = np.mean([float(line[f"{name} difference"]) for line in classes])
        assert difference == pytest.approx(row["per_class_difference"], abs=0.02)
    labels = np.load(folder / "aug" / "soft_label.npy").sum(0)[np.argsort(NAMES)]
    assert [float(line["augmented pictures in ours"]) for line in classes] == pytest.approx(labels, abs=0.01)
    text = (folder / "out" / "results.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "unknown" in text and "Nothing was chosen on the test pictures" in text
    assert Image.open(folder / "out" / "accuracy.png").size[0] > 500


def draw_results(rng, seeds, pictures, gain=0.0):
    """Return six rows (seeds, pictures) of classifiers that are equally good, but for row 1, better by `gain`.

    Pictures differ in how hard they are, also for each row, and classifiers by their seed.
    """
    difficulty, row_effects = rng.normal(0, 2, pictures), rng.normal(0, 0.3, (6, 1, pictures))
    seed_effects = rng.normal(0, 0.1, (6, seeds, 1)) + rng.normal(0, 0.4, (6, seeds, pictures))
    is_right = difficulty + row_effects + seed_effects > -2
    if gain:
        is_right[1] |= rng.random(pictures) < gain / (1 - is_right[1].mean())
    return {str(row): values for row, values in enumerate(is_right)}


def find_verdicts(results):
    summary = summarize(results, np.zeros(results["0"].shape[1]), "0")
    return {row for row, entry in summary.items() if entry["verdict"] in ("better", "worse")}


@pytest.mark.parametrize("pictures", [20, 2000])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_at_most_five_percent_of_tables_of_equal_rows_hold_a_verdict(seeds, pictures):
    rng = np.random.default_rng(seeds)
    wrong = sum(bool(find_verdicts(draw_results(rng, seeds, pictures))) for _ in range(200))
    assert wrong <= 0.05 * 200


def test_a_difference_of_three_points_is_found_with_ten_seeds():
    rng = np.random.default_rng(0)
    found = [find_verdicts(draw_results(rng, 10, 2000, gain=0.03)) for _ in range(40)]
    assert sum("1" in rows for rows in found) >= 0.8 * 40


def test_a_gain_is_related_to_the_augmented_pictures_of_a_class_or_not():
    rng, labels = np.random.default_rng(0), np.arange(50)
    counts = rng.random(50)
    (related,) = explain_gain("ours", counts + 0.1 * rng.random(50), counts, labels)
    unrelated = [sentence for _ in range(100) for sentence in explain_gain("ours", rng.random(50), counts, labels)]
    assert "so the two are related" in related and "+0.9" in related
    assert sum("no relation can be told" in sentence for sentence in unrelated) > 88
    assert explain_gain("ours", np.zeros(50), counts, labels) == []


def test_no_error_is_told_with_two_seeds_and_two_pictures_are_no_proof():
    wrong, right = np.zeros((10, 2), bool), np.ones((10, 2), bool)
    assert summarize({"a": wrong[:2], "b": right[:2]}, np.zeros(2), "a")["b"]["standard_error"] is None
    two = summarize({"a": wrong, "b": right}, np.zeros(2), "a")["b"]
    assert two["difference"] == 100 and two["verdict"] == "no difference can be told"
    many = summarize({"a": np.zeros((10, 50), bool), "b": np.ones((10, 50), bool)}, np.zeros(50), "a")["b"]
    assert many["verdict"] == "better"
    half = np.array([[False, False]] * 9 + [[True, False]])
    assert summarize({"a": half, "b": half}, np.zeros(2), "a")["b"]["p_value"] == 1


def test_rows_of_a_seed_differ_in_the_augmented_pictures_alone(folder):
    """Without any augmented picture, weights, order, crops and flips are the same, and so is the result."""
    rows = classify(folder, "--augmented=ours=aug", "--probability=0", "--seeds=1", "--epochs=3")["rows"]
    assert rows["ours"]["top1"] == rows["none"]["top1"] and rows["cutmix+ours"]["top1"] == rows["cutmix"]["top1"]
    ours, none = (np.load(folder / "out" / "results" / f"predictions_{row}_seed0.npy") for row in ("ours", "none"))
    assert np.array_equal(ours, none) and ours.shape == (30, 3) and ours.dtype == np.float16


@pytest.mark.slow
def test_processes_continue_a_killed_comparison_and_share_it(folder, start):
    arguments = ["--augmented=ours=aug", "--epochs=8", "--seeds=3"]
    with as_command_line("noisecutmix.compare", *QUICK, *arguments, "--output_dir=whole", folder=folder) as main:
        main()
    killed = start(command("noisecutmix.compare", *QUICK, *arguments))
    wait_for_results(folder, 2, killed)
    killed.kill()
    killed.communicate()
    there = len(list((folder / "out").glob("results/[!.]*")))
    two = [start(command("noisecutmix.compare", *QUICK, *arguments, *more)) for more in ([], ["--num_workers=1"])]
    outputs = [process.communicate(timeout=MAX_WAIT) for process in two]
    assert [process.returncode for process in two] == [0, 0], outputs
    trained = [len(re.findall("% test accuracy", errors)) for _, errors in outputs]
    assert sum(trained) <= 12 - there + 1 and min(trained) >= 2, trained
    expected = {name: (folder / "whole" / name).read_bytes() for name in results_of(folder)}
    assert results_of(folder) == expected


def test_more_seeds_continue_a_comparison(answered):
    first = json.loads((answered / "out" / "results.json").read_text())["rows"]
    files = {file: file.stat().st_mtime_ns for file in (answered / "out" / "results").iterdir()}
    second = classify(answered, *ONE_SEED, "--seeds=2")["rows"]
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert all(second[row]["top1"][:1] == first[row]["top1"] for row in first)


def test_other_options_and_pictures_in_the_same_folder_are_refused_by_name(folder):
    arguments = ["--augmented=ours=aug", *ONE_SEED]
    classify(folder, *arguments)
    before = results_of(folder)

    def is_refused(named, *change):
        with pytest.raises(InputError, match=re.escape(f"--output_dir: out was made with another {named}")):
            classify(folder, *arguments, *change)
        assert results_of(folder) == before

    is_refused("epochs (1 there, 3 now)", "--epochs=3")
    is_refused("keep (1.0 there, 0.5 now)", "--keep=0.5")
    is_refused("examples_per_class", "--examples_per_class=4")
    for name, named in ((f"test/{NAMES[0]}/{{}}.png", "test_pictures"), ("aug/image/gen_000{}.png", "augmented")):
        first, second = (folder / name.format(number) for number in (0, 1))
        content = first.read_bytes()
        shutil.copy(second, first)
        is_refused(named)
        first.write_bytes(content)


def test_a_start_that_fails_leaves_a_folder_that_can_be_used(folder, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context, pytest.raises(OSError, match="No space"):
        context.setattr("noisecutmix.compare.comparison.create_file", fail)
        classify(folder, *ONE_SEED)
    classify(folder, *ONE_SEED)


def test_predictions_that_are_not_finite_are_no_result(folder):
    with pytest.raises(RunError, match=r"not finite; use a lower learning_rate or dtype=bfloat16"):
        classify(folder, "--rows", "none", "cutmix", "--batch_size=24", "--epochs=1", "--learning_rate=1e6")
    assert not list((folder / "out" / "results").glob("[!.]*.npy"))


def test_pictures_in_training_and_test_are_counted(folder, capsys):
    for number in range(2):
        shutil.copy(folder / "test" / NAMES[0] / f"{number}.png", folder / "train" / NAMES[1] / f"leak{number}.png")
    results = classify(folder, *ONE_SEED)
    assert "warning: 2 pictures are among those for training and for the test, too" in capsys.readouterr().err
    assert results["leaked_pictures"] == 2
    assert "Warning: 2 pictures" in (folder / "out" / "results.md").read_text(encoding="utf-8")


def test_classes_of_an_augmented_set_are_found_by_name(folder):
    """The same pictures with the labels' columns in another order give the same results."""
    shutil.copytree(folder / "aug", folder / "permuted")
    run_file, labels_file = folder / "permuted" / "run.json", folder / "permuted" / "soft_label.npy"
    content = json.loads(run_file.read_text())
    order = [2, 0, 1]
    content["options"]["class_names"] = [NAMES[place].replace(" ", "_") for place in order]
    run_file.write_text(json.dumps(content))
    np.save(labels_file, np.ascontiguousarray(np.load(labels_file)[:, order]))
    rows = ("--rows", "none", "cutmix", "a", "b", "--probability=0.9", "--seeds=1")
    classify(folder, "--augmented=a=aug", "--augmented=b=permuted", *rows)
    one, other = (np.load(folder / "out" / "results" / f"predictions_{name}_seed0.npy") for name in "ab")
    assert np.array_equal(one, other)
    table = (folder / "out" / "test_pictures.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "file,label,class" and table[1] == "blue jay/0.png,0,blue jay" and len(table) == 31
    labels = [int(line.split(",")[1]) for line in table[1:]]
    assert (one.argmax(1) == labels).mean() > 0.6
    np.testing.assert_array_equal(*(np.load(folder / "out" / f"losses_{name}.npy") for name in "ab"))


def test_the_pictures_of_the_highest_loss_are_shown_and_left_out(folder):
    wrong = (3, 11)
    write_augmented(folder / "half_wrong", wrong=wrong)
    rows = classify(folder, "--augmented=ours=half_wrong", "--keep=0.9", "--seeds=1")["rows"]
    scores = np.load(folder / "out" / "losses_ours.npy")
    assert scores.shape == (20,) and set(np.argsort(-scores)[:2]) == set(wrong)
    assert rows["ours"]["augmented_pictures"] == 18
    assert Image.open(folder / "out" / "highest_loss_ours.png").width == 4 * (256 + 12) + 12


def test_a_classifier_that_saw_too_little_is_no_reference(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part)
        write_photos(folder / part, NAMES)
    arguments = ["--augmented=ours=aug", *ONE_SEED, "--learning_rate=0"]
    classify(folder, *arguments)
    assert "too little to tell which augmented" in (folder / "out" / "results.md").read_text(encoding="utf-8")
    assert not list((folder / "out").glob("highest_loss*")) and not list((folder / "out").glob("losses*"))
    with pytest.raises(RunError, match=r"too little to tell which .*without --keep"):
        classify(folder, *arguments, "--keep=0.9", "--output_dir=other")


@pytest.mark.slow
def test_wrong_labels_come_out_worse(folder):
    labels_file = folder / "aug" / "soft_label.npy"
    np.save(labels_file, np.ascontiguousarray(np.load(labels_file)[:, [1, 2, 0]]))
    row = classify(folder, "--augmented=wrong=aug", "--rows", "cutmix", "wrong", "--probability=0.9")["rows"]["wrong"]
    assert row["verdict"] == "worse" and row["difference"] < -2 * row["standard_error"]


@pytest.mark.parametrize("more", [[], pytest.param(["--resize=40"], marks=pytest.mark.slow)])
def test_the_lines_that_use_saved_weights_run(folder, capsys, monkeypatch, more):
    arguments = ["--augmented=ours=aug", *ONE_SEED, "--rows", "none", "cutmix", "ours", *more]
    before = classify(folder, *arguments)
    capsys.readouterr()
    assert classify(folder, *arguments, "--save_weights") == before  # trained again for the weights
    rows = before["rows"]
    lines = capsys.readouterr().out.split("classifier of a row:\n\n")[1].splitlines()
    assert len(lines) == 5
    monkeypatch.chdir(folder)
    loaded = {}
    exec("\n".join(lines), loaded)
    assert capsys.readouterr().out.strip() in NAMES
    # the loaded classifier names as many test pictures right as the comparison says
    transform = loaded["timm"].data.create_transform(**loaded["about"]["transform"])
    right = 0
    for file in (folder / "test").rglob("*.png"):
        logits = loaded["model"](transform(Image.open(file))[None])
        right += loaded["about"]["class_names"][int(logits.argmax())] == file.parent.name
    assert 100 * right / 30 == pytest.approx(rows["none"]["top1"][0])
    assert {file.stem for file in (folder / "out" / "weights").iterdir()} == {"none", "cutmix", "ours"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=resnet5"], "--model: timm has no 'resnet5'; did you mean resnet50"),
        (["--augmented=ours=train"], "--augmented: train is not a data set of augmentation.py"),
        (["--augmented=ours=unfinished"], "--augmented: .*unfinished: the data set is not complete, 20 of 20"),
        (["--augmented=ours=others"], "--augmented: others has no class 'blue jay'"),
        (["--augmented=cutmix=aug"], "--augmented: has to be NAME=DIR"),
        (["--augmented=aug"], "--augmented: has to be NAME=DIR"),
        (["--augmented=a=aug", "--augmented=A=aug"], "--augmented: two data sets have the same name"),
        (["--rows", "none", "mine"], "--rows: 'mine' is no row; choose from none, mixup, cutmix"),
        (["--rows", "none"], "--baseline: cutmix is not among --rows"),
        (["--test_dir=train"], "--test_dir: .*0.png is among those for training, too"),
        (["--train_dir=nested", "--test_dir=nested/held"], "--test_dir: .*0.png is among those for training, too"),
        (["--test_dir=more"], "--test_dir: --train_dir has no class 'wren', which is in more"),
        (["--test_dir=hollow"], "--test_dir: hollow holds no picture"),
        (["--output_dir=train/out"], "--output_dir: .* lies in --train_dir"),
        (["--keep=0"], "--keep: has to be a number from 0.01 to 1"),
        (["--dtype=float16"], "--dtype: float16 needs cuda"),
        (["--test_dir=broken"], "broken.*0.png cannot be read"),
        (["--augmented=ours=damaged"], "damaged.*gen_0003.png cannot be read"),
        (["--resize=16"], "--resize: 16 pixels are fewer than --image_size=32"),
        (["--test_list=list.txt"], "--test_list: give --test_dir or --test_list, not both"),
        (["--split=train"], "--split: train is not a published data set with a split"),
        (["--batch_size=1"], "--model: test_byobnet cannot train on 1 pictures of 32x32: "),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(wrong_folders, arguments, message):
    before = files_below(wrong_folders)
    with pytest.raises(InputError, match=message):
        classify(wrong_folders, *arguments)
    assert files_below(wrong_folders) == before


@pytest.fixture(scope="module")
def wrong_folders(pictures, tmp_path_factory):
    """Those of `folder`, and others that cannot be used."""
    folder = shutil.copytree(pictures, tmp_path_factory.mktemp("wrong") / "folder")
    write_augmented(folder / "unfinished", complete=False)
    write_augmented(folder / "others", names=["red kite", "wren", "grey heron"])
    damaged = write_augmented(folder / "damaged") / "image" / "gen_0003.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    write_colours(folder / "broken", 1, seed=3)
    (folder / "broken" / "red kite" / "0.png").write_bytes(b"no picture")
    shutil.copytree(folder / "train", folder / "nested")
    shutil.copytree(folder / "test", folder / "nested" / "held")
    write_photos(folder / "more", [*NAMES, "wren"], count=1)
    for name in NAMES:
        (folder / "hollow" / name).mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded_are_one_line(folder, run_script):
    flags = [flag for flag in QUICK if flag != "--no_pretrained"]
    done = run_script("noisecutmix.compare", *flags, environment={"HF_HOME": str(folder / "empty")})
    assert done.returncode == 2
    first, last = done.stderr.splitlines()
    assert first == "loading the libraries"
    start = r"noisecutmix\.compare: error: --model: test_byobnet cannot be created: "
    assert re.fullmatch(start + ".*give --no_pretrained.*", last)
    assert not (folder / "out").exists()


def test_a_part_of_each_class_is_kept_for_the_test(tmp_path):
    """The training pictures are those that fine-tuning chooses with the same number and seed."""
    write_photos(tmp_path, ["a", "b"], count=10)
    photos = find_photos(tmp_path)
    train, test = split_photos(photos, 0.3, seed=4)
    assert sorted(train.files + test.files) == list(photos.files)
    assert [test.labels.count(label) for label in (0, 1)] == [3, 3]
    few, same_test = split_photos(photos, 0.3, examples_per_class=2, seed=4)
    assert few.files == find_photos(tmp_path, 2, 4).files and same_test == test
    assert split_photos(photos, 0.3, seed=5)[1] != test
    assert all(photos.labels[photos.files.index(file)] == label for file, label in zip(train.files, train.labels))


def test_a_split_off_test_says_that_the_generator_may_have_seen_it(folder):
    arguments = [flag for flag in (*QUICK, *ONE_SEED) if "test_dir" not in flag]
    with as_command_line("noisecutmix.compare", *arguments, "--augmented=ours=aug", folder=folder) as main:
        main()
    assert "fine-tuned on all of it has seen them" in (folder / "out" / "results.md").read_text(encoding="utf-8")


def test_a_checkpoint_that_cannot_be_looked_at_tells_nothing():
    """As one in another user's home folder; root may enter those, but may not give a folder so long a name."""
    assert find_generator({"ckpt_path": 300 * "a", "options": {"checkpoint": "0", "class_names": NAMES}}) == (None, "")


def test_the_number_of_pictures_that_the_generator_saw_is_read_from_its_checkpoint(folder, tiny_checkpoint):
    from noisecutmix.sources import fingerprint_checkpoint

    shutil.copytree(tiny_checkpoint, folder / "tuned")
    (folder / "tuned" / "finetune.json").write_text(
        json.dumps({"options": {"num_pictures": 12, "examples_per_class": 4, "seed": 0}})
    )
    run_file = folder / "aug" / "run.json"
    content = json.loads(run_file.read_text())
    content["ckpt_path"] = str(folder / "tuned")
    content["options"]["checkpoint"] = fingerprint_checkpoint(folder / "tuned")
    run_file.write_text(json.dumps(content))
    rows = classify(folder, "--augmented=ours=aug", *ONE_SEED, "--rows", "none", "cutmix", "ours")["rows"]
    assert rows["ours"]["real_pictures_of_generator"] == 12 and rows["none"]["real_pictures_of_generator"] == 0


@pytest.mark.parametrize(
    ("sizes", "seen", "warns"),
    [
        ((5, 100), (15, 10, 0), True),  # all five of the first class, of which one is for the test
        ((50, 100), (20, 10, 0), False),
        ((50, 100), (20, 10, 1), True),
        ((50, 100), (20, None, 0), True),
        ((50, 100), None, True),
    ],
)
def test_a_generator_that_may_have_seen_the_share_is_named(tmp_path, sizes, seen, warns):
    for name, size in zip(("a", "b"), sizes):
        (tmp_path / name).mkdir()
        for number in range(size):
            (tmp_path / name / f"{number}.png").touch()
    train, test = split_photos(find_photos(tmp_path), 0.2)
    comparison = types.SimpleNamespace(train=train, test=test, seed=0)
    assert may_have_seen_share(seen, comparison) == warns


def test_a_test_without_a_class_scores_the_others(folder, capsys):
    """Whether the class's folder is missing or empty."""
    shutil.rmtree(folder / "test" / "blue jay")
    missing = classify(folder, *ONE_SEED)
    (folder / "test" / "blue jay").mkdir()
    assert classify(folder, *ONE_SEED, "--output_dir=empty") == missing
    assert "the test has no picture of 1 classes ('blue jay'); they are not scored" in capsys.readouterr().err
    predictions = np.load(folder / "out" / "results" / "predictions_none_seed0.npy")
    labels = np.repeat([1, 2], 10)  # of grey heron and red kite, in the order of --train_dir
    assert predictions.shape == (20, 3)
    assert missing["rows"]["none"]["top1"] == [100 * (predictions.argmax(1) == labels).mean()]
    assert "no picture of 1 classes" in (folder / "out" / "results.md").read_text(encoding="utf-8")


def test_a_recipe_gives_defaults_that_flags_override(folder):
    quick = [flag for flag in (*QUICK, *ONE_SEED) if "--image_size" not in flag and "--learning_rate" not in flag]
    with as_command_line("noisecutmix.compare", "--recipe=diffmix", *quick, folder=folder) as main:
        main()
    options = json.loads((folder / "out" / "classify.json").read_text())["options"]
    wanted = {"image_size": 224, "resize": 256, "learning_rate": 0.05, "warm_up": 0.1, "color_jitter": 0.0}
    assert options.items() >= {**wanted, "weight_decay": 5e-4, "epochs": 1, "batch_size": 8}.items()
    parser = create_parser()
    folders = ["--train_dir=x", "--output_dir=y", "--recipe=diffmix"]
    assert parse(parser, [*folders, "--image_size=448"]).resize == 512
    assert parse(parser, [*folders, "--image_size=384"]).resize == 440


def test_a_share_of_the_batches_is_mixed(folder):
    rows = (*ONE_SEED, "--epochs=2")
    predictions = {}
    for share in ("0", "0.5", "1"):
        classify(folder, *rows, f"--mix_probability={share}", f"--output_dir=out{share}")
        predictions[share] = np.load(folder / f"out{share}" / "results" / "predictions_cutmix_seed0.npy")
    none = np.load(folder / "out0" / "results" / "predictions_none_seed0.npy")
    assert np.array_equal(predictions["0"], none)
    assert not np.array_equal(predictions["0.5"], none) and not np.array_equal(predictions["0.5"], predictions["1"])
    with pytest.raises(InputError, match=r"made with another mix_probability \(0.5 there, 1.0 now\)"):
        classify(folder, *rows, "--mix_probability=1", "--output_dir=out0.5")


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_labels_have_the_shares_of_the_pictures(mix):
    from noisecutmix.compare.items import mix_batch

    classes = torch.arange(6)
    pictures = torch.nn.functional.one_hot(classes, 6).float()[:, :, None, None].expand(6, 6, 16, 16)
    for seed in range(20):
        mixed, labels = mix_batch(mix, pictures, torch.eye(6), np.random.default_rng(seed))
        torch.testing.assert_close(mixed.mean((2, 3)), labels)
    assert (pictures.mean((2, 3)) == torch.eye(6)).all()  # the batch itself is unchanged


def test_a_small_set_is_decoded_once(tmp_path):
    """The pictures of the second epoch are those of the first, although the files are gone."""
    from noisecutmix.compare.items import RealPictures

    photos = find_photos(write_photos(tmp_path / "photos", NAMES, count=2))
    pictures = RealPictures(photos, np.asarray, epochs=2)
    first = [pictures[index] for index in range(6)]
    shutil.rmtree(tmp_path / "photos")
    for index in range(6):
        picture, label = pictures[6 + index]
        assert (picture == first[index][0]).all() and label == first[index][1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a file system needs root")
def test_too_little_shared_memory_is_a_line(folder):
    words = command("noisecutmix.compare", *QUICK, "--rows", "none", "cutmix", "--image_size=224", "--num_workers=2")
    small = f"mount -t tmpfs -o size=256k tmpfs /dev/shm && exec {shlex.join(words)}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", small], cwd=folder, env=offline_environment(), capture_output=True, text=True
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("this container mounts no file systems")
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert done.returncode == 1 and "use --num_workers=0" in lines[-1], done.stderr
    assert "Traceback" not in done.stderr
