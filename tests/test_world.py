"""The small world: what is drawn is what the records say, and skews are as large as they claim."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import skimage.draw
from scipy.stats import chisquare

from bench import UsageError
from bench.manifest import load
from bench.manifest_verbs import lock, verify
from bench.mini import world
from bench.mini.world import Skew
from bench.types import Error

GOLDEN = [[28, 28, 28, 28], [28, 28, 28, 28], [28, 28, 28, 28], [28, 28, 229, 28]]
TOTAL = 26251370


def picture(**changes):
    base = world.Picture(
        "square", "red", "white", "large", "centre", "plain", 0.5, 0.5, 0.4, (0.9, 0.1, 0.1), (1.0, 1.0, 1.0), (0, 0)
    )
    return replace(base, **changes)


def share(pictures, attribute, value):
    return sum(getattr(p, attribute) == value for p in pictures) / len(pictures)


# -- sampling


def test_a_picture_depends_on_its_seed_and_number_alone():
    whole = world.sample(50, 3)
    assert world.sample(20, 3, first=30) == whole[30:]
    assert world.sample(1, 3, first=10**9) == world.sample(2, 3, first=10**9 - 1)[1:]
    assert world.sample(50, 4) != whole
    drawn = world.draw(whole)
    assert drawn.shape == (50, 32, 32, 3) and drawn.dtype == np.uint8
    assert np.array_equal(world.draw(whole[7:8])[0], drawn[7])
    assert world.sample(0, 3) == [] and world.draw([]).shape == (0, 32, 32, 3)


def test_every_colour_and_shape_is_seen_and_each_lacks_one_partner():
    assert sorted(s for s, _ in world.HELD_OUT) == sorted(world.SHAPES)
    assert sorted(c for _, c in world.HELD_OUT) == sorted(world.COLOURS)
    seen = world.sample(4000, 1)
    assert not any(p.held_out for p in seen)
    assert {(p.shape, p.colour) for p in seen} | set(world.HELD_OUT) == {
        (s, c) for s in world.SHAPES for c in world.COLOURS
    }
    only = world.sample(300, 1, held_out="only")
    assert {(p.shape, p.colour) for p in only} == set(world.HELD_OUT)
    assert 0.09 < np.mean([p.held_out for p in world.sample(4000, 1, held_out="any")]) < 0.16  # 1 in 8
    assert all(p.colour != p.background for p in [*seen, *only])


@pytest.mark.parametrize("held_out", ["exclude", "any"])
def test_counts_follow_the_stated_distribution(held_out):
    """Chi-squared test per shape over colour x background, and over position, at one in 10,000."""
    pictures = world.sample(16000, 8, held_out=held_out)
    assert chisquare(list(Counter(p.shape for p in pictures).values())).pvalue > 1e-4
    for shape in world.SHAPES:
        own = [p for p in pictures if p.shape == shape]
        tables = world.distribution(shape, held_out=held_out)
        joint = tables["colour, background"]
        assert joint.sum() == pytest.approx(1, abs=1e-12)
        counts = np.zeros(joint.shape)
        for p in own:
            counts[list(world.COLOURS).index(p.colour), list(world.BACKGROUNDS).index(p.background)] += 1
        assert not counts[joint == 0].any()
        assert chisquare(counts[joint > 0], joint[joint > 0] * len(own)).pvalue > 1e-4
        places = [sum(p.position == name for p in own) for name in world.POSITIONS]
        assert chisquare(places, tables["position"] * len(own)).pvalue > 1e-4


def test_several_skews_hold_at_once_and_leave_other_shapes_alone():
    skew = [
        Skew("circle", "colour", "red", 0.8),
        Skew("circle", "background", "blue", 0.5),
        Skew("circle", "size", "large", 0.9),
        Skew("star", "background", "black", 0.7),
        Skew("ring", "texture", "dotted", 0.0),
    ]
    table = world.distribution("circle", skew)
    joint = table["colour, background"]
    assert joint[list(world.COLOURS).index("red")].sum() == pytest.approx(0.8, abs=1e-6)
    assert joint[:, list(world.BACKGROUNDS).index("blue")].sum() == pytest.approx(0.5, abs=1e-6)
    assert joint[list(world.COLOURS).index("blue"), list(world.BACKGROUNDS).index("blue")] == 0
    pictures = world.sample(16000, 2, skew)
    circles = [p for p in pictures if p.shape == "circle"]
    stars = [p for p in pictures if p.shape == "star"]
    # five standard errors of about 2,000 draws
    assert share(circles, "colour", "red") == pytest.approx(0.8, abs=0.045)
    assert share(circles, "background", "blue") == pytest.approx(0.5, abs=0.056)
    assert share(circles, "size", "large") == pytest.approx(0.9, abs=0.034)
    assert share(stars, "background", "black") == pytest.approx(0.7, abs=0.051)
    assert share([p for p in pictures if p.shape == "ring"], "texture", "dotted") == 0
    assert share(stars, "size", "large") == pytest.approx(0.5, abs=0.056)
    np.testing.assert_array_equal(
        world.distribution("heart", skew)["colour, background"], world.distribution("heart")["colour, background"]
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Skew("cube", "colour", "red", 0.5), "shape is 'cube'"),
        (lambda: Skew("circle", "shape", "star", 0.5), "attribute is 'shape'"),
        (lambda: Skew("circle", "colour", "white", 0.5), "value is 'white'"),
        (lambda: Skew("circle", "colour", "red", 1.5), "share is 1.5"),
        (lambda: world.sample(1, 0, [Skew("circle", "colour", "cyan", 0.5)]), "circle can have the colour cyan"),
        (
            lambda: world.sample(
                1, 0, [Skew("star", "colour", "blue", 0.9), Skew("star", "background", "blue", 0.9)], held_out="any"
            ),
            "star can have",
        ),
        (lambda: world.sample(1, 0, [Skew("star", "size", "large", s) for s in (0.2, 0.8)]), "star can have the size"),
    ],
)
def test_impossible_skews_are_refused_in_words(make, reason):
    with pytest.raises(UsageError) as caught:
        make()
    assert reason in str(caught.value)


# -- drawing


def test_golden_pixels():
    """A change here changes every data set drawn from the world: lock the manifests again, train anew."""
    drawn = world.draw(world.sample(64, 20260002))
    assert drawn[0, ::8, ::8, 0].tolist() == GOLDEN
    assert int(drawn.sum(dtype=np.int64)) == TOTAL


@pytest.mark.parametrize("x", [0.5, 0.37])
def test_areas_are_those_of_geometry(x):
    """Coverage against areas worked out by hand, and a polygon of scikit-image's, to 1.5 %."""
    radius, side = 0.4, 32

    def area(shape):
        drawn = world.draw([picture(shape=shape, x=x, radius=radius, foreground=(0, 0, 0))])[0, :, :, 0]
        return float((1 - drawn / 255).sum()) / (radius * side) ** 2

    cross = 2 * 1.9 * 0.54 - 0.54**2
    expected = {
        "circle": np.pi * 0.92**2,
        "ring": np.pi * (0.95**2 - 0.49**2),
        "square": 1.6**2,
        "triangle": 0.98 * 1.65,
        "diamond": 2 * 1.1 * (1.1 / 1.35),
        "cross": cross,
        "star": 5 * 1.16 * 0.5 * np.sin(np.pi / 5),
    }
    for shape, value in expected.items():
        assert area(shape) == pytest.approx(value, rel=0.015), shape
    tips = [(1.16 if i % 2 == 0 else 0.5) * np.exp(1j * np.pi * (i / 5 - 0.5)) for i in range(10)]
    scale, middle = 40 * radius * side, 40 * side * np.array([0.5, x])
    points = np.array([[scale * (t.imag + 0.08), scale * t.real] for t in tips]) + middle
    mask = skimage.draw.polygon2mask((40 * side, 40 * side), points)
    fine = mask.reshape(side, 40, side, 40).mean((1, 3))
    drawn = 1 - world.draw([picture(shape="star", x=x, radius=radius, foreground=(0, 0, 0))])[0, :, :, 0] / 255
    assert np.abs(drawn - fine).mean() < 0.004 and np.abs(drawn - fine).max() < 0.25


def test_the_heart_is_symmetric_notched_and_pointed():
    drawn = 1 - world.draw([picture(shape="heart", foreground=(0, 0, 0))])[0, :, :, 0] / 255
    np.testing.assert_array_equal(drawn, drawn[:, ::-1])
    rows = drawn.sum(1)
    lowest = max(i for i, row in enumerate(rows) if row > 0.05)
    assert rows[lowest] < 3 < rows[10] and rows[lowest - 6] > rows[lowest - 3] > rows[lowest]
    top = min(i for i, row in enumerate(rows) if row > 0.5)
    assert drawn[top, 15] < 0.1 < drawn[top, 10]  # the notch


@pytest.mark.parametrize("texture", ["striped", "dotted"])
def test_textures_stay_inside_and_away_from_the_background(texture):
    for p in (picture(), picture(foreground=(0.5, 0.3, 0.1), backdrop=(0.0, 0.0, 0.0))):
        plain, drawn = world.draw([p, replace(p, texture=texture)]).astype(int)
        changed = (plain != drawn).any(-1)
        assert 0.1 < changed.mean() < 0.4
        backdrop = np.rint(255 * np.array(p.backdrop))
        assert not changed[(plain == backdrop).all(-1)].any()
        distance = np.abs(drawn - backdrop).sum(-1)[changed], np.abs(plain - backdrop).sum(-1)[changed]
        assert (distance[0] >= distance[1]).all()  # lighter on black, darker on white


def test_positions_and_sizes_are_where_the_record_says():
    for p in world.sample(200, 6):
        low, high = world.SIZES[p.size]
        assert low <= p.radius <= high
        for axis, value in enumerate((p.x, p.y)):
            offset = world.OFFSET[p.size] * world.POSITIONS[p.position][axis]
            assert abs(value - 0.5 - offset) <= 0.03 + 1e-12
        for actual, nominal in ((p.foreground, world.COLOURS[p.colour]), (p.backdrop, world.BACKGROUNDS[p.background])):
            assert np.abs(np.array(actual) - nominal).max() <= world.JITTER + 1e-12
    left, right = (world.draw([p])[0] for p in (picture(x=0.3, shape="circle", radius=0.2), picture(x=0.7, radius=0.2)))
    assert (left[:, :16] < 200).any() and not (left[:, 16:, 1] < 200).any() and (right[:, 16:] < 200).any()


# -- captions


def test_captions_say_what_is_true_in_known_words():
    pictures = world.sample(4000, 9, held_out="any")
    words, told, named = set(), Counter(), Counter()
    for i, p in enumerate(pictures):
        text = world.caption(p, np.random.default_rng([9, i]))
        claims = world.said(text)
        assert claims.items() <= p.attributes().items()
        told.update(claims.keys())
        words |= set(text.split())
        named[next((w for w in text.split() if w in {p.shape, world.SYNONYMS[p.shape], "shape"}), "")] += 1
    assert words <= set(world.WORDS) and len(words) >= len(world.WORDS) - 1  # all but "centre"
    for name, expected in world.SAID.items():
        assert told[name] / 4000 == pytest.approx(expected, abs=0.04)  # five standard errors
    assert named["shape"] / 4000 == pytest.approx(world.UNNAMED_SHARE, abs=0.016) and not named[""]
    synonyms = sum(named[word] for word in world.SYNONYMS.values())
    assert synonyms / 4000 == pytest.approx(world.SYNONYM_SHARE, abs=0.032)


def test_a_caption_depends_on_its_generator_and_a_plain_one_on_nothing():
    p = picture()
    one, two = (world.caption(p, np.random.default_rng(4)) for _ in range(2))
    assert one == two and len({world.caption(p, np.random.default_rng(i)) for i in range(30)}) > 20
    assert world.plain_caption(p) == "a red square on a white background"
    assert world.said("a picture of a small striped red disc on a blue background at the top") == {
        "size": "small",
        "texture": "striped",
        "colour": "red",
        "shape": "circle",
        "background": "blue",
        "position": "top",
    }
    assert world.said("this is a shape") == {}


# -- manifests


def test_world_manifests_draw_what_was_locked():
    data = load("world-val")
    data.check()
    assert len(data) == len(data.ids()) == data.num_clusters() == 4000
    seed = 20260002
    pictures = world.sample(3, seed, first=100)
    for i, p in enumerate(pictures, 100):
        item = data.item(f"{i:06d}")
        assert item.attributes == {**p.attributes(), "composition": "seen"} and item.path is None
        assert item.text == world.caption(p, np.random.default_rng([seed, i]))
        assert np.array_equal(data.read(item.id), world.draw([p])[0])
    part = data.subset(10)
    assert len(part) == 10 and np.array_equal(part.read(part.ids()[3]), data.read(part.ids()[3]))
    for wrong in ("4000", "004000", "-00001", "x"):
        with pytest.raises(Error, match="no item"):
            data.item(wrong)


def test_a_world_is_locked_verified_and_found_out_when_it_draws_other_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_manifests").mkdir()
    path = tmp_path / "data_manifests/toy.toml"
    header = 'kind = "world"\nsource = "here"\nlicense = "CC0"\nredistribute = true\nlocked = false\n'
    table = '[world]\nseed = 5\nitems = 70\nheld_out = "only"\n'
    path.write_text(header + table)
    with pytest.raises(Error, match="never locked"):
        load("toy").ids()
    assert lock("toy") == path
    assert verify("toy") == "toy: 70 items, all drawn as locked"
    assert load("toy").item("000069").attributes["composition"] == "held out"
    path.write_text(path.read_text().replace("items = 70", "items = 71"))
    with pytest.raises(Error, match="digest"):
        load("toy")
    path.write_text(path.read_text().replace("items = 71", "items = 70"))
    monkeypatch.setitem(world.COLOURS, "cyan", (0.1, 0.75, 0.85))
    with pytest.raises(Error, match="draws other pictures"):
        load("toy").check()
    for change, reason in (("seed = -5", "seed"), ("items = 0", "items"), ('held_out = "all"', "held_out")):
        field = change.split(" ")[0]
        old = next(line for line in table.splitlines() if line.startswith(field))
        path.write_text(header + table.replace(old, change))
        with pytest.raises(Error, match=reason):
            load("toy")
    path.write_text(header)
    with pytest.raises(Error, match=r"table \[world\]"):
        load("toy")


def test_prompts_cover_every_composition_equally():
    data = load("world-prompts")
    items = [data.item(id) for id in data.ids()]
    combinations = {(s, c, b) for s in world.SHAPES for c in world.COLOURS for b in world.BACKGROUNDS if b != c}
    keys = Counter((i.attributes["shape"], i.attributes["colour"], i.attributes["background"]) for i in items)
    assert keys.keys() == combinations and set(keys.values()) == {4} and len(items) == 1920
    assert data.num_clusters() == 480
    for item in items:
        a = item.attributes
        assert item.text == f"a {a['colour']} {a['shape']} on a {a['background']} background"
        assert world.said(item.text) == {k: a[k] for k in ("shape", "colour", "background")}
        assert (a["composition"] == "held out") == ((a["shape"], a["colour"]) in world.HELD_OUT)


def test_probes_say_nothing_but_a_shape():
    data = load("world-probes")
    items = [data.item(id) for id in data.ids()]
    assert Counter(i.attributes.get("shape", "") for i in items) == {**dict.fromkeys(world.SHAPES, 50), "": 25}
    for item in items:
        claims = world.said(item.text)
        assert claims == ({"shape": item.attributes["shape"]} if "shape" in item.attributes else {})
        assert set(item.text.split()) <= set(world.WORDS)
