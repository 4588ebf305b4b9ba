"""Conformance of a denoiser's white box."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.checks.generators import PROMPTS
from bench.checks.report import CLOSE, REPEAT, Report, batches, compare, form, is_picture

if TYPE_CHECKING:
    from torch import Tensor


def denoiser_access(model: Any, report: Report) -> None:
    """At the model's own `size` where it names one, else at the report's."""
    import torch

    n = 2
    ids = report.call("tokenize", model.tokenize, list(PROMPTS[:n]))
    if ids is None or not report.judge(
        "tokenize", getattr(ids, "dtype", None) == torch.int64 and ids.dim() == 2 and len(ids) == n, form(ids)
    ):
        return
    text = report.call("detokenize", model.detokenize, ids)
    good = isinstance(text, list) and len(text) == n and all(isinstance(t, str) for t in text)
    report.judge("detokenize", good, "must return one text per row")
    table = report.call("token_embeddings", model.token_embeddings)
    if table is None or not report.judge(
        "token_embeddings",
        table.dim() == 2 and int(ids.max()) < len(table),
        f"{form(table)}, largest id {int(ids.max())}",
    ):
        return
    embeddings = table.detach()[ids.to(table.device)]
    condition = report.call("condition", model.condition, ids)
    replaced = report.call("condition with embeddings", model.condition, ids, embeddings)
    if condition is None or replaced is None:
        return
    near, far = 1e-4, 1e-2
    why = "the embeddings of the ids must give what the ids give"
    compare(report, "condition with embeddings", replaced.hidden, condition.hidden, near, far, why)

    size = getattr(model, "size", report.size)
    shape = report.call("latent_shape", model.latent_shape, size)
    if shape is None or not report.judge("latent_shape", len(shape) == 3, f"{shape} instead of (c, h, w)"):
        return
    x = report.pictures(n, size=size)
    z = report.call("to_latent", model.to_latent, x)
    if z is None or not report.judge("to_latent", tuple(z.shape) == (n, *shape), f"{form(z)}, latent_shape {shape}"):
        return
    z = z.detach()
    back = report.call("from_latent", model.from_latent, z)
    if back is not None:
        is_picture(report, "from_latent", back.detach(), x.shape, -10.0, 10.0)
    steps = int(getattr(model, "num_timesteps", 1000))
    t = torch.tensor([steps // 2, steps // 3], device=z.device)
    noise = report.noise(z.shape, "latent").to(z.dtype)
    noisy = report.call("add_noise", model.add_noise, z, t, noise)
    target = report.call("target", model.target, z, noise, t)
    predicted = report.call("predict", model.predict, noisy, t, condition) if noisy is not None else None
    for name, value in (("add_noise", noisy), ("target", target), ("predict", predicted)):
        if value is not None:
            good = value.shape == z.shape and bool(torch.isfinite(value).all())
            report.judge(name, good, f"{form(value)}, or not finite; latents are {form(z)}", fine=form(value))
    if predicted is None or predicted.shape != z.shape:
        return
    noisy, predicted = noisy.detach(), predicted.detach()
    if target is not None and target.shape == z.shape:
        _process(model, report, z, noise, t, noisy, target)
    alone = [report.call("condition of one prompt", model.condition, ids[i : i + 1]) for i in range(n)]
    if None not in alone:
        batches(report, model, predicted, lambda i: model.predict(noisy[i : i + 1], t[i : i + 1], alone[i]))

    weight = report.noise(z.shape, "weight").to(z.dtype)
    _gradient(
        report,
        "gradient to embeddings",
        lambda e: (model.predict(noisy, t, model.condition(ids, e)) * weight).sum(),
        embeddings,
    )
    _gradient(
        report,
        "gradient to latents",
        lambda v: (model.predict(v, t, model.condition(ids)) * weight).sum(),
        noisy,
    )
    _sampling(model, report, condition, alone[0], shape)
    _parts(model, report, lambda m: m.predict(noisy, t, m.condition(ids)), predicted)


def _process(model: Any, report: Report, z: Tensor, noise: Tensor, t: Tensor, noisy: Tensor, target: Tensor) -> None:
    """Is the noising linear, does noise grow with t, and which of the known targets is it?"""
    import torch

    zero = torch.zeros_like(z)
    scaled, added = (
        report.call("add_noise", model.add_noise, *args) for args in ((z, t, zero), (zero, t, noise))
    )  # signal level times z, noise level times noise
    if scaled is None or added is None:
        return
    compare(report, "add_noise is linear", noisy, scaled + added, 1e-4, 1e-2, "it must be a weighted sum")
    early = report.call("add_noise", model.add_noise, zero, torch.zeros_like(t), noise)
    if early is not None:
        levels = [float(v.std()) for v in (early, added)]
        report.judge("noise grows with t", levels[0] < levels[1], f"{levels[0]:.3g} at 0, {levels[1]:.3g} half-way")

    def level(part: Tensor, whole: Tensor) -> Tensor:
        """By least squares, [B, 1, 1, 1]."""
        return ((part * whole).flatten(1).sum(1) / whole.square().flatten(1).sum(1)).reshape(-1, 1, 1, 1)

    signal, sigma = level(scaled, z), level(added, noise)
    known = {"noise": noise, "velocity": signal * noise - sigma * z, "flow": noise - z, "clean latent": z}
    gaps = {name: float((target - value).abs().max()) for name, value in known.items()}
    closest = min(gaps, key=gaps.__getitem__)
    fault = f"neither {', '.join(known)}: the closest is {closest}, off by {gaps[closest]:.3g}"
    report.judge("target is known", gaps[closest] < 1e-2, fault, "warn", fine=closest)


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


def _sampling(model: Any, report: Report, condition: Any, alone: Any, shape: Sequence[int]) -> None:
    """The same latent twice, alone and in a batch; partial trajectories that end where the whole one does."""
    import torch

    n, steps = len(condition.hidden), 3
    seeds = report.seeds(n)

    def sample(condition: Any, seeds: list[int], stop_at: int | None = None) -> Tensor:
        with torch.no_grad():
            return model.sample(condition, seeds, 2.0, steps, stop_at)

    first = report.call("sample", sample, condition, seeds)
    if first is None:
        return
    if not report.judge("sample", tuple(first.shape) == (n, *shape), f"{form(first)} instead of {[n, *shape]}"):
        return
    copy = first.clone()
    again = report.call("same seed twice", sample, condition, seeds)
    if again is not None:
        compare(report, "same seed twice", again, copy, 0.0, REPEAT, "the same seed must give the same latent")
    single = report.call("sample of one prompt", sample, alone, seeds[:1]) if alone is not None else None
    if single is not None:
        why = "a latent must depend on its own condition and seed alone"
        far = math.inf if getattr(model, "batch_matters", False) else 10 * CLOSE
        compare(report, "sample of one prompt", single, copy[:1], CLOSE, far, why)
    partial = report.call("stop_at", sample, condition, seeds, 1)
    if partial is not None:
        good = partial.shape == first.shape and bool((partial != copy).any())
        report.judge("stop_at", good, "stopping after one of three steps must give another latent of the same shape")
    end = len(model.timesteps(steps)) if hasattr(model, "timesteps") else steps
    whole = report.call("stop_at the end", sample, condition, seeds, end)
    if whole is not None:
        why = "stopping after the last step must change nothing"
        compare(report, "stop_at the end", whole, copy, 0.0, REPEAT, why)


def _parts(model: Any, report: Report, predict: Callable[[Any], Tensor], predicted: Tensor) -> None:
    """Gradients reach every part; the clone is frozen, predicts the same, and stays when the model is trained."""
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
    theirs = [p for m in twin.modules().values() for p in m.parameters()]
    own = {p.data_ptr() for m in parts.values() for p in m.parameters() if p.numel()}
    shared = sum(p.data_ptr() in own for p in theirs)
    fault = f"{shared} parameters are shared with the model, so training it moves the teacher"
    report.judge("clone", shared == 0, fault)
    report.judge("clone is frozen", not any(p.requires_grad for p in theirs), "its parameters ask for gradients")
    with torch.no_grad():
        same = report.call("clone predicts", predict, twin)
    if same is None:
        return
    compare(report, "clone predicts", same, predicted, 1e-5, 1e-3, "it must predict the same")

    for name, part in parts.items():
        _moves(report, name, part, lambda: predict(model), lambda: predict(twin), same)


def _moves(
    report: Report, name: str, part: Any, own: Callable[[], Tensor], theirs: Callable[[], Tensor], before: Tensor
) -> None:
    """A step against the gradient of one part changes what the model predicts, and not what its clone does."""
    import torch

    asked = [(p, p.requires_grad) for p in part.parameters()]
    part.requires_grad_(True)
    value = report.call(f"gradient to {name}", own)
    parameters = [p for p, _ in asked]
    gradients: Sequence[Tensor | None] = [None]
    if value is not None and value.requires_grad:
        gradients = torch.autograd.grad(value.square().mean(), parameters, allow_unused=True)
    moved = [(p, g) for p, g in zip(parameters, gradients, strict=False) if g is not None and bool(g.any())]
    fine = f"{len(moved)} of {len(parameters)} parameters"
    report.judge(f"gradient to {name}", bool(moved), "none arrives: it cannot be trained", fine=fine)
    saved = [p.detach().clone() for p, _ in moved]
    with torch.no_grad():
        for p, g in moved:
            p.add_(g, alpha=-0.1 * float(p.norm() + 1e-3) / float(g.norm().clamp_min(1e-30)))
        stays = report.call(f"clone after training {name}", theirs) if moved else None
        for (p, _), old in zip(moved, saved, strict=True):
            p.copy_(old)
    for p, flag in asked:
        p.requires_grad_(flag)
    if stays is not None:
        why = "training the model moves its teacher"
        compare(report, f"clone after training {name}", stays, before, 0.0, REPEAT, why)
