"""Where in frequency an error sits: the orthonormal 2D Haar pyramid and radial Fourier bins. NumPy alone.

The energies of an orthonormal transform add up to the energy of the picture (Parseval), so the shares of the bands sum
to the mean squared error exactly. Everything is on the 0..255 scale.
"""

from __future__ import annotations

import numpy as np

LEVELS = 4  # 13 bands: LH, HL and HH of each level, and what is left, LL4
BANDS = (*(f"{kind}{level}" for level in range(1, LEVELS + 1) for kind in ("LH", "HL", "HH")), f"LL{LEVELS}")
SCALES = ("1", "2", "3", "4", "ll")  # the three bands of a level together; 1 is the finest, ll the mean of 16 x 16 px


def haar(image: np.ndarray, levels: int = LEVELS) -> dict[str, np.ndarray]:
    """The orthonormal Haar pyramid of [..., H, W]: each band [..., H/2^level, W/2^level], as float64.

    H is high-pass and L low-pass; the first letter is along the width, the second along the height. Raises ValueError
    where a side is no multiple of 2^levels.
    """
    low = np.asarray(image, dtype=np.float64)
    _check_sides(low.shape, levels)
    bands = {}
    for level in range(1, levels + 1):
        lh, hl, hh, low = _split(low)
        bands |= {f"LH{level}": lh / 2, f"HL{level}": hl / 2, f"HH{level}": hh / 2}
        low /= 2
    bands[f"LL{levels}"] = low
    return bands


def energies(x: np.ndarray, y: np.ndarray, levels: int = LEVELS) -> np.ndarray:
    """Energy per value of x, of y - x and of y in each Haar band, in the order of `BANDS`.

    x, y: [C, H, W], original and reconstruction on the 0..255 scale; float64 [3 * levels + 1, 3]. The middle column
    sums to mean((y - x)^2). 8-bit pictures give exact sums: the transform is done without its factors 1/2, in integers
    that float32 holds, and its squares are summed in float64.
    """
    _check_sides(x.shape, levels)
    exact = x.dtype == np.uint8 and y.dtype == np.uint8
    kind = np.float32 if exact else np.float64
    low_x = x.astype(kind)
    low_e = y.astype(kind) - low_x
    found = []
    for level in range(1, levels + 1):
        *high_x, low_x = _split(low_x)
        *high_e, low_e = _split(low_e)
        found += [_sums(a, b) / 4.0**level for a, b in zip(high_x, high_e, strict=True)]
        if level == 1:
            # a quarter of the values is left, but their squares outgrow the 24 bits of float32
            low_x, low_e = low_x.astype(np.float64), low_e.astype(np.float64)
    found.append(_sums(low_x, low_e) / 4.0**levels)
    return np.stack(found) / x.size


def by_scale(energies: np.ndarray) -> np.ndarray:
    """The three bands of a level added up: [..., 13, 3] -> [..., 5, 3] in the order of `SCALES`."""
    high = energies[..., :-1, :]
    levels = high.reshape(*high.shape[:-2], -1, 3, high.shape[-1]).sum(axis=-2)
    return np.concatenate([levels, energies[..., -1:, :]], axis=-2)


def snr(signal: np.ndarray, error: np.ndarray) -> np.ndarray:
    """10 log10(signal / error) in dB; infinite where there is no error, NaN where there is neither."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10 * np.log10(np.asarray(signal) / np.asarray(error))


def sharpness(signal: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Energy of the reconstruction over energy of the original: below 1 is blur; above 1 at a low SNR is invention."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(output) / np.asarray(signal)


def radial(x: np.ndarray, y: np.ndarray, bins: int = 8) -> np.ndarray:
    """Energy per value of x, y - x and y in rings of the 2D Fourier spectrum: [C, H, W] twice -> float64 [bins, 3].

    The rings are equally wide, from 0 to sqrt(0.5) cycles per pixel (the corner of the spectrum).
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    height, width = x.shape[-2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).ravel()
    ring = np.searchsorted(np.linspace(0, np.sqrt(0.5), bins + 1)[1:-1], frequency)  # the outer edge belongs to a ring
    # of a real picture half of the spectrum is stored: every column counts twice but those that mirror themselves
    twice = np.full(width // 2 + 1, 2.0)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    found = []
    for values in (x, y - x, y):
        power = (np.abs(np.fft.rfft2(values)) ** 2).sum(axis=0) * twice
        found.append(np.bincount(ring, power.ravel(), minlength=bins) / (height * width) / x.size)
    return np.stack(found, axis=1)


def _split(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """LH, HL, HH, LL of one level, twice as large as orthonormal."""
    low, high = image[..., 0::2, :] + image[..., 1::2, :], image[..., 0::2, :] - image[..., 1::2, :]
    a, b, c, d = low[..., 0::2], low[..., 1::2], high[..., 0::2], high[..., 1::2]
    return c + d, a - b, c - d, a + b


def _sums(x: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Sums of x^2, e^2 and (x + e)^2, in float64."""
    xx, ee, xe = (np.sum(a * b, dtype=np.float64) for a, b in ((x, x), (e, e), (x, e)))
    return np.array([xx, ee, xx + 2 * xe + ee])


def _check_sides(shape: tuple[int, ...], levels: int) -> None:
    if any(side % 2**levels for side in shape[-2:]):
        raise ValueError(f"sides {shape[-2:]} are no multiples of {2**levels}, as {levels} levels need")
