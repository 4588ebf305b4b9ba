"""What a conformance test needs: findings, inputs, and comparisons of what a model returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bench.identity import seed_for

if TYPE_CHECKING:
    from torch import Tensor

REPEAT = 1e-4  # how far the same call twice may differ: some GPU kernels add in any order
STEP = 2 / 255  # one step of 8 bits, for pictures in [-1, 1]
CLOSE = 1e-3  # how far pictures in [-1, 1] may differ between batch sizes without a word


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    name: str  # "Autoencoder: same seed twice"
    status: Literal["ok", "warn", "fail"]
    detail: str = ""


class Report:
    """The findings so far, and how to try something that may break."""

    def __init__(self, device: str, size: int, seed: int, elsewhere: Callable | None = None):
        self.device, self.size, self.seed, self.elsewhere = device, size, seed, elsewhere
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

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> tuple[Any, str]:
        """What the model returns and nothing, or None and what it raised."""
        try:
            return function(*args, **kwargs), ""
        except Exception as e:  # a foreign model may fail in any way, and that is a finding
            return None, f"{type(e).__name__}: {str(e)[:200]}"

    def call(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """What the model returns; None, and a failure on record, where it raises."""
        value, raised = self.attempt(function, *args, **kwargs)
        if raised:
            self.add(name, "fail", f"raised {raised}")
        return value

    def seeds(self, n: int) -> list[int]:
        return [seed_for(self.seed, "check", 1, str(i), "latent") for i in range(n)]

    def noise(self, shape: Sequence[int], name: str) -> Tensor:
        """Standard normal float32 on the device."""
        import torch

        generator = torch.Generator().manual_seed(seed_for(self.seed, "check", 1, name, "noise"))
        return torch.randn(tuple(shape), generator=generator).to(self.device)

    def pictures(self, n: int, frames: int | None = None, size: int | None = None) -> Tensor:
        """float32 [n, 3, size, size] in [-1, 1], or [n, 3, frames, size, size]: coloured waves with a little grain."""
        import torch

        side = torch.linspace(0, 1, size or self.size)
        t = torch.arange(frames or 1).reshape(1, 1, -1, 1, 1) / 16
        item = torch.arange(n).reshape(-1, 1, 1, 1, 1)
        channel = torch.arange(3).reshape(1, 3, 1, 1, 1)
        waves = torch.sin((5 + channel + item) * side + t) * torch.cos((4 + item) * side[:, None] + channel)
        waves = (0.8 * waves.to(self.device) + 0.05 * self.noise(waves.shape, "grain")).clamp(-1, 1)
        return waves if frames else waves[:, :, 0]


def is_picture(report: Report, name: str, y: Any, shape: Sequence[int], low: float, high: float) -> bool:
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


def compare(report: Report, name: str, a: Any, b: Any, near: float, far: float, why: str) -> None:
    """ok up to `near`, warn up to `far`, fail beyond; the largest difference is always printed."""
    if a is None or b is None:
        return
    if form(a) != form(b):
        report.add(name, "fail", f"{form(a)} against {form(b)}")
        return
    gap = float((a.detach().double() - b.detach().double()).abs().max())
    status = "ok" if gap <= near else "warn" if gap <= far else "fail"
    report.add(name, status, f"largest difference {gap:.3g}" + (f"; {why}" if status != "ok" else ""))


def form(x: Any) -> str:
    return f"{list(x.shape)} {str(x.dtype)[6:]}" if hasattr(x, "shape") else type(x).__name__


def batches(
    report: Report, model: Any, whole: Tensor, one: Callable[[int], Any], near: float = CLOSE, far: float = STEP
) -> None:
    """The first, a middle and the last item made alone, by `one`, against the batch of all."""
    import torch

    picked = sorted({0, len(whole) // 2, len(whole) - 1})
    single = []
    for i in picked:
        y = report.call("batch 1", one, i)
        if y is None:
            return
        if not isinstance(y, torch.Tensor) or y.shape != whole[:1].shape:
            report.add("batch 1", "fail", f"{form(y)} for one item")
            return
        single.append(y.detach())
    far = math.inf if getattr(model, "batch_matters", False) else far
    why = "an item must not depend on its batch; set batch_matters = True if it cannot be mended"
    compare(report, f"batch 1 against batch {len(whole)}", torch.cat(single), whole[picked], near, far, why)


def kept(report: Report, name: str, kept: Tensor, copy: Tensor) -> None:
    """Did later calls write into what an earlier call returned?"""
    good = bool((kept == copy).all())
    report.judge(f"{name} stay as returned", good, "a later call changed them: return a new tensor, not a buffer")
