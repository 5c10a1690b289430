"""Does it help? Compare classifiers of photos: alone, with MixUp and CutMix, and with augmented pictures.

python -m noisecutmix.compare --train_dir=photos/train --test_dir=photos/test --augmented noisecutmix=outputs/mine \
    --augmented stable_diffusion=outputs/single --output_dir=outputs/answer

After a stop, the same command continues. Any number of processes may work on one folder, started at any time: each
takes a classifier that nobody has finished or begun, and the last one writes results.md, results.json and accuracy.png.
"""

import argparse
import dataclasses
import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

from .. import launch, script
from ..cli import Parser, add_machine_flags, add_number, add_source_flags, as_path, as_text
from ..errors import InputError, RunError, is_out_of_memory
from ..files import check_writable, read_record
from ..photos import Source, check_photos, find_archive
from ..ranges import RANGES, Range
from .comparison import OPTIONS_FILE, Comparison
from .recipe import MIXES, Recipe, diffmix_flags
from .sets import digest, hash_pictures, load_photos, open_set, read_set

COUNT, RATE, SHARE = Range(int, 1, 10**8), Range(float, 0, 1e6), Range(float, 0, 1)
RECIPE = [field.name for field in dataclasses.fields(Recipe)]
# those that classify.json always has; later ones only where they are not at their default
FIRST_OF_RECIPE = [field.name for field in dataclasses.fields(Recipe) if field.default is dataclasses.MISSING]
# the flags on which no classifier depends, whether directly or by the content of files
NOT_OF_RESULTS = (
    *("train_dir", "test_dir", "train_list", "test_list", "split", "class_names", "augmented", "output_dir", "rows"),
    *("baseline", "seeds", "save_weights", "keep_copies", "report", "device", "num_workers", "recipe"),
)

LOST_WORKER = ("DataLoader worker", "shared memory", "/torch_")  # in torch's messages


def create_parser() -> Parser:
    parser = Parser(description="Compare classifiers that are trained with and without augmented data sets.")
    default = " (default: %(default)s)"
    add = parser.add_argument_group("pictures").add_argument
    layout = "one folder of pictures per class, or CUB-200-2011, Flowers-102 or Aircraft as published"
    add("--train_dir", type=as_path, required=True, metavar="DIR", help=f"real pictures for training: {layout}")
    published = "(default: the published test pictures, else a share of --train_dir)"
    add("--test_dir", type=as_path, metavar="DIR", help=f"real pictures for the test {published}")
    add_source_flags(add, "train_dir")
    tests = "text or CSV file: path below --train_dir and class of each picture for the test"
    add("--test_list", type=as_path, metavar="FILE", help=tests)
    share = "share of --train_dir, chosen by the seed, that is only for the test"
    add_number(add, "test_share", 0.2, "P", share, Range(float, 0.01, 0.99))
    few = "training pictures per class, chosen by the seed (default: all)"
    add_number(add, "examples_per_class", None, "N", few, COUNT)
    sets = "a folder of augmentation.py, and a name for it; may be given several times"
    add("--augmented", type=as_named_folder, action="append", default=[], metavar="NAME=DIR", help=sets)

    add = parser.add_argument_group("comparison").add_argument
    add("--output_dir", type=as_path, required=True, metavar="DIR", help="folder to write into")
    rows = "none, mixup, cutmix, NAME, mixup+NAME, cutmix+NAME (default: none, cutmix, each NAME and cutmix+NAME)"
    add("--rows", nargs="+", metavar="ROW", help=f"ways to train: {rows}")
    add("--baseline", default="cutmix", metavar="ROW", help="row to compare the others with" + default)
    add_number(add, "seeds", 5, "N", "classifiers per row", Range(int, 1, 1000))
    add_number(add, "seed", 0, "S", "seed of all random choices")
    add_number(add, "probability", 0.1, "P", "share of real pictures that augmented ones replace", SHARE)
    keep = "share of each augmented set that is used: where the loss of row none's first classifier is lowest"
    add_number(add, "keep", 1.0, "P", keep, Range(float, 0.01, 1))
    weights = "keep the first classifier of each row in weights/, and print how to use it"
    add("--save_weights", action="store_true", help=weights)
    report = "only print the accuracies of the classifiers that are trained already"
    add("--report", action="store_true", help=report)
    add("--keep_copies", action="store_true", help="keep the reduced copies of large photos, for more seeds or rows")

    add = parser.add_argument_group("training").add_argument
    recipe = "defaults as Diff-Mix trains classifiers, for --image_size 224, 384 or 448; any flag overrides them"
    add("--recipe", choices=("diffmix",), help=recipe)
    add("--model", type=as_text, default="resnet50", metavar="NAME", help="any model of timm" + default)
    pretrained = "begin with random weights"
    add("--no_pretrained", dest="pretrained", action="store_false", help=pretrained)
    add_number(add, "epochs", 100, "N", "passes over the real pictures", COUNT)
    add_number(add, "batch_size", 32, "N", "pictures a step")
    add_number(add, "learning_rate", 0.02, "LR", "peak learning rate of SGD", RATE)
    add_number(add, "warm_up", 0.05, "P", "share of the steps in which the learning rate rises", SHARE)
    add_number(add, "weight_decay", 5e-4, "W", "weight decay of SGD", RATE)
    add_number(add, "mix_probability", 0.5, "P", "share of the batches that rows with mixup and cutmix mix", SHARE)
    side = "side of the classifier's pictures in pixels (default: the model's)"
    add_number(add, "image_size", None, "PIXELS", side, RANGES["resolution"])
    resize = "scale a picture to a square of this side and crop it at random; without it, crops vary in size and shape"
    add_number(add, "resize", None, "PIXELS", resize, RANGES["resolution"])
    crop = "smallest share of a picture that a random crop of the training shows"
    add_number(add, "crop_scale", 0.08, "P", crop, Range(float, 0.01, 1))
    jitter = "largest random change of brightness, contrast and saturation, as a share"
    add_number(add, "color_jitter", 0.4, "P", jitter, SHARE)
    flip = "do not mirror half of the training pictures at random"
    add("--no_random_flip", dest="random_flip", action="store_false", help=flip)

    dtypes = "type of the computation (default: float16 on cuda, else float32); weights are float32"
    add = add_machine_flags(parser, dtypes).add_argument
    add_number(add, "num_workers", 4, "N", "processes that read pictures", Range(int, 0, 256))
    return parser


def as_named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) or name.lower() in ("none", *MIXES) or not folder:
        raise argparse.ArgumentTypeError(f"has to be NAME=DIR, with a name of letters and digits, not {text!r}")
    return name, as_path(folder)


def parse(parser: Parser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options; `augmented` is a dict of folders. Raises InputError."""
    options = parser.parse_args(arguments)
    if options.recipe:
        archive = find_archive(options.train_dir) if options.train_dir.is_dir() else None
        flags = diffmix_flags(options.image_size, archive[0].data_name if archive else "")
        options = parser.parse_args(arguments, argparse.Namespace(**flags))
    if options.resize and options.resize < (options.image_size or options.resize):
        raise InputError(f"{options.resize} pixels are fewer than --image_size={options.image_size}", "resize")
    names = [name for name, _ in options.augmented]
    if len({name.lower() for name in names}) < len(names):
        raise InputError("two data sets have the same name; give each another one", "augmented")
    options.augmented = dict(options.augmented)
    known = ["none", *MIXES, *(f"{start}{name}" for name in names for start in ("", *(f"{mix}+" for mix in MIXES)))]
    options.rows = options.rows or ["none", "cutmix", *(row for name in names for row in (name, f"cutmix+{name}"))]
    options.rows = list(dict.fromkeys(options.rows))
    for option, row in (*(("rows", row) for row in options.rows), ("baseline", options.baseline)):
        if row not in known:
            raise InputError(f"{row!r} is no row; choose from {', '.join(known)}", option)
    if options.baseline not in options.rows:
        raise InputError(f"{options.baseline} is not among --rows; add it there, or choose another", "baseline")
    output_dir = options.output_dir.resolve()
    folders = {"train_dir": options.train_dir.resolve()}
    if options.test_dir:
        folders["test_dir"] = options.test_dir.resolve()
        if options.test_list:
            raise InputError("give --test_dir or --test_list, not both", "test_list")
    for option, folder in folders.items():
        if folder in (output_dir, *output_dir.parents):
            raise InputError(f"{output_dir} lies in --{option}, where each folder is a class", "output_dir")
    if not options.report:
        check_writable(options.output_dir)
    for library in ("timm", "matplotlib", "scipy"):
        if importlib.util.find_spec(library) is None:
            start = "uv run --extra classify -m noisecutmix.compare …"
            raise InputError(f"{library} is not installed; start with: {start}")
    return options


def main() -> None:
    parser = create_parser()
    options = parse(parser)

    # The pictures, in one order of classes
    train, test, tests_on_share = load_photos(
        options.train_dir,
        options.test_dir,
        options.test_list,
        options.test_share,
        options.examples_per_class,
        options.seed,
        Source(options.split, options.train_list, options.class_names),
    )
    records = {name: read_set(folder, train) for name, folder in options.augmented.items()}
    train_hashes, test_hashes = hash_pictures(train.files), hash_pictures(test.files)
    num_leaked = len(set(train_hashes) & set(test_hashes))
    if options.report:  # of a comparison that may run on another device
        record = read_record(options.output_dir / OPTIONS_FILE, "output_dir", options=dict)
        if record is None:
            raise InputError(f"{options.output_dir} holds no comparison yet", "output_dir")
        device, dtype = "cpu", record["options"].get("dtype")
    else:
        device = script.choose_device(options.device)
        dtype = launch.choose_training_dtype(device, options.dtype)
    script.say("loading the libraries")
    sets = {name: open_set(options.augmented[name], train, record) for name, record in records.items()}

    # All that the classifiers depend on
    dependencies = {
        **parser.relevant(options, NOT_OF_RESULTS, (*FIRST_OF_RECIPE, "seed", "examples_per_class", "keep")),
        "dtype": dtype,
        "test_share": options.test_share if tests_on_share else None,
        "class_names": list(train.class_names),
        "train_pictures": digest(*zip(train.labels, train_hashes)),
        "test_pictures": digest(*zip(test.labels, test_hashes)),
        **({"banner": [train.banner, test.banner]} if train.banner or test.banner else {}),
        "augmented": {name: augmented.fingerprint for name, augmented in sets.items()},
        "timm": version("timm"),  # its weights and transforms
    }
    comparison = Comparison(
        options.output_dir,
        Recipe(**{name: dependencies[name] for name in RECIPE if name in dependencies}),
        dependencies,
        train,
        test,
        (train_hashes, test_hashes),
        sets,
        rows=options.rows,
        seeds=options.seeds,
        seed=options.seed,
        keep=options.keep,
        saves_weights=options.save_weights,
        keeps_copies=options.keep_copies,
        device=device,
        num_workers=options.num_workers,
    )

    if options.report:
        comparison.check_usable()
        from .report import format_progress

        print(format_progress(comparison))
        return

    # The pictures of a comparison that has begun are the same as then
    if comparison.check_usable():
        notes = [*train.notes, *check_photos(train.files, train.labels)]
        notes += [*test.notes, *check_photos(test.files, test.labels)]
        notes += [note for augmented in sets.values() for note in check_photos(augmented.files)]
        for note in dict.fromkeys(notes):
            script.say(note)
    if num_leaked:
        script.say(f"warning: {num_leaked} pictures are among those for training and for the test, too")

    # Train what is missing, and report
    try:
        comparison.train_missing()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise RunError("out of memory; use a smaller --batch_size in another folder") from error
        if any(sign in str(error) for sign in LOST_WORKER):
            reason = "a process that reads pictures has ended, probably for lack of shared memory (in a container?)"
            raise RunError(f"{reason}: use --num_workers=0, or start the container with --shm-size=2g") from error
        raise
    from .report import write_report

    write_report(comparison, options.baseline, num_leaked, tests_on_share)
    comparison.clear()
    if options.save_weights and launch.is_first_process():
        from .classifier import explain_loading

        print("To name the class of a picture with the classifier of a row:\n")
        print(explain_loading(comparison.weights_file(options.rows[0]), test.files[0]))


if __name__ == "__main__":
    script.run(main)
