"""Networks that look at pictures of the small world: a classifier of every attribute, a picture-and-text encoder in
CLIP's format, and a model that answers questions. How they were trained, and how good they are: README.md here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.mini.world import ATTRIBUTES, WORDS

NONE = "none"  # the shape of a picture that shows no shape of the world, or more than one
HEADS: Mapping[str, tuple[str, ...]] = {**ATTRIBUTES, "shape": (*ATTRIBUTES["shape"], NONE)}
FEATURES = 128
WIDTHS = ((24, 1), (48, 2), (48, 1), (96, 2), (96, 1), (96, 2))  # (channels, stride) of each convolution


PROMPTS: Mapping[str, str] = {  # what a value is compared as, where an attribute is guessed from its captions
    "shape": "a {}",
    "colour": "a {} shape",
    "background": "a shape on a {} background",
    "size": "a {} shape",
    "position": "a shape {}",
    "texture": "a {} shape",
}

# Questions that the model of questions knows; "{}" is a shape's name, its synonym, or "shape".
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "shape": ("what shape is this?", "which shape is in the picture?", "what is in the picture?"),
    "colour": ("what colour is the {}?", "which colour does the {} have?"),
    "background": ("what colour is the background?", "which colour does the background have?"),
    "size": ("what size is the {}?", "is the {} small or large?"),
    "position": ("where is the {}?", "in which place is the {}?"),
    "texture": ("what texture does the {} have?", "is the {} plain, striped or dotted?"),
}
CLAIMS = ("is there {}?", "is this {}?", "does the picture show {}?")  # "{}" is what captions say: "a red circle"
STATEMENTS: Mapping[str, str] = {  # the first "{}" as in QUESTIONS, the second a value
    "shape": "is the shape a {1}?",
    "colour": "is the {0} {1}?",
    "background": "is the background {1}?",
    "size": "is the {0} {1}?",
    "position": "is the {0} {1}?",
    "texture": "is the {0} {1}?",
}
ANSWERS: tuple[str, ...] = tuple(dict.fromkeys(["yes", "no", *(v for values in HEADS.values() for v in values)]))
_ASKED = (*CLAIMS, *STATEMENTS.values(), *(q for asked in QUESTIONS.values() for q in asked))
QUESTION_WORDS: tuple[str, ...] = tuple(
    sorted({*WORDS, *(word.strip("?,") for text in _ASKED for word in text.split() if "{" not in word)})
)


def folder(name: str) -> Path:
    """Where the weights of "mini-classifier", "mini-clip" or "mini-vqa" lie."""
    return Path(__file__).parent / "checkpoints" / name


def build_classifier() -> Any:
    """The classifier with weights as torch left them; in evaluation mode a picture's features are its own.

    `features(images)` gives float32 [B, 128], not negative; `logits(features)` a dict of [B, k] in the order of HEADS;
    calling the network gives the logits of pictures. Images are uint8 [B, 3, 32, 32], or floats in [0, 1].
    """
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            layers, before = [], 3
            for width, stride in WIDTHS:
                layers += [nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            self.stages = nn.Sequential(*layers, nn.Flatten())
            self.project = nn.Sequential(nn.Linear(4 * 4 * before, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU())
            self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in HEADS.items()})

        def features(self, images):
            x = images / 255 if images.dtype == torch.uint8 else images
            return self.project(self.stages((2 * x - 1).contiguous(memory_format=torch.channels_last))).float()

        def logits(self, features):
            return {name: head(features) for name, head in self.heads.items()}

        def forward(self, images):
            return self.logits(self.features(images))

    return Classifier().to(memory_format=torch.channels_last)


def load_classifier(device: str = "cpu", path: Path | None = None) -> Any:
    """The trained classifier in float32 and evaluation mode, without gradients of its weights.

    `path` is a folder that `bench train mini-classifier` wrote; by default the embedded one.
    """
    return _filled(build_classifier(), (path or folder("mini-classifier")) / "classifier.safetensors", device)


def read(network: Any, images: Any, batch: int = 256) -> dict[str, list[str]]:
    """What a classifier sees: for each attribute the likeliest value of each picture, the shape may be "none".

    Images are uint8 [N, 3, 32, 32], or floats in [0, 1].
    """
    import torch

    found: dict[str, list[str]] = {name: [] for name in HEADS}
    with torch.no_grad():
        for part in images.split(batch):
            for name, logits in network(part).items():
                found[name] += [HEADS[name][i] for i in logits.argmax(1).tolist()]
    return found


def load_clip(device: str = "cpu", path: Path | None = None) -> tuple[Any, Any]:
    """The trained transformers.CLIPModel in float32 and evaluation mode, and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    place = path or folder("mini-clip")
    network = CLIPModel(CLIPConfig.from_pretrained(place, local_files_only=True))
    tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
    return _filled(network.float(), place / "model.safetensors", device), tokenizer  # without transformers' bars


def embed_images(model: Any, images: Any, batch: int = 256) -> Any:
    """float32 [N, 64] of length one: images are uint8 [N, 3, 32, 32], or floats in [0, 1]."""
    import torch

    with torch.no_grad():
        scaled = (images / 255 if images.dtype == torch.uint8 else images) * 2 - 1
        found = [model.get_image_features(pixel_values=part) for part in scaled.split(batch)]
    return torch.nn.functional.normalize(torch.cat([_features(f) for f in found]), dim=1)


def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Any:
    """float32 [N, 64] of length one; more than 24 tokens are cut."""
    import torch

    ids = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        found = _features(model.get_text_features(input_ids=ids.to(model.device)))
    return torch.nn.functional.normalize(found, dim=1)


def _features(found: Any) -> Any:
    """Recent releases of transformers wrap the projected features."""
    return getattr(found, "pooler_output", found)


def build_vqa() -> Any:
    """The model of questions with weights as torch left them: what a classifier sees and a question -> answers.

    `network(evidence, tokens)`: `evidence` of pictures, float32 [B, 35], and `tokens` of questions, int64 [B, L] ->
    logits [B, A] in the order of ANSWERS. Words become features of up to five neighbours, of which the strongest are
    kept; they are multiplied with what the picture shows.
    """
    import torch
    from torch import nn

    class Questions(nn.Module):
        def __init__(self, words: int = 48, width: int = 128):
            super().__init__()
            self.embed = nn.Embedding(len(QUESTION_WORDS) + 1, words, padding_idx=0)
            self.read = nn.Conv1d(words, width, 5, padding=2)
            self.ask = nn.Linear(width, width)
            self.look = nn.Linear(sum(len(values) for values in HEADS.values()), width)
            self.think = nn.Linear(3 * width, width)
            self.answer = nn.Linear(width, len(ANSWERS))

        def forward(self, evidence, tokens):
            asked = self.ask(self.read(self.embed(tokens).transpose(1, 2)).relu().amax(2))
            seen = self.look(evidence)
            return self.answer(self.think(torch.cat([asked * seen, asked, seen], 1).relu()).relu())

    return Questions()


def load_vqa(device: str = "cpu", path: Path | None = None) -> Any:
    """The trained model of questions, in float32 and evaluation mode."""
    return _filled(build_vqa(), (path or folder("mini-vqa")) / "vqa.safetensors", device)


def evidence(classifier: Any, images: Any) -> Any:
    """float32 [B, 35]: the probabilities of all heads, side by side, of images as the classifier takes them."""
    import torch

    with torch.no_grad():
        return torch.cat([logits.softmax(1) for logits in classifier(images).values()], 1)


def tokens(questions: Sequence[str]) -> Any:
    """int64 [B, L], 0 behind the end. Raises KeyError with the first word that is none of QUESTION_WORDS."""
    import torch

    numbers = {word: i for i, word in enumerate(QUESTION_WORDS, 1)}
    rows = [[numbers[word.strip("?,.!")] for word in question.lower().split()] for question in questions]
    length = max(5, *map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def _filled(network: Any, path: Path, device: str) -> Any:
    """The network with the weights of a file, stored in half precision, as float32."""
    from safetensors.torch import load_file

    weights = {name: w.float() if w.is_floating_point() else w for name, w in load_file(path).items()}
    network.load_state_dict(weights)
    return network.requires_grad_(False).eval().to(device)
