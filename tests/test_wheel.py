"""The wheel is whole: built from a copy of the checkout and unpacked elsewhere, it lists suites and finds manifests."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A folder with what an installation would put into site-packages."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("bench", "suites", "data_manifests", "reports"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--disable-pip-version-check", "-w", out, source], check=True)
    [wheel] = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as pack:
        pack.extractall(out / "site")
    return out / "site"


def run(unpacked, folder, *command):
    """A command in another folder, with only the unpacked wheel before the installed packages."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BENCH_")} | {"PYTHONPATH": str(unpacked)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def test_listing_from_the_wheel(unpacked, tmp_path):
    done = run(unpacked, tmp_path, "-m", "bench", "list")
    assert done.returncode == 0, done.stderr
    for name in ("reconstruction", "noise", "codec", "toy", "mini-ae", "photographs"):
        assert name in done.stdout
    assert not list(tmp_path.iterdir())  # listing writes nothing


def test_manifests_come_from_the_wheel(unpacked, tmp_path):
    code = "import bench; from bench.manifest_places import folders; print(bench.__file__, *folders(), sep='\\n')"
    done = run(unpacked, tmp_path, "-c", code)
    assert done.stdout.splitlines() == [
        str(unpacked / "bench/__init__.py"),
        str(unpacked / "bench/_data/data_manifests"),
    ]


def test_every_data_file_travels(unpacked):
    """What is not Python and lies in the packages, the manifests, the boards and the published numbers."""
    ignored = (".py", ".pyc")
    packages = [p for top in ("bench", "suites") for p in (ROOT / top).rglob("*") if p.is_file()]
    expected = {p.relative_to(ROOT) for p in packages if p.suffix not in ignored and not p.name.startswith(".")}
    data = [p for pattern in ("*.toml", "*.csv") for p in (ROOT / "data_manifests").rglob(pattern)]
    data += [*(ROOT / "reports").glob("*.toml"), *(ROOT / "reports/published").glob("*.csv")]
    expected |= {Path("bench/_data") / p.relative_to(ROOT) for p in data}
    assert len(data) > 1
    assert sorted(p.as_posix() for p in expected if not (unpacked / p).is_file()) == []
    assert [p for p in expected if (unpacked / p).read_bytes() != origin(p).read_bytes()] == []


def origin(path):
    return ROOT / (path.relative_to("bench/_data") if path.parts[:2] == ("bench", "_data") else path)


def test_nothing_else_travels(unpacked):
    [info] = unpacked.glob("*.dist-info")
    assert {p.name for p in unpacked.iterdir()} == {"bench", "suites", info.name}
    assert not [p for p in unpacked.rglob("*") if p.name == "index.html" or "scores.csv" in p.name]
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert metadata["License-Expression"] == "Apache-2.0" and (info / "licenses/LICENSE").is_file()
    assert (info / "entry_points.txt").read_text().count("[bench.") == 4


def test_constraints_are_names_and_numbers():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        assert name.replace("-", "").replace("_", "").replace(".", "").isalnum() and version[:1].isdigit()
        assert not name.startswith(("nvidia", "cuda", "triton")), "follows torch; a pin would forbid a CPU build"
        assert set(version) <= set("0123456789.abcpostrv"), "no local version, no address"
