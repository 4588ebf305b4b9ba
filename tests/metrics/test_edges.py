"""What every metric says of itself; what it makes of inputs that break peers is in survival/test_numbers.py."""

import pytest
import torch

from bench import metrics
from bench.types import Error


class Context:
    device = torch.device("cpu")

    def weights(self, name):
        raise Error(f"weights {name} are missing", hint=f"bench data fetch weights/{name}")


def noise(n, seed=0):
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_missing_weights_name_the_fetch_line():
    with pytest.raises(Error) as caught:
        metrics.LPIPS().measure({"image": noise(1), "recon": noise(1, 1)}, Context())
    assert caught.value.hint == "bench data fetch weights/lpips-alex-backbone"


def test_metrics_say_which_weights_they_need():
    from bench.manifest_format import read_weights
    from bench.manifest_places import find

    needed = metrics.LPIPS("vgg").weights + metrics.Frechet("inception-tf1").weights
    assert len(needed) == 3 and all(read_weights(find(f"weights/{name}"))["locked"] for name in needed)
    assert metrics.Frechet().weights == metrics.PairwiseFeatureDistance().weights == ()


def test_all_metrics_are_exported_and_frozen():
    for name in metrics.__all__:
        given = {"question": "Is it red?"} if name == "Asked" else {}
        made, again = (getattr(metrics, name)(**given) for _ in range(2))
        assert made.version >= 1 and made.better in ("higher", "lower") and hash(made) == hash(again)
