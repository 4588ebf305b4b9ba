"""Values with origins: default < BENCH_* < plan < flag for how; default < plan < flag for what is measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import toys
from toys import Drawing, Faulty, Painter, command

from bench import Data, Error, Model, Suite, UsageError, Weights
from bench.config import assignments, bind, build, convert, data_field, markers, read_plan, resolve_how

TOYS = str(Path(toys.__file__).resolve())


# -- how


def test_each_origin_of_how_beats_the_one_before_it(monkeypatch):
    monkeypatch.delenv("BENCH_BATCH", raising=False)
    how, origins = resolve_how({}, {})
    assert (how.batch, origins["batch"].origin) == (16, "default")
    monkeypatch.setenv("BENCH_BATCH", "3")
    how, origins = resolve_how({}, {})
    assert (how.batch, origins["batch"].origin) == (3, "BENCH_BATCH")
    how, origins = resolve_how({"batch": 4}, {}, "plan.toml")
    assert (how.batch, origins["batch"].origin) == (4, "plan.toml")
    how, origins = resolve_how({"batch": 4}, {"batch": "5"}, "plan.toml")
    assert (how.batch, origins["batch"].origin) == (5, "flag")


@pytest.mark.parametrize(
    "plan, flags, says",
    [
        ({"bach": 1}, {}, "plan: how has no parameter 'bach'"),
        ({"batch": "many"}, {}, "plan: how.batch: 'many' is not a whole number"),
        ({}, {"batch": "0"}, "batch is 0 (flag); it must be at least 1"),
        ({}, {"batch": "1.5"}, "--batch: '1.5' is not a whole number"),
        ({"keep": "some"}, {}, "keep is 'some' (plan); it must be none, sample, all or auto"),
        ({"keep": "x" * 5000}, {}, f"keep is '{'x' * 96}... (plan); it must be none, sample, all or auto"),
        ({}, {"max_failures": "1.5"}, "max_failures is 1.5 (flag); it must be a share between 0 and 1"),
        ({}, {"max_failures": "nan"}, "--max-failures: 'nan' is not a finite number"),
        ({}, {"unit_timeout": "-1"}, "unit_timeout is -1.0 (flag)"),
        ({}, {"threads": "-1"}, "threads is -1 (flag)"),
        ({"strict": "maybe"}, {}, "how.strict: 'maybe' is not true or false"),
    ],
)
def test_a_wrong_how_is_a_usage_error_that_names_its_place(plan, flags, says):
    with pytest.raises(UsageError) as caught:
        resolve_how(plan, flags)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_wrong_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("BENCH_THREADS", "two")
    with pytest.raises(UsageError, match="BENCH_THREADS: 'two' is not a whole number"):
        resolve_how({}, {})


def test_suggestions():
    with pytest.raises(UsageError) as caught:
        resolve_how({"bach": 1}, {})
    assert caught.value.hint == "did you mean batch?"
    with pytest.raises(UsageError) as caught:
        build(Drawing, {}, {"chnk": "1"})
    assert str(caught.value) == "-p: drawing has no parameter 'chnk'" and caught.value.hint == "did you mean chunk?"
    with pytest.raises(UsageError) as caught:
        bind(Painter, "painter", {}, {"brihgt": "1"})
    assert str(caught.value) == "-m: adapter painter has no parameter 'brihgt'"
    assert caught.value.hint == "did you mean bright?"


# -- conversions


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        ("3", int, 3), (3, int, 3), (3.0, int, 3), ("-7", int, -7), (str(2**53 + 1), int, 2**53 + 1),
        (2**63, int, 2**63),
        ("0.1", float, 0.1), (1, float, 1.0), ("1e-3", float, 0.001),
        ("true", bool, True), ("Off", bool, False), (True, bool, True),
        ("text", str, "text"), ("", str, ""), ("a/b", Path, Path("a/b")), ("w.pt", Weights, Weights("w.pt")),
        ("none", int | None, None), ("5", int | None, 5), (None, int | None, None), ("", float | None, None),
        ("b", Literal["a", "b"], "b"), ("2", Literal[1, 2], 2),
        ("1,2,3", tuple[int, ...], (1, 2, 3)), ([1, "2"], tuple[int, ...], (1, 2)), ("", tuple[str, ...], ()),
        ("a,b", list[str], ("a", "b")),
    ],
)  # fmt: skip
def test_conversions(value, kind, expected):
    found = convert(value, kind, "-p x")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value, kind",
    [
        ("3.5", int), (3.5, int), ("", int), (True, int), ([], int), ("1e3", int), ("nan", float), ("inf", float),
        (float("inf"), float), ("9" * 5000, int), ("1e999", float), (10**400, float), ("yes!", bool), (2, bool),
        ("c", Literal["a", "b"]), ("1,x", tuple[int, ...]), (5, tuple[int, ...]), (5, str), ({}, Path), (True, str),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_a_usage_error_that_names_its_place(value, kind):
    with pytest.raises(UsageError, match="-p x") as caught:
        convert(value, kind, "-p x")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("pairs", [["a"], ["=1"], ["a=1", "a=2"], [""]])
def test_assignments_that_are_none(pairs):
    with pytest.raises(UsageError, match="-m"):
        assignments(pairs, "-m")


def test_assignments():
    assert assignments(["a=1", "b=x=y", "c="], "-m") == {"a": "1", "b": "x=y", "c": ""}


# -- suites and factories


@dataclass(frozen=True)
class Rich(Suite):
    needed: int
    data: Data = "photographs"
    judge: Model = ""
    weights: Weights | None = None
    plan: Path | None = None
    sizes: tuple[int, ...] = (1, 2)

    name = "rich"
    version = 1

    def __post_init__(self):
        if self.needed < 0:
            raise ValueError("needed is negative")

    def units(self, data): ...

    def run(self, unit, model, ctx): ...


def test_a_suite_is_built_with_the_origin_of_each_value():
    suite, origins = build(Rich, {"needed": 1, "sizes": [4]}, {"needed": "2"}, "plan.toml")
    assert suite.needed == 2 and suite.sizes == (4,)
    assert [origins[n].origin for n in ("needed", "sizes", "data")] == ["flag", "plan.toml", "default"]
    assert markers(Rich, Weights) == ["weights"] and markers(Rich, Path) == ["plan"] and data_field(Rich) == "data"
    assert data_field(Drawing) is None


def test_a_field_that_is_missing_or_refused_by_the_suite_is_a_usage_error():
    with pytest.raises(UsageError, match="rich needs needed"):
        build(Rich, {}, {})
    with pytest.raises(UsageError, match=r"^p.toml: rich needs needed"):
        build(Rich, {}, {}, "p.toml")
    with pytest.raises(UsageError, match="rich: needed is negative"):
        build(Rich, {}, {"needed": "-1"})
    with pytest.raises(Error, match="not a dataclass"):
        build(int, {}, {})


def test_arguments_before_the_star_decide_what_and_those_after_it_how_fast():
    bound = bind(Painter, "painter", {"bright": 0.5}, {"speed": "3", "weights": "w.pt"}, "plan.toml")
    assert bound.what == {"bright": 0.5, "weights": "w.pt"} and bound.how == {"speed": 3}
    assert bound.weights == {"weights"} and not bound.takes_device
    assert [bound.origins[n].origin for n in ("bright", "weights", "speed")] == ["plan.toml", "flag", "flag"]
    assert bind(Faulty, "faulty", {}, {}).what == {"fault": "", "at": "item-", "until": ""}


def test_a_factory_with_a_needed_argument_or_no_signature():
    def needs(path: Path, *, device: str): ...

    with pytest.raises(UsageError, match="adapter 'f' needs path"):
        bind(needs, "f", {}, {})
    with pytest.raises(UsageError, match=r"^p.toml: adapter 'f' needs path") as caught:
        bind(needs, "f", {}, {}, "p.toml")
    assert "path = …" in caught.value.hint
    bound = bind(needs, "f", {}, {"path": "x", "device": "cpu"})
    assert bound.weights == {"path"} and bound.takes_device  # a file that is named counts by its bytes
    with pytest.raises(Error, match="no readable signature"):
        bind(3, "f", {}, {})


# -- plans


@pytest.mark.parametrize(
    "text, says, hint",
    [
        ("[[run]\n", "plan.toml", "a plan is TOML"),
        ("", "names nothing to do", "[[run]]"),
        ("[how]\nbatch = 2\n", "names nothing to do", "[[run]]"),
        ("[[runs]]\nsuite = 's'\n", "unknown key 'runs'", "did you mean run?"),
        ("[run]\nsuite = 's'\n", "run must be a list of tables", "write [[run]]"),
        ("how = 1\n", "how must be a table", ""),
        ("[[run]]\nsuite = 's'\n", "run 1 needs model", "add model"),
        ("[[run]]\nsuite = 's'\nmodel = 'm'\nparam = {}\n", "run 1: unknown key 'param'", "did you mean params?"),
        ("[[run]]\nsuite = 1\nmodel = 'm'\n", "run 1: suite has the wrong type", "it must be text"),
        ("[[run]]\nsuite = 's'\nmodel = 'm'\nlimit = '4'\n", "run 1: limit has the wrong type", "a whole number"),
        ("[[run]]\nsuite = 's'\nmodel = 'm'\nseeds = 3\n", "run 1: seeds has the wrong type", "a list"),
        ("[[run]]\nsuite = 's'\nmodel = 'm'\nseeds = []\n", "run 1: seeds is an empty list", "nothing"),
        ("[[run]]\nsuite = 's'\nmodel = 'm'\nparams = {a = []}\n", "run 1: a is an empty list", "nothing"),
        ("[[board]]\nname = 3\n", "board 1: name has the wrong type", "text"),
        ("\ufffe", "plan.toml", ""),
    ],
)
def test_a_wrong_plan_is_refused_by_file_and_key(tmp_path, text, says, hint):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(Error) as caught:
        read_plan(path)
    assert "plan.toml" in str(caught.value) and says in str(caught.value) and hint in caught.value.hint


@pytest.mark.parametrize("data", [b"\xff\xfe", b"a = " + b"[" * 100_000])
def test_a_plan_that_is_no_text_or_nested_too_deeply_is_refused(tmp_path, data):
    (tmp_path / "plan.toml").write_bytes(data)
    with pytest.raises(Error, match=r"plan\.toml"):
        read_plan(tmp_path / "plan.toml")
    with pytest.raises(Error, match="cannot be read: No such file"):
        read_plan(tmp_path / "other.toml")


PLAN = """
[how]
batch = 2

[[run]]
suite = "{toys}:Drawing"
model = "{toys}:Painter"
model_args = {{ bright = [0.0, 0.25] }}
params = {{ num = [2, 3], colour = "red" }}
seeds = [0, 7]
"""


def test_lists_in_a_plan_are_products_and_flags_beat_it(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(toys=TOYS))
    done = command(tmp_path, "score", "plan.toml", "--explain")
    assert done.code == 0, done.err
    tables = done.out.strip().split("\n\n")
    assert len(tables) == 2 * 2 * 2 and not (tmp_path / ".bench").exists()
    for line in ("-p num", "-p colour", "-m bright", "batch"):
        assert any(row.startswith(line) and row.endswith("plan.toml") for row in tables[0].splitlines()), line
    assert any(row.split() == ["units", "1", "1", "pending"] for row in tables[0].splitlines())
    done = command(tmp_path, "score", "plan.toml", "--explain", "--seed", "3", "--batch", "5")
    assert len(done.out.strip().split("\n\n")) == 4
    assert any(row.split() == ["batch", "5", "flag"] for row in done.out.splitlines())


def test_a_plan_is_scored(tmp_path):
    text = PLAN.format(toys=TOYS).replace("[0.0, 0.25]", "0.25").replace("[2, 3]", "2")
    (tmp_path / "plan.toml").write_text(text)
    done = command(tmp_path, "score", "plan.toml", "--json")
    assert done.code == 0, done.err
    rows = [r for r in json.loads(done.out)["rows"] if r["slice"] == "all"]
    assert [r["seed"] for r in rows] == [0, 7] and {r["model"] for r in rows} == {"Painter-0.25"}
    assert command(tmp_path, "score", "plan.toml", "--model", "toy").code == 2


def test_the_environment_reaches_how_and_never_a_specification(tmp_path):
    specs = []
    names = ("SEED", "LIMIT", "NUM", "MODEL", "SUITE", "BATCH", "KEEP", "MAX_FAILURES")
    for i, env in enumerate(({}, {f"BENCH_{n}": "1" if n != "KEEP" else "none" for n in names})):
        folder = tmp_path / str(i)
        folder.mkdir()
        done = command(folder, "score", f"{TOYS}:Drawing", "--model", f"{TOYS}:Painter", env=env)
        assert done.code == 0, done.err
        (run,) = (folder / ".bench" / "runs").iterdir()
        body = json.loads((run / "run.json").read_text())
        specs.append((run.name, body["spec"]))
        assert body["config"]["batch"] == (["16", "default"] if not env else ["1", "BENCH_BATCH"])
    assert specs[0] == specs[1]


def test_a_key_never_becomes_part_of_an_identity():
    def before(api_key: str, tokenizer: str = "bpe"): ...

    def after(tokenizer: str = "bpe", *, api_key: str = ""): ...

    with pytest.raises(Error, match="api_key before `\\*`"):
        bind(before, "before", {}, {"api_key": "hunter2hunter2"})
    assert bind(after, "after", {}, {"api_key": "hunter2hunter2"}).what == {"tokenizer": "bpe"}


def test_several_devices_take_a_run_of_a_plan_each(tmp_path):
    """What two processes score, two runs at a time, is what one scores; a run that cannot start stops the plan."""
    text = PLAN.format(toys=TOYS).replace("[0.0, 0.25]", "0.25").replace("[2, 3]", "2")
    (tmp_path / "plan.toml").write_text(text)
    alone = command(tmp_path, "score", "plan.toml", "--json", "--store", "one", "--devices", "cpu")
    both = command(tmp_path, "score", "plan.toml", "--json", "--store", "two", "--devices", "cpu,cpu")
    assert both.code == 0, both.err

    def rows(done):
        return sorted(json.dumps(r, sort_keys=True) for r in json.loads(done.out)["rows"])

    assert rows(both) == rows(alone) and len(json.loads(both.out)["rows"]) >= 2
    assert len(list((tmp_path / "two" / "runs").glob("*/run.json"))) == 2
    (tmp_path / "plan.toml").write_text(text.replace("Painter", "Missing"))
    done = command(tmp_path, "score", "plan.toml", "--store", "three", "--devices", "cpu,cpu")
    assert done.code == 2 and "Missing" in done.err and "Traceback" not in done.err, done.err


def test_a_process_of_a_plan_that_is_gone_is_an_error(tmp_path):
    from multiprocessing import Pipe

    from bench.steps import Step, _tell

    ours, theirs = Pipe()
    theirs.close()
    with pytest.raises(Error, match="died"):  # a BrokenPipeError would end the command with 0
        _tell(ours, Step("noise", "toy"))
