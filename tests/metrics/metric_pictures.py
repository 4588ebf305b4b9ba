"""The golden pictures of the reconstruction study: a crop and four integer degradations, known by their digests."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def golden(name: str):
    path = DATA / "reconstruction" / "golden" / name
    if not path.exists():
        pytest.skip(f"golden values ../shared/data/reconstruction/golden/{name} are absent")
    return json.loads(path.read_text())


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def box3(x: np.ndarray) -> np.ndarray:
    p = np.pad(x.astype(np.int64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    h, w, _ = x.shape
    total = sum(p[i : i + h, j : j + w] for i in range(3) for j in range(3))
    return ((2 * total + 9) // 18).astype(np.uint8)


def noise(x: np.ndarray, amplitude: int, seed: int) -> np.ndarray:
    drawn = np.random.RandomState(seed).randint(-amplitude, amplitude + 1, x.shape)
    return np.clip(x.astype(np.int64) + drawn, 0, 255).astype(np.uint8)


def golden_pictures(part: str = "crop256"):
    """uint8 [1, 3, H, W] of the original and of each degradation."""
    values = golden("metrics.json")
    from PIL import Image

    with Image.open(DATA / "reconstruction" / "images" / "cosmos" / "image.png") as image:
        full = np.asarray(image.convert("RGB"))
    y, x = values["crop_origin_yx"]
    original = full[y : y + 256, x : x + 256] if part == "crop256" else full
    if part == "crop256":
        assert sha256(original) == values["crop_sha256"]
    made = {
        "box3": box3(original),
        "noise20": noise(original, 20, 0),
        "shift1": np.concatenate([original[:, :1], original[:, :-1]], axis=1),
        "plus4": np.clip(original.astype(np.int64) + 4, 0, 255).astype(np.uint8),
    }
    for name, array in made.items():
        assert sha256(array) == values[f"{part}/{name}"]["sha256"]
    return batch(original), {name: batch(array) for name, array in made.items()}, values


def batch(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(picture.transpose(2, 0, 1))[None]
