"""Pictures on the page: few, chosen by hash, small, blurred for sensitive suites, none where a manifest forbids it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.identity import digest, without_copy
from bench.report.collect import Collection, Facts
from bench.report.figures import family
from bench.types import Error, Record

MOST = 48  # tiles on a page
MODELS = 6  # at most
SIDE = 176  # px, longer side of a thumbnail
GAIN = 5  # of the difference, said on the page
BLUR = 9  # px, longer side of what a blurred picture is made from: nothing can be read from it
ORIGINALS = ("image", "original", "input", "reference")
OUTPUTS = ("recon", "output")


def tiles(found: Collection, runs: Sequence[str], items: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    """{run: {item: {"original", "output", "difference", "value"}}}, data URLs of JPEG thumbnails.

    `runs` are shown in their order; `kept` are the tiles of the page as it was, for runs that are not in the store.
    Items are those that most of the runs kept, in the order of the hash of their id: no taste is involved. Several
    pictures of one prompt (`id#0`, `id#1`, ...) stay together, and their tiles hold the prompt as "text".
    """
    shown = _various([r for r in runs if may_show(found.facts[r])], found.facts)
    if not shown or not items:
        return {}
    media = {r: _with_output(_media(found.runs[r].records())) if r in found.runs else None for r in shown}
    available = {r: set(kept.get(r, {})) if m is None else set(m) for r, m in media.items()}
    shown = [r for r in shown if available[r]]
    everything = set().union(*(available[r] for r in shown)) if shown else set()
    chosen = _first_groups(everything, lambda i: sum(i in available[r] for r in shown), items, len(shown))
    result: dict[str, Any] = {}
    for r in shown:
        here = [i for i in chosen if i in available[r]]
        if media[r] is None:
            result[r] = {i: kept[r][i] for i in here}
        else:
            store, sensitive = found.runs[r].store, found.facts[r].sensitive
            drawn = {i: tile for i in here if (tile := _tile(store, media[r][i], sensitive))}
            result[r] = {i: tile | said for i, said in _said(found.runs[r].records(), drawn) if (tile := drawn[i])}
    return result


def _first_groups(items: Iterable[str], count: Callable[[str], int], most: int, models: int) -> list[str]:
    """Items group by group, those of the highest count first, then by hash, as long as a whole group has room."""
    groups: dict[str, list[str]] = {}
    for item in sorted(items):
        groups.setdefault(without_copy(item), []).append(item)
    room, chosen = min(most, MOST // max(1, models)), []
    for name in sorted(groups, key=lambda g: (-max(map(count, groups[g])), digest(["gallery", g]))):
        if len(chosen) + len(groups[name]) > room:
            break
        chosen += groups[name]
    return chosen


def _said(records: Mapping[str, Record], items: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(item, {"text": its prompt}) of some items; nothing where a picture was made from no prompt."""
    prompts = {str(row["item"]): row.get("prompt") for record in records.values() for row in record.rows}
    for item in items:
        text = prompts.get(item)
        yield item, {"text": text} if isinstance(text, str) else {}


def _various(runs: Sequence[str], facts: Mapping[str, Facts]) -> list[str]:
    """At most MODELS: the first of each family, then the last of each; in their order."""
    families: dict[str, list[str]] = {}
    for r in runs:
        families.setdefault(family(facts[r].model), []).append(r)
    picked = [of[0] for of in families.values()] + [of[-1] for of in families.values()] + list(runs)
    chosen = set(list(dict.fromkeys(picked))[:MODELS])
    return [r for r in runs if r in chosen]


def may_show(facts: Facts) -> bool:
    """Media leave the store only where the run and every manifest say `redistribute = true`, in so many words."""
    return facts.redistribute is True


def _media(records: Mapping[str, Record]) -> dict[str, dict[str, str]]:
    """{item: {media name: content address}} of what a run kept."""
    found: dict[str, dict[str, str]] = {}
    for record in records.values():
        for name, address in record.blobs.items():
            kind, _, rest = name.partition("/")
            medium, _, item = rest.partition("/")
            if kind == "media" and item and address.endswith(".png"):
                found.setdefault(item, {})[medium] = address
    return found


def _with_output(media: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Items that a model made something of, where there are such; else all."""
    return {i: m for i, m in media.items() if not m.keys() <= set(ORIGINALS)} or media


def _tile(store: Any, media: Mapping[str, str], sensitive: bool) -> dict[str, str]:
    """Thumbnails of one item: the original where there is one, the output, and |difference| times GAIN."""
    original = next((n for n in ORIGINALS if n in media), None)
    outputs = sorted((n for n in media if n not in ORIGINALS), key=lambda n: (n not in OUTPUTS, n))
    tile = {}
    try:
        pictures = {n: _open(store.get(a), a) for n, a in media.items() if n == original or n in outputs[:1]}
    except Error:
        return {}  # a gap, never another picture
    if original:
        tile["original"] = thumbnail(pictures[original], sensitive)
    if outputs:
        tile["output"] = thumbnail(pictures[outputs[0]], sensitive)
        if original and pictures[original].size == pictures[outputs[0]].size:
            tile["difference"] = thumbnail(difference(pictures[original], pictures[outputs[0]]), sensitive)
    return tile


def _open(data: bytes, address: str) -> Any:
    """An RGB picture from bytes of our own store; anything but a PNG of reasonable size is refused."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.width * image.height > 1 << 26:
            raise Error(f"picture {address} has {image.width} x {image.height} px", hint="kept media are at most 64 MP")
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise Error(f"picture {address} cannot be read: {e}", hint="measure its unit again") from None


def difference(a: Any, b: Any) -> Any:
    """|a - b| times GAIN per channel, cut at white."""
    import numpy as np
    from PIL import Image

    x, y = (np.asarray(p, np.int16) for p in (a, b))
    return Image.fromarray(np.clip(np.abs(x - y) * GAIN, 0, 255).astype(np.uint8))


def thumbnail(image: Any, blur: bool = False) -> str:
    """A data URL of at most SIDE px; blurred for good where `blur` (the page holds nothing sharper). No metadata."""
    from PIL import Image

    scale = min(1.0, SIDE / max(image.size))
    size = tuple(max(1, round(s * scale)) for s in image.size)
    if blur:
        coarse = tuple(max(1, round(s * BLUR / max(image.size))) for s in image.size)
        image = image.resize(coarse, Image.Resampling.BOX)
    small = (
        image.resize(size, Image.Resampling.BICUBIC if blur else Image.Resampling.LANCZOS)
        if image.size != size
        else image
    )
    out = io.BytesIO()
    small.save(out, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
