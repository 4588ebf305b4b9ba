"""The embedded model that answers questions about pictures of the small world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.capabilities import Answer
from bench.identity import file_digest
from bench.mini import judges
from bench.types import Error

if TYPE_CHECKING:
    from torch import Tensor


class MiniVQA:
    """Closed questions about one shape on a background: "is there a red circle?", "what colour is the background?".

    It abstains from questions with words that it never read, and where none of the choices is an answer it knows.
    `bench.mini.judges.QUESTIONS`, CLAIMS and STATEMENTS list how it was asked while it learnt.
    """

    size = 32  # px, of the pictures that it knows

    def __init__(self, *, device: str = "cpu"):
        self.device = device
        self.classifier = judges.load_classifier(device)
        self.network = judges.load_vqa(device)

    def identity(self) -> list[str]:
        """The checkpoints decide what it answers."""
        found = (path for name in ("mini-classifier", "mini-vqa") for path in judges.folder(name).iterdir())
        return [file_digest(path) for path in sorted(found) if path.suffix == ".safetensors"]

    def answer(self, image: Tensor, question: str, choices: Sequence[str]) -> Answer:
        """Probabilities of the choices, which add up to one; a choice that is no known answer gets 0.

        image is uint8 [3, 32, 32], or float in [0, 1].
        """
        import torch

        if tuple(image.shape) != (3, 32, 32):
            raise Error(
                f"mini-vqa: the picture is {tuple(image.shape)}, not (3, 32, 32)", hint="it knows 32 px pictures"
            )
        known = [i for i, choice in enumerate(choices) if choice.lower() in judges.ANSWERS]
        try:
            tokens = judges.tokens([question]).to(self.device)
        except KeyError:
            return Answer(None)
        if not known or not tokens.any():  # no word at all is no question
            return Answer(None)
        with torch.no_grad():
            seen = judges.evidence(self.classifier, image[None].to(self.device))
            logits = self.network(seen, tokens)[0]
        found = logits[[judges.ANSWERS.index(choices[i].lower()) for i in known]].softmax(0).tolist()
        probabilities = [0.0] * len(choices)
        for i, value in zip(known, found, strict=True):
            probabilities[i] = value
        return Answer(probabilities)
