"""Each preset gives the number that its peer's own library calls give on one pair of pictures."""

import dataclasses
import json

import numpy as np
import pytest
from fake_context import FakeData, measure
from test_bands_regions import SHARED, golden_pair

from suites.reconstruction import protocols
from suites.reconstruction.suite import Reconstruction

SIZE = 192  # px: MS-SSIM needs more than 160


def original():
    """uint8 [SIZE, SIZE, 3]: a photograph that scikit-image installs."""
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[:SIZE, 100 : 100 + SIZE])


class Blur:
    """An autoencoder whose reconstruction overshoots [-1, 1], as real decoders do: blur, noise, more contrast."""

    def encode(self, images):
        return images

    def decode(self, latents, seeds=None):
        import torch

        blurred = torch.nn.functional.avg_pool2d(latents, 3, 1, 1, count_include_pad=False)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        return 1.1 * blurred + 0.05 * noise


def peers_input(scaling="float32"):
    """The pair in [-1, 1] as a peer has it in memory: float32 [1, 3, SIZE, SIZE] twice, made without our code."""
    import torch

    x = torch.from_numpy(original().transpose(2, 0, 1).copy())[None]
    x = x.float() / 127.5 - 1 if scaling == "float32" else (x.double() / 127.5 - 1).float()
    return x, Blur().decode(Blur().encode(x))


def nhwc(v):
    return v[0].permute(1, 2, 0).numpy()


def skimage_psnr(x, y, **options):
    from skimage.metrics import peak_signal_noise_ratio

    return peak_signal_noise_ratio(x, y, **options)


def skimage_ssim(x, y, **options):
    from skimage.metrics import structural_similarity

    return structural_similarity(x, y, channel_axis=-1, **options)


GAUSS = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def torchmetrics_ssim(x, y, data_range):
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(y.double(), x.double(), data_range=data_range))


def half_up(v):
    import torch

    return (255 * ((v + 1) / 2) + 0.5).clamp(0, 255).to(torch.uint8)


def canonical():
    x, y = (nhwc(half_up(v)) for v in peers_input())
    return {"psnr": skimage_psnr(x, y), "ssim": skimage_ssim(x, y, **GAUSS)}


def dcae():
    x, y = (half_up(v) for v in peers_input())
    return {"psnr": skimage_psnr(nhwc(x), nhwc(y)), "ssim": torchmetrics_ssim(x, y, (0.0, 255.0))}


def vavae():
    import torch

    x, y = peers_input()
    x8, y8 = (nhwc(torch.clamp(127.5 * v + 128.0, 0, 255).to(torch.uint8)) for v in (x, y))
    return {"psnr": skimage_psnr(x8, y8), "ssim": torchmetrics_ssim(x, y, (-1.0, 1.0))}


def llamagen():
    import torch

    x, y = peers_input()
    x = (nhwc(x) + 1.0) / 2.0
    y = nhwc(torch.clamp(127.5 * y + 128.0, 0, 255).to(torch.uint8)).astype(np.float32) / 255.0
    return {"psnr": skimage_psnr(y, x, data_range=1.0), "ssim": skimage_ssim(y, x, data_range=2.0)}


def seedvoken():
    import torch

    x, y = peers_input("float64")
    x, y = ((v.clamp(-1, 1) + 1) / 2 for v in (x, y))
    x, y = (nhwc((v * 255.0).to(torch.uint8)).astype(np.float32) / 255.0 for v in (x, y))
    return {"psnr": skimage_psnr(x, y, data_range=1.0), "ssim": skimage_ssim(y, x, data_range=1.0)}


def flowmo():
    """The peer's batch is one picture here, so its pooled PSNR is ours."""
    return seedvoken()


def lavinal():
    x, y = (((nhwc(v) + 1.0) / 2.0).clip(0.0, 1.0) for v in peers_input())
    return {"psnr": skimage_psnr(x, y, data_range=1.0), "ssim": skimage_ssim(x, y, data_range=1.0)}


def bsq():
    x, y = ((v + 1) * 127.5 for v in peers_input())
    psnr = 20 * np.log10(255.0 / np.sqrt(np.mean((x.double() - y.double()).numpy() ** 2)))
    ssim = skimage_ssim(nhwc(x).astype(float), nhwc(y).astype(float), data_range=255, **GAUSS)
    return {"psnr": psnr, "ssim": ssim}


def dito():
    x, y = ((v * 0.5 + 0.5).clamp(0, 1).double() for v in peers_input())
    return {"psnr": float(-10 * ((y - x) ** 2).mean().log10())}


PEERS = {f.__name__: f for f in (canonical, dcae, vavae, llamagen, seedvoken, flowmo, lavinal, bsq, dito)}


def main(found):
    """The estimate of a metric itself, where it has others beside it."""
    return found[""] if isinstance(found, dict) else found


@pytest.mark.parametrize("name", PEERS)
def test_preset_gives_the_number_of_its_peer(name):
    """Tolerances: 1e-4 dB and 2e-5, as peers compute in float32 where we sum exactly."""
    suite = Reconstruction(size=SIZE, protocol=name)
    local = [metric for metric in suite.metrics if metric.name == "psnr" or metric.name.startswith("ssim")]
    table, _ = measure(suite, Blur(), FakeData({"a": (original(), {})}), metrics=local)
    expected = PEERS[name]()
    found = {metric.name.partition("_")[0]: main(metric.reduce(table)) for metric in local}
    assert found.keys() == expected.keys()
    assert found["psnr"].value == pytest.approx(expected["psnr"], abs=1e-4)
    if "ssim" in expected:
        assert found["ssim"].value == pytest.approx(expected["ssim"], abs=2e-5)


def test_the_presets_do_differ_on_this_pair():
    """Else the test above could not tell one from another."""
    values = [f() for f in PEERS.values()]
    assert len({round(v["psnr"], 3) for v in values}) == 4  # rounded, cut, raw, clamped
    assert len({round(v["ssim"], 3) for v in values if "ssim" in v}) == 7


@pytest.mark.parametrize("name", protocols.PRESETS)
def test_metrics_read_media_that_the_suite_yields(name):
    """By name, and 8-bit where the metric says that they are quantised."""
    import torch

    suite = Reconstruction(size=SIZE, protocol=name)
    _, kept = measure(suite, Blur(), FakeData({"a": (original(), {})}), metrics=())
    read = set()
    for metric in (getattr(metric, "metric", metric) for metric in suite.metrics):
        if hasattr(metric, "quantise"):
            for side in (metric.real, metric.fake):
                assert (kept["a"][side].dtype == torch.uint8) == (metric.quantise != "none")
                read.add(side)
    assert read == set(kept["a"]) and {"image", "recon"} <= read


def test_presets_report_what_their_peers_do():
    def names(protocol):
        return {metric.name for metric in Reconstruction(protocol=protocol).metrics}

    assert names("titok") == {"bits-per-pixel", "fid", "pairwise-inception-tf1"}
    assert {"psnr", "ssim", "ms-ssim", "lpips-alex", "fid"} <= names("bsq")
    assert {"lpips-alex", "lpips-vgg", "ssim_uniform7"} <= names("seedvoken")
    assert "fid" not in names("embedded") and "frechet-embedded" in names("embedded")


@pytest.mark.parametrize("degradation", ["box3", "noise20"])
def test_presets_match_the_golden_values(degradation):
    """Tolerance 1e-6: the golden values are of float64."""
    x, y, _ = golden_pair(degradation)
    golden = json.loads((SHARED / "golden/metrics.json").read_text())[f"crop256/{degradation}"]

    class Degraded(Blur):
        def decode(self, latents, seeds=None):
            import torch

            return torch.from_numpy(np.ascontiguousarray(y))[None].float() / 127.5 - 1

    data = FakeData({"a": (np.ascontiguousarray(x.transpose(1, 2, 0)), {})})
    for protocol, key in {
        "canonical": "ssim_own_gauss11_valid",
        "dcae": "ssim_torchmetrics_f64",
        "llamagen": "ssim_llamagen_range2",
    }.items():
        suite = Reconstruction(protocol=protocol)
        local = [metric for metric in suite.metrics if metric.name == "psnr" or metric.name.startswith("ssim")]
        table, _ = measure(suite, Degraded(), data, metrics=local)
        psnr, ssim = (main(metric.reduce(table)).value for metric in local)
        assert psnr == pytest.approx(golden["psnr_own"], abs=1e-9)
        assert ssim == pytest.approx(golden[key], abs=1e-6)


HASHES = {
    "embedded": "c17ac17c695d",
    "canonical": "c187b14637c2",
    "dcae": "848587ce1f5d",
    "vavae": "16836bcce58f",
    "llamagen": "f262a9b152ae",
    "seedvoken": "9c65cc58d30e",
    "flowmo": "9c65cc58d30e",
    "titok": "790e5f8f2263",
    "bsq": "787db5aeffce",
    "lavinal": "7d7167b6add3",
    "dito": "5806aabd8583",
}


def test_a_changed_preset_is_noticed():
    """A preset is part of what published numbers mean: change one, and raise the version of the suite."""
    assert {name: preset.hash() for name, preset in protocols.PRESETS.items()} == HASHES


def test_hash_sees_the_definition_and_not_its_description():
    base = protocols.get("canonical")
    assert dataclasses.replace(base, name="x", source="y", departs="z").hash() == base.hash()
    changed = dataclasses.replace(base, ssim_range=2.0, posterior="sample")
    assert changed.hash() != base.hash()
    assert changed.diff(base) == {"ssim_range": (2.0, 255.0), "posterior": ("sample", "mode")}
    assert len(base.hash()) == 12 and int(base.hash(), 16) >= 0


def test_unknown_protocol_is_named_with_a_suggestion():
    with pytest.raises(ValueError, match="'lamagen' is unknown; did you mean 'llamagen'"):
        protocols.get("lamagen")


def test_every_preset_says_where_it_was_read_and_names_a_resize_that_exists():
    from bench.images import RESIZES

    for name, preset in protocols.PRESETS.items():
        assert preset.name == name and preset.source
        assert preset.resize in RESIZES
