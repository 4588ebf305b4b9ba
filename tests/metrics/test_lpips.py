import warnings
from functools import cache

import numpy as np
import pytest
import torch
from metric_pictures import DATA

from bench.metrics.extractors import read_state
from bench.metrics.lpips import LPIPS, Judge, lpips, lpips_many, lpips_map
from bench.types import Error, Table, UsageError


@cache
def heads(net):
    path = DATA / "weights" / "lpips_lin" / f"{net}.pth"
    if not path.exists():
        pytest.skip(f"linear heads ../shared/data/weights/lpips_lin/{net}.pth are absent")
    return torch.load(path, map_location="cpu", weights_only=True)


@cache
def peer_and_backbone(net, spatial=False):
    """The lpips package with a random backbone and the real heads, and that backbone under torchvision's names."""
    import lpips as package

    with warnings.catch_warnings(), torch.device("meta"):  # the classifiers, not needed, would take seconds to draw
        warnings.simplefilter("ignore")
        peer = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False, spatial=spatial)
    g = torch.Generator().manual_seed(0)
    state = dict(heads(net))
    for name, like in peer.net.state_dict().items():
        fan = like[0].numel() if like.dim() > 1 else 100
        state[f"net.{name}"] = torch.randn(like.shape, generator=g) * (2 / fan) ** 0.5
    peer.scaling_layer = package.ScalingLayer()
    peer.load_state_dict(state, strict=False, assign=True)
    assert not any(v.is_meta for v in peer.parameters())
    return peer, {"features." + k.partition(".")[2]: v for k, v in peer.net.state_dict().items()}


def pictures(size=64, batch=2):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, size, size + 16, generator=g) * 2 - 1
    return x, (x + 0.3 * torch.randn(x.shape, generator=g)).clamp(-1, 1)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_equals_the_lpips_package(net):
    peer, backbone = peer_and_backbone(net)
    x, y = pictures()
    with torch.no_grad():
        theirs = peer(x, y).flatten().double().numpy()
    ours = lpips(Judge(net, backbone, heads(net)), x, y)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_map_equals_the_spatial_option_of_the_package():
    peer, backbone = peer_and_backbone("alex", spatial=True)
    x, y = pictures()
    with torch.no_grad():
        theirs = peer(x, y)[:, 0].numpy()
    np.testing.assert_allclose(lpips_map(Judge("alex", backbone, heads("alex")), x, y).numpy(), theirs, atol=1e-6)


def test_same_picture_and_batch():
    judge = Judge("alex", peer_and_backbone("alex")[1], heads("alex"))
    x, y = pictures(batch=3)
    assert (lpips(judge, x, x) == 0).all()
    assert np.array_equal(lpips(judge, x, y)[1:2], lpips(judge, x[1:2], y[1:2]))


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_features_of_an_original_are_computed_once_for_all_its_versions(net, monkeypatch):
    judge = Judge(net, peer_and_backbone(net)[1], heads(net))
    x, y = pictures()
    versions = [y, x, -y]
    alone = np.stack([lpips(judge, x, v) for v in versions])
    passes, features = [], judge.features
    monkeypatch.setattr(judge, "features", lambda images: passes.append(len(images)) or features(images))
    assert np.array_equal(lpips_many(judge, x, versions), alone)
    assert passes == [1] * 8  # two originals, three versions of each
    assert lpips_many(judge, x, []).shape == (0, 2)


class Context:
    device = torch.device("cpu")

    def __init__(self, folder):
        self.folder = folder

    def weights(self, name):
        return self.folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    backbone = {k: v.contiguous() for k, v in peer_and_backbone("alex")[1].items()}
    save_file(backbone, folder / "lpips-alex-backbone.safetensors")
    save_file(heads("alex"), folder / "lpips-alex-lin.safetensors")
    return Context(folder)


def test_metric(context):
    x, y = pictures()
    columns = LPIPS().measure({"image": x, "recon": y}, context)
    judge = Judge("alex", *(read_state(context.weights(f"lpips-alex-{part}")) for part in ("backbone", "lin")))
    eight_bit = [((v + 1) * 127.5 + 0.5).floor() / 127.5 - 1 for v in (x, y)]
    np.testing.assert_allclose(columns["lpips-alex"], lpips(judge, *eight_bit), rtol=1e-5)
    raw = LPIPS(quantise="none").measure({"image": x, "recon": y}, context)["lpips-alex"]
    np.testing.assert_allclose(raw, lpips(judge, x, y), rtol=1e-12)
    wrong = LPIPS(quantise="none", input_range=(0.0, 1.0)).measure({"image": x, "recon": y}, context)["lpips-alex"]
    np.testing.assert_allclose(wrong, lpips(judge, x / 2 + 0.5, y / 2 + 0.5), rtol=1e-5)
    table = Table([{"item": str(i), **{k: v[i] for k, v in columns.items()}} for i in range(2)])
    assert LPIPS().reduce(table).value == pytest.approx(np.mean(columns["lpips-alex"]))
    assert LPIPS().signature(table).startswith("lpips|v0.1|net:alex@") and "|in:-1..1|round|v:1" in LPIPS().signature(
        table
    )


def test_small_pictures_are_null_with_a_reason(context):
    columns = LPIPS().measure({"image": torch.zeros(2, 3, 16, 16), "recon": torch.ones(2, 3, 16, 16)}, context)
    found = LPIPS().reduce(Table([{"item": str(i), **{k: v[i] for k, v in columns.items()}} for i in range(2)]))
    assert found.value is None and found.note == "2 pictures smaller than 32 px"


def test_faults_are_named():
    backbone = peer_and_backbone("alex")[1]
    with pytest.raises(UsageError, match="resnet"):
        Judge("resnet", backbone, {})
    with pytest.raises(Error, match="backbone of LPIPS vgg does not fit"):
        Judge("vgg", backbone, {})
    with pytest.raises(Error, match="heads of LPIPS alex lack"):
        Judge("alex", backbone, {})
    judge = Judge("alex", backbone, heads("alex"))
    with pytest.raises(Error, match="float pictures"):
        lpips(judge, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(Error, match="at least 32"):
        lpips(judge, *[torch.zeros(1, 3, 8, 8)] * 2)
