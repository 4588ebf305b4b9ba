"""A text-to-image model whose pictures are known: it draws what the prompt says, or what it was told to get wrong."""

from dataclasses import replace

import numpy as np
import torch

from bench.mini import world


class Drawn:
    """Draws "a red circle on a white background" in the small world; what the prompt leaves open depends on the seed.

    Every `wrong`-th picture has another colour; `guidance` above 1 shrinks what the seed decides.
    """

    max_tokens = 9

    def __init__(self, wrong: int = 0, guidance: float = 1.0, *, device: str = "cpu"):
        self.wrong, self.guidance = wrong, guidance
        self.asked = []  # (prompt, seed) of every picture

    def generate(self, prompts, seeds):
        self.asked += zip(prompts, seeds, strict=True)
        return torch.from_numpy(world.draw([self.picture(p, s) for p, s in zip(prompts, seeds, strict=True)])).permute(
            0, 3, 1, 2
        ) / np.float32(255)

    def picture(self, prompt, seed):
        words = prompt.split()
        colour, shape, background = words[1], words[2], words[5]
        if self.wrong and seed % self.wrong == 0:
            colour = next(c for c in world.COLOURS if c not in (colour, background))
        one = world.sample(1, seed % (1 << 40), held_out="any")[0]
        if self.guidance > 1 and seed % 4:
            one = replace(one, size="large", texture="plain", x=0.5, y=0.5, radius=0.4)
        colours = {"foreground": world.COLOURS[colour], "backdrop": world.BACKGROUNDS[background]}
        return replace(one, shape=shape, colour=colour, background=background, **colours)

    def tokens(self, prompts):
        return [len(p.split()) + 2 for p in prompts]
