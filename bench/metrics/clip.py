"""CLIPScore: how well a picture fits its prompt, as the cosine of CLIP's two embeddings (Hessel et al. 2021, EMNLP)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from bench.metrics.extractors import Network, features, manifests, opened
from bench.metrics.pixel import mean_of_rows
from bench.metrics.precision import full_precision
from bench.types import Error, UsageError

PREFIX = "A photo depicts "  # Hessel et al., section 3
WEIGHT = 2.5  # equation 1


class Embedded(NamedTuple):
    vectors: np.ndarray  # float32 [B, d] of length one
    truncated: list[bool]  # texts that had more tokens than the model takes


class Texts:
    """A text tower: `tokens` gives ids without padding or limit, `forward` embeds int64 [B, limit]."""

    def __init__(
        self, tokens: Callable[[str], list[int]], forward: Callable[[Any], Any], limit: int, pad: int, device: str
    ):
        self.limit = limit  # tokens, begin and end included
        self._tokens, self._forward, self._pad, self._device = tokens, forward, pad, device

    def __call__(self, texts: Sequence[str]) -> Embedded:
        """Embeddings of texts; longer ones are cut, their end kept, and told apart."""
        import torch

        ids = [self._tokens(text) for text in texts]
        cut = [row if len(row) <= self.limit else [*row[: self.limit - 1], row[-1]] for row in ids]
        filled = torch.tensor([[*row, *[self._pad] * (self.limit - len(row))] for row in cut], device=self._device)
        with torch.no_grad(), full_precision():
            found = self._forward(filled).float().cpu().numpy()
        return Embedded(unit_length(found), [len(row) > self.limit for row in ids])


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """float32 rows divided by their length; raises Error for one that has none or is not finite."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise Error("CLIP gave an embedding that is zero or not finite")
    return vectors / lengths


def texts_of(name: str, ctx: Any) -> Texts:
    """The text tower beside an extractor: of "mini-clip", of open_clip's models, of CLIP as transformers builds it.

    Opened once per process. Raises UsageError for an extractor that has none.
    """
    if name == "mini-clip":
        return _mini(str(ctx.device))
    network = opened(name, ctx)
    if getattr(network, "clip", None) is None:
        raise UsageError(f"extractor {name!r} has no text tower", hint="mini-clip, or the manifest of a CLIP model")
    return _beside(network, str(ctx.device))


@cache
def _mini(device: str) -> Texts:
    from bench.mini import judges

    model, tokenizer = judges.load_clip(device)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    return _of_transformers(model, tokens, tokenizer.pad_token_id, device)


@cache
def _beside(network: Network, device: str) -> Texts:
    from open_clip.tokenizer import SimpleTokenizer

    vocabulary = SimpleTokenizer()  # of OpenAI's CLIP, which transformers' CLIP shares

    def tokens(text: str) -> list[int]:
        return [vocabulary.sot_token_id, *vocabulary.encode(text), vocabulary.eot_token_id]

    model = network.clip
    words = model.config.text_config.vocab_size if hasattr(model, "get_text_features") else model.vocab_size
    if words != vocabulary.vocab_size:
        raise UsageError(f"extractor {network.name} has a vocabulary of its own", hint="take a model of CLIP's")
    if hasattr(model, "get_text_features"):
        return _of_transformers(model, tokens, vocabulary.eot_token_id, device)
    return Texts(tokens, model.encode_text, model.context_length, 0, device)


def _of_transformers(model: Any, tokens: Callable[[str], list[int]], pad: int, device: str) -> Texts:
    def forward(ids: Any) -> Any:
        found = model.get_text_features(input_ids=ids)  # what follows the end is hidden by the causal mask
        return getattr(found, "pooler_output", found)  # transformers 5 wraps it

    return Texts(tokens, forward, model.config.text_config.max_position_embeddings, pad, device)


@dataclass(frozen=True)
class CLIPScore:
    """Fit of each picture to its prompt: 100 cos, and the mean over pictures, not below 0 (torchmetrics, EvalGIM).

    `convention="original"` is the paper's: 2.5 max(cos, 0) with "A photo depicts " before the prompt. A picture without
    prompt is null. Prompts longer than the model's limit are cut; the column `<name>-truncated` tells which.
    """

    extractor: str = "clip-vitl14"  # whose pictures and texts meet: a CLIP model's manifest, or "mini-clip"
    convention: str = "torchmetrics"  # or "original"
    fake: str = "image"
    prompt: str = "prompt"  # media: a list of texts
    quantise: str = "round"
    value_range: tuple[float, float] = (-1.0, 1.0)

    version = 1
    unit = ""
    better = "higher"

    def __post_init__(self):
        if self.convention not in ("torchmetrics", "original"):
            raise UsageError(f"convention {self.convention!r} is not one of torchmetrics, original")

    @property
    def name(self) -> str:
        return "clip-score" if self.convention == "torchmetrics" else "clip-score-original"

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights manifests that measuring will ask for."""
        return manifests(self.extractor)

    def prepare(self, ctx):
        opened(self.extractor, ctx)
        texts_of(self.extractor, ctx)

    def identity(self, ctx):
        return opened(self.extractor, ctx).fingerprint

    def measure(self, media: Mapping[str, Any], ctx: Any):
        if self.fake not in media:
            return {}  # a batch of a reference, which has no prompts
        images = media[self.fake]
        prompts = self._prompts(media, len(images))
        asked = [i for i, prompt in enumerate(prompts) if prompt]
        columns = {self.name: [None] * len(images), f"{self.name}-truncated": [None] * len(images)}
        columns[f"{self.name}-withheld"] = [None if prompt else "pictures without prompt" for prompt in prompts]
        columns[f"{self.name}-net"] = [opened(self.extractor, ctx).fingerprint] * len(images)
        if asked:
            seen = unit_length(features(self.extractor, images, ctx, self.quantise, self.value_range)[asked])
            said = texts_of(self.extractor, ctx)([self._text(prompts[i]) for i in asked])
            cosines = (seen.astype(np.float64) * said.vectors).sum(1)
            for i, cosine, cut in zip(asked, cosines.tolist(), said.truncated, strict=True):
                columns[self.name][i] = self._score(cosine)
                columns[f"{self.name}-truncated"][i] = cut
        return columns

    def reduce(self, table):
        found = mean_of_rows(table, self.name)
        if self.convention == "torchmetrics" and found.value is not None:
            kept = {key: max(getattr(found, key), 0.0) for key in ("value", "low", "high") if getattr(found, key)}
            found = replace(found, **kept)
        cut = sum(bool(v) for v in table.column(f"{self.name}-truncated"))
        complete = found.n == table.expected or found.note
        if cut and complete:
            note = f"{cut} of {found.n} prompts were cut to the model's limit"
            found = replace(found, note="; ".join(n for n in (found.note, note) if n))
        return found

    def signature(self, table):
        nets = sorted({str(v) for v in table.column(f"{self.name}-net") if v is not None})
        return f"clip-score|{self.convention}|net:{'+'.join(nets) or self.extractor}|{self.quantise}|v:{self.version}"

    def _prompts(self, media: Mapping[str, Any], count: int) -> list[str | None]:
        if self.prompt not in media:
            raise Error(f"CLIPScore needs the prompts: there is no {self.prompt!r} beside the pictures")
        prompts = list(media[self.prompt])
        if len(prompts) != count or not all(p is None or isinstance(p, str) for p in prompts):
            raise Error(f"CLIPScore needs one text per picture: {self.prompt!r} has {len(prompts)} for {count}")
        return prompts

    def _text(self, prompt: str) -> str:
        return PREFIX + prompt if self.convention == "original" else prompt

    def _score(self, cosine: float) -> float:
        return WEIGHT * max(cosine, 0.0) if self.convention == "original" else 100.0 * cosine
