"""Laws as papers print them, for comparison; cited, never measured here. Natural units: parameters, tokens, FLOPs."""

from __future__ import annotations

from typing import NamedTuple


class Cited(NamedTuple):
    """y = coefficient * C^exponent for `quantity` ("params", "tokens" or "loss"), as `source` prints it."""

    name: str
    quantity: str
    coefficient: float
    exponent: float
    source: str


LAWS = (
    Cited("DiT, in-context", "params", 0.0009, 0.5681, "arXiv 2410.08184"),
    Cited("DiT, in-context", "tokens", 186.8535, 0.4319, "arXiv 2410.08184"),
    Cited("DiT, in-context", "loss", 2.3943, -0.0273, "arXiv 2410.08184"),
    Cited("DeepSeek LLM", "tokens", 5.8316, 0.4757, "arXiv 2401.02954"),
)
EXPONENTS = {  # of N* and D* in C, where no coefficient is printed in comparable units
    "DiT, cross-attention": (0.54, 0.46, "arXiv 2410.08184"),
    "video DiT": (0.4146, None, "arXiv 2411.17470"),
    "native multimodal, early fusion": (0.5262, 0.473, "arXiv 2504.07951"),
    "native multimodal, late fusion": (0.6358, 0.4619, "arXiv 2504.07951"),
    "Chinchilla, approach 3 (unrounded)": (0.4565, 0.5435, "arXiv 2203.15556"),
}
