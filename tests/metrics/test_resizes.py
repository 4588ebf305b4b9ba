import numpy as np
import pytest
import torch
from PIL import Image

from bench.metrics.resizes import (
    RESIZES,
    resize_bicubic,
    resize_clean,
    resize_pil,
    resize_pytorch,
    resize_tf1,
    resize_tm,
    resized,
)
from bench.types import Error, UsageError

SIZES = [(64, 80), (256, 256), (400, 320), (299, 299)]


def pictures(height, width, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=g, dtype=torch.uint8)


def as_pil(one):
    return Image.fromarray(one.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("size", SIZES)
def test_clean_equals_clean_fid(size):
    from cleanfid.resize import build_resizer

    x = pictures(*size)
    theirs = build_resizer("clean")
    expected = np.stack([theirs(one.permute(1, 2, 0).numpy()).transpose(2, 0, 1) for one in x])
    np.testing.assert_allclose(resize_clean(x.float(), (299, 299)).numpy(), expected, atol=2e-4)  # levels of 255


@pytest.mark.parametrize("size", SIZES)
def test_tf1_equals_torch_fidelity(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    x = pictures(*size).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    torch.testing.assert_close(resize_tf1(x, (299, 299)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_bicubic_equals_torch_antialiased(size):
    x = pictures(*size).float()
    double = x.double()  # in float32 torch errs by 5e-3
    expected = torch.nn.functional.interpolate(double, (224, 336), mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(resize_bicubic(x, (224, 336)).double(), expected, atol=2e-4, rtol=0)


def test_tm_equals_pil_bilinear_before_rounding():
    x = pictures(100, 140)
    expected = [np.asarray(as_pil(one).resize((60, 50), Image.Resampling.BILINEAR)) for one in x]
    ours = resize_tm(x.float(), (50, 60)).numpy().transpose(0, 2, 3, 1)
    assert np.abs(ours - np.stack(expected)).max() < 1.01  # two roundings to whole levels


@pytest.mark.parametrize(("size", "crop"), [((64, 80), "centre"), ((301, 200), "centre"), ((90, 70), "none")])
def test_pil_equals_torchvision_on_a_pil_image(size, crop):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    target = 48 if crop == "centre" else (48, 48)
    theirs = Compose([Resize(target, InterpolationMode.BICUBIC), CenterCrop(48)])
    x = pictures(*size)
    expected = np.stack([np.asarray(theirs(as_pil(one))) for one in x]).transpose(0, 3, 1, 2)
    assert np.array_equal(resized(x.float(), "pil", 48, crop).numpy(), expected)


def test_pytorch_by_hand():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(1, 3, 4, 4)
    assert resize_pytorch(x, (2, 2))[0, 0, 0].tolist() == [0.5, 2.5]
    up = resize_pytorch(x, (8, 8))[0, 0, 0]
    torch.testing.assert_close(up, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))


@pytest.mark.parametrize("how", RESIZES)
def test_a_video_is_resized_frame_by_frame_and_a_constant_stays(how):
    video = torch.stack([pictures(40, 50), pictures(40, 50, seed=1)], dim=2).float()  # [B, 3, T, H, W]
    found = resized(video, how, 32)
    assert found.shape == (2, 3, 2, 32, 32)
    for t in range(2):
        assert torch.equal(found[:, :, t], resized(video[:, :, t], how, 32))
    flat = torch.full((1, 3, 33, 47), 77.0)
    torch.testing.assert_close(resized(flat, how, 20, "centre"), torch.full((1, 3, 20, 20), 77.0))


def test_faults_are_named():
    x = pictures(20, 20).float()
    with pytest.raises(Error, match="8-bit"):
        resize_pil(x + 0.5, (10, 10))
    with pytest.raises(UsageError, match="nearest"):
        resized(x, "nearest", 10)
    with pytest.raises(UsageError, match="left"):
        resized(x, "clean", 10, "left")
