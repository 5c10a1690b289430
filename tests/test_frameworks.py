"""README's lines for other libraries run; these are in an environment of their own (see .ci/run)."""

import io
import re
import shutil

import numpy as np
import pytest
import torch
from drawing import ROOT, as_command_line
from PIL import Image

from noisecutmix import AugmentedDataset, MixedDataset
from noisecutmix.photos import find_photos

pytestmark = pytest.mark.frameworks
FILES = ("noisecutmix/README.md", "noisecutmix/finetune/README.md")
TEXT = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in FILES)
BLOCKS = dict(re.findall(r"^```python frameworks (\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
NAMES = ["blue jay", "grey heron", "wren"]


def run_block(name, **values):
    """Run a block in a namespace of these values, and return the namespace."""
    space = {"__name__": "readme", "torch": torch, **values}
    exec(compile(BLOCKS[name], f"README.md, {name}", "exec"), space)
    return space


class Recorded(torch.utils.data.Dataset):
    """Real pictures, or augmented ones, that remember in a list which were drawn."""

    class_names = NAMES

    def __init__(self, drawn, is_real):
        self.drawn, self.is_real = drawn, is_real

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.drawn.append((self.is_real, index))
        label = index % 3 if self.is_real else torch.eye(3)[index % 3]
        return torch.zeros(3, 8, 8), label


@pytest.fixture(scope="module")
def augmented_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frameworks")
    flags = ["--num_aug=12", "--output_dir=outputs/digits", "--device=cpu"]
    with as_command_line("augmentation.py", "--data_name=digits", *flags, folder=folder) as main:
        main()
    return folder / "outputs" / "digits"


@pytest.fixture
def drawn():
    return []


@pytest.fixture
def mixed(drawn):
    return MixedDataset(Recorded(drawn, True), Recorded(drawn, False), 0.5, seed=3)


def draw_epoch(epoch):
    """Return which pictures an epoch has, whatever their order."""
    drawn = []
    data = MixedDataset(Recorded(drawn, True), Recorded(drawn, False), 0.5, seed=3)
    data.set_epoch(epoch)
    for index in range(len(data)):
        data[index]
    return sorted(drawn)


@pytest.mark.parametrize("is_seedable", [False, True])
def test_accelerate_draws_the_epochs_of_a_resumed_training(drawn, mixed, is_seedable):
    accelerate = pytest.importorskip("accelerate")
    settings = accelerate.DataLoaderConfiguration(use_seedable_sampler=is_seedable)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=settings)
    run_block(
        "accelerate", accelerator=accelerator, mixed=mixed, first_epoch=2, num_epochs=4, train_step=lambda *_: None
    )
    assert [sorted(drawn[:24]), sorted(drawn[24:])] == [draw_epoch(2), draw_epoch(3)]


def test_lightning_draws_another_epoch_each_time(drawn, mixed, tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 8 * 8, 3)

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    space = run_block("lightning", lightning=lightning, mixed=mixed, num_epochs=2)
    space["trainer"].fit(Model(), space["Data"]())
    assert [sorted(drawn[:24]), sorted(drawn[24:])] == [draw_epoch(0), draw_epoch(1)]
    drawn.clear()
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    space = run_block("lightning", lightning=lightning, mixed=mixed, num_epochs=3)
    space["trainer"].fit(Model(), space["Data"](), ckpt_path=checkpoint)
    assert sorted(drawn) == draw_epoch(2)


def test_transformers_trains_with_soft_labels(drawn, mixed, tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_labels": 3}
    config = transformers.ViTConfig(**settings, num_attention_heads=2, num_hidden_layers=1)
    model = transformers.ViTForImageClassification(config)
    arguments = transformers.TrainingArguments(str(tmp_path), num_train_epochs=2, report_to=[], use_cpu=True)
    trainer = run_block("transformers", transformers=transformers, mixed=mixed, model=model, arguments=arguments)[
        "trainer"
    ]
    trainer.train()
    assert [sorted(drawn[:24]), sorted(drawn[24:])] == [draw_epoch(0), draw_epoch(1)]
    images, labels = torch.zeros(4, 3, 8, 8), torch.full((4, 3), 1 / 3)
    expected = torch.nn.functional.cross_entropy(model(images).logits, labels)
    assert trainer.compute_loss(model, {"pixel_values": images, "labels": labels}) == expected


def test_the_transform_of_timms_loader_reaches_both_data_sets(tmp_path, augmented_digits):
    timm = pytest.importorskip("timm")
    from torchvision.datasets import ImageFolder

    augmented = AugmentedDataset(augmented_digits)
    for name in augmented.class_names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    mixed = MixedDataset(torch.utils.data.Subset(ImageFolder(tmp_path), range(8)), augmented, 0.5)
    seen = []
    run_block("timm", timm=timm, mixed=mixed, first_epoch=0, num_epochs=2, train_step=lambda *batch: seen.append(batch))
    assert len(seen) == 2
    for images, soft_labels in seen:
        assert images.shape == (8, 3, 224, 224) and soft_labels.shape == (8, 10)
        assert soft_labels.sum(1) == pytest.approx(torch.ones(8))


def test_torchmetrics_counts_the_class_of_a_soft_label():
    torchmetrics = pytest.importorskip("torchmetrics")
    logits, soft_labels = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([[0.7, 0.3, 0], [0, 1, 0], [0.6, 0, 0.4], [1, 0, 0]])
    space = run_block("torchmetrics", torchmetrics=torchmetrics, logits=logits, soft_labels=soft_labels, num_classes=3)
    assert space["accuracy"].compute() == 0.75


def test_the_labels_are_added_to_a_hub_data_set(tmp_path, monkeypatch, augmented_digits):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(augmented_digits.parent.parent)
    run_block("datasets", datasets=datasets, numpy=np)
    shutil.copytree("outputs/digits_with_labels", tmp_path / "elsewhere")
    ours, theirs = AugmentedDataset(augmented_digits), datasets.load_from_disk(tmp_path / "elsewhere")
    assert len(ours) == len(theirs)
    for index, row in enumerate(theirs):
        image, label = ours[index]
        assert list(row["soft_label"]) == label.tolist()
        assert np.array_equal(row["image"], image)


def test_a_data_set_of_the_hub_becomes_class_folders(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rng, labels, contents = np.random.default_rng(0), [1, 0, 2, 1], []
    for _ in labels:
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(content, format="JPEG")
        contents.append(content.getvalue())
    names = ["707-320", "F/A-18", "Cessna 172"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "birds.parquet")
    monkeypatch.chdir(tmp_path)
    run_block("folders")
    photos = find_photos(tmp_path / "photos" / "train")
    assert photos.class_names == ("707-320", "Cessna 172", "F A-18")
    found = {file.read_bytes(): photos.class_names[label] for file, label in zip(photos.files, photos.labels)}
    assert found == {content: names[label].replace("/", " ") for content, label in zip(contents, labels)}
