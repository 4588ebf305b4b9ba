"""Metrics: pure functions (arrays in, numbers out) in the modules, and a thin `Metric` for each, found here by name."""

_HOME = {
    "PSNR": "pixel",
    "SSIM": "ssim",
    "MSSSIM": "ssim",
    "LPIPS": "lpips",
    "CLIPScore": "clip",
    "Frechet": "frechet",
    "PairwiseFeatureDistance": "frechet",
    "FVD": "video",
    "BitsPerPixel": "rate",
    "KID": "kid",
    "PRDC": "prdc",
    "InceptionScore": "inception_score",
    "CMMD": "cmmd",
    "Asked": "asked",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"bench.metrics.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bench.metrics' has no attribute {name!r}")
