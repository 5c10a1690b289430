"""README's lines for other libraries run; each library is in an environment of its own (see .ci/run)."""

import io
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from noisecutmix.photos import find_photos

pytestmark = pytest.mark.frameworks
TEXT = (ROOT / "noisecutmix" / "finetune" / "README.md").read_text(encoding="utf-8")
(HUB,) = re.findall(r"^```python frameworks\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


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
    exec(compile(HUB, "README.md", "exec"), {"__name__": "readme"})
    photos = find_photos(tmp_path / "photos" / "train")
    assert photos.class_names == ("707-320", "Cessna 172", "F A-18")
    found = {file.read_bytes(): photos.class_names[label] for file, label in zip(photos.files, photos.labels)}
    assert found == {content: names[label].replace("/", " ") for content, label in zip(contents, labels)}
