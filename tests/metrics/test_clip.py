"""CLIPScore against open_clip and torchmetrics, on small towers with random weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bench import metrics
from bench.metrics import clip, extractors
from bench.metrics.clip import CLIPScore
from bench.types import Error, Table, UsageError

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
LONG = "a very long prompt about " + " and ".join(["one more red kite over the sea"] * 20)
PROMPTS = ["a cat on a mat", "Two DOGS,  in the snow!", "", "an espresso", LONG]


def pictures(height=40, width=56, batch=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=g, dtype=torch.uint8)


class Context:
    """Gives one network, described by a table, under the name "tiny"."""

    device = torch.device("cpu")

    def __init__(self, folder, table, state):
        self.table, self.file = table, folder / "tiny.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, self.file)

    def extractor(self, name):
        return self.table

    def weights(self, name):
        return self.file


TABLE = {"size": 32, "resize": "pil", "crop": "centre", "mean": MEAN, "std": STD, "dim": 24}


@pytest.fixture(scope="module")
def with_open_clip(tmp_path_factory):
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    (folder / "tiny-clip.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "tiny-clip.json")
    with torch.random.fork_rng():
        model, _, transform = open_clip.create_model_and_transforms("tiny-clip", pretrained=None)
    ctx = Context(folder, {"network": "open_clip:tiny-clip", **TABLE}, model.state_dict())
    return model.eval(), transform, open_clip.get_tokenizer("tiny-clip"), ctx


@pytest.fixture(scope="module")
def with_transformers(tmp_path_factory):
    import transformers

    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "vision_config": {**towers, "image_size": 32, "patch_size": 8},
        "text_config": {**towers, "vocab_size": 49408, "eos_token_id": 49407},
        "projection_dim": 24,
    }
    with torch.random.fork_rng():
        model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    table = {"network": "transformers", "config": {"model_type": "clip", **config}, "pooling": "projection", **TABLE}
    return model, Context(tmp_path_factory.mktemp("transformers"), table, model.state_dict())


def by_hand(model, transform, tokenizer, x, texts):
    from torchvision.transforms.functional import to_pil_image

    batch = torch.stack([transform(to_pil_image(one)) for one in x])
    with torch.no_grad():
        seen = torch.nn.functional.normalize(model.encode_image(batch), dim=-1)
        said = torch.nn.functional.normalize(model.encode_text(tokenizer(texts)), dim=-1)
    return 100 * (seen * said).sum(-1).numpy()


def measured(metric, x, prompts, ctx):
    columns = metric.measure({"image": x, "prompt": prompts}, ctx)
    assert all(len(v) == len(x) for v in columns.values())
    return columns, Table([{"item": str(i), **{k: v[i] for k, v in columns.items()}} for i in range(len(x))])


def test_equals_open_clip_by_hand(with_open_clip):
    *peer, ctx = with_open_clip
    x = pictures()
    columns, table = measured(CLIPScore("tiny"), x, PROMPTS, ctx)
    expected = by_hand(*peer, x, PROMPTS)
    assert expected.std() > 0.1  # else equality would mean nothing
    asked = [0, 1, 3, 4]
    found = np.array([columns["clip-score"][i] for i in asked])
    np.testing.assert_allclose(found, expected[asked], atol=1e-4)
    assert columns["clip-score"][2] is None
    assert columns["clip-score-truncated"] == [False, False, None, False, True]
    estimate = CLIPScore("tiny").reduce(table)
    assert estimate.value == pytest.approx(max(found.mean(), 0))
    assert estimate.n == 4
    assert estimate.note == "1 pictures without prompt; 1 of 4 prompts were cut to the model's limit"


def test_original_weights_and_clips_each_picture(with_open_clip):
    *peer, ctx = with_open_clip
    x = pictures(seed=1)
    metric = CLIPScore("tiny", convention="original")
    columns, table = measured(metric, x, PROMPTS, ctx)
    cosines = by_hand(*peer, x, [f"A photo depicts {p}" for p in PROMPTS]) / 100
    for i in (0, 1, 3, 4):
        assert columns["clip-score-original"][i] == pytest.approx(2.5 * max(cosines[i], 0), abs=1e-5)
    assert "|original|net:tiny@" in metric.signature(table)


def test_equals_torchmetrics(with_transformers):
    from open_clip import tokenize
    from torchmetrics.functional.multimodal import clip_score
    from torchvision.transforms import functional

    model, ctx = with_transformers

    class Tensors:
        """torchmetrics takes what older releases of transformers gave: tensors."""

        def __init__(self):
            self.config = model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

        def get_text_features(self, ids, mask):
            return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    def processor(text=None, images=None, **_):
        if text is not None:
            ids = tokenize(text)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        prepared = []
        for one in images:
            picture = functional.to_pil_image(one)
            picture = functional.resize(picture, 32, functional.InterpolationMode.BICUBIC)
            cropped = functional.center_crop(picture, 32)
            prepared.append(functional.normalize(functional.to_tensor(cropped), MEAN, STD))
        return {"pixel_values": torch.stack(prepared)}

    x, prompts = pictures(batch=4), [p for p in PROMPTS if p]
    with torch.no_grad():
        rows = [
            float(clip_score(one, p, model_name_or_path=lambda: (Tensors(), processor)))
            for one, p in zip(x, prompts, strict=True)
        ]
        whole = float(clip_score(list(x), prompts, model_name_or_path=lambda: (Tensors(), processor)))
    columns, table = measured(CLIPScore("tiny"), x, prompts, ctx)
    np.testing.assert_allclose(np.maximum(columns["clip-score"], 0), rows, atol=1e-4)
    assert CLIPScore("tiny").reduce(table).value == pytest.approx(whole, abs=1e-4)


def test_no_score_is_below_zero_on_the_whole():
    rows = [{"item": str(i), "clip-score": v} for i, v in enumerate([-3.0, -1.0, -2.0, 1.0])]
    found = CLIPScore().reduce(Table(rows))
    assert found.value == 0.0 and found.low == 0.0 and found.high >= 0.0


def test_one_pass_of_the_picture_tower_serves_its_fréchet_distance(with_open_clip, monkeypatch):
    *_, ctx = with_open_clip
    model = extractors.opened("tiny", ctx).clip
    passes, encode = [], model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda x: passes.append(len(x)) or encode(x))
    x = pictures(seed=2)
    CLIPScore("tiny").measure({"image": x, "prompt": PROMPTS}, ctx)
    metrics.Frechet("tiny", fake="image", real="none").measure({"image": x}, ctx)
    assert len(passes) == 2  # five pictures, four at a time


def test_faults_are_named(with_open_clip, tmp_path):
    *_, ctx = with_open_clip
    x = pictures(batch=2)
    with pytest.raises(Error, match="no 'prompt' beside"):
        CLIPScore("tiny").measure({"image": x}, ctx)
    with pytest.raises(Error, match="has 1 for 2"):
        CLIPScore("tiny").measure({"image": x, "prompt": ["a cat"]}, ctx)
    with pytest.raises(UsageError, match="convention 'best'"):
        CLIPScore("tiny", convention="best")
    with pytest.raises(UsageError, match="'embedded' has no text tower"):
        clip.texts_of("embedded", ctx)
    with pytest.raises(Error, match="zero or not finite"):
        clip.unit_length(np.zeros((1, 3), dtype=np.float32))


def test_the_embedded_model_tells_a_picture_from_another():
    from bench.mini import judges, world

    if not (judges.folder("mini-clip") / "model.safetensors").is_file():
        pytest.skip("the embedded CLIP model has not been trained yet")
    shown = world.sample(40, seed=7)
    x = torch.from_numpy(world.draw(shown)).permute(0, 3, 1, 2)
    prompts = [world.plain_caption(p) for p in shown]
    own = measured(CLIPScore("mini-clip"), x, prompts, Context.__new__(Context))[0]["clip-score"]
    other = measured(CLIPScore("mini-clip"), x, prompts[1:] + prompts[:1], Context.__new__(Context))[0]["clip-score"]
    assert np.mean(own) > np.mean(other)
    seen = judges.embed_images(judges.load_clip()[0], x).numpy()
    np.testing.assert_allclose(clip.unit_length(extractors.mini("mini-clip")(x)), seen, atol=1e-5)
