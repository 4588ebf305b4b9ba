"""A Slurm cluster on this machine: a controller and two nodes, each with a host name and processes of its own.

Each daemon is the first process of its own PID namespace: when it is killed, all that ran there is gone, as when a
machine dies. Their config, keys, logs and sockets are in one folder; they listen on 127.0.0.1 alone. And a suite that
takes its time, which the tasks name by this file.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "survival"))  # named as a file, there is no test run

from faults import Journal

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "unshare": "util-linux",
}
UNITS = 32
NODES = ("node-a", "node-b")
KILL_WAIT = 5  # seconds between the signal that asks and the one that kills, at a limit or a preemption

CONFIG = """
ClusterName=nightly
SlurmctldHost=head(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=debug
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdDebug=debug
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=6
KillWait={wait}
JobFileAppend=1
GresTypes=gpu
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1
PartitionName=graced Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime={wait}
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10
"""


def missing() -> str:
    """What a cluster lacks here; empty when nothing."""
    os.environ["PATH"] += ":/usr/sbin"
    lacks = sorted({package for name, package in PROGRAMS.items() if shutil.which(name) is None})
    if lacks:
        return f"apt-get install {' '.join(lacks)}"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


@dataclass(frozen=True)
class Slow(Journal):
    """Journal whose units take as many seconds as the file `pause` says: that is no part of what the run is."""

    num: int = 2 * UNITS
    journal: str = "journal"
    name = "slow"

    def run(self, unit, model, ctx):
        for part in super().run(unit, model, ctx):
            time.sleep(float(Path("pause").read_text()))
            yield part


class Cluster:
    """`with Cluster(folder) as cluster:` it is up, and both nodes idle; after it nothing of it runs."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        for name in ("state", "munge", *(f"spool-{n}" for n in NODES)):
            (folder / name).mkdir(parents=True)
        key = folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        (folder / "hosts").write_text(f"127.0.0.1 localhost head {' '.join(NODES)}\n")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")  # two that nobody looks at
        config = CONFIG.format(folder=folder, ports=_free_ports(3), nodes=NODES, wait=KILL_WAIT)
        (folder / "slurm.conf").write_text(config)
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self):
        try:
            munge, m = ["munged", "--foreground", "--force"], self.folder / "munge"
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            self._start("munge", [*munge, *(f"--{k}={m / v}" for k, v in files.items())])
            wait_for((m / "socket").exists, 20, "munge's socket")
            self._start("head", ["slurmctld", "-D"])
            for node in NODES:
                self.boot(node)
            wait_for(lambda: all(self.state(n) == "idle" for n in NODES), 60, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in list(self.daemons)[::-1]:
            self.crash(name)

    def boot(self, node):
        """Starts a node, also one that was crashed."""
        self._start(node, ["slurmd", "-D", "-N", node])

    def crash(self, name):
        """All processes of a machine are gone, at once."""
        process = self.daemons.pop(name)
        process.kill()
        process.wait()

    def _start(self, name, argv):
        """In namespaces of its own; the shell is their first process, which reaps what others leave."""
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && { "$@" & wait; }'
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [*own, "sh", "-c", script, name, str(self.folder / "hosts"), *argv],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    # -- what a user does and sees

    def run(self, *argv, **more) -> str:
        done = subprocess.run(argv, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60, **more)
        if done.returncode:
            raise AssertionError(f"{argv}: {done.stderr}")
        return done.stdout

    def state(self, node) -> str:
        """`idle`, `mix`, `alloc`, `down`; with a `*` where it does not answer."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            return self.run("sinfo", "-h", "-p", "low", "-n", node, "-o", "%t").strip()
        return ""

    def members(self, job) -> dict[int, dict[str, str]]:
        """Of an array, what `scontrol` says of each member that has begun."""
        said = self.run("scontrol", "--oneliner", "show", "job", str(job))
        jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in said.splitlines()]
        return {int(j["ArrayTaskId"]): j for j in jobs if j["ArrayTaskId"].isdigit()}

    def kill(self, job) -> None:
        """SIGKILL for all processes of a job, but not for Slurm's own above them."""
        mine = {f"SLURM_CONF={self.env['SLURM_CONF']}", f"SLURM_JOB_ID={job}"}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mine <= set(path.read_text(errors="replace").split("\0")):
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def warned(self) -> int:
        """How often a job was told before its time limit."""
        return (self.folder / "slurmctld.log").read_text().count("warning signal")

    def exits(self) -> list[str]:
        """How each script ended, in the order of the nodes' logs: an exit code, or `signal N`."""
        text = "".join((self.folder / f"{n}.log").read_text() for n in NODES if (self.folder / f"{n}.log").exists())
        found = re.findall(r"\.batch\] task 0 \(\d+\) exited(?: with exit code (\d+)|\. Killed by signal (\d+))", text)
        return [code or f"signal {number}" for code, number in found]


def wait_for(condition, seconds, what):
    """Until it holds; an AssertionError that says `what` was waited for when it does not."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"no {what} within {seconds} s"
        time.sleep(0.1)


def _free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
