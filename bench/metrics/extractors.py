"""Feature extractors: pictures in, float32 [B, d] out; float32 with TF32 off, whatever the model under test does.

An extractor's name is "embedded", "mini-classifier" or "mini-clip", which come with the harness, "inception-<resize>",
or that of a weights manifest with a table `[extractor]`:

    [extractor]
    network = "torchvision:squeezenet1_0"  # or timm:NAME, open_clip:NAME, transformers, inception, i3d
    layer = "features"                     # torchvision: the submodule; transformers: pooling = "cls"
    size = 224                             # px; resize = "clean", crop = "none": see bench.metrics.resizes
    mean = [0.485, 0.456, 0.406]           # of pictures in 0..1, subtracted; std = [...] then divides
    dim = 512                              # of the features

`<name>/logits` is another output of a network that has it; all come from the same forward pass.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from bench.metrics.pixel import FAR_OUT, quantise
from bench.metrics.precision import full_precision
from bench.metrics.resizes import CROPS, RESIZES, resized
from bench.types import Error, UsageError

INCEPTION = "inception-2015-12-05-pytorch-fid"  # manifest of the state dict
INCEPTION_RESIZES = ("clean", "tf1", "pytorch", "tm")
EMBEDDED = ("embedded", "mini-classifier", "mini-clip")
EXTRACTORS = (*EMBEDDED, *(f"inception-{resize}" for resize in INCEPTION_RESIZES))
BATCH = {"cpu": 4, "cuda": 32}  # pictures per forward pass, always: features must not depend on how many came
DTYPES = ("float32", "bfloat16")


class Extractor(Protocol):
    name: str
    fingerprint: str  # network and eight hex digits of its weights: "embedded-v1@3f2a90c1"
    dim: int

    def __call__(self, images: Any) -> np.ndarray:
        """float32 [B, dim] of a tensor [B, 3, H, W]: uint8, or float in [-1, 1] which is not rounded."""


class Preparation(NamedTuple):
    """How levels come to a network's size; networks that ask for the same share the result."""

    resize: str = "none"
    size: int = 0  # px
    crop: str = "none"

    def __call__(self, levels: Any) -> Any:
        return levels if self.resize == "none" else resized(levels, self.resize, self.size, self.crop)


UNCHANGED = Preparation()


class Network:
    """An extractor with several outputs: `dims` names them and their lengths, "" being the features.

    `forward` takes prepared levels, float32 [B, 3, H, W] in 0..255 (videos [B, 3, T, H, W] where `axes` is 5).
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        dims: Mapping[str, int],
        forward: Callable[[Any], Mapping[str, Any]],
        device: str,
        preparation: Preparation = UNCHANGED,
        axes: int = 4,
        clip: Any = None,
    ):
        self.name, self.fingerprint, self.dims, self.dim = name, fingerprint, dict(dims), dims[""]
        self.preparation = preparation
        self.clip = clip  # the whole model, where it has a text tower, too
        self._forward, self._device, self._axes = forward, device, axes
        self._batch = BATCH["cpu" if device == "cpu" else "cuda"]

    def __call__(self, images: Any) -> np.ndarray:
        return self.outputs(images)[""]

    def outputs(self, images: Any, prepared: dict[Any, Any] | None = None) -> dict[str, np.ndarray]:
        """Every output, float32 [B, d]. `prepared` keeps the resized parts of these pictures for other networks."""
        import torch

        self._check(images)
        found = {name: [np.empty((0, dim), dtype=np.float32)] for name, dim in self.dims.items()}
        with torch.no_grad(), full_precision():
            for start in range(0, len(images), self._batch):
                part = images[start : start + self._batch]
                rows = self._forward(self._prepared(part, start, {} if prepared is None else prepared))
                for name, dim in self.dims.items():
                    if name not in rows:
                        raise Error(f"extractor {self.name} gives no {name}", hint="take `classes` out of its manifest")
                    values = rows[name][: len(part)].float().cpu().numpy()
                    if values.shape[1] != dim:
                        raise Error(f"extractor {self.name} gave {values.shape[1]} features, not the {dim} expected")
                    found[name].append(values)
        features = {name: np.concatenate(parts) for name, parts in found.items()}
        if not all(np.isfinite(values).all() for values in features.values()):
            raise Error(f"{self.fingerprint} gave NaN or infinity")
        return features

    def _prepared(self, part: Any, start: int, prepared: dict[Any, Any]) -> Any:
        """Levels as the network is fed them, the tail filled up with its last picture."""
        import torch

        key = (self.preparation, self._device, start)
        if key in prepared:
            return prepared[key]
        levels = part.to(self._device)
        levels = self.preparation(levels.float() if levels.dtype == torch.uint8 else (levels.float() + 1) * 127.5)
        if missing := self._batch - len(levels):
            levels = torch.cat([levels, levels[-1:].expand(missing, *levels.shape[1:])])
        if self.preparation is not UNCHANGED:  # what was not resized is quickly made again
            prepared[key] = levels
        return levels

    def _check(self, images: Any) -> None:
        import torch

        axes = "[B, 3, H, W]" if self._axes == 4 else "videos [B, 3, T, H, W]"
        if images.dim() != self._axes or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise Error(f"{self.name} needs {'pictures ' if self._axes == 4 else ''}{axes}, not {list(images.shape)}")
        if images.dtype == torch.uint8:
            return
        if not images.is_floating_point():
            raise Error(f"{self.name} needs uint8 or float pictures, not {images.dtype}")
        if not images.numel():
            return
        low, high = (float(bound) for bound in images.aminmax())
        if not np.isfinite([low, high]).all():
            raise Error("a picture holds NaN or infinity", hint="look at the model's output before it is scored")
        if max(-low, high) > FAR_OUT:
            hint = "levels 0..255 belong in uint8; [0, 1] is value_range (0, 1)"
            raise Error(f"float pictures must lie in [-1, 1]; these reach from {low:g} to {high:g}", hint=hint)


class Output:
    """One output of a network as an extractor of its own: "inception-tf1/logits"."""

    def __init__(self, network: Network, output: str):
        if output not in network.dims:
            known = ", ".join(n for n in network.dims if n) or "none but its features"
            raise UsageError(f"extractor {network.name} has no output {output!r}", hint=f"it has {known}")
        self.name, self.fingerprint = f"{network.name}/{output}", network.fingerprint
        self.dim, self.preparation = network.dims[output], network.preparation
        self._network, self._output = network, output

    def __call__(self, images: Any) -> np.ndarray:
        return self._network.outputs(images)[self._output]


# -- names


def manifests(name: str) -> tuple[str, ...]:
    """The weights manifests that an extractor's name asks for."""
    name = name.partition("/")[0]
    if name in EMBEDDED:
        return ()
    return (INCEPTION,) if name in EXTRACTORS else (name,)


def opened(name: str, ctx: Any) -> Extractor:
    """The extractor of a name, with the weights that the context finds; opened once per process.

    Raises UsageError for a name that is neither in EXTRACTORS nor a manifest's, Error for weights that do not fit.
    """
    base, slash, output = name.partition("/")
    device = str(ctx.device)
    if base == "embedded":
        network = embedded(device)
    elif base in EMBEDDED:
        network = mini(base, device)
    elif base in EXTRACTORS:
        network = inception(ctx.weights(INCEPTION), base.partition("-")[2], device)
    else:
        network = from_table(base, json.dumps(ctx.extractor(base), sort_keys=True), ctx.weights(base), device)
    return Output(network, output) if slash else network


class _Batch:
    """What was made of one batch of media: resized parts by preparation, outputs by extractor."""

    def __init__(self, images: Any, key: Any):
        self.reference, self.key = weakref.ref(images), key
        self.prepared: dict[Any, Any] = {}
        self.found: dict[str, Mapping[str, np.ndarray]] = {}


_batches: list[_Batch] = []


def features(name: str, images: Any, ctx: Any, mode: str = "round", value_range: tuple[float, float] = (-1.0, 1.0)):
    """float32 [B, d] of one batch of media, quantised first.

    Metrics that ask for the same batch share one pass of each network, whichever of its outputs they take, and
    networks of one input size share the resized pictures.
    """
    base, _, output = name.partition("/")
    batch = _batch_of(images, (str(ctx.device), mode, value_range))
    if base not in batch.found:
        pictures = quantise(images, mode, value_range)
        if mode == "none" and value_range != (-1.0, 1.0) and pictures.is_floating_point():
            low, high = value_range
            pictures = (pictures - low) * (2.0 / (high - low)) - 1.0
        extractor = opened(base, ctx)
        whole = isinstance(extractor, Network)  # an extractor of another make has its features alone
        batch.found[base] = extractor.outputs(pictures, batch.prepared) if whole else {"": extractor(pictures)}
    if output not in batch.found[base]:
        raise UsageError(f"extractor {base} has no output {output!r}")
    return batch.found[base][output]


def _batch_of(images: Any, key: Any) -> _Batch:
    key = (*key, _contents(images))
    for batch in _batches:
        if batch.reference() is images and batch.key == key:
            break
    else:
        batch = _Batch(images, key)
    kept = [b for b in _batches if b is not batch and b.reference() is not None]
    _batches[:] = [*kept[-3:], batch]  # the last one used stays longest
    return batch


def _contents(images: Any) -> Any:
    """Changes when a tensor is written to; for what does not count its writes, never the same twice."""
    counted = hasattr(images, "is_inference") and not images.is_inference()
    return images._version if counted else object()


# -- opening


@cache
def embedded(device: str = "cpu") -> Network:
    """The network that comes with the harness (bench/mini): 32 features, pictures of at least 64 px."""
    from bench.identity import file_digest
    from bench.mini import features as network

    if not network.path().is_file():
        raise Error(f"the embedded feature network is missing: {network.path()}", hint="install the package again")
    fingerprint = f"{network.NAME}@{file_digest(network.path())[:8]}"
    forward = network.load(device)

    def checked(levels: Any) -> Mapping[str, Any]:
        if min(levels.shape[-2:]) < 64:
            raise Error(f"{network.NAME} needs pictures of at least 64 px, not {list(levels.shape[-2:])}")
        return {"": forward(levels)}

    return Network("embedded", fingerprint, {"": network.DIM}, checked, device)


@cache
def mini(name: str, device: str = "cpu") -> Network:
    """A judge of the small world (bench/mini/judges) as an extractor: pictures are brought to 32 x 32 px.

    "mini-classifier": 128 features, and the logits of the shapes; "mini-clip": 64, the embedding of pictures.
    """
    from bench.identity import file_digest
    from bench.mini import judges

    file = "classifier.safetensors" if name == "mini-classifier" else "model.safetensors"
    path = judges.folder(name) / file
    if not path.is_file():
        raise Error(f"the embedded network {name} is missing: {path}", hint="install the package again")
    if name == "mini-classifier":
        network = judges.load_classifier(device)
        dims = {"": judges.FEATURES, "logits": len(judges.HEADS["shape"])}

        def forward(levels: Any) -> Mapping[str, Any]:
            features = network.features(levels / 255.0)
            return {"": features, "logits": network.logits(features)["shape"]}

    else:
        network = judges.load_clip(device)[0]
        dims = {"": network.config.projection_dim}

        def forward(levels: Any) -> Mapping[str, Any]:
            found = network.get_image_features(pixel_values=levels / 127.5 - 1.0)
            return {"": getattr(found, "pooler_output", found)}  # transformers 5 wraps it

    return Network(name, f"{name}@{file_digest(path)[:8]}", dims, forward, device, Preparation("clean", 32))


@cache
def inception(weights: Path, resize: str = "clean", device: str = "cpu") -> Network:
    """Inception of the FID papers, 2048 features after the last mean, with one of four ways to 299 x 299 px.

    `clean` (clean-fid), `tf1` (torch-fidelity), `pytorch` (pytorch-fid), `tm` (torchmetrics) of bench.metrics.resizes.
    Outputs beside: "logits", 1008 without bias, which torch-fidelity's Inception score takes; "spatial", for sFID.
    `weights` is the state dict of pytorch-fid, which holds tensors alone; the TorchScript file that others use carries
    code that runs on loading, so it is not read.
    """
    from bench.identity import file_digest
    from bench.metrics import networks

    if resize not in INCEPTION_RESIZES:
        raise UsageError(f"resize {resize!r} is not one of {', '.join(INCEPTION_RESIZES)}")
    path = Path(weights)
    if not path.is_file():
        raise Error(f"the weights of Inception are missing: {path}", hint=f"bench data fetch weights/{INCEPTION}")
    state = read_state(path)
    network = networks.inception(state, path, device)

    def forward(levels: Any) -> Mapping[str, Any]:
        return network(levels / 127.5 - 1.0 if resize == "pytorch" else (levels - 128.0) / 128.0)

    dims = {"": 2048, "spatial": 2023, **({"logits": len(state["fc.weight"])} if "fc.weight" in state else {})}
    fingerprint = f"inception-2015-12-05@{file_digest(path)[:8]}"
    return Network(f"inception-{resize}", fingerprint, dims, forward, device, Preparation(resize, 299))


@cache
def from_table(name: str, table: str, weights: Path, device: str = "cpu") -> Network:
    """The extractor that a table `[extractor]` (as JSON) describes, with the weights in a file.

    Its fingerprint holds eight hex digits of the file and of the table. `dtype = "bfloat16"` is marked in it: such
    features may differ by more than what is claimed (`bfloat16_gate`).
    """
    from bench.identity import digest, file_digest
    from bench.metrics import networks

    fields = json.loads(table)
    dtype = fields.get("dtype", "float32")
    if dtype not in DTYPES:
        raise UsageError(f"weights {name}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    mean, std = fields.get("mean", [0.5] * 3), fields.get("std", [0.5] * 3)
    numbers = all(isinstance(v, int | float) for v in (*mean, *std))
    if not numbers or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UsageError(f"weights {name}: mean and std need three numbers each, std above 0")
    preparation = Preparation(fields.get("resize", "clean"), fields["size"], fields.get("crop", "none"))
    if preparation.resize not in RESIZES or preparation.crop not in CROPS:
        known = f"resize: {', '.join(RESIZES)}; crop: {', '.join(CROPS)}"
        raise UsageError(f"weights {name}: resize or crop is not known", hint=known)
    network = networks.opened(fields, read_state(weights), f"weights {name}", device)
    dims = {"": fields["dim"], **({"logits": fields["classes"]} if "classes" in fields else {})}
    fingerprint = f"{name}@{file_digest(weights)[:8]}-{digest(fields)[:8]}{'-bf16' * (dtype == 'bfloat16')}"
    axes = 5 if fields["network"] == "i3d" else 4
    forward = _normalised(network.forward, mean, std, device, dtype)
    return Network(name, fingerprint, dims, forward, device, preparation, axes, network.clip)


def _normalised(network: Any, mean: Any, std: Any, device: str, dtype: str) -> Callable[[Any], Mapping[str, Any]]:
    """From levels 0..255 to what a network was trained on; bfloat16 by autocast, its norms staying float32."""
    import torch

    def column(levels: Any, values: Any) -> Any:
        return torch.tensor(values, device=device).mul(255.0).reshape(1, 3, *[1] * (levels.dim() - 2))

    def forward(levels: Any) -> Mapping[str, Any]:
        x = (levels - column(levels, mean)) / column(levels, std)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return network(x)

    return forward


def bfloat16_gate(full: Extractor, half: Extractor, images: Any, claimed: float | None = None) -> float:
    """Fréchet distance between a network's features in float32 and in bfloat16, of the same pictures.

    Raises Error where that is 1 % or more of `claimed`, the smallest difference of distances that shall be told apart.
    """
    from bench.metrics.frechet import frechet_from_features

    distance = frechet_from_features(half(images), full(images))
    if claimed is not None and not distance < 0.01 * claimed:
        raise Error(
            f"bfloat16 moves the Fréchet distance by {distance:.3g}, more than 1 % of the {claimed:.3g} claimed",
            hint='take dtype = "float32"',
        )
    return distance


def read_state(path: Path) -> dict[str, Any]:
    """The named tensors of a safetensors file, or of a torch file read as data alone; else raises Error."""
    from bench.weights import load_weights

    return load_weights(path, pickle="allow")  # of a file whose SHA-256 a manifest holds
