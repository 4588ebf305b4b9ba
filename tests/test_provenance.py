"""Provenance of repositories made here, by git itself."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from bench import provenance


def git(folder, *arguments):
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": "/dev/null"}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    git(folder, "remote", "add", "origin", "https://joe:hunter22@example.org/lab/repo.git?token=hunter23")
    (folder / "model.py").write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_clean_checkout(checkout):
    found = provenance.repository(checkout)
    assert found["commit"] == git(checkout, "rev-parse", "HEAD")
    assert (found["dirty"], found["diff"]) == (False, None)
    assert found["origin"] == "https://example.org/lab/repo.git"
    assert Path(found["root"]).samefile(checkout)


def test_changes_have_digests(checkout):
    digests = set()
    for text in ("a = 2\n", "a = 3\n"):
        (checkout / "model.py").write_text(text)
        found = provenance.repository(checkout)
        assert found["dirty"] is True
        digests |= {found["diff"], provenance.repository(checkout)["diff"]}
    (checkout / "model.py").write_text("a = 1\n")
    assert provenance.repository(checkout)["dirty"] is False
    (checkout / "untracked.py").write_text("")
    digests.add(provenance.repository(checkout)["diff"])
    assert len(digests) == 3 and all(d.startswith("sha256:") for d in digests)


def test_no_repository(tmp_path, checkout, monkeypatch):
    assert provenance.repository(tmp_path) is None
    unborn = tmp_path / "unborn"
    unborn.mkdir()
    git(unborn, "init", "-q")
    assert provenance.repository(unborn) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.repository(checkout) is None


def test_a_repository_cannot_name_a_program_to_run(checkout, tmp_path):
    marker = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external"):
        git(checkout, "config", key, str(program))
    (checkout / "model.py").write_text("a = 2\n")
    git(checkout, "diff", "--ext-diff")
    assert marker.exists()  # the trap is live
    marker.unlink()
    assert provenance.repository(checkout)["dirty"] is True
    assert not marker.exists()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host.example/a/b.git", "https://host.example/a/b.git"),
        ("https://secret@host.example/a?key=secret#secret", "https://host.example/a"),
        ("https://user:se@cret@host.example/a", "https://host.example/a"),
        ("git@host.example:a/b.git", "host.example:a/b.git"),
        ("ssh://git@host.example:22/a", "ssh://host.example:22/a"),
        ("../sibling", "sibling"),
        ("/home/joe/secret-project/a@b.git", "a@b.git"),
        ("file:///home/joe/checkout/.", "checkout"),
        ("C:\\Users\\joe\\checkout", "checkout"),
    ],
)
def test_origin_loses_its_credentials(url, shown):
    assert provenance.without_credentials(url) == shown


def test_packages_are_the_installed_ones():
    found = provenance.packages()
    assert found["numpy"] == metadata.version("numpy") and found["touchstone-bench"] == metadata.version(
        "touchstone-bench"
    )
    assert next(iter(found)) == "touchstone-bench" and "ray" in found


def test_collect_is_json_and_loads_nothing(checkout):
    """In a process of its own, in a foreign checkout: strict JSON, no path of the machine, torch not imported."""
    code = (
        "import json, sys; from bench.provenance import collect; found = collect();"
        "heavy = sorted({'torch', 'pandas', 'scipy', 'matplotlib', 'transformers', 'ray'} & set(sys.modules));"
        "print(json.dumps([found, heavy], allow_nan=False))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    assert set(found) == {"git", "git_folder", "packages", "machine", "flags"}
    assert found["git_folder"]["commit"] == git(checkout, "rev-parse", "HEAD")
    assert found["machine"]["cores"] >= 1 and found["machine"]["gpus"] == []
    assert str(checkout) not in done.stdout and "hunter2" not in done.stdout


def test_flags_follow_torch():
    torch = pytest.importorskip("torch")
    found = provenance.flags()
    assert found["threads"] == torch.get_num_threads()
    assert found["deterministic_algorithms"] is torch.are_deterministic_algorithms_enabled()
    json.dumps(found)


def test_a_vanished_working_folder_is_no_error(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert provenance.collect()["git_folder"] is None
