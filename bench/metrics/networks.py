"""The networks behind feature extractors: a normalised batch in, its named outputs out ("" is the feature vector).

Weights are named tensors that `bench.weights` read; those of another network are refused, and nothing is drawn or
downloaded while a network is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.types import Error, UsageError

State = Mapping[str, Any]  # name -> tensor
Forward = Callable[[Any], Mapping[str, Any]]  # float32 [B, 3, H, W] -> {"": [B, d], "logits": [B, classes]}
NETWORKS = ("torchvision:NAME", "timm:NAME", "open_clip:NAME", "transformers", "inception", "i3d")
Layers = Mapping[str, tuple[Any, Any]]  # name -> weight, bias


class Opened(NamedTuple):
    forward: Forward
    clip: Any = None  # the whole model, where it has a text tower, too


def opened(fields: Mapping[str, Any], state: State, where: Path | str, device: str = "cpu") -> Opened:
    """The network that a table `[extractor]` names; raises UsageError for a name that is not known."""
    kind, _, name = str(fields["network"]).partition(":")
    if name and kind == "torchvision":
        return Opened(torchvision_network(name, state, where, fields.get("layer", ""), device))
    if name and kind == "timm":
        return Opened(timm_network(name, state, where, device))
    if name and kind == "open_clip":
        model = open_clip_model(name, state, where, device)
        return Opened(lambda x: {"": model.encode_image(x)}, model)
    if not name and kind == "transformers":
        pooling = fields.get("pooling", "cls")
        if pooling not in POOLINGS:
            raise UsageError(f"{where}: pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
        model = transformers_model(fields.get("config", {}), state, where, device)
        return Opened(lambda x: {"": POOLINGS[pooling](model, x)}, model if model.config.model_type == "clip" else None)
    if not name and kind in ("inception", "i3d"):
        return Opened({"inception": inception, "i3d": i3d}[kind](state, where, device))
    raise UsageError(f"{where}: network {fields['network']!r} is not one of {', '.join(NETWORKS)}")


def inception(state: State, where: Path | str, device: str = "cpu") -> Forward:
    """Inception of the FID papers: pictures [B, 3, 299, 299] in [-1, 1] -> 2048 features; "spatial", 2023 of them, for
    sFID; "logits", 1008 without bias, where the file has the classifier: what torch-fidelity's Inception score takes.
    """
    layers = folded(state, where, device)
    if not {"Conv2d_1a_3x3", "Mixed_7c.branch_pool"} <= layers.keys():
        raise Error(f"{where} is not a state dict of Inception in pytorch-fid's layout")
    classifier = state["fc.weight"].float().to(device) if "fc.weight" in state else None

    def forward(x: Any) -> Mapping[str, Any]:
        pooled, spatial = inception_features(layers, x)
        found = {"": pooled, "spatial": spatial}
        return found if classifier is None else {**found, "logits": pooled @ classifier.T}

    return forward


def folded(state: State, where: Path | str, device: str = "cpu", suffix: str = "conv") -> dict[str, tuple[Any, Any]]:
    """(weight, bias) of each `<name>.<suffix>.weight` with the batch normalisation beside it (`<name>.bn`, eps 0.001)
    folded in in float64; kernels of pictures lie channels last."""
    import torch

    layers = {}
    for key in state:
        if not key.endswith(f".{suffix}.weight"):
            continue
        name = key.removesuffix(f".{suffix}.weight")
        if f"{name}.{suffix}.bias" in state:  # a layer without normalisation
            layers[name] = (state[key].float().to(device), state[f"{name}.{suffix}.bias"].float().to(device))
            continue
        try:
            weight, bias, mean, variance = (
                state[f"{name}.bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as e:
            raise Error(f"{where} is not a state dict of this network: it lacks {e}") from None
        scale = weight / (variance + 1e-3).sqrt()
        kernel = (state[key].double() * scale.reshape(-1, *[1] * (state[key].dim() - 1))).float().to(device)
        if kernel.dim() == 4:
            kernel = kernel.contiguous(memory_format=torch.channels_last)
        layers[name] = (kernel, (bias - mean * scale).float().to(device))
    return layers


def inception_features(layers: Layers, x: Any) -> tuple[Any, Any]:
    """float32 [B, 2048] and [B, 2023] of pictures [B, 3, 299, 299] in [-1, 1].

    Inception v3 (Szegedy et al. 2015, arXiv 1512.00567) as TensorFlow released it on 2015-12-05: means leave the
    padding out, and the last block pools by maximum. The second are the first seven channels of `mixed_6/conv`, 17 x 17
    (Nash et al. 2021, arXiv 2103.03841, as guided-diffusion computes sFID).
    """
    import torch
    from torch.nn.functional import avg_pool2d, conv2d, max_pool2d

    def conv(x: Any, name: str, stride: int = 1, same: bool = True) -> Any:
        weight, bias = layers[name]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if same else 0
        return conv2d(x, weight, bias, stride, padding).relu_()

    def chain(x: Any, block: str, *names: str) -> Any:
        for name in names:
            x = conv(x, f"{block}.{name}")
        return x

    def mean3(x: Any) -> Any:
        return avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def wide(x: Any, block: str) -> Any:  # 35 x 35
        return torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch5x5_1", "branch5x5_2"),
                chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                chain(mean3(x), block, "branch_pool"),
            ],
            1,
        )

    def factored(x: Any, block: str) -> Any:  # 17 x 17
        return torch.cat(
            [
                chain(x, block, "branch1x1"),
                chain(x, block, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
                chain(x, block, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                chain(mean3(x), block, "branch_pool"),
            ],
            1,
        )

    def split(x: Any, block: str, pooled: Any) -> Any:  # 8 x 8
        three = chain(x, block, "branch3x3_1")
        double = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        ends = [conv(three, f"{block}.branch3x3_2{end}") for end in "ab"]
        ends += [conv(double, f"{block}.branch3x3dbl_3{end}") for end in "ab"]
        return torch.cat([chain(x, block, "branch1x1"), *ends, chain(pooled, block, "branch_pool")], 1)

    x = x.contiguous(memory_format=torch.channels_last)
    x = conv(x, "Conv2d_1a_3x3", stride=2, same=False)
    x = conv(conv(x, "Conv2d_2a_3x3", same=False), "Conv2d_2b_3x3")
    x = conv(max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = max_pool2d(conv(x, "Conv2d_4a_3x3", same=False), 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = wide(x, block)
    narrow = chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
    parts = [conv(x, "Mixed_6a.branch3x3", 2, False), conv(narrow, "Mixed_6a.branch3x3dbl_3", 2, False)]
    x = torch.cat([*parts, max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = factored(x, block)
        if block == "Mixed_6d":  # whose first branch TensorFlow calls mixed_6/conv
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
    three = conv(chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2, False)
    seven = chain(x, "Mixed_7a", "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    x = torch.cat([three, conv(seven, "Mixed_7a.branch7x7x3_4", 2, False), max_pool2d(x, 3, 2)], 1)
    x = split(x, "Mixed_7b", mean3(x))
    x = split(x, "Mixed_7c", max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3)), spatial


def i3d(state: State, where: Path | str, device: str = "cpu") -> Forward:
    """I3D (Carreira and Zisserman 2017, arXiv 1705.07750): videos [B, 3, T, 224, 224] in [-1, 1], T >= 9 ->
    class logits averaged over time, [B, 400] for Kinetics-400: the features of FVD.

    `state` is in the layout of piergiaj/pytorch-i3d, which TATS keeps.
    """
    layers = folded(state, where, device, "conv3d")
    if not {"Conv3d_1a_7x7", "Mixed_5c.b3b", "logits"} <= layers.keys():
        raise Error(f"{where} is not a state dict of I3D in the layout of piergiaj/pytorch-i3d")

    def forward(x: Any) -> Mapping[str, Any]:
        return {"": i3d_logits(layers, x)}

    return forward


def i3d_logits(layers: Layers, x: Any) -> Any:
    """float32 [B, classes] of videos [B, 3, T, H, W] in [-1, 1]; padding is TensorFlow's SAME, with zeros."""
    import torch
    from torch.nn.functional import avg_pool3d, conv3d, max_pool3d, pad

    if x.shape[2] < 9 or min(x.shape[3:]) < 193:
        raise Error(f"I3D needs videos of at least 9 frames and 193 px, not {list(x.shape[2:])}")

    def same(x: Any, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        widths = []
        for side, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
            missing = max(k - (side % s or s), 0)
            widths += [missing // 2, missing - missing // 2]
        return pad(x, widths)

    def conv(x: Any, name: str, stride: tuple[int, ...] = (1, 1, 1)) -> Any:
        weight, bias = layers[name]
        return conv3d(same(x, weight.shape[2:], stride), weight, bias, stride).relu_()

    def pool(x: Any, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Any:
        return max_pool3d(same(x, kernel, stride), kernel, stride)

    def mixed(x: Any, block: str) -> Any:
        return torch.cat(
            [
                conv(x, f"{block}.b0"),
                conv(conv(x, f"{block}.b1a"), f"{block}.b1b"),
                conv(conv(x, f"{block}.b2a"), f"{block}.b2b"),
                conv(pool(x, (3, 3, 3), (1, 1, 1)), f"{block}.b3b"),
            ],
            1,
        )

    x = pool(conv(x, "Conv3d_1a_7x7", (2, 2, 2)), (1, 3, 3), (1, 2, 2))
    x = pool(conv(conv(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), (3, 3, 3), (2, 2, 2))
    for block in "bcdef":
        x = mixed(x, f"Mixed_4{block}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    x = avg_pool3d(mixed(mixed(x, "Mixed_5b"), "Mixed_5c"), (2, 7, 7), 1)
    weight, bias = layers["logits"]
    return conv3d(x, weight, bias).mean((2, 3, 4))


def torchvision_network(name: str, state: State, where: Path | str, layer: str, device: str = "cpu") -> Forward:
    """A classifier of torchvision.models: "" is what its submodule `layer` gives, averaged over the picture where it
    is a map; "logits" what the whole gives. State dict of torchvision."""
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise UsageError(f"torchvision has no classifier {name!r}", hint="a name of torchvision.models.list_models()")
    model = _filled(lambda: torchvision.models.get_model(name, weights=None), state, where, device)
    if layer not in dict(model.named_modules()):
        children = ", ".join(n for n, _ in model.named_children())
        raise UsageError(f"torchvision's {name} has no layer {layer!r}", hint=f"{children}, or what lies in them")
    kept = {}
    model.get_submodule(layer).register_forward_hook(lambda module, given, found: kept.update(found=found))

    def forward(x: Any) -> Mapping[str, Any]:
        logits = model(x)
        return {"": _vector(kept.pop("found")), "logits": logits}

    return forward


def timm_network(name: str, state: State, where: Path | str, device: str = "cpu") -> Forward:
    """A model of timm: "" is what its head pools, before the classifier, "logits" the classifier's. timm's state
    dict."""
    import timm

    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}", hint="a name of timm.list_models()")
    model = _filled(lambda: timm.create_model(name, pretrained=False), state, where, device)

    def forward(x: Any) -> Mapping[str, Any]:
        found = model.forward_features(x)
        return {"": model.forward_head(found, pre_logits=True), "logits": model.forward_head(found)}

    return forward


def open_clip_model(name: str, state: State, where: Path | str, device: str = "cpu") -> Any:
    """Both towers of an open_clip model; its embeddings are not normalised. open_clip's state dict."""
    import open_clip

    if name not in open_clip.list_models():
        raise UsageError(f"open_clip has no model {name!r}", hint="a name of open_clip.list_models()")
    return _filled(lambda: open_clip.create_model(name, pretrained=None), state, where, device)


def transformers_model(config: Mapping[str, Any], state: State, where: Path | str, device: str = "cpu") -> Any:
    """The model that transformers' AutoModel makes of the fields of a config.json, and its state dict."""
    import transformers

    fields = dict(config)
    kind = fields.pop("model_type", None)
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        raise UsageError(f"transformers has no model_type {kind!r}", hint="give the fields of the model's config.json")
    made = transformers.AutoConfig.for_model(kind, **fields)
    return _filled(lambda: transformers.AutoModel.from_config(made), state, where, device)


def _projection(model: Any, x: Any) -> Any:
    found = model.get_image_features(pixel_values=x)
    return getattr(found, "pooler_output", found)  # transformers 5 wraps it


# which features of a transformer: the first token after the last norm, the mean of those that follow it, the model's
# own `pooler_output`, or CLIP's embedding, not normalised
POOLINGS: Mapping[str, Callable[[Any, Any], Any]] = {
    "cls": lambda model, x: model(pixel_values=x).last_hidden_state[:, 0],
    "mean": lambda model, x: model(pixel_values=x).last_hidden_state[:, 1:].mean(1),
    "pooler": lambda model, x: model(pixel_values=x).pooler_output.flatten(1),
    "projection": _projection,
}


def _filled(build: Callable[[], Any], state: State, where: Path | str, device: str) -> Any:
    """The built model with exactly these weights, for inference; raises Error naming what does not fit."""
    import torch

    with torch.random.fork_rng(devices=[]):  # what it draws is thrown away, and nobody else's draws move
        model = build()
    wanted = model.state_dict()
    derived = {k for k, _ in model.named_buffers()} - wanted.keys()  # position ids that older files hold
    state = {k: v for k, v in state.items() if k not in derived}
    lacking = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    foreign = [k for k in state if k not in wanted]
    shaped = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    for names, fault in ((lacking, "lacks"), (foreign, "has the foreign"), (shaped, "has another shape for")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Error(f"{where} holds weights of another network: it {fault} {names[0]}{more}")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False)
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def _vector(found: Any) -> Any:
    """[B, d] of a map [B, d, h, w], by its mean, or of vectors."""
    return found.mean((2, 3)) if found.dim() == 4 else found.flatten(1)
