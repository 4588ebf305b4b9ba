"""What exactly is compared with what: the definitions that papers publish their reconstruction numbers under.

The SSIM of one pair of pictures spans 0.767 to 0.851 over the definitions below, so a number means little without its
protocol. Nothing of the harness is needed here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Literal

Pixels = Literal["raw", "clamp", "round", "trunc"]
"""How values in [-1, 1] reach a metric: as decoded; clamped; as 8 bits, rounded half up or with the fraction cut."""

SAME: tuple[Pixels, Pixels] = ("round", "round")  # original, reconstruction


@dataclass(frozen=True)
class Protocol:
    """A definition of every number. The first three fields describe it; the others decide values and make up the hash.

    Originals are 8-bit pictures brought to [-1, 1], in which models encode and decode. Pairs name the original first.
    """

    name: str
    source: str  # where the definition was read
    departs: str = ""  # what the peer does and we do not

    resize: str = "adm"  # function of `bench.images`
    scaling: str = "float32"  # brings 8-bit originals to [-1, 1]; or "float64", which truncation tells apart
    posterior: str = "mode"  # or "sample": one draw per picture
    averaging: str = "per_sample"  # every picture counts once; no preset averages the means of batches

    psnr: str = "per_image"  # or "": not reported
    psnr_pixels: tuple[Pixels, Pixels] = SAME

    ssim: str = "gauss11_valid"  # flavour; "": not reported
    ssim_pixels: tuple[Pixels, Pixels] = SAME
    ssim_scale: tuple[float, float] = (0.0, 255.0)  # the values that black and white take
    ssim_range: float = 255.0  # L in C1 = (0.01 L)^2, C2 = (0.03 L)^2
    ms_ssim: bool = False  # with the pixels, scale and range of SSIM

    lpips: tuple[str, ...] = ()  # networks, version 0.1; not spatial
    lpips_pixels: tuple[Pixels, Pixels] = SAME
    lpips_scale: tuple[float, float] = (-1.0, 1.0)  # the network expects [-1, 1]

    frechet: str = "inception"  # features: "inception" (2015, 2048-d pool3), "embedded", or "": not reported
    frechet_pixels: tuple[Pixels, Pixels] = SAME
    frechet_resize: str = "tf1"  # to 299 px; "tf1", "pytorch" or "clean". The embedded network takes any size
    frechet_reference: str = "self"  # the originals of the same run
    frechet_dtype: str = "float64"  # of means and covariances
    on_features: tuple[Literal["kid", "cmmd", "prdc"], ...] = ()  # what else is reported on the same features

    def definition(self) -> dict:
        """The fields that decide values; without `on_features` those that there were before that field."""
        left_out = {"name", "source", "departs", *(() if self.on_features else ("on_features",))}
        return {k: v for k, v in asdict(self).items() if k not in left_out}

    def hash(self) -> str:
        """12 hex digits of SHA-256 over the canonical JSON of the definition: equal hashes, comparable values."""
        text = json.dumps(self.definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def diff(self, other: Protocol) -> dict[str, tuple]:
        """The fields in which two definitions differ: {field: (ours, theirs)}."""
        mine, theirs = self.definition(), other.definition()
        return {f.name: (mine[f.name], theirs[f.name]) for f in fields(self) if mine.get(f.name) != theirs.get(f.name)}


PER_BATCH = "the peer averages the means of its batches, which differs where the last batch is smaller"
OLD_SSIM = "torchmetrics before 1.4.2 has SSIM gauss11_valid"
ADM_GRAPH = "the peer's Inception runs in TensorFlow; the same weights in PyTorch stand in for it"

PRESETS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol(
            name="embedded",
            source="canonical, with the Fréchet distance on the feature network that comes with the harness",
            departs="the Fréchet distance is not FID and is comparable with itself alone",
            resize="none",
            frechet="embedded",
            frechet_resize="none",
            on_features=("kid", "cmmd", "prdc"),
        ),
        Protocol(
            name="canonical",
            source="8-bit pictures rounded half up, per picture; SSIM as Wang et al. 2004; LPIPS v0.1 of both networks",
            ms_ssim=True,
            lpips=("alex", "vgg"),
        ),
        Protocol(
            name="dcae",
            source="mit-han-lab/efficientvit, aecore/evaluator.py",
            departs="the peer runs Inception under autocast, sums moments in float32, compares with stored moments of "
            f"the whole validation split; {OLD_SSIM}",
            ssim="gauss11_reflect",
            lpips=("alex",),
            frechet_resize="pytorch",
        ),
        Protocol(
            name="vavae",
            source="hustvl/LightningDiT, evaluate_tokenizer.py",
            departs=f"{PER_BATCH} (SSIM, LPIPS); {OLD_SSIM}; the peer does not round resized pictures to 8 bits",
            resize="tensor-bilinear",
            posterior="sample",
            ssim="gauss11_reflect",
            ssim_pixels=("clamp", "clamp"),
            ssim_scale=(-1.0, 1.0),
            ssim_range=2.0,
            lpips=("vgg",),
            lpips_pixels=("raw", "raw"),
            frechet_resize="pytorch",
        ),
        Protocol(
            name="llamagen",
            source="FoundationVision/LlamaGen, tokenizer_image/reconstruction_vq_ddp.py",
            departs=f"{ADM_GRAPH}; the peer compares float originals, which are those of 8 bits to 1e-7",
            ssim="uniform7",
            ssim_scale=(0.0, 1.0),
            ssim_range=2.0,
        ),
        Protocol(
            name="seedvoken",
            source="TencentARC/SEED-Voken, evaluation_image.py",
            departs=f"{PER_BATCH} (PSNR, SSIM); the peer resizes by OpenCV's bilinear filter, without antialiasing",
            resize="pil-bilinear",
            scaling="float64",
            psnr_pixels=("trunc", "trunc"),
            ssim="uniform7",
            ssim_pixels=("trunc", "trunc"),
            lpips=("alex", "vgg"),
            lpips_pixels=("raw", "clamp"),
            frechet_pixels=("raw", "clamp"),
            frechet_resize="pytorch",
        ),
        Protocol(
            name="flowmo",
            source="kylesargent/FlowMo, flowmo/evaluate.py",
            departs=f"the peer's PSNR is of the pooled error of a batch, and depends on its size; {PER_BATCH} (SSIM)",
            resize="pil-bilinear",
            scaling="float64",
            psnr_pixels=("trunc", "trunc"),
            ssim="uniform7",
            ssim_pixels=("trunc", "trunc"),
            lpips=("alex", "vgg"),
            lpips_pixels=("raw", "clamp"),
            frechet_pixels=("raw", "clamp"),
            frechet_resize="pytorch",
        ),
        Protocol(
            name="titok",
            source="bytedance/1d-tokenizer, evaluator/evaluator.py and its caller",
            departs="the Inception score and the use of the codebook are not reported; the peer rounds halves to even",
            resize="pil-bicubic",
            psnr="",
            ssim="",
        ),
        Protocol(
            name="bsq",
            source="zhaoyue-zephyrus/bsq-vit, scripts/evaluate_public_tokenizer.py",
            departs="the peer compares with stored moments of its reference split",
            resize="pil-bilinear",
            psnr_pixels=("raw", "raw"),
            ssim_pixels=("raw", "raw"),
            ms_ssim=True,
            lpips=("alex",),
            lpips_pixels=("raw", "raw"),
            frechet_pixels=("raw", "raw"),
            frechet_resize="pytorch",
        ),
        Protocol(
            name="lavinal",
            source="lavinal712/AutoencoderKL, eval.py",
            resize="pil-bilinear",
            posterior="sample",
            psnr_pixels=("clamp", "clamp"),
            ssim="uniform7",
            ssim_pixels=("clamp", "clamp"),
            ssim_scale=(0.0, 1.0),
            ssim_range=1.0,
            lpips=("vgg",),
            lpips_pixels=("raw", "raw"),
            frechet_pixels=("trunc", "trunc"),
            frechet_resize="pytorch",
        ),
        Protocol(
            name="dito",
            source="yinboc/dito, trainers/ldm_trainer.py",
            departs=f"{PER_BATCH} and averages its processes equally; the peer takes the first 5,000 pictures",
            resize="pil-lanczos",
            psnr_pixels=("clamp", "clamp"),
            ssim="",
            frechet_pixels=("trunc", "trunc"),
        ),
    )
}


def get(name: str) -> Protocol:
    """The preset of a name; ValueError with a suggestion for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, 1)
    raise ValueError(f"protocol {name!r} is unknown" + (f"; did you mean {close[0]!r}?" if close else ""))
