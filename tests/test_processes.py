"""Any number of processes fill one folder, however they were started, and whichever of them die on the way.

Most tests use a generator that needs no model (simulated.py), and otherwise run augmentation.py as it is.
"""

import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time

import psutil
import pytest
from drawing import MAX_WAIT, ROOT, command, files_of, load_module, run_to_the_end, wait_for_images
from hypothesis import given
from hypothesis import strategies as st

from noisecutmix import files, launch
from noisecutmix.errors import InputError, RunError
from noisecutmix.folder import OutputFolder
from noisecutmix.plan import Plan

VARIABLES = (*launch.RANK, *launch.COUNT, *launch.LOCAL_RANK, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
DIGITS = ["--data_name=digits", "--device=cpu"]
order_blocks = load_module(ROOT / "augmentation.py").order_blocks


@pytest.fixture
def draw(start):
    """Start a process that draws the digits' data set into out, with the simulated generator."""

    def start_one(num_aug, *more, seconds=0.0, **environment):
        flags = [*DIGITS, "--output_dir=out", f"--num_aug={num_aug}", *more]
        return start(command("tests/simulated.py", *flags), SECONDS_PER_BLOCK=str(seconds), **environment)

    return start_one


@pytest.fixture(scope="session")
def expected(tmp_path_factory):
    """Return the files of a data set that a single process drew."""

    @functools.cache
    def draw_alone(num_aug, *more):
        folder = tmp_path_factory.mktemp("alone")
        run_to_the_end(folder, DIGITS, num_aug, *more)
        return files_of(folder / "out")

    return draw_alone


def end(process, status=0):
    """Return the standard error of a process that has to end with this exit status."""
    _, errors = process.communicate(timeout=MAX_WAIT)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    return errors


def count_blocks(errors):
    return int(re.search(r"drew (\d+) blocks", errors)[1])


@pytest.mark.slow
def test_one_of_three_is_frozen_and_one_is_killed(draw, expected, tmp_path):
    """The third ends alone; the first, woken up, ends well and changes nothing."""
    wanted = expected(800)
    three = [draw(800, seconds=0.1, RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    wait_for_images(tmp_path / "out", 60, three[2])
    psutil.Process(three[0].pid).suspend()
    three[1].kill()
    end(three[2])
    assert files_of(tmp_path / "out") == wanted
    psutil.Process(three[0].pid).resume()
    end(three[0])
    assert files_of(tmp_path / "out") == wanted


def test_two_without_any_variable_share_the_work(draw, expected, tmp_path):
    wanted = expected(480)
    two = [draw(480, seconds=0.05) for _ in range(2)]
    drawn = [count_blocks(end(process)) for process in two]
    assert files_of(tmp_path / "out") == wanted
    assert sum(drawn) <= 60 + 4 and min(drawn) >= 15, drawn


@pytest.mark.slow
def test_one_joins_in_the_middle(draw, expected, tmp_path):
    wanted = expected(480)
    first = draw(480, seconds=0.1)
    wait_for_images(tmp_path / "out", 80, first)
    second = draw(480, seconds=0.1)
    drawn = [count_blocks(end(process)) for process in (first, second)]
    assert files_of(tmp_path / "out") == wanted
    assert sum(drawn) <= 60 + 4 and drawn[1] >= 5, drawn


def test_each_rank_begins_at_its_share_of_what_is_missing(draw, tmp_path):
    end(draw(160))
    process = draw(480, seconds=0.2, RANK="1", WORLD_SIZE="2")
    wait_for_images(tmp_path / "out", 161, process)
    process.kill()
    process.communicate()
    drawn = sorted(int(file.stem.removeprefix("gen_")) for file in (tmp_path / "out" / "image").glob("gen_*.png"))[160:]
    assert 320 <= drawn[0] < 328  # threads write a block's files in any order


SLURM = {
    "srun": [{"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2"} for rank in range(2)],
    "job array": [
        {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "2"}
        for task in (5, 6)
    ],
    "mpirun": [{"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"} for rank in range(2)],
    "torchrun in a job array": [
        {"RANK": "0", "WORLD_SIZE": "1", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        for task in range(2)
    ],
}


@pytest.mark.parametrize("way", SLURM)
def test_each_process_of_a_scheduler_begins_at_its_own_share(monkeypatch, way):
    seen = []
    for environment in SLURM[way]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            seen.append(launch.rank_and_count())
    assert seen == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "7", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "0"}, {"RANK": "3"}, {"WORLD_SIZE": "2"},
     {"SLURM_PROCID": "", "SLURM_NTASKS": "-1"}, {"LOCAL_RANK": "5"}, {"SLURM_ARRAY_TASK_ID": "9"}],
)  # fmt: skip
def test_wrong_and_missing_variables_change_only_the_order(expected, tmp_path, monkeypatch, environment):
    wanted = expected(16)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run_to_the_end(tmp_path, DIGITS, 16)
    assert files_of(tmp_path / "out") == wanted


@pytest.mark.slow
def test_of_two_commands_at_the_same_moment_one_is_refused(draw, expected, tmp_path):
    wanted = {alpha: expected(16, f"--alpha={alpha}") for alpha in (1.0, 0.5)}
    for _ in range(10):
        two = {alpha: draw(16, f"--alpha={alpha}") for alpha in wanted}
        errors = {alpha: process.communicate(timeout=MAX_WAIT)[1] for alpha, process in two.items()}
        assert sorted(process.returncode for process in two.values()) == [0, 2], errors
        (winner,) = (alpha for alpha, process in two.items() if process.returncode == 0)
        (loser,) = wanted.keys() - {winner}
        assert f"another alpha ({winner} there, {loser} now)" in errors[loser]
        assert len(errors[loser].strip().splitlines()[-1:]) == 1
        assert files_of(tmp_path / "out") == wanted[winner]
        shutil.rmtree(tmp_path / "out")


def test_a_folder_deleted_and_begun_again_holds_nothing_of_the_earlier_run(draw, expected, tmp_path):
    earlier = draw(4000, seconds=0.05)
    wait_for_images(tmp_path / "out", 24, earlier)
    (tmp_path / "out").rename(tmp_path / "gone")  # a folder that is written into cannot be deleted at once
    end(draw(40, "--alpha=0.5"))
    assert re.search("was deleted or replaced meanwhile|No such file", end(earlier, status=1))
    assert files_of(tmp_path / "out") == expected(40, "--alpha=0.5")


@pytest.mark.slow
def test_fifty_kills_with_damage_in_between_do_not_change_the_result(draw, expected, tmp_path):
    wanted = expected(2000)
    rng = random.Random(0)
    running = [draw(2000, seconds=0.1, RANK=str(rank), WORLD_SIZE="4") for rank in range(4)]
    for _ in range(50):
        time.sleep(rng.uniform(0, 0.3))
        rank = rng.randrange(4)
        running[rank].kill()
        running[rank].communicate()
        pictures = sorted((tmp_path / "out").glob("*/*.png"))
        if pictures:
            damage(rng.choice(pictures), rng)
        running[rank] = draw(2000, seconds=0.1, RANK=str(rank), WORLD_SIZE="4")
    for process in running:
        end(process)
    end(draw(2000))  # finds what was damaged after the last look
    written = {name: content for name, content in files_of(tmp_path / "out").items() if not name.endswith(".tmp")}
    assert written == wanted


def damage(file, rng):
    way = rng.randrange(4)
    if way == 0:
        file.unlink()
    elif way == 1:
        file.write_bytes(file.read_bytes()[: rng.randrange(200)])
    elif way == 2:
        file.write_bytes(bytes(file.stat().st_size))
    else:
        shutil.copy(next(other for other in file.parent.iterdir() if other != file), file)  # another item's picture


@given(
    missing=st.sets(st.integers(0, 99), min_size=1),
    batch_size=st.integers(1, 20),
    place=st.integers(1, 9).flatmap(lambda count: st.tuples(st.integers(0, count - 1), st.just(count))),
    begins_share=st.booleans(),
)
def test_a_process_passes_each_missing_block_once(missing, batch_size, place, begins_share):
    blocks = order_blocks(sorted(missing), batch_size, *place, begins_share)
    assert sorted(itertools.chain.from_iterable(blocks)) == sorted(missing)
    assert len({block[0] // batch_size for block in blocks}) == len(blocks)
    assert all(len({index // batch_size for index in block}) == 1 for block in blocks)


@given(st.sets(st.integers(0, 99), min_size=1))
def test_a_process_without_a_share_begins_where_others_are_probably_not_drawing(missing):
    """In a longest sequence of missing blocks, and not at its first two while it has more."""
    (start,) = order_blocks(sorted(missing), 1, 0, 1, False)[0]
    numbered = enumerate(sorted(missing))
    sequences = [[n for _, n in pairs] for _, pairs in itertools.groupby(numbered, lambda pair: pair[1] - pair[0])]
    (chosen,) = (sequence for sequence in sequences if start in sequence)
    assert len(chosen) == max(map(len, sequences))
    assert chosen.index(start) >= min(2, len(chosen) - 1)


def test_the_shares_of_a_fresh_folder_are_equal_and_cover_it():
    begins = [order_blocks(range(800), 8, rank, 4, True)[0][0] for rank in range(4)]
    assert begins == [0, 200, 400, 600]


def test_one_process_alone_draws_in_the_order_of_the_items():
    assert list(itertools.chain.from_iterable(order_blocks(range(800), 8, 0, 1, True))) == list(range(800))


# Without hard links


@pytest.fixture
def without_hard_links(monkeypatch):
    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


def create_folder(root, alpha=1.0):
    return OutputFolder(root, Plan(0, 3, alpha, 16), 4, ["a", "b", "c"], {"alpha": alpha})


RUN = {"command": ["python", "augmentation.py"]}


def test_a_file_system_without_hard_links(without_hard_links, tmp_path):
    create_folder(tmp_path).begin(RUN)
    before = (tmp_path / "run.json").read_bytes()
    create_folder(tmp_path).begin(RUN)
    with pytest.raises(InputError, match="another alpha"):
        create_folder(tmp_path, alpha=0.5).begin(RUN)
    assert (tmp_path / "run.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_an_empty_record_counts_as_missing(without_hard_links, tmp_path):
    """A process was killed between the creation of the file and its first byte."""
    (tmp_path / "run.json").write_bytes(b"")
    create_folder(tmp_path).check_usable()
    create_folder(tmp_path).begin(RUN)
    assert json.loads((tmp_path / "run.json").read_text())["options"] == {"alpha": 1.0}


def test_a_file_is_created_once(tmp_path):
    assert files.create_file(tmp_path / "once", b"first")
    assert not files.create_file(tmp_path / "once", b"second")
    assert (tmp_path / "once").read_bytes() == b"first"


def test_a_record_that_changes_stops_the_run(tmp_path):
    folder = create_folder(tmp_path)
    folder.begin(RUN)
    content = (tmp_path / "run.json").read_bytes()
    (tmp_path / "run.json").write_bytes(content)  # a file system that gives it another inode or time
    folder._check_still_ours()
    (tmp_path / "run.json").write_bytes(content + b" ")
    with pytest.raises(RunError, match="was deleted or replaced"):
        folder.finish()


# The real generator


@pytest.mark.slow
def test_two_processes_of_accelerate_draw_what_one_draws(drawn, start, tmp_path, tiny_arguments):
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--multi_gpu", "--main_process_port=0",
    ]  # fmt: skip
    flags = [*tiny_arguments, "--num_aug=20", "--output_dir=out"]
    process = start(
        [*launcher, str(ROOT / "augmentation.py"), *flags], HF_HOME=str(tmp_path / "no_configuration_of_the_user")
    )
    output, errors = process.communicate(timeout=MAX_WAIT)
    assert process.returncode == 0, errors
    assert output.count("out is complete: 20 items") == 1  # only the first process prints
    assert files_of(tmp_path / "out") == files_of(drawn)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_signals_end_five_processes_and_the_sixth_completes_the_data_set(draw, expected, tmp_path):
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")]
    *stopped, last = [draw(600, seconds=0.3) for _ in range(6)]
    for process in stopped:
        process.stderr.readline()  # printed once signals are caught
    wait_for_images(tmp_path / "out", 50, last)
    for process, number in zip(stopped, numbers):
        process.send_signal(number)
    for process, number in zip(stopped, numbers):
        assert "stopped; run the same command again" in end(process, 128 + number)
    last.kill()  # alone it would take long
    last.communicate()
    run_to_the_end(tmp_path, DIGITS, 600)
    assert files_of(tmp_path / "out") == expected(600)


def test_generation_draws_once_in_a_launch(run_script, tmp_path, tiny_arguments):
    other = {"RANK": "1", "WORLD_SIZE": "2"}
    done = run_script("generation.py", *tiny_arguments, "--output_dir=out", environment=other)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "out").exists()
