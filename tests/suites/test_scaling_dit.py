"""The transformers that laws are measured on: FLOPs against torch's counter, parameters, identities, rotary places."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from suites.scaling import dit, flops, measure
from suites.scaling.flops import KINDS, Shape

SHAPES = (
    Shape("adaln_zero", 16, 1),
    Shape("adaln_zero", 32, 2, heads=4, side=6, patch=1, text=3),
    Shape("adaln_zero", 24, 3, heads=3, channels=3, side=8, patch=4, text=5, vocabulary=10),
    Shape("adaln_zero", 32, 2, text=7, text_width=20, swiglu=True),
    Shape("adaln_zero", 48, 2, heads=4, side=4, patch=1, text=2, swiglu=True, rms_norm=True, rope=True, qk_norm=True),
)
EVERY = [replace(shape, kind=kind) for kind, shape in itertools.product(KINDS, SHAPES)]


def seeded(number):
    return torch.Generator().manual_seed(number)


def built(shape, seed=0, start=False):
    """With `start` as a training begins, else with no weight zero."""
    model = dit.initialise(dit.DiT(shape), seeded(seed))
    if not start:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(seed + 1)))
    return model


def inputs(shape, batch=1, seed=7):
    generator = seeded(seed)
    latents = torch.randn(batch, shape.channels, shape.side, shape.side, generator=generator)
    times = torch.rand(batch, generator=generator)
    if shape.text_width:
        return latents, times, torch.randn(batch, shape.text, shape.text_width, generator=generator)
    return latents, times, torch.randint(shape.vocabulary, (batch, shape.text), generator=generator)


def named(shape):
    return f"{shape.kind}-{shape.width}x{shape.layers}"


@pytest.mark.parametrize("shape", EVERY, ids=named)
def test_a_whole_model_is_what_the_counter_sees(shape):
    """Forward exactly; both passes by the rule 3 + 0.5 (attention's share), to 1e-6, but for MM-DiT, the text of whose
    last block leads nowhere."""
    model, counted = built(shape), shape.count()
    assert flops.count(model, *inputs(shape)) == counted.forward
    both = flops.count(model, *inputs(shape), backward=True)
    if shape.kind == "mm_dit":
        assert 0.9 * counted.hardware < both < counted.hardware
    else:
        assert both == pytest.approx(counted.hardware, rel=1e-6)
    assert flops.count(model, *inputs(shape, batch=3)) == 3 * counted.forward


@pytest.mark.parametrize("shape", EVERY, ids=named)
def test_a_block_is_what_the_counter_sees(shape):
    """Forward exactly, both passes by the rule: of one block, outputs of all its streams summed."""
    model = built(replace(shape, text_width=0))
    n, m, d = shape.tokens, shape.text, shape.width
    generator = seeded(5)
    x, words = torch.randn(1, n, d, generator=generator), torch.randn(1, m, d, generator=generator)
    vector, shared = torch.randn(1, d, generator=generator), torch.randn(1, 6, 1, d, generator=generator)
    turn = model.angles if shape.rope else None
    given = {
        "in_context": (torch.cat([x, words, vector[:, None]], 1),),
        "cross_attention": (x, words, shared),
        "adaln_zero": (x, vector),
        "mm_dit": (x, words, vector),
    }[shape.kind]

    def block(*inputs):
        found = model.blocks[0](*inputs, turn)
        return torch.cat(found, 1) if isinstance(found, tuple) else found

    counted, attention = flops.block(shape.kind, n, m, d, swiglu=shape.hidden if shape.swiglu else 0)
    assert flops.count(block, *given) == counted
    both = flops.count(block, *given, backward=True)
    assert both == pytest.approx((3 + 0.5 * attention / counted) * counted, rel=1e-6)


@pytest.mark.parametrize("shape", EVERY, ids=named)
def test_parameters_are_the_formula_and_a_stated_rest(shape):
    """Matrices: the formula for backbone and conditioning; patches, head, time, words and the head's modulation by hand
    here. Vectors are what is left."""
    model = built(shape)
    found, d, pixels = dit.count_parameters(model), shape.width, shape.channels * shape.patch**2
    assert {k: found[k] for k in ("backbone", "conditioning")} == shape.params()
    words = (shape.vocabulary + 1) * d if not shape.text_width else shape.text_width * d
    if shape.text_width and shape.kind == "cross_attention":
        words = 0
    final = 0 if shape.kind == "in_context" else 2 * d * d
    assert found["embedding"] == 2 * pixels * d + 256 * d + d * d + words + final
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())
    assert found["vectors"] == sum(p.numel() for p in model.parameters() if p.dim() != 2)


def test_the_published_size_of_lightningdit():
    """XL/1 of arXiv 2501.01423 by its own log, exactly: 675,256,736, with the fixed table of positions."""
    shape = Shape(
        "adaln_zero", 1152, 28, heads=16, channels=32, side=16, patch=1, vocabulary=1000, swiglu=True, rms_norm=True
    )
    with torch.device("meta"):
        model = dit.DiT(shape)
    assert sum(p.numel() for p in model.parameters()) + model.positions.numel() == 675_256_736


@pytest.mark.parametrize("shape", EVERY, ids=named)
def test_at_the_start_the_output_is_zero_and_every_block_the_identity(shape):
    model = built(shape, start=True)
    latents, times, text = inputs(shape, batch=2)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    assert not model(latents, times, text).any()
    for given, out in seen:
        outs = out if isinstance(out, tuple) else (out,)
        for before, after in zip(given, outs, strict=False):
            assert torch.equal(before, after)
    assert len(seen) == shape.layers


@pytest.mark.parametrize("kind", KINDS)
def test_time_condition_and_every_place_matter(kind):
    shape = Shape(kind, 32, 2, text=3)
    model = built(shape)
    latents, times, text = inputs(shape, batch=2)
    out = model(latents, times, text)
    assert out.shape == latents.shape and out.dtype == torch.float32
    assert not torch.allclose(out, model(latents, times * 0.5, text), atol=1e-3)
    assert not torch.allclose(out, model(latents, times, (text + 1) % shape.vocabulary), atol=1e-3)
    assert torch.allclose(out[:1], model(latents[:1], times[:1], text[:1]), atol=1e-5)  # nobody sees the others
    moved = latents.clone()
    moved[:, :, -1, -1] += 1
    assert ((model(moved, times, text) - out).abs().amax((0, 1)) > 1e-6).all()


def test_patches_come_back():
    shape = Shape("adaln_zero", 16, 1, channels=3, side=6, patch=2)
    x = torch.arange(2 * 3 * 36.0).reshape(2, 3, 6, 6)
    parts = dit.patchify(x, 2)
    assert torch.equal(dit.unpatchify(parts, shape), x)
    assert torch.equal(parts[0, 1].reshape(2, 2, 3).permute(2, 0, 1), x[0, :, :2, 2:4])  # reading order


def test_rotary_logits_depend_on_the_difference_of_places():
    """Queries and keys at (row, column) and shifted together by (1, 2): equal logits, to float32."""
    side, width = 6, 16
    turn = dit.angles(side, width).reshape(side, side, -1)
    generator = seeded(3)
    q, k = (torch.randn(1, 1, 1, width, generator=generator) for _ in "qk")

    def logit(a, b):
        return float((dit.rotate(q, turn[a][None]) * dit.rotate(k, turn[b][None])).sum())

    assert logit((0, 1), (3, 2)) == pytest.approx(logit((1, 3), (4, 4)), abs=1e-4)
    assert abs(logit((0, 1), (3, 2)) - logit((0, 1), (3, 3))) > 1e-2
    assert logit((2, 2), (2, 2)) == pytest.approx(float((q * k).sum()), abs=1e-4)


def test_attention_is_its_definition():
    """Against softmax(q k^T / sqrt(w)) v written out, float64, to 1e-12."""
    generator = seeded(4)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    assert torch.allclose(dit.attend(q, k, v), (weights @ v).transpose(1, 2).reshape(2, 5, 24), atol=1e-12)


def test_the_path_and_its_errors():
    """t = 0 is noise and t = 1 data; v = u: 0; v = 2u: mean u^2 and direction 0; v = -u: direction 2."""
    data, noise = (torch.randn(3, 4, 2, 2, generator=seeded(k)) for k in (1, 2))
    times = torch.tensor([0.0, 1.0, 0.25])
    mixed = dit.mix(data, noise, times)
    assert torch.equal(mixed[0], noise[0]) and torch.equal(mixed[1], data[1])
    assert torch.allclose(mixed[2], 0.25 * data[2] + 0.75 * noise[2], atol=1e-6)
    u = data - noise
    assert not dit.velocity_errors(u, u).any()
    assert torch.allclose(dit.velocity_errors(2 * u, u), u.square().mean((1, 2, 3)))
    assert torch.allclose(dit.direction_errors(2 * u, u), torch.zeros(3), atol=1e-6)
    assert torch.allclose(dit.direction_errors(-u, u), torch.full((3,), 2.0), atol=1e-6)


def test_times_are_logit_normal():
    """Quantiles of 20,000 draws against scipy's, to 0.01."""
    from scipy.special import expit
    from scipy.stats import norm

    drawn = dit.logit_normal(20_000, seeded(9))
    for q in (0.1, 0.5, 0.9):
        assert float(drawn.quantile(q)) == pytest.approx(expit(norm.ppf(q)), abs=0.01)


class Exact(torch.nn.Module):
    """The velocity of one Gaussian N(mean, sd^2): closed form."""

    def __init__(self, mean, sd):
        super().__init__()
        self.mean, self.sd = mean, sd
        self.shape = Shape("adaln_zero", 16, 1)

    def forward(self, x, times, text):
        t = times.view(-1, 1, 1, 1)
        variance = t**2 * self.sd**2 + (1 - t) ** 2
        return self.mean + (t * self.sd**2 - (1 - t)) / variance * (x - t * self.mean)


def test_euler_steps_along_the_exact_velocity_reach_the_data():
    """Mean to 0.05, standard deviation to 5 %, from 2,000 values and 100 steps."""
    noise = torch.randn(500, 1, 2, 2, generator=seeded(6))
    found = dit.sample(Exact(1.5, 0.3), noise, torch.zeros(500, 1, dtype=torch.long), steps=100)
    assert float(found.mean()) == pytest.approx(1.5, abs=0.05) and float(found.std()) == pytest.approx(0.3, rel=0.05)


def test_the_measured_loss_is_the_conditional_variance():
    """Of the exact velocity of a Gaussian: sd^2 / (t^2 sd^2 + (1 - t)^2), averaged over the times asked. 4,000 samples
    of 16 values: to four standard errors, which are under 1 %."""
    sd = 0.5
    latents = 1.0 + sd * torch.randn(4000, 1, 4, 4, generator=seeded(8))
    asked = measure.questions(latents, torch.zeros(4000, 1, dtype=torch.long), seed=3)
    found = measure.measure(Exact(1.0, sd), asked)
    t = asked.times.double().numpy()
    expected = sd**2 / (t**2 * sd**2 + (1 - t) ** 2)
    assert found.se < 0.01 * found.mean and abs(found.mean - expected.mean()) < 4 * found.se
    assert found.bins[0] == pytest.approx(expected[:400].mean(), rel=0.05) and len(found.bins) == 10
    assert found.mean == pytest.approx(sum(found.bins) / 10)
    assert not (np.diff(t) < 0).any()


def test_stratified_errors_are_the_spread_of_means():
    """Means of 400 stratified draws of a steep function: their spread against the error of one, to 15 %; the error that
    ignores strata is far larger."""
    rng = np.random.default_rng(0)
    n = 200
    values = [10 * ((np.arange(n) + rng.random(n)) / n) + rng.normal(size=n) for _ in range(400)]
    spread = np.std([v.mean() for v in values])
    assert np.mean([measure.stratified_error(v) for v in values]) == pytest.approx(spread, rel=0.15)
    assert values[0].std() / n**0.5 > 2.5 * spread
    assert np.isnan(measure.stratified_error(np.ones(3)))


def test_questions_stay_and_pairs_tell_more():
    latents = torch.randn(400, 1, 4, 4, generator=seeded(8))
    text = torch.zeros(400, 1, dtype=torch.long)
    asked, again = (measure.questions(latents, text, seed=3) for _ in range(2))
    assert torch.equal(asked.noise, again.noise) and torch.equal(asked.times, again.times)
    fewer = measure.questions(latents[:100], text[:100], seed=3)
    assert torch.equal(asked.noise[:100], fewer.noise)
    assert not torch.equal(asked.noise, measure.questions(latents, text, seed=4).noise)
    a, b = (measure.measure(Exact(mean, 1.0), asked, batch=64) for mean in (0.0, 0.1))
    change, error = measure.difference(a, b)
    assert change == pytest.approx(b.mean - a.mean) and error < 0.3 * a.se
    with pytest.raises(ValueError, match="different questions"):
        measure.difference(a, measure.Measured(a.losses[:10]))


def test_losses_of_different_cells_are_not_pooled():
    cell = dict.fromkeys(measure.CELL, "x")
    one = measure.loss_signature(cell)
    assert measure.one_cell([one, one]) == one
    with pytest.raises(ValueError, match="2 cells cannot be pooled"):
        measure.one_cell([one, measure.loss_signature({**cell, "autoencoder": "y"})])
    with pytest.raises(ValueError, match="seed is missing"):
        measure.loss_signature({k: v for k, v in cell.items() if k != "seed"})


def test_shapes_that_cannot_be_are_named():
    for change, said in (
        ({"kind": "unet"}, "'unet' is not one of"),
        ({"width": 18}, "multiple of 4"),
        ({"patch": 3}, "no multiple of the patch 3"),
        ({"rope": True, "width": 12}, "heads of a multiple of 4"),
        ({"layers": 0}, "layers is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(Shape("adaln_zero", 16, 1), **change)
