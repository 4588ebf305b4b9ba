"""One run on a folder that two hosts share over NFS, versions 3 and 4: exactly one writes each shard and the other is
refused by name, whatever is cached, whoever dies, and when the server forgets its locks.

The hosts and the server are in a virtual machine, because few kernels at hand have NFS; see nfs_races.py.
"""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from machine import Machine, Missing

pytestmark = pytest.mark.nightly
HERE = Path(__file__).resolve().parent
PYTHONPATH = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE.parent / "survival")))
CACHES = ("none", "positive", "all")  # what a host remembers of names: nothing, those that exist, also those that don't


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    try:
        yield Machine(folder)
    except Missing as e:
        pytest.skip(str(e))
    finally:
        shutil.rmtree(folder)


def races(machine, *plan):
    """Makes `plan`, of (options of the mounts, kind of race, first number, number after the last), in one machine."""
    file = machine.folder / "plan.json"
    file.write_text(json.dumps(plan))
    count = sum(end - begin for *_, begin, end in plan)
    command = ("env", f"PYTHONPATH={PYTHONPATH}", sys.executable, HERE / "nfs_races.py", file)
    told = [json.loads(line) for line in machine.run(*command, timeout=300 + 60 * count)]
    assert len(told) == count
    for kind, number in Counter(race["kind"] for race in told).items():
        print(f"{number} of {kind}, {sum(r['seconds'] for r in told if r['kind'] == kind) / number:.1f} s each")
    return told


def judge(told, tally):
    """Counts the races, and those that went as they must."""
    waits = sorted(wait for race in told for wait in race.get("waited", ()))
    if waits:
        print(f"refused after {waits[len(waits) // 2]:.2f} s, at most {waits[-1]:.2f} s")
    bad = [race for race in told if not race["good"]]
    tally("NFS races", len(told) - len(bad), len(told), lost=sum(race["lost"] for race in told))
    print(*bad, sep="\n")
    assert not bad
    assert not waits or waits[-1] < 5  # in emulation, ten and more times as slow


@pytest.mark.parametrize("version", ["vers=3", "vers=4.2"])
def test_two_hosts(machine, tally, trials, version):
    plan = [(version, "without_the_lock", 0, 1)]
    for i, cache in enumerate(CACHES):
        for kind, full in (("start_together", 8), ("two_shards", 2), ("killed", 3), ("read_meanwhile", 1)):
            number = trials(full, 1)
            plan.append((f"{version},lookupcache={cache}", kind, i * number, (i + 1) * number))
    proof, *told = races(machine, *plan)
    judge(told, tally)
    assert proof["good"], proof  # without the lock two writers do mix their lines, or write each of them twice


@pytest.mark.parametrize("version", ["vers=3", "vers=4.0", "vers=4.2"])
def test_lines_are_slow_or_cut_and_the_server_restarts(machine, tally, trials, version):
    kinds = ["killed_on_a_slow_line", "server_restarts"]
    if version != "vers=3":  # which never forgets a lock before its host is back
        kinds.append("cut_off")
    judge(races(machine, *((version, kind, 0, trials(2, 1)) for kind in kinds)), tally)


def test_where_there_are_no_locks_between_hosts_a_name_stands_in(machine, tally, trials):
    plan = [("vers=3", "no_daemon_for_locks", 0, trials(2, 1))]
    plan += [("vers=3,nolock", kind, 0, trials(3, 1)) for kind in ("start_together", "killed_under_a_name")]
    judge(races(machine, *plan), tally)
