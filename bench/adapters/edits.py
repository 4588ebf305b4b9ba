"""Edited parts of a pipeline: whole or partial state dictionaries and LoRA files, put into a network or refused.

Nothing is skipped silently: every tensor of a file must find its place, and how many did is said.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.identity import hub_id
from bench.types import Error
from bench.weights import load_weights, open_folder, resolve

if TYPE_CHECKING:
    from torch import Tensor

PREFIXES = {  # of whole checkpoints, and of training wrappers
    "unet": ("model.diffusion_model.", "unet.", "module."),
    "text_encoder": ("cond_stage_model.transformer.", "text_encoder.", "module."),
}
OTHER = "it was made for another architecture, or for another part of the pipeline"


@dataclass(frozen=True)
class Change:
    """What an edit did to a part."""

    part: str  # "unet" or "text_encoder"
    source: str  # the path or hub id as it was named
    matched: int  # tensors of the part that were replaced or added to
    of: int  # tensors of the part
    relative: float  # length of the difference over the length of the original weights, as one vector

    def __str__(self) -> str:
        what = f"{self.part}: {self.matched} of {self.of} tensors from {self.source}"
        return f"{what}; {f'relative change {self.relative:.3g}' if self.relative else 'nothing changed'}"


# -- state dictionaries


def replace(part: str, network: Any, source: str, pickle: str = "refuse") -> Change:
    """Puts an edited state dictionary into a network.

    `source` is a file, a folder, or a hub id; a folder may be that of the part or of a whole pipeline. A folder with a
    `config.json` must hold every tensor of the network, any other source may hold some of them (ESD keeps only what it
    trained). Names may be those of diffusers, of transformers with and without `text_model.`, or of CompVis. Raises
    Error where a tensor has no place, another shape, or is not finite, and where nothing matches.
    """
    tensors, whole = _read(part, source, pickle)
    return _write(part, network, source, match(part, network, tensors, source, whole))


def match(part: str, network: Any, tensors: Mapping[str, Tensor], source: str, whole: bool) -> dict[str, Tensor]:
    """Tensors under the network's own names; `whole`: each tensor of the network must be among them."""
    import torch

    own = network.state_dict()
    places = {_plain(name): name for name in own}
    found = {}
    renamed = {n: t for n, t in rename(part, tensors, network).items() if not n.endswith("position_ids")}  # 0, 1, ...
    for name, tensor in sorted(renamed.items()):
        if name not in places:
            raise Error(
                f"{part} {source}: {_share(sum(n in places for n in renamed), len(renamed))} of its tensors have a "
                f"place in this {part}; "
                f"the first without one is {name[:120]!r}",
                hint=OTHER,
            )
        if tensor.shape != own[places[name]].shape:
            shapes = f"{list(tensor.shape)} in the file and {list(own[places[name]].shape)} in this {part}"
            raise Error(f"{part} {source}: {name[:120]!r} is {shapes}", hint=OTHER)
        if not bool(torch.isfinite(tensor).all()):
            raise Error(f"{part} {source}: {name[:120]!r} holds NaN or infinity", hint="the file is damaged")
        found[places[name]] = tensor
    missing = [name for name in own if name not in found]
    if not found or (whole and missing):
        raise Error(
            f"{part} {source} has {_share(len(found), len(own))} of the tensors of this {part}; "
            f"the first missing is {missing[0]!r}",
            hint="name a file of tensors if only some are to be replaced" if found else OTHER,
        )
    return found


def _read(part: str, source: str, pickle: str) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file or folder, and whether they should be those of a whole network."""
    path = Path(os.path.expanduser(resolve(str(source))))
    if not hub_id(str(source)) and not path.is_dir():
        return load_weights(path, pickle), False
    folder = open_folder(str(source))
    if (folder / part).is_dir():
        folder = folder / part
    return load_weights(folder, pickle), (folder / "config.json").is_file()


def rename(part: str, tensors: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Tensors under the names of diffusers and transformers 5; those of other parts of a checkpoint are left out."""
    for prefix in PREFIXES[part]:
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if part == "unet" and any(re.match(r"(input|output)_blocks\.|middle_block\.|time_embed\.", n) for n in tensors):
        layers = network.config.layers_per_block
        return {_from_compvis(name, layers): tensor for name, tensor in tensors.items()}
    return {_plain(name): tensor for name, tensor in tensors.items()}


def _plain(name: str) -> str:
    """transformers 5 dropped the prefix that CLIP text encoders had before."""
    return name.removeprefix("text_model.")


RESNET = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
ENDS = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}


def _from_compvis(name: str, layers: int) -> str:
    """A U-Net's tensor as CompVis names it -> as diffusers does; unknown names come back as they are.

    CompVis counts blocks through: each of its levels has `layers` blocks and a resampler on the way down, and
    `layers + 1` blocks, the last with the resampler inside, on the way up.
    """
    for old, new in ENDS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    match = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)|middle_block\.(\d+)\.(.+)", name)
    if match is None:
        return name
    side, block, inner, rest, middle, middle_rest = match.groups()
    if middle is not None:
        if middle == "1":
            return f"mid_block.attentions.0.{middle_rest}"
        return f"mid_block.resnets.{int(middle) // 2}.{_resnet(middle_rest)}"
    down = side == "input_blocks"
    level, layer = divmod(int(block) - down, layers + 1)
    level_name = f"{'down' if down else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{level_name}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{level_name}.upsamplers.0.{rest}"
    if inner == "0":
        return f"{level_name}.resnets.{layer}.{_resnet(rest)}"
    return f"{level_name}.attentions.{layer}.{rest}"


def _resnet(rest: str) -> str:
    for old, new in RESNET.items():
        if rest.startswith(old):
            return new + rest.removeprefix(old)
    return rest


# -- LoRA


LORA = re.compile(
    r"(?P<module>.+?)(?:\.processor)?"
    r"[._](?:(?P<old>to_[qkv]|to_out)_lora\.|lora_linear_layer\.|lora[._])"
    r"(?P<side>down|up|A|B)(?:\.default)?\.weight"
)
LORA_PARTS = (  # prefix -> part; the first that fits
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
    ("base_model.model.text_encoder.", "text_encoder"),
    ("base_model.model.unet.", "unet"),
    ("base_model.model.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("unet.", "unet"),
)


def merge_lora(networks: Mapping[str, Any], source: str, pickle: str = "refuse") -> list[Change]:
    """Adds a LoRA to the weights: W + alpha / rank * up @ down (LoRA, arXiv 2106.09685, section 4.1).

    Read are files as diffusers, peft and kohya's scripts write them, for linear layers and convolutions of the U-Net
    and of the text encoder. Alpha comes from the file's tensors or metadata, or from peft's `adapter_config.json`, and
    is the rank where none is named. Raises Error where a tensor has no place, does not fit, or is not of plain LoRA.
    """
    tensors, alpha_of = _read_lora(source, pickle)
    flat = {part: {_flat(part, n): n for n, _ in net.named_modules()} for part, net in networks.items()}
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    alphas: dict[tuple[str, str], float] = {}
    lost = []
    for name, tensor in sorted(tensors.items()):
        place = _lora_place(name, flat)
        if place is None:
            lost.append(name)
        elif place[1] == "alpha":
            alphas[place[0]] = float(tensor)
        else:
            pairs.setdefault(place[0], {})[place[1]] = tensor
    if lost or not pairs:
        raise Error(
            f"lora {source}: {_share(len(tensors) - len(lost), len(tensors))} of its tensors have a place in this "
            f"model; the first without one is {(lost or ['none'])[0][:120]!r}",
            hint="it was made for another architecture, or is not a plain LoRA",
        )
    merged: dict[str, dict[str, Tensor]] = {}
    for (part, module), sides in pairs.items():
        if set(sides) != {"down", "up"}:
            raise Error(f"lora {source}: {part}.{module} has {' and '.join(sides)} only", hint="the file is damaged")
        down, up = sides["down"].float(), sides["up"].float()
        weight = getattr(networks[part].get_submodule(module), "weight", None)
        rank = len(down)
        fits = weight is not None and up.flatten(1).shape == (len(weight), rank)
        if not fits or down[0].numel() != weight[0].numel():
            there = "no weight" if weight is None else f"a weight of {list(weight.shape)}"
            shapes = f"{list(up.shape)} times {list(down.shape)}"
            raise Error(f"lora {source}: {shapes} does not fit {part}.{module}, which has {there}", hint=OTHER)
        scale = alpha_of(part, rank, alphas.get((part, module)))
        delta = scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        merged.setdefault(part, {})[f"{module}.weight"] = weight.detach() + delta
    return [_write(part, networks[part], source, tensors) for part, tensors in merged.items()]


def _read_lora(source: str, pickle: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors, and a function (part, rank, alpha in the file or None) -> the factor of up @ down."""
    from safetensors import safe_open

    path = Path(os.path.expanduser(resolve(str(source))))
    settings: dict[str, Any] = {}
    if hub_id(str(source)) or path.is_dir():
        folder = open_folder(str(source))
        if (folder / "adapter_config.json").is_file():
            settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8-sig"))
        files = sorted(folder.glob("*.safetensors"))
        path = files[0] if len(files) == 1 else folder
    tensors = load_weights(path, pickle)
    if path.suffix == ".safetensors" and not settings:
        with safe_open(path, "pt") as file:  # its header was checked by load_weights
            written = (file.metadata() or {}).get("lora_adapter_metadata")
        settings = _json(source, written) if written else {}

    def factor(part: str, rank: int, alpha: float | None) -> float:
        def setting(name: str) -> Any:
            return settings.get(f"{part}.{name}", settings.get(name))

        if setting("alpha_pattern") or setting("use_dora"):
            raise Error(f"lora {source} sets alpha_pattern or use_dora, which is not read", hint="merge it beforehand")
        alpha = setting("lora_alpha") if alpha is None else alpha
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if setting("use_rslora") else rank)

    return tensors, factor


def _json(source: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Error(f"lora {source}: its metadata are not JSON: {e}") from None
    return found if isinstance(found, dict) else {}


def _lora_place(name: str, flat: Mapping[str, Mapping[str, str]]) -> tuple[tuple[str, str], str] | None:
    """((part, module), "down", "up" or "alpha") of a tensor of a LoRA file; None where there is no such module."""
    part, rest = next(((part, name.removeprefix(p)) for p, part in LORA_PARTS if name.startswith(p)), ("unet", name))
    if part not in flat:
        return None
    if rest.endswith(".alpha"):
        module, side = rest.removesuffix(".alpha"), "alpha"
    else:
        match = LORA.fullmatch(rest)
        if match is None:
            return None
        side = {"A": "down", "B": "up"}.get(match["side"], match["side"])
        module = match["module"]
        if match["old"]:
            names = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
            inner = names[match["old"]] if part == "text_encoder" else match["old"].replace("to_out", "to_out.0")
            module = f"{module}.{inner}"
    found = flat[part].get(_flat(part, module))
    return None if found is None else ((part, found), side)


def _flat(part: str, module: str) -> str:
    """A module's name as kohya's scripts write it, and free of the prefix that transformers 5 dropped."""
    name = module.replace(".", "_")
    return name.removeprefix("text_model_") if part == "text_encoder" else name


# -- both


def _write(part: str, network: Any, source: str, tensors: Mapping[str, Tensor]) -> Change:
    """Puts tensors into a network under its own names, and measures how far that moves it."""
    own = network.state_dict()
    length = sum(float(t.double().square().sum()) for t in own.values())
    moved = sum(float((t.double() - own[name].double()).square().sum()) for name, t in tensors.items())
    network.load_state_dict(tensors, strict=False)  # every name was matched
    return Change(part, str(source), len(tensors), len(own), math.sqrt(moved / length) if length else math.inf)


def _share(n: int, of: int) -> str:
    return f"{n} of {of} ({100 * n / max(of, 1):.0f} %)"
