"""Conformance of autoencoders, of images and of videos."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.capabilities import Latents
from bench.checks.report import CLOSE, REPEAT, STEP, Report, batches, compare, form, is_picture, kept

if TYPE_CHECKING:
    from torch import Tensor


def autoencoder(model: Any, report: Report) -> None:
    _reconstruct(model, report, model.encode, model.decode, report.pictures(4))


def video_autoencoder(model: Any, report: Report) -> None:
    """Lengths first: 1 + k * temporal_factor where the model names its factor, else those that it takes."""
    factor = getattr(model, "temporal_factor", None)
    legal = [1, 1 + factor, 1 + 2 * factor] if isinstance(factor, int) and factor > 0 else None
    good = []
    for frames in legal or [1, 4, 5, 8, 9, 17]:
        clips = report.pictures(1, frames)
        y, raised = report.attempt(lambda clips=clips: model.decode_video(model.encode_video(clips)))
        if raised:  # refusing a length is a model's right, and how it says so is shown
            report.add(f"{frames} frames", "fail" if legal else "ok", f"refused: {raised[:150]}")
            continue
        came = tuple(getattr(y, "shape", ()))
        if report.judge(f"{frames} frames", came == clips.shape, f"{list(came)} for {list(clips.shape)}"):
            good.append(frames)
    if not [n for n in good if n > 1]:
        report.add("lengths", "fail", "no clip of more than one frame came back with its own length")
        return
    _reconstruct(
        model, report, model.encode_video, model.decode_video, report.pictures(4, min(n for n in good if n > 1))
    )


def _reconstruct(model: Any, report: Report, encode: Callable, decode: Callable, x: Tensor) -> None:
    import torch

    original = x.clone()
    latents = report.call("encode", encode, x)
    if latents is None or not _are_latents(report, latents, len(x)):
        return
    report.judge("encode leaves its input alone", torch.equal(x, original), "it changes the images in place")
    x = original.clone()
    y = report.call("decode", decode, latents)
    if y is None or not is_picture(report, "decode", y, x.shape, -10.0, 10.0):
        return
    copy = y.clone()
    _plausible(report, x, y)

    again = report.call("twice", lambda: decode(encode(x)))
    compare(report, "twice", copy, again, 0.0, REPEAT, "without seeds the decoder must be deterministic")
    batches(report, model, copy, lambda i: decode(encode(x[i : i + 1])))
    kept(report, "decoded pictures", y, copy)

    seeds = report.seeds(len(x))
    drawn = report.call("decode with seeds", decode, encode(x), list(seeds))
    if drawn is not None and is_picture(report, "decode with seeds", drawn, x.shape, -10.0, 10.0):
        drawn = drawn.clone()
        again = report.call("same seeds twice", decode, encode(x), list(seeds))
        compare(report, "same seeds twice", drawn, again, 0.0, REPEAT, "the same seed must give the same picture")
        last = report.call("seed of one item", decode, encode(x[-1:]), [seeds[-1]])
        why = "a picture must depend on its own seed alone"
        compare(report, "seed of one item", last, drawn[-1:], CLOSE, STEP, why)
        stochastic = not torch.equal(drawn, copy)
        report.add("seeds", "ok", "decoding with seeds is stochastic" if stochastic else "seeds change nothing")

    black, white = (report.call(n, lambda v=v: decode(encode(torch.full_like(x[:1], v)))) for n, v in EXTREMES)
    if black is not None and white is not None:
        finite = bool(torch.isfinite(black).all() and torch.isfinite(white).all())
        if report.judge("black and white: finite", finite, "NaN or inf for a black or a white picture"):
            told = f"black {float(black.mean()):.3g}, white {float(white.mean()):.3g} on average"
            brighter = float(white.mean()) > float(black.mean())
            trained = float((x - copy).square().mean()) < 0.04  # 20 dB: then only an overflow turns white dark
            report.judge("white is brighter than black", brighter, told, "fail" if trained else "warn", fine=told)


EXTREMES = (("black", -1.0), ("white", 1.0))


def _are_latents(report: Report, latents: Any, n: int) -> bool:
    """Batch, numbers, bits and codes of what `encode` returned."""
    import torch

    data = latents.data if isinstance(latents, Latents) else latents
    if not isinstance(latents, (Latents, torch.Tensor)):
        return report.add("latents", "fail", f"{type(latents).__name__} instead of a tensor or Latents")
    if isinstance(data, torch.Tensor) and (data.dim() == 0 or len(data) != n or data.numel() == 0):
        return report.add("latents", "fail", f"shape {list(data.shape)} for {n} items")
    if isinstance(data, (list, tuple)) and len(data) != n:
        return report.add("latents", "fail", f"{len(data)} entries for {n} items")
    if isinstance(data, torch.Tensor) and data.is_floating_point() and not bool(torch.isfinite(data).all()):
        return report.add("latents", "fail", f"{int((~torch.isfinite(data)).sum())} values are not finite")
    if not isinstance(latents, Latents):
        bits = 8 * data.element_size() * data[0].numel()
        return report.add("latents", "ok", f"{form(data)}, {bits} bits an item by dtype")
    for name, values, floor in (("bits", latents.bits, 1e-9), ("side_bits", latents.side_bits, 0.0)):
        values = [float(v) for v in values]
        if name == "side_bits" and not values:
            continue
        if len(values) != n:
            return report.add(name, "fail", f"{len(values)} numbers for {n} items")
        if not all(math.isfinite(v) and v >= floor for v in values):
            return report.add(name, "fail", f"{min(values)} to {max(values)}: must be finite and positive")
    codes = latents.indices
    if codes is not None:
        if codes.dtype != torch.int64 or len(codes) != n or int(codes.min()) < 0:
            return report.add(
                "indices", "fail", f"{form(codes)}, least {int(codes.min())}; want int64 [{n}, ...] from 0"
            )
        report.add("indices", "ok", f"{len(codes.unique())} different codes in {codes.numel()}")
    return report.add("latents", "ok", f"{float(min(latents.bits)):g} to {float(max(latents.bits)):g} bits an item")


def _plausible(report: Report, x: Tensor, y: Tensor) -> None:
    """Does another range or order of channels fit the input far better than the one promised?"""
    error = float((x - y).square().mean())
    others = {"[0, 1]": 2 * y - 1, "[-0.5, 0.5]": 2 * y, "BGR": y.flip(1)}
    closest = min(others, key=lambda k: float((x - others[k]).square().mean()))
    fits = float((x - others[closest]).square().mean())
    psnr = f"{10 * math.log10(4 / max(error, 1e-12)):.1f} dB on the test picture"
    good = error < 1e-4 or fits > error / 4
    report.judge("range and channels", good, f"looks like {closest} instead of RGB in [-1, 1]", fine=psnr)
    if len(x) > 1 and bool((y[:1] == y[1:]).all()):
        report.add("input matters", "fail", "the same picture comes back for every input")
