"""The class lists: counts, order, and the names that are the keys of checkpoints."""

import hashlib
import json

import pytest
from drawing import DIGITS

from noisecutmix import cli
from noisecutmix.classes import comparison_key, find_placeholders, load_classes, match_classes, normalise
from noisecutmix.errors import InputError

CLASSES = {
    "cub": (200, "bird", "Black footed Albatross", "Common Yellowthroat", "a7bc058a7a945cf8"),
    "flower": (102, "flower", "pink primrose", "blackberry lily", "0d27092c2140383d"),
    "aircraft": (100, "aircraft", "707-320", "Yak-42", "a0360851f1eb7fe9"),
    "digits": (10, "digit", "zero", "nine", "dfab20279a085795"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_lists(name):
    """The digest is that of the names, one per line. A wrong order would mislabel every data set without an error."""
    count, meta_class, first, last, digest = CLASSES[name]
    classes = load_classes(name)
    names = classes.names
    assert hashlib.sha256("\n".join(names).encode()).hexdigest().startswith(digest)
    assert (len(names), names[0], names[-1], classes.meta_class) == (count, first, last, meta_class)
    assert len({comparison_key(class_name) for class_name in names}) == count
    assert all(class_name == normalise(class_name) for class_name in names)


@pytest.mark.parametrize(
    ("name", "same"), [("cyclamen ", "cyclamen"), ("F-16A/B", "F-16A B"), ("Blue_Jay", "Blue Jay"), (" a  b\t", "a b")]
)
def test_normalise(name, same):
    assert normalise(name) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Robin", "robin"),
        ("V\u00f6gel", "Vo\u0308gel"),
        ("STRASSE", "Straße"),
        ("F-16A/B", "f-16a_b "),
        ("Å", "\u212b"),
    ],
)
def test_names_that_count_as_the_same(one, other):
    assert comparison_key(one) == comparison_key(other)


@pytest.mark.parametrize(("one", "other"), [("Vögel", "Vogel"), ("a b", "ab"), ("F-16A", "F-16B"), ("Ⅳ", "IV")])
def test_names_that_count_as_different(one, other):
    assert comparison_key(one) != comparison_key(other)


@pytest.mark.parametrize("wanted", ["ROBIN", "robin ", "vo\u0308gel", "1"])
def test_a_class_is_found_by_any_spelling_that_counts_as_the_same(tmp_path, tiny_checkpoint, wanted):
    (tmp_path / "birds.json").write_text(json.dumps({"classes": ["Vögel", "Robin"], "meta_class": "bird"}))
    data_set = [f"--data_name={tmp_path / 'birds.json'}", f"--ckpt_path={tiny_checkpoint}"]
    options = cli.parse_generation([*data_set, f"--target_class={wanted}", f"--output_dir={tmp_path}"])
    assert options.target_class == (0 if wanted.startswith("v") else 1)


def test_a_checkpoints_names_match_by_the_same_rule():
    placeholders = {"red/kite": "<class_0>", "Blue Jay": "<class_1>", "Vo\u0308gel": "<class_2>"}
    assert find_placeholders(["VÖGEL", "blue_jay", "Red Kite"], placeholders) == ["<class_2>", "<class_1>", "<class_0>"]


def write_finetuned(folder, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": ["cat", "dög"], "meta_class": "pet"}))
    content = {"model": "some/model@main", "resolution": 64, "seed": 0, **settings}
    (folder / "finetune.json").write_text(json.dumps({name: content[name] for name in content if content[name]}))
    return folder


def test_a_folder_of_finetune_sets_classes_model_and_resolution(tmp_path):
    folder = write_finetuned(tmp_path / "mine.json")  # a folder, although its name ends in .json
    classes = load_classes(str(folder))
    assert (classes.names, classes.meta_class) == (("cat", "dög"), "pet")
    assert (classes.model, classes.resolution, classes.ckpt_path) == ("some/model@main", 64, folder)


def test_a_folder_whose_training_has_no_checkpoint_yet_gives_the_command(tmp_path):
    record = {"command": ["python", "-m", "noisecutmix.finetune", "--data_dir=my photos"], "working_directory": "/a b"}
    folder = write_finetuned(tmp_path / "mine", **record)
    (folder / "classes.json").unlink()
    line = "cd '/a b'(;| &&) python -m noisecutmix.finetune '--data_dir=my photos'"
    with pytest.raises(InputError, match=f"no checkpoint yet; continue it with: {line}$"):
        load_classes(str(folder))


@pytest.mark.parametrize("settings", [{"model": None}, {"model": 3}, {"resolution": "64"}, {"resolution": True}])
def test_a_damaged_finetune_json_is_refused(tmp_path, settings):
    with pytest.raises(InputError, match=r'data_name: .*finetune\.json has no "(model|resolution)" of type'):
        load_classes(str(write_finetuned(tmp_path / "mine", **settings)))


@pytest.mark.parametrize("text", ["", "[]", "{", "\ufeff\ufeff", "[" * 100_000])
@pytest.mark.parametrize("file", ["classes.json", "finetune.json"])
def test_a_folder_with_an_unreadable_file_is_refused(tmp_path, file, text):
    folder = write_finetuned(tmp_path / "mine")
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"data_name: .*{file} (is not valid JSON|has no )"):
        load_classes(str(folder))


def test_where_a_name_is_a_number_a_number_is_a_name(tmp_path):
    """Folders of Flowers are numbered: of the classes 12, 3 and 7, class 2 would have been 7."""
    data_set = tmp_path / "three.json"
    checkpoint = DIGITS / "shot-1-lora-rank10"
    flags = [f"--data_name={data_set}", f"--ckpt_path={checkpoint}", f"--model={DIGITS / 'base'}", "--resolution=32"]
    flags.append(f"--output_dir={tmp_path / 'out'}")
    for names, wanted, label in (
        (["12", "3", "7"], "7", 2),
        (["12", "3", "7"], "2", None),
        (["cat", "dog", "1"], "0", None),
        (["cat", "dog", "1"], "1", 2),
        (["1.5", "2.5"], "1", None),
        (["cat", "dog"], "1", 1),
    ):
        data_set.write_text(json.dumps({"classes": names, "meta_class": "flower"}))
        if label is None:
            with pytest.raises(InputError, match=f"^target_class: '{wanted}' is no class .* such as {names[0]}$"):
                cli.parse_generation([*flags, f"--target_class={wanted}"])
        else:
            assert cli.parse_generation([*flags, f"--target_class={wanted}"]).target_class == label


@pytest.mark.parametrize(
    ("wanted", "names", "order"),
    [
        (["a b", "C"], ["c", "A_b"], [1, 0]),
        (["001.Black_footed_Albatross", "002.Laysan"], ["laysan", "Black footed Albatross"], [1, 0]),
        (["n02085620-Chihuahua", "n1-Pug"], ["Pug", "Chihuahua"], [1, 0]),
        (["pink-yellow dahlia?", "rose"], ["rose", "pink-yellow dahlia"], [1, 0]),
        (["001.rose", "2.dahlia?"], ["2 - dahlia", "1 - rose"], [1, 0]),
        (["320 bmw", "500 fiat"], ["330 bmw", "595 fiat"], "b has no class '320 bmw'"),
        (["1 euro", "2 euro"], ["1 euro", "5 euro"], "b has no class '2 euro'"),
        ([12, 3], ["12", "3"], "a: class names have to be texts, not 12"),
        (["5 cents", "10 cents"], ["10 cents", "5 cents"], [1, 0]),
        (["1.rose", "2.rose"], ["rose", "dahlia"], "a: the classes '1.rose' and '2.rose' count|has no class"),
        (["1.rose", "2.rose"], ["rose", "rose"], "a: the classes '1.rose' and '2.rose' count as the same"),
        (["1", "2"], ["rose", "dahlia"], "b has no class '1', which is in a; both need the same"),
        (["rose"], ["rose", "dahlia"], "a has no class 'dahlia', which is in b; both need the same"),
    ],
)
def test_classes_of_two_sources_match_by_name(wanted, names, order):
    if isinstance(order, list):
        assert match_classes(wanted, names, "a", "b") == order
    else:
        with pytest.raises(InputError, match=order):
            match_classes(wanted, names, "a", "b")
