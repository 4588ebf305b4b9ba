"""From names to a plan: what is to be measured, and what identifies it. Nothing is opened yet."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench import registry
from bench.capabilities import PictureSet
from bench.config import Arguments, bind, data_fields, markers
from bench.identity import digest, fingerprint
from bench.models import open_model, parse_model, require
from bench.store import Store
from bench.suite import Suite
from bench.text import mask
from bench.types import Error, Json, Model, Unit, UsageError, Weights
from bench.worker import GENERATED


@dataclass(frozen=True)
class Plan:
    """One suite on one model, every name resolved and every fingerprint taken; nothing opened yet."""

    suite: Suite
    suite_ref: str  # how a worker finds the suite: name or path.py:Name
    model: Any  # name or path.py:Name, or a live object
    arguments: Arguments
    label: str  # what the model is called on boards
    manifest: Any  # of the first field of type Data
    others: Mapping[str, Any]  # those of further fields
    units: tuple[Unit, ...]
    spec: Mapping[str, Json]
    meta: Mapping[str, Json]


def prepare(
    suite: Suite,
    model: Any,
    arguments: Arguments | None = None,
    *,
    store: Store,
    identity: Mapping[str, Json] | None = None,
    suite_ref: str = "",
    seed: int = 0,
    limit: int | None = None,
    strict: bool = False,
) -> Plan:
    """Resolves names, takes fingerprints, lists units. Loads neither torch nor the model, but for the names of a
    PictureSet.

    Raises Error for a missing capability, manifest or weights file.
    """
    named = isinstance(model, str)
    if named:
        factory = registry.find("adapters", model)
        arguments = arguments or bind(factory, model, {}, {})
        if inspect.isclass(factory):
            require(suite, factory, model)
    elif identity is None:
        raise Error("a live model has no file to fingerprint", hint='pass identity={"step": …, "sha": …}')
    else:
        require(suite, model, type(model).__name__)
    arguments = arguments or Arguments()
    made = ()
    if PictureSet in suite.requires:
        opened = open_model(model, arguments.what, arguments.how, "cpu") if named else model
        made = (_first_by_hash(opened.names(), limit),)
    manifests: dict[str, Any] = {}
    with store.digests() as digests:
        if strict:
            digests.entries.clear()
        for name in data_fields(type(suite)):
            from bench.manifest import load

            manifests[name] = load(getattr(suite, name), digests=digests)
            if limit is not None:
                manifests[name] = manifests[name].subset(limit)
        model_args = {k: _identified(v, k in arguments.weights, digests) for k, v in arguments.what.items()}
        suite_fields = _suite_fields(suite, manifests, digests)
    manifest, others = next(iter(manifests.values()), None), dict(list(manifests.items())[1:])
    _check_prefixes(manifest, (*others, GENERATED) if made else tuple(others))
    units = tuple(suite.units(manifest, *others.values(), *made))
    if manifest is None and not made and limit is not None:
        units = _first(units, limit)
    _check_units(units, suite.name)
    label = model_label(model, arguments) if named else str(identity.get("name", type(model).__name__))
    spec: dict[str, Json] = {
        "suite": suite.name,
        "suite_version": suite.version,
        "fields": suite_fields,
        "data": None if manifest is None else manifest.digest,
        "adapter": registry.identity(model) if named else "live",
        "adapter_args": model_args if named else dict(identity),
        "seed": seed,
        "limit": limit,
    }
    return Plan(
        suite,
        suite_ref or suite.name,
        model,
        arguments,
        label,
        manifest,
        others,
        units,
        spec,
        _meta(suite, label, list(manifests.values()), units),
    )


def model_label(model: str, arguments: Arguments) -> str:
    """What a model is called: the weights' own name, else the adapter's, with the arguments that were given.

    It becomes part of folders, tables and pages: secrets are masked.
    """
    parts = []
    for name, value in arguments.what.items():
        if name in arguments.weights and value:
            text = str(value)
            if text.startswith("hf:"):
                text = text.partition("@")[0]
            parts.insert(0, Path(text.rstrip("/")).name.removesuffix(".safetensors"))
        elif arguments.origins.get(name) and arguments.origins[name].origin != "default":
            parts.append(str(value))
    if not any(n in arguments.weights and value for n, value in arguments.what.items()):
        parts.insert(0, model.partition(":")[2] if registry.is_path(model) else model)
    return "-".join(map(mask, parts))


def _identified(value: Any, is_weights: bool, digests: Any) -> Json:
    if is_weights and value is not None:
        from bench.weights import resolve

        return fingerprint(resolve(str(value)), digests)
    if isinstance(value, str) and mask(value) != value:  # an address with a key in it: told from others by its digest
        return [mask(value), digest(value)[:16]]
    return value


def _first_by_hash(names: Sequence[str], limit: int | None) -> list[str]:
    """The names of a PictureSet; with a limit those that come first by their hashes, as `Manifest.subset` chooses."""
    names = list(names)
    if limit is None or limit >= len(names):
        return names
    if limit < 1:
        raise UsageError(f"limit is {limit}; it must be 1 or more")
    chosen = set(sorted(names, key=lambda name: digest(["subset", name]))[:limit])
    return [name for name in names if name in chosen]


def _first(units: Sequence[Unit], limit: int) -> tuple[Unit, ...]:
    """The first units that hold `limit` items together, at least one: the limit where there is no manifest."""
    if limit < 1:
        raise UsageError(f"limit is {limit}; it must be 1 or more")
    counts = itertools.accumulate((len(u.items) for u in units), initial=0)
    return tuple(u for u, before in zip(units, counts, strict=False) if before < limit)


def _check_prefixes(manifest: Any, prefixes: Sequence[str]) -> None:
    """Raises Error for an item that reads as one of another source."""
    for id in manifest.ids() if manifest is not None and prefixes else ():
        source, colon, _ = id.partition(":")
        if colon and source in prefixes:
            raise Error(f"data {manifest.name}: item {id!r} reads as one of {source}", hint="rename it")


def _check_units(units: Sequence[Unit], name: str) -> None:
    if not units:
        raise Error(f"suite `{name}` has no units for this data", hint="is the manifest empty, or the limit 0?")
    seen: set[str] = set()
    for unit in units:
        if unit.id in seen:
            raise Error(f"suite `{name}` has two units {unit.id!r}", hint="unit ids must differ")
        seen.add(unit.id)


def _suite_fields(suite: Suite, manifests: Mapping[str, Any], digests: Any) -> dict[str, Json]:
    """The suite's parameters as they enter the specification: files and models by fingerprint, data by digest."""
    cls = type(suite)
    files = {*markers(cls, Weights), *markers(cls, Path)}
    found: dict[str, Json] = {}
    for f in fields(suite):
        value = getattr(suite, f.name)
        if f.name in manifests:
            manifest, first = manifests[f.name], next(iter(manifests))
            found[f.name] = manifest.name if f.name == first else [manifest.name, manifest.digest]
        elif f.name in files and value:
            found[f.name] = _identified(str(value), True, digests)
        elif f.name in markers(cls, Model) and value:
            name, given = parse_model(str(value))
            bound = bind(registry.find("adapters", name), name, {}, given)
            found[f.name] = [name, {k: _identified(v, k in bound.weights, digests) for k, v in bound.what.items()}]
        else:
            found[f.name] = list(value) if isinstance(value, tuple) else value
    return found


def _meta(suite: Suite, label: str, manifests: Sequence[Any], units: Sequence[Unit]) -> dict[str, Json]:
    return {
        "model": label,
        "suite_ref": suite.name,
        "suite_fields": {
            f.name: list(v)
            if isinstance(v := getattr(suite, f.name), tuple)
            else (v if not isinstance(v, Path) else str(v))
            for f in fields(suite)
        },
        "units": len(units),
        "items": sum(len(u.items) for u in units),
        "items_digest": set_digest(i for u in units for i in u.items),
        "sensitive": suite.sensitive or any(bool(m.sensitive) for m in manifests),
        "redistribute": all(bool(m.redistribute) for m in manifests),
        "manifests": [
            {
                "name": manifest.name,
                "digest": manifest.digest,
                "license": manifest.license,
                "redistribute": manifest.redistribute,
                "sensitive": manifest.sensitive,
                "items": len(manifest.ids()),
                "clusters": manifest.num_clusters(),
            }
            for manifest in manifests
        ],
    }


def set_digest(ids: Iterable[str]) -> str:
    """Of a set of items in any order, repeats counted."""
    from bench.metrics.moments import digest_of

    return f"{digest_of(ids):032x}"
