"""What a model can do: structural protocols of a few methods. An adapter has a capability when it has its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from bench.recipe import Recipe


@dataclass
class Latents:
    """What `encode` returns when it knows more than a tensor."""

    data: Any  # a tensor, or coded bytes for a codec
    bits: Sequence[float]  # per item, as stored; a plain tensor counts its dtype
    side_bits: Sequence[float] = ()  # per item: conditioning frame, text, seeds
    indices: Tensor | None = None  # int64 [B, ...], discrete codes, for usage and entropy


@dataclass
class Condition:
    """A prompt as a denoiser sees it."""

    hidden: Any  # [B, L, c]
    pooled: Any = None  # [B, c]
    mask: Any = None  # [B, L]


@dataclass(frozen=True)
class Completion:
    """What a chat model said. With a `failure` nothing else counts but what a reader needs to see why."""

    text: str
    parsed: Any = None  # the object, where a schema was asked for
    choices: Mapping[str, float] | None = None  # probabilities, where choices were asked for
    finish: str = "stop"
    key: str = ""  # of the reply in the record/replay store
    failure: str = ""  # one of FAILURES, or ""
    reply: str = ""  # of a failure: what came instead, at most 4 kB
    tries: int = 1  # calls that it took
    served: Mapping[str, Any] = field(default_factory=dict)  # as a server says: model, system_fingerprint, usage


@dataclass(frozen=True)
class Answer:
    """What a VQA model answered: probabilities over the choices, or None when it abstains or fails."""

    probabilities: Sequence[float] | None
    key: str = ""
    failure: str = ""  # as in Completion
    reply: str = ""
    tries: int = 1


# Why a model that was asked gave nothing that counts. None of these is an answer, and none is a zero.
FAILURES = ("Refused", "Unparsable", "Truncated", "Timeout", "RateLimited", "BadReply", "Connection", "Server")


@runtime_checkable
class TextToImage(Protocol):
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1], not rounded; image i depends on prompts[i] and seeds[i] alone."""


@runtime_checkable
class ClassToImage(Protocol):
    num_classes: int

    def generate_classes(self, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """float32 [B, 3, H, W] in [0, 1], not rounded; image i depends on labels[i] and seeds[i] alone."""


@runtime_checkable
class PictureSet(Protocol):
    """Pictures that are there already, whatever made them.

    May also have `formats(names)`, a list of what each is stored as ("PNG", "JPEG"), where that is known.
    """

    def names(self) -> Sequence[str]:
        """One for each picture, always in the same order. Opening and listing is cheap: nothing is decoded."""

    def pictures(self, names: Sequence[str]) -> list[np.ndarray]:
        """uint8 [H, W, 3] each; sizes may differ."""


@runtime_checkable
class Autoencoder(Protocol):
    def encode(self, images: Tensor) -> Tensor | Latents:
        """images float32 [B, 3, H, W] in [-1, 1]."""

    def decode(self, latents: Tensor | Latents, seeds: Sequence[int] | None = None) -> Tensor:
        """float32 [B, 3, H, W], not clamped; seeds=None: the posterior's mode, the deterministic decoder."""


@runtime_checkable
class VideoAutoencoder(Protocol):
    def encode_video(self, clips: Tensor) -> Tensor | Latents:
        """clips float32 [B, 3, T, H, W] in [-1, 1]."""

    def decode_video(self, latents: Tensor | Latents, seeds: Sequence[int] | None = None) -> Tensor:
        """float32 [B, 3, T, H, W], not clamped."""


@runtime_checkable
class DenoiserAccess(Protocol):
    """White box: gradients flow through all of it."""

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """int64 [B, L]."""

    def detokenize(self, ids: Tensor) -> list[str]: ...

    def token_embeddings(self) -> Tensor:
        """[V, d]."""

    def condition(self, ids: Tensor, embeddings: Tensor | None = None) -> Condition:
        """embeddings [B, L, d] replace those of ids."""

    def to_latent(self, images: Tensor) -> Tensor:
        """images in [-1, 1] -> z: posterior mean, scaled."""

    def from_latent(self, z: Tensor) -> Tensor: ...

    def latent_shape(self, size: int) -> tuple[int, int, int]: ...

    def add_noise(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should return, of the model's own prediction type."""

    def predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def sample(
        self, condition: Condition, seeds: Sequence[int], guidance: float, steps: int, stop_at: int | None = None
    ) -> Tensor:
        """z; `stop_at` ends the trajectory early (ESD needs partial ones)."""

    def modules(self) -> Mapping[str, Any]:
        """ "unet", "text_encoder": what recipes train."""

    def clone(self) -> DenoiserAccess:
        """The frozen teacher."""


@runtime_checkable
class ChatModel(Protocol):
    """May also have `identity()`: JSON of what decides its replies beside its arguments. So may a VQAModel."""

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        schema: Any = None,
        choices: Sequence[str] | None = None,
        seed: int = 0,
        max_tokens: int = 512,
    ) -> Completion:
        """Messages have a role and a content: text, or a list of {"type": "text", "text": ...} and {"type": "image",
        "image": ...} with pictures as VQAModel takes them. A failure is a value; Stop is raised where no later item
        can fare better."""


@runtime_checkable
class VQAModel(Protocol):
    def answer(self, image: Tensor, question: str, choices: Sequence[str]) -> Answer:
        """image is uint8 [3, H, W], or float in [0, 1]."""


@runtime_checkable
class Scalable(Protocol):
    """Not one model but a design at any size: what it would train for a budget."""

    def trainings(
        self, budget: float, sizes: Sequence[float], cell: Mapping[str, int], data: Mapping[str, Any]
    ) -> Sequence[Recipe]:
        """For each of the sizes (parameters, rising) a recipe that spends `budget` training FLOPs, no size twice.

        `cell` says what the network must fit: channels, side, vocabulary, text (tokens of the condition); `data` are
        fields of the recipes. A recipe also has `facts(cell)`, with params, tokens and flops.
        """


CAPABILITIES: tuple[type, ...] = (
    TextToImage,
    ClassToImage,
    PictureSet,
    Autoencoder,
    VideoAutoencoder,
    DenoiserAccess,
    ChatModel,
    VQAModel,
    Scalable,
)


def methods(capability: type) -> tuple[str, ...]:
    """The names of the methods that make up a capability."""
    return tuple(sorted(n for n, v in vars(capability).items() if callable(v) and not n.startswith("_")))


def has(obj: Any, capability: type) -> bool:
    """Does an object, or a class before it is opened, have the methods of a capability?"""
    return all(callable(getattr(obj, name, None)) for name in methods(capability))


def held(obj: Any) -> tuple[str, ...]:
    """The names of the capabilities that an object or class has."""
    return tuple(c.__name__ for c in CAPABILITIES if has(obj, c))
