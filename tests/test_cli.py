"""The command line as a user sees it: help, errors, exit codes, pipes, and what goes to stdout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from toys import command

from bench import Store
from bench.cli import VERBS
from bench.scores import parse_scores

TOYS = str(Path(toys.__file__).resolve())
BENCH = [sys.executable, "-m", "bench"]
SCORE = ["score", f"{TOYS}:Drawing", "--model", f"{TOYS}:Painter"]


def fails(done, code, *says):
    """The form of every error: what, a blank line, what next; few lines; no traceback, no control character."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err and done.out == "" and len(done.err.splitlines()) <= 12
    assert re.fullmatch(r"(.*\n)*error: .+\n(\nhint: .+\n)?", done.err), done.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.err)
    assert not done.err.partition("\n")[0].endswith(".")
    for text in says:
        assert text in done.err, done.err


# -- help


def test_help_names_every_verb(tmp_path):
    done = command(tmp_path, "--help")
    assert done.code == 0 and done.err == "" and all(re.search(rf"^ +{v}\b", done.out, re.M) for v in VERBS)
    assert command(tmp_path).out == done.out


def test_every_verb_has_help_with_an_example_that_parses(tmp_path):
    import shlex

    from bench.cli import parser

    for verb, (_, example) in VERBS.items():
        done = command(tmp_path, verb, "--help")
        assert done.code == 0 and f"example:\n  {example}" in done.out and done.err == ""
        assert parser().parse_args(shlex.split(example)[1:]).verb == verb
        assert max(map(len, done.out.splitlines())) <= 120


def test_help_and_list_load_nothing_heavy(tmp_path):
    code = (
        "import sys, bench.cli\n"
        "for argv in (['--help'], ['list'], ['score', '--help'], ['list', '--json']):\n"
        "    try:\n        bench.cli.main(argv)\n"
        "    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'pandas', 'scipy', 'matplotlib', 'transformers', 'sklearn', 'skimage', 'diffusers', 'ray'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr == "[]\n"


# -- usage errors


@pytest.mark.parametrize(
    "argv, says",
    [
        (["scroe"], ["unknown command 'scroe'", "did you mean score"]),
        (["score"], ["SUITE | PLAN.toml"]),
        (["score", "noise"], ["which model?", "--model NAME"]),
        (["score", "noise", "--model", "toi"], ["unknown adapter 'toi'", "did you mean toy?"]),
        (
            ["score", "noise", "--model", "toy", "--bach", "3"],
            ["unrecognized arguments: --bach", "did you mean --batch?"],
        ),
        (["score", "noise", "--model", "toy", "--bat", "3"], ["unrecognized arguments: --bat"]),
        (["score", "noise", "--model", "toy", "-p", "sise=3"], ["noise has no parameter 'sise'", "did you mean size?"]),
        (["score", "noise", "--model", "toy", "-p", "size=big"], ["-p size: 'big' is not a whole number"]),
        (["score", "noise", "--model", "toy", "-m", "factor"], ["-m 'factor' is not name=value"]),
        (["score", "noise", "--model", "toy", "--limit", "x"], ["--limit", "'x'"]),
        (["score", "noise", "--model", "toy", "--limit", "0"], ["limit is 0; it must be 1 or more"]),
        (["score", "noise", "--model", "toy", "--shard", "3/3"], ["--shard '3/3' is not k/n"]),
        (["score", "noise", "--model", "toy", "--devices", "gpu"], ["unknown device 'gpu'"]),
        (["score", "noise", "--model", "toy", "-p", "data=photografs"], ["photografs", "photographs"]),
        (["score", "plan.toml", "noise"], ["a plan file stands alone"]),
        (["list", "suits"], ["unknown choice 'suits'", "did you mean suites?"]),
        (["compare", "a"], ["required"]),
    ],
    ids=lambda v: " ".join(v)[:40],
)
def test_a_wrong_command_line_is_exit_2_with_what_to_do(tmp_path, argv, says):
    fails(command(tmp_path, *argv), 2, *says)
    assert not list(tmp_path.glob(".bench/runs/*"))


@pytest.mark.parametrize(
    "argv, says",
    [
        (["score", "plan.toml"], ["plan.toml cannot be read: No such file"]),
        (["show", "nothing"], ["no run 'nothing' in .bench"]),
        (["compare", "a", "b"], ["no run 'a'"]),
        (["rescore", "a"], ["no run 'a'"]),
        (["show", "x", "--store", "y" * 300], ["File name too long"]),
        ([*SCORE, "--store", "y" * 300], ["File name too long"]),
        ([*SCORE, "--store", "/dev/null/store"], ["Not a directory"]),
        (["score", f"{TOYS}:WhiteBox", "--model", "toy"], [
            "suite `white-box` needs DenoiserAccess; `toy` has TextToImage, ClassToImage, Autoencoder",
            "suites that run on `toy`: generation, noise, reconstruction"]),
        (["score", "reconstruction", "--model", "vae", "-m", "weights=nowhere.pt"], ["nowhere.pt"]),
    ],
    ids=lambda v: " ".join(v)[-40:],
)  # fmt: skip
def test_what_cannot_start_is_exit_1_with_what_to_do(tmp_path, argv, says):
    fails(command(tmp_path, *argv), 1, *says)


# -- a run, as it is printed


def test_a_session(tmp_path):
    done = command(tmp_path, *SCORE)
    (path,) = (tmp_path / ".bench" / "runs").iterdir()
    running = r"running .*/toys\.py \(sha256 [0-9a-f]{12}\)\n"
    begun = rf"{path.name}   3 units, 6 items, 0 done\n"
    assert done.code == 0 and re.fullmatch(rf"({running})+{begun}complete\. \.bench/runs/{path.name}\n", done.err), (
        done.err
    )
    assert done.out == "metric  value   95 %  n  signature\nmean    0.4934  none  6  mean|scale:1.0|v:1\n"
    again = command(tmp_path, *SCORE)
    assert again.out == done.out and "3 units, 6 items, 3 done" in again.err and again.code == 0
    listed = command(tmp_path, "list", "runs")
    assert (
        listed.out == f"runs{' ' * (len(path.name) - 2)}  state     units  items\n  {path.name}  complete  3      6\n\n"
    )
    shown = command(tmp_path, "show", path.name[-6:])
    for text in (path.name, "suite    drawing version 1", "model    Painter", "again    bench score", "0.4934"):
        assert text in shown.out, shown.out
    assert "\x1b" not in done.err + done.out + shown.out


def test_failed_units_are_named_counted_shown_and_exit_3(tmp_path):
    argv = ["score", f"{TOYS}:Drawing", "--model", f"{TOYS}:Faulty", "-m", "fault=raises", "-m", "at=item-003"]
    done = command(tmp_path, *argv)
    assert done.code == 3 and "complete." not in done.err
    assert "u/001 failed: RuntimeError: the model gave up\\x1b[31m on purpose" in done.err
    assert "1 of 3 units failed: bench show drawing-" in done.err and "4/6" in done.out
    run = next(Store(tmp_path / ".bench").runs())
    shown = command(tmp_path, "show", run.id)
    assert "1 unit failed:" in shown.out
    unit = command(tmp_path, "show", run.id, "--unit", "u/001")
    assert unit.code == 0 and "RuntimeError" in unit.out and "in raises" in unit.out and "\x1b" not in unit.out
    good = command(tmp_path, "show", run.id, "--unit", "u/000")
    assert "item-001" in good.out and "media/picture/item-000" in good.out and "/blobs/" in good.out
    body = json.loads(command(tmp_path, "show", run.id, "--unit", "u/000", "--json").out)
    assert body["schema"] == 1 and body["rows"][0]["unit"] == "u/000"
    fails(command(tmp_path, "show", run.id, "--unit", "u/0001"), 1, "no record of unit 'u/0001'", "did you mean")


def test_json_of_score_is_the_rows_of_scores_csv(tmp_path):
    done = command(tmp_path, *SCORE, "--json")
    body = json.loads(done.out)
    (path,) = (tmp_path / ".bench" / "runs").iterdir()
    scores = parse_scores((path / "scores.csv").read_bytes())
    assert (body["schema"], body["kind"]) == (1, "scores") and len(body["rows"]) == 3
    assert body["rows"] == [vars(s) for s in scores]
    assert json.loads(command(tmp_path, "show", path.name, "--json").out) == body
    for verb in (["list"], ["list", "runs"]):
        body = json.loads(command(tmp_path, *verb, "--json").out)
        assert (body["schema"], body["kind"]) == (1, "list") and body["rows"]


def test_explain_says_every_value_with_its_origin_and_writes_nothing(tmp_path):
    done = command(tmp_path, *SCORE, "-p", "num=4", "--shard", "0/2", "--explain", env={"BENCH_BATCH": "2"})
    assert done.code == 0 and not (tmp_path / ".bench").exists()
    rows = [re.split(r"  +", line) for line in done.out.strip().splitlines()]
    assert ["-p num", "4", "flag"] in rows and ["-p chunk", "2", "default"] in rows
    assert ["-m bright", "0.0", "default"] in rows and ["batch", "2", "BENCH_BATCH"] in rows
    assert ["units", "1", "1 pending"] in rows
    (run,) = (r for r in rows if r[0] == "run")
    assert run[2] == "new"
    command(tmp_path, *SCORE, "-p", "num=4")
    done = command(tmp_path, *SCORE, "-p", "num=4", "--explain")
    assert [run[0], run[1], "exists"] in [re.split(r"  +", line) for line in done.out.splitlines()]
    assert "0 pending" in done.out


def test_a_secret_that_was_typed_is_masked_in_what_is_kept(tmp_path):
    (tmp_path / "m.py").write_text(
        f"import sys\nsys.path.append({str(Path(TOYS).parent)!r})\nfrom toys import Painter\n"
        "class M(Painter):\n    def __init__(self, *, api_key: str = ''):\n        super().__init__()\n"
    )
    done = command(tmp_path, "score", f"{TOYS}:Drawing", "--model", "m.py:M", "-m", "api_key=hunter2hunter2")
    assert done.code == 0, done.err
    kept = b"".join(p.read_bytes() for p in (tmp_path / ".bench").rglob("*") if p.is_file())
    assert b"hunter2" not in kept and "hunter2" not in done.out + done.err
    run = f'[[run]]\nsuite = "{TOYS}:Drawing"\nmodel = "m.py:M"\n'
    (tmp_path / "plan.toml").write_text(run + 'model_args = { api_key = "hunter3hunter3" }\nseeds = [0, 1]\n')
    done = command(tmp_path, "score", "plan.toml", "--allow-code", "--devices", "cpu,cpu", "--store", "two")
    assert done.code == 0, done.err
    kept = b"".join(p.read_bytes() for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert b"hunter3" not in kept and "hunter3" not in done.out + done.err


# -- pipes and terminals


def test_a_full_disk_behind_stdout_is_exit_1_and_the_records_are_whole(tmp_path):
    done = command(tmp_path, *SCORE, stdout="/dev/full")
    assert done.code == 1 and "error: cannot write: No space left on device" in done.err and "Traceback" not in done.err
    assert next(Store(tmp_path / ".bench").runs()).complete()
    with open("/dev/full", "w") as full:
        argv = [*BENCH, "list", "runs"]
        real = subprocess.run(argv, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert real.returncode == 1 and "Traceback" not in real.stderr and "Exception ignored" not in real.stderr


def test_any_text_reaches_a_terminal_that_knows_only_ascii(tmp_path):
    command(tmp_path, *SCORE)
    run = next(Store(tmp_path / ".bench").runs())
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0"}
    (run.path / "scores.csv").write_bytes((run.path / "scores.csv").read_bytes().replace(b"mean|", "µ|".encode()))
    for argv in (["show", run.id], ["show", run.id, "--json"]):
        done = subprocess.run([*BENCH, *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.isascii() and ("\\xb5" in done.stdout or "\\u00b5" in done.stdout)


def test_debug_shows_the_trace(tmp_path):
    done = command(tmp_path, "--debug", "show", "nothing")
    assert "Traceback" in done.err


# -- the whole way, once, on the data that comes with the packages


def test_reconstruction_on_photographs(tmp_path):
    argv = ["score", "reconstruction", "--model", "toy", "--limit", "4", "-p", "size=64"]
    done = command(tmp_path, *argv)
    assert done.code == 0, done.err
    scores = next(Store(tmp_path / ".bench").runs()).scores()
    psnr = next(s for s in scores if s.metric == "psnr" and s.slice == "all")
    assert psnr.complete and psnr.n + int(psnr.note.partition(" identical")[0] or 0) == 4 and 5 < psnr.value < 60
    done = command(tmp_path, "show", "reconstruction", "--figures", "figures")
    assert done.code == 0, done.err
    drawn = [tmp_path / line for line in done.out.split()]
    assert {p.name for p in drawn} == {"psnr.svg", "psnr.csv", "bands.svg", "bands.csv"}
    assert all(p.stat().st_size > 50 for p in drawn)
