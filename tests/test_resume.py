"""After an interruption or damage, or to extend it, the same command completes the same data set."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
import zlib

import numpy as np
import pytest
import torch
from drawing import MAX_WAIT, ROOT, command, files_of, offline_environment, run_to_the_end, wait_for_images
from PIL import Image

from noisecutmix.errors import InputError, RunError
from noisecutmix.pipeline import NoiseCutMixPipeline

LABELS_AND_MASKS = re.compile(r"mask/.*|metadata\.jsonl|soft_label\.npy")


def compare(folder, expected):
    """Require the same bytes, but allow one grey level in pictures: the rounding depends on the batch."""
    actual_files, expected_files = files_of(folder), files_of(expected)
    assert actual_files.keys() == expected_files.keys()
    for name, content in expected_files.items():
        if LABELS_AND_MASKS.fullmatch(name):
            assert actual_files[name] == content, name
        elif name.startswith("image/"):
            actual, wanted = (np.asarray(Image.open(root / name)).astype(int) for root in (folder, expected))
            assert np.abs(actual - wanted).max() <= 1, name


def test_damage_is_repaired_and_nothing_else_is_changed(whole, out, tmp_path, tiny_arguments):
    damaged = out / "image" / "gen_0003.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (out / "image" / "gen_0005.png").unlink()
    Image.new("RGB", (8, 8)).save(out / "image" / "gen_0006.png")
    (out / "mask" / "mask_0009.png").unlink()
    (out / "mask" / "mask_0010.png").write_bytes(b"")
    (out / "image" / "gen_0007.png").write_bytes(png_with_sound_checksums_that_does_not_decode())
    temporary = out / "image" / f".gen_0004.png.{uuid.uuid4().hex}.tmp"  # of a process that was killed
    temporary.write_bytes(b"half")
    mended = (3, 5, 6, 7, 9, 10)  # an item without its mask is drawn again, too
    before = {path: path.stat().st_mtime_ns for folder in ("image", "mask") for path in (out / folder).iterdir()}

    run_to_the_end(tmp_path, tiny_arguments, 20, "--verify")
    assert files_of(out) == files_of(whole)
    written = {
        path.relative_to(out).as_posix()
        for folder in ("image", "mask")
        for path in (out / folder).iterdir()
        if before.get(path) != path.stat().st_mtime_ns
    }
    assert written == {f"{name}_{index:04d}.png" for name in ("image/gen", "mask/mask") for index in mended}


def png_with_sound_checksums_that_does_not_decode():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)  # 16x16 pixels, RGB of 8 bits
    pixels = zlib.compress(bytes(10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def damage_metadata(out):
    metadata = out / "metadata.jsonl"
    metadata.write_bytes(metadata.read_bytes()[:500])


def damage_labels(out):
    labels = np.load(out / "soft_label.npy")
    np.save(out / "soft_label.npy", labels[:, ::-1])


def empty_labels(out):
    (out / "soft_label.npy").write_bytes(b"")


def damage_header_of_labels(out):
    labels = out / "soft_label.npy"
    labels.write_bytes(labels.read_bytes().replace(b")", b"(", 1))


def delete_masks(out):
    shutil.rmtree(out / "mask")


def delete_preview(out):
    (out / "preview.png").unlink()


@pytest.mark.parametrize(
    "damage", [damage_metadata, damage_labels, empty_labels, damage_header_of_labels, delete_masks, delete_preview]
)
def test_damage_to_other_files_is_repaired(whole, out, tmp_path, tiny_arguments, damage):
    damage(out)
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert files_of(out) == files_of(whole)


def test_a_complete_folder_is_not_changed(out, tmp_path, tiny_arguments, capsys):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name not in ("run.json", ".lock")}
    run_to_the_end(tmp_path, tiny_arguments, 20)
    assert capsys.readouterr().out == "out is complete: 20 items\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--guidance_scale=3", "guidance_scale"),
        ("--prompt=one {name}", "prompt (a photo of a {name} {meta_class} there, one {name} now)"),
        (["--alpha=2", "--seed=1"], "alpha (1.0 there, 2.0 now), seed (0 there, 1 now)"),
    ],
)
def test_other_options_are_refused(out, tmp_path, tiny_arguments, change, named):
    before = files_of(out)
    with pytest.raises(InputError) as caught:
        run_to_the_end(tmp_path, tiny_arguments, 20, *([change] if isinstance(change, str) else change))
    assert named in str(caught.value)
    assert files_of(out) == before


def test_another_checkpoint_is_refused(out, tmp_path, tiny_arguments, tiny_checkpoint):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = other / "pytorch_lora_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    arguments = [argument for argument in tiny_arguments if not argument.startswith("--ckpt_path")]
    with pytest.raises(InputError, match="another checkpoint"):
        run_to_the_end(tmp_path, arguments, 20, f"--ckpt_path={other}")


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "soft_label.npy", "image/cat.jpg", "image/gen_0000.png", "run.json"]
)
def test_a_foreign_data_set_is_refused(tmp_path, tiny_arguments, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"who": "else"}')
    with pytest.raises(InputError, match=r"is not from this program|has no "):
        run_to_the_end(tmp_path, tiny_arguments, 20)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [foreign]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_ctrl_c_leaves_finished_items(start, tmp_path, tiny_arguments):
    arguments = [*tiny_arguments, "--num_aug=400", "--output_dir=out"]
    process = start(command("tests/simulated.py", *arguments), SECONDS_PER_BLOCK="0.1")
    wait_for_images(tmp_path / "out", 8, process)
    for _ in range(10):  # launchers send a signal twice, at once
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    _, errors = process.communicate(timeout=MAX_WAIT)
    assert process.returncode == 130, errors
    assert errors.replace("\r", "\n").splitlines()[-1] == "stopped; run the same command again"
    assert errors.count("stopped; run") == 1 and "Traceback" not in errors and "Exception ignored" not in errors
    for path in (tmp_path / "out" / "image").iterdir():
        Image.open(path).load()
        assert (tmp_path / "out" / "mask" / path.name.replace("gen", "mask")).is_file()
    assert not (tmp_path / "out" / "soft_label.npy").exists()


FULL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_full_disk(whole, tmp_path, tiny_arguments):
    """No file can be larger than run.json, so masks can be written and pictures of 64x64 cannot."""
    limit = (whole / "run.json").stat().st_size + 200
    arguments = [*tiny_arguments, "--resolution=64", "--num_aug=4", "--output_dir=out"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), str(ROOT / "tests" / "simulated.py"), *arguments],
        cwd=tmp_path,
        env=offline_environment(PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=MAX_WAIT,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.replace("\r", "\n").splitlines()[-1]
    assert "File too large" in last and last.endswith("; run the same command again")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out" / "image").iterdir())
    run_to_the_end(tmp_path, tiny_arguments, 4, "--resolution=64")


@pytest.mark.skipif(os.name == "nt", reason="Windows renames no folder in use")
def test_a_file_system_that_disappears(start, tmp_path, tiny_arguments):
    arguments = [*tiny_arguments, "--num_aug=40", "--output_dir=out"]
    process = start(command("tests/simulated.py", *arguments), SECONDS_PER_BLOCK="0.5")
    wait_for_images(tmp_path / "out", 8, process)
    (tmp_path / "out").rename(tmp_path / "away")
    output, errors = process.communicate(timeout=MAX_WAIT)
    assert process.returncode == 1, errors
    assert re.search(r"error: out/.*(was deleted or replaced|No such file).*run the same command again", errors.strip())
    assert "Traceback" not in errors and output == ""

    (tmp_path / "away").rename(tmp_path / "out")
    run_to_the_end(tmp_path, tiny_arguments, 40)
    assert len(list((tmp_path / "out" / "image").iterdir())) == 40


def test_out_of_memory_halves_the_batch(drawn, tmp_path, tiny_arguments, monkeypatch, capsys):
    """A pipeline that runs out of memory above batch size 2 still completes the correct data set."""
    call = NoiseCutMixPipeline.__call__

    def short_of_memory(self, *arguments, **named):
        if len(named["mask"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(self, *arguments, **named)

    monkeypatch.setattr(NoiseCutMixPipeline, "__call__", short_of_memory)
    run_to_the_end(tmp_path, tiny_arguments, 20, script="augmentation.py")
    errors = capsys.readouterr().err
    assert "out of memory at batch size 8, continuing with 4" in errors
    assert "out of memory at batch size 4, continuing with 2" in errors
    assert errors.count("out of memory") == 2
    compare(tmp_path / "out", drawn)


def test_a_picture_that_is_not_finite_is_named_and_not_written(tmp_path, tiny_arguments, monkeypatch):
    decode = NoiseCutMixPipeline._decode

    def overflow(self, latents):
        latents[1] = torch.inf
        return decode(self, latents)

    monkeypatch.setattr(NoiseCutMixPipeline, "_decode", overflow)
    with pytest.raises(RunError, match=r"a picture is not finite.*dtype=bfloat16"):
        run_to_the_end(tmp_path, tiny_arguments, 3, script="augmentation.py")
    assert not list((tmp_path / "out" / "image").iterdir())


NUM_ITEMS = 200_000
MANY_ITEMS = """
import re, sys, time
from pathlib import Path
import numpy
from PIL import Image
from noisecutmix.plan import Plan
from noisecutmix.folder import OutputFolder

def peak():  # of this process only; getrusage includes the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

before = peak()
folder = OutputFolder(Path(sys.argv[1]), Plan(0, 10, 1.0, 8), int(sys.argv[2]), [str(i) for i in range(10)], {})
folder.begin({"command": ["python"]})
for item in folder.plan.items(16):  # those of the preview
    folder.write(item, Image.new("RGB", (8, 8)))
start = time.perf_counter()
folder.finish()
print(time.perf_counter() - start, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_many_items_cost_little_memory(tmp_path):
    words = [sys.executable, "-c", MANY_ITEMS, str(tmp_path), str(NUM_ITEMS)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, mebibytes = map(float, done.stdout.split())
    print(f"{NUM_ITEMS} items: {seconds:.0f} s, {mebibytes:.0f} MiB")
    labels = np.load(tmp_path / "soft_label.npy", mmap_mode="r")
    assert labels.shape == (NUM_ITEMS, 10)
    assert mebibytes < 40 + labels.nbytes / 2**20
    assert json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[-1])["file_name"] == "image/gen_199999.png"
