"""CUB-200-2011, Flowers-102 and Aircraft are read as published; so are their re-packagings, lists, and names in files.

Each class has its own colour, so a picture tells which class it is of.
"""

import colorsys
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from drawing import ROOT, as_command_line, in_old_keys, write_checkpoint
from finetuning import finetune
from PIL import Image
from scipy.io import savemat

from noisecutmix import AugmentedDataset
from noisecutmix.classes import load_classes
from noisecutmix.compare.sets import load_photos
from noisecutmix.errors import InputError
from noisecutmix.photos import Source, find_photos

ARCHIVES = {"cub": "CUB_200_2011", "flower": "flowers-102", "aircraft": "fgvc-aircraft-2013b"}
NAMES = {data_name: load_classes(data_name).names for data_name in ARCHIVES}
PARTS = {"train": 2, "val": 1, "test": 1}  # pictures of each class
SIDE = 20


def colour_of(label, count):
    return tuple(int(255 * value) for value in colorsys.hsv_to_rgb(label / count, 1 - 0.5 * (label % 2), 0.9))


def write_picture(file, label, count, banner=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (SIDE, SIDE + banner), "white")
    picture.paste(colour_of(label, count), (0, 0, SIDE, SIDE))
    picture.save(file, quality=95)


def write_lines(file, lines):
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_cub(root):
    lists = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    folders = [f"{label + 1:03d}.{name.replace(' ', '_')}" for label, name in enumerate(NAMES["cub"])]
    for label, folder in enumerate(folders):
        for number in range(3):
            path, index = f"{folder}/bird_{number}.jpg", len(lists["images"]) + 1
            write_picture(root / "images" / path, label, 200)
            lists["images"].append(f"{index} {path}")
            lists["image_class_labels"].append(f"{index} {label + 1}")
            lists["train_test_split"].append(f"{index} {int(number != 1)}")
    lists["classes"] = [f"{label + 1} {folder}" for label, folder in enumerate(folders)]
    for name, lines in lists.items():
        write_lines(root / f"{name}.txt", lines)


def write_flowers(root):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 103), 4))
    ids, seen = {"trnid": [], "valid": [], "tstid": []}, np.zeros(103, int)
    for index, label in enumerate(labels, 1):
        write_picture(root / "jpg" / f"image_{index:05d}.jpg", label - 1, 102)
        ids[("trnid", "trnid", "valid", "tstid")[seen[label]]].append(index)
        seen[label] += 1
    savemat(root / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    savemat(root / "setid.mat", {key: np.array([value], np.uint16) for key, value in ids.items()})


def write_aircraft(root):
    root, number = root / "data", 0
    official = [{"F-16A B": "F-16A/B", "F A-18": "F/A-18"}.get(name, name) for name in NAMES["aircraft"]]
    for part, count in PARTS.items():
        lines = []
        for label, name in enumerate(official):
            for _ in range(count):
                number += 1
                write_picture(root / "images" / f"{number:07d}.jpg", label, 100, banner=20)
                lines.append(f"{number:07d} {name}")
        write_lines(root / f"images_variant_{part}.txt", reversed(lines))
    write_lines(root / "variants.txt", official)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    for data_name, write in (("cub", write_cub), ("flower", write_flowers), ("aircraft", write_aircraft)):
        write(folder / data_name / ARCHIVES[data_name])
    for part, count in PARTS.items():  # the re-packaging of flowers with numbers for names, and CUB in two folders
        for label in range(102):
            for number in range(count):
                write_picture(folder / "flower_data" / part / str(label + 1) / f"{number}.jpg", label, 102)
        for label, name in enumerate(NAMES["cub"]):
            for number in range(count):
                of_class = f"{label + 1:03d}.{name.replace(' ', '_')}"
                write_picture(folder / "cub_split" / part / of_class / f"{number}.jpg", label, 200)
    names = {str(label + 1): name for label, name in enumerate(NAMES["flower"])}
    (folder / "flower_data" / "cat_to_name.json").write_text(json.dumps(names))
    return folder


def colours_are_right(photos, class_names):
    """Return whether each picture shows the colour of its class, in the order of these names."""
    shown = [
        photos.open(index).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for index in range(len(photos.files))
    ]
    wanted = [colour_of(class_names.index(photos.class_names[label]), len(class_names)) for label in photos.labels]
    return np.abs(np.subtract(shown, wanted)).max() < 8


@pytest.mark.parametrize("inside", ["", "outside", "images"])
@pytest.mark.parametrize("data_name", ARCHIVES)
def test_an_archive_is_read_with_its_classes_and_its_split(archives, data_name, inside):
    root = archives / data_name / ARCHIVES[data_name]
    lists = root / "data" if data_name == "aircraft" else root
    given = {
        "": root,
        "outside": archives / data_name,
        "images": lists / ("jpg" if data_name == "flower" else "images"),
    }
    count, has_validation = len(NAMES[data_name]), data_name != "cub"
    for split, of_class in ((None, 3 if has_validation else 2), ("train", 2), ("trainval", 3 if has_validation else 2)):
        train = find_photos(given[inside], source=Source(split))
        assert train.class_names == NAMES[data_name] and train.root == lists
        assert np.bincount(train.labels).tolist() == [of_class] * count
        assert f"as published: {of_class * count} pictures for training, {count} for the test" in train.notes[0]
        assert ("--split=train omits them" in train.notes[0]) == (has_validation and split != "train")
        test = find_photos(given[inside], is_test=True, source=Source(split))
        assert np.bincount(test.labels).tolist() == [1] * count
        assert not set(train.files) & set(test.files)
        if not inside:
            assert colours_are_right(train, NAMES[data_name]) and colours_are_right(test, NAMES[data_name])
        assert train.open(0).size == (SIDE, SIDE)  # Aircraft's banner is cut


@pytest.mark.parametrize(
    ("data_name", "change", "message"),
    [
        ("cub", lambda root: (root / "images.txt").unlink(), "lacks images.txt; unpack the archive again"),
        ("flower", lambda root: (root / "setid.mat").unlink(), "lacks setid.mat"),
        ("flower", lambda root: (root / "setid.mat").write_bytes(b"MATLAB"), "setid.mat cannot be read"),
        ("aircraft", lambda root: (root / "data" / "variants.txt").unlink(), "lacks variants.txt"),
        ("cub", lambda root: shutil.rmtree(next((root / "images").iterdir())), "lacks 3 of the 600 pictures"),
        ("flower", lambda root: shutil.rmtree(root / "jpg"), "lacks 408 of the 408 pictures"),
        (
            "cub",
            lambda root: write_lines(root / "train_test_split.txt", [f"{number} 1" for number in range(2, 602)]),
            "are of different pictures",
        ),
        (
            "cub",
            lambda root: write_lines(root / "train_test_split.txt", [f"{number} yes" for number in range(1, 601)]),
            "are damaged",
        ),
        (
            "aircraft",
            lambda root: shutil.copy(root / "data/images_variant_train.txt", root / "data/images_variant_test.txt"),
            "twice",
        ),
        ("aircraft", lambda root: write_lines(root / "data" / "variants.txt", ["707-320"]), "are damaged"),
        (
            "flower",
            lambda root: savemat(root / "imagelabels.mat", {"labels": np.ones((1, 400), np.uint8)}),
            "are of different pictures",
        ),
        (
            "cub",
            lambda root: write_lines(root / "classes.txt", [f"{number} {number}.A_bird" for number in range(1, 201)]),
            "has another class for 001.Black_footed_Albatross",
        ),
        (
            "cub",
            lambda root: write_lines(
                root / "image_class_labels.txt", [f"{number} {1 + number // 200}" for number in range(1, 601)]
            ),
            "has another class for",
        ),
        (
            "aircraft",
            lambda root: (root / "data" / "variants.txt").write_text(
                (root / "data" / "variants.txt").read_text() + "F-16A B\n"
            ),
            "name a class twice",
        ),
        ("cub", lambda root: write_flowers(root), "holds two data sets, CUB-200-2011"),
    ],
)
def test_a_damaged_archive_is_refused_in_a_line(archives, tmp_path, data_name, change, message):
    root = shutil.copytree(archives / data_name / ARCHIVES[data_name], tmp_path / "archive")
    change(root)
    with pytest.raises(InputError, match=message) as error:
        find_photos(root)
    assert "\n" not in error.value.as_line() and "--data_dir" in error.value.as_line()


def test_pictures_in_no_list_are_counted(archives, tmp_path):
    root = shutil.copytree(archives / "flower" / "flowers-102", tmp_path / "flowers")
    write_picture(root / "jpg" / "image_09999.jpg", 0, 102)
    assert "1 pictures" in find_photos(root).notes[-1]


def test_the_test_of_an_archive_is_the_published_one(archives):
    root = archives / "cub" / "CUB_200_2011"
    for test_dir in (None, root):
        train, test, is_share = load_photos(root, test_dir, None, 0.2, 1, 5, Source())
        assert len(train.files) == 200 and len(test.files) == 200 and not is_share
        assert not test.notes  # those of train say how many pictures there are
    own, test, _ = load_photos(archives / "cub_split" / "train", root, None, 0.2, None, 0, Source())
    assert own.class_names[0] == "001.Black_footed_Albatross" and len(test.files) == 200
    assert colours_are_right(test, [f"{label + 1:03d}.{n.replace(' ', '_')}" for label, n in enumerate(NAMES["cub"])])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "test", "data_name"),
    [
        ("cub/CUB_200_2011", None, "cub"),
        ("flower/flowers-102", None, "flower"),
        ("aircraft/fgvc-aircraft-2013b", None, "aircraft"),
        ("flower_data/train", "flower_data/test", "flower"),
        ("cub_split/train", "cub_split/test", "cub"),
    ],
)
def test_the_data_sets_fit_an_augmented_one_and_a_checkpoint(
    archives, tmp_path, tiny_model, tiny_lora, capsys, train, test, data_name
):
    # Two steps of fine-tuning
    quick = [f"--model={tiny_model}", "--meta_class=x", "--resolution=16", "--max_train_steps=2", "--device=cpu"]
    finetune(tmp_path, f"--data_dir={archives / train}", "--examples_per_class=1", *quick)
    assert set(json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]) >= (
        set() if train.startswith("cub_split") else set(NAMES[data_name])
    )

    # A data set of --data_name, each picture in its class's colour
    checkpoint = write_checkpoint(tmp_path / "ckpt", in_old_keys(tiny_lora), class_names=NAMES[data_name])
    flags = [f"--data_name={data_name}", f"--model={tiny_model}", f"--ckpt_path={checkpoint}", "--resolution=16"]
    flags += [f"--num_aug={2 * len(NAMES[data_name])}", "--single_class", "--num_inference_steps=1", "--device=cpu"]
    with as_command_line("augmentation.py", *flags, "--output_dir=aug", folder=tmp_path) as main:
        main()
    for line in (tmp_path / "aug" / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        write_picture(tmp_path / "aug" / item["file_name"], item["target_label"], len(NAMES[data_name]))

    # A comparison; and a classifier by the mean colour of each label's column is right only if the columns are
    flags = [f"--train_dir={archives / train}", *([f"--test_dir={archives / test}"] if test else [])]
    flags += ["--augmented=ours=aug", "--rows", "none", "ours", "--baseline=none", "--model=test_resnet", "--seeds=1"]
    flags += [
        "--no_pretrained",
        "--image_size=32",
        "--epochs=1",
        "--num_workers=0",
        "--device=cpu",
        "--output_dir=answer",
    ]
    with as_command_line("noisecutmix.compare", *flags, folder=tmp_path) as main:
        main()
    assert len(json.loads((tmp_path / "answer" / "results.json").read_text())["rows"]) == 2
    photos, tested, _ = load_photos(archives / train, archives / test if test else None, None, 0.2, None, 0, Source())
    augmented = AugmentedDataset(tmp_path / "aug", class_names=photos.class_names)
    colours = {int(label.argmax()): np.array(picture).mean((0, 1)) for picture, label in augmented}
    known = np.array([colours.get(label, (-999,) * 3) for label in range(len(photos.class_names))])
    pairs = [(np.array(tested.open(index)).mean((0, 1)), label) for index, label in enumerate(tested.labels)]
    pairs = [(colour, label) for colour, label in pairs if label in colours]
    assert len(pairs) > 80
    assert np.mean([np.abs(known - colour).sum(1).argmin() == label for colour, label in pairs]) > 0.99
    out = capsys.readouterr()
    is_published = test is None
    assert ("as published" in out.err) == is_published
    assert ("published training pictures" in out.out) == (data_name != "flower")
    assert ("half of all pictures, so also of the published test's" in out.out) == (data_name == "flower")


def test_names_of_folders_come_from_a_file(archives, tmp_path):
    photos = find_photos(archives / "flower_data" / "train")
    assert photos.class_names[:3] == ("pink primrose", "globe thistle", "blanket flower")  # folders 1, 10, 100
    assert colours_are_right(photos, NAMES["flower"])
    assert "cat_to_name.json" in photos.notes[-1]
    for label, name in enumerate(("b", "a")):
        write_picture(tmp_path / "photos" / name / "x.jpg", label, 2)
    for content, names in (({"a": "ant", "b": "bee"}, ("ant", "bee")), (["ant", "bee"], ("ant", "bee"))):
        (tmp_path / "names.json").write_text(json.dumps(content))
        assert find_photos(tmp_path / "photos", source=Source(class_names=tmp_path / "names.json")).class_names == names


@pytest.mark.parametrize(
    ("folders", "content", "message"),
    [
        (("a", "b"), {"a": "ant"}, "has no name for the folder 'b'"),
        (("a", "b"), ["ant"], "has 1 names for 2 folders"),
        (("a", "b"), "ant", "is no JSON file of names"),
        (("a", "b"), {"a": "ant", "b": "Ant"}, "gives two classes the name 'Ant'"),
        (("2", "10"), ["ant", "bee"], "give an object of names by folder"),
        (("class_2", "class_10"), ["ant", "bee"], "give an object of names by folder"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(tmp_path, folders, content, message):
    for folder in folders:
        write_picture(tmp_path / "photos" / folder / "x.jpg", 0, 2)
    (tmp_path / "names.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        find_photos(tmp_path / "photos", source=Source(class_names=tmp_path / "names.json"))


@pytest.mark.parametrize(
    "lines",
    [
        ["a/0.jpg cat", "a/1.jpg wild cat", "b/2.jpg wild cat"],
        ["path,class", "a/0.jpg,cat", "a/1.jpg,wild cat", '"b/2.jpg","wild cat"'],
        ["a/0.jpg\tcat", "a/1.jpg\twild cat", "b/2.jpg\twild cat", ""],
        ["a/0 cat", "a/1 wild cat", "b/2 wild cat"],
        ["a/0.jpg,cat", ",", "a/1.jpg,wild cat", "b/2.jpg,wild cat"],
    ],
)
def test_a_list_names_pictures_and_classes(tmp_path, lines):
    for name in ("a/0.jpg", "a/1.jpg", "b/2.jpg", "b/3.jpg"):
        write_picture(tmp_path / "photos" / name, 0, 2)
    write_lines(tmp_path / "train.txt", lines)
    photos = find_photos(tmp_path / "photos", source=Source(list_file=tmp_path / "train.txt"))
    assert photos.class_names == ("cat", "wild cat")
    found = {
        (file.relative_to(tmp_path / "photos").as_posix(), label) for file, label in zip(photos.files, photos.labels)
    }
    assert found == {("a/0.jpg", 0), ("a/1.jpg", 1), ("b/2.jpg", 1)}


def test_paths_in_a_list_may_hold_spaces_and_be_absolute(tmp_path, monkeypatch):
    for name in ("cat/photo.jpg", "cat/photo 2.jpg", "dog/photo 2.jpg"):
        write_picture(tmp_path / "photos" / name, 0, 2)
    write_lines(tmp_path / "paths.txt", ["cat/photo 2.jpg", "dog/photo 2.jpg"])
    write_lines(tmp_path / "pairs.txt", ["cat/photo 2.jpg big cat", f"{tmp_path}/photos/dog/photo 2.jpg dog"])
    monkeypatch.chdir(tmp_path)
    for name, classes in (("paths.txt", ("cat", "dog")), ("pairs.txt", ("big cat", "dog"))):
        photos = find_photos(Path("photos"), 1, source=Source(list_file=Path(name)))
        assert photos.class_names == classes
        assert [file.as_posix() for file in photos.files] == ["photos/cat/photo 2.jpg", "photos/dog/photo 2.jpg"]
    write_picture(tmp_path / "photos" / "cat" / "photo.png", 0, 2)
    write_lines(tmp_path / "paths.txt", ["cat/photo", "dog/photo 2"])
    with pytest.raises(InputError, match="there are several pictures"):
        find_photos(Path("photos"), source=Source(list_file=Path("paths.txt")))


def test_lists_and_names_of_an_archive(archives, tmp_path):
    """By other lists, Aircraft's banner is cut all the same, and the test has to be said."""
    root = archives / "aircraft" / "fgvc-aircraft-2013b"
    write_lines(tmp_path / "train.txt", ["data/images/0000001 a", "data/images/0000003 b"])
    write_lines(tmp_path / "test.txt", ["data/images/0000002 a", "data/images/0000004 b"])
    source = Source(list_file=tmp_path / "train.txt")
    train, test, _ = load_photos(root, None, tmp_path / "test.txt", 0.2, None, 0, source)
    assert train.open(0).size == test.open(0).size == (SIDE, SIDE)
    with pytest.raises(InputError, match=r"train_list: .* give --test_list"):
        load_photos(root, None, None, 0.2, None, 0, source)
    with pytest.raises(InputError, match=r"class_names: .* is read as published, with its own class names"):
        find_photos(root, source=Source(class_names=tmp_path / "names.json"))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "one").symlink_to(root)
    (tmp_path / "linked" / "two").symlink_to(root)
    assert find_photos(tmp_path / "linked").published == "FGVC-Aircraft"


def test_a_list_of_paths_alone_takes_the_folders_and_a_second_list_is_the_test(tmp_path):
    for name in ("cat/0.jpg", "cat/1.jpg", "dog/2.jpg", "dog/3.jpg"):
        write_picture(tmp_path / "photos" / name, 0, 2)
    write_lines(tmp_path / "train.txt", ["cat/0", "dog/2"])
    write_lines(tmp_path / "test.txt", ["dog/3", "cat/1"])
    source = Source(list_file=tmp_path / "train.txt")
    train, test, is_share = load_photos(tmp_path / "photos", None, tmp_path / "test.txt", 0.2, None, 0, source)
    assert train.class_names == ("cat", "dog") and not is_share
    assert [file.name for file in (*train.files, *test.files)] == ["0.jpg", "2.jpg", "1.jpg", "3.jpg"]
    write_lines(tmp_path / "test.txt", ["dog/3", "cat/0"])
    with pytest.raises(InputError, match="is among those for training, too"):
        load_photos(tmp_path / "photos", None, tmp_path / "test.txt", 0.2, None, 0, source)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a/0.jpg cat", "a/9.jpg dog"], "line 2: there is no picture"),
        (["a/0.jpg cat", "a/0.jpg dog"], "line 2: .* is listed already"),
        (["a/0.jpg cat", "../x.jpg dog"], "line 2: .* is not in"),
        (["a/0.jpg,cat,1", "a/1.jpg,dog,2"], "3 columns"),
        (["a/0.jpg,cat", "a/1.jpg,"], "line 2: the path or the class is empty"),
        (["a/0.jpg cat", "a/1.jpg"], "some lines have a class and others have none"),
        (["a/0.jpg cat", "a/1.jpg Cat"], "count as the same"),
        (["a/0.jpg cat"], "names 1 classes"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, lines, message):
    for name in ("photos/a/0.jpg", "photos/a/1.jpg", "x.jpg"):
        write_picture(tmp_path / name, 0, 2)
    write_lines(tmp_path / "train.txt", lines)
    with pytest.raises(InputError, match=message):
        find_photos(tmp_path / "photos", source=Source(list_file=tmp_path / "train.txt"))


@pytest.mark.slow
def test_the_three_commands_of_the_readme_answer_on_cub(archives, tmp_path, tiny_model, tiny_lora, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```sh gpu\n(.*?)```", text, re.DOTALL) if "CUB_200_2011" in block)
    checkpoint = write_checkpoint(tmp_path / "ckpt", in_old_keys(tiny_lora), class_names=NAMES["cub"])
    shutil.copytree(archives / "cub" / "CUB_200_2011", tmp_path / "CUB_200_2011")
    drawing = f"--model={tiny_model} --ckpt_path={checkpoint} --resolution=16 --num_aug=40 --num_inference_steps=1"
    classifying = "--model=test_resnet --no_pretrained --image_size=32 --epochs=1 --seeds=1 --num_workers=0"
    sizes = {"augmentation.py": drawing.split(), "noisecutmix.compare": classifying.split()}
    commands = re.findall(r"uv run .*?(augmentation\.py|noisecutmix\.compare) (.*)", block)
    assert len(commands) == 3
    for script, flags in commands:
        flags = [*shlex.split(flags), *sizes[script], "--device=cpu"]
        with as_command_line(script, *flags, folder=tmp_path) as main:
            main()
    output, errors = capsys.readouterr()
    assert "CUB-200-2011 as published: 400 pictures for training, 200 for the test" in errors
    results = json.loads((tmp_path / "outputs" / "answer" / "results.json").read_text())["rows"]
    rows = "none cutmix noisecutmix cutmix+noisecutmix stable_diffusion cutmix+stable_diffusion"
    assert list(results) == rows.split()
    assert "published training pictures" in output
