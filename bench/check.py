"""Conformance of an adapter: what its capabilities promise, tried on a few inputs and reported line by line.

Nothing here judges quality. A `fail` breaks the contract and would spoil scores; a `warn` is worth a look.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bench.capabilities import CAPABILITIES, Answer, Completion, Latents, held, methods
from bench.identity import seed_for

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = ("a red house by a lake", "two cats", "a portrait of an old sailor", "an empty street at night")
REPEAT = 1e-4  # how far the same call twice may differ: some GPU kernels add in any order
STEP = 2 / 255  # one step of 8 bits, for pictures in [-1, 1]
CLOSE = 1e-3  # how far pictures in [-1, 1] may differ between batch sizes without a word


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    name: str  # "Autoencoder: same seed twice"
    status: Literal["ok", "warn", "fail"]
    detail: str = ""


def check(model: Any, *, size: int = 64, seed: int = 0, device: str | None = None) -> list[Finding]:
    """Tries every capability that an object holds, on pictures of `size` px; a fault of the model is a finding.

    `device` is where inputs lie and pictures must come back; by default the model's own `device`, or the CPU.
    """
    report = Report(str(device or getattr(model, "device", None) or "cpu"), size, seed)
    names = held(model)
    for capability in CAPABILITIES:
        present = [m for m in methods(capability) if callable(getattr(model, m, None))]
        missing = sorted(set(methods(capability)) - set(present))
        if present and missing and len(present) >= len(missing):
            report.add(capability.__name__, "warn", f"not held: {', '.join(present)} but no {', '.join(missing)}")
    if not names:
        report.add("capabilities", "fail", f"none; known: {', '.join(c.__name__ for c in CAPABILITIES)}")
    before = _global_state()
    if "PictureSet" in names:  # what is there already can be looked up, not asked for
        names = tuple(name for name in names if name != "TextToImage")
    for name in names:
        report.about = name
        report.call("conformance", TESTS[name], model, report)
    report.about = ""
    same = before == _global_state()
    note = (
        "untouched" if same else "changed: the model draws from global random state, or seeds it; use the seeds given"
    )
    report.add("global random state", "ok" if same else "warn", note)
    return report.findings


class Report:
    """The findings so far, and how to try something that may break."""

    def __init__(self, device: str, size: int, seed: int):
        self.device, self.size, self.seed = device, size, seed
        self.about = ""
        self.findings: list[Finding] = []

    def add(self, name: str, status: str, detail: str = "") -> bool:
        """Records a finding; True unless it is a failure."""
        self.findings.append(Finding(f"{self.about}: {name}" if self.about else name, status, detail))
        return status != "fail"

    def judge(self, name: str, good: bool, fault: str, status: str = "fail", fine: str = "") -> bool:
        """Records ok, or the fault with its status; returns `good`."""
        self.add(name, "ok" if good else status, fine if good else fault)
        return good

    def call(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """What the model returns; None, and a failure on record, where it raises."""
        try:
            return function(*args, **kwargs)
        except Exception as e:  # a foreign model may fail in any way, and that is a finding
            self.add(name, "fail", f"raised {type(e).__name__}: {str(e)[:200]}")
            return None

    def seeds(self, n: int) -> list[int]:
        return [seed_for(self.seed, "check", 1, str(i), "latent") for i in range(n)]

    def noise(self, shape: Sequence[int], name: str) -> Tensor:
        """Standard normal float32 on the device."""
        import torch

        generator = torch.Generator().manual_seed(seed_for(self.seed, "check", 1, name, "noise"))
        return torch.randn(tuple(shape), generator=generator).to(self.device)

    def pictures(self, n: int, frames: int | None = None) -> Tensor:
        """float32 [n, 3, size, size] in [-1, 1], or [n, 3, frames, size, size]: coloured waves with a little grain."""
        import torch

        side = torch.linspace(0, 1, self.size)
        t = torch.arange(frames or 1).reshape(1, 1, -1, 1, 1) / 16
        item = torch.arange(n).reshape(-1, 1, 1, 1, 1)
        channel = torch.arange(3).reshape(1, 3, 1, 1, 1)
        waves = torch.sin((5 + channel + item) * side + t) * torch.cos((4 + item) * side[:, None] + channel)
        waves = (0.8 * waves.to(self.device) + 0.05 * self.noise(waves.shape, "grain")).clamp(-1, 1)
        return waves if frames else waves[:, :, 0]


# -- pictures, whoever makes them


def _is_picture(report: Report, name: str, y: Any, shape: Sequence[int], low: float, high: float) -> bool:
    """Type, dtype, shape, device, numbers and spread of pictures that a model returned."""
    import torch

    if not isinstance(y, torch.Tensor):
        return report.add(f"{name}: type", "fail", f"{type(y).__name__} instead of a tensor")
    if y.dtype != torch.float32:
        return report.add(f"{name}: dtype", "fail", f"{str(y.dtype)[6:]} instead of float32")
    if tuple(y.shape) != tuple(shape):
        return report.add(f"{name}: shape", "fail", f"{list(y.shape)} instead of {list(shape)}")
    if y.device.type != torch.device(report.device).type:
        return report.add(f"{name}: device", "fail", f"{y.device} instead of {report.device}")
    if y.requires_grad:
        report.add(f"{name}: gradient", "warn", "pictures carry a graph, which costs memory; use torch.no_grad")
    bad = int((~torch.isfinite(y)).sum())
    if bad:
        kinds = f"{int(y.isnan().sum())} NaN, {int(y.isinf().sum())} inf"
        return report.add(f"{name}: finite", "fail", f"{bad} of {y.numel()} values are not ({kinds})")
    least, most = float(y.min()), float(y.max())
    spread = f"{least:.3g} to {most:.3g}"
    if least < low or most > high:
        return report.add(f"{name}: range", "fail", f"{spread} instead of {low:g} to {high:g}")
    report.add(f"{name}: shape, dtype, range", "ok", f"{list(y.shape)} float32, {spread}")
    flat = int((y.flatten(1).amax(1) == y.flatten(1).amin(1)).sum())
    if flat:
        report.add(f"{name}: content", "warn", f"{flat} of {len(y)} pictures have one value only")
    return True


def _compare(report: Report, name: str, a: Any, b: Any, near: float, far: float, why: str) -> None:
    """ok up to `near`, warn up to `far`, fail beyond; the largest difference is always printed."""
    if a is None or b is None:
        return
    if _form(a) != _form(b):
        report.add(name, "fail", f"{_form(a)} against {_form(b)}")
        return
    gap = float((a.detach().double() - b.detach().double()).abs().max())
    status = "ok" if gap <= near else "warn" if gap <= far else "fail"
    report.add(name, status, f"largest difference {gap:.3g}" + (f"; {why}" if status != "ok" else ""))


def _form(x: Any) -> str:
    return f"{list(x.shape)} {str(x.dtype)[6:]}" if hasattr(x, "shape") else type(x).__name__


def _batches(report: Report, model: Any, whole: Tensor, one: Callable[[int], Any]) -> None:
    """Items made one at a time, by `one`, against the batch of all."""
    import torch

    single = []
    for i in range(len(whole)):
        y = report.call("batch 1", one, i)
        if y is None:
            return
        if not isinstance(y, torch.Tensor) or y.shape != whole[:1].shape:
            report.add("batch 1", "fail", f"{_form(y)} for one item")
            return
        single.append(y)
    far = math.inf if getattr(model, "batch_matters", False) else STEP
    why = "an item must not depend on its batch; set batch_matters = True if it cannot be mended"
    _compare(report, f"batch 1 against batch {len(whole)}", torch.cat(single), whole, CLOSE, far, why)


# -- generators


def _generator(model: Any, report: Report, method: Callable, what: str, inputs: Sequence[Any]) -> None:
    seeds = report.seeds(4)
    first = report.call(what, method, list(inputs), list(seeds))
    if first is None:
        return
    shape = tuple(getattr(first, "shape", ()))
    if not _is_picture(report, "pictures", first, (4, 3, *(shape[2:4] if len(shape) == 4 else ("H", "W"))), 0.0, 1.0):
        return
    copy = first.clone()
    again = report.call("same seed twice", method, list(inputs), list(seeds))
    _compare(report, "same seed twice", copy, again, 0.0, REPEAT, "the same seed must give the same picture")
    _batches(report, model, copy, lambda i: method([inputs[i]], [seeds[i]]))
    other = report.call("other seeds", method, [inputs[0]] * 4, list(seeds))
    if getattr(other, "shape", None) == copy.shape:
        told_apart = all(float((other[0] - other[i]).abs().max()) > 0 for i in range(1, 4))
        report.judge("seeds matter", told_apart, "two seeds give the same picture")
    same = report.call("one seed", method, list(inputs), [seeds[0]] * 4)
    others = [i for i in range(4) if inputs[i] != inputs[0]]
    if others and getattr(same, "shape", None) == copy.shape:
        told_apart = all(float((same[0] - same[i]).abs().max()) > 0 for i in others)
        report.judge(f"{what} matter", told_apart, "the picture is the same whatever is asked for", "warn")
    _kept(report, "pictures", first, copy)


def _kept(report: Report, name: str, kept: Tensor, copy: Tensor) -> None:
    """Did later calls write into what an earlier call returned?"""
    good = bool((kept == copy).all())
    report.judge(f"{name} stay as returned", good, "a later call changed them: return a new tensor, not a buffer")


def _text_to_image(model: Any, report: Report) -> None:
    _generator(model, report, model.generate, "prompts", PROMPTS)


def _picture_set(model: Any, report: Report) -> None:
    """Names that stay, and the same pictures whoever asks for them in whatever order."""
    names = list(model.names())
    good = bool(names) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
    if not report.judge("names", good, "want texts, each once, at least one", fine=f"{len(names)}"):
        return
    report.judge("names stay", list(model.names()) == names, "a second call gives others, or another order")
    first = model.pictures(names[:2])
    good = len(first) == len(names[:2]) and all(
        isinstance(p, np.ndarray) and p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 and p.size for p in first
    )
    if report.judge("pictures", good, f"{[_form(p) for p in first]} instead of uint8 [H, W, 3] arrays"):
        again = model.pictures(names[:2][::-1])[::-1]
        same = all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        report.judge("same pictures in another order", same, "a picture depends on what is asked for beside it")


def _class_to_image(model: Any, report: Report) -> None:
    n = getattr(model, "num_classes", None)
    if type(n) is not int or n < 1:
        report.add("num_classes", "fail", f"{n!r} instead of a positive whole number")
        return
    report.add("num_classes", "ok", str(n))
    _generator(model, report, model.generate_classes, "labels", [i * (n - 1) // 3 for i in range(4)])


# -- autoencoders


def _autoencoder(model: Any, report: Report) -> None:
    _reconstruct(model, report, model.encode, model.decode, report.pictures(4))


def _video_autoencoder(model: Any, report: Report) -> None:
    """Lengths first: 1 + k * temporal_factor where the model names its factor, else those that it takes."""
    factor = getattr(model, "temporal_factor", None)
    legal = [1, 1 + factor, 1 + 2 * factor] if isinstance(factor, int) and factor > 0 else None
    good = []
    for frames in legal or [1, 4, 5, 8, 9, 17]:
        clips = report.pictures(1, frames)
        try:
            y = model.decode_video(model.encode_video(clips))
        except Exception as e:  # refusing a length is a model's right, and how it says so is shown
            status = "fail" if legal else "ok"
            report.add(f"{frames} frames", status, f"refused: {type(e).__name__}: {str(e)[:120]}")
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
    if y is None or not _is_picture(report, "decode", y, x.shape, -10.0, 10.0):
        return
    copy = y.clone()
    _plausible(report, x, y)

    again = report.call("twice", lambda: decode(encode(x)))
    _compare(report, "twice", copy, again, 0.0, REPEAT, "without seeds the decoder must be deterministic")
    _batches(report, model, copy, lambda i: decode(encode(x[i : i + 1])))
    _kept(report, "decoded pictures", y, copy)

    seeds = report.seeds(len(x))
    drawn = report.call("decode with seeds", decode, encode(x), list(seeds))
    if drawn is not None and _is_picture(report, "decode with seeds", drawn, x.shape, -10.0, 10.0):
        drawn = drawn.clone()
        again = report.call("same seeds twice", decode, encode(x), list(seeds))
        _compare(report, "same seeds twice", drawn, again, 0.0, REPEAT, "the same seed must give the same picture")
        last = report.call("seed of one item", decode, encode(x[-1:]), [seeds[-1]])
        why = "a picture must depend on its own seed alone"
        _compare(report, "seed of one item", last, drawn[-1:], CLOSE, STEP, why)
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
        return report.add("latents", "ok", f"{_form(data)}, {bits} bits an item by dtype")
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
                "indices", "fail", f"{_form(codes)}, least {int(codes.min())}; want int64 [{n}, ...] from 0"
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


# -- white box


def _denoiser_access(model: Any, report: Report) -> None:
    import torch

    n = 2
    ids = report.call("tokenize", model.tokenize, list(PROMPTS[:n]))
    if ids is None or not report.judge(
        "tokenize", getattr(ids, "dtype", None) == torch.int64 and ids.dim() == 2 and len(ids) == n, _form(ids)
    ):
        return
    text = report.call("detokenize", model.detokenize, ids)
    good = isinstance(text, list) and len(text) == n and all(isinstance(t, str) for t in text)
    report.judge("detokenize", good, "must return one text per row")
    table = report.call("token_embeddings", model.token_embeddings)
    if table is None or not report.judge(
        "token_embeddings",
        table.dim() == 2 and int(ids.max()) < len(table),
        f"{_form(table)}, largest id {int(ids.max())}",
    ):
        return
    embeddings = table.detach()[ids.to(table.device)]
    condition = report.call("condition", model.condition, ids)
    replaced = report.call("condition with embeddings", model.condition, ids, embeddings)
    if condition is None or replaced is None:
        return
    near, far = 1e-4, 1e-2
    why = "the embeddings of the ids must give what the ids give"
    _compare(report, "condition with embeddings", replaced.hidden, condition.hidden, near, far, why)

    shape = report.call("latent_shape", model.latent_shape, report.size)
    if shape is None or not report.judge("latent_shape", len(shape) == 3, f"{shape} instead of (c, h, w)"):
        return
    x = report.pictures(n)
    z = report.call("to_latent", model.to_latent, x)
    if z is None or not report.judge("to_latent", tuple(z.shape) == (n, *shape), f"{_form(z)}, latent_shape {shape}"):
        return
    z = z.detach()
    back = report.call("from_latent", model.from_latent, z)
    if back is not None:
        _is_picture(report, "from_latent", back.detach(), x.shape, -10.0, 10.0)
    t = torch.full((n,), int(getattr(model, "num_timesteps", 1000)) // 2, device=z.device)
    noise = report.noise(z.shape, "latent").to(z.dtype)
    noisy = report.call("add_noise", model.add_noise, z, t, noise)
    target = report.call("target", model.target, z, noise, t)
    predicted = report.call("predict", model.predict, noisy, t, condition) if noisy is not None else None
    for name, value in (("add_noise", noisy), ("target", target), ("predict", predicted)):
        if value is not None:
            good = value.shape == z.shape and bool(torch.isfinite(value).all())
            report.judge(name, good, f"{_form(value)}, or not finite; latents are {_form(z)}", fine=_form(value))
    if predicted is None or predicted.shape != z.shape:
        return

    weight = report.noise(z.shape, "weight").to(z.dtype)
    _gradient(
        report,
        "gradient to embeddings",
        lambda e: (model.predict(noisy.detach(), t, model.condition(ids, e)) * weight).sum(),
        embeddings,
    )
    _gradient(
        report,
        "gradient to latents",
        lambda v: (model.predict(v, t, model.condition(ids)) * weight).sum(),
        noisy.detach(),
    )
    _sampling(model, report, condition, shape)
    _parts(model, report, noisy.detach(), t, condition, predicted.detach())


def _gradient(report: Report, name: str, f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The derivative in one direction by autograd against central differences at the best of three steps."""
    import torch

    point = x.clone().requires_grad_(True)
    value = report.call(name, f, point)
    if value is None:
        return
    if not value.requires_grad:
        report.add(name, "fail", "no gradient flows: something is detached or runs under no_grad")
        return
    (gradient,) = torch.autograd.grad(value, point, allow_unused=True)
    if gradient is None:
        report.add(name, "fail", "no gradient arrives: the input is not used, or was detached")
        return
    direction = report.noise(x.shape, name).to(x)
    direction = direction / direction.norm() + gradient / gradient.norm().clamp_min(1e-30)  # not by chance orthogonal
    expected = float((gradient.double() * direction.double()).sum())
    best, measured = math.inf, math.nan
    with torch.no_grad():
        for relative in (1e-1, 1e-2, 1e-3):
            h = relative * float(x.norm()) / math.sqrt(x.numel()) or relative
            up, down = (report.call(name, f, x + sign * h * direction) for sign in (1, -1))
            if up is None or down is None:
                return
            slope = (float(up) - float(down)) / (2 * h)
            error = abs(slope - expected) / max(abs(slope), abs(expected), 1e-30)
            if error < best:
                best, measured = error, slope
    status = "ok" if best < 0.02 else "warn" if best < 0.1 else "fail"
    report.add(name, status, f"autograd {expected:.4g}, differences {measured:.4g}, off by {100 * best:.2g} %")


def _sampling(model: Any, report: Report, condition: Any, shape: Sequence[int]) -> None:
    n = len(condition.hidden)
    seeds = report.seeds(n)
    first = report.call("sample", model.sample, condition, seeds, 2.0, 3)
    if first is None:
        return
    if not report.judge("sample", tuple(first.shape) == (n, *shape), f"{_form(first)} instead of {[n, *shape]}"):
        return
    copy = first.detach().clone()
    again = report.call("same seed twice", model.sample, condition, seeds, 2.0, 3)
    if again is not None:
        why = "the same seed must give the same latent"
        _compare(report, "same seed twice", again.detach(), copy, 0.0, REPEAT, why)
    partial = report.call("stop_at", model.sample, condition, seeds, 2.0, 3, 1)
    if partial is not None:
        good = partial.shape == first.shape and bool((partial != copy).any())
        report.judge("stop_at", good, "stopping after one of three steps must give another latent of the same shape")


def _parts(model: Any, report: Report, noisy: Tensor, t: Tensor, condition: Any, predicted: Tensor) -> None:
    import torch

    parts = report.call("modules", model.modules)
    if parts is None:
        return
    good = isinstance(parts, Mapping) and bool(parts) and all(isinstance(m, torch.nn.Module) for m in parts.values())
    if not report.judge("modules", good, "must map names to torch modules", fine=", ".join(parts) if good else ""):
        return
    twin = report.call("clone", model.clone)
    if twin is None:
        return
    own = {p.data_ptr() for m in parts.values() for p in m.parameters() if p.numel()}
    shared = sum(p.data_ptr() in own for m in twin.modules().values() for p in m.parameters())
    report.judge(
        "clone", shared == 0, f"{shared} parameters are shared with the model, so training it moves the teacher"
    )
    same = report.call("clone predicts", twin.predict, noisy, t, condition)
    if same is not None:
        _compare(report, "clone predicts", same.detach(), predicted, 1e-5, 1e-3, "it must predict the same")


# -- models that talk


def _chat_model(model: Any, report: Report) -> None:
    messages = [{"role": "user", "content": "Answer with one word: is snow white?"}]
    reply = report.call("complete", model.complete, messages, seed=report.seed, max_tokens=16)
    if reply is not None:
        good = isinstance(reply, Completion) and isinstance(reply.text, str)
        report.judge("complete", good, f"{type(reply).__name__} instead of a Completion with text")
        again = report.call("same seed twice", model.complete, messages, seed=report.seed, max_tokens=16)
        if good and isinstance(again, Completion):
            report.judge("same seed twice", again.text == reply.text, "two replies differ", "warn")
    chosen = report.call("choices", model.complete, messages, choices=("yes", "no"), seed=report.seed, max_tokens=16)
    if not isinstance(chosen, Completion):
        return
    if chosen.choices is None:
        report.add("choices", "warn", "no probabilities; answers count as certain")
    else:
        good = set(chosen.choices) <= {"yes", "no"} and _probable(chosen.choices.values())
        report.judge("choices", good, f"{dict(chosen.choices)}: want probabilities of yes and no")


def _vqa_model(model: Any, report: Report) -> None:
    image = (report.pictures(1)[0] + 1) / 2  # float32 [3, H, W] in [0, 1]
    choices = ("red", "green", "blue")
    answer = report.call("answer", model.answer, image, "Which colour is it?", choices)
    if answer is None:
        return
    if not isinstance(answer, Answer):
        report.add("answer", "fail", f"{type(answer).__name__} instead of an Answer")
    elif answer.probabilities is None:
        report.add("answer", "ok", "abstains")
    else:
        p = [float(v) for v in answer.probabilities]
        report.judge("answer", len(p) == len(choices) and _probable(p), f"{p}: want {len(choices)} probabilities")
        again = report.call("twice", model.answer, image, "Which colour is it?", choices)
        if isinstance(again, Answer):
            same = again.probabilities is not None and list(map(float, again.probabilities)) == p
            report.judge("twice", same, "two answers differ", "warn")


def _probable(values: Any) -> bool:
    values = [float(v) for v in values]
    return all(0 <= v <= 1 for v in values) and sum(values) <= 1 + 1e-3


def _global_state() -> tuple[Any, ...]:
    """Of the generators that everybody shares."""
    import torch

    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), tuple(rest), torch.get_rng_state().numpy().tobytes()


TESTS: dict[str, Callable[[Any, Report], None]] = {
    "TextToImage": _text_to_image,
    "ClassToImage": _class_to_image,
    "PictureSet": _picture_set,
    "Autoencoder": _autoencoder,
    "VideoAutoencoder": _video_autoencoder,
    "DenoiserAccess": _denoiser_access,
    "ChatModel": _chat_model,
    "VQAModel": _vqa_model,
}
