"""A small virtual machine, for tests that need a kernel of their own: file systems and daemons that this one has not.

QEMU runs Debian's kernel in emulation, so no right to virtualize is needed. The guest's root is this machine's, read
only, below a layer in memory: the same Python and the same harness run there, and nothing of what they write stays.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

PACKAGES = ("nfs-kernel-server", "busybox-static")  # unpacked over the guest's root, never installed
FIRST = ("virtio_pci", "9pnet_virtio", "9p", "overlay")  # modules of the kernel that reach the root
LIMIT = 600  # seconds for what builds it

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
for m in {first}; do modprobe $m || echo no module $m; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 root /host
mount -t tmpfs -o size=75% over /over
mkdir /over/upper /over/work
cp -a /host{folder}/packages /over
mount -t overlay -o lowerdir=/over/packages:/host,upperdir=/over/upper,workdir=/over/work overlay /root
cd /root
mount -t proc proc proc
mount -t sysfs sys sys
mount -t devtmpfs dev dev
mkdir -p dev/shm lib/modules
mount -t tmpfs shm dev/shm
mount -t tmpfs run run
ln -s {folder}/kernel/lib/modules/{version} lib/modules/
ln -sf /usr/bin/busybox usr/sbin/modprobe
exec switch_root /root /bin/sh {folder}/start
"""
START = """export PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd {folder}
sh ./command > /dev/ttyS1 < /dev/null
echo "exit $?" > /dev/ttyS1
busybox poweroff -f
"""


class Missing(Exception):
    """What this machine lacks for a virtual one."""


def call(*command, **options):
    options = {"capture_output": True, "timeout": LIMIT, **options}
    return subprocess.run([*map(str, command)], check=True, **options).stdout


class Machine:
    """Built once in a folder, of downloaded packages. `run` starts it, runs one command and turns it off."""

    def __init__(self, folder: Path):
        self.folder = folder
        if os.geteuid():
            raise Missing("the guest reads the root of this machine: it needs root")
        for tool, package in (("qemu-system-x86_64", "qemu-system-x86"), ("apt-get", "apt"), ("setpriv", "util-linux")):
            if shutil.which(tool) is None:
                raise Missing(f"{tool} is missing: Debian's {package}")
        try:
            self._unpack()
        except (subprocess.SubprocessError, StopIteration) as e:
            said = getattr(e, "stderr", None) or b""
            raise Missing(f"Debian's packages cannot be had: {said.decode()[-300:] or e}") from e
        self._pack()

    def _unpack(self):
        """The newest kernel in `kernel`, with its list of modules; the rest in `packages`."""
        debs, packages, kernel = (self.folder / name for name in ("debs", "packages", "kernel"))
        (debs / "archives" / "partial").mkdir(parents=True)
        anyone = ("-o", "APT::Sandbox::User=root")
        depends = call("apt-cache", "depends", "linux-image-amd64").decode()
        name = next(iter(re.findall(r"linux-image-\d\S*-amd64", depends)))
        call("apt-get", "download", *anyone, name, cwd=debs)
        call("dpkg-deb", "-x", next(debs.glob("*.deb")), kernel)
        quietly = ("-qq", "-y", "--no-install-recommends", "--download-only", "--reinstall")
        call("apt-get", "install", *quietly, *anyone, "-o", f"Dir::Cache={debs}", *PACKAGES)
        for deb in (debs / "archives").glob("*.deb"):
            call("dpkg-deb", "-x", deb, packages)
        for old in ("bin", "sbin", "lib"):  # links in the root: a folder of that name would hide them
            if (packages / old).exists():
                shutil.copytree(packages / old, packages / "usr" / old, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(packages / old)
        shutil.rmtree(debs)
        self.busybox = packages / "usr/bin/busybox"
        self.version = next((kernel / "lib/modules").iterdir()).name
        call(self.busybox, "depmod", "-b", kernel, self.version)

    def _pack(self):
        """`first.cpio`: what the kernel starts with, to reach the root."""
        first, modules = self.folder / "first", Path("lib/modules") / self.version
        for name in ("bin", "proc", "host", "over", "root", "lib"):
            (first / name).mkdir(parents=True)
        shutil.copy(self.busybox, first / "bin")
        source = self.folder / "kernel" / modules
        needed = dict(line.split(":") for line in (source / "modules.dep").read_text().splitlines())
        for path, below in needed.items():
            if Path(path).stem in FIRST:
                for name in (path, *below.split()):
                    (first / modules / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source / name, first / modules / name)
        shutil.copy(source / "modules.dep", first / modules)
        (first / "init").write_text(INIT.format(folder=self.folder, first=" ".join(FIRST), version=self.version))
        (first / "init").chmod(0o755)
        (self.folder / "start").write_text(START.format(folder=self.folder))
        names = "\n".join(str(path.relative_to(first)) for path in sorted(first.rglob("*")))
        packed = call(self.busybox, "cpio", "-o", "-H", "newc", cwd=first, input=names.encode())
        (self.folder / "first.cpio").write_bytes(packed)

    def run(self, *command, timeout: int) -> list[str]:
        """Runs a command in a guest of its own; gives the lines that it printed. What it and the kernel complain of
        is in the file `console`."""
        (self.folder / "command").write_text(shlex.join(map(str, command)) + "\n")
        output, console = self.folder / "output", self.folder / "console"
        kernel = self.folder / f"kernel/boot/vmlinuz-{self.version}"
        qemu = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"]
        qemu += ["-smp", "2", "-m", "2048", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        qemu += ["-kernel", kernel, "-initrd", self.folder / "first.cpio", "-append", "console=ttyS0 panic=-1 quiet"]
        qemu += ["-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap"]
        qemu += ["-serial", f"file:{console}", "-serial", f"file:{output}"]
        for file in (output, console):
            file.unlink(missing_ok=True)
        try:
            said = subprocess.run([*map(str, qemu)], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
            ended = said.stderr.decode()[-500:]
        except subprocess.TimeoutExpired:
            ended = f"stopped after {timeout} s"
        lines, complaints = (
            file.read_text(errors="replace").splitlines() if file.exists() else [] for file in (output, console)
        )
        assert lines and lines[-1] == "exit 0", "\n".join((*lines[-3:], *complaints[-30:], ended))
        return lines[:-1]
