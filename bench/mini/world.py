"""A small world of captioned 32 px pictures: one coloured shape on a plain background, with everything about it known.

A picture is a record of its attributes; drawing, captions and ground truth all follow from it. Its attributes depend on
(seed, number) alone, so that any range of a data set can be drawn anywhere. A skew ties an attribute to a shape with a
probability that is known exactly, so that what a model learnt, or exaggerated, can be compared with what it saw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from bench.types import UsageError

SIZE = 32  # px, of a picture
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS: Mapping[str, tuple[float, float, float]] = {  # name -> RGB in [0, 1]
    "red": (0.87, 0.10, 0.12),
    "yellow": (0.98, 0.85, 0.10),
    "green": (0.10, 0.62, 0.20),
    "cyan": (0.05, 0.75, 0.85),
    "blue": (0.08, 0.33, 0.86),
    "purple": (0.56, 0.08, 0.56),
    "pink": (0.98, 0.48, 0.72),
    "brown": (0.50, 0.29, 0.12),
}
BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {  # four of them have the name and the RGB of a colour
    "white": (0.95, 0.95, 0.95),
    "grey": (0.52, 0.52, 0.52),
    "black": (0.06, 0.06, 0.06),
    "beige": (0.88, 0.80, 0.64),
    "yellow": COLOURS["yellow"],
    "green": COLOURS["green"],
    "blue": COLOURS["blue"],
    "pink": COLOURS["pink"],
}
SIZES: Mapping[str, tuple[float, float]] = {"small": (0.22, 0.26), "large": (0.36, 0.42)}  # radius in picture widths
POSITIONS: Mapping[str, tuple[int, int]] = {  # direction right and down
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
TEXTURES = ("plain", "striped", "dotted")
SYNONYMS: Mapping[str, str] = {
    "circle": "disc",
    "square": "box",
    "triangle": "wedge",
    "star": "spark",
    "cross": "plus",
    "ring": "hoop",
    "diamond": "rhombus",
    "heart": "valentine",
}
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {  # what a caption may say, and a judge is asked for
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "texture": TEXTURES,
}
PRIOR: Mapping[str, tuple[float, ...]] = {  # of the attributes that depend on no other one
    "size": (0.5, 0.5),
    "position": (0.5, 0.125, 0.125, 0.125, 0.125),
    "texture": (0.8, 0.1, 0.1),
}
# Compositions that training data leave out: each shape and each colour lacks one partner, so all remain as frequent.
HELD_OUT = (
    ("circle", "cyan"),
    ("square", "yellow"),
    ("triangle", "purple"),
    ("star", "green"),
    ("cross", "pink"),
    ("ring", "brown"),
    ("diamond", "red"),
    ("heart", "blue"),
)
JITTER = 0.04  # of each colour channel, either way
OFFSET: Mapping[str, float] = {"small": 0.20, "large": 0.12}  # picture widths from the centre
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "this is {}", "there is {}")
PLACES: Mapping[str, str] = {
    "centre": "in the middle",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
SAID: Mapping[str, float] = {"size": 0.4, "texture": 0.5, "colour": 0.8, "background": 0.7, "position": 0.4}
SYNONYM_SHARE = 0.2
UNNAMED_SHARE = 0.04  # of captions that say only "shape"
WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            *(word for names in ATTRIBUTES.values() for word in names),
            *SYNONYMS.values(),
            *(word for template in TEMPLATES for word in template.format("a").split()),
            *(word for place in PLACES.values() for word in place.split()),
            *("shape", "background"),
        }
    )
)


@dataclass(frozen=True)
class Picture:
    """All that is needed to draw a picture; lengths in picture widths, colours in [0, 1]."""

    shape: str
    colour: str
    background: str
    size: str
    position: str
    texture: str
    x: float  # of the centre, from the left
    y: float  # of the centre, from the top
    radius: float
    foreground: tuple[float, float, float]  # RGB, the colour with its jitter
    backdrop: tuple[float, float, float]  # RGB, the background with its jitter
    phase: tuple[float, float]  # of the texture, in periods

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT

    def attributes(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ATTRIBUTES}


@dataclass(frozen=True)
class Skew:
    """Pictures of a shape have the value of an attribute with probability `share`: Skew("circle", "colour", "red",
    0.8). The other values share what is left in their old proportions."""

    shape: str
    attribute: str  # any of ATTRIBUTES but the shape
    value: str
    share: float

    def __post_init__(self):
        allowed = {"shape": SHAPES, "attribute": tuple(ATTRIBUTES)[1:], "value": ATTRIBUTES.get(self.attribute, ())}
        for field, names in allowed.items():
            if getattr(self, field) not in names:
                raise UsageError(f"skew: {field} is {getattr(self, field)!r}", hint=f"one of {', '.join(names)}")
        if not 0 <= self.share <= 1:
            raise UsageError(f"skew: share is {self.share}; it must lie between 0 and 1")


HeldOut = Literal["exclude", "only", "any"]
UNIFORMS = 20  # random numbers of a picture; a multiple of 4, which is what one step of Philox's counter gives


def sample(
    n: int, seed: int, skew: Sequence[Skew] | None = None, held_out: HeldOut = "exclude", first: int = 0
) -> list[Picture]:
    """Pictures `first` to `first + n` of the endless list that a seed (0 to 2^128 - 1) stands for.

    `held_out` says what becomes of the compositions in HELD_OUT. Shapes are equally frequent. Raises UsageError where
    skews contradict each other, or leave nothing to draw.
    """
    tables = _distributions(tuple(skew or ()), held_out)
    bits = np.random.Philox(key=seed, counter=first * UNIFORMS // 4)
    u = np.random.Generator(bits).random((n, UNIFORMS))
    shape = (u[:, 0] * len(SHAPES)).astype(np.int64)
    pair = _choose(np.stack([t["colour, background"].ravel() for t in tables])[shape], u[:, 1])
    picked = {"shape": shape, "colour": pair // len(BACKGROUNDS), "background": pair % len(BACKGROUNDS)}
    for i, name in enumerate(PRIOR):
        picked[name] = _choose(np.stack([t[name] for t in tables])[shape], u[:, 2 + i])
    low, high = np.array(list(SIZES.values()))[picked["size"]].T
    offset = np.array(list(OFFSET.values()))[picked["size"]]
    directions = np.array(list(POSITIONS.values()))[picked["position"]]
    centre = 0.5 + offset[:, None] * directions + 0.06 * (u[:, 5:7] - 0.5)
    radius = low + (high - low) * u[:, 7]
    foreground = np.array(list(COLOURS.values()))[picked["colour"]] + 2 * JITTER * (u[:, 8:11] - 0.5)
    backdrop = np.array(list(BACKGROUNDS.values()))[picked["background"]] + 2 * JITTER * (u[:, 11:14] - 0.5)
    columns = [[values[i] for i in picked[name].tolist()] for name, values in ATTRIBUTES.items()]
    columns += [centre[:, 0].tolist(), centre[:, 1].tolist(), radius.tolist()]
    columns += [list(map(tuple, np.clip(c, 0, 1).tolist())) for c in (foreground, backdrop)]
    columns += [list(map(tuple, u[:, 14:16].tolist()))]
    return [Picture(*values) for values in zip(*columns, strict=True)]


@cache
def _distributions(skew: tuple[Skew, ...], held_out: HeldOut) -> list[dict[str, np.ndarray]]:
    """Of every shape, for pictures that are asked for one by one; to be read only."""
    return [distribution(shape, skew, held_out) for shape in SHAPES]


def distribution(shape: str, skew: Sequence[Skew] | None = None, held_out: HeldOut = "any") -> dict[str, np.ndarray]:
    """The exact probabilities of a shape's attributes: "colour, background" [8, 8] jointly, since the two never have
    the same name, then "size", "position" and "texture", each independent of the others.

    Colours are equally frequent, and so are the backgrounds of each colour, until skews change them. Where a shape has
    skews on both, rows and columns are scaled in turn until both hold (iterative proportional fitting).
    """
    joint = np.array([[1.0 * (colour != background) for background in BACKGROUNDS] for colour in COLOURS])
    joint /= joint.sum(1, keepdims=True)
    if held_out != "any":
        held = np.array([(shape, colour) in HELD_OUT for colour in COLOURS])
        joint[held if held_out == "exclude" else ~held] = 0
    tables = {"colour, background": joint / joint.sum(), **{name: np.array(p) for name, p in PRIOR.items()}}
    own = [s for s in skew or () if s.shape == shape]
    for _ in range(200):
        for s in own:
            name, axis = _place(s.attribute)
            tables[name] = _skewed(tables[name], axis, ATTRIBUTES[s.attribute].index(s.value), s.share)
    for s in own:
        name, axis = _place(s.attribute)
        found = np.moveaxis(tables[name], axis, 0)[ATTRIBUTES[s.attribute].index(s.value)].sum()
        if not abs(found - s.share) < 1e-6:
            raise UsageError(
                f"no picture of a {shape} can have the {s.attribute} {s.value} with probability {s.share:g}",
                hint="another skew, held_out, or colour and background of one name stand against it",
            )
    return tables


def _place(attribute: str) -> tuple[str, int]:
    """The table of `distribution` that holds an attribute, and its axis."""
    pair = ("colour", "background")
    return ("colour, background", pair.index(attribute)) if attribute in pair else (attribute, 0)


def _skewed(table: np.ndarray, axis: int, index: int, share: float) -> np.ndarray:
    chosen = np.zeros(table.shape[axis], dtype=bool)
    chosen[index] = True
    table = np.moveaxis(table.copy(), axis, 0)
    for part, mass in ((chosen, share), (~chosen, 1 - share)):
        total = table[part].sum()
        table[part] *= mass / total if total > 0 else 0
    return np.moveaxis(table, 0, axis)


def _choose(probabilities: np.ndarray, u: np.ndarray) -> np.ndarray:
    """For each row of [n, k] the index that u [n] in [0, 1) picks; one of probability 0 never."""
    cumulative = probabilities.cumsum(1)
    return (u[:, None] * cumulative[:, -1:] >= cumulative).sum(1)


# Drawing: distances in radii, u to the right and v down from the centre, negative inside. Nothing but + - * / and
# square roots, which all processors round alike; NumPy's sine and its kin differ in the last bit between them.


def _length(u, v):
    return np.sqrt(u * u + v * v)


def _circle(u, v):
    return _length(u, v) - 0.92


def _ring(u, v):
    return np.abs(_length(u, v) - 0.72) - 0.23


def _square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _diamond(u, v):
    return (1.35 * np.abs(u) + np.abs(v) - 1.1) / math.sqrt(1.35**2 + 1)


def _triangle(u, v):
    slope = 1.65 / 0.98  # from the top (0, -0.95) to a corner (0.98, 0.7)
    return np.maximum(v - 0.7, (slope * np.abs(u) - v - 0.95) / math.sqrt(slope**2 + 1))


def _cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - 0.27, np.maximum(u, v) - 0.95)


def _star(u, v):
    """Five points: the plane is folded along mirrors into half of the upper one, which has a straight edge."""
    cos36, cos72 = (math.sqrt(5) + 1) / 4, (math.sqrt(5) - 1) / 4
    sin36, sin72 = math.sqrt(1 - cos36**2), math.sqrt(1 - cos72**2)
    across, along = np.abs(u), 0.08 - v
    for cos, sin in ((-cos72, sin72), (cos72, sin72), (cos36, sin36)):  # mirrors 108, 72 and 36 degrees from the top
        beyond = 2 * np.maximum(cos * across - sin * along, 0)
        across, along = across - cos * beyond, along + sin * beyond
    outer, inner = 1.16, 0.5
    rise, run = inner * sin36, outer - inner * cos36  # of the edge from the tip to the inner corner
    return (rise * (along - outer) + run * across) / math.sqrt(rise**2 + run**2)


def _heart(u, v):
    """Two discs whose tangents meet in the point below; symmetric, so the right half is enough."""
    u, v = np.abs(u), v + 0.1
    x, y, radius = 0.44, -0.105, 0.47  # of the disc; x + y + radius sqrt(2) = 1, where the tangent is u + v = 1
    disc = _length(u - x, v - y) - radius
    below = np.maximum(u + v - 1, (u - x) - (v - y)) / math.sqrt(2)
    return np.minimum(disc, np.maximum(below, y - 0.16 - v))


_DISTANCES = dict(zip(SHAPES, (_circle, _square, _triangle, _star, _cross, _ring, _diamond, _heart), strict=True))


def draw(pictures: Sequence[Picture]) -> np.ndarray:
    """uint8 [n, 32, 32, 3]. Edges are as wide as a subpixel, and four subpixels make a pixel."""
    pixels = np.empty((len(pictures), SIZE, SIZE, 3), dtype=np.uint8)
    for shape in SHAPES:
        numbers = [i for i, p in enumerate(pictures) if p.shape == shape]
        for start in range(0, len(numbers), 64):  # what fits into the cache
            part = numbers[start : start + 64]
            pixels[part] = _draw([pictures[i] for i in part], _DISTANCES[shape])
    return pixels


def _draw(pictures, distance):
    n, size = len(pictures), 2 * SIZE
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y, radius = (
        np.array([getattr(p, k) for p in pictures], np.float32)[:, None, None] for k in ("x", "y", "radius")
    )
    u, v = np.broadcast_arrays((grid - x) / radius, (grid[:, None] - y) / radius)
    cover = np.clip(0.5 - distance(u, v) * radius * size, 0, 1)
    pattern = np.zeros((n, size, size), dtype=np.float32)
    for i, p in enumerate(pictures):
        if p.texture != "plain":
            pattern[i] = _pattern(p, grid)
    foreground = np.array([p.foreground for p in pictures], dtype=np.float32)
    backdrop = np.array([p.backdrop for p in pictures], dtype=np.float32)
    # The texture's second colour goes away from the background's lightness, so that the outline stays.
    lightness = (backdrop[:, :1] + backdrop[:, 1:2] + backdrop[:, 2:]) / 3
    pole = (lightness < 0.5).astype(np.float32)
    second = foreground + 0.55 * (pole - foreground)
    inner, outer = (_pixels(c)[..., None] for c in (cover * pattern, cover))
    first, other, behind = (c[:, None, None, :] for c in (foreground, second, backdrop))
    return np.rint(255 * (first * (outer - inner) + other * inner + behind * (1 - outer))).astype(np.uint8)


def _pixels(cover):
    """The means of 2 x 2 subpixels of [n, H, W]."""
    rows = cover[:, ::2] + cover[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4


def _pattern(picture, grid):
    """Where the second colour lies, float32 [H, W] in {0, 1}; a period is 5.3 px."""
    turns = 6 * grid
    a, b = picture.phase
    if picture.texture == "striped":
        return ((turns + turns[:, None] + a) % 1 < 0.5).astype(np.float32)
    across, down = (turns + a) % 1 - 0.5, (turns + b)[:, None] % 1 - 0.5
    return (across**2 + down**2 < 0.3**2).astype(np.float32)


# captions


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """A sentence that names the shape (rarely just "shape", at times a synonym) and some of the attributes."""
    template = TEMPLATES[int(rng.random() * len(TEMPLATES))]
    return template.format(phrase(picture, rng))


def phrase(picture: Picture, rng: np.random.Generator) -> str:
    """What captions say in a sentence: "a small red disc on the left"."""
    named, *said = rng.random(1 + len(SAID)).tolist()
    told = {name for (name, share), u in zip(SAID.items(), said, strict=True) if u < share}
    noun = picture.shape
    if named < SYNONYM_SHARE + UNNAMED_SHARE:
        noun = SYNONYMS[noun] if named < SYNONYM_SHARE else "shape"
    words = ["a", *(getattr(picture, name) for name in ("size", "texture", "colour") if name in told), noun]
    words += [f"on a {picture.background} background"] if "background" in told else []
    words += [PLACES[picture.position]] if "position" in told else []
    return " ".join(words)


def plain_caption(picture: Picture) -> str:
    """ "a red circle on a blue background"."""
    return f"a {picture.colour} {picture.shape} on a {picture.background} background"


def said(text: str) -> dict[str, str]:
    """What a caption says of its picture, by attribute: "a red disc" -> {"colour": "red", "shape": "circle"}."""
    before, _, behind = text.partition(" on a ")
    meant = {synonym: shape for shape, synonym in SYNONYMS.items()}
    found = {}
    for word in before.split():
        word = meant.get(word, word)
        for name in ("shape", "colour", "size", "texture"):
            if word in ATTRIBUTES[name]:
                found[name] = word
    if behind:
        found["background"] = behind.split()[0]
    for position, place in PLACES.items():
        if text.endswith(place):
            found["position"] = position
    return found
