"""Feature networks and LPIPS with random weights, one pass instead of two, and imports, against peers."""

import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
from measure import QUICK, Calls, Race, Row, peer, processes
from pictures import file, opened, walk


@cache
def weights() -> Path:
    """Random weights in the layout of the FID papers' Inception, as a file; they keep the scale of their input."""
    import torch
    from safetensors.torch import save_file

    net = inception_of_fidelity()
    folder = tempfile.mkdtemp()
    path = Path(folder) / "inception.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}, path)
    assert torch.is_tensor(net.fc.weight)
    return path


@cache
def inception_of_fidelity():
    """torch-fidelity's Inception with random weights."""
    import torch

    module = "torch_fidelity.feature_extractor_inceptionv3"
    with (
        mock.patch(f"{module}.load_state_dict_from_url", return_value={}),
        mock.patch("torch.nn.Module.load_state_dict"),
    ):
        net = peer(f"{module}.FeatureExtractorInceptionV3")("inception", ["2048", "logits_unbiased"])
    g = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=g)
        elif value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=g)
    return net


@cache
def inception_of_pytorch_fid():
    with (
        mock.patch("pytorch_fid.inception.load_state_dict_from_url", return_value={}),
        mock.patch("torch.nn.Module.load_state_dict"),
    ):
        return peer("pytorch_fid.inception.InceptionV3")([3]).eval().requires_grad_(False)


def pictures(batch: int, size: int):
    import torch

    return torch.from_numpy(np.stack([walk((3, size, size), i) for i in range(batch)]))


def inception(batch: int) -> Calls:
    """Pictures of 299 px, so that the resizes do nothing: pool3 and logits from one pass."""
    import torch

    from bench.metrics.extractors import inception

    x = pictures(batch, 299)
    net, extractor = inception_of_fidelity(), inception(weights(), "tf1")

    def fidelity():
        with torch.no_grad():
            return torch.cat([net(part)[0] for part in x.split(4)]).numpy()

    def pytorch_fid():
        with torch.no_grad():
            return torch.cat([inception_of_pytorch_fid()(part / 255.0)[0] for part in x.split(4)])[..., 0, 0].numpy()

    return {"": lambda: extractor(x), "torch-fidelity": fidelity, "pytorch-fid": pytorch_fid}


def features_apart(ours: np.ndarray, theirs: np.ndarray) -> str:
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return f"differs by {difference:.1g} of the largest" if difference < 0.01 else "other weights"


@cache
def judges():
    """LPIPS of the package with random weights, and ours with the same."""
    import torch

    from bench.metrics.lpips import Judge

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peer("lpips.LPIPS")(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    g = torch.Generator().manual_seed(0)
    for name, value in theirs.state_dict().items():
        if name.startswith("lin"):
            value.uniform_(0, 0.01, generator=g)
    backbone = {"features." + k.partition(".")[2]: v for k, v in theirs.net.state_dict().items()}
    heads = {k: v for k, v in theirs.state_dict().items() if k.startswith("lin") and ".model." in k}
    return theirs, Judge("vgg", backbone, heads)


def lpips(size: int) -> Calls:
    """One original and the reconstructions of four models."""
    import torch

    from bench.metrics.lpips import lpips_many

    theirs, judge = judges()
    x = pictures(1, size).float() / 127.5 - 1
    g = torch.Generator().manual_seed(1)
    ys = [(x + 0.1 * (i + 1) * torch.randn(x.shape, generator=g)).clamp(-1, 1) for i in range(4)]

    def package():
        with torch.no_grad():
            return [float(theirs(x, y)) for y in ys]

    return {"": lambda: lpips_many(judge, x, ys)[:, 0].tolist(), "lpips": package}


def apart(ours: list[float], theirs: list[float]) -> str:
    return f"differs by {np.abs(np.subtract(ours, theirs)).max():.1g}"


def one_pass(count: int) -> Calls:
    """From JPEG files to what FID, Inception score, KID, precision and recall need."""
    import torch

    from bench.images import read
    from bench.metrics.extractors import inception

    path = file(512, "jpg")
    extractor = inception(weights(), "tf1")

    def batches(decode):
        for start in range(0, count, 4):
            pictures = [decode(path) for _ in range(min(4, count - start))]
            yield torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()

    def ours():
        return [extractor.outputs(x) for x in batches(read)]

    def two_networks():
        with torch.no_grad():
            first = [inception_of_pytorch_fid()(x / 255.0)[0] for x in batches(opened)]
            return first, [inception_of_fidelity()(x) for x in batches(opened)]

    return {"": ours, "two networks": two_networks}


RACES = [
    Race(
        "Inception, 8 pictures",
        inception,
        8,
        4,
        3,
        {"torch-fidelity": 1.5},
        features_apart,
        each=True,
        scale=1000.0,
        unit="CPU ms/picture",
    ),
    Race("LPIPS VGG, 4 versions of one original of 256 px", lpips, 256, 64, 2, {"lpips": 2.0}, apart),
    Race(
        "FID + IS + KID + PRDC, files to features",
        one_pass,
        8,
        4,
        2,
        {"two networks": 3.0},
        each=True,
        scale=1000.0,
        unit="CPU ms/picture",
        note="the peer is HEIM's route: pytorch-fid's network for FID, torch-fidelity's for the others; random weights",
    ),
]


def imports() -> list[Row]:
    """CPU seconds that importing adds to an empty interpreter."""

    def spent(statement: str) -> float | None:
        def call() -> None:
            subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True)

        try:
            return processes(call, 1 if QUICK else 3)
        except subprocess.CalledProcessError:
            return None

    empty = spent("pass")
    core = ("frechet", "kid", "cmmd", "prdc", "pixel", "ssim", "lpips", "clip", "extractors")
    ours = spent("; ".join(f"import bench.metrics.{name}" for name in core)) - empty
    rows = []
    for name, module in (
        ("NumPy alone", "numpy"),
        ("torch-fidelity", "torch_fidelity"),
        ("torchmetrics", "torchmetrics.image.fid"),
        ("clean-fid", "cleanfid.fid"),
    ):
        theirs = spent(f"import {module}")
        rows.append(
            Row(
                "import of all metrics",
                name,
                ours,
                None if theirs is None else theirs - empty,
                "CPU s",
                most=0.2,
                note="no torch until a network is opened",
            )
        )
    return rows
