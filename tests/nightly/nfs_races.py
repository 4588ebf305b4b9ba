"""Runs in the virtual machine: a server of NFS and two clients, which race for one run. Prints a JSON object a line.

The clients have a network, a host name and mounts of their own (namespaces), so that the kernel keeps for each a client
id, a lock manager and caches of its own, as it does on two machines. The server exports ext4.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import faults
from test_writers import gates

from bench import Store, door
from bench.records import Damage, read_lines, record_line
from bench.types import Error

DISK = Path("/srv/disk")  # the server's own view
STORE = Path("/mnt/disk")  # the clients'
MEGABYTES = 256
GRACE = 10  # seconds in which only old locks are given out after the server's start; also the length of a lease
NAMESPACES = ("uts", "net", "mnt")


def call(*command):
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.returncode} {done.stdout} {done.stderr}")
    return done.stdout


class Server:
    """nfsd over an ext4 disk in memory, with rpcbind, mountd and, for the locks of v3, statd."""

    address = "10.0.0.1"

    def __init__(self):
        call("modprobe", "-a", "ext4", "nfsd", "nfsv3", "nfsv4", "veth")
        call("modprobe", "brd", "rd_nr=1", f"rd_size={MEGABYTES << 10}")
        call("hostname", "server")
        with open("/etc/passwd", "a") as file:
            file.write("_rpc:x:64990:65534::/run/rpcbind:/usr/sbin/nologin\n")  # as rpcbind's package makes it
        hosts = "127.0.0.1 localhost\n10.0.0.1 server\n10.0.1.2 alpha\n10.0.2.2 beta\n"
        Path("/etc/hosts").write_text(hosts)
        Path("/etc/exports").write_text(f"{DISK} *(rw,sync,no_root_squash,no_subtree_check,fsid=0)\n")
        call("ip", "link", "set", "lo", "up")
        call("ip", "address", "add", f"{self.address}/32", "dev", "lo")
        call("mkfs.ext4", "-q", "/dev/ram0")
        DISK.mkdir(parents=True)
        STORE.mkdir(parents=True)
        call("mount", "/dev/ram0", DISK)
        call("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
        daemons_of_locks()
        for name in ("gracetime", "leasetime"):
            Path(f"/proc/fs/nfsd/nfsv4{name}").write_text(str(GRACE))
        Path("/proc/sys/fs/nfs/nlm_grace_period").write_text(str(GRACE))
        call("exportfs", "-ra")
        call("rpc.nfsd", 8)
        call("rpc.mountd")

    def restart(self, pause=1):
        """Every lock and every open file is forgotten; the clients claim them again. `sm-notify` tells those of v3."""
        call("rpc.nfsd", 0)
        os.kill(int(Path("/run/rpc.statd.pid").read_text()), signal.SIGTERM)
        time.sleep(pause)
        call("rpc.statd", "--no-notify")
        call("rpc.nfsd", 8)
        call("sm-notify", "-f")


def daemons_of_locks():
    Path("/var/lib/nfs/sm").mkdir(parents=True, exist_ok=True)
    Path("/var/lib/nfs/sm.bak").mkdir(parents=True, exist_ok=True)
    call("rpcbind", "-w")
    call("rpc.statd", "--no-notify")


class Client:
    """A host of its own, as far as NFS can tell."""

    def __init__(self, name, number):
        self.name = name
        flags = [f"--{n}" for n in NAMESPACES]
        flags[-1] = "--mount"
        self.process = subprocess.Popen(["unshare", *flags, "--propagation", "private", "sleep", "1000000"])
        while not Path(f"/proc/{self.process.pid}/comm").read_text().startswith("sleep"):
            time.sleep(0.05)
        self.spaces = [os.open(f"/proc/{self.process.pid}/ns/{n}", os.O_RDONLY) for n in NAMESPACES]
        link, here, there = f"to-{name}", f"10.0.{number}.1", f"10.0.{number}.2"
        call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.process.pid)
        call("ip", "address", "add", f"{here}/24", "dev", link)
        call("ip", "link", "set", link, "up")
        self.link = link

        def settle():
            call("hostname", name)
            call("ip", "link", "set", "lo", "up")
            call("ip", "address", "add", f"{there}/24", "dev", "eth0")
            call("ip", "link", "set", "eth0", "up")
            call("ip", "route", "add", "default", "via", here)
            for folder in ("/run", "/var/lib/nfs"):
                call("mount", "-t", "tmpfs", "tmpfs", folder)
            daemons_of_locks()

        self.do(settle)

    def enter(self):
        libc = ctypes.CDLL(None, use_errno=True)
        for fd in self.spaces:
            if libc.setns(fd, 0):
                raise OSError(ctypes.get_errno(), "setns")

    def start(self, work):
        """As faults.in_child, on this host."""

        def there(ack):
            self.enter()
            return work(ack)

        return faults.in_child(there)

    def do(self, work):
        code, _ = faults.outcome(*self.start(lambda ack: work() and 0))
        if code:
            raise RuntimeError(f"{self.name}: {code}")

    def mount(self, options):
        self.do(lambda: call("mount", "-t", "nfs", "-o", options, source(options), STORE))

    def unmount(self):
        self.do(lambda: call("umount", STORE))


def source(options):
    return f"server:{'/' if 'vers=4' in options else DISK}"


# -- what two hosts do at once


class Calm:
    """What undisturbed runs give: of a small suite, and of one whose records take several writes over the network."""

    def __init__(self):
        self.suite, self.wide = faults.Wordy(num=8), faults.Wordy(num=8, width=300_000)
        self.run, self.wide_run = (faults.measure(f"/dev/shm/{s.width}", s) for s in (self.suite, self.wide))
        self.true, self.wide_true = faults.truth(self.run), faults.truth(self.wide_run)
        self.paused_true = faults.truth(faults.measure("/dev/shm/paused", faults.Wordy(num=8, pause=1.0)))
        self.scores = (self.run.path / "scores.csv").read_bytes()


def begun(store, calm):
    """A run without records, in a store."""
    return Store(store).open(calm.spec, {k: v for k, v in calm.meta.items() if k not in ("format", "spec")})


def save(run, log, record, calm):
    for address in record.blobs.values():
        run.store.put(calm.store.get(address), ".npy")
    log.append(record_line(record))


def writer(client, folder, suite, gate, release, at_once=False, **more):
    """A process on a client that waits at a gate, then measures; with a record saved it waits until it is released."""

    def work(ack):
        if not at_once:
            os.read(gate, 1)

        def hold(key):
            ack(key)
            os.read(release, 1)

        acks = faults.Acks(hold)
        try:
            with timed_lock(ack):
                faults.measure(STORE / folder, suite, acks, **more)
        except Error as e:
            ack(f"refused {e} | {e.hint}")
            return e.exit_code
        return 0

    return client.start(work)


@contextlib.contextmanager
def timed_lock(ack):
    """Tells how long a lock took that was refused."""
    lock = door.lock

    @contextlib.contextmanager
    def timed(path, what):
        begin = time.monotonic()
        try:
            held = lock(path, what)
            held.__enter__()
        except Error:
            ack(f"after {time.monotonic() - begin:.3f}")
            raise
        with contextlib.ExitStack() as stack:
            stack.push(held)
            yield

    door.lock = timed
    try:
        yield
    finally:
        door.lock = lock


def first_of(children):
    """The one that ends first; any, where both write and so wait to be released."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for pid in children:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                return pid
        time.sleep(0.01)
    return next(iter(children))


def wrong_with(folder, true, acked=()):
    """What the server's disk holds of a run: nothing mixed, set aside, lost, changed or written twice. And how many
    acknowledged records are lost."""
    run = faults.the_run(DISK / folder)
    keys, wrong = [], []
    for path in sorted(run.path.glob("units*.jsonl")):
        values, damage = read_lines(path)
        keys += [v["key"] for v in values]
        if damage != Damage():
            wrong.append(f"{path.name}: torn {damage.torn}, bad {len(damage.bad)}")
    wrong += [path.name for path in run.path.glob("*.bad")]
    found = faults.truth(run)
    if found != true:
        wrong.append(f"{len(found)} records for {len(true)}")
    if len(keys) != len(true):
        wrong.append(f"{len(keys)} lines for {len(true)}")
    return wrong, sum(key not in found for key in acked)


def start_together(calm, clients, folder, number):
    """Two hosts start on one shard: one writes, the other names it within a second."""
    if number % 2:  # the run is there already, as another process left it
        clients[number // 2 % 2].do(lambda: faults.measure(STORE / folder, calm.suite, shard="0/2"))
    with gates(2) as ((gate, open_gate), (release, let_go)):
        children = {}
        for client in clients:
            pid, reader = writer(client, folder, calm.suite, gate, release)
            children[pid] = client, reader
        os.write(open_gate, b"gg")
        first = first_of(children)
        os.write(let_go, b"r" * 20)
        (winner,) = children.keys() - {first}
        code, said = faults.outcome(first, children[first][1])
        other, saved = faults.outcome(winner, children[winner][1])
    told = " ".join(text for text in said if text.startswith("refused"))
    named = f"is being written by {children[winner][0].name} pid {winner}" in told
    waited = [float(text.removeprefix("after ")) for text in said if text.startswith("after")]
    wrong, lost = wrong_with(folder, calm.true, saved)
    good = (code, other) == (1, 0) and named and not wrong
    return {"good": good, "lost": lost, "wrong": wrong, "codes": (code, other), "waited": waited, "told": told}


def two_shards(calm, clients, folder, number):
    """Two hosts measure a shard each: all is there, and the scores are those of one."""

    def part(k):
        return lambda ack: faults.measure(STORE / folder, calm.suite, faults.Acks(ack), shard=f"{k}/2") and 0

    ended = [faults.outcome(*child) for child in [client.start(part(k)) for k, client in enumerate(clients)]]
    wrong, lost = wrong_with(folder, calm.true, [k for _, keys in ended for k in keys])
    if (faults.the_run(DISK / folder).path / "scores.csv").read_bytes() != calm.scores:
        wrong.append("other scores")
    codes = [code for code, _ in ended]
    return {"good": codes == [0, 0] and not wrong, "lost": lost, "wrong": wrong, "codes": codes}


class Dying(faults.Disk):
    """The process dies with a record written, whole or half, and not yet made durable."""

    def __init__(self, records, part, before):
        super().__init__()
        self.left, self.part, self.before = records, part, before

    def meet(self, operation, act):
        if operation.kind == "write" and operation.path.endswith(".jsonl"):
            self.left -= 1
            if self.left < 0:
                self.before()
                act(int(len(operation.data) * self.part))
                os.kill(os.getpid(), signal.SIGKILL)
        return act()


def killed(calm, clients, folder, number, before=lambda: None):
    """A holder dies; another host, which waited, takes over at once, and what each saved is there."""
    holder, heir = clients[:: 1 if number % 2 else -1]
    calm_run, records = calm.wide_run, sorted(calm.wide_run.records().values(), key=lambda r: r.unit)
    ready, go = os.pipe()

    def append(ack):
        run = begun(STORE / folder, calm_run)
        with Dying(1 + number % 3, (1.0, 0.5, 0.99)[number // 2 % 3], before).at_work(), run.writer() as log:
            os.write(go, b"r")
            for record in records:
                save(run, log, record, calm_run)
                ack(record.key)

    def inherit(ack):
        os.read(ready, 1)
        run = begun(STORE / folder, calm_run)
        refused = 0
        until = time.monotonic() + 60
        while True:
            try:
                with run.writer(say=lambda text: ack(f"said {text}")) as log:
                    ack(f"refused {refused}")
                    have = run.records()
                    for record in records:
                        if record.key not in have:
                            save(run, log, record, calm_run)
                            ack(record.key)
                return 0
            except Error as e:
                if time.monotonic() > until:
                    ack(f"said {e}")
                    return 1
                refused += 1

    one, other = holder.start(append), heir.start(inherit)
    (code, saved), (other_code, inherited) = faults.outcome(*one), faults.outcome(*other)
    for fd in (ready, go):
        os.close(fd)
    said = [text for text in inherited if " " in text]
    time.sleep(1)  # what the dead one's host still had to write
    wrong, lost = wrong_with(folder, calm.wide_true, [k for k in (*saved, *inherited) if " " not in k])
    good = code == -signal.SIGKILL and other_code == 0 and not wrong and not lost
    return {"good": good, "lost": lost, "wrong": wrong, "codes": (code, other_code), "said": said}


def killed_on_a_slow_line(calm, clients, folder, number):
    """What the dead one had written is still on its way when the other host takes over."""
    slow = ("dev", "eth0", "root", "tbf", "rate", "2mbit", "burst", "16kb", "latency", "20s")
    try:
        return killed(calm, clients, folder, number, lambda: call("tc", "qdisc", "add", *slow))
    finally:
        for client in clients:
            client.do(lambda: subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], stderr=subprocess.DEVNULL))


def read_meanwhile(calm, clients, folder, number):
    """A host reads, and tries to heal, while another appends: it never sees a wrong record and sets nothing aside."""
    scribe, reader = clients[:: 1 if number % 2 else -1]
    records = sorted(calm.run.records().values(), key=lambda r: r.unit)
    ready, go = os.pipe()

    def append(ack):
        run = begun(STORE / folder, calm.run)
        with run.writer() as log:
            for record in records:
                save(run, log, record, calm.run)
                ack(record.key)
                os.write(go, b"r")
                time.sleep(0.2)

    def watch(ack):
        wrong = looks = refused = 0
        os.read(ready, 1)
        run, seen = faults.the_run(STORE / folder), {}
        while len(seen) < len(records) and looks < 200:
            now = faults.truth(run)
            wrong += any(calm.true.get(k) != v for k, v in now.items()) or not seen.keys() <= now.keys()
            seen, looks = now, looks + 1
            if looks % 3 == 0:
                try:
                    with run.writer():
                        wrong += len(seen) < len(records) and len(faults.truth(run)) < len(records)
                except Error:
                    refused += 1
        ack(f"said {looks} looks, {refused} refused, {wrong} wrong")
        return int(wrong > 0 or len(seen) < len(records))

    one, other = scribe.start(append), reader.start(watch)
    (code, saved), (other_code, said) = faults.outcome(*one), faults.outcome(*other)
    for fd in (ready, go):
        os.close(fd)
    wrong, lost = wrong_with(folder, calm.true, saved)
    good = (code, other_code) == (0, 0) and not wrong
    return {"good": good, "lost": lost, "wrong": wrong, "codes": (code, other_code), "said": said}


def server_restarts(calm, clients, folder, number):
    """The server forgets all locks while one host writes and another wants to: still only one does."""
    scribe, other = clients[:: 1 if number % 2 else -1]
    with gates(2) as ((ready, go), (release, let_go)):

        def append(ack):
            def saved(key):
                ack(key)
                os.write(go, b"r")
                os.read(release, 1)

            faults.measure(STORE / folder, calm.suite, faults.Acks(saved))

        one = scribe.start(append)
        os.read(ready, 1)
        server.restart(number % 3)
        two = writer(other, folder, calm.suite, None, release, at_once=True)
        os.write(let_go, b"r")
        os.read(ready, 1)  # a second record is saved with the new server
        other_code, said = faults.outcome(*two)
        os.write(let_go, b"r" * 20)
        code, saved = faults.outcome(*one)
    told = " ".join(text for text in said if " " in text)
    wrong, lost = wrong_with(folder, calm.true, saved)
    good = (code, other_code) == (0, 1) and f"is being written by {scribe.name} pid {one[0]}" in told and not wrong
    return {"good": good, "lost": lost, "wrong": wrong, "codes": (code, other_code), "told": told}


def cut_off(calm, clients, folder, number):
    """The line of a host that writes is down for longer than the server keeps its locks; another takes over then. The
    first notices when it is back, and writes no more."""
    suite = faults.Wordy(num=8, pause=1.0)
    scribe, heir = clients[:: 1 if number % 2 else -1]
    ready, go = os.pipe()

    def append(ack):
        def saved(key):
            ack(key)
            os.write(go, b"r")

        try:
            faults.measure(STORE / folder, suite, faults.Acks(saved))
        except Error as e:
            ack(f"stopped {e}")
            return e.exit_code

    def inherit(ack):
        until = time.monotonic() + 4 * GRACE
        while True:
            try:
                faults.measure(STORE / folder, suite, faults.Acks(ack))
                return 0
            except Error as e:
                if time.monotonic() > until:
                    ack(f"refused {e}")
                    return e.exit_code

    one = scribe.start(append)
    os.read(ready, 1)
    call("ip", "link", "set", scribe.link, "down")
    try:
        two = heir.start(inherit)
        time.sleep(2 * GRACE)
    finally:
        call("ip", "link", "set", scribe.link, "up")
    (code, saved), (other_code, inherited) = faults.outcome(*one), faults.outcome(*two)
    for fd in (ready, go):
        os.close(fd)
    wrong, lost = wrong_with(folder, calm.paused_true, [k for k in (*saved, *inherited) if " " not in k])
    told = [text for text in (*saved, *inherited) if " " in text]
    good = (code, other_code) == (1, 0) and not wrong and not lost
    return {"good": good, "lost": lost, "wrong": wrong, "codes": (code, other_code), "told": told}


def no_daemon_for_locks(calm, clients, folder, number):
    """Without statd NFS v3 has no locks and says so: a file with an exclusive name stands in."""
    for client in clients:
        client.do(lambda: os.kill(int(Path("/run/rpc.statd.pid").read_text()), signal.SIGKILL))
    try:
        told = start_together(calm, clients, folder, number)
    finally:
        for client in clients:
            client.do(lambda: call("rpc.statd", "--no-notify"))
    told["good"] = told["good"] and "units.exclusive" in told["told"]
    return told


def killed_under_a_name(calm, clients, folder, number):
    """Where only the name of a file is the lock, another host cannot know that its holder died: it says what to remove.
    A process of the same host takes over."""
    holder, other = clients[:: 1 if number % 2 else -1]
    with gates(2) as ((gate, open_gate), (release, _)):
        pid, reader = writer(holder, folder, calm.suite, gate, release)
        os.write(open_gate, b"gg")
        saved = [os.read(reader, 100).decode().strip()]  # one record: then it waits
        os.kill(pid, signal.SIGKILL)
        code, _ = faults.outcome(pid, reader)
        refused, said = faults.outcome(*writer(other, folder, calm.suite, gate, release))
        heir, _ = faults.outcome(*holder.start(lambda ack: faults.measure(STORE / folder, calm.suite) and 0))
    told = " ".join(text for text in said if " " in text)
    wrong, lost = wrong_with(folder, calm.true, saved)
    named = f"is being written by {holder.name} pid {pid}" in told and "units.exclusive" in told
    good = (code, refused, heir) == (-signal.SIGKILL, 1, 0) and named and not wrong
    return {"good": good, "lost": lost, "wrong": wrong, "codes": (code, refused, heir), "told": told}


def without_the_lock(calm, clients, folder, number):
    """The same as start_together, but each takes the lock for its own: what the lock is for."""
    import fcntl

    flock, fcntl.flock = fcntl.flock, lambda fd, how: None
    by_name, door._lock_by_name = door._lock_by_name, lambda path, what, owner: None
    try:
        with gates(2) as ((gate, open_gate), (release, let_go)):
            children = [writer(c, folder, calm.suite, gate, release) for c in clients]
            os.write(open_gate, b"gg")
            for _, reader in children:  # both are at work
                os.read(reader, 100)
            os.write(let_go, b"r" * 40)
            ended = [faults.outcome(*child) for child in children]
    finally:
        fcntl.flock, door._lock_by_name = flock, by_name
    wrong, _ = wrong_with(folder, calm.true)
    saved = 2 + sum(len(keys) for _, keys in ended)
    if saved > len(faults.lines_of(faults.the_run(DISK / folder))):  # one over the other, maybe of the same length
        wrong.append(f"lines overwritten: {saved} were saved")
    return {"good": bool(wrong), "lost": 0, "wrong": wrong, "codes": [code for code, _ in ended]}


KINDS = {
    kind.__name__: kind
    for kind in (
        start_together,
        two_shards,
        killed,
        killed_on_a_slow_line,
        read_meanwhile,
        server_restarts,
        cut_off,
        no_daemon_for_locks,
        killed_under_a_name,
        without_the_lock,
    )
}


def race(calm, clients, options, kind, number):
    """One trial, told as a line of JSON."""
    folder = f"{kind}-{number}-{options}"
    begin = time.monotonic()
    try:
        told = KINDS[kind](calm, clients, folder, number)
    except Exception as e:
        told = {"good": False, "lost": 0, "wrong": [repr(e), traceback.format_exc()[-1500:]]}
    say(kind=kind, options=options, number=number, seconds=round(time.monotonic() - begin, 2), **told)
    shutil.rmtree(DISK / folder, ignore_errors=True)


def say(**what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    server = Server()
    clients = [Client("alpha", 1), Client("beta", 2)]
    faults.execution._provenance = dict
    calm = Calm()
    for options, kind, first, end in plan:
        for client in clients:
            client.mount(options)
        for number in range(first, end):
            race(calm, clients, options, kind, number)
        for client in clients:
            client.unmount()
