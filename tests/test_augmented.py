"""The loader: rows by index, soft labels throughout, and draws that the seed decides."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import as_command_line
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from noisecutmix import AugmentedDataset, MixedDataset
from noisecutmix.errors import InputError


def to_tensor(picture):
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255


class Constant(Dataset):
    """Pictures of one level, labels 0, 1, 2, 0, …, in a class that spawned workers can import."""

    def __init__(self, level, size, soft=False):
        self.level, self.size, self.soft = level, size, soft

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        label = torch.tensor([0.25, 0.75, 0.0]) if self.soft else index % 3
        return torch.full((3, 16, 16), self.level), label


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_arguments):
    root = tmp_path_factory.mktemp("augmented")
    with as_command_line("augmentation.py", *tiny_arguments, "--num_aug=12", "--output_dir=out", folder=root) as main:
        main()
    return root / "out"


def test_items_are_the_folders_rows(folder):
    augmented = AugmentedDataset(folder)
    labels = np.load(folder / "soft_label.npy")
    assert len(augmented) == 12 and augmented.num_classes == 3
    for index in (0, 7, 11):
        image, label = augmented[index]
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(folder / "image" / f"gen_{index:04d}.png")))
        assert label.dtype == torch.float32 and np.array_equal(label.numpy(), labels[index])
    assert AugmentedDataset(folder, to_tensor)[0][0].shape == (3, 16, 16)


def test_labels_stay_on_disk_and_pickles_stay_small(folder):
    augmented = AugmentedDataset(folder)
    assert isinstance(augmented.soft_labels, np.memmap)
    augmented.soft_labels[0]
    again = pickle.loads(pickle.dumps(augmented))
    assert again._soft_labels is None
    assert torch.equal(again[3][1], augmented[3][1])


def test_an_unfinished_folder_tells_how_far_it_is(folder, tmp_path, tiny_arguments):
    root = shutil.copytree(folder, tmp_path / "out")
    (root / "soft_label.npy").unlink()
    (root / "image" / "gen_0004.png").unlink()
    with pytest.raises(InputError, match=r"11 of 12 items are done; go on with: python augmentation.py .*--num_aug=12"):
        AugmentedDataset(root)


def test_a_folder_that_does_not_agree_is_refused(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "out")
    (root / "image" / "gen_0004.png").unlink()
    with pytest.raises(InputError, match=r"image/gen_0004.png is missing"):
        AugmentedDataset(root)
    np.save(root / "soft_label.npy", np.zeros((3, 3), np.float32))
    with pytest.raises(InputError, match="3 rows"):
        AugmentedDataset(root)
    for damaged in (b"", b"\x93NUMPY\x01\x00\x06\x00{'a':("):
        (root / "soft_label.npy").write_bytes(damaged)
        with pytest.raises(InputError, match=r"soft_label.npy is damaged; mend with: python augmentation.py"):
            AugmentedDataset(root)
    np.save(root / "soft_label.npy", np.zeros((12, 3), np.float32))
    (root / "metadata.jsonl").write_text('{"file_na')
    with pytest.raises(InputError, match=r"metadata.jsonl is damaged; mend with: python augmentation.py"):
        AugmentedDataset(root)
    with pytest.raises(InputError, match=r"no data set of ours"):
        AugmentedDataset(tmp_path / "nowhere")


def test_the_probability_is_kept_and_labels_have_one_shape():
    mixed = MixedDataset(Constant(0.0, 2000), Constant(1.0, 50, soft=True), 0.3, 3)
    images, labels = zip(*(mixed[i] for i in range(2000)))
    share = np.mean([image.mean().item() for image in images])
    assert share == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 2000))  # four standard deviations
    assert {tuple(label.shape) for label in labels} == {(3,)}
    assert all(label.sum() == 1 and label.dtype == torch.float32 for label in labels)
    loss = torch.nn.functional.cross_entropy(torch.zeros(2000, 3), torch.stack(labels))
    assert loss.item() == pytest.approx(np.log(3), rel=1e-5)


@pytest.mark.parametrize(("probability", "level"), [(0.0, 0.0), (1.0, 1.0)])
def test_never_and_always(probability, level):
    mixed = MixedDataset(Constant(0.0, 20), Constant(1.0, 5, soft=True), probability, 3)
    assert all(mixed[i][0].mean() == level for i in range(20))


def epochs(seed, workers, count=2):
    """What each epoch drew, in index order."""
    mixed = MixedDataset(Constant(0.0, 64), Constant(1.0, 8, soft=True), 0.5, 3, seed)
    loader = DataLoader(mixed, batch_size=8, num_workers=workers)
    return [torch.cat([images.mean(dim=(1, 2, 3)) for images, _ in loader]) for _ in range(count)]


def test_epochs_differ_and_the_seed_decides():
    first, second = epochs(seed=0, workers=0)
    assert not torch.equal(first, second)
    assert torch.equal(torch.stack(epochs(seed=0, workers=0)), torch.stack([first, second]))
    assert not torch.equal(epochs(seed=1, workers=0)[0], first)


def test_workers_change_nothing():
    assert torch.equal(torch.stack(epochs(seed=0, workers=2)), torch.stack(epochs(seed=0, workers=0)))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_two_workers_train_an_epoch(folder, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    mixed = MixedDataset(Constant(0.5, 24), AugmentedDataset(folder, to_tensor), 0.5, 3)
    loader = DataLoader(mixed, batch_size=8, shuffle=True, num_workers=2, multiprocessing_context=method)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[1].weight.detach().clone()
    for images, soft_labels in loader:
        assert soft_labels.shape == (8, 3)
        loss = torch.nn.functional.cross_entropy(model(images), soft_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(model[1].weight, before)


def test_another_number_of_classes_is_named(folder):
    with pytest.raises(ValueError, match="`num_classes` is 4"):
        MixedDataset(Constant(0.0, 4), AugmentedDataset(folder), 0.5, 4)


def test_wrong_labels_and_probabilities_are_named():
    with pytest.raises(ValueError, match="probability"):
        MixedDataset(Constant(0.0, 3), Constant(1.0, 3), 1.5, 3)
    with pytest.raises(ValueError, match="empty"):
        MixedDataset(Constant(0.0, 3), [], 0.5, 3)
    with pytest.raises(ValueError, match="class below 2"):
        MixedDataset(Constant(0.0, 3), Constant(1.0, 3), 0.0, 2)[2]
    with pytest.raises(IndexError):
        MixedDataset(Constant(0.0, 3), Constant(1.0, 3), 0.0, 3)[3]
