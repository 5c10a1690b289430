"""The method with the bundled model of digits: pictures, labels and masks agree."""

import sys

import numpy as np
import pytest
from drawing import DIGITS, ROOT, load_module
from PIL import Image
from sklearn.svm import SVC

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.plan import Item

COUNT = 10
LEFT_HALF, ALL, NOTHING = (0, 0, 16, 32), (0, 0, 32, 32), (0, 0, 0, 0)


@pytest.fixture(scope="module")
def train():
    return load_module(DIGITS / "train.py")


@pytest.fixture(scope="module")
def classifier(train):
    """A support-vector classifier, trained on real digits at the size that the model draws."""
    images, labels, test_images, test_labels = train.load_split()
    classifier = SVC(gamma="scale").fit(train.enlarge(images).reshape(len(images), -1) / 255, labels)
    assert classifier.score(train.enlarge(test_images).reshape(len(test_images), -1) / 255, test_labels) > 0.97
    return classifier


@pytest.fixture(scope="module")
def generator():
    return NoiseCutMixGenerator(device="cpu", data_name="digits", num_inference_steps=15)


def test_mirrored_digits_are_written_once(train, tmp_path, monkeypatch, capsys):
    """A second run into the same folder would mix two choices of digits."""
    folder = tmp_path / "mirrored"
    monkeypatch.setattr(sys, "argv", ["train.py", f"--write_pictures={folder}", "--digits_a_class=2"])
    train.main()
    files = sorted(folder.rglob("*.png"))
    assert len(files) == 1797 and sum("train" in file.parts for file in files) == 20
    monkeypatch.setattr(sys, "argv", ["train.py", f"--write_pictures={folder}", "--digits_a_class=3"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    message = f"train.py: error: --write_pictures: {folder} is not an empty folder; choose another\n"
    assert capsys.readouterr().err == message
    assert sorted(folder.rglob("*.png")) == files


def items_in(box, ratio):
    """Return items of all target classes; the aug class is the target plus three, and each item has its own noise."""
    return [Item(i, i % 10, (i + 3) % 10, box, ratio, 1000 + i, 32) for i in range(COUNT)]


def as_gray(images):
    return np.stack([np.asarray(image.convert("L")) for image in images])


@pytest.fixture(scope="module")
def drawn(generator):
    boxes = {"target": (ALL, 1.0), "aug": (NOTHING, 0.0), "half": (LEFT_HALF, 0.5)}
    return {name: as_gray(generator.draw(items_in(*box))) for name, box in boxes.items()}


@pytest.mark.parametrize("name", ["target", "aug"])
def test_a_uniform_mask_gives_pictures_of_one_class(drawn, classifier, name):
    expected = [getattr(item, name) for item in items_in(ALL, 1.0)]
    named = classifier.predict(drawn[name].reshape(COUNT, -1) / 255)
    assert np.mean(named == expected) >= 0.95


def test_the_border_is_softer_than_a_pasted_one(drawn, train):
    """The figures in the demo's README: the mean step across the border, divided by the mean step elsewhere."""
    measure_seams = load_module(ROOT / "tests" / "measure" / "accuracy.py").measure_seams
    pasted = drawn["aug"].copy()
    pasted[:, :, :16] = drawn["target"][:, :, :16]
    real = train.enlarge(train.load_split()[0])
    seams = {
        name: measure_seams(images.astype(float), [LEFT_HALF] * len(images))
        for name, images in {"half": drawn["half"], "pasted": pasted, "real": real}.items()
    }
    print({name: round(seam, 2) for name, seam in seams.items()})
    assert seams["half"] < seams["pasted"] / 2
    assert seams["half"] - seams["real"] < (seams["pasted"] - seams["real"]) / 4


def test_halves_carry_features_of_both_classes(drawn):
    """Each half is closer to the picture of its own class than to that of the other class."""
    half, target, aug = (drawn[name].astype(float) for name in ("half", "target", "aug"))
    left, right = (slice(None), slice(None), slice(0, 16)), (slice(None), slice(None), slice(16, 32))
    assert np.abs(half - target)[left].mean() < np.abs(half - aug)[left].mean()
    assert np.abs(half - aug)[right].mean() < np.abs(half - target)[right].mean()


def test_call_returns_pictures_labels_and_masks(generator):
    images, labels, masks = generator([3, 5], resolution=48, return_mask=True, aug_labels=[4, 0])
    assert all(isinstance(image, Image.Image) and image.size == (48, 48) for image in images)
    for label, mask, target, aug in zip(labels, masks, (3, 5), (4, 0)):
        ratio = np.mean(np.asarray(mask) == 255)
        assert mask.mode == "L" and mask.size == (48, 48)
        assert set(np.flatnonzero(label)) <= {target, aug}
        assert label[target] == pytest.approx(ratio, abs=1e-6)
        assert label.sum() == pytest.approx(1, abs=1e-6)
    assert (generator.num_classes, generator.meta_class) == (10, "digit")


def test_calls_continue_the_plan_and_a_new_generator_repeats_it():
    def fresh():
        return NoiseCutMixGenerator(device="cpu", data_name="digits", num_inference_steps=2)

    generator, again = fresh(), fresh()
    first, second = generator([1, 2])[0], generator([1, 2])[0]
    assert not np.array_equal(as_gray(first), as_gray(second))
    # a batch of four is rounded differently from two batches of two, by one grey level
    assert np.abs(as_gray(again([1, 2, 1, 2])[0]).astype(int) - as_gray([*first, *second])).max() <= 1


def test_subsets_of_few_digits_share_none_and_have_every_class(train):
    labels = train.load_split()[1]
    subsets = [train.choose_digits(labels, 20, subset) for subset in range(2)]
    for subset in subsets:
        assert np.bincount(labels[subset]).tolist() == [20] * 10
    assert len(np.union1d(*subsets)) == 400
    for wrong in ((20, -1), (20, 7), (0, 0), (200, 0)):
        with pytest.raises(ValueError, match="no subset"):
            train.choose_digits(labels, *wrong)


def test_shifted_pictures_keep_their_labels(train):
    pictures = np.zeros((2, 32, 32), dtype=np.uint8)
    pictures[0, 10, 12], pictures[1, 20, 5] = 100, 200
    shifted, labels = train.shift_all(pictures, np.array([3, 8]))
    assert shifted.shape == (18, 32, 32) and labels.tolist() == [3, 8] * 9
    places = {(int(row), int(column)) for _, row, column in np.argwhere(shifted == 100)}
    assert places == {(10 + down, 12 + right) for down in (-2, 0, 2) for right in (-2, 0, 2)}
    assert all(picture.max() == {3: 100, 8: 200}[label] for picture, label in zip(shifted, labels))
