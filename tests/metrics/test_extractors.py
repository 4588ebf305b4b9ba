import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench.manifest_format import read_weights
from bench.manifest_places import find
from bench.manifest_verbs import lock
from bench.manifest_weights import weights_path
from bench.metrics import extractors, networks
from bench.metrics.extractors import inception
from bench.metrics.frechet import Frechet, PairwiseFeatureDistance, frechet_from_features
from bench.metrics.precision import full_precision
from bench.types import Error, Table, UsageError


def pictures(height, width, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=g, dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in the layout of the FID networks, kept near unit scale through the depth."""
    import torchvision

    with torch.device("meta"):
        shapes = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, like in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        fan = max(1, like[0].numel()) if like.dim() > 1 else 1
        drawn = torch.randn(like.shape, generator=g) * (2 / fan) ** 0.5
        positive = name.endswith(("running_var", "bn.weight"))
        state[name] = drawn.abs().clamp(0.3, 1.5) if positive else drawn * (0.2 if like.dim() == 1 else 1.0)
    folder = tmp_path_factory.mktemp("inception")
    torch.save(state, folder / "inception.pth")
    save_file(state, folder / "inception.safetensors")
    return folder


@pytest.fixture(scope="module")
def peer(weights):
    """torch-fidelity's network with the same weights: uint8 pictures -> features and logits."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path, outputs = str(weights / "inception.pth"), ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", outputs, feature_extractor_weights_path=path)

    seen = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, found: seen.update(map=found.numpy()))

    def run(x):
        with torch.no_grad():
            outputs = dict(zip(("", "logits"), (found.numpy() for found in network(x)), strict=True))
        spatial = np.transpose(seen["map"][:, :7], (0, 2, 3, 1))  # as TensorFlow lays it out
        return {**outputs, "spatial": spatial.reshape(len(x), -1)}

    return run


# Where there is something to resize, rounding of the two resizes comes on top of that of the graph.
@pytest.mark.parametrize(("size", "tolerance"), [((299, 299), 1e-6), ((120, 150), 1e-5)])
def test_features_and_logits_equal_torch_fidelity(weights, peer, size, tolerance):
    x = pictures(*size)
    expected = peer(x)
    ours = inception(weights / "inception.safetensors", "tf1").outputs(x)
    for name, dim, factor in (("", 2048, 1), ("logits", 1008, 1), ("spatial", 2023, 3)):  # the last are not averaged
        assert ours[name].shape == (2, dim) and ours[name].dtype == np.float32
        assert expected[name].std() > 1e-3  # else equality would mean nothing
        assert np.linalg.norm(ours[name] - expected[name]) < factor * tolerance * np.linalg.norm(expected[name])


def test_resize_is_part_of_the_extractor(weights):
    path = weights / "inception.safetensors"
    x = pictures(100, 100)
    found = {resize: inception(path, resize)(x) for resize in ("pytorch", "tf1")}
    assert not np.allclose(found["pytorch"], found["tf1"], rtol=1e-3)
    assert {inception(path, resize).preparation.resize for resize in extractors.INCEPTION_RESIZES} == {
        *("clean", "tf1", "pytorch", "tm")
    }
    assert inception(path, "tf1").fingerprint.startswith("inception-2015-12-05@")


class InceptionContext:
    device = torch.device("cpu")

    def __init__(self, folder):
        self.folder = folder

    def weights(self, name):
        assert name == extractors.INCEPTION
        return self.folder / "inception.safetensors"


@pytest.fixture
def forwards(monkeypatch):
    """The number of pictures in each pass of the Inception graph, and the resizes made."""
    from bench.metrics import networks

    seen = {"passes": [], "resizes": []}
    graph, resize = networks.inception_features, extractors.resized

    def counting_graph(layers, x):
        seen["passes"].append(len(x))
        return graph(layers, x)

    def counting_resize(images, how, size, crop):
        seen["resizes"].append(how)
        return resize(images, how, size, crop)

    monkeypatch.setattr(networks, "inception_features", counting_graph)
    monkeypatch.setattr(extractors, "resized", counting_resize)
    extractors.inception.cache_clear()
    yield seen
    extractors.inception.cache_clear()


def test_one_pass_gives_features_and_logits(weights, forwards):
    ctx, x = InceptionContext(weights), pictures(32, 32, 3)
    logits = extractors.features("inception-tf1/logits", x, ctx)
    pooled = extractors.features("inception-tf1", x, ctx)
    assert extractors.features("inception-tf1/logits", x, ctx) is logits
    assert (pooled.shape, logits.shape) == ((3, 2048), (3, 1008))
    assert forwards == {"passes": [4], "resizes": ["tf1"]}
    output = extractors.opened("inception-tf1/logits", ctx)
    assert (output.name, output.dim) == ("inception-tf1/logits", 1008)
    network = extractors.opened("inception-tf1", ctx)
    assert (output.fingerprint, output.preparation) == (network.fingerprint, network.preparation)
    extractors.features("inception-clean", x, ctx)
    assert forwards["resizes"] == ["tf1", "clean"] and len(forwards["passes"]) == 2
    with pytest.raises(UsageError, match="no output 'probabilities'"):
        extractors.opened("inception-tf1/probabilities", ctx)
    with pytest.raises(UsageError, match="no output 'probabilities'"):
        extractors.features("inception-tf1/probabilities", x, ctx)


def test_torch_file_and_safetensors_agree(tmp_path):
    state = {"a.conv.weight": torch.arange(6.0).reshape(2, 3), "a.bn.bias": torch.tensor([0.5])}
    torch.save(state, tmp_path / "state.pth")
    save_file(state, tmp_path / "state.safetensors")
    for kind in ("pth", "safetensors"):
        found = extractors.read_state(tmp_path / f"state.{kind}")
        assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


def test_missing_and_foreign_weights_are_named(tmp_path):
    with pytest.raises(Error, match="missing") as caught:
        inception(tmp_path / "absent.pth")
    assert caught.value.hint == "bench data fetch weights/inception-2015-12-05-pytorch-fid"
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(Error, match="not a state dict of Inception"):
        inception(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="nearest"):
        inception(tmp_path / "other.safetensors", "nearest")
    with pytest.raises(UsageError, match="no feature network is called 'vit'") as caught:
        extractors.opened("vit", Context())
    assert "mini-clip, inception-RESIZE, clip-vitb32" in caught.value.hint


def set_for_cuda():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


PRECISIONS = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "per backend": set_for_cuda,  # torch's newer way
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_flags_are_put_back(precision):
    def flags():
        parts = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        return torch.backends.cudnn.allow_tf32, *(part.fp32_precision for part in parts)

    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has no precision per backend")
    torch.set_float32_matmul_precision("highest")
    PRECISIONS[precision]()
    try:
        outside = flags()
        with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
            assert flags() == (False, "ieee", "ieee")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert flags() == outside
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_models_own_precision_changes_no_feature(embedded):
    x, before = pictures(64, 96, 4), torch.get_float32_matmul_precision()
    expected = embedded(x)
    torch.set_float32_matmul_precision("medium")
    try:
        assert np.array_equal(embedded(x), expected)
    finally:
        torch.set_float32_matmul_precision(before)


class Context:
    device = torch.device("cpu")

    def extractor(self, name):
        from bench.manifest_weights import extractor_table

        return extractor_table(name)


@pytest.fixture
def embedded():
    from bench.mini import features

    if not features.path().exists():
        pytest.skip("the embedded feature network has not been trained yet")
    return extractors.embedded()


def test_embedded_features_are_a_pictures_own(embedded):
    x = pictures(64, 96, 5)
    whole = embedded(x)
    assert whole.shape == (5, embedded.dim) and whole.dtype == np.float32
    np.testing.assert_allclose(np.concatenate([embedded(x[i : i + 1]) for i in range(5)]), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embedded(x.float() / 127.5 - 1), whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(Error, match="at least 64 px"):
        embedded(pictures(32, 64))


def measured(metric, x, y, size=16):
    rows, kept = [], {}
    for start in range(0, len(x), size):
        columns = metric.measure({"image": x[start : start + size], "recon": y[start : start + size]}, Context())
        plain = {k: v for k, v in columns.items() if not isinstance(v, np.ndarray)}
        count = len(x[start : start + size])
        rows += [{"item": str(start + i), **{k: v[i] for k, v in plain.items()}} for i in range(count)]
        for name in columns.keys() - plain.keys():
            kept.setdefault(name, []).append(columns[name])
    whole = {name: np.concatenate(parts) for name, parts in kept.items()}
    return Table(rows, load_features=whole.__getitem__)


def test_metrics_on_the_embedded_network(embedded):
    x = pictures(64, 64, 160)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 30
    y = (x.float() + noise).clamp(0, 255).to(torch.uint8)
    table = measured(Frechet(), x, y)
    found = Frechet().reduce(table)
    direct = frechet_from_features(embedded(y), embedded(x))
    assert found[""].value == pytest.approx(direct, rel=1e-3)
    assert found["corrected"].low < found["corrected"].value < found["corrected"].high
    assert f"|net:{embedded.fingerprint}|" in Frechet().signature(table)

    pairwise = PairwiseFeatureDistance()
    expected = ((embedded(x).astype(float) - embedded(y)) ** 2).sum(1).mean()
    estimate = pairwise.reduce(measured(pairwise, x, y))[""]
    assert estimate.value == pytest.approx(expected, rel=1e-3) and estimate.low < expected < estimate.high


def test_one_pass_serves_both_metrics_but_not_a_changed_batch(embedded, monkeypatch):
    passes = []

    def counting(name, ctx):
        def run(images):
            passes.append(len(images))
            return embedded(images)

        run.fingerprint = embedded.fingerprint
        return run

    monkeypatch.setattr(extractors, "opened", counting)
    media = {"image": pictures(64, 64, 2), "recon": pictures(64, 64, 2, seed=1)}
    first = Frechet().measure(media, Context())
    PairwiseFeatureDistance().measure(media, Context())
    assert len(passes) == 2
    media["recon"].zero_()  # a model that reuses its buffer
    second = Frechet().measure(media, Context())
    assert len(passes) == 3
    assert not np.allclose(first["embedded/fake"], second["embedded/fake"])


def shipped():
    from bench.manifest_verbs import names

    weights = [name.removeprefix("weights/") for name, _ in names() if name.startswith("weights/")]
    return [name for name in weights if "extractor" in read_weights(find(f"weights/{name}"))]


@pytest.mark.parametrize("name", shipped())
def test_shipped_networks_are_described_rightly(name, monkeypatch):
    """Without the weights: names, pooling and configuration are known, and building the network is all that is left."""

    def stop(build, state, where, device):
        raise Error(f"{where}: its weights are missing")

    monkeypatch.setattr(networks, "_filled", stop)
    table = Context().extractor(name)
    assert extractors.manifests(name) == (name,)
    with pytest.raises(Error, match=r"weights are missing|not a state dict"):
        networks.opened(table, {}, f"weights {name}")


@pytest.mark.full
@pytest.mark.parametrize("name", shipped())
def test_shipped_networks_of_their_full_size(name):
    with pytest.raises(Error, match=r"it lacks|not a state dict"):
        networks.opened(Context().extractor(name), {}, f"weights {name}")


def test_a_network_of_one_s_own_is_a_manifest(tmp_path, monkeypatch):
    import timm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCH_DATA", str(tmp_path / "data"))
    (tmp_path / "data/weights").mkdir(parents=True)
    (tmp_path / "data_manifests/weights").mkdir(parents=True)
    with torch.random.fork_rng():
        model = timm.create_model("test_resnet", pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "data/weights/mine.safetensors")
    text = 'what = "a"\nsource = "b"\nlicense = "c"\nurl = "https://example.org"\nfile = "mine.safetensors"\n'
    text += f'locked = false\n\n[extractor]\nnetwork = "timm:test_resnet"\nsize = 64\ndim = {model.num_features}\n'
    toml = tmp_path / "data_manifests/weights/mine.toml"
    toml.write_text(text)

    class Harness(Context):
        def weights(self, name):
            return weights_path(name)

    with pytest.raises(Error, match="not locked"):
        extractors.opened("mine", Harness())
    lock("weights/mine")
    x = pictures(64, 64, 3)
    found = extractors.features("mine", x, Harness())
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x / 127.5 - 1), pre_logits=True).numpy()
    assert found.shape == (3, model.num_features) and expected.std() > 1e-3
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    fingerprint = extractors.opened("mine", Harness()).fingerprint
    assert fingerprint.startswith(f"mine@{read_weights(find('weights/mine'))['sha256'][:8]}-")

    toml.write_text(toml.read_text().replace("size = 64", "size = 96"))  # other pictures, another fingerprint
    assert extractors.opened("mine", Harness()).fingerprint != fingerprint
    toml.write_text(toml.read_text().replace("size = 96", 'size = "big"'))
    with pytest.raises(Error, match="size must be a whole number"):
        extractors.opened("mine", Harness())


def test_batches_in_use_are_kept_and_others_are_not(monkeypatch):
    passes = []

    def extractor(x):
        passes.append(int(x[0, 0, 0, 0]))
        return np.zeros((1, 2), dtype=np.float32)

    monkeypatch.setattr(extractors, "opened", lambda name, ctx: extractor)
    batches = [torch.full((1, 3, 2, 2), i, dtype=torch.uint8) for i in range(6)]
    for i in (0, 1, 0, 2, 0, 3, 0, 4, 0, 4, 3):
        extractors.features("one", batches[i], Context())
    assert passes == [0, 1, 2, 3, 4]
    assert len(extractors._batches) == 4
    del batches[1:]
    extractors.features("one", batches[0], Context())
    assert passes == [0, 1, 2, 3, 4] and len(extractors._batches) == 1  # what is gone is not held


def test_the_classifier_of_the_small_world_is_an_extractor():
    from bench.mini import judges, world

    if not (judges.folder("mini-classifier") / "classifier.safetensors").is_file():
        pytest.skip("the embedded classifier has not been trained yet")
    x = torch.from_numpy(world.draw(world.sample(9, seed=3))).permute(0, 3, 1, 2)
    network = judges.load_classifier()
    with torch.no_grad():
        features = network.features(x)
        logits = network.logits(features)["shape"]
    found = extractors.features("mini-classifier", x, Context())
    np.testing.assert_allclose(found, features.numpy(), rtol=1e-4, atol=1e-4)
    shapes = extractors.features("mini-classifier/logits", x, Context())
    np.testing.assert_allclose(shapes, logits.numpy(), rtol=1e-4, atol=1e-3)
    assert extractors.opened("mini-classifier", Context()).dim == found.shape[1] == 128
    assert extractors.manifests("mini-classifier/logits") == extractors.manifests("mini-clip") == ()
