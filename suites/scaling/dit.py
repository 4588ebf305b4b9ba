"""Diffusion transformers in four kinds of block, with rectified flow: the family that scaling laws are measured on.

In-context and cross-attention conditioning, adaLN-zero (Peebles and Xie, arXiv 2212.09748), adaLN-single with
cross-attention (PixArt-alpha, arXiv 2310.00426), two streams with joint attention (MM-DiT, arXiv 2403.03206);
LightningDiT's parts (arXiv 2501.01423) are switches. Every product of matrices is one that suites/scaling/flops.py
counts. Shapes in names: B pictures, n image tokens, m text tokens, d width, h heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from suites.scaling.flops import TIME_WIDTH, Shape

EPS = 1e-6


class DiT(nn.Module):
    """Predicts the velocity of latents [B, c, side, side] at times [B] in [0, 1] under a condition.

    The condition is ids [B, m] (`vocabulary` itself stands for "nothing said"), or vectors [B, m, text_width]. At the
    start the output is zero and every block the identity.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        d, pixels = shape.width, shape.channels * shape.patch**2
        self.patch = nn.Linear(pixels, d)
        self.time = nn.Sequential(nn.Linear(TIME_WIDTH, d), nn.SiLU(), nn.Linear(d, d))
        if not shape.text_width:
            self.words = nn.Embedding(shape.vocabulary + 1, d)
        elif shape.kind != "cross_attention":  # which reads the text at its own width
            self.words = nn.Linear(shape.text_width, d)
        if shape.kind == "cross_attention":
            self.modulation = nn.Linear(d, 6 * d)
        kinds = {"in_context": Plain, "cross_attention": Crossed, "adaln_zero": Modulated, "mm_dit": TwoStreams}
        self.blocks = nn.ModuleList(kinds[shape.kind](shape) for _ in range(shape.layers))
        if shape.kind != "in_context":
            self.final = nn.Linear(d, 2 * d)
        self.norm = norm(shape, affine=shape.kind == "in_context")
        self.head = nn.Linear(d, pixels)
        side = shape.side // shape.patch
        self.register_buffer("positions", positions(side, d), persistent=False)
        if shape.rope:
            self.register_buffer("angles", angles(side, d // shape.heads), persistent=False)

    def forward(self, latents: Tensor, times: Tensor, text: Tensor) -> Tensor:
        shape = self.shape
        x = self.patch(patchify(latents, shape.patch)) + self.positions
        time = self.time(waves(times))
        words = text if shape.kind == "cross_attention" and shape.text_width else self.words(text)
        turn = self.angles if shape.rope else None
        if shape.kind == "in_context":
            x = torch.cat([x, words, time[:, None]], 1)
            for block in self.blocks:
                x = block(x, turn)
            return unpatchify(self.head(self.norm(x[:, : shape.tokens])), shape)
        if shape.kind == "cross_attention":
            vector, shared = time, self.modulation(functional.silu(time)).unflatten(1, (6, 1, -1))
            for block in self.blocks:
                x = block(x, words, shared, turn)
        elif shape.kind == "adaln_zero":
            vector = time + words.mean(1)
            for block in self.blocks:
                x = block(x, functional.silu(vector), turn)
        else:
            vector = time + words.mean(1)
            for block in self.blocks:
                x, words = block(x, words, functional.silu(vector), turn)
        shift, scale = self.final(functional.silu(vector))[:, None].chunk(2, -1)
        return unpatchify(self.head(modulate(self.norm(x), shift, scale)), shape)


class Stream(nn.Module):
    """Self-attention and MLP of one sequence of tokens, in two halves so that streams can attend jointly."""

    def __init__(self, shape: Shape, affine: bool = False):
        super().__init__()
        d = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = norm(shape, affine), norm(shape, affine)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = SwiGLU(d, shape.hidden) if shape.swiglu else MLP(d, shape.hidden)
        self.qk_norm = nn.ModuleList(nn.RMSNorm(d // shape.heads, EPS) for _ in "qk") if shape.qk_norm else None

    def ask(self, x: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, h, S, d / h] of normalised tokens [B, S, d]; the first are turned by their
        positions."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.qk_norm is not None:
            q, k = self.qk_norm[0](q), self.qk_norm[1](k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return q, k, v


class Plain(Stream):
    """In-context: text and time are tokens among the others."""

    def __init__(self, shape: Shape):
        super().__init__(shape, affine=True)

    def forward(self, x: Tensor, turn: Tensor | None) -> Tensor:
        x = x + self.out(attend(*self.ask(self.norm1(x), turn)))
        return x + self.mlp(self.norm2(x))


class Modulated(Stream):
    """adaLN-zero: shifts, scales and gates from one vector."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.modulation = nn.Linear(shape.width, 6 * shape.width)

    def forward(self, x: Tensor, vector: Tensor, turn: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vector)[:, None].chunk(6, -1)
        x = x + gate1 * self.out(attend(*self.ask(modulate(self.norm1(x), shift1, scale1), turn)))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Crossed(Stream):
    """adaLN-single, shifted by a table of each block's own, and cross-attention to the text in between."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        d = shape.width
        self.table = nn.Parameter(torch.zeros(6, 1, 1, d))
        self.query, self.told, self.crossed = nn.Linear(d, d), nn.Linear(shape.text_width or d, 2 * d), nn.Linear(d, d)

    def forward(self, x: Tensor, text: Tensor, shared: Tensor, turn: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = shared.transpose(0, 1) + self.table
        x = x + gate1 * self.out(attend(*self.ask(modulate(self.norm1(x), shift1, scale1), turn)))
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), *self.told(text).chunk(2, -1))
        )
        x = x + self.crossed(attend(q, k, v))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TwoStreams(nn.Module):
    """MM-DiT: image and text have weights of their own and attend to each other."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.image, self.text = Modulated(shape), Modulated(shape)

    def forward(self, x: Tensor, words: Tensor, vector: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor]:
        streams = (self.image, x, turn), (self.text, words, None)
        sets = [stream.modulation(vector)[:, None].chunk(6, -1) for stream, _, _ in streams]
        asked = [
            stream.ask(modulate(stream.norm1(tokens), shift, scale), turned)
            for (stream, tokens, turned), (shift, scale, *_) in zip(streams, sets, strict=True)
        ]
        both = attend(*(torch.cat(parts, 2) for parts in zip(*asked, strict=True)))
        found = []
        parts = both.split([x.shape[1], words.shape[1]], 1)
        for (stream, tokens, _), (_, _, gate1, shift2, scale2, gate2), part in zip(streams, sets, parts, strict=True):
            tokens = tokens + gate1 * stream.out(part)
            found.append(tokens + gate2 * stream.mlp(modulate(stream.norm2(tokens), shift2, scale2)))
        return found[0], found[1]


class MLP(nn.Sequential):
    def __init__(self, d: int, hidden: int):
        super().__init__(nn.Linear(d, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, d))


class SwiGLU(nn.Module):
    """Shazeer 2020 (arXiv 2002.05202), equation 6."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(functional.silu(gate) * value)


def norm(shape: Shape, affine: bool) -> nn.Module:
    """Before attention, MLP or head. RMSNorm always has a scale, as in LightningDiT."""
    if shape.rms_norm:
        return nn.RMSNorm(shape.width, EPS)
    return nn.LayerNorm(shape.width, EPS, elementwise_affine=affine)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, d] of [B, h, S, d / h]."""
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def waves(times: Tensor) -> Tensor:
    """Sines and cosines [B, 256] of 1,000 t, periods geometric from 2 pi to 20,000 pi (DiT's embedding of steps)."""
    half = TIME_WIDTH // 2
    rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=times.device))
    phases = 1000 * times[:, None] * rates
    return torch.cat([phases.cos(), phases.sin()], 1)


def positions(side: int, d: int) -> Tensor:
    """Fixed sines and cosines [side^2, d]: a quarter of the channels each for sine and cosine of row and column."""
    rates = 10_000 ** (-torch.arange(d // 4) / (d // 4))
    row, column = (g.flatten()[:, None] * rates for g in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1)


def angles(side: int, width: int) -> Tensor:
    """Rotary angles [side^2, width / 2] of each place: the first half turns with the row, the second with the column
    (Su et al., arXiv 2104.09864, along both axes)."""
    rates = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    row, column = (g.flatten()[:, None] * rates for g in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    return torch.cat([row, column], 1)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """The first tokens of [B, h, S, w] turned by angles [n, w / 2]; what follows has no place and stays."""
    a, b = x[:, :, : len(turn)].chunk(2, -1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([torch.cat([a * cos - b * sin, a * sin + b * cos], -1), x[:, :, len(turn) :]], 2)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, c, H, W] -> [B, n, p p c], patches in reading order."""
    x = x.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # B c y p x p
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, shape: Shape) -> Tensor:
    """[B, n, p p c] -> [B, c, H, W]"""
    side = shape.side // shape.patch
    x = x.unflatten(1, (side, side)).unflatten(3, (shape.patch, shape.patch, shape.channels))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def initialise(model: DiT, generator: torch.Generator) -> DiT:
    """All weights drawn anew from the generator alone. What ends a residual branch, gates and head are zero."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.5, generator=generator)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
                module.weight.fill_(1)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        zero = [model.head]
        for module in model.modules():
            if isinstance(module, Plain):
                zero += [module.out, module.mlp.down if isinstance(module.mlp, SwiGLU) else module.mlp[-1]]
            if isinstance(module, Crossed):
                zero.append(module.crossed)
            if isinstance(module, Modulated):
                zero.append(module.modulation)
        zero += [getattr(model, name) for name in ("modulation", "final") if hasattr(model, name)]
        for layer in zero:
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def count_parameters(model: DiT) -> dict[str, int]:
    """By role: "backbone" and "conditioning" as in flops.params; "embedding": patches, head, time, words, the head's
    modulation; "vectors": biases, scales of norms and tables."""
    found = dict.fromkeys(("backbone", "conditioning", "embedding", "vectors"), 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            role = "vectors"
        elif "modulation" in name:
            role = "conditioning"
        else:
            role = "backbone" if name.startswith("blocks.") else "embedding"
        found[role] += parameter.numel()
    return found


# rectified flow (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206): t = 0 is noise, t = 1 is data


def mix(data: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """x_t = t data + (1 - t) noise, for times [B]."""
    return torch.lerp(noise, data, times.view(-1, *[1] * (data.dim() - 1)))


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """Times [count]: the logistic function of standard normal draws."""
    return torch.randn(count, generator=generator).sigmoid()


def velocity_errors(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean square error [B] of velocities [B, c, H, W]."""
    return (predicted - velocity).square().mean((1, 2, 3))


def direction_errors(predicted: Tensor, velocity: Tensor) -> Tensor:
    """1 - cosine along the channels, mean over places [B]; in [0, 2] (LightningDiT, transport.py of its code)."""
    return 1 - functional.cosine_similarity(predicted, velocity, dim=1).mean((1, 2))


def sample(model: Any, noise: Tensor, text: Tensor, steps: int = 50, guidance: float = 1.0) -> Tensor:
    """Latents of noise [B, c, H, W] under ids [B, m], by Euler steps; guidance as v + (w - 1) (v - v of nothing)."""
    nothing = torch.full_like(text, model.shape.vocabulary)
    x = noise
    with torch.no_grad():
        for step in range(steps):
            times = torch.full((len(x),), step / steps, device=x.device)
            v = model(x, times, text)
            if guidance != 1:
                v = v + (guidance - 1) * (v - model(x, times, nothing))
            x = x + v / steps
    return x
