"""Real processes: two that train as one does, kills, signals, and the README's own commands."""

import json
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time

import numpy as np
import psutil
import pytest
from drawing import CLASS_NAMES, DIGITS, MAX_WAIT, ROOT, as_command_line, command, load_module, wait_until
from finetuning import ROUNDING_UNDER_ADAM, SCRIPT, assert_same_training, difference, finetune, truncate
from sklearn.svm import SVC

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.plan import Item


def start_finetuning(start, *arguments, launcher=(), **environment):
    arguments = command(SCRIPT, *arguments, "--output_dir=out")[1:]
    return start([sys.executable, *launcher, *arguments], **environment)


TWO_PROCESSES = (
    *("-m", "torch.distributed.run", "--nproc_per_node=2"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
)


# with --cpu --num_processes=2, accelerate 1.15 starts one process, without a word
ACCELERATE = (
    *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"),
    *("--main_process_port=0", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
)


def wait_for_state(folder, step, process):
    states = folder / "out"
    wait_until(lambda: any(int(file.stem.rpartition("_")[2]) >= step for file in states.glob("state_*.pt")), process)


@pytest.mark.slow
def test_random_kills_do_not_change_the_result(tmp_path, flags, start):
    flags = [*flags, "--max_train_steps=36", "--checkpointing_steps=1"]
    (tmp_path / "whole").mkdir()
    finetune(tmp_path / "whole", *flags)
    rng = random.Random(0)
    for step in (1, 18):
        process = start_finetuning(start, *flags)
        wait_for_state(tmp_path, step, process)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
    finetune(tmp_path, *flags)
    assert difference(tmp_path / "out", tmp_path / "whole" / "out") < 1e-6


ON_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGTERM")


@pytest.mark.slow
@ON_POSIX
@pytest.mark.parametrize(
    ("launcher", "sent"),
    [((), getattr(signal, "SIGUSR1", signal.SIGINT)), (TWO_PROCESSES, signal.SIGTERM)],
    ids=["one process", "two processes"],
)
def test_nothing_is_lost_on_a_signal(tmp_path, flags, trained, start, launcher, sent):
    """The step is finished and a state written. In a launch, it may arrive in one of the processes alone."""
    flags = [*flags, f"--train_batch_size={2 if launcher else 4}"]
    process = start_finetuning(start, *flags, "--max_train_steps=5000", launcher=launcher)
    wait_for_state(tmp_path, 4, process)
    workers = psutil.Process(process.pid).children() if launcher else [process]
    workers[-1].send_signal(sent)
    _, errors = process.communicate(timeout=MAX_WAIT)
    if not launcher:
        assert process.returncode == 128 + sent, errors
        assert errors.replace("\r", "\n").splitlines()[-1] == "stopped; run the same command again"
        assert "Traceback" not in errors
    states = [int(file.stem.rpartition("_")[2]) for file in (tmp_path / "out").glob("state_*.pt")]
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == max(states)
    steps = max(states) + 1
    process = start_finetuning(start, *flags, f"--max_train_steps={steps}", launcher=launcher)
    _, errors = process.communicate(timeout=MAX_WAIT)
    assert process.returncode == 0 and f"continuing after step {steps - 1}" in errors, errors
    (tmp_path / "whole").mkdir()
    finetune(tmp_path / "whole", *flags, "--train_batch_size=4", f"--max_train_steps={steps}")
    tolerance = 1e-6 if not launcher else 2 * steps * ROUNDING_UNDER_ADAM
    assert difference(tmp_path / "out", tmp_path / "whole" / "out") < tolerance


@pytest.mark.slow
@ON_POSIX
def test_a_signal_ends_the_wait_for_a_process_that_never_comes(tmp_path, flags, start):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start_finetuning(start, *flags, **launch)
    connections = psutil.Process(process.pid).net_connections
    wait_until(lambda: any(connection.laddr.port == port for connection in connections()), process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=MAX_WAIT)
    assert process.returncode == -signal.SIGTERM  # which a shell reports as 143
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_runs_of_the_same_options_write_the_same_bytes(tmp_path, flags, trained, start):
    runs = [start_finetuning(start, *flags) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=MAX_WAIT)
        assert run.returncode == 0, errors
    assert_same_training(tmp_path / "out", trained, previews=False)


@pytest.mark.slow
def test_of_two_runs_with_other_options_exactly_one_is_refused(tmp_path, flags, start):
    runs = [start_finetuning(start, *flags, f"--seed={seed}") for seed in range(2)]
    errors = [run.communicate(timeout=MAX_WAIT)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], errors
    assert "--output_dir: out was made with another seed" in errors[[run.returncode for run in runs].index(2)]
    (tmp_path / "alone").mkdir()
    winner = [run.returncode for run in runs].index(0)
    finetune(tmp_path / "alone", *flags, f"--seed={winner}")
    assert_same_training(tmp_path / "out", tmp_path / "alone" / "out", previews=False)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TWO_PROCESSES, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_train_as_one_does(tmp_path, flags, trained, start, launcher):
    """Each process trains on its own half of the batch."""
    process = start_finetuning(start, *flags, "--train_batch_size=2", launcher=launcher)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "12 steps of 4 pictures (2 in a batch x 1 accumulated x 2 processes)" in errors
    assert difference(tmp_path / "out", trained) < ROUNDING_UNDER_ADAM


@pytest.mark.slow
def test_two_processes_print_one_error(tmp_path, flags, photos, start):
    truncate(shutil.copytree(photos, tmp_path / "birds") / CLASS_NAMES[1] / "0.png")
    process = start_finetuning(start, *flags, "--data_dir=birds", launcher=TWO_PROCESSES)
    _, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if "noisecutmix.finetune: error: " in line]
    assert len(lines) == 1 and "0.png cannot be read" in lines[0], errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mirrored_digits_are_learned(tmp_path):
    """The README's commands, for a shorter time, and a classifier that was trained on other mirrored digits."""
    shorter = {
        "noisecutmix.finetune": ["--max_train_steps=400"],
        "generation.py": ["--num_gen=2"],
        "augmentation.py": ["--num_aug=16"],
        "noisecutmix.compare": ["--epochs=2", "--seeds=1"],
    }
    commands = [shlex.split(line)[2:] for line in readme_commands() if "mirrored" in line]
    options_of_uv = ("-m", "--group", "dev", "--extra", "classify")
    commands = [[word for word in words if word not in options_of_uv] for words in commands]
    scripts = [
        "ckpts/digits/train.py",
        "noisecutmix.finetune",
        "generation.py",
        *["augmentation.py"] * 2,
        "noisecutmix.compare",
    ]
    assert [script for script, *_ in commands] == scripts
    for script, *arguments in commands:
        arguments = [argument.replace("--model=ckpts/", f"--model={ROOT / 'ckpts'}/") for argument in arguments]
        with as_command_line(script, *arguments, *shorter.get(script, []), folder=tmp_path) as main:
            main()
    rows = json.loads((tmp_path / "outputs" / "mirrored_answer" / "results.json").read_text())["rows"]
    assert list(rows) == ["none", "cutmix", "stable_diffusion", "noisecutmix"]
    for row in rows.values():
        assert len(row["top1"]) == 1 and row["real_pictures"] == 200
    assert rows["noisecutmix"]["real_pictures_of_generator"] == 200

    train = load_module(DIGITS / "train.py")
    images, digits, test_images, test_digits = train.load_split()
    unseen = np.setdiff1d(np.arange(len(digits)), train.choose_digits(digits, 20))

    def as_vectors(pictures):
        return train.enlarge(pictures[:, :, ::-1]).reshape(len(pictures), -1) / 255

    classifier = SVC(gamma="scale").fit(as_vectors(images[unseen]), digits[unseen])
    assert classifier.score(as_vectors(test_images), test_digits) > 0.95

    generator = NoiseCutMixGenerator("cpu", str(tmp_path / "outputs" / "mirrored_checkpoint"))
    items = [Item(i, i % 10, (i + 3) % 10, (0, 0, 32, 32), 1.0, 1000 + i, 32) for i in range(60)]
    drawn = np.stack([np.asarray(image.convert("L")) for image in generator.draw(items)]).reshape(60, -1) / 255
    wanted = [train.CLASS_NAMES.index(generator.class_names[item.target]) for item in items]
    accuracy = (classifier.predict(drawn) == wanted).mean()
    assert accuracy >= 0.7  # 0.97 after all of the README's steps


def readme_commands():
    text = (ROOT / "noisecutmix" / "compare" / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^uv run .*$", text[text.index("## On a laptop") :], flags=re.MULTILINE)
