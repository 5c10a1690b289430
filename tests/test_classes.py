"""The class lists: counts, order, and names as checkpoints key them."""

import hashlib
import json

import pytest

from noisecutmix.classes import load_classes, normalise
from noisecutmix.errors import InputError

CLASSES = {
    "cub": (200, "bird", "Black footed Albatross", "Common Yellowthroat"),
    "flower": (102, "flower", "pink primrose", "blackberry lily"),
    "aircraft": (100, "aircraft", "707-320", "Yak-42"),
    "digits": (10, "digit", "zero", "nine"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_lists(name):
    count, meta_class, first, last = CLASSES[name]
    classes = load_classes(name)
    names = classes.names
    assert (len(names), names[0], names[-1], classes.meta_class) == (count, first, last, meta_class)
    assert len({normalise(class_name) for class_name in names}) == count
    assert all(class_name == normalise(class_name) for class_name in names)


@pytest.mark.parametrize(
    ("data_name", "label", "name"),
    [
        ("cub", 16, "Cardinal"),
        ("cub", 72, "Blue Jay"),
        ("flower", 87, "cyclamen"),
        ("flower", 90, "hippeastrum"),
        ("flower", 5, "tiger lily"),
        ("aircraft", 72, "F-16A B"),
        ("aircraft", 73, "F A-18"),
    ],
)
def test_labels_of_some_classes(data_name, label, name):
    assert load_classes(data_name).names[label] == name


@pytest.mark.parametrize(
    ("data_name", "digest"),
    [("cub", "a7bc058a7a945cf8"), ("flower", "0d27092c2140383d"), ("aircraft", "a0360851f1eb7fe9")],
)
def test_label_order_is_the_published_checkpoints(data_name, digest):
    """The SHA-256 of the names by line: a label that moved would be wrong in every data set, and seen in none."""
    names = "\n".join(load_classes(data_name).names)
    assert hashlib.sha256(names.encode()).hexdigest().startswith(digest)


@pytest.mark.parametrize(
    ("name", "same"),
    [("cyclamen ", "cyclamen"), ("F-16A/B", "F-16A B"), ("Blue_Jay", "Blue Jay"), (" a  b\t", "a b")],
)
def test_normalise(name, same):
    assert normalise(name) == same


def test_json_data_set(tmp_path):
    path = tmp_path / "pets.json"
    path.write_text(json.dumps({"classes": ["cat", "dög"], "meta_class": "pet"}), encoding="utf-8")
    classes = load_classes(str(path))
    assert classes.names == ("cat", "dög")
    assert classes.meta_class == "pet"


def test_unknown_data_set():
    with pytest.raises(InputError, match="--data_name: 'birds' is unknown"):
        load_classes("birds")
