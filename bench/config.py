"""Configuration with origins: default < plan file < flag for what is measured; `BENCH_*` in between for how."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.replies import MODES
from bench.text import brief, closest, read_toml
from bench.types import Data, Error, Model, UsageError, Weights

SECRET_WORD = re.compile(r"(^|_)(api_?key|key|token|secret|password)$", re.IGNORECASE)


@dataclass(frozen=True)
class Value:
    """A value and where it came from: "default", "plan.toml", "flag", "BENCH_BATCH"."""

    value: Any
    origin: str


@dataclass(frozen=True)
class How:
    """How the work is done. Nothing here changes a result, and nothing here is part of an identity."""

    store: str = ".bench"  # folder of runs and blobs
    engine: str = "local"  # where workers live: processes of this machine, or actors of a Ray cluster
    ray: str = ""  # address of the cluster; "": RAY_ADDRESS, else one on this machine, else one that ends with the run
    devices: str = "auto"  # "cpu", "cuda:0,cuda:1", "cpu,cpu" or "cpu*2": one worker each
    batch: int = 16  # items at a time; halved when memory runs out
    keep: str = "auto"  # media kept: none, sample (64 items by hash), all; auto: all below 2,000 items, else sample
    threads: int = 1  # of each worker; more suit a large model on a CPU, and may change the last digits
    strict: bool = False  # deterministic algorithms only; rehash weights
    isolate: bool = False  # the worker in a process of its own, also for our own adapters
    unit_timeout: float = 0.0  # seconds; 0: ten times the median, at least ten minutes (workers in processes)
    replies: str = "record"  # of models that talk: record, replay, replay-strict, refresh, off (bench/replies.py)
    max_failures: float = 0.05  # share of units, and at least three, after which the run stops


def resolve_how(plan: Mapping[str, Any], flags: Mapping[str, Any], where: str = "plan") -> tuple[How, dict[str, Value]]:
    """`How` from default < BENCH_* < plan < flag, with the origin of each value."""
    hints = typing.get_type_hints(How)
    check_names("how", plan, hints, where)
    origins: dict[str, Value] = {}
    for f in dataclasses.fields(How):
        value, origin = f.default, "default"
        env = f"BENCH_{f.name.upper()}"
        if env in os.environ:
            value, origin = convert(os.environ[env], hints[f.name], env), env
        if f.name in plan:
            value, origin = convert(plan[f.name], hints[f.name], f"{where}: how.{f.name}"), where
        if flags.get(f.name) is not None:
            value, origin = convert(flags[f.name], hints[f.name], f"--{f.name.replace('_', '-')}"), "flag"
        origins[f.name] = Value(value, origin)
    how = How(**{name: v.value for name, v in origins.items()})
    _validate(how, origins)
    return how, origins


def _validate(how: How, origins: Mapping[str, Value]) -> None:
    def refuse(name: str, must: str) -> None:
        v = origins[name]
        raise UsageError(f"{name} is {brief(repr(v.value))} ({v.origin}); it must be {must}")

    if how.engine not in ("local", "ray"):
        refuse("engine", "local or ray")
    if how.batch < 1:
        refuse("batch", "at least 1")
    if how.keep not in ("auto", "none", "sample", "all"):
        refuse("keep", "none, sample, all or auto")
    if how.threads < 1:
        refuse("threads", "at least 1")
    if how.unit_timeout < 0:
        refuse("unit_timeout", "0 or more seconds")
    if how.replies not in MODES:
        refuse("replies", f"one of {', '.join(MODES)}")
    if not 0 <= how.max_failures <= 1:
        refuse("max_failures", "a share between 0 and 1")


# -- the fields of a suite or recipe


def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of the parameters of a suite or recipe."""
    hints = _hints(cls)
    return {f.name: hints.get(f.name, str) for f in dataclasses.fields(cls)}


def build(
    cls: type, plan: Mapping[str, Any], flags: Mapping[str, str], where: str = "plan"
) -> tuple[Any, dict[str, Value]]:
    """An instance of a suite or recipe from default < plan < flag, with the origin of each value.

    Raises UsageError for an unknown field, with a suggestion, and for a value of the wrong type.
    """
    if not dataclasses.is_dataclass(cls):
        raise Error(f"{cls.__name__} is not a dataclass", hint="decorate it with @dataclass(frozen=True)")
    hints = field_types(cls)
    name = getattr(cls, "name", cls.__name__)
    check_names(f"{name}", plan, hints, where)
    check_names(f"{name}", flags, hints, "-p")
    origins: dict[str, Value] = {}
    for f in dataclasses.fields(cls):
        if f.name in flags:
            origins[f.name] = Value(convert(flags[f.name], hints[f.name], f"-p {f.name}"), "flag")
        elif f.name in plan:
            origins[f.name] = Value(convert(plan[f.name], hints[f.name], f"{where}: {f.name}"), where)
        elif f.default is not dataclasses.MISSING:
            origins[f.name] = Value(_default(f.default, hints[f.name]), "default")
        elif f.default_factory is not dataclasses.MISSING:
            origins[f.name] = Value(f.default_factory(), "default")
        else:
            raise _lacking(name, f.name, "-p", where)
    try:
        return cls(**{k: v.value for k, v in origins.items()}), origins
    except (ValueError, TypeError) as e:  # a suite's own __post_init__
        of_plan = f"{where}: " if plan else ""
        if isinstance(e, Error):
            raise type(e)(f"{of_plan}{e}", hint=e.hint) from None
        raise UsageError(f"{of_plan}{name}: {e}") from None


# -- the arguments of an adapter's factory


@dataclass(frozen=True)
class Arguments:
    """A factory's arguments: those before `*` decide what comes out, those after decide how fast."""

    what: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()  # names of `what` that are weights
    origins: dict[str, Value] = field(default_factory=dict)
    takes_device: bool = False


def _lacking(what: str, name: str, flag: str, where: str) -> UsageError:
    if where == "plan":  # there is none
        return UsageError(f"{what} needs {name}", hint=f"{flag} {name}=…")
    return UsageError(f"{where}: {what} needs {name}", hint=f"{name} = … there, or {flag} {name}=…")


def bind(
    factory: Callable, name: str, plan: Mapping[str, Any], flags: Mapping[str, str], where: str = "plan"
) -> Arguments:
    """The arguments of an adapter's factory from default < plan < flag."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        raise Error(f"adapter {name!r} has no readable signature", hint="write it as a class or a function") from None
    hints = _hints(factory.__init__ if inspect.isclass(factory) else factory)
    known = [p for p, v in parameters.items() if v.kind in (v.POSITIONAL_OR_KEYWORD, v.KEYWORD_ONLY)]
    check_names(f"adapter {name}", plan, known, where)
    check_names(f"adapter {name}", flags, known, "-m")
    what: dict[str, Any] = {}
    how: dict[str, Any] = {}
    origins: dict[str, Value] = {}
    weights = set()
    for p in known:
        parameter = parameters[p]
        kind = hints.get(p, str if parameter.default in (parameter.empty, None) else type(parameter.default))
        if parameter.kind is not parameter.KEYWORD_ONLY and SECRET_WORD.search(p):
            raise Error(
                f"adapter {name!r} takes {p} before `*`: it would be written into every run's identity",
                hint=f"move {p} behind `*`, or read it from the environment",
            )
        if p in flags:
            value, origin = convert(flags[p], kind, f"-m {p}"), "flag"
        elif p in plan:
            value, origin = convert(plan[p], kind, f"{where}: {p}"), where
        elif parameter.default is not parameter.empty:
            value, origin = _default(parameter.default, kind), "default"
        else:
            raise _lacking(f"adapter {name!r}", p, "-m", where)
        if parameter.kind is parameter.KEYWORD_ONLY:
            if origin != "default":
                how[p] = value
        else:
            what[p] = value
            if _is(kind, Weights) or _is(kind, Path):
                weights.add(p)
        origins[p] = Value(value, origin)
    return Arguments(what, how, frozenset(weights), origins, "device" in known)


def file_arguments(factory: Callable) -> frozenset[str]:
    """The arguments of an adapter's factory that are weights or other files."""
    hints = _hints(factory.__init__ if inspect.isclass(factory) else factory)
    return frozenset(name for name, kind in hints.items() if _is(kind, Weights) or _is(kind, Path))


# -- text to values


def convert(value: Any, kind: Any, where: str) -> Any:
    """A flag's text or a plan's value as the annotated type; UsageError names `where` and what is allowed."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value in ("none", "None", "") and type(None) in args):
            return None
        return convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        for a in args:
            if value == a or str(value) == str(a):
                return a
        raise UsageError(f"{where}: {brief(repr(value))} is not one of {', '.join(map(str, args))}")
    if origin in (tuple, list):
        parts = [p for p in value.split(",") if p] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise UsageError(f"{where}: {brief(repr(value))} is not a list")
        return tuple(convert(p, args[0] if args else str, where) for p in parts)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "on"):
            return True
        if str(value).lower() in ("false", "no", "0", "off"):
            return False
        raise UsageError(f"{where}: {brief(repr(value))} is not true or false")
    if kind in (int, float):
        if isinstance(value, bool):
            raise UsageError(f"{where}: {brief(repr(value))} is not a number")
        wanted = "a whole number" if kind is int else "a finite number"
        try:
            number = kind(value)
            if not math.isfinite(number) or (isinstance(value, float) and value != number):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"{where}: {brief(repr(value))} is not {wanted}") from None
        return number
    if isinstance(kind, type) and issubclass(kind, (str, Path)):
        if not isinstance(value, (str, Path)):
            raise UsageError(f"{where}: {brief(repr(value))} is not text")
        return kind(value)
    return value


def _default(value: Any, kind: Any) -> Any:
    """A default as what a flag of the same value would be: `scale: float = 1` is 1.0, in every identity."""
    return float(value) if kind is float and type(value) is int else value


def assignments(pairs: typing.Iterable[str], flag: str) -> dict[str, str]:
    """`-m weights=a.pt -m quality=50` as a mapping; raises for a pair without `=` and for a name given twice."""
    found: dict[str, str] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} {pair!r} is not name=value")
        if name in found:
            raise UsageError(f"{flag} {name} is given twice")
        found[name] = value
    return found


def check_names(owner: str, given: typing.Iterable[str], known: typing.Iterable[str], where: str) -> None:
    """Raises UsageError for the first name that is not known, with a suggestion."""
    known = list(known)
    for name in given:
        if name not in known:
            raise UsageError(
                f"{where}: {owner} has no parameter {brief(name)!r}",
                hint=closest(name, known) or f"it has {', '.join(known) or 'none'}",
            )


def markers(cls: type, marker: type) -> list[str]:
    """The fields of a suite or recipe whose type is a marker: Weights, Data, Model, Path."""
    return [name for name, kind in field_types(cls).items() if _is(kind, marker)]


def data_fields(cls: type) -> list[str]:
    """The fields that name manifests: those of type Data, or a text field called `data`."""
    return markers(cls, Data) or [name for name in field_types(cls) if name == "data"]


def data_field(cls: type) -> str | None:
    """The first of them."""
    return next(iter(data_fields(cls)), None)


def _is(kind: Any, marker: type) -> bool:
    kinds = typing.get_args(kind) or (kind,)
    return any(isinstance(k, type) and issubclass(k, marker) for k in kinds)


def _hints(obj: Any) -> dict[str, Any]:
    """Resolved annotations. Where a name cannot be resolved (a type checked import), the markers still are."""
    try:
        return typing.get_type_hints(obj)
    except Exception:  # annotations are foreign code, too
        basic = {"int": int, "float": float, "bool": bool, "str": str, "Weights": Weights, "Data": Data, "Model": Model}
        raw: dict[str, Any] = {}
        for base in reversed(getattr(obj, "__mro__", (obj,))):
            raw.update(getattr(base, "__annotations__", {}))
        return {k: basic.get(v, str) if isinstance(v, str) else v for k, v in raw.items()}


def read_plan(path: Path) -> dict[str, Any]:
    """A plan file; raises Error naming file and fault."""
    plan = read_toml(path, hint="a plan is TOML: [[run]], [[train]], [[board]], [how]")
    steps = {
        "run": {"suite", "model", "model_args", "params", "seeds", "limit"},
        "train": {"recipe", "model", "model_args", "params", "seeds", "out"},
        "board": {"name"},
    }
    for key, value in plan.items():
        if key not in {*steps, "how"}:
            raise Error(f"{path}: unknown key {brief(key)!r}", hint=closest(key, [*steps, "how"]))
        if key == "how":
            if not isinstance(value, dict):
                raise Error(f"{path}: how must be a table")
            continue
        if not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
            raise Error(f"{path}: {key} must be a list of tables", hint=f"write [[{key}]]")
        for i, step in enumerate(value, 1):
            for name in step:
                if name not in steps[key]:
                    raise Error(
                        f"{path}: {key} {i}: unknown key {brief(name)!r}", hint=closest(name, sorted(steps[key]))
                    )
            for name, needed in (
                ("suite", str),
                ("model", str),
                ("recipe", str),
                ("out", str),
                ("params", dict),
                ("model_args", dict),
                ("seeds", list),
                ("limit", int),
                ("name", str),
            ):
                if name in step and (not isinstance(step[name], needed) or isinstance(step[name], bool)):
                    must = {str: "text", dict: "a table", list: "a list", int: "a whole number"}[needed]
                    raise Error(f"{path}: {key} {i}: {name} has the wrong type", hint=f"it must be {must}")
            for name, value in (("seeds", step.get("seeds")), *step.get("params", {}).items()):
                if value == []:
                    raise Error(f"{path}: {key} {i}: {brief(name)} is an empty list", hint="nothing would be done")
            for name in {"run": ("suite", "model"), "train": ("recipe", "out"), "board": ("name",)}[key]:
                if name not in step:
                    raise Error(f"{path}: {key} {i} needs {name}", hint=f"add {name} = …")
    if not any(plan.get(key) for key in steps):
        raise Error(f"{path} names nothing to do", hint="a plan has [[run]], [[train]] or [[board]]")
    return plan
