"""What the harness adds to the loop a person would write, in time and in memory: JPEG 50 on crops of 256 px.

python tests/perf/overhead.py
"""

import itertools
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import QUICK, Row, resident_peak, side_by_side, write

from bench import Autoencoder, Data, Suite, Unit, metrics, stats
from bench.mini import features

SIZE, BATCH = 256, 16


def with_frechet() -> bool:
    return features.path().is_file()


@dataclass(frozen=True)
class Lean(Suite):
    """PSNR, SSIM and the embedded Fréchet distance, and nothing else of the reconstruction suite."""

    data: Data = "photographs"

    name = "perf-lean"
    version = 1
    requires = (Autoencoder,)

    @property
    def metrics(self):
        return (metrics.PSNR(), metrics.SSIM(), *([metrics.Frechet()] if with_frechet() else []))

    def units(self, data):
        for i, ids in enumerate(data.chunks(64)):
            yield Unit(f"{i:04d}", tuple(ids))

    def run(self, unit, model, ctx):
        from bench.metrics.pixel import quantise  # once, as the reconstruction suite does

        for ids in ctx.batches(unit):
            x = ctx.images(ids, SIZE, "none")
            yield ids, {"image": quantise(x), "recon": quantise(model.decode(model.encode(x)))}


def bare(folder: Path, model) -> list[object]:
    """The loop of an evaluation script: the same pictures, model, formulas and intervals, and nothing kept."""
    import torch
    from PIL import Image

    from bench.metrics.extractors import embedded
    from bench.metrics.frechet import paired_distance
    from bench.metrics.pixel import psnr, quantise
    from bench.metrics.ssim import ssim

    network = embedded("cpu") if with_frechet() else None
    decibels, similar, real, fake = [], [], [], []
    for paths in chunks(sorted(folder.glob("*.png"))):
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        a, b = quantise(x), quantise(model.decode(model.encode(x)))
        decibels.append(psnr(a, b))
        similar.append(ssim(a, b))
        if network:
            real.append(network(a))
            fake.append(network(b))
    found = [stats.mean(np.concatenate(decibels)), stats.mean(np.concatenate(similar))]
    return found + ([paired_distance(np.concatenate(fake), np.concatenate(real))] if network else [])


def chunks(paths: list[Path]) -> list[list[Path]]:
    return [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]


def harness(folder: Path, model, store: Path, repeat: int):
    """A whole run: specification, hashes of the pictures, records on disk, reduction, scores.csv."""
    from bench.config import How
    from bench.execution import Observer, execute
    from bench.store import Store

    how = How(store=str(store), devices="cpu", batch=BATCH, keep="none", threads=1)
    suite = Lean(data=Data(f"image-folder:{folder}"))
    observer = Observer()
    observer.say = lambda text: None
    return execute(suite, model, identity={"repeat": repeat}, store=Store(store), how=how, observer=observer)


def make_crops(folder: Path, count: int) -> None:
    """Crops of the photographs that scikit-image installs, as PNG, at random places."""
    from PIL import Image
    from skimage import data

    rng = np.random.default_rng(0)
    pictures = [p for p in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket()) if min(p.shape[:2]) > SIZE]
    for i in range(count):
        picture = pictures[i % len(pictures)]
        top, left = (int(rng.integers(side - SIZE + 1)) for side in picture.shape[:2])
        Image.fromarray(picture[top : top + SIZE, left : left + SIZE]).save(folder / f"{i:05d}.png", compress_level=1)


def peak_after(folder: Path) -> float:
    """Peak memory in MB of a process of its own that scores a folder."""
    done = subprocess.run([sys.executable, __file__, "peak", folder], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def main(count: int = 2000, repeats: int = 3) -> None:
    import torch

    from bench.adapters.codecs import Codec

    torch.set_num_threads(1)
    model = Codec(format="jpeg", quality=50)
    with tempfile.TemporaryDirectory() as root:
        many, few, store = Path(root) / "many", Path(root) / "few", Path(root) / "store"
        for folder, size in ((many, count), (few, count // 4)):
            folder.mkdir()
            make_crops(folder, size)
        number = itertools.count()
        run = harness(many, model, store, next(number))
        expected = bare(many, model)
        scores = {s.metric: s.value for s in run.scores()}
        assert abs(scores["psnr"] - expected[0].value) < 1e-9 and abs(scores["ssim"] - expected[1].value) < 1e-9
        spent = side_by_side(
            {"ours": lambda: harness(many, model, store, next(number)), "bare": lambda: bare(many, model)},
            repeats,
            time.perf_counter,
        )
        again = side_by_side(
            {"ours": lambda: harness(many, model, store, 0), "bare": lambda: None}, repeats, time.perf_counter
        )
        low, high = peak_after(few), peak_after(many)
    measured = "PSNR + SSIM" + (" + embedded Fréchet" if with_frechet() else "")
    percent = 100 * (spent["ours"] / spent["bare"] - 1)
    write(
        "overhead",
        "What the harness adds",
        [
            Row(
                f"score, {count:,} crops, {measured}",
                "bare loop",
                spent["ours"],
                spent["bare"],
                "wall s",
                0.97,
                f"{percent:+.1f} %",
            ),
            Row(
                "the same command again", "bare loop", again["ours"], spent["bare"], "wall s", "", "nothing is pending"
            ),
            Row(
                f"peak memory, {count:,} crops",
                f"{count // 4:,} crops",
                high,
                low,
                "MB",
                note=f"{high - low:+.0f} MB",
                most=round(low) + 50,
            ),
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        from bench.adapters.codecs import Codec

        with tempfile.TemporaryDirectory() as place:
            harness(Path(sys.argv[2]), Codec(format="jpeg", quality=50), Path(place), 0)
        print(resident_peak())
    else:
        main(*((160, 1) if QUICK else (2000, 3)))
