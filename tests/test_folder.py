"""The output folder: foreign and damaged files, concurrent runs, and interruptions at any moment."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from conftest import as_command_line, files_of, run_to_the_end
from filelock import FileLock
from PIL import Image, PngImagePlugin

from noisecutmix import files
from noisecutmix.errors import InputError, RunError
from noisecutmix.folder import OutputFolder
from noisecutmix.pipeline import NoiseCutMixPipeline
from noisecutmix.plan import Plan

RUN = {"command": ["python", "augmentation.py"]}


def copy_of(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def begin_folder(root, num_items=4, overwrite=False, alpha=1.0):
    folder = OutputFolder(root, Plan(0, 3, alpha, 16), num_items, ["a", "b", "c"])
    with folder.held({"alpha": alpha}, overwrite):
        folder.begin({"alpha": alpha}, RUN, overwrite)
    return folder


def black():
    return Image.new("RGB", (16, 16))


# One run at a time


def test_a_run_writes_nothing_after_a_later_run_has_taken_the_folder(tmp_path):
    earlier = begin_folder(tmp_path / "out")
    earlier.write(earlier.plan.item(0), black())
    later = begin_folder(tmp_path / "out", overwrite=True, alpha=0.5)
    for action in (lambda: earlier.write(earlier.plan.item(1), black()), earlier.finish):
        with pytest.raises(RunError, match=r"another run has taken|is not there"):
            action()
    assert not later.items.path("image", 0).exists() and not later.items.path("image", 1).exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_file_in_progress_never_appears_after_the_folder_is_taken(tmp_path, monkeypatch):
    """The folder is taken after the earlier run has written the file and before it renames it."""
    earlier = begin_folder(tmp_path / "out")
    sync = os.fsync

    def take_the_folder(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        sync(descriptor)
        begin_folder(tmp_path / "out", overwrite=True, alpha=0.5)

    monkeypatch.setattr(os, "fsync", take_the_folder)
    with pytest.raises((RunError, FileNotFoundError)):
        earlier.write(earlier.plan.item(1), black())
    assert not list((tmp_path / "out").rglob("*.p*"))


def test_a_failed_start_leaves_no_folder(tmp_path):
    folder = OutputFolder(tmp_path / "new" / "deeper", Plan(0, 3, 1.0, 16), 4, "abc")
    with pytest.raises(InputError), folder.held({}, overwrite=False):
        raise InputError("a wrong checkpoint")
    assert not list(tmp_path.iterdir())


def test_a_failed_start_leaves_a_folder_that_another_run_has_taken(tmp_path, monkeypatch):
    """Another run takes the lock as soon as it is free; its lock file and its folder remain."""
    folder = OutputFolder(tmp_path / "out", Plan(0, 3, 1.0, 16), 4, "abc")
    another = FileLock(tmp_path / "out" / ".lock", timeout=0)
    unlink, rmdir = os.unlink, os.rmdir

    def let_another_take(call):
        def change(path, **named):
            with contextlib.suppress(TimeoutError):
                another.acquire()
            call(path, **named)

        return change

    monkeypatch.setattr(os, "unlink", let_another_take(unlink))
    monkeypatch.setattr(os, "rmdir", let_another_take(rmdir))
    with pytest.raises(InputError), folder.held({}, overwrite=False):
        raise InputError("a wrong checkpoint")
    monkeypatch.undo()
    with pytest.raises(InputError, match="another run is writing"), folder.held({}, overwrite=False):
        pass
    another.release()


# An interruption at any moment


class Killed(BaseException):
    pass


CHANGING_CALLS = ("replace", "rename", "unlink", "mkdir", "rmdir", "remove")


def run_until_killed(action, monkeypatch, moment):
    """Run an action that is killed at its change number `moment` to the disk; return whether it was killed."""
    count = 0

    def until_the_moment(call):
        def change(*arguments, **named):
            nonlocal count
            count += 1
            if count > moment:  # a killed process changes nothing later either, such as in a clean-up
                raise Killed
            return call(*arguments, **named)

        return change

    with monkeypatch.context() as patch:
        for name in CHANGING_CALLS:
            patch.setattr(os, name, until_the_moment(getattr(os, name)))
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_begin_killed_at_any_moment_can_be_continued(tmp_path, monkeypatch, overwrite):
    """This also holds with a foreign file among the pictures, and no picture of the earlier run is ever reused."""
    for moment in range(100):
        root = tmp_path / str(moment)
        earlier = begin_folder(root, num_items=3)
        for index in range(3):
            earlier.write(earlier.plan.item(index), black())
        earlier.finish()
        (root / "image" / "cat.png").write_bytes(b"somebody's")
        alpha = 0.5 if overwrite else 1.0
        was_killed = run_until_killed(lambda: begin_folder(root, 4, overwrite, alpha), monkeypatch, moment)  # noqa: B023
        record = json.loads((root / "run.json").read_text())
        resumed = begin_folder(root, 4, overwrite=False, alpha=record["options"]["alpha"])
        missing = resumed.mend(np.arange(4)).tolist()
        assert missing == ([0, 1, 2, 3] if record["options"]["alpha"] == 0.5 else [3])
        begin_folder(root, 4, overwrite=True, alpha=2.0)
        assert (root / "image" / "cat.png").read_bytes() == b"somebody's"
        if not was_killed:
            return
    raise AssertionError("the run should have ended")


def test_a_stop_while_overwriting_counts_no_item_of_the_earlier_run(whole, tmp_path, tiny_arguments, monkeypatch):
    out = copy_of(whole, tmp_path)
    unlink = os.unlink

    def stop_at_the_fifth(path, **named):
        if str(path).endswith("gen_0004.png"):
            raise KeyboardInterrupt
        unlink(path, **named)

    monkeypatch.setattr(os, "unlink", stop_at_the_fifth)
    advice = "stopped: 0 of 20 items are done; the same command without --overwrite continues"
    with pytest.raises(KeyboardInterrupt, match=advice):
        run_to_the_end(tmp_path, tiny_arguments, 20, "--overwrite", "--alpha=0.5")
    monkeypatch.undo()
    assert list((out / "image").iterdir())
    run_to_the_end(tmp_path, tiny_arguments, 20, "--alpha=0.5")  # the suggested command
    (tmp_path / "alone").mkdir()
    run_to_the_end(tmp_path / "alone", tiny_arguments, 20, "--alpha=0.5")
    assert files_of(out) == files_of(tmp_path / "alone" / "out")


# Batches are blocks of indices


@pytest.fixture
def pixels_depend_on_the_batch(monkeypatch):
    """Make pixels depend on the whole batch, as the rounding of a GPU's kernels may depend on the batch size."""
    call = NoiseCutMixPipeline.__call__

    def stamp(self, *arguments, **named):
        images = call(self, *arguments, **named)[0]
        seeds = [generator.initial_seed() for generator in named["generator"]]
        for image in images:
            image.putpixel((0, 0), tuple(hash((len(seeds), *seeds)).to_bytes(8, "big", signed=True)[:3]))
        return images, None

    monkeypatch.setattr(NoiseCutMixPipeline, "__call__", stamp)


def test_bytes_do_not_depend_on_existing_items(pixels_depend_on_the_batch, tmp_path, tiny_arguments):
    (tmp_path / "whole").mkdir()
    run_to_the_end(tmp_path / "whole", tiny_arguments, 30)
    expected = files_of(tmp_path / "whole" / "out")

    run_to_the_end(tmp_path, tiny_arguments, 13)
    for index in (1, 6, 7, 12):
        (tmp_path / "out" / "image" / f"gen_{index:04d}.png").unlink()
    (tmp_path / "out" / "image" / "gen_0003.png").write_bytes(b"")
    run_to_the_end(tmp_path, tiny_arguments, 21)
    run_to_the_end(tmp_path, tiny_arguments, 30)
    assert files_of(tmp_path / "out") == expected


# Foreign and damaged files


def test_a_foreign_picture_never_replaces_a_picture_of_the_data_set(whole, tmp_path, tiny_arguments):
    out = copy_of(whole, tmp_path)
    for name in ("gen_1.png", "gen_00001.png", "gen_001.png"):
        black().save(out / "image" / name)
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert {**files_of(out), **files_of(whole)} == files_of(out)
    assert len(list((out / "image").iterdir())) == 23


def test_names_with_more_digits_replace_no_file(tmp_path):
    small = begin_folder(tmp_path / "out", 10_000)
    small.write(small.plan.item(1), black())
    Image.new("RGB", (16, 16), "white").save(tmp_path / "out" / "image" / "gen_00001.png")
    large = begin_folder(tmp_path / "out", 10_001)
    assert Image.open(large.items.path("image", 1)).getpixel((0, 0)) == (255, 255, 255)
    assert Image.open(tmp_path / "out" / "image" / "gen_0001.png").getpixel((0, 0)) == (0, 0, 0)


def test_a_wrong_mask_is_written_again(whole, tmp_path, tiny_arguments):
    out = copy_of(whole, tmp_path)
    Image.new("L", (16, 16), 255).save(out / "mask" / "mask_0002.png")
    shutil.copy(out / "mask" / "mask_0004.png", out / "mask" / "mask_0005.png")
    other = begin_folder(tmp_path / "other", num_items=20, alpha=0.5)
    boxes = [(Plan(0, 3, 1.0, 16).item(index).box, other.plan.item(index).box) for index in range(20)]
    index = next(index for index, (box, other_box) in enumerate(boxes) if box != other_box and index not in (2, 5))
    other.write(other.plan.item(index), black())
    shutil.copy(other.items.path("mask", index), out / "mask" / f"mask_{index:04d}.png")
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert files_of(out) == files_of(whole)


def test_a_correct_mask_of_another_writer_is_kept(whole, tmp_path, tiny_arguments):
    out = copy_of(whole, tmp_path)
    mask = out / "mask" / "mask_0003.png"
    Image.open(mask).save(mask, compress_level=9, pnginfo=PngImagePlugin.PngInfo())
    before = mask.read_bytes()
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert mask.read_bytes() == before


def as_jpeg(file):
    Image.open(file).save(file, "JPEG")


def as_truncated(file):
    file.write_bytes(file.read_bytes()[:-7])


def as_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def as_zeros_behind_the_header(file):
    content = file.read_bytes()
    file.write_bytes(content[:200] + bytes(len(content) - 200))


def as_wrong_size(file):
    Image.new("RGB", (8, 16)).save(file)


def as_gray(file):
    Image.open(file).convert("L").save(file)


def as_dangling_link(file):
    file.unlink()
    file.symlink_to("nowhere.png")


@pytest.mark.parametrize(
    "damage",
    [as_jpeg, as_truncated, as_zeros, as_zeros_behind_the_header, as_wrong_size, as_gray, as_dangling_link],
)
def test_a_damaged_picture_is_drawn_again(whole, tmp_path, tiny_arguments, damage):
    out = copy_of(whole, tmp_path)
    damage(out / "image" / "gen_0019.png")
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert files_of(out) == files_of(whole)


def test_only_verify_finds_a_changed_pixel_stream(whole, tmp_path, tiny_arguments):
    """The README makes this promise."""
    out = copy_of(whole, tmp_path)
    image = out / "image" / "gen_0019.png"
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 255
    image.write_bytes(content)
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert image.read_bytes() == content
    run_to_the_end(tmp_path, tiny_arguments, 20, "--verify")
    assert files_of(out) == files_of(whole)


def test_a_damaged_picture_of_the_preview_is_reported_with_the_remedy(whole, tmp_path, tiny_arguments):
    out = copy_of(whole, tmp_path)
    image = out / "image" / "gen_0003.png"
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 255
    image.write_bytes(content)
    (out / "soft_label.npy").unlink()
    with pytest.raises(RunError, match=r"gen_0003.png is damaged; the same command with --verify continues"):
        run_to_the_end(tmp_path, tiny_arguments, 20)
    run_to_the_end(tmp_path, tiny_arguments, 20, "--verify")
    assert files_of(out) == files_of(whole)


def change_record(**changes):
    def change(out):
        file = out / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def record_is_a_folder(out):
    (out / "run.json").unlink()
    (out / "run.json").mkdir()


def images_are_a_file(out):
    shutil.rmtree(out / "image")
    (out / "image").write_text("somebody's")


def picture_is_a_folder(out):
    (out / "image" / "gen_0003.png").unlink()
    (out / "image" / "gen_0003.png").mkdir()


UNUSABLE = {
    "items without end": (change_record(num_aug=float("inf")), "run.json is not from this program"),
    "items are true": (change_record(num_aug=True), "run.json is not from this program"),
    "no runs": (change_record(runs=[]), "run.json is not from this program"),
    "runs are an object": (change_record(runs={"a": 1}), "run.json is not from this program"),
    "a run without its command": (change_record(runs=[{}]), "run.json is not from this program"),
    "a command of numbers": (change_record(runs=[{"command": [1]}]), "run.json is not from this program"),
    "options are a list": (change_record(options=[]), "run.json is not from this program"),
    "record cannot be read": (record_is_a_folder, "run.json cannot be read: "),
    "images are a file": (images_are_a_file, "image is not a folder; move it away"),
    "a picture is a folder": (picture_is_a_folder, "gen_0003.png is a folder; move it away"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_that_cannot_be_used_is_refused_before_anything_changes(whole, tmp_path, tiny_arguments, case, more):
    change, message = UNUSABLE[case]
    out = copy_of(whole, tmp_path)
    change(out)
    before = files_of(out)
    with pytest.raises(InputError, match=message):
        run_to_the_end(tmp_path, tiny_arguments, 20, *more)
    assert files_of(out) == before


@pytest.mark.parametrize("name", ["gen_0003.png", "mask_0003.png", "run.json"])
def test_a_full_disk_is_reported_with_the_file_name(tmp_path, tiny_arguments, monkeypatch, name):
    sync = os.fsync

    def fail(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=rf"{name}: No space left on device.*the same command continues"):
        run_to_the_end(tmp_path, tiny_arguments, 5)
    monkeypatch.undo()
    run_to_the_end(tmp_path, tiny_arguments, 5)


def test_an_unknown_option_is_a_difference(whole, tmp_path, tiny_arguments):
    out = copy_of(whole, tmp_path)
    record = json.loads((out / "run.json").read_text())
    record["options"]["shown"] = "target"
    (out / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"another shown \(target there, None now\)"):
        run_to_the_end(tmp_path, tiny_arguments, 20)


# generation.py


def draw(tmp_path, arguments, num_gen, *more):
    arguments = [*arguments, f"--num_gen={num_gen}", "--output_dir=out", *more]
    with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
        main()


def test_generation_refuses_the_folder_of_a_data_set(whole, tmp_path, tiny_arguments):
    out = copy_of(whole, tmp_path)
    before = files_of(out)
    for name in (None, "soft_label.npy", "metadata.jsonl"):  # also for an unfinished data set
        if name:
            (out / name).unlink()
            del before[name]
        with pytest.raises(InputError, match="--output_dir: out holds a data set; choose another folder"):
            draw(tmp_path, tiny_arguments, 2)
        assert files_of(out) == before


def test_pictures_and_preview_are_of_one_run(tmp_path, tiny_arguments):
    draw(tmp_path, tiny_arguments, 5)
    foreign = {"gen_0007.png": b"somebody's", "gen_notes.txt": b"mine"}
    for name, content in foreign.items():
        (tmp_path / "out" / name).write_bytes(content)
    black().save(tmp_path / "out" / "gen_0008.png")
    draw(tmp_path, tiny_arguments, 2, "--seed=1")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["gen_0000.png", "gen_0001.png", *sorted([*foreign, "gen_0008.png"]), "preview.png"]
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in foreign.items())


def test_atomic_files_are_complete_or_missing(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic_file(tmp_path / "file") as content:
        content.write(b"half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
