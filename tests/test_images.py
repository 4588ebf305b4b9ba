"""The resizes against torchvision and ADM's formula; the reader itself is tested in tests/survival."""

import numpy as np
import pytest
from PIL import Image

from bench import images
from bench.types import Error


def adm_formula(picture: Image.Image, size: int) -> np.ndarray:
    """The crop of ADM, written down a second time: sizes by exponent, crop by box."""
    width, height = picture.size
    halvings = 0
    while min(width >> halvings, height >> halvings) >= 2 * size:
        halvings += 1
        picture = picture.resize((width >> halvings, height >> halvings), Image.Resampling.BOX)
    factor = size / min(picture.size)
    picture = picture.resize(tuple(round(side * factor) for side in picture.size), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


SHAPES = [(48, 48), (64, 97), (203, 131), (33, 200), (500, 741), (47, 47), (20, 31)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_adm_is_the_formula_bit_for_bit(height, width):
    image = noise(height, width)
    assert np.array_equal(images.adm(image, 48), adm_formula(Image.fromarray(image), 48))


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pil_resizes_are_torchvisions_bit_for_bit(height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    image = noise(height, width)
    for name in ("bilinear", "bicubic", "lanczos"):
        mode = transforms.InterpolationMode(name)
        peer = transforms.Compose([transforms.Resize(48, interpolation=mode), transforms.CenterCrop(48)])
        assert np.array_equal(images.pil(image, 48, name), np.asarray(peer(Image.fromarray(image)))), name


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_tensor_resize_is_torchvisions_within_rounding(height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    image = noise(height, width)
    peer = transforms.Compose([transforms.ToTensor(), transforms.Resize(48, antialias=True), transforms.CenterCrop(48)])
    expected = peer(Image.fromarray(image)).permute(1, 2, 0).numpy() * 255
    found = images.tensor(image, 48)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3  # ours is that float picture, rounded


def test_none_is_the_centre_and_refuses_what_is_too_small():
    image = noise(50, 61)
    assert np.array_equal(images.none(image, 48), image[1:49, 6:54])
    with pytest.raises(Error, match="61x50"):
        images.none(image, 51)


def test_a_square_of_the_size_passes_unchanged_through_all():
    image = noise(48, 48)
    assert set(images.RESIZES) == {"adm", "pil-bilinear", "pil-bicubic", "pil-lanczos", "tensor-bilinear", "none"}
    for name, resize in images.RESIZES.items():
        assert np.array_equal(resize(image, 48), image), name


def test_resizes_refuse_wrong_arrays_and_sizes():
    for resize in images.RESIZES.values():
        with pytest.raises(ValueError, match="uint8"):
            resize(np.zeros((8, 8, 3), np.float32), 4)
        with pytest.raises(Error, match="size"):
            resize(noise(8, 8), 0)
