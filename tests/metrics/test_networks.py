"""Feature networks against the libraries that define them, with random weights, and one with its real ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench.metrics import extractors, networks
from bench.types import Error, UsageError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SQUEEZENET = DATA / "weights" / "squeezenet10_deepcompressed" / "squeezenet1_0_imagenet_bgr.npz"


def drawn(shapes, seed=0):
    """Weights that keep the scale of their input, from NumPy: its Philox stream is the same everywhere."""
    g = np.random.Generator(np.random.Philox(seed))
    state = {}
    for name, shape in sorted(shapes.items()):
        values = g.standard_normal(shape, dtype=np.float32)
        if name.endswith(("running_var", "bn.weight")):
            values = np.clip(np.abs(values), 0.3, 1.5)
        elif len(shape) > 1:
            values *= (2 / np.prod(shape[1:])) ** 0.5
        else:
            values *= 0.2
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def opened(tmp_path, fields, state):
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "weights.safetensors")
    return extractors.from_table("mine", json.dumps(fields), tmp_path / "weights.safetensors", "cpu")


def pictures(size=64, batch=3):
    return torch.randint(0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def close(ours, theirs, tolerance=1e-5):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and theirs.std() > 1e-4  # else equality would mean nothing
    return np.linalg.norm(ours - theirs) < tolerance * np.linalg.norm(theirs)


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def normalised(x, mean=IMAGENET["mean"], std=IMAGENET["std"]):
    from torchvision.transforms.functional import normalize

    return normalize(x.float() / 255, mean, std)


def test_torchvision(tmp_path):
    import torchvision

    model = torchvision.models.resnet18(weights=None).eval()
    x = pictures()
    with torch.no_grad():
        pooled = torch.nn.Sequential(*list(model.children())[:-1])(normalised(x)).flatten(1)
        logits = model(normalised(x))
    fields = {"network": "torchvision:resnet18", "layer": "layer4", "size": 64, "dim": 512, "classes": 1000, **IMAGENET}
    network = opened(tmp_path, fields, model.state_dict())
    found = network.outputs(x)
    assert close(found[""], pooled) and close(found["logits"], logits)
    assert network.fingerprint.startswith("mine@") and network.dim == 512
    with pytest.raises(UsageError, match="no layer 'layer9'"):
        opened(tmp_path, {**fields, "layer": "layer9"}, model.state_dict())


def test_timm(tmp_path):
    import timm

    model = timm.create_model("test_vit", pretrained=False, img_size=160).eval()
    x = pictures(160, 2)
    with torch.no_grad():
        features = model.forward_features(normalised(x))
        expected = model.forward_head(features, pre_logits=True)
    fields = {"network": "timm:test_vit", "size": 160, "dim": expected.shape[1], **IMAGENET}
    assert close(opened(tmp_path, fields, model.state_dict())(x), expected)


def test_open_clip(tmp_path):
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-towers.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-towers.json")
    model = open_clip.create_model("tiny-towers", pretrained=None).eval()
    x = pictures(32)
    with torch.no_grad():
        expected = model.encode_image(normalised(x))
    fields = {"network": "open_clip:tiny-towers", "size": 32, "dim": 24, **IMAGENET}
    network = opened(tmp_path, fields, model.state_dict())
    assert close(network(x), expected)


def dinov2():
    import transformers

    config = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"image_size": 28, "patch_size": 14, "mlp_ratio": 2}
    made = transformers.Dinov2Config(**{k: v for k, v in config.items() if k != "model_type"})
    return config, transformers.Dinov2Model(made).eval()


def test_transformers_takes_any_vision_model(tmp_path):
    import transformers

    config, model = dinov2()
    x = pictures(42)
    with torch.no_grad():
        tokens = model(pixel_values=normalised(x)).last_hidden_state
    fields = {"network": "transformers", "config": config, "size": 42, "dim": 32, **IMAGENET}
    assert close(opened(tmp_path, {**fields, "pooling": "cls"}, model.state_dict())(x), tokens[:, 0])
    assert close(opened(tmp_path, {**fields, "pooling": "mean"}, model.state_dict())(x), tokens[:, 1:].mean(1))
    with pytest.raises(UsageError, match="pooling 'max'"):
        opened(tmp_path, {**fields, "pooling": "max"}, model.state_dict())

    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**towers, "image_size": 32, "patch_size": 8}, {**towers, "vocab_size": 64}
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    x = pictures(32)
    with torch.no_grad():
        seen = clip.eval().vision_model(pixel_values=normalised(x)).pooler_output
        expected = clip.visual_projection(seen)
    config = {"model_type": "clip", "vision_config": vision, "text_config": text, "projection_dim": 16}
    fields = {"network": "transformers", "config": config, "pooling": "projection", "size": 32, "dim": 16, **IMAGENET}
    older = {**clip.state_dict(), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    assert close(opened(tmp_path, fields, older)(x), expected)


def test_building_a_network_moves_nobody_s_random_stream(tmp_path):
    config, model = dinov2()
    fields = {"network": "transformers", "config": config, "size": 28, "dim": 32}
    before = torch.random.get_rng_state()
    opened(tmp_path, fields, model.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_tail_and_the_company_change_nothing(tmp_path):
    """Batches have one size, the last one filled up: a picture's features are the same bits however many came."""
    config, model = dinov2()
    network = opened(tmp_path, {"network": "transformers", "config": config, "size": 28, "dim": 32}, model.state_dict())
    x = pictures(40, 9)
    whole = network(x)
    assert np.array_equal(network(x[8:]), whole[8:])
    assert network(x[:0]).shape == (0, 32)


def test_networks_of_one_input_share_the_resized_pictures(tmp_path, monkeypatch):
    made, resize = [], extractors.resized

    def counting(images, how, size, crop):
        made.append((how, size))
        return resize(images, how, size, crop)

    monkeypatch.setattr(extractors, "resized", counting)
    config, model = dinov2()
    fields = {"network": "transformers", "config": config, "size": 28, "dim": 32}
    first = opened(tmp_path, fields, model.state_dict())
    second = opened(tmp_path, {**fields, "pooling": "mean", **IMAGENET}, model.state_dict())
    third = opened(tmp_path, {**fields, "resize": "tm"}, model.state_dict())
    by_name = {"first": first, "second": second, "third": third}
    monkeypatch.setattr(extractors, "opened", lambda name, ctx: by_name[name])

    class Context:
        device = torch.device("cpu")

    x = pictures(40)
    found = {name: extractors.features(name, x, Context()) for name in by_name}
    assert made == [("clean", 28), ("tm", 28)]
    extractors.features("second", x, Context())
    assert len(made) == 2
    for name, values in found.items():
        assert np.array_equal(values, by_name[name](x))
    extractors.features("first", x.clone(), Context())
    assert len(made) == 6  # three above, one for the other batch


def table_and_state():
    config, model = dinov2()
    return {"network": "transformers", "config": config, "size": 28, "dim": 32}, model.state_dict()


def test_weights_of_another_network_are_refused(tmp_path):
    fields, state = table_and_state()
    short = {k: v for k, v in state.items() if k != "layernorm.bias"}
    with pytest.raises(Error, match=r"another network: it lacks layernorm\.bias"):
        opened(tmp_path, fields, short)
    with pytest.raises(Error, match=r"foreign head\.weight"):
        opened(tmp_path, fields, {**state, "head.weight": torch.zeros(2)})
    with pytest.raises(Error, match=r"another shape for layernorm\.bias"):
        opened(tmp_path, fields, {**state, "layernorm.bias": torch.zeros(3)})
    with pytest.raises(Error, match="gave 32 features, not the 33"):
        opened(tmp_path, {**fields, "dim": 33}, state)(pictures(28))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"network": "keras:resnet"}, "network 'keras:resnet' is not one of torchvision:NAME"),
        ({"network": "torchvision:resnet1"}, "torchvision has no classifier 'resnet1'"),
        ({"network": "timm:resnet1"}, "timm has no model"),
        ({"network": "open_clip:resnet1"}, "open_clip has no model"),
        ({"network": "transformers", "config": {"model_type": "nothing"}}, "transformers has no model_type 'nothing'"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"resize": "nearest"}, "resize or crop"),
        ({"crop": "left"}, "resize or crop"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [0.5, 0.5, 0]}, "above 0"),
    ],
)
def test_faults_of_a_table_are_named(tmp_path, change, named):
    fields, state = table_and_state()
    with pytest.raises(UsageError, match=named):
        opened(tmp_path, {**fields, **change}, state)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.zeros(2, 28, 28, 3), r"\[B, 3, H, W\], not \[2, 28, 28, 3\]"),
        (torch.zeros(3, 28, 28), r"not \[3, 28, 28\]"),
        (torch.zeros(1, 3, 2, 28, 28), r"not \[1, 3, 2, 28, 28\]"),
        (torch.zeros(1, 3, 28, 28, dtype=torch.int64), "uint8 or float"),
        (torch.full((1, 3, 28, 28), float("nan")), "NaN"),
        (torch.full((1, 3, 28, 28), 255.0), r"must lie in \[-1, 1\]; these reach from 255 to 255"),
    ],
)
def test_pictures_that_are_none_are_refused(tmp_path, images, named):
    network = opened(tmp_path, *table_and_state())
    with pytest.raises(Error, match=named):
        network(images)


def test_bfloat16_is_marked_and_has_a_gate(tmp_path):
    fields, state = table_and_state()
    full, half = opened(tmp_path, fields, state), opened(tmp_path, {**fields, "dtype": "bfloat16"}, state)
    assert half.fingerprint.endswith("-bf16") and not full.fingerprint.endswith("-bf16")
    x = pictures(28, 80)
    a, b = full(x), half(x)
    assert b.dtype == np.float32 and 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(a) < 3e-2
    from bench.metrics.frechet import frechet_from_features

    distance = extractors.bfloat16_gate(full, half, x)
    assert distance == frechet_from_features(b, a) > 0
    extractors.bfloat16_gate(full, half, x, claimed=101 * distance)
    with pytest.raises(Error, match="bfloat16 moves the Fréchet distance by") as caught:
        extractors.bfloat16_gate(full, half, x, claimed=99 * distance)
    assert "float32" in caught.value.hint


# -- I3D

MIXED = {  # block -> channels in, and out of b0, b1a, b1b, b2a, b2b, b3b
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


def i3d_shapes():
    units = {"Conv3d_1a_7x7": (64, 3, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (192, 64, 3)}
    for block, (into, b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
        parts = {"b0": (b0, into, 1), "b1a": (b1a, into, 1), "b1b": (b1b, b1a, 3), "b2a": (b2a, into, 1)}
        parts |= {"b2b": (b2b, b2a, 3), "b3b": (b3b, into, 1)}
        units |= {f"{block}.{name}": part for name, part in parts.items()}
    shapes = {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}
    for name, (out, into, side) in units.items():
        shapes[f"{name}.conv3d.weight"] = (out, into, side, side, side)
        shapes |= {f"{name}.bn.{p}": (out,) for p in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def test_i3d_equals_the_public_port():
    """The reference numbers were computed once with piergiaj/pytorch-i3d (05783d1) from the same weights and video."""
    shapes = i3d_shapes()
    assert sum(int(np.prod(s)) for s in shapes.values()) == 12_711_824
    network = networks.i3d(drawn(shapes), "random weights")
    g = np.random.Generator(np.random.Philox(1))
    video = torch.from_numpy(g.random((1, 3, 9, 193, 193), dtype=np.float32) * 2 - 1)
    with torch.no_grad():
        logits = network(video)[""].double()
    assert logits.shape == (1, 400)
    np.testing.assert_allclose(logits[0, :4], [-39.54212, -11.48732, -65.46281, 21.49194], rtol=1e-5)
    np.testing.assert_allclose([logits.mean(), logits.std()], [-2.1056389074, 51.7442347546], rtol=1e-5)
    with pytest.raises(Error, match="at least 9 frames"):
        network(video[:, :, :8])
    with pytest.raises(Error, match="not a state dict of I3D"):
        networks.i3d({"a.conv3d.weight": torch.zeros(1), "a.conv3d.bias": torch.zeros(1)}, "x")


# -- real weights


@pytest.fixture
def squeezenet(tmp_path):
    """SqueezeNet 1.0 as the harness takes it: its first layer turned from BGR to RGB, Caffe's means in 0..1."""
    if not SQUEEZENET.exists():
        pytest.skip(f"../shared/data/weights/{SQUEEZENET.parent.name} is absent")
    with np.load(SQUEEZENET) as file:
        state = {k: torch.from_numpy(file[k]) for k in file.files}
    state["features.0.weight"] = state["features.0.weight"].flip(1).contiguous()
    mean = [level / 255 for level in (123, 117, 104)]
    fields = {"network": "torchvision:squeezenet1_0", "layer": "features", "dim": 512, "classes": 1000}
    fields |= {"size": 227, "crop": "centre", "mean": mean, "std": [1 / 255] * 3}
    return opened(tmp_path, fields, state)


@pytest.mark.parametrize(("name", "label"), [("chelsea", 285), ("coffee", 967)])
def test_a_real_network_names_what_it_sees(squeezenet, name, label):
    import skimage

    picture = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None]
    found = squeezenet.outputs(picture)
    assert found["logits"].argmax() == label  # ImageNet: Egyptian cat, espresso
    assert found[""].shape == (1, 512) and found[""].std() > 0
