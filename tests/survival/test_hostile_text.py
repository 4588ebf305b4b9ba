"""Manifests, plans, boards and tables that others wrote: accepted, and then the same when written and read again, or
refused in words that name the file and the place; never anything else, and quickly."""

import argparse
import itertools
import random
import re
import time
from dataclasses import fields, is_dataclass

import pytest
from corpus import byte_mutant, limited, toml_file, tree_mutant
from toys import command

from bench import config, manifest, manifest_format, manifest_verbs, registry, steps, verbs
from bench.config import How
from bench.manifest_format import CROPS, EXTRACTOR, FETCH, HEADER, WEIGHTS, WORLD
from bench.report import board as boards
from bench.report import collect
from bench.report.collect import read_scores
from bench.scores import dump_scores
from bench.types import Error, Score

SEED = 4
SECONDS = 0.05  # of the processor, for one file

HEADER_WORDS = [*HEADER, *CROPS, *WORLD, *FETCH, "files", "licence"]
COMMON = {"source": "s", "license": "l", "redistribute": True, "locked": False}
FILE = {"url": "https://example.org/x", "file": "x", "bytes": 9}
MANIFESTS = [
    {"kind": "images", **COMMON, "root": "toy", "sensitive": False, "fetch": [FILE], "prepare": "as it is"},
    {"kind": "images", **COMMON, "root": "toy", "fetch": [{**FILE, "unpack": {"files": 1, "bytes": 1}}]},
    {"kind": "package-crops", **COMMON, "crops": {"size": 64, "stride": 64, "limit": 16}, "pinned": ["numpy==2"]},
    {"kind": "prompts", **COMMON, "manual": "write them"},
    {"kind": "world", **COMMON, "world": {"seed": 1, "items": 50, "held_out": "any"}},
]
ITEMS = (
    b'id,path,label,width,height,text\na,a.png,3,200,100,one cat\nb,sub/b.png,,999999999,999999999,"two, ""cats"""\n'
)
WEIGHTS_WORDS = [*WEIGHTS, *EXTRACTOR]
OF_WEIGHTS = {
    "what": "w",
    "source": "s",
    "license": "l",
    "locked": True,
    "url": "https://example.org/x",
    "file": "x.pt",
}
OF_WEIGHTS |= {"sha256": "0" * 64, "bytes": 9, "packaged": ["torch/x.pt"]}
OF_WEIGHTS |= {"extractor": {"network": "timm:x", "size": 224, "dim": 768, "mean": [0.5, 0.5, 0.5]}}
PLAN = {
    "how": {"devices": "cpu", "batch": 2, "keep": "sample", "max_failures": 0.5},
    "run": [
        {
            "suite": "reconstruction",
            "model": "codec",
            "model_args": {"format": ["jpeg", "webp"], "quality": 50},
            "params": {"size": 64, "chunk": [8, 16], "protocol": "embedded"},
            "seeds": [0, 1],
            "limit": 4,
        },
        {"suite": "generation", "model": "toy", "params": {"prompts": 4}, "model_args": {"noise": 0.5}},
    ],
    "train": [{"recipe": "mini-ae", "params": {"width": [8, 16]}, "seeds": [0, 1], "out": "ckpt/ae-{width}-{seed}"}],
    "board": [{"name": "reconstruction"}],
}
PLAN_WORDS = ["how", "run", "train", "board", *[f.name for f in fields(How)], *PLAN["run"][0], *PLAN["train"][0]]
PLAN_WORDS += ["size", "chunk", "data", "protocol", "quality", "format", "name", "seed", "width"]
BOARD = {
    "title": "A board",
    "about": "Of what was measured.",
    "sources": ["store", "board/scores.csv", "published.csv"],
    "select": {"suite": ["reconstruction"], "model": ["*"], "complete": True},
    "column": [
        {"suite": "reconstruction", "metric": "psnr", "label": "PSNR", "digits": 2},
        {"suite": "reconstruction", "metric": "bpp", "slice": "kind=x"},
    ],
    "rank": {"by": "reconstruction:psnr", "ties": "interval"},
    "figure": [
        {"kind": "scatter", "suite": "reconstruction", "title": "t", "x": "bpp", "y": "psnr", "note": "n"},
        {"kind": "tradeoff", "suite": "reconstruction", "title": "t", "y": "psnr", "vary": "quality"},
    ],
    "gallery": {"items": 8},
}
BOARD_WORDS = [*BOARD, *BOARD["select"], *BOARD["column"][0], *BOARD["figure"][0], "by", "ties", "items", "vary"]
SCORES = dump_scores(
    [
        Score("r", "recon", 2, "m", 0, "psnr", "all", 24.5, 24.1, 24.9, "t", 8, 8, True, "dB", "higher", "psnr|v:1"),
        Score("r", "recon", 2, "=m", 0, "bpp", "all", None, None, None, "none", 0, 8, False, "", "none", "", "c", "\n"),
    ]
)  # fmt: skip


def plain(value):
    """Dataclasses as tables without what was left at its default, for writing them as TOML again."""
    if is_dataclass(value):
        kept = {f.name: getattr(value, f.name) for f in fields(value) if getattr(value, f.name) != f.default}
        return {k: plain(v) for k, v in kept.items() if v is not None and k not in ("name", "folder")}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


# -- what is done with each kind of file; every accepted one is used a little, as its verb would


def use_manifest(path, again):
    header = manifest_format.read_header(path)
    again.write_text(toml_file(header), encoding="utf-8")
    assert repr(manifest_format.read_header(again)) == repr(header)  # by their text, as NaN is not itself
    manifest.load(path.stem)


def use_weights(path, again):
    header = manifest_format.read_weights(path)
    again.write_text(toml_file(header), encoding="utf-8")
    assert repr(manifest_format.read_weights(again)) == repr(header)


def use_items(path, again):
    rows = manifest_format.read_rows(path)
    if rows:
        again.write_bytes(manifest_verbs.csv_bytes(rows))
        assert manifest_format.read_rows(again) == rows
    manifest.load(path.name.removesuffix(".items.csv"))


def use_plan(path, again):
    plan = config.read_plan(path)
    again.write_text(toml_file(plan), encoding="utf-8")
    assert repr(config.read_plan(again)) == repr(plan)
    config.resolve_how(plan.get("how", {}), {}, path.name)
    for step in itertools.islice(steps.plan_steps(plan, path.name, argparse.Namespace(seed=None, limit=None)), 8):
        config.build(registry.find("suites", step.suite), step.fields, step.params, step.where)
        config.bind(registry.find("adapters", step.model), step.model, step.plan_args, step.model_args, step.where)
    for step in plan.get("train", ()):
        for one in itertools.islice(verbs._train_steps(step, path.name), 8):
            config.build(registry.find("recipes", one["recipe"]), one["plan"], {}, one["where"])


def use_board(path, again):
    board = boards.read_board(path)
    again.write_text(toml_file(plain(board)), encoding="utf-8")
    assert plain(boards.read_board(again)) == plain(board)
    collect.collect(board, None, path.parent / "out")


def use_scores(path, again):
    scores = read_scores(path, own=True)
    again.write_bytes(dump_scores(scores))
    assert read_scores(again, own=True) == scores


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_manifests/weights").mkdir(parents=True)
    (tmp_path / "published.csv").write_bytes(SCORES)
    (tmp_path / "data_manifests/rows.toml").write_text(toml_file(MANIFESTS[2]))
    (tmp_path / "data_manifests/words.toml").write_text(toml_file(MANIFESTS[0]))
    return tmp_path


def documents(place, rng):
    """(how it is used, its path, its bytes) of one mutant after another; one of three is damaged in its bytes, too."""
    data = place / "data_manifests"
    while True:
        for use, path, good, words in (
            (use_manifest, data / "fuzz.toml", rng.choice(MANIFESTS), HEADER_WORDS),
            (use_plan, place / "plan.toml", PLAN, PLAN_WORDS),
            (use_board, place / "board.toml", BOARD, BOARD_WORDS),
            (use_weights, data / "weights/fuzz.toml", OF_WEIGHTS, WEIGHTS_WORDS),
        ):
            text = toml_file(tree_mutant(good, words, rng)).encode("utf-8", "surrogatepass")
            yield use, path, byte_mutant(text, rng) if rng.random() < 1 / 3 else text
        yield use_items, data / f"{rng.choice(['rows', 'words'])}.items.csv", byte_mutant(ITEMS, rng, 6)
        yield use_scores, place / "scores.csv", byte_mutant(SCORES, rng, 4)


def fate(use, path, again):
    """("accepted" | "refused" | "crashed", what was said, seconds of the processor)."""
    start = time.thread_time()
    try:
        use(path, again)
        return "accepted", "", time.thread_time() - start
    except Error as e:
        return "refused", f"{e}\n{e.hint}", time.thread_time() - start
    except Exception as e:
        return "crashed", f"{type(e).__name__}: {e}"[:300], time.thread_time() - start


def located(said, path, words):
    """Does a refusal name the file, and a line, a byte or a key?"""
    message = said.partition("\n")[0]
    somewhere = r"line \d|:\d+|byte \d|row \d|end of document|no column|names nothing to do|is missing|is a number of"
    somewhere += r"|is a date|unknown (key|field) |no parameter "
    if "cannot be read: No such file" in message:
        return True  # the file that a board names
    return path.name in message and re.search(rf"{somewhere}|\b(?:{'|'.join(words)})\b", message) is not None


GOOD = [
    *((use_manifest, "data_manifests/fuzz.toml", toml_file(tree).encode()) for tree in MANIFESTS),
    (use_weights, "data_manifests/weights/fuzz.toml", toml_file(OF_WEIGHTS).encode()),
    (use_items, "data_manifests/rows.items.csv", ITEMS),
    (use_plan, "plan.toml", toml_file(PLAN).encode()),
    (use_board, "board.toml", toml_file(BOARD).encode()),
    (use_scores, "scores.csv", SCORES),
]
WORDS = sorted({re.escape(w) for w in [*HEADER_WORDS, *WEIGHTS_WORDS, *PLAN_WORDS, *BOARD_WORDS]})


def test_every_mutant_is_accepted_and_round_trips_or_is_refused_in_words(tally, trials, place):
    print("seed", SEED)
    count, again = trials(10_000, 2_000), place / "data_manifests/again.toml"
    bad, fates = [], {}
    for use, path, data in GOOD:
        (place / path).write_bytes(data)
        assert fate(use, place / path, again)[0] == "accepted", path
    for use, path, data in itertools.islice(documents(place, random.Random(SEED)), count):
        path.write_bytes(data)
        kind, said, seconds = fate(use, path, again)
        if seconds > SECONDS:  # the machine may have stumbled: once more
            seconds = fate(use, path, again)[2]
        fates[use.__name__, kind] = fates.get((use.__name__, kind), 0) + 1
        if kind == "crashed" or seconds > SECONDS or len(said) > 2000 or (said and not located(said, path, WORDS)):
            bad.append((use.__name__, kind, round(seconds, 3), said[:300], data[:600]))
    tally("fuzz", count - len(bad), count, tracebacks=sum(kind == "crashed" for _, kind, *_ in bad))
    print(fates)
    assert not bad, (len(bad), bad[:5])
    for use in {name for name, _ in fates}:  # both ways were taken, with each kind of file
        assert min(fates.get((use, "accepted"), 0), fates.get((use, "refused"), 0)) > count / 300, (use, fates)


CROPS_TABLE = {"size": 1, "stride": 1, "limit": 1}
TRAPS = {  # name -> (use, path, bytes, a word of the refusal; "" where it is fine)
    "a picture that is said to be a billion wide": (
        use_items,
        "data_manifests/wide.items.csv",
        b"id,path,width,height\na,numpy/a.png,999999999,999999999\n",
        "",
    ),
    "dotted keys that cost a gigabyte": (use_plan, "plan.toml", b".".join([b"a"] * 20_000) + b" = 1\n", "too deeply"),
    "lists nested to the ground": (use_board, "board.toml", b"x = " + b"[" * 100_000, "too deeply"),
    "more runs than atoms": (
        use_plan,
        "plan.toml",
        toml_file(
            {"run": [{"suite": "generation", "model": "toy", "params": {f"p{i}": [0] * 100 for i in range(40)}}]}
        ).encode(),
        "combinations",
    ),
    "an object of Python in a name": (
        use_plan,
        "plan.toml",
        toml_file({"train": [{"recipe": "mini-ae", "out": "x/{seed.__class__.__mro__}"}]}).encode(),
        "cannot be filled in",
    ),
    "a name wider than the memory": (
        use_plan,
        "plan.toml",
        toml_file({"train": [{"recipe": "mini-ae", "out": "x/{seed:>99999999999}"}]}).encode(),
        "cannot be filled in",
    ),
    "a number of 20,000 bits": (use_board, "board.toml", b"digits = 0x" + b"f" * 5000, "64 bits"),
    "a file from elsewhere": (
        use_board,
        "board.toml",
        toml_file({**BOARD, "sources": ["../../etc/passwd"]}).encode(),
        "lies elsewhere",
    ),
    "a board whose folder would be the one above": (use_board, "...toml", toml_file(BOARD).encode(), "not called"),
    "two megabytes": (use_board, "board.toml", b"#" * 2_000_000, "larger than"),
    "quoted false": (
        use_manifest,
        "data_manifests/fuzz.toml",
        toml_file({**MANIFESTS[0], "redistribute": "false"}).encode(),
        "true or false",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps_that_mutation_would_not_find(place, name):
    """Files that once hung, filled the memory, raised something else, or led elsewhere."""
    use, path, data, word = TRAPS[name]
    (place / "data_manifests/wide.toml").write_text(toml_file({**MANIFESTS[2], "crops": CROPS_TABLE}))
    (place / path).write_bytes(data)
    outcome = limited(lambda: fate(use, place / path, place / "data_manifests/again.toml"), 100 * 2**20, 5)
    assert not outcome.died, outcome
    kind, said, seconds = outcome.value
    assert kind == ("refused" if word else "accepted") and word in said and seconds < 1, outcome


def test_what_a_plan_from_elsewhere_names_is_refused_before_it_runs(tmp_path):
    """Code by any of its names, and folders outside; the file that is named would leave a marker if it ran."""
    here, there, marker = tmp_path / "here", tmp_path / "there", tmp_path / "ran"
    here.mkdir(), there.mkdir()
    (there / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    evil = f"{there}/evil.py:X"
    run = {"suite": "noise", "model": "toy"}
    plans = {
        "suite": {"run": [{**run, "suite": evil}]},
        "judge": {"run": [{**run, "params": {"judge": [f"{evil}?x=1"]}}]},
        "deep": {"run": [{**run, "model_args": {"a": [[{"b": evil}]]}}]},
        "recipe": {"train": [{"recipe": evil, "out": "x"}]},
    }
    for name, plan in plans.items():
        (there / f"{name}.toml").write_text(toml_file(plan))
        done = command(here, "score", f"../there/{name}.toml")
        assert done.code == 1 and "--allow-code" in done.err and not marker.exists(), (name, done.err)
    for name, plan in {
        "out": {"train": [{"recipe": "mini-ae", "out": "../there/x"}]},
        "store": {"run": [run], "how": {"store": str(there / "store")}},
    }.items():
        (there / f"{name}.toml").write_text(toml_file(plan))
        done = command(here, "score", f"../there/{name}.toml")
        assert done.code == 1 and "writes to" in done.err and "Traceback" not in done.err, (name, done.err)
    command(here, "score", "../there/suite.toml", "--allow-code")
    assert marker.exists()  # so the file was live


@pytest.mark.parametrize("written", ["locked = false", '"locked" = false', "'locked'=false", "text", "table"])
def test_a_lock_changes_its_own_fields_alone_or_nothing(place, written):
    """However the field is spelt; not in a text that only looks like it; of an inline table, or below one."""
    path = place / "data_manifests/odd.toml"
    head = 'kind = "prompts"\nsource = "s"\nlicense = "l"\nredistribute = true\n'
    if written == "text":
        text = head + 'manual = """\nlocked = false\n"""\nlocked = false\n'
    elif written == "table":
        text = head + "locked = false\n[[fetch]]\nurl = 'https://e.org'\nfile = 'locked = false'\n"
    else:
        text = head + written + "\n"
    path.write_text(text)
    (place / "data_manifests/odd.items.csv").write_text("id,text\na,one\n")
    if written == "text":
        with pytest.raises(Error, match="cannot be replaced"):
            manifest_verbs.lock("odd")
        assert path.read_text() == text
        return
    before = manifest_format.read_header(path)
    manifest_verbs.lock("odd")
    after = manifest_format.read_header(path)
    assert {**after, "locked": False} == {**before, "digest": after["digest"]} and after["locked"]
