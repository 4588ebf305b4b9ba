"""Where names meet objects: entry points of installed packages, and `path.py:name` for a file at hand."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.functions import draws, model_of
from bench.identity import file_digest
from bench.recipe import Recipe
from bench.suite import Suite
from bench.text import brief, say
from bench.types import Error, UsageError

KINDS = ("suites", "recipes", "adapters", "fits")
OWN = "touchstone-bench"


@dataclass(frozen=True)
class Entry:
    """A name somebody registered."""

    kind: str
    name: str
    value: str  # module:object
    owner: str  # distribution
    builtin: bool


@cache
def entries(kind: str) -> tuple[Entry, ...]:
    """Everything registered under `bench.<kind>`, by name; a name with two owners stays twice."""
    found = {
        Entry(kind, e.name, e.value, owner, owner == OWN)
        for e in metadata.entry_points(group=f"bench.{kind}")
        for owner in [e.dist.name if e.dist else "?"]
    }
    return tuple(sorted(found, key=lambda e: (e.name, e.owner)))


def find(kind: str, name: str) -> Any:
    """The object of a name. `path.py:name` runs that file and says so on stderr; a function of prompts and seeds in it
    is an adapter without a class.

    Raises UsageError for an unknown name, with a suggestion; Error for a plugin that cannot be imported and for a
    name with two owners.
    """
    if is_path(name):
        found = _checked(kind, name, _from_file(name))
        return model_of(found) if kind == "adapters" and draws(found) else found
    matching = [e for e in entries(kind) if e.name == name]
    if len(matching) > 1:
        raise Error(
            f"{kind[:-1]} {name!r} is registered by {' and by '.join(e.owner for e in matching)}",
            hint="uninstall one of them, or name the object in place: path.py:name",
        )
    if not matching:
        from bench.text import closest

        names = sorted({e.name for e in entries(kind)})
        raise UsageError(
            f"unknown {kind[:-1]} {brief(name)!r}",
            hint=closest(name, names) or (f"known: {', '.join(names)}" if names else "none is installed"),
        )
    return load(matching[0])


def load(entry: Entry) -> Any:
    """Imports what an entry names; raises Error with the reason when that fails."""
    module, _, attribute = entry.value.partition(":")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as e:  # a plugin's own fault, whatever it is, must not look like ours
        raise Error(
            f"{entry.kind[:-1]} {entry.name!r} is broken: {module}: {type(e).__name__}: {e}",
            hint=f"mend or reinstall {entry.owner}",
        ) from e
    return _checked(entry.kind, entry.name, found)


def _checked(kind: str, name: str, found: Any) -> Any:
    """What was found, if it is what its kind asks for."""
    base = {"suites": Suite, "recipes": Recipe}.get(kind)
    if base and not (isinstance(found, type) and issubclass(found, base)):
        wrong, hint = f"not a class derived from bench.{base.__name__}", "name the class itself"
    elif not callable(found):
        wrong, hint = "not callable", "name a class or a function"
    else:
        return found
    raise Error(f"{kind[:-1]} {name!r} is broken: it is {wrong}", hint=hint)


def identity(name: str) -> str:
    """An adapter's name as a specification holds it. A file at hand is the model: its SHA-256 goes with it."""
    if not is_path(name):
        return name
    path, _, attribute = name.partition(":")
    return f"{Path(path).name}:{attribute}@{file_digest(Path(os.path.expanduser(path)))[:16]}"


def is_path(name: str) -> bool:
    """Does a name point into a file (`my_suite.py:MySuite`)?"""
    return name.partition(":")[0].endswith(".py")


def _from_file(name: str) -> Any:
    text, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"{brief(name)!r} names a file but no object", hint=f"write {brief(text)}:Name")
    try:
        path = Path(os.path.expanduser(text)).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, of a user who is none
        there = False
    if not there:
        raise UsageError(f"{brief(text)} does not exist")
    module = _module(path)
    if not hasattr(module, attribute):
        from bench.text import closest

        public = [n for n, v in vars(module).items() if not n.startswith("_") and callable(v)]
        raise UsageError(f"{text} has no {attribute!r}", hint=closest(attribute, public))
    return getattr(module, attribute)


@cache
def _module(path: Path) -> Any:
    name = f"_bench_{path.stem}_{file_digest(path)[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    say(f"running {path} (sha256 {file_digest(path)[:12]})")
    sys.path.insert(0, str(path.parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout carries data only
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # the user's own file: say what it raised, keep the trace for them
        del sys.modules[name]
        raise Error(
            f"{path} cannot be run: {type(e).__name__}: {e}", hint="python " + str(path) + " shows the trace"
        ) from e
    finally:
        sys.path.remove(str(path.parent))
    return module


def describe(kind: str) -> Iterator[tuple[Entry, Any, str]]:
    """(entry, object or None, what is wrong) for everything registered; for `bench list`.

    Foreign adapters are not imported: they may load anything.
    """
    seen: dict[str, int] = {}
    for entry in entries(kind):
        seen[entry.name] = seen.get(entry.name, 0) + 1
    for entry in entries(kind):
        if seen[entry.name] > 1:
            yield entry, None, "registered by more than one package"
        elif kind == "adapters" and not entry.builtin:
            yield entry, None, ""
        else:
            try:
                yield entry, load(entry), ""
            except Error as e:
                yield entry, None, str(e).partition("is broken: ")[2] or str(e)


def check_names() -> None:
    """Raises Error when another package named `suites` hides ours."""
    spec = importlib.util.find_spec("suites")
    ours = Path(__file__).resolve().parents[1] / "suites"
    where = [Path(p).resolve() for p in (spec.submodule_search_locations or ())] if spec else []
    if ours not in where:
        found = where[0] if where else spec.origin if spec else "missing"
        raise Error(
            f"the package `suites` found first is {found}, not {ours}",
            hint="run from another folder, or take that one off PYTHONPATH",
        )


def package_files(obj: Any) -> list[Path]:
    """The Python files that a suite or recipe is made of: its module, and those beside it when it lies in a package."""
    module = sys.modules[obj.__module__]
    path = Path(module.__file__ or "")
    if module.__package__ and module.__package__ != "suites":
        return sorted(path.parent.glob("*.py"))
    return [path]
