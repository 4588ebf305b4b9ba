"""The suite end to end in a fake context: JPEG against lines of NumPy and Pillow, rates, errors, figures."""

import io

import numpy as np
import pytest
from fake_context import FakeContext, FakeData, measure

from bench import Error, Latents, UsageError
from bench.metrics import PSNR
from suites.reconstruction.suite import Bands, Reconstruction, RegionPSNR, Sharpness

SIZE = 64
OWN = (PSNR(), Bands(), Sharpness(), RegionPSNR())


def pictures(n=7):
    """uint8 crops of photographs and textures, with a kind and a cluster each."""
    from skimage import data

    sources = {"scene": data.astronaut(), "texture": np.repeat(data.brick()[..., None], 3, 2)}
    found = {}
    for i in range(n):
        kind = list(sources)[i % 2]
        top = 11 * i
        crop = np.ascontiguousarray(sources[kind][top : top + SIZE, 100 : 100 + SIZE])
        found[f"{kind}-{i}"] = (crop, {"kind": kind, "cluster": f"{kind}-{i // 4}"})
    return FakeData(found)


def jpeg(picture, quality):
    """The bytes of one JPEG file of uint8 [H, W, 3]."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=quality)
    return out.getvalue()


class Jpeg:
    def __init__(self, quality=50):
        self.quality = quality

    def encode(self, images):
        pictures = ((images + 1) * 127.5 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        files = [jpeg(picture, self.quality) for picture in pictures]
        return Latents(files, [8 * len(file) for file in files], side_bits=[16] * len(files))

    def decode(self, latents, seeds=None):
        import torch
        from PIL import Image

        pictures = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in latents.data])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


class Keep:
    """The identity, with whatever a test wants to break."""

    def __init__(self, change=lambda y: y):
        self.change, self.seeds = change, []

    def encode(self, images):
        return images

    def decode(self, latents, seeds=None):
        self.seeds.append(seeds)
        return self.change(latents)


def test_jpeg_scores_what_numpy_and_pillow_say():
    """PSNR and bits of each picture are exactly those of five lines without the harness."""
    from PIL import Image

    data = pictures()
    table, kept = measure(Reconstruction(size=SIZE, chunk=4), Jpeg(50), data, metrics=OWN)
    assert table.column("item") == data.ids()
    for row in table.rows:
        x = data.pictures[row["item"]][0]
        file = jpeg(x, 50)
        y = np.asarray(Image.open(io.BytesIO(file))).astype(float)
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean((y - x) ** 2)), abs=1e-9)
        assert (row["bits"], row["side_bits"], row["pixels"]) == (8 * len(file), 16, SIZE * SIZE)
        assert (kept[row["item"]]["image"].numpy() == x.transpose(2, 0, 1)).all()
        assert (kept[row["item"]]["recon"].numpy() == y.transpose(2, 0, 1)).all()


def test_numbers_do_not_depend_on_the_batch():
    one, _ = measure(Reconstruction(size=SIZE, chunk=4), Jpeg(), pictures(), batch=1, metrics=OWN)
    four, _ = measure(Reconstruction(size=SIZE, chunk=4), Jpeg(), pictures(), batch=4, metrics=OWN)
    assert one.rows == four.rows


def test_bands_are_pooled_over_the_set():
    """SNR of all scales together, from the rows, is that of all pixels together."""
    from suites.reconstruction import bands

    data = pictures()
    table, kept = measure(Reconstruction(size=SIZE), Jpeg(20), data, metrics=OWN)
    x, y = (np.stack([kept[id][name].numpy() for id in data.ids()]).astype(float) for name in ("image", "recon"))
    found = Bands().reduce(table)
    assert list(found) == list(bands.SCALES)
    whole = bands.by_scale(sum(bands.energies(a, b) for a, b in zip(x, y, strict=True)))
    for i, scale in enumerate(bands.SCALES):
        assert found[scale].value == pytest.approx(10 * np.log10(whole[i, 0] / whole[i, 1]), abs=1e-9)
        assert found[scale].low <= found[scale].value <= found[scale].high
        assert Sharpness().reduce(table)[scale].value == pytest.approx(whole[i, 2] / whole[i, 0], rel=1e-9)
    errors = sum(table.values(f"band.{scale}.error").sum() for scale in bands.SCALES) / len(table)
    assert errors == pytest.approx(np.mean((y - x) ** 2), rel=1e-12)
    assert found["1"].value < found["4"].value < found["ll"].value  # JPEG spends its bits on the coarse scales


def test_regions_reduce_to_means_and_say_what_they_left_out():
    table, _ = measure(Reconstruction(size=SIZE), Jpeg(20), pictures(), metrics=OWN)
    found = RegionPSNR().reduce(table)
    for region, estimate in found.items():
        values = [v for v in table.column(f"region-psnr.{region}") if v is not None]
        assert estimate.n == len(values)
        if values:
            assert estimate.value == pytest.approx(np.mean(values))
        else:
            assert estimate.value is None
        assert (estimate.n == len(table)) or estimate.note.startswith(f"{len(table) - len(values)} with no such area")
    assert found["edge"].value < found["flat"].value  # JPEG rings at edges


def test_ssim_of_regions_is_the_mean_of_the_map_of_scikit_image():
    from skimage.metrics import structural_similarity

    from suites.reconstruction import regions

    suite = Reconstruction(size=SIZE)
    (metric,) = (metric for metric in suite.metrics if metric.name == "ssim")
    table, kept = measure(suite, Jpeg(20), pictures(), metrics=(metric,))
    gauss = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0, full=True)
    for row in table.rows:
        x, y = (kept[row["item"]][name].numpy() for name in ("image", "recon"))
        whole, full = structural_similarity(x, y, **gauss)
        assert row["ssim"] == pytest.approx(whole, abs=1e-9)
        inner = full.mean(axis=0)[5:-5, 5:-5]
        for name, mask in regions.masks(x).items():
            mask = mask[5:-5, 5:-5]
            expected = inner[mask].mean() if mask.sum() >= regions.MIN_PIXELS else None
            assert row[f"ssim.{name}"] == (expected if expected is None else pytest.approx(expected, abs=1e-9))
    found = metric.reduce(table)
    assert list(found) == ["", *regions.REGIONS]
    assert found[""].value == pytest.approx(np.mean(table.column("ssim")))
    assert found["edge"].value == pytest.approx(np.nanmean(table.values("ssim.edge")))


def test_a_perfect_copy_is_null_and_complete():
    suite = Reconstruction(size=SIZE)
    table, _ = measure(suite, Keep(), pictures(), metrics=OWN)
    for metric in (PSNR(), Bands(), RegionPSNR()):
        found = metric.reduce(table)
        for estimate in found.values() if isinstance(found, dict) else [found]:
            assert estimate.value is None and estimate.note
    assert all(e.value == 1 for e in Sharpness().reduce(table).values())
    assert list(suite.figures(table))


def test_a_plain_tensor_counts_its_type():
    class Half(Keep):
        def encode(self, images):
            return images[:, :, ::8, ::8].bfloat16()

        def decode(self, latents, seeds=None):
            return latents.float().repeat_interleave(8, 2).repeat_interleave(8, 3)

    table, _ = measure(Reconstruction(size=SIZE), Half(), pictures(2), metrics=())
    assert table.column("bits") == [3 * 8 * 8 * 16] * 2 and table.column("side_bits") == [0, 0]


def test_posterior_follows_the_protocol():
    """Mode by default; vavae samples, from one seed per item whatever the batch."""
    data, mode = pictures(4), Keep()
    measure(Reconstruction(size=SIZE), mode, data, metrics=())
    assert mode.seeds == [None, None]
    suite = Reconstruction(size=SIZE, protocol="vavae")
    seeds = []
    for batch in (1, 3):
        model = Keep()
        measure(suite, model, data, batch=batch, metrics=())
        seeds.append([seed for part in model.seeds for seed in part])
    context = FakeContext(data, suite)
    assert seeds[0] == seeds[1] == [context.seed(id, "posterior") for id in data.ids()]
    assert len(set(seeds[0])) == 4


def test_resize_follows_the_protocol_and_small_pictures_are_refused():
    data = FakeData({"small": (np.zeros((40, 50, 3), np.uint8), {})})
    with pytest.raises(Error, match="50x40"):
        measure(Reconstruction(size=SIZE), Keep(), data, metrics=())
    _, kept = measure(Reconstruction(size=SIZE, protocol="dcae"), Keep(), data, metrics=())
    assert kept["small"]["image"].shape == (3, SIZE, SIZE)


def test_media_are_8_bit_where_the_protocol_rounds_and_float_where_it_does_not():
    import torch

    for protocol, expected in {
        "embedded": {"image": torch.uint8, "recon": torch.uint8},
        "bsq": {"image": torch.float32, "recon": torch.float32},
    }.items():
        _, kept = measure(Reconstruction(size=SIZE, protocol=protocol), Keep(), pictures(1), metrics=())
        (media,) = kept.values()
        assert {name: picture.dtype for name, picture in media.items()} == expected
    _, kept = measure(Reconstruction(size=SIZE, protocol="vavae"), Keep(lambda y: y * 2), pictures(1), metrics=())
    (media,) = kept.values()
    assert media["recon-raw-raw"].abs().max() > 1 and media["recon-clamp-clamp"].abs().max() <= 1
    assert media["recon"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[..., :-8], r"decoded \[3, 3, 64, 64\] into \[3, 3, 64, 56\]"),
        (lambda y: y[:1], r"decoded \[3, 3, 64, 64\] into \[1, 3, 64, 64\]"),
        (lambda y: y * float("nan"), "NaN or infinity in 3 of 3 pictures, item scene-0 first"),
    ],
)
def test_a_broken_model_is_named(change, message):
    with pytest.raises(Error, match=message):
        measure(Reconstruction(size=SIZE), Keep(change), pictures(3), metrics=())


def test_a_model_that_writes_into_its_input_cannot_change_the_original():
    class Vandal(Keep):
        def encode(self, images):
            images.zero_()
            return images

    data = pictures(1)
    _, kept = measure(Reconstruction(size=SIZE), Vandal(), data, metrics=())
    ((id, (picture, _)),) = data.pictures.items()
    assert (kept[id]["image"].numpy() == picture.transpose(2, 0, 1)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "canonicle"}, "did you mean 'canonical'"),
        ({"size": 100}, "multiple of 16"),
        ({"size": 0}, "multiple of 16"),
        ({"chunk": 0}, "1 or more"),
    ],
)
def test_wrong_parameters_are_refused_at_once(fields, message):
    with pytest.raises(UsageError, match=message):
        Reconstruction(**fields)


def test_figures_draw_what_their_rows_hold():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Canvas

    suite = Reconstruction(size=SIZE)
    table, _ = measure(suite, Jpeg(20), pictures(), metrics=OWN)
    figures = {figure.name: figure for figure in suite.figures(table)}
    assert set(figures) == {"psnr", "bands"}
    axes = Canvas().subplots()
    figures["bands"].draw(axes)
    assert axes.lines[0].get_ydata() == pytest.approx([row["snr"] for row in figures["bands"].rows])
    assert [row["snr"] for row in figures["bands"].rows] == [e.value for e in Bands().reduce(table).values()]
    axes = Canvas().subplots()
    figures["psnr"].draw(axes)
    assert [line.get_label() for line in axes.lines] == ["all", "kind=scene", "kind=texture"]
    everything = [row for row in figures["psnr"].rows if row["slice"] == "all"]
    assert [row["psnr"] for row in everything] == sorted(table.column("psnr")) and everything[-1]["share"] == 1


def test_the_definition_is_kept_with_the_run():
    import json

    from suites.reconstruction import protocols

    suite = Reconstruction(protocol="llamagen")
    ((name, data),) = suite.artifacts(None)
    record = json.loads(data)
    assert name == "protocol.json" and record["hash"] == protocols.get("llamagen").hash()
    assert record["definition"]["ssim_range"] == 2.0 and record["departs"]


@pytest.fixture
def untrained_network(tmp_path, monkeypatch):
    """The embedded feature network with random weights, so that this test needs no trained one."""
    import torch
    from safetensors.torch import save_file

    from bench.metrics import extractors
    from bench.mini import features

    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(v.shape, generator=generator) * 0.1 for name, v in features.build().state_dict().items()}
    save_file(state, tmp_path / "features.safetensors")
    monkeypatch.setattr(features, "path", lambda: tmp_path / "features.safetensors")
    extractors.embedded.cache_clear()
    yield
    extractors.embedded.cache_clear()


def test_every_score_of_the_default_protocol_is_there_and_complete(untrained_network):
    from bench.identity import canonical

    suite = Reconstruction(size=SIZE)
    table, _ = measure(suite, Jpeg(20), pictures(40))
    canonical(table.rows)  # can be stored: no NaN, no infinity, no foreign type
    scores = {(score.metric, score.slice): score for score in suite.score(table)}
    assert {slice for _, slice in scores} == {"all", "kind=scene", "kind=texture"}
    assert {metric for metric, _ in scores} == {
        *("bits-per-pixel", "bits-per-pixel.side", "psnr", "pairwise-embedded"),
        *("frechet-embedded", "frechet-embedded.corrected", "kid-embedded"),
        *("cmmd-embedded", "cmmd-embedded.unbiased"),
        *(f"prdc-embedded.{part}" for part in ("precision", "recall", "density", "coverage")),
        *(f"ssim{region}" for region in ("", ".edge", ".flat", ".dark", ".bright")),
        *(f"region-psnr.{region}" for region in ("edge", "flat", "dark", "bright")),
        *(f"{name}.{scale}" for name in ("bands", "sharpness") for scale in ("1", "2", "3", "4", "ll")),
    }
    assert all(score.complete for score in scores.values())
    assert scores["psnr", "all"].n == 40 and scores["psnr", "kind=scene"].n == 20
    assert scores["frechet-embedded", "all"].value > 0
    assert "32 dimensions" in scores["frechet-embedded", "kind=scene"].note
    bits = [(row["bits"] + row["side_bits"]) / row["pixels"] for row in table.rows]
    assert scores["bits-per-pixel", "all"].value == pytest.approx(np.mean(bits))


def test_importing_the_suite_loads_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, suites.reconstruction.suite, suites.noise\n"
        "print(*[m for m in ('torch', 'scipy', 'pandas', 'matplotlib', 'skimage', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
