"""Text to pictures: do they look like pictures of their kind, and like what their prompts say?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from bench.capabilities import TextToImage
from bench.metrics.sets import GENERATED, REFERENCE, SIDE, SetMetric, describe_network, net_column
from bench.suite import Metric, Suite
from bench.types import BadOutput, Data, Error, Estimate, Model, NonFinite, Score, Table, Unit, UsageError
from suites.generation import geneval, protocols

ASKED = ("shape", "colour", "background")  # what prompts of the drawn world say
JUDGE = "mini-classifier"  # of the drawn world
OVERSHOOT = 0.01  # pictures may leave [0, 1] by so much


@dataclass(frozen=True)
class Generation(Suite):
    """Distance of distributions, fit to the prompt and diversity of a text-to-image model, as a named protocol says.

    The k-th picture of a prompt has one seed, whichever model draws it with whatever guidance. Raises UsageError for an
    unknown protocol, counts below 1, and GenEval without a detector.
    """

    data: Data = "world-prompts"
    reference: Data = "world-val"
    protocol: str = "world"  # which numbers by which networks, as in `suites.generation.protocols`
    prompts: int | None = None  # so many of the data's, chosen by hash; none: all
    images_per_prompt: int = 1  # each from a seed of its own; diversity needs two
    detector: Model = ""  # for GenEval: an adapter with the method of `suites.generation.geneval.Detector`
    chunk: int = 64  # pictures per unit: what a crash can cost

    name = "generation"
    version = 1
    requires = (TextToImage,)
    slices = ("shape", "colour", "composition", "tag")
    value_range = (0.0, 1.0)

    def __post_init__(self):
        try:
            p = protocols.get(self.protocol)
        except ValueError as e:
            raise UsageError(str(e), hint=f"one of {', '.join(protocols.PRESETS)}") from None
        for name in ("prompts", "images_per_prompt", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value} must be 1 or more")
        if (p.judge == "geneval") != bool(self.detector):
            if self.detector:
                raise UsageError(f"protocol {p.name} asks no detector", hint="-p protocol=geneval, or leave it out")
            hint = "-p detector=my_detector.py:Name, an object with detect(images, labels, colours): the module tells"
            raise UsageError("protocol geneval needs a detector of objects (suites/generation/geneval.py)", hint=hint)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        from bench import metrics

        p = protocols.get(self.protocol)
        sides = {"fake": "output", "real": "reference"}  # a batch holds one of them
        found: list[Metric] = []
        if p.frechet:
            found.append(metrics.Frechet(extractor=p.frechet, **sides))
        if p.kid:
            found.append(metrics.KID(extractor=p.kid, protocol=p.kid_protocol, **sides))
        if p.cmmd:
            found.append(metrics.CMMD(extractor=p.cmmd, **sides))
        if p.prdc:
            found.append(metrics.PRDC(extractor=p.prdc, k=p.k, **sides))
        if p.inception_score:
            found.append(metrics.InceptionScore(extractor=p.inception_score, **sides))
        if p.clip:
            found.append(metrics.CLIPScore(extractor=p.clip, fake="output"))
        if p.judge == "world":
            found += [Agreement(), Judge()]
        if p.judge == "geneval":
            found.append(GenEval())
        if p.diversity:
            found.append(Diversity(p.diversity))
        return (*found, Prompts())

    def units(self, data: Any, reference: Any) -> Iterator[Unit]:
        p = protocols.get(self.protocol)
        chosen = data if self.prompts is None else data.subset(self.prompts)
        ids = list(chosen.ids())
        if not ids:
            raise Error(f"data {data.name} has no prompts", hint="its items need a column `text`")
        for id in ids:
            item = chosen.item(id)
            if not item.text:
                raise Error(f"data {data.name}: item {id} has no prompt", hint="the column `text` holds prompts")
            if p.judge == "geneval":
                _task(item.attributes, id)
        names = [f"{id}#{k}" for id in ids for k in range(self.images_per_prompt)]
        for i, start in enumerate(range(0, len(names), self.chunk)):
            part = tuple(names[start : start + self.chunk])
            # pictures that are drawn take longer than those that are read
            yield Unit(f"{GENERATED}/{i:04d}", part, {SIDE: GENERATED}, 20.0 * len(part))
        for i, part in enumerate(reference.chunks(self.chunk) if p.compares else ()):
            found = tuple(f"{REFERENCE}:{id}" for id in part)
            yield Unit(f"{REFERENCE}/{i:04d}", found, {SIDE: REFERENCE}, len(part), shared=True)

    def run(self, unit: Unit, model: Any, ctx: Any) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        for ids in ctx.batches(unit):
            if unit.params[SIDE] == GENERATED:
                yield ids, self._generated(ids, model, ctx)
            else:
                yield from _reference(ids, ctx)

    def score(self, table: Table) -> list[Score]:
        """With prompts that were cut as a note, and sets compared as a whole and by composition only."""
        found = super().score(table)
        prompts = table.where(SIDE, GENERATED)
        cut = sum(bool(v) for v in prompts.column("truncated"))
        if not cut or len(table) < table.expected:  # a note would say that nothing is missing
            return found
        note = f"{cut:,} of {len(prompts):,} prompts were cut to the model's limit"
        return [replace(s, note="; ".join(n for n in (s.note, note) if n)) for s in found]

    def artifacts(self, table: Table) -> Iterator[tuple[str, bytes]]:
        """The whole definition behind the numbers, so that they can be compared in years."""
        p = protocols.get(self.protocol)
        about = {"name": p.name, "hash": p.hash(), "source": p.source, "departs": p.departs}
        yield "protocol.json", (json.dumps({**about, "definition": p.definition()}, indent=2) + "\n").encode()

    def _reduce(self, metric: Metric, slice: str, table: Table) -> Iterator[Score]:
        """Metrics of one set are reduced over that set, so that they count its pictures alone."""
        if not isinstance(metric, SetMetric):
            table = table.where(SIDE, getattr(metric, "side", GENERATED))
            return super()._reduce(metric, slice, table) if len(table) or slice == "all" else iter(())
        # a shape's pictures are few, and distances of few pictures say little
        return super()._reduce(metric, slice, table) if slice.partition("=")[0] in ("all", "composition") else iter(())

    def _generated(self, ids: Sequence[str], model: Any, ctx: Any) -> dict[str, Any]:
        """A batch of pictures that the model drew, uint8 [B, 3, H, W], and what their prompts say."""
        items = [ctx.item(id) for id in ids]
        prompts = [str(item.text) for item in items]
        found = {
            SIDE: [GENERATED] * len(ids),
            "prompt": prompts,
            "cluster": [item.cluster or item.text for item in items],  # pictures of one prompt depend on each other
            "truncated": _truncated(model, prompts),
            **_asked(items, prompts),
        }
        if protocols.get(self.protocol).judge == "geneval":
            keys = ("tag", "include", "exclude")
            found |= {key: [item.attributes.get(key) for item in items] for key in keys}
        found["output"] = _as_bytes(model.generate(prompts, [ctx.seed(id) for id in ids]), ids).to(ctx.device)
        return found


def _truncated(model: Any, prompts: Sequence[str]) -> list[bool | None]:
    """Which prompts the model cuts; None where it does not tell."""
    if not (callable(getattr(model, "tokens", None)) and hasattr(model, "max_tokens")):
        return [None] * len(prompts)
    return [count > model.max_tokens for count in model.tokens(prompts)]


def _asked(items: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[Any]]:
    """The attributes that a prompt says; what a caption leaves open cannot be drawn wrong."""
    from bench.mini.world import said

    known = _attributes(items)
    return {
        name: [
            value if said(prompt).get(name) == value else None for value, prompt in zip(values, prompts, strict=True)
        ]
        for name, values in known.items()
    }


def _attributes(items: Sequence[Any]) -> dict[str, list[Any]]:
    return {name: [item.attributes.get(name) for item in items] for name in ASKED}


def _as_bytes(pictures: Any, ids: Sequence[str]) -> Any:
    """uint8 [B, 3, H, W] of what a model drew; BadOutput where that is no picture in [0, 1] for each item."""
    import torch

    from bench.metrics.pixel import quantise

    if not (hasattr(pictures, "shape") and hasattr(pictures, "dtype")):
        raise BadOutput(
            f"generate() returned {type(pictures).__name__}", hint="a tensor, float32 [B, 3, H, W] in [0, 1]"
        )
    x = torch.as_tensor(pictures)
    if x.dim() != 4 or x.shape[:2] != (len(ids), 3) or 0 in x.shape or not x.is_floating_point():
        hint = "float32 [B, 3, H, W] in [0, 1], a picture for each prompt"
        raise BadOutput(f"generate() returned {x.dtype} {list(x.shape)} for {len(ids)} prompts", hint=hint)
    if x.is_meta:
        raise BadOutput("generate() returned a tensor on the device meta, which holds no values")
    finite = x.flatten(1).isfinite().all(1).tolist()
    bad = [id for id, good in zip(ids, finite, strict=True) if not good]
    if bad:
        raise NonFinite(
            f"generate() returned NaN or infinity in {len(bad)} of {len(ids)} pictures, item {bad[0]} first"
        )
    low, high = (float(bound) for bound in x.aminmax())
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise BadOutput(f"generate() returned pictures from {low:.3g} to {high:.3g}", hint="they must lie in [0, 1]")
    return quantise(x.detach(), "round", (0.0, 1.0)).contiguous()


def _reference(ids: Sequence[str], ctx: Any) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Reference pictures as they are stored; a tensor holds one size."""
    import torch

    found = sorted(((ctx.picture(id), id) for id in ids), key=lambda pair: pair[0].shape)
    for _, group in groupby(found, key=lambda pair: pair[0].shape):
        pictures, names = zip(*group, strict=True)
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        items = [ctx.item(id) for id in names]
        yield list(names), {SIDE: [REFERENCE] * len(names), **_attributes(items), "reference": pixels.to(ctx.device)}


def _images(media: Mapping[str, Any]) -> Any:
    return media["output"] if "output" in media else media["reference"]


def _task(attributes: Mapping[str, Any], id: str) -> geneval.Task:
    try:
        return geneval.parse(attributes.get("tag"), attributes.get("include"), attributes.get("exclude"))
    except ValueError as e:
        raise Error(f"item {id}: {e}", hint="GenEval's prompts have the columns tag, include and exclude") from None


def _share(table: Table, column: str) -> Estimate:
    """The mean of a column of true and false, its interval inside [0, 1]: Wilson's over prompts where all agree."""
    from bench import stats
    from bench.metrics.pixel import mean_of_rows

    found = mean_of_rows(table, column)
    if found.value is None:
        return found
    clusters = {c for c, v in zip(table.clusters(), table.column(column), strict=True) if v is not None}
    if len(clusters) == found.n or found.value in (0.0, 1.0):
        wilson = stats.proportion(round(found.value * len(clusters)), len(clusters))
        return replace(found, low=wilson.low, high=wilson.high, method=wilson.method)
    if found.low is None:
        return found
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


@cache
def _classifier() -> Any:
    from bench.mini import judges

    return judges.load_classifier()


def read_world(features: np.ndarray) -> dict[str, list[str]]:
    """What the judge sees, by attribute, from its features float32 [B, 128]; the shape may be "none"."""
    import torch

    from bench.mini import judges

    with torch.no_grad():
        logits = _classifier().logits(torch.from_numpy(features))
    return {name: [judges.HEADS[name][i] for i in logits[name].argmax(1).tolist()] for name in ASKED}


@dataclass(frozen=True)
class Agreement:
    """The share of pictures in which the judge of the drawn world sees what the prompt says: each attribute, and `all`.

    A picture of no shape, or of several, agrees with no prompt. How often the judge errs says `judge`.
    """

    name = "agreement"
    version = 1
    unit = ""
    better = "higher"

    def prepare(self, ctx):
        from bench.metrics.extractors import opened

        opened(JUDGE, ctx)

    def identity(self, ctx):
        from bench.metrics.extractors import opened

        return opened(JUDGE, ctx).fingerprint

    def measure(self, media, ctx):
        from bench.metrics.extractors import features

        images = _images(media)
        seen = read_world(features(JUDGE, images, ctx))
        title = self.name if "output" in media else Judge.name
        columns: dict[str, list[Any]] = {f"seen.{name}": values for name, values in seen.items()}
        right = {
            name: [None if a is None else a == s for a, s in zip(media[name], seen[name], strict=True)]
            for name in ASKED
        }
        verdicts = [[v for v in row if v is not None] for row in zip(*right.values(), strict=True)]
        right["all"] = [all(row) if row else None for row in verdicts]
        for name, values in right.items():
            columns[f"{title}.{name}"] = values
            reason = f"name no {name}" if name != "all" else "name no attribute of the drawn world"
            columns[f"{title}.{name}-withheld"] = [reason if v is None else None for v in values]
        columns[net_column(self.name)] = [self.identity(ctx)] * len(images)
        return columns

    def reduce(self, table):
        return {name: _share(table, f"{self.name}.{name}") for name in (*ASKED, "all")}

    def signature(self, table):
        nets = sorted({str(v) for v in table.column(net_column(self.name)) if v is not None})
        return f"agreement|judge:{'+'.join(nets) or 'none'}|v:{self.version}"


@dataclass(frozen=True)
class Judge(Agreement):
    """How often the judge of `agreement` is right about reference pictures, of which the truth is known."""

    name = "judge"
    side = REFERENCE

    def measure(self, media, ctx):
        return {}  # what `Agreement` measures is enough

    def signature(self, table):
        nets = sorted({str(v) for v in table.column(net_column(Agreement.name)) if v is not None})
        return f"judge|m:{len(table)}|judge:{'+'.join(nets) or 'none'}|v:{self.version}"


@dataclass(frozen=True)
class Diversity:
    """How far apart pictures of one prompt are: the mean Euclidean distance of all pairs, then the mean over prompts.

    Prompts with one picture say nothing. The interval is of the mean over prompts, clustered where they are.
    """

    extractor: str

    version = 1
    unit = ""
    better = "higher"

    @property
    def name(self) -> str:
        return f"diversity-{self.extractor}"

    def prepare(self, ctx):
        from bench.metrics.extractors import opened

        opened(self.extractor, ctx)

    def identity(self, ctx):
        from bench.metrics.extractors import opened

        return opened(self.extractor, ctx).fingerprint

    def measure(self, media, ctx):
        return SetMetric(extractor=self.extractor, real="reference", fake="output").measure(media, ctx)

    def reduce(self, table):
        from bench import stats

        try:
            features = table.features(self.extractor).astype(np.float64)
        except KeyError:  # no unit kept them: missing, not withheld
            return Estimate(None)
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(table.column("prompt")):
            rows.setdefault(str(prompt), []).append(i)
        several = [own for own in rows.values() if len(own) > 1]
        clusters = table.clusters()
        found = stats.mean(
            [mean_distance(features[own]) for own in several], [clusters[own[0]] for own in several], table.seed
        )
        alone = len(rows) - len(several)
        if len(table) < table.expected:  # a note would say that nothing is missing
            return replace(found, n=0, note="")
        note = f"{alone:,} of {len(rows):,} prompts have one picture" if alone else ""
        return replace(found, n=sum(map(len, several)), note=note)

    def signature(self, table):
        return f"{self.name}|mean over prompts|{describe_network(table, self.extractor)}|v:{self.version}"


def mean_distance(features: np.ndarray) -> float:
    """Mean Euclidean distance of all pairs of rows, float64 [n, d] with n > 1."""
    x = features - features.mean(0)
    first, second = np.triu_indices(len(x), 1)
    return float(np.sqrt(np.square(x[first] - x[second]).sum(1)).mean())


@dataclass(frozen=True)
class GenEval:
    """Share of right pictures of each of GenEval's tasks, and the plain mean of the six; the suite names the detector.

    Intervals are by prompt; that of the mean adds the variances of the tasks.
    """

    name = "geneval"
    version = 1
    unit = ""
    better = "higher"

    def prepare(self, ctx):
        if not callable(getattr(ctx.judge("detector"), "detect", None)):
            hint = "its method is detect(images, labels, colours), see suites/generation/geneval.py"
            raise Error("the detector finds nothing: it has no method detect", hint=hint)

    def measure(self, media, ctx):
        keys = ("tag", "include", "exclude")
        rows = zip(*(media[key] for key in keys), strict=True)
        tasks = [_task(dict(zip(keys, row, strict=True)), media["prompt"][i]) for i, row in enumerate(rows)]
        detected = ctx.judge("detector").detect(media["output"], [task.labels for task in tasks], geneval.COLOURS)
        if len(detected) != len(tasks):
            raise Error(f"the detector answered for {len(detected)} of {len(tasks)} pictures")
        verdicts = [geneval.judge(task, found) for task, found in zip(tasks, detected, strict=True)]
        return {"geneval": [right for right, _ in verdicts], "geneval.fault": [fault for _, fault in verdicts]}

    def reduce(self, table):
        from scipy.special import stdtrit

        from bench import stats

        parts = {task: table.where("tag", task) for task in geneval.TASKS}
        found = {task: _share(part, "geneval") for task, part in parts.items()}
        if len(table) == table.expected:  # n is that of the task: a note says that nothing is missing
            notes = {task: f"{stats.num_clusters(part.clusters())} prompts" for task, part in parts.items()}
            found = {task: replace(e, note=e.note or notes[task]) for task, e in found.items()}
        missing = [task for task, e in found.items() if e.value is None]
        if missing:
            note = f"no picture of {', '.join(missing)}" if len(table) == table.expected else ""
            return {"": Estimate(None, n=len(table), note=note), **found}
        value = geneval.overall({task: e.value for task, e in found.items()})
        errors = [stats.mean_error(part.values("geneval"), part.clusters()) for part in parts.values()]
        whole = Estimate(value, n=len(table))
        if None not in errors and any(error for error, _ in errors):
            variances = [error * error / len(errors) ** 2 for error, _ in errors]
            spread = sum(v * v / freedom for v, (_, freedom) in zip(variances, errors, strict=True))
            half = float(stdtrit(sum(variances) ** 2 / spread, 0.975)) * sum(variances) ** 0.5
            whole = replace(whole, low=max(0.0, value - half), high=min(1.0, value + half), method="cluster-t")
        return {"": whole, **found}

    def signature(self, table):
        return f"geneval|score:{geneval.SCORE}|counting:{geneval.COUNTING_SCORE}|most:{geneval.MOST}|v:{self.version}"


@dataclass(frozen=True)
class Prompts:
    """How many prompts are longer than the model's text encoder reads; what is behind the limit is lost."""

    name = "prompts"
    version = 1
    unit = "pictures"
    better = "none"

    def measure(self, media, ctx):
        return {}  # the suite's columns are enough

    def reduce(self, table):
        told = [v for v in table.column("truncated") if v is not None]
        if len(told) < len(table) or not told:
            note = "the model does not count tokens" if len(table) == table.expected else ""
            return {"truncated": Estimate(None, n=len(table), note=note)}
        return {"truncated": Estimate(float(sum(told)), method="count", n=len(table))}

    def signature(self, table):
        return f"prompts|truncated|v:{self.version}"
