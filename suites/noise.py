"""The example: does an autoencoder keep a picture apart from noise? A whole suite, with everything a suite needs."""

from dataclasses import dataclass

from bench import Autoencoder, Data, Suite, Unit, UsageError
from bench.metrics import PSNR


@dataclass(frozen=True)
class Noise(Suite):
    data: Data = "photographs"
    strength: float = 0.1  # standard deviation of the noise, where black is -1 and white is 1
    size: int = 256  # px

    name = "noise"
    version = 1
    requires = (Autoencoder,)
    slices = ("kind",)
    metrics = (PSNR(real="clean", fake="recon"),)  # above 20 log10(2 / strength), the model takes noise away

    def __post_init__(self):
        if not 0 <= self.strength < float("inf"):
            raise UsageError(f"strength = {self.strength} must be 0 or a positive number")

    def units(self, data):
        for i, ids in enumerate(data.chunks(64)):
            yield Unit(f"{i:04d}", tuple(ids))

    def run(self, unit, model, ctx):
        import torch

        for ids in ctx.batches(unit):
            clean = ctx.images(ids, self.size, "none")
            noise = torch.stack([torch.randn(clean.shape[1:], generator=ctx.generator(id, "noise")) for id in ids])
            noisy = clean + self.strength * noise.to(clean.device)
            yield ids, {"clean": clean, "recon": model.decode(model.encode(noisy.clamp(-1, 1)))}
