"""The torch data sets: items by index, soft labels only, and random draws that depend on the seed alone."""

import contextlib
import copy
import json
import os
import pickle
import re
import shlex
import shutil
import tempfile
import time
import tracemalloc

import numpy as np
import pytest
import torch
from drawing import CLASS_NAMES, DIGITS, ROOT, as_command_line, load_module
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, DistributedSampler, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from noisecutmix import AugmentedDataset, MixedDataset
from noisecutmix.errors import InputError
from noisecutmix.folder import OutputFolder
from noisecutmix.plan import Plan, seed_sequence


def to_tensor(picture):
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255


class Constant(Dataset):
    """Pictures of one grey level with labels 0, 1, 2, 0, …; a class that spawned workers can import."""

    class_names = ("a", "b", "c")

    def __init__(self, level, size, soft=False):
        self.level, self.size, self.soft = level, size, soft

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        label = torch.tensor([0.25, 0.75, 0.0]) if self.soft else index % 3
        return torch.full((3, 16, 16), self.level), label


def numbers(first, size):
    """Numbers as pictures, all of class 0; a class of torch, so that spawned workers import no tests."""
    data_set = TensorDataset(torch.arange(first, first + size), torch.zeros(size, dtype=torch.int64))
    data_set.class_names = ["only"]
    return data_set


start_methods = pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])


def skip_without(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_arguments):
    root = tmp_path_factory.mktemp("augmented")
    with as_command_line("augmentation.py", *tiny_arguments, "--num_aug=12", "--output_dir=out", folder=root) as main:
        main()
    return root / "out"


def test_items_are_the_rows_of_the_folder(folder):
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
    assert "_labels" not in vars(again)
    assert torch.equal(again[3][1], augmented[3][1])


def test_file_names_are_a_sequence(folder):
    names = AugmentedDataset(folder).file_names
    assert (
        len(names) == 12 and names[-1] == "image/gen_0011.png" and names[2:4] == [f"image/gen_000{i}.png" for i in "23"]
    )


def test_an_index_is_one_whole_number(folder):
    augmented = AugmentedDataset(folder)
    assert torch.equal(augmented[-1][1], augmented[np.int64(11)][1])
    assert len(list(augmented)) == 12
    mixed = MixedDataset(numbers(0, 4), augmented, 0.0, CLASS_NAMES)
    for data_set in (augmented, mixed):
        for wrong in (slice(0, 2), 1.0, [0, 1], "0"):
            with pytest.raises(TypeError):
                data_set[wrong]
        with pytest.raises(IndexError):
            data_set[-13]


def test_an_unfinished_folder_is_refused_with_its_progress(folder, tmp_path, tiny_arguments):
    root = shutil.copytree(folder, tmp_path / "out")
    (root / "soft_label.npy").unlink()
    (root / "image" / "gen_0004.png").unlink()
    with pytest.raises(
        InputError,
        match=r"11 of 12 items are done; continue with: cd \S+(;| &&) python \S+augmentation.py .*--num_aug=12",
    ):
        AugmentedDataset(root)


def test_an_inconsistent_folder_is_refused(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "out")
    (root / "image" / "gen_0004.png").unlink()
    with pytest.raises(InputError, match=r"image/gen_0004.png is missing"):
        AugmentedDataset(root)
    for damaged in (b"", b"\x93NUMPY\x01\x00\x06\x00{'a':("):
        (root / "soft_label.npy").write_bytes(damaged)
        with pytest.raises(InputError, match=r"soft_label.npy is damaged; repair with: cd \S+(;| &&) python \S+aug"):
            AugmentedDataset(root)
    with pytest.raises(InputError, match=r"is not a data set of augmentation.py"):
        AugmentedDataset(tmp_path / "nowhere")


def test_the_suggested_command_repairs_a_copy(tiny_arguments, folder, tmp_path):
    """The run.json of a copy holds the command of the original, which names the original folder."""
    root = shutil.copytree(folder, tmp_path / "a copy")
    (root / "image" / "gen_0004.png").unlink()
    untouched = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(InputError) as refusal:
        AugmentedDataset(root)
    _, directory, words = re.split(r"cd |(?<=\S)(?:;| &&) ", str(refusal.value).partition("repair with: ")[2])
    (directory,), words = shlex.split(directory), shlex.split(words)
    assert words[:2] == ["python", str(ROOT / "augmentation.py")] and words.count(f"--output_dir={root}") == 1
    with as_command_line(*words[1:], folder=directory) as main:
        main()
    assert len(AugmentedDataset(root)) == 12
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == untouched


@pytest.mark.parametrize(
    "content",
    [
        '{"num_aug": Infinity, "options": {}, "command": ["python"]}',
        '{"num_aug": true, "options": {}, "command": ["python"]}',
        '{"options": {}, "command": ["python"]}',
        "[]",
        "null",
        "{",
        "\x00" * 100,
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_an_edited_run_json_is_refused_in_one_line(folder, tmp_path, content):
    root = shutil.copytree(folder, tmp_path / "out")
    (root / "run.json").write_text(content)
    for complete in (True, False):
        with pytest.raises(InputError, match=r"^[^\n]*run.json (has no|is not valid JSON)"):
            AugmentedDataset(root)
        if complete:
            (root / "soft_label.npy").unlink()


@contextlib.contextmanager
def without_root_rights():
    """Run as another user, because root may read every file."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("name", ["run.json", "soft_label.npy", "image"])
def test_a_file_without_read_permission_is_named(folder, name):
    with tempfile.TemporaryDirectory() as others_may_enter:  # pytest's folders are private
        os.chmod(others_may_enter, 0o755)
        root = shutil.copytree(folder, f"{others_may_enter}/out")
        os.chmod(f"{root}/{name}", 0)
        with without_root_rights(), pytest.raises(InputError, match=rf"{name} cannot be read: Permission denied"):
            AugmentedDataset(root)
        os.chmod(f"{root}/{name}", 0o755)


def test_labels_of_another_type_are_refused(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "out")
    labels = np.load(root / "soft_label.npy")
    for wrong in (labels.astype(np.float64), labels[:0], labels[0]):
        np.save(root / "soft_label.npy", wrong)
        with pytest.raises(InputError, match=r"soft_label.npy is damaged; repair with"):
            AugmentedDataset(root)


NAMES_200 = [f"class {label}" for label in range(200)]


def simulate(root, count):
    """Write a folder of empty pictures."""
    digits = len(str(count - 1))
    (root / "image").mkdir(parents=True)
    (root / "run.json").write_text(
        json.dumps({"num_aug": count, "options": {"class_names": NAMES_200}, "command": ["python"]})
    )
    np.lib.format.open_memmap(root / "soft_label.npy", "w+", np.float32, (count, 200))
    with open(root / "metadata.jsonl", "w") as metadata:
        for index in range(count):
            name = f"image/gen_{index:0{digits}d}.png"
            metadata.write(json.dumps({"file_name": name, "target_name": "owl" * 50}) + "\n")
            (root / name).touch()


@pytest.mark.slow
def test_opening_a_large_folder_is_cheap(tmp_path):
    """The limits are 5 s and 200 MB for a million items; here a tenth of both for a tenth of the items."""
    simulate(tmp_path, 100_000)
    start = time.process_time()
    AugmentedDataset(tmp_path)
    assert time.process_time() - start < 0.5
    tracemalloc.start()
    augmented = AugmentedDataset(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert len(pickle.dumps(augmented)) < 4000  # of 200 class names; the pickle is sent to each spawned worker


def test_the_pickle_has_one_size_for_any_number_of_items(tmp_path):
    sizes = []
    for count in (2000, 1001):
        simulate(tmp_path / str(count), count)
        augmented = AugmentedDataset(tmp_path / str(count))
        assert len(augmented.file_names) == count
        sizes.append(len(pickle.dumps(augmented)))
    assert sizes[0] == sizes[1]


def test_the_probability_is_kept_and_labels_have_one_shape():
    mixed = MixedDataset(Constant(0.0, 2000), Constant(1.0, 50, soft=True), 0.3)
    images, labels = zip(*(mixed[i] for i in range(2000)))
    share = np.mean([image.mean().item() for image in images])
    assert share == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / 2000))  # four standard deviations
    assert {tuple(label.shape) for label in labels} == {(3,)}
    assert all(label.sum() == 1 and label.dtype == torch.float32 for label in labels)
    loss = torch.nn.functional.cross_entropy(torch.zeros(2000, 3), torch.stack(labels))
    assert loss.item() == pytest.approx(np.log(3), rel=1e-5)


@pytest.mark.parametrize(("probability", "level"), [(0.0, 0.0), (1.0, 1.0)])
def test_probabilities_of_0_and_1(probability, level):
    mixed = MixedDataset(Constant(0.0, 20), Constant(1.0, 5, soft=True), probability)
    assert all(mixed[i][0].mean() == level for i in range(20))


def epochs(seed, workers, count=2):
    """Return the draws of each epoch, in index order."""
    mixed = MixedDataset(Constant(0.0, 64), Constant(1.0, 8, soft=True), 0.5, seed=seed)
    loader = DataLoader(mixed, batch_size=8, num_workers=workers)
    return [torch.cat([images.mean(dim=(1, 2, 3)) for images, _ in loader]) for _ in range(count)]


def test_epochs_differ_and_the_seed_decides():
    first, second = epochs(seed=0, workers=0)
    assert not torch.equal(first, second)
    assert torch.equal(torch.stack(epochs(seed=0, workers=0)), torch.stack([first, second]))
    assert not torch.equal(epochs(seed=1, workers=0)[0], first)


def test_workers_do_not_change_the_draws():
    assert torch.equal(torch.stack(epochs(seed=0, workers=2)), torch.stack(epochs(seed=0, workers=0)))


def new_numbers(seed=0, size=240):
    return MixedDataset(numbers(0, size), numbers(1000, 500), 0.5, seed=seed)


def draw_epoch(mixed, epoch):
    mixed.set_epoch(epoch)
    return [mixed[index][0].item() for index in range(len(mixed))]


@pytest.mark.parametrize("num_ranks", [6, 8])
def test_ranks_draw_as_one_process_does_and_epochs_differ(num_ranks):
    """The sampler moves items between the ranks, and each rank has its own data set."""
    ranks = [new_numbers() for _ in range(num_ranks)]
    samplers = [DistributedSampler(mixed, num_ranks, rank) for rank, mixed in enumerate(ranks)]
    seen = []
    for epoch in range(3):
        drawn = {}
        for mixed, sampler in zip(ranks, samplers):
            sampler.set_epoch(epoch)
            mixed.set_epoch(epoch)
            drawn |= {index: mixed[index][0].item() for index in sampler}
        seen.append([drawn[index] for index in range(240)])
        assert seen[-1] == draw_epoch(new_numbers(), epoch)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        replaced = [(a, b) for a, b in zip(seen[first], seen[second]) if a >= 1000 and b >= 1000]
        assert len(replaced) > 30 and np.mean([a == b for a, b in replaced]) < 0.1


def test_resumed_training_draws_as_uninterrupted_training():
    mixed = new_numbers()
    for epoch in range(3):
        draw_epoch(mixed, epoch)
    assert draw_epoch(mixed, 3) == draw_epoch(new_numbers(), 3)


def test_an_index_used_twice_in_an_epoch_is_drawn_again():
    mixed = new_numbers()
    first, second = draw_epoch(mixed, 0), [mixed[index][0].item() for index in range(240)]
    assert first != second
    assert draw_epoch(mixed, 0) == first


@start_methods
def test_the_epoch_reaches_persistent_workers(method):
    skip_without(method)
    mixed = copy.deepcopy(new_numbers())
    loader = DataLoader(mixed, 16, num_workers=2, persistent_workers=True, multiprocessing_context=method)
    for epoch in (0, 1, 0):
        mixed.set_epoch(epoch)
        assert torch.cat([images for images, _ in loader]).tolist() == draw_epoch(new_numbers(), epoch)


@start_methods
def test_the_epoch_of_a_process_does_not_reach_other_processes(method):
    """Ranks that share a data set, as with torch.multiprocessing.spawn, do not change each other's epoch."""
    skip_without(method)
    mixed = new_numbers()
    mixed.set_epoch(2)
    rank = torch.multiprocessing.get_context(method).Process(target=mixed.set_epoch, args=(7,))
    rank.start()
    rank.join()
    assert rank.exitcode == 0
    assert [mixed[index][0].item() for index in range(240)] == draw_epoch(new_numbers(), 2)


NO_LABELS = (3, "owl", True, 1.0, [0.5, 0.6, 0.0], [1.5, -0.5, 0.0], [float("nan"), 0.0, 0.0], None)


@pytest.mark.parametrize("label", NO_LABELS)
def test_an_invalid_label_is_refused(label):
    with pytest.raises(ValueError, match="a label has to be a class below 3 or that many shares of sum 1"):
        MixedDataset([(0, label)], Constant(1.0, 3), 0.0, ["a", "b", "c"])[0]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"probability": True}, "probability"),
        ({"probability": float("nan")}, "probability"),
        ({"probability": "0.5"}, "probability"),
        ({"class_names": 3}, "class_names"),
        ({"class_names": "abc"}, "class_names"),
        ({"seed": 0.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_named(changes, name):
    arguments = {"real": Constant(0.0, 3), "augmented": Constant(1.0, 3), "probability": 0.5}
    with pytest.raises(InputError, match=rf"^{name}: has to be"):
        MixedDataset(**{**arguments, **changes})


@pytest.mark.parametrize("epoch", [True, 1.0, -1, None, 2**32])
def test_an_epoch_is_a_whole_number(epoch):
    with pytest.raises(InputError, match=r"^epoch: has to be a whole number"):
        new_numbers().set_epoch(epoch)


# The same class on both sides


SORTED = [CLASS_NAMES[place] for place in (1, 2, 0)]  # as ImageFolder sorts them


def test_columns_follow_the_wanted_order_of_classes(folder):
    assert sorted(CLASS_NAMES) == SORTED
    own, sorted_set = AugmentedDataset(folder), AugmentedDataset(folder, class_names=SORTED)
    assert own.class_names == CLASS_NAMES and sorted_set.class_names == SORTED
    for index in range(12):
        for name in CLASS_NAMES:
            assert own[index][1][CLASS_NAMES.index(name)] == sorted_set[index][1][SORTED.index(name)]
    np.testing.assert_array_equal(own.soft_labels[:, [1, 2, 0]], sorted_set.soft_labels)
    again = pickle.loads(pickle.dumps(sorted_set))
    assert torch.equal(again[5][1], sorted_set[5][1])
    for augmented in (own, sorted_set, again):
        item, mask = augmented.metadata(-7), np.asarray(augmented.mask(-7))  # item 5
        assert augmented[5][1][item["target_label"]] == pytest.approx(item["ratio"], abs=1e-6)
        assert augmented.class_names[item["aug_label"]] == item["aug_name"]
        left, top, right, bottom = item["box"]
        assert (mask[top:bottom, left:right] == 255).all() and (mask == 255).mean() == pytest.approx(item["ratio"])
    numbered = AugmentedDataset(folder, class_names=["003.grey_heron", "001.Red/Kite", "002.blue jay?"])
    assert torch.equal(numbered[5][1], own[5][1][[2, 0, 1]])
    for wrong, message in (
        (CLASS_NAMES[:2], "class_names has no class 'grey heron', which is in "),
        ([*CLASS_NAMES, "wren"], "has no class 'wren', which is in class_names"),
        (["1.owl", "2.owl", "3.jay"], "has no class '1.owl'"),
        (["red kite", "Red_Kite", "grey heron"], "'red kite' and 'Red_Kite' count as the same"),
    ):
        with pytest.raises(InputError, match=message):
            AugmentedDataset(folder, class_names=wrong)


def image_folder(root, names=CLASS_NAMES):
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(root / name / "0.png")
    return root


class Listed(Dataset):
    """A data set of a user, which tells its classes nowhere."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return 0, index


def classes_of(mixed):
    """Return the name that the soft label of each item gives."""
    return [mixed.class_names[int(mixed[index][1].argmax())] for index in range(len(mixed))]


def kinds_of_real_data(root):
    """Yield data sets of the photos below `root`, and the class of each item."""
    from timm.data import create_dataset

    whole = ImageFolder(root)
    names = [whole.classes[label] for label in whole.targets]
    yield whole, names
    yield Subset(whole, [2, 0]), [names[2], names[0]]
    yield ConcatDataset([Subset(whole, [1]), ImageFolder(root)]), [names[1], *names]
    of_timm = create_dataset("", str(root))
    by_label = {label: name for name, label in of_timm.reader.class_to_idx.items()}
    yield of_timm, [by_label[of_timm[index][1]] for index in range(len(of_timm))]


def test_the_order_of_the_classes_is_found_in_real_data_sets(folder, tmp_path):
    """torchvision sorts folders by their letters, timm naturally; both get the column of the right class."""
    numbers_in_names = ["flower 10", "flower 2", "flower 1"]
    for names in (CLASS_NAMES, numbers_in_names):
        root = shutil.copytree(folder, tmp_path / names[0] / "aug")
        record = json.loads((root / "run.json").read_text())
        record["options"]["class_names"] = names
        (root / "run.json").write_text(json.dumps(record))
        augmented = AugmentedDataset(root)
        for real, expected in kinds_of_real_data(image_folder(tmp_path / names[0] / "photos", names)):
            assert classes_of(MixedDataset(real, augmented, 0.0)) == expected
            mixed = MixedDataset(real, augmented, 1.0)
            mixed.augmented = [augmented[7]]
            columns = [augmented.class_names.index(name) for name in mixed.class_names]
            assert torch.equal(mixed[0][1], augmented[7][1][columns])


def test_a_data_set_that_does_not_tell_its_classes_needs_their_names(folder, tmp_path):
    augmented = AugmentedDataset(folder)
    root = image_folder(tmp_path)
    merged = ImageFolder(root)
    merged.class_to_idx = dict.fromkeys(merged.class_to_idx, 0)
    for real in (
        Listed(),
        [(0, 1)],
        ImageFolder(root, target_transform=lambda label: 2 - label),
        Subset(ImageFolder(root, target_transform=lambda label: 2 - label), [0]),
        ConcatDataset([ImageFolder(root), image_folder_of_two(tmp_path / "two")]),
        merged,
    ):
        with pytest.raises(InputError, match=r"class_names: the real data set does not tell .* give the class names"):
            MixedDataset(real, augmented, 0.0)
    assert classes_of(MixedDataset(Listed(), augmented, 0.0, SORTED)) == SORTED
    assert classes_of(MixedDataset(Listed(), augmented, 0.0, CLASS_NAMES)) == CLASS_NAMES
    with pytest.raises(InputError, match="augmented: has no class_names"):
        MixedDataset(ImageFolder(root), Listed(), 0.0)
    with pytest.raises(InputError, match="has no class '1', which is in the real data"):
        MixedDataset(ImageFolder(image_folder(tmp_path / "numbered", ["1", "2", "3"])), augmented, 0.0)


def image_folder_of_two(root):
    return ImageFolder(image_folder(root, CLASS_NAMES[:2]))


def test_the_classes_of_a_hugging_face_data_set_are_its_class_label(folder):
    class ClassLabel:  # as the library's, which the tests do without
        names = SORTED

    real = Listed()
    real.features = {"image": object(), "label": ClassLabel()}
    assert MixedDataset(real, AugmentedDataset(folder), 0.0).class_names == SORTED


def test_a_transform_that_is_set_reaches_both_data_sets(folder, tmp_path):
    """As timm's create_loader sets it; through Subset and ConcatDataset, or not at all."""
    real, augmented = ImageFolder(image_folder(tmp_path)), AugmentedDataset(folder)
    mixed = MixedDataset(Subset(real, range(len(real))), ConcatDataset([augmented, augmented]), 0.5)
    mixed.transform = to_tensor
    assert real.transform is augmented.transform is mixed.transform is to_tensor
    with pytest.raises(InputError, match="Constant has no transform"):
        MixedDataset(Constant(0, 4), Constant(1, 4), 0.5).transform = to_tensor


def test_streams_of_seeds_do_not_meet():
    """numpy reads a number of 2**32 and above as two, so item 0 of the first seed was item 3 of the second."""
    high = 3 * 2**32 + 5
    assert Plan(high, 3, 1.0, 16).item(0).noise_seed != Plan(5, 3, 1.0, 16).item(3).noise_seed
    assert Plan(high, 3, 1.0, 16).item(0) != Plan(high % 2**32, 3, 1.0, 16).item(0)
    assert draw_epoch(new_numbers(high), 0) != draw_epoch(new_numbers(5), 0)
    for numbers_after in ((), (7,), (1, 2, 3)):  # the streams of smaller seeds are as before
        expected = np.random.SeedSequence([5, *numbers_after]).generate_state(4).tolist()
        assert seed_sequence(5, *numbers_after).generate_state(4).tolist() == expected
        assert seed_sequence(high, *numbers_after).generate_state(4).tolist() != expected


def write_mirrored_digits(root):
    """Write photos of mirrored digits, in folders named zero … nine, and an augmented set of others; return both."""
    digits = load_module(DIGITS / "train.py")
    images, labels, *_ = digits.load_split()
    pictures = [Image.fromarray(picture) for picture in digits.enlarge(images[:, :, ::-1])]
    for picture, label in zip(pictures[:400], labels[:400]):
        class_folder = root / "photos" / digits.CLASS_NAMES[label]
        class_folder.mkdir(parents=True, exist_ok=True)
        picture.save(class_folder / f"{len(list(class_folder.iterdir()))}.png")
    plan = Plan(0, 10, 1.0, 32, single_class=True)
    folder = OutputFolder(root / "augmented", plan, 600, digits.CLASS_NAMES, {"class_names": digits.CLASS_NAMES})
    folder.begin({"command": ["python"]})
    unused = {label: [place for place in range(400, len(labels)) if labels[place] == label] for label in range(10)}
    for item in plan.items(600):
        place = unused[item.target][item.index % len(unused[item.target])]
        folder.write(item, pictures[place].convert("RGB"))
    folder.finish()
    return root / "photos", root / "augmented"


def train_linear(items):
    """Return the weights (pixels, classes) of a linear classifier of (picture, soft label) items."""
    pictures, labels = (torch.stack(part) for part in zip(*items))
    weights = torch.zeros(pictures[0].numel(), labels.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.01)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(pictures.flatten(1) @ weights, labels)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return weights.detach()


def test_a_classifier_of_photos_learns_from_augmented_pictures_alone(tmp_path):
    """It names the photos right, in ImageFolder's order, which is not that of soft_label.npy."""
    photos, augmented_dir = write_mirrored_digits(tmp_path)
    real, augmented = ImageFolder(photos, to_tensor), AugmentedDataset(augmented_dir, to_tensor)
    assert real.classes[0] == "eight" and augmented.class_names[0] == "zero"
    pictures, labels = (torch.stack([picture for picture, _ in real]).flatten(1), torch.tensor(real.targets))

    def accuracy(items):
        return float(((pictures @ train_linear(items)).argmax(1) == labels).float().mean())

    mixed = MixedDataset(real, augmented, 1.0)
    assert accuracy([mixed[index] for index in range(len(mixed))]) > 0.8
    in_order = AugmentedDataset(augmented_dir, to_tensor, class_names=real.classes)
    assert accuracy([in_order[index] for index in range(600)]) > 0.8
    # by position, as it was accepted before, one of ten classes keeps its column
    assert accuracy([augmented[index] for index in range(600)]) < 0.3
