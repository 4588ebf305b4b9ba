"""The tests with the oldest and the newest allowed versions of what is required, on each Python.

A row is an environment of 5 to 8 GB that uv makes from PyPI and that is removed before the next. A Python takes part
if it is on PATH: PATH=~/.pyenv/versions/3.12.1/bin:$PATH make nightly
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
SHOWN = ("torch", "pillow", "safetensors")
EVERYTHING, NOTHING = "everything", "nothing"
ROWS = [(python, old) for python in PYTHONS for old in (EVERYTHING, NOTHING)]
ROWS += [("3.11", "torch"), ("3.11", "pillow safetensors")]
UNMADE = {("3.14", "torch")}  # the lowest bound has no wheel for that Python: the oldest that has one is taken
HEADING = f"{'old':<20}{'Python':<9}{'torch':<14}{'Pillow':<9}{'safetensors':<13}passed failed skipped"


def lowest():
    """Name -> the lower bound in pyproject.toml."""
    requirements = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    return {r.name: next(s.version for s in r.specifier if s.operator == ">=") for r in requirements}


@pytest.fixture(scope="module")
def uv(tmp_path_factory):
    """uv(*words) runs it, with a cache that goes with the tests; it must end well unless `check` is False."""
    pytest.importorskip("uv", reason="uv is missing: PyPI's uv")
    cache = tmp_path_factory.mktemp("cache")
    if shutil.disk_usage(cache).free < 25e9:
        pytest.skip("less than 25 GB are free")

    def call(*words, check=True):
        command = [sys.executable, "-m", "uv", "--cache-dir", cache, "--no-python-downloads", *words]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=3600)
        assert not (check and done.returncode), done.stderr[-3000:]
        return done

    probe = cache / "probe.in"
    probe.write_text("packaging")
    if call("pip", "compile", probe, check=False).returncode:
        pytest.skip("PyPI cannot be reached")
    yield call
    shutil.rmtree(cache)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of this checkout, as far as it is committed or staged."""
    copy = tmp_path_factory.mktemp("source")
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={copy}/"], cwd=ROOT, check=True)
    return copy


@pytest.fixture
def made(uv, source, tmp_path):
    """made(python, old) gives the Python of a new environment in which `old` is at its lower bound, the rest newest."""
    environment = tmp_path / "environment"

    def make(python, old):
        found = uv("python", "find", "--system", python, check=False)
        if found.returncode:
            pytest.skip(f"python{python} is not on PATH")
        uv("venv", "--seed", "--python", found.stdout.strip(), environment)
        install = ["pip", "install", "--python", environment]
        held = tmp_path / "held.txt"
        held.write_text("".join(f"{name}=={low}.*\n" for name, low in lowest().items() if name in old.split()))
        versions = ["--resolution", "lowest-direct" if old == EVERYTHING else "highest", "--constraints", held]
        uv(*install, "--no-build", *versions, "--all-extras", "-r", source / "pyproject.toml")
        uv(*install, "--no-deps", "-e", source)
        return environment / "bin/python"

    yield make
    shutil.rmtree(environment, ignore_errors=True)


@pytest.mark.parametrize(("python", "old"), ROWS)
def test_the_tests_pass_with_other_versions(made, source, tmp_path, tally, size, capsys, python, old):
    """All of them at full size, else those of hostile files."""
    interpreter = made(python, old)
    code = "import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, sys.argv[1:]))"
    done = subprocess.run([interpreter, "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    own, *versions = done.stdout.split()
    for name, version in zip(SHOWN, versions, strict=True):
        if (old == EVERYTHING or name in old.split()) and (python, name) not in UNMADE:
            assert f"{version}.".startswith(f"{lowest()[name]}."), (name, version)  # else the row tests something else

    hostile = [f"tests/survival/{p.name}" for p in sorted((source / "tests/survival").glob("test_hostile*.py"))]
    command = [interpreter, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", *size(["tests"], hostile)]
    command += [f"--basetemp={tmp_path / 'inner'}", f"--junitxml={tmp_path / 'counts.xml'}"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=source, env=environ, capture_output=True, text=True, timeout=size(5400, 1800))
    counts = ElementTree.parse(tmp_path / "counts.xml").find("testsuite")
    ran, failures, errors, skipped = (int(counts.get(k)) for k in ("tests", "failures", "errors", "skipped"))
    failed, passed = failures + errors, ran - failures - errors - skipped
    with capsys.disabled():
        print(f"\n{HEADING}\n{old:<20}{own:<9}{versions[0]:<14}{versions[1]:<9}{versions[2]:<13}", end="")
        print(f"{passed:>6} {failed:>6} {skipped:>7}")
    whole = done.returncode == 0 and passed > 0
    tally("version rows", int(whole), 1)
    assert whole, done.stdout[-20000:]
