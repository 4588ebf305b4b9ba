"""The command line: verbs, their help, how an error looks, and what an exit code means.

0 complete; 1 could not start, refused, or stopped; 2 usage; 3 finished, but incomplete; 129, 130, 143 after SIGHUP,
SIGINT, SIGTERM; 0 when a reader closes the pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from bench.types import Error, UsageError

VERBS: dict[str, tuple[str, str]] = {
    "score": (
        "score a checkpoint on a suite, several suites, or a plan file; the same command again continues",
        "bench score reconstruction --model codec -m format=jpeg -m quality=50",
    ),
    "leaderboard": ("render a board: tables, figures, one HTML page", "bench leaderboard reconstruction"),
    "fit": ("fit power laws to a run or a CSV", "bench fit runs.csv"),
    "train": (
        "run a recipe: makes a checkpoint, resumes after a kill",
        "bench train mini-ae -p width=16 --out ckpt/ae",
    ),
    "list": ("what is installed: suites, recipes, adapters, manifests; and the runs in the store", "bench list"),
    "data": ("lock, fetch and verify manifests and weights", "bench data verify photographs"),
    "check": ("test an adapter's conformance; with a suite, try two items; records nothing", "bench check --model toy"),
    "rescore": ("measure what is new over kept media, and reduce again", "bench rescore reconstruction-codec-jpeg-50"),
    "show": ("a run: scores, failures, one unit with its trace and media", "bench show reconstruction-codec-jpeg-50"),
    "compare": ("two runs on the items they share: paired differences", "bench compare codec-jpeg-50 codec-webp-50"),
    "demo": ("the embedded models on the embedded data, ending in an HTML report", "bench demo"),
}


class Ended(BaseException):
    """A signal asked us to end; carries the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Parser(argparse.ArgumentParser):
    """argparse whose errors look like ours: one line, and a suggestion."""

    def error(self, message: str) -> NoReturn:
        hint = f"{self.prog} --help"
        if "invalid choice: " in message:
            from bench.text import closest

            given = message.partition("invalid choice: ")[2].split(" ")[0].strip("'")
            hint = closest(given, VERBS if self.prog == "bench" else self.choices()) or hint
            message = f"unknown {'command' if self.prog == 'bench' else 'choice'} {given!r}"
        elif "unrecognized arguments: " in message:
            from bench.text import closest

            given = message.partition("unrecognized arguments: ")[2].split()[0].partition("=")[0]
            hint = closest(given, [o for a in self._actions for o in a.option_strings]) or hint
        raise UsageError(message, hint=hint)

    def choices(self) -> list[str]:
        return [str(c) for a in self._actions if a.choices for c in a.choices]

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        found, rest = self.parse_known_args(*args, **kwargs)
        if rest:
            parser = self
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction) and getattr(found, "verb", None):
                    parser = action.choices[found.verb]
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return found


def parser(argv: Sequence[str] = ()) -> Parser:
    """The whole command line; of `fit` with the options of the law that `argv` names."""
    top = Parser(
        prog="bench",
        description="Scores generative models the way the papers do, and says how sure it is.",
        epilog="bench VERB --help shows a verb's options and an example",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="print the version")
    top.add_argument("--debug", action="store_true", help="show the trace of an error")
    verbs = top.add_subparsers(title="verbs", dest="verb", metavar="VERB")
    for name, (help, example) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _OPTIONS[name](verb)
        if name == "fit" == next((word for word in argv if not word.startswith("-")), None):
            _law(verb, argv)
    return top


def _model(verb: Parser, required: bool = True) -> None:
    verb.add_argument("--model", required=required, metavar="NAME", help="adapter: a name, or path.py:Name")
    verb.add_argument("-m", action="append", metavar="KEY=VALUE", default=[], help="an argument of the adapter")


def _params(verb: Parser, what: str) -> None:
    verb.add_argument("-p", action="append", metavar="KEY=VALUE", default=[], help=f"a parameter of the {what}")


def _store(verb: Parser) -> None:
    verb.add_argument("--store", metavar="FOLDER", help="folder of runs and blobs (default .bench)")


def _json(verb: Parser) -> None:
    verb.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _how(verb: Parser) -> None:
    group = verb.add_argument_group("how the work is done (changes no result)")
    group.add_argument("--store", metavar="FOLDER", help="folder of runs and blobs (default .bench)")
    group.add_argument("--engine", metavar="NAME", help="local (default), or ray: workers on a Ray cluster")
    group.add_argument("--ray", metavar="ADDRESS", help="of the cluster: HOST:PORT, auto, or local for one of its own")
    group.add_argument("--devices", metavar="LIST", help="cpu, cuda:0,cuda:1, cpu*4: a worker each (default every GPU)")
    group.add_argument("--batch", metavar="N", help="items at a time (default 16)")
    group.add_argument("--keep", metavar="WHAT", help="media kept: none, sample, all (default all below 2,000 items)")
    group.add_argument("--threads", metavar="N", help="of each worker")
    group.add_argument("--strict", action="store_const", const=True, help="deterministic algorithms; rehash weights")
    group.add_argument("--isolate", action="store_const", const=True, help="the worker in a process of its own")
    group.add_argument("--unit-timeout", metavar="SECONDS", help="of one unit, for workers in processes")
    group.add_argument("--replies", metavar="MODE", help="of judges: record, replay, replay-strict, refresh, off")
    group.add_argument("--max-failures", metavar="SHARE", help="of units, at which the run stops (default 0.05)")


def _score(verb: Parser) -> None:
    verb.add_argument(
        "what", nargs="+", metavar="SUITE | PLAN.toml", help="suites by name or path.py:Name, or one plan"
    )
    _model(verb, required=False)
    _params(verb, "suite")
    verb.add_argument("--seed", type=int, metavar="N", help="root of every random stream (default 0)")
    verb.add_argument("--limit", type=int, metavar="N", help="score N items only; such a run never appears on a board")
    verb.add_argument("--shard", default="", metavar="K/N", help="this part of the units only: 0/16 to 15/16")
    verb.add_argument("--fresh", action="store_true", help="move an earlier run aside and begin again")
    verb.add_argument("--explain", action="store_true", help="print every value with its origin, and stop")
    verb.add_argument("--allow-code", action="store_true", help="let a plan from elsewhere name Python files")
    _json(verb)
    _how(verb)


def _leaderboard(verb: Parser) -> None:
    verb.add_argument("board", nargs="?", metavar="BOARD", help="reports/BOARD.toml, or a path")
    verb.add_argument("--out", metavar="FOLDER", help="where to write (default reports/BOARD)")
    _store(verb)
    _json(verb)


def _fit(verb: Parser) -> None:
    verb.add_argument("source", metavar="FILE | RUN", help="a CSV, JSONL or JSON of trainings, or a run of the store")
    verb.add_argument("--out", metavar="FOLDER", help="where the page goes (default reports/fits/NAME)")
    verb.add_argument("--law", metavar="NAME", help="which of the installed laws")
    _store(verb)
    _json(verb)


def _law(verb: Parser, argv: Sequence[str]) -> None:
    """Adds the options of the law that a command names, or of the only one installed."""
    from bench import registry

    names = sorted({e.name for e in registry.entries("fits")})
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--law")
    name = first.parse_known_args(argv)[0].law or ("scaling" if "scaling" in names else names[0] if names else None)
    if name is None:
        raise Error("no law is installed", hint="a package offers one through the entry point group bench.fits")
    law = registry.find("fits", name)()
    law.options(verb)
    verb.set_defaults(fits=law)


def _train(verb: Parser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="a name, or path.py:Name")
    _params(verb, "recipe")
    _model(verb, required=False)
    verb.add_argument("--out", required=True, metavar="FOLDER", help="where the checkpoint goes")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="root of every random stream (default 0)")
    verb.add_argument("--devices", default="auto", metavar="DEVICE", help="cpu or cuda:0")


def _list(verb: Parser) -> None:
    kinds = ["suites", "recipes", "adapters", "manifests", "runs"]
    verb.add_argument("kind", nargs="?", choices=kinds, metavar="KIND", help=", ".join(kinds))
    _store(verb)
    _json(verb)


def _data(verb: Parser) -> None:
    verb.add_argument("action", choices=["lock", "fetch", "verify"], metavar="ACTION", help="lock, fetch or verify")
    verb.add_argument("names", nargs="+", metavar="NAME", help="manifests, weights/<name>, or hf:owner/name@commit")


def _check(verb: Parser) -> None:
    verb.add_argument("suite", nargs="?", metavar="SUITE", help="also try this suite on two items")
    _model(verb)
    _params(verb, "suite")
    verb.add_argument("--size", type=int, default=64, metavar="PX", help="side of the pictures tried (default 64)")
    verb.add_argument("--devices", default="auto", metavar="DEVICE", help="cpu or cuda:0")
    _json(verb)


def _rescore(verb: Parser) -> None:
    verb.add_argument("runs", nargs="+", metavar="RUN", help="ids, or unambiguous parts of them")
    verb.add_argument(
        "--metric", metavar="MODULE:NAME", help="measure this too, e.g. bench.metrics:SSIM?flavour=uniform7"
    )
    _store(verb)
    _json(verb)


def _show(verb: Parser) -> None:
    verb.add_argument("run", metavar="RUN", help="an id, or an unambiguous part of it")
    verb.add_argument("--unit", metavar="ID", help="one unit: rows, trace, media")
    verb.add_argument("--slices", action="store_true", help="scores of every slice, too")
    verb.add_argument("--figures", metavar="FOLDER", help="draw the suite's figures of this run there")
    _store(verb)
    _json(verb)


def _compare(verb: Parser) -> None:
    verb.add_argument("a", metavar="RUN")
    verb.add_argument("b", metavar="RUN")
    _store(verb)
    _json(verb)


def _demo(verb: Parser) -> None:
    verb.add_argument("--out", metavar="FOLDER", help="where the report goes (default reports)")
    _store(verb)


_OPTIONS = {
    "score": _score,
    "leaderboard": _leaderboard,
    "fit": _fit,
    "train": _train,
    "list": _list,
    "data": _data,
    "check": _check,
    "rescore": _rescore,
    "show": _show,
    "compare": _compare,
    "demo": _demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    debug = "--debug" in (argv if argv is not None else sys.argv)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays in force
            signal.signal(number, _ending(code))
    _open_streams()
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except Error as e:
        if debug:
            raise
        _complain(e)
        return e.exit_code
    except KeyboardInterrupt:
        return _ended(130)
    except Ended as e:
        return _ended(e.code)
    except BrokenPipeError:
        _drop_stdout()
        return 0
    except OSError as e:
        if debug:
            raise
        where = f"{e.filename}: " if e.filename else "" if e.errno == errno.ENOENT else "cannot write: "
        _drop_stdout()
        _complain(Error(f"{where}{e.strerror or e}", hint="what was recorded before is still there"))
        return 1


def _run(argv: Sequence[str] | None) -> int:
    top = parser(sys.argv[1:] if argv is None else argv)
    args = top.parse_args(argv)
    args.typed = list(sys.argv[1:] if argv is None else argv)
    if args.version:
        from importlib.metadata import version

        print(f"touchstone-bench {version('touchstone-bench')}")
        return 0
    if not args.verb:
        top.print_help()
        return 0
    from bench import verbs

    return getattr(verbs, "listing" if args.verb == "list" else args.verb)(args)


def _open_streams() -> None:
    """Gives a closed descriptor 0, 1 or 2 to nobody else, and lets any text out on any terminal."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one; workers', too
    for fd, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(fd, "w", closefd=False)))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _ended(code: int) -> int:
    """The exit code; ends the process at once where a model is still at work in its thread, which cannot be stopped."""
    import threading

    if any(t.name == "ahead" and t.is_alive() for t in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _ending(code: int):
    def handle(signum: int, frame: Any) -> NoReturn:
        raise Ended(code)

    return handle


def _complain(error: Error) -> None:
    from bench.text import mask, plain

    with contextlib.suppress(OSError):
        print(f"error: {plain(mask(str(error)))}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {plain(mask(error.hint))}", file=sys.stderr)


def _drop_stdout() -> None:
    """Lets the interpreter's own flush at exit succeed."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    sys.exit(main())
