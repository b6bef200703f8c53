"""Small archives of drawn images, and a task file for them. No image here is real."""

from pathlib import Path
from typing import Any

import numpy as np

SIDE_PX = 32
ONE_TASK = """
name = "drawn"
version = "1"

[[tasks]]
name = "chest-ct"
modality = "CT"
archive = "squares.npz"
attribution = "Drawn by the test's author."
licence = "CC0, for the taking"
limits = "Squares only."

[tasks.input]
normalisation = "window"
max_slices = 2
black = -1000.0
white = 500.0

[tasks.classes]
dark = { label = "normal", sct = "17621005", meaning = "Normal", is_finding = false }
square = { label = "nodule", sct = "427359005", meaning = "Solitary nodule of lung", is_finding = true }
"""
OTHER_TASK = """
[[tasks]]
name = "chest-xray"
modality = "XR"
archive = "stripes.npz"
attribution = "Drawn by the test's other author."
licence = "CC BY 4.0"
limits = "Stripes only."

[tasks.input]
normalisation = "percentile"
max_slices = 1

[tasks.classes]
plain = { label = "normal", sct = "17621005", meaning = "Normal", is_finding = false }
striped = { label = "pneumonia", sct = "233604007", meaning = "Pneumonia", is_finding = true }
"""


def squares(train: int = 220, val: int = 40) -> dict[str, Any]:
    """Every second image has a bright square; classes are named in the other order than in the task file."""
    generator = np.random.default_rng(0)
    images_NHW = generator.integers(0, 60, (train + val, SIDE_PX, SIDE_PX), np.uint8)
    label_N = np.arange(train + val) % 2  # 0: square
    for n in np.flatnonzero(label_N == 0):
        top, left = generator.integers(4, 16, 2)
        images_NHW[n, top : top + 12, left : left + 12] += 160
    split_N = np.array(["train"] * train + ["val"] * val)
    return {"images": images_NHW, "labels": label_N, "class_names": np.array(["square", "dark"]), "split": split_N}


def stripes(train: int = 220, val: int = 40) -> dict[str, Any]:
    arrays = squares(train, val)
    images_NHW = np.random.default_rng(1).integers(0, 60, arrays["images"].shape, np.uint8)
    images_NHW[arrays["labels"] == 1, ::4] += 160
    return arrays | {"images": images_NHW, "class_names": np.array(["plain", "striped"])}


def write_archives(folder: Path) -> None:
    np.savez(folder / "squares.npz", **squares())
    np.savez(folder / "stripes.npz", **stripes())


def write_tasks(folder: Path, text: str = ONE_TASK + OTHER_TASK) -> Path:
    path = folder / "tasks.toml"
    path.write_text(text, "utf-8")
    return path
