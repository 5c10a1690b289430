"""The output folder of generation.py: gen_0000.png … and preview.png of one run."""

from pathlib import Path

from PIL import Image

from .errors import InputError
from .files import write_png

COMMENT = "drawn by generation.py of NoiseCutMix"
PARTS_OF_A_DATA_SET = ("run.json", "metadata.jsonl", "soft_label.npy")


class PictureFolder:
    """A folder to write pictures into.

    Args:
        root: the folder.
        num_pictures: the number of pictures of this run.

    Raises:
        InputError: the folder holds a data set, whose preview must not be replaced.
    """

    def __init__(self, root: Path, num_pictures: int):
        self.root = root
        self._digits = max(4, len(str(num_pictures - 1)))
        if any((root / name).exists() for name in PARTS_OF_A_DATA_SET):
            raise InputError(f"`output_dir`: {root} holds a data set; choose another folder")

    def begin(self) -> None:
        """Create the folder, and delete the pictures that an earlier run of generation.py wrote there."""
        self.root.mkdir(parents=True, exist_ok=True)
        for file in (*self.root.glob("gen_*.png"), *self.root.glob("preview.png")):
            if _is_ours(file):
                file.unlink()

    def write(self, index: int, image: Image.Image) -> None:
        write_png(self.root / f"gen_{index:0{self._digits}d}.png", image, COMMENT)

    def write_preview(self, image: Image.Image) -> None:
        write_png(self.root / "preview.png", image, COMMENT)


def _is_ours(file: Path) -> bool:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return bool(image.info.get("Comment") == COMMENT)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
