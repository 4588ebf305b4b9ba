"""A store for the tests of reports: image codecs of Pillow on drawn pictures, scored by formulas written out here."""

from __future__ import annotations

import io
from unittest import mock

import numpy as np
from PIL import Image

from bench import stats
from bench.identity import digest
from bench.records import record_line
from bench.store import Store
from bench.types import Record, Score


def picture(i: int, size: int = 64) -> Image.Image:
    """A smooth ground with a few shapes and some grain: 64 px, different for every i."""
    rng = np.random.default_rng(i)
    y, x = np.mgrid[0:size, 0:size] / size
    ground = np.stack([np.sin(3 * (x * rng.normal() + y * rng.normal() + rng.random())) for _ in range(3)], -1)
    for _ in range(4):
        cx, cy, r = rng.random(3) * [1, 1, 0.3]
        ground[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.uniform(-1, 1, 3)
    ground = ground + rng.normal(0, 0.05 * (i % 4), ground.shape)
    return Image.fromarray(np.clip(ground * 100 + 128, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, quality: int) -> tuple[Image.Image, int]:
    """The decoded picture and the number of bits."""
    out = io.BytesIO()
    image.save(out, kind, quality=quality)
    return Image.open(out).convert("RGB"), 8 * len(out.getvalue())


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@mock.patch("os.fsync", lambda fd: None)  # nothing here has to survive a power cut
def add_run(
    store: Store,
    model: str,
    rows: list[dict],
    *,
    suite: str = "reconstruction",
    version: int = 1,
    fields: dict | None = None,
    seed: int = 0,
    limit: int | None = None,
    expected: int | None = None,
    media: dict | None = None,
    failed: Record | None = None,
    metrics: dict | None = None,
    extra: list[Score] = (),
    **meta,
):
    """A run in the store whose scores are means of columns: metrics = {name: (unit, better)}."""
    spec = {
        "suite": suite,
        "suite_version": version,
        "fields": fields if fields is not None else {"size": 64, "data": "drawn"},
        "data": {"drawn": "d" * 64},
        "adapter": "codec",
        "adapter_args": {"name": model},
        "seed": seed,
        "limit": limit,
    }
    manifest = {
        "name": "drawn",
        "digest": "d" * 64,
        "license": "CC0-1.0",
        "redistribute": True,
        "items": len(rows),
        "clusters": len({r["cluster"] for r in rows}),
    }
    info = {
        "model": model,
        "units": 1,
        "items": len(rows) if expected is None else expected,
        "config": {},
        "command": f"bench score {suite} --model codec -m name={model}",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "packages": {"numpy": "2.4.6", "torch": "2.15.0"},
        "machine": {"platform": "Linux x86_64", "gpus": []},
        "started": "2026-01-02T03:04:05Z",
        "sensitive": False,
        "redistribute": True,
        "manifests": [manifest],
    }
    run = store.open(spec, info | meta)
    blobs = {name: store.put(data, ".png") for name, data in (media or {}).items()}
    with run.writer() as log:
        log.append(
            record_line(Record(key=digest([model, "0"])[:32], unit="0000", status="ok", rows=tuple(rows), blobs=blobs))
        )
        if failed:
            log.append(record_line(failed))
    metrics = metrics or {"psnr": ("dB", "higher"), "bpp": ("bit/px", "lower")}
    expected = len(rows) if expected is None else expected
    scores = []
    parts = [
        ("all", rows),
        *(
            (f"kind={k}", [r for r in rows if r.get("kind") == k])
            for k in sorted({r["kind"] for r in rows if "kind" in r})
        ),
    ]
    for slice_, part in parts:
        for name, (unit, better) in metrics.items():
            e = stats.mean(np.array([r[name] for r in part], float), [r["cluster"] for r in part])
            n = expected - len(rows) + len(part)
            scores.append(
                Score(
                    run.id,
                    suite,
                    version,
                    model,
                    seed,
                    name,
                    slice_,
                    e.value,
                    e.low,
                    e.high,
                    e.method,
                    e.n,
                    n,
                    e.n == n,
                    unit,
                    better,
                    f"{name}|round|v:1",
                )
            )
    run.save_scores([*scores, *extra])
    return run


def codec_rows(kind: str, quality: int, n: int = 12) -> tuple[list[dict], dict[str, bytes]]:
    rows, media = [], {}
    for i in range(n):
        original = picture(i)
        copy, bits = encode(original, kind, quality)
        a, b = (np.asarray(p, float) for p in (original, copy))
        psnr = 10 * np.log10(255**2 / np.mean((a - b) ** 2))
        fine = 10 * np.log10(np.var(a) / max(1e-9, np.var(a - b)))
        row = {"item": f"item-{i:03d}", "cluster": f"scene-{i // 2}", "kind": "grain" if i % 4 else "smooth"}
        row |= {"psnr": float(psnr), "bpp": bits / 64**2, "band-snr.low": float(fine + 9), "band-snr.mid": float(fine)}
        rows.append(row | {"band-snr.high": float(fine - 8 - quality / 50)})
        media |= {f"media/image/item-{i:03d}": png(original), f"media/recon/item-{i:03d}": png(copy)}
    return rows, media


METRICS = {
    "psnr": ("dB", "higher"),
    "bpp": ("bit/px", "lower"),
    "band-snr.low": ("dB", "higher"),
    "band-snr.mid": ("dB", "higher"),
    "band-snr.high": ("dB", "higher"),
}


def codec_store(
    root, models=(("JPEG", 20), ("JPEG", 50), ("JPEG", 80), ("WEBP", 20), ("WEBP", 50), ("WEBP", 80)), n: int = 12
) -> Store:
    """Six codecs on twelve pictures of six scenes."""
    store = Store(root)
    for kind, quality in models:
        rows, media = codec_rows(kind, quality, n)
        add_run(store, f"{kind.lower()}-{quality}", rows, media=media, metrics=METRICS)
    return store


BOARD = """
title = "Reconstruction of drawn pictures"
about = "Codecs on pictures drawn for the tests."
sources = ["store", "board/scores.csv"]

[[column]]
suite = "reconstruction"
metric = "psnr"
label = "PSNR"
digits = 2
[[column]]
suite = "reconstruction"
metric = "bpp"
[[column]]
suite = "reconstruction"
metric = "band-snr.high"
label = "fine SNR"

[rank]
by = "reconstruction:psnr"

[[figure]]
kind = "scatter"
suite = "reconstruction"
title = "Rate and distortion"
x = "bpp"
y = "psnr"
note = "Lines join the qualities of one codec."
[[figure]]
kind = "profile"
suite = "reconstruction"
title = "Signal to noise by band"
metric = "band-snr"
[[figure]]
kind = "forest"
suite = "reconstruction"
title = "PSNR"
metric = "psnr"
"""


def write_board(folder, text: str = BOARD, name: str = "board"):
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path
