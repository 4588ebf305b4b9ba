"""Killed at random on real file systems: ext4, xfs, btrfs and an overlay, each on a disk of its own in memory, and the
disk of this machine."""

import os
import random
import shutil
import subprocess

import pytest
from test_crash import kill_the_command, kill_while_appending

pytestmark = pytest.mark.nightly
MAKE = {"ext4": ("mkfs.ext4", "-q"), "xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}
MEGABYTES = 512
KINDS = ("ext4", "xfs", "btrfs", "overlay", "this disk")


def call(*command):
    subprocess.run([*map(str, command)], check=True, capture_output=True)


@pytest.fixture
def disk(request, memory, tmp_path):
    """A folder on a file system of the kind that the test is asked for."""
    kind = request.param
    if kind == "this disk":
        yield tmp_path
        return
    if os.geteuid():
        pytest.skip("mounting needs root")
    base = "ext4" if kind == "overlay" else kind
    make, *options = MAKE[base]
    if shutil.which(make) is None:
        pytest.skip(f"{make} is missing: Debian's e2fsprogs, xfsprogs, btrfs-progs")
    image, below, merged = memory / "disk", memory / "below", memory / "merged"
    with open(image, "wb") as file:
        file.truncate(MEGABYTES << 20)
    call(make, *options, image)
    below.mkdir()
    call("mount", "-o", "loop", image, below)
    try:
        if kind != "overlay":
            yield below
            return
        for name in ("lower", "upper", "work"):
            (below / name).mkdir()
        merged.mkdir()
        layers = ",".join(f"{name}dir={below / name}" for name in ("lower", "upper", "work"))
        call("mount", "-t", "overlay", "overlay", "-o", layers, merged)
        try:
            yield merged
        finally:
            call("umount", merged)
    finally:
        call("umount", below)


@pytest.mark.parametrize("disk", KINDS, indirect=True)
def test_killed_at_random_while_records_are_appended_there(disk, quick, tally, trials):
    seed = 20261211
    print("seed", seed)
    kills = trials(2000, 25)
    broken, lost, false, torn = kill_while_appending(disk, kills, random.Random(seed))
    tally("kills on file systems", kills - broken, kills, lost=lost, false=false)
    print(f"{kills} kills, {torn} of them inside a record")
    assert broken == lost == false == 0


@pytest.mark.parametrize("disk", KINDS, indirect=True)
def test_the_command_killed_until_it_is_complete_there(disk, tally, trials):
    seed = 20261212
    print("seed", seed)
    kills = trials(200, 2)
    broken, lost, false = kill_the_command(disk, kills, 80, 2.5, random.Random(seed))
    tally("kills on file systems", kills - min(kills, broken), kills, lost=lost, false=false)
    assert broken == lost == 0
