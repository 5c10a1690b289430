"""The output folder: what it may be continued with, foreign and damaged files, and the folder of generation.py."""

import json
import os
import shutil

import numpy as np
import pytest
from drawing import as_command_line, files_of, run_to_the_end
from PIL import Image, PngImagePlugin

from noisecutmix import AugmentedDataset, files
from noisecutmix.errors import InputError, RunError
from noisecutmix.folder import OutputFolder
from noisecutmix.pipeline import NoiseCutMixPipeline
from noisecutmix.plan import Plan


def create_folder(root, num_items=4, alpha=1.0):
    return OutputFolder(root, Plan(0, 3, alpha, 16), num_items, ["a", "b", "c"], {"alpha": alpha})


def begin_folder(root, num_items=4, alpha=1.0):
    folder = create_folder(root, num_items, alpha)
    folder.begin({"command": ["python", "augmentation.py"]})
    return folder


def black():
    return Image.new("RGB", (16, 16))


# What a folder may be continued with


@pytest.mark.parametrize(("begun_with", "more", "digits"), [(4, 10_001, 4), (10_000, 10_001, 4), (20_000, 100_001, 5)])
def test_a_data_set_does_not_outgrow_the_digits_of_its_file_names(tmp_path, begun_with, more, digits):
    begin_folder(tmp_path, begun_with)
    create_folder(tmp_path, more - 1).check_usable()
    with pytest.raises(InputError, match=f"num_aug: .* its file names have room for {10**digits};"):
        create_folder(tmp_path, more).check_usable()


def test_fewer_items_than_planned_or_completed_are_refused(tmp_path):
    folder = begin_folder(tmp_path, 6)
    with pytest.raises(InputError, match="is for 6 items, and"):
        create_folder(tmp_path, 5).check_usable()
    grown = begin_folder(tmp_path, 8)
    for item in grown.plan.items(8):
        grown.write(item, black())
    grown.finish()
    with pytest.raises(InputError, match="is for 8 items, and"):
        create_folder(tmp_path, 7).check_usable()
    folder.finish()  # of a process that was asked for fewer, and ends later
    assert len(np.load(tmp_path / "soft_label.npy")) == 8


def test_a_data_set_of_an_earlier_version_is_read_but_not_continued(out, tmp_path, tiny_arguments):
    record = json.loads((out / "run.json").read_text())
    run = {name: record.pop(name) for name in ("command", "working_directory", "versions")}
    (out / "run.json").write_text(json.dumps({**record, "runs": [run], "is_cleared": True, "identity": "0"}))
    for file in (out / "image").iterdir():
        Image.open(file).save(file, pnginfo=PngImagePlugin.PngInfo())  # without the mark
    before = files_of(out)
    assert len(AugmentedDataset(out)) == 20
    with pytest.raises(InputError, match="of an earlier version, which can be read but not continued"):
        run_to_the_end(tmp_path, tiny_arguments, 20)
    assert files_of(out) == before


def test_the_smaller_data_set_stays_readable_while_it_grows(out):
    """Metadata are replaced before the labels, which say how many items there are."""
    lines = (out / "metadata.jsonl").read_text().splitlines(keepends=True)
    (out / "metadata.jsonl").write_text("".join(lines) + lines[-1].replace("0019", "0020"))
    assert len(AugmentedDataset(out)) == 20


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
    script = "augmentation.py"
    (tmp_path / "whole").mkdir()
    run_to_the_end(tmp_path / "whole", tiny_arguments, 21, script=script)
    expected = files_of(tmp_path / "whole" / "out")

    run_to_the_end(tmp_path, tiny_arguments, 13, script=script)
    for index in (1, 6, 7, 12):
        (tmp_path / "out" / "image" / f"gen_{index:04d}.png").unlink()
    (tmp_path / "out" / "image" / "gen_0003.png").write_bytes(b"")
    run_to_the_end(tmp_path, tiny_arguments, 21, script=script)
    assert files_of(tmp_path / "out") == expected


# Foreign and damaged files


def test_a_wrong_mask_is_written_again(whole, out, tmp_path, tiny_arguments):
    Image.new("L", (16, 16), 255).save(out / "mask" / "mask_0002.png")
    shutil.copy(out / "mask" / "mask_0004.png", out / "mask" / "mask_0005.png")
    other = begin_folder(tmp_path / "other", num_items=20, alpha=0.5)
    boxes = [(Plan(0, 3, 1.0, 16).item(index).box, other.plan.item(index).box) for index in range(20)]
    index = next(index for index, (box, other_box) in enumerate(boxes) if box != other_box and index not in (2, 5))
    other.write(other.plan.item(index), black())
    shutil.copy(other.root / "mask" / f"mask_{index:04d}.png", out / "mask")
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert files_of(out) == files_of(whole)


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


DAMAGES = (as_jpeg, as_truncated, as_zeros, as_zeros_behind_the_header, as_wrong_size, as_gray, as_dangling_link)


def test_damaged_pictures_are_drawn_again(whole, out, tmp_path, tiny_arguments):
    for number, damage in enumerate(DAMAGES):
        damage(out / "image" / f"gen_{2 * number:04d}.png")
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert files_of(out) == files_of(whole)


def test_only_verify_finds_a_changed_pixel_stream(whole, out, tmp_path, tiny_arguments):
    """The README makes this promise."""
    image = out / "image" / "gen_0019.png"
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 255
    image.write_bytes(content)
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert image.read_bytes() == content
    run_to_the_end(tmp_path, tiny_arguments, 20, "--verify")
    assert files_of(out) == files_of(whole)


def test_a_damaged_picture_of_the_preview_is_reported_with_the_remedy(whole, out, tmp_path, tiny_arguments):
    image = out / "image" / "gen_0003.png"
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 255
    image.write_bytes(content)
    (out / "soft_label.npy").unlink()
    with pytest.raises(RunError, match=r"gen_0003.png is damaged; the same command with --verify draws it again"):
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


UNUSABLE = {
    "items without end": (change_record(num_aug=float("inf")), "run.json has no "),
    "items are true": (change_record(num_aug=True), "run.json has no "),
    "options are a list": (change_record(options=[1]), "run.json has no "),
    "record is a folder": (record_is_a_folder, "is not from this program"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_refused_before_anything_changes(out, tmp_path, tiny_arguments, case):
    change, message = UNUSABLE[case]
    change(out)
    before = files_of(out)
    with pytest.raises(InputError, match=message):
        run_to_the_end(tmp_path, tiny_arguments, 20)
    assert files_of(out) == before


@pytest.mark.parametrize("name", ["gen_0003.png", "mask_0003.png", "run.json"])
def test_a_full_disk_is_reported_with_the_file_name(tmp_path, tiny_arguments, monkeypatch, name):
    sync = os.fsync

    def fail(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        run_to_the_end(tmp_path, tiny_arguments, 5)
    assert caught.value.filename.endswith(name)
    monkeypatch.undo()
    run_to_the_end(tmp_path, tiny_arguments, 5)


# generation.py


def draw(tmp_path, arguments, num_gen, *more):
    arguments = [*arguments, f"--num_gen={num_gen}", "--output_dir=out", *more]
    with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
        main()


def test_generation_refuses_the_folder_of_a_data_set(out, tmp_path, tiny_arguments):
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
