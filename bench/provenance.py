"""What made a run: code, packages, machine and numerical flags, for `run.json`. Imports nothing heavy, never fails."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.types import Json

PACKAGES = [
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pandas",
    "pillow",
    "scikit-image",
    "scikit-learn",
    "safetensors",
    "torchmetrics",
    "clean-fid",
    "torch-fidelity",
    "lpips",
    "open_clip_torch",
    "transformers",
    "diffusers",
    "ray",
]
ENVIRONMENT = [
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTHONHASHSEED",
]


def collect() -> dict[str, Json]:
    """`git` of the checkout that holds bench, `git_folder` where the working folder is in another, `packages`,
    `machine`, `flags`; null where something is not known. What torch knows is told only once torch is imported."""
    package, folder = Path(__file__).resolve().parent, _working_folder()
    harness = repository(package) if _git(package, "ls-files", "--", "__init__.py") else None
    around = repository(folder) if folder else None
    if around and harness and around["root"] == harness["root"]:
        around = None
    for found in (harness, around):
        if found:
            del found["root"]  # a path of this machine, which a page should not show
    return {
        "git": harness,
        "git_folder": around,
        "packages": packages(),
        "machine": machine(),
        "flags": flags(),
    }


def repository(folder: Path) -> dict[str, Any] | None:
    """root, commit, dirty, origin without credentials, and a digest of the changes since the commit when dirty; None
    outside of a repository, before its first commit, or where git is absent or takes more than two seconds."""
    found = _git(folder, "rev-parse", "--show-toplevel", "HEAD")
    if not found:
        return None
    root, commit = found.decode("utf-8", "surrogateescape").splitlines()
    status = _git(Path(root), "status", "--porcelain")
    changes = _git(Path(root), "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary") if status else b""
    origin = _git(Path(root), "config", "--get", "remote.origin.url")
    known = status is not None and changes is not None
    return {
        "root": root,
        "commit": commit,
        "dirty": bool(status) if status is not None else None,
        "diff": "sha256:" + hashlib.sha256(status + b"\0" + changes).hexdigest() if known and status else None,
        "origin": without_credentials(origin.decode("utf-8", "replace").strip()) if origin else None,
    }


def without_credentials(url: str) -> str:
    """A remote without user, password, query and fragment: `host:path` for the short form of ssh; of a folder of this
    machine its name alone, since where a user keeps it is nobody's business."""
    if url.startswith(("/", ".", "~", "file:")) or re.match(r"[A-Za-z]:[\\/]", url):
        return re.split(r"[\\/]", url.rstrip("\\/."))[-1]
    match = re.match(r"([A-Za-z][\w.+-]*://)?(?:[^/]*@)?([^?#]*)", url)
    return (match[1] or "") + match[2] if match else ""


def packages() -> dict[str, str | None]:
    """Installed versions by name, read without importing; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in ("touchstone-bench", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Json]:
    """platform, python, cpu, cores this process may use, GPU names, driver and CUDA versions."""
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "driver": _first_match("/proc/driver/nvidia/version", r"Kernel Module\D*([\d.]+)"),
        "cuda": torch.version.cuda if torch is not None else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def flags() -> dict[str, Json]:
    """What changes numbers without being asked: threads, TF32, determinism, and the environment that sets them."""
    found: dict[str, Json] = {name: os.environ.get(name) for name in ENVIRONMENT}
    torch = sys.modules.get("torch")
    if torch is not None:
        found |= {
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_float32_precision": _cudnn_precision(torch),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    return found


def _cudnn_precision(torch: Any) -> str:
    """torch 2.9 replaced `allow_tf32`, and forbids to read it once the new name was set."""
    convolution = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(convolution, "fp32_precision"):
        return str(convolution.fp32_precision)
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says, or None. Takes no lock and runs no hook, monitor or diff program that the repository names."""
    safe = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.pager=cat"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *safe, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=2,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _first_match(path: str, pattern: str) -> str | None:
    try:
        with open(path, errors="replace") as file:
            for line in file:
                match = re.search(pattern, line)
                if match:
                    return match[1].strip()
    except OSError:
        pass
    return None
