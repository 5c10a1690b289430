"""Both scripts, run as subprocesses, write the documented files."""

import json
import shutil

import numpy as np
import pytest
from conftest import CLASS_NAMES, as_command_line
from PIL import Image

from noisecutmix.errors import InputError


def test_augmentation_of_digits_needs_no_other_flag(run_script, tmp_path):
    done = run_script("augmentation.py", "--data_name=digits", "--num_aug=12", "--output_dir=out", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out is complete: 12 items\n"
    assert "image/s" in done.stderr  # of the progress bar; no warnings are printed
    assert "Warning" not in done.stderr and "[transformers]" not in done.stderr

    out = tmp_path / "out"
    images = sorted(path.name for path in (out / "image").iterdir())
    masks = sorted(path.name for path in (out / "mask").iterdir())
    assert images == [f"gen_{i:04d}.png" for i in range(12)]
    assert masks == [f"mask_{i:04d}.png" for i in range(12)]
    labels = np.load(out / "soft_label.npy")
    assert labels.dtype == np.float32 and labels.shape == (12, 10)
    assert np.allclose(labels.sum(axis=1), 1, atol=1e-6)

    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == [f"image/gen_{i:04d}.png" for i in range(12)]
    for row, line in zip(labels, lines):
        image, mask = Image.open(out / line["file_name"]), Image.open(out / line["mask_file_name"])
        pixels = np.asarray(mask)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert (mask.mode, mask.size) == ("L", (32, 32))
        assert set(np.unique(pixels)) <= {0, 255}
        left, top, right, bottom = line["box"]
        assert (pixels[top:bottom, left:right] == 255).all()
        assert (pixels == 255).mean() == pytest.approx(line["ratio"])
        assert row[line["target_label"]] == pytest.approx(line["ratio"], abs=1e-6)
        assert row[line["aug_label"]] == pytest.approx(1 - line["ratio"], abs=1e-6)
        assert np.asarray(image).std() > 10  # something is drawn

    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["num_aug"] == 12
    assert run["options"]["guidance_scale"] == 7.5 and run["options"]["num_inference_steps"] == 25
    assert {"torch", "diffusers", "noisecutmix"} <= run["versions"].keys()
    assert Image.open(out / "preview.png").size[0] > 512


def test_a_single_class_differs_in_mask_label_and_picture_alone(tmp_path, tiny_arguments, whole):
    arguments = [*tiny_arguments, "--num_aug=20", "--output_dir=out"]
    with as_command_line("augmentation.py", *arguments, "--single_class", folder=tmp_path) as main:
        main()
    out = tmp_path / "out"
    single, mixed = (
        [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()] for folder in (out, whole)
    )
    assert [line | {"box": [0, 0, 16, 16], "ratio": 1.0} for line in mixed] == single
    labels = np.load(out / "soft_label.npy")
    assert labels.tolist() == np.eye(3)[[line["target_label"] for line in single]].tolist()
    assert all(Image.open(mask).getextrema() == (255, 255) for mask in (out / "mask").iterdir())
    with (
        as_command_line("augmentation.py", *arguments, folder=tmp_path) as main,
        pytest.raises(InputError, match=r"another single_class \(True there, None now\)"),
    ):
        main()


def test_generation_draws_a_single_class(tmp_path, tiny_arguments):
    for name, *more in (("mixed",), ("single", "--single_class")):
        arguments = [*tiny_arguments, "--num_gen=4", f"--output_dir={name}", *more]
        with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
            main()
    pictures = [(tmp_path / name / "gen_0000.png").read_bytes() for name in ("mixed", "single")]
    assert pictures[0] != pictures[1]


def test_generation_draws_the_requested_pair(run_script, tmp_path, tiny_arguments):
    arguments = [*tiny_arguments, "--num_gen=3", "--target_class=Blue Jay", "--aug_class=0", "--output_dir=out"]
    done = run_script("generation.py", *arguments)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["gen_0000.png", "gen_0001.png", "gen_0002.png", "preview.png"]
    assert Image.open(tmp_path / "out" / "gen_0000.png").size == (16, 16)
    first = [(tmp_path / "out" / name).read_bytes() for name in names]

    with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
        main()
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == first  # the same on every run
    with as_command_line("generation.py", *arguments, "--seed=1", folder=tmp_path) as main:
        main()
    assert (tmp_path / "out" / "gen_0000.png").read_bytes() != first[0]


def test_a_class_that_the_checkpoint_lacks_is_named(tmp_path, tiny_arguments):
    path = tmp_path / "more.json"
    path.write_text(json.dumps({"classes": [*CLASS_NAMES, "dodo"], "meta_class": "bird"}))
    arguments = [*tiny_arguments, f"--data_name={path}", "--output_dir=out"]
    with (
        as_command_line("augmentation.py", *arguments, folder=tmp_path) as main,
        pytest.raises(InputError, match="--ckpt_path: the checkpoint has no token for 'dodo'"),
    ):
        main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_pictures_are_the_same(tmp_path, tiny_arguments, capsys):
    for name, *more in (("plain",), ("compiled", "--compile")):
        arguments = [*tiny_arguments, "--num_gen=5", "--batch_size=4", f"--output_dir={name}", *more]
        with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
            main()
    assert "compiled in" in capsys.readouterr().err
    for i in range(5):
        plain, compiled = (
            np.asarray(Image.open(tmp_path / name / f"gen_{i:04d}.png")).astype(int) for name in ("plain", "compiled")
        )
        assert np.abs(plain - compiled).max() <= 1  # float32 rounding, then rounding to grey levels


@pytest.mark.slow
def test_compiling_without_a_compiler_says_what_to_install(run_script, tmp_path, tiny_arguments):
    environment = {"CXX": str(tmp_path / "nowhere"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_script("generation.py", *tiny_arguments, "--compile", "--output_dir=out", environment=environment)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "generation.py: error: --compile: PyTorch finds no C++ compiler; install g++ (on Windows the Visual Studio "
        "Build Tools); try without it"
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
