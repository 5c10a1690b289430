"""On a file system without flock, such as some Lustre and FUSE mounts, runs work and exclude each other."""

import errno

import pytest
from conftest import as_command_line
from filelock import FileLock

from noisecutmix.errors import InputError

fcntl = pytest.importorskip("fcntl", reason="Windows locks in another way")


@pytest.fixture(autouse=True)
def without_flock(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_data_set_is_written_by_one_run_at_a_time(tmp_path, tiny_arguments):
    arguments = [*tiny_arguments, "--num_aug=2", "--output_dir=out"]
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock", timeout=0),
        as_command_line("augmentation.py", *arguments, folder=tmp_path) as main,
        pytest.raises(InputError, match="another run is writing into out"),
    ):
        main()
    with as_command_line("augmentation.py", *arguments, folder=tmp_path) as main:
        main()
    assert (tmp_path / "out" / "soft_label.npy").is_file()
