"""The scripts for training, accuracy and benchmark run; the overview picture equals the output of its script."""

import json
import subprocess
import sys

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from drawing import ROOT, as_command_line, load_module, offline_environment
from PIL import Image

pytestmark = pytest.mark.slow


def run(script, *arguments, folder):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=folder,
        env=offline_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_overview_equals_the_output_of_its_script(tmp_path):
    with as_command_line("img/make_overview.py", "--output=overview.png", folder=tmp_path) as main:
        main()
    drawn, committed = (
        np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "overview.png", ROOT / "img" / "overview.png")
    )
    # the bytes are the same on one machine; another processor or version may round grey levels differently
    assert np.abs(drawn - committed).mean() < 0.01


def test_training_writes_a_checkpoint_that_draws(tmp_path):
    from noisecutmix import NoiseCutMixGenerator

    with as_command_line(
        "ckpts/digits/train.py", "--output_dir=demo", "--steps=4", "--digits_a_class=3", folder=tmp_path
    ) as main:
        main()
    generator = NoiseCutMixGenerator(
        device="cpu",
        data_name="digits",
        model=str(tmp_path / "demo" / "base"),
        ckpt_path=tmp_path / "demo" / "shot-1-lora-rank10",
        num_inference_steps=1,
    )
    assert generator([0])[0][0].size == (32, 32)
    train = load_module(ROOT / "ckpts" / "digits" / "train.py")
    train_images, _, test_images, _ = train.load_split()
    assert len(train_images) + len(test_images) == 1797
    assert not {image.tobytes() for image in test_images} & {image.tobytes() for image in train_images}


def test_accuracy_prints_every_row(tmp_path, monkeypatch, capsys):
    accuracy, scripts = load_module(ROOT / "tests" / "measure" / "accuracy.py"), []

    def run_here(script, *arguments, **_):
        """Run a script in this process, since each start of another one takes ten seconds."""
        scripts.append(script)
        with as_command_line(script, *arguments, folder=tmp_path) as main:
            main()
        AcceleratorState._reset_state(reset_partial_state=True)

    flags = ["--parts", "half_1", "--seeds=1", "--classifier_steps=1", "--num_aug=8", "--generator_steps=4"]
    monkeypatch.setattr(accuracy, "run_script", run_here)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", f"--work_dir={tmp_path / 'work'}", *flags])
    accuracy.main()
    output, done = capsys.readouterr().out, len(scripts)
    report = output[output.index("| none | cutmix | stable_diffusion | noisecutmix | cutmix+noisecutmix |") :]
    accuracy.main()
    assert capsys.readouterr().out.endswith(report) and len(scripts) == done  # nothing is drawn or trained again
    columns = json.loads((tmp_path / "work" / "accuracy.json").read_text())["accuracy"]
    counts = {column: {len(row["top1"]) for row in rows.values()} for column, rows in columns.items()}
    assert counts == {f"{count} a class, zero to four": {1} for count in (10, 20)}
    assert (tmp_path / "work" / "label_fit.png").is_file()


def test_benchmark_prints_its_table(tmp_path):
    output = run(
        "tests/measure/benchmark.py", "--arch=tiny", "--device=cpu", "--steps=2", "--num_images=8", "--repeats=1",
        "--json=out.json",
        folder=tmp_path,
    )  # fmt: skip
    assert "plain" in output
    assert json.loads((tmp_path / "out.json").read_text())


def test_the_trainer_and_the_plain_loop_have_the_same_losses(tmp_path):
    run(
        "tests/measure/benchmark.py", "--finetune", "--arch=tiny", "--device=cpu", "--steps=4", "--batch_size=4",
        "--repeats=1", "--json=out.json",
        folder=tmp_path,
    )  # fmt: skip
    results = json.loads((tmp_path / "out.json").read_text())
    plain, ours = (results[way]["losses"] for way in ("plain", "ours"))
    assert len(set(plain)) > 1
    # attention is computed in another order of operations, so to float32's rounding
    np.testing.assert_allclose(ours, plain, rtol=1e-4)
