"""Coverage-guided fuzzing of everything that reads what others wrote (fuzz.py): no input breaks what is promised of it;
and a guard that is taken out of a copy of the harness is missed within minutes."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import TARGETS
from test_guards import PARTS, ROOT, Guard

pytestmark = pytest.mark.nightly
FUZZ = "tests/nightly/fuzz.py"
STARTING = 300  # seconds, on a busy machine, with all that earlier nights have found


@pytest.fixture
def fuzzed(memory, tmp_path):
    """fuzzed(target, seconds, folder of inputs, root of the tree): (inputs tried, what was found or "")."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("fuzzing needs PyPI's atheris, on Python 3.11 to 3.13")

    def run(name, seconds, inputs, root=ROOT):
        inputs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, root / FUZZ, name, f"-max_total_time={seconds}", inputs]
        env = {**os.environ, "TMPDIR": str(memory), "PYTHONDONTWRITEBYTECODE": "1"}
        log = tmp_path / "log"
        with open(log, "w") as file:
            process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=file, stderr=file)
            try:
                code = process.wait(seconds + STARTING)
            except subprocess.TimeoutExpired:
                code = -signal.SIGALRM
            finally:
                process.kill()
                process.wait()
        said = log.read_text(errors="replace")
        print(*re.findall(r".*(?:INITED|DONE).*", said), sep="\n")
        executed = re.findall(r"^stat::number_of_executed_units: (\d+)", said, re.M)
        tried = int(executed[-1]) if executed else 0
        found = [path.read_bytes() for path in sorted(tmp_path.glob("*-*")) if re.match("crash|oom|timeout", path.name)]
        why = "".join(re.findall(r"=== Uncaught .*?(?=^==)", said, re.M | re.S)) or said[-3000:]
        return tried, "" if code == 0 else f"exit {code}: {why[:1000]} ... {why[-1000:]}\ninputs: {found}"

    return run


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_what_is_promised_of_it(fuzzed, size, tally, tmp_path, request, name):
    """At full size each night goes on from what the nights before it have found."""
    inputs = Path(request.config.cache.mkdir("fuzzed")) if size(True, False) else tmp_path
    tried, found = fuzzed(name, size(3600, 20), inputs / name)
    tally("fuzzed inputs", max(0, tried - bool(found)), tried, tracebacks=int(bool(found)))
    assert not found, found
    assert tried > 100


GUARDS = {
    "headers": Guard(
        "bench/weights.py",
        '        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)\n',
        '        entries = json.loads(header.decode("utf-8"))\n',
        (),
    ),
    "records": Guard(
        "bench/records.py",
        "        value = json.loads(raw)\n    except (ValueError, RecursionError):\n",
        "        value = json.loads(raw)\n    except ValueError:\n",
        (),
    ),
    "answers": Guard(
        "bench/adapters/said.py",
        "        if len(found) < len(pairs):\n",
        "        if len(found) < len(pairs) - 1:\n",
        (),
    ),
    "board": Guard(
        "bench/text.py",
        "    except RecursionError:\n        raise Error(f",
        "    except RecursionError if path.suffix != '.toml' else ():\n        raise Error(f",
        (),
    ),
}


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_that_is_gone_is_missed(fuzzed, tally, tmp_path, name):
    guard, root = GUARDS[name], tmp_path / "tree"
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        (root / part).parent.mkdir(exist_ok=True)
        copy(ROOT / part, root / part)
    path = root / guard.file
    whole = path.read_text(encoding="utf-8")
    assert whole.count(guard.line) == 1, f"{guard.file} has the line {whole.count(guard.line)} times"
    path.write_text(whole.replace(guard.line, guard.without), encoding="utf-8")
    tried, found = fuzzed(name, 600, tmp_path / "inputs", root)
    tally("guards that fuzzing misses", int(bool(found)), 1)
    print(f"{tried:,} inputs\n{found}")
    assert "=== Uncaught Python exception" in found
