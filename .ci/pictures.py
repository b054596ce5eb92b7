"""Makes a small learnable `folder` data set: .ci/pictures.py FOLDER. Three classes told by colour, in noise."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def main(root: Path) -> None:
    """Writes 100 + 40 images of 32 x 32 a class."""
    random = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 40)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = np.array(colour) + random.integers(-40, 41, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
