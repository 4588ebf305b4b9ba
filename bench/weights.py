"""Weights that strangers wrote: read without running anything that they contain.

safetensors files are checked before the library sees them. A pickle is refused unless the user allows it; then it is
read with `weights_only=True` in a child process with limits, which hands back safetensors. A folder is looked through
before any library that might follow its configuration sees it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.identity import hub_id
from bench.types import Error

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = Path(__file__).parent / "mini" / "checkpoints"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".exe")
CONVERT = "convert it once, where you trust it: safetensors.torch.save_file(state_dict, 'model.safetensors')"

MAX_HEADER = 100_000_000  # bytes; the limit of the format
MAX_JSON = 100_000_000  # bytes; tokenizers reach tens of millions

# Bits per value; types below a byte have no agreed layout in torch and are refused.
DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
DTYPE_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
DTYPE_BITS |= {"U64": 64, "I64": 64, "F64": 64, "C64": 64}

# Keys of a configuration that name code, without case, hyphens and underscores.
CODE_KEYS = {"automap", "custompipeline", "custompipelines", "trustremotecode", "remotecode", "customcode"}
CODE_KEYS |= {"coderevision", "customrevision", "customgenerate", "codepaths", "pymodule", "importpath"}
ATTENTION = {
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
}  # others may name a hub kernel


# -- where weights are


def resolve(weights: str) -> str:
    """The path behind a name: a bare name that is no path here means an embedded checkpoint, as in `mini-ae-16`.

    Paths, hub ids and names of nothing come back unchanged; whoever opens them says what is missing.
    """
    text = str(weights)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", text) and not Path(text).exists() and (EMBEDDED / text).exists():
        return str(EMBEDDED / text)
    return text


def open_folder(weights: str) -> Path:
    """A folder of weights and configuration, looked through and fit to be given to a library.

    A hub id is found among what was fetched before (the Hugging Face cache); nothing is downloaded. Raises Error where
    the folder is missing, with the line that fetches it, or where `check_folder` refuses it.
    """
    match = hub_id(str(weights))
    if match is None:
        folder = Path(os.path.expanduser(resolve(weights)))
        if not folder.is_dir():
            hint = "give a folder, hf:owner/name@commit, or an embedded checkpoint"
            if EMBEDDED.is_dir() and (names := sorted(p.name for p in EMBEDDED.iterdir() if p.is_dir())):
                hint += f": {', '.join(names)}"
            raise Error(f"weights {weights} are not a folder", hint=hint)
        check_folder(folder)
        return folder
    cache = _hub_cache() / f"models--{match['repo'].replace('/', '--')}"
    found = sorted((cache / "snapshots").glob(match["revision"] + "*")) if cache.is_dir() else []
    folder = found[0] / (match["subfolder"] or "") if len(found) == 1 else None
    if folder is None or not folder.is_dir() or not folder.resolve().is_relative_to(found[0].resolve()):
        raise Error(f"weights {weights} are not on this machine", hint=f"bench data fetch {weights}")
    check_folder(folder, within=cache)
    return folder


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


# -- tensors


def load_weights(weights: str | Path, pickle: str = "refuse", expected: str | None = None) -> dict[str, Tensor]:
    """Named tensors on the CPU from a file, or from a folder that holds one safetensors file.

    `pickle="allow"` also reads .pt, .pth, .bin and .ckpt: plain tensors only, in a child process. `expected` is the
    SHA-256 (64 hex digits) that the bytes read must have. Raises Error naming the file and the cause.
    """
    path = Path(os.path.expanduser(resolve(str(weights))))
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise Error(f"weights folder {path} holds {len(found)} safetensors files", hint="name one file")
        path = found[0]
    if not path.is_file():
        raise Error(f"weights {weights} do not exist or are not a file")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _load_safetensors(path, expected)
    if suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise Error(f"weights {path}: format {suffix or 'without a suffix'} is not read", hint=CONVERT)
    if pickle != "allow":
        raise Error(
            f"weights {path} are a pickle, which can run code when it is read",
            hint=f"{CONVERT}; or allow this one: -m pickle=allow",
        )
    return _load_pickle(path, expected)


def _load_safetensors(path: Path, expected: str | None) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        data = path.read_bytes()  # read once: what is checked and hashed is what is loaded
    except OSError as e:
        raise Error(f"weights {path} cannot be read: {e.strerror}") from None
    _expect(path, hashlib.sha256(data).hexdigest(), expected)
    size = int.from_bytes(data[:8], "little")
    check_header(data[8 : 8 + size], size, len(data), path)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as e:
        raise Error(f"weights {path} are not valid safetensors: {e}") from None


def check_header(header: bytes, size: int, file_size: int, path: Path) -> None:
    """Refuses a safetensors header that the format forbids, before a library reads it.

    `size` is what the first eight bytes say, `header` at most that many bytes after them. Checked: length, UTF-8 and
    JSON, duplicate keys (which the library accepts, the last one winning), types, sizes, holes, overlaps and the tail.
    """

    def refuse(cause: str) -> Error:
        return Error(f"weights {path} are not valid safetensors: {cause}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    if file_size < 8 or size > MAX_HEADER or size > file_size - 8 or len(header) != size:
        raise refuse(f"a header of {size} bytes in a file of {file_size}")
    if not header.startswith(b"{"):
        raise refuse("the header is not a JSON object")
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise refuse(f"the header is not JSON: {e}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("__metadata__ must map text to text")

    spans = []
    for name, entry in entries.items():
        label = repr(name[:80])
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise refuse(f"{label} must have dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise refuse(f"{label} has the unknown dtype {str(dtype)[:20]!r}")
        if not _counts(shape):
            raise refuse(f"{label} has a shape that is not a list of sizes")
        if not _counts(offsets) or len(offsets) != 2:
            raise refuse(f"{label} has data_offsets that are not [begin, end]")
        count = DTYPE_BITS[dtype] // 8
        for n in shape:
            count *= n
            if count >= 2**63:
                raise refuse(f"the size of {label} overflows")
        if offsets[1] - offsets[0] != count:
            raise refuse(f"{label} needs {count} bytes and has {offsets[1] - offsets[0]}")
        spans.append((offsets[0], offsets[1], label))

    end = 0
    for begin, stop, label in sorted(spans):
        if begin != end:
            raise refuse(f"{label} leaves a hole or overlaps its neighbour at byte {min(begin, end)}")
        end = stop
    if end != file_size - 8 - size:
        raise refuse(f"the tensors end at byte {end}, the data at byte {file_size - 8 - size}")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _expect(path: Path, found: str, expected: str | None) -> None:
    if expected is not None and found != expected.lower().removeprefix("sha256:"):
        raise Error(
            f"weights {path} have the SHA-256 {found[:16]}…, not {expected.removeprefix('sha256:')[:16]}…",
            hint="fetch the file again, or correct the digest",
        )


# -- pickles, only where the user allows them


def _load_pickle(path: Path, expected: str | None) -> dict[str, Tensor]:
    """Reads a pickle of tensors in a child process that is limited in memory, time and file size."""
    import torch

    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 6):
        raise Error(
            f"torch {torch.__version__} can run code from a pickle even with weights_only=True (CVE-2025-32434)",
            hint="pip install 'torch>=2.6'",
        )
    seconds = 600 + path.stat().st_size // 1_000_000  # of the clock, on a busy machine; the child counts its own
    with tempfile.TemporaryDirectory(prefix="bench-weights-") as folder:
        target = Path(folder) / "weights.safetensors"
        command = [sys.executable, "-I", __file__, str(path.resolve()), str(target)]
        try:
            child = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads would count against the memory limit
            )
        except subprocess.TimeoutExpired:
            raise Error(f"weights {path} could not be read within {seconds} s", hint=CONVERT) from None
        reply = child.stdout.decode("utf-8", "replace").strip()
        if child.returncode != 0 or not target.is_file():
            cause = reply if child.returncode == 3 else f"the reader stopped with exit status {child.returncode}"
            if child.returncode == -signal.SIGXCPU:
                cause = "it needs far more time than its size"
            raise Error(f"weights {path} are refused: {cause}", hint=CONVERT)
        _expect(path, reply, expected)
        return _load_safetensors(target, None)


def _unpickle(source: str, target: str) -> int:
    """The child: prints the SHA-256 of what it read and returns 0, or prints a cause and returns 3."""
    import pickle
    import resource
    import time
    from io import BytesIO

    import safetensors.torch
    import torch

    data = Path(source).read_bytes()
    budget = 5 * len(data) + 500_000_000  # the tensors, a copy to make them contiguous, and the file written
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + budget,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * len(data) + 10_000_000,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(time.process_time()) + 10 + len(data) // 10_000_000
    resource.setrlimit(
        resource.RLIMIT_CPU, (seconds, seconds + 5)
    )  # SIGXCPU tells which limit it was, SIGKILL would not
    try:
        found = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        wanted = re.search(r"GLOBAL ([\w.]{1,80})", str(e))
        print(f"it asks for {wanted[1]}" if wanted else "it holds more than tensors")
        return 3
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        EOFError,
        OSError,
        MemoryError,
    ) as e:
        greedy = isinstance(e, MemoryError) or "allocate" in str(e)
        print("it needs far more memory than its size" if greedy else f"it cannot be read ({type(e).__name__})")
        return 3
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        print("it is not a mapping of names to tensors")
        return 3
    tensors = {}
    for name, tensor in found.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not isinstance(name, str) or not plain or tensor.is_quantized:
            print(f"the entry {str(name)[:80]!a} is not a plain tensor")
            return 3
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    safetensors.torch.save_file(tensors, target)
    print(hashlib.sha256(data).hexdigest())
    return 0


# -- folders


def check_folder(folder: str | Path, within: str | Path | None = None) -> None:
    """Refuses a folder of weights that carries code, or from which a library might load some.

    Refused: code and pickled weights by name, links that lead out of `within` (default: the folder itself), damaged
    safetensors headers, and configurations that name code: `auto_map`, `custom_pipeline` and the like in any spelling
    at any depth, a `_class_name` that diffusers does not have, a component from a foreign library. Raises Error naming
    the file and the cause.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Error(f"weights {folder} are not a folder")
    root = Path(within or folder).resolve()

    def unreadable(error: OSError) -> None:
        raise Error(f"weights {error.filename} cannot be read: {error.strerror}") from None

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders.sort()
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise Error(f"weights {os.path.join(parent, name)}: a link to a folder is refused", hint="copy it")
        for name in sorted(files):
            _check_file(Path(parent) / name, root)


def _check_file(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise Error(f"weights {path}: the link leads out of the folder", hint="put the file itself there")
    try:
        info = path.stat()
    except OSError as e:
        raise Error(f"weights {path} cannot be read: {e.strerror}") from None
    if not stat.S_ISREG(info.st_mode):
        raise Error(f"weights {path} is not a regular file")
    suffix = path.suffix.lower()
    if suffix in CODE:
        raise Error(f"weights {path}: code beside weights is refused", hint="remove the file if the model needs none")
    if suffix in PICKLES:
        raise Error(
            f"weights {path} can run code when it is read, and a library might read it",
            hint=f"{CONVERT}; then remove {path.name}",
        )
    if suffix == ".json" and info.st_size > MAX_JSON:
        raise Error(f"weights {path}: {info.st_size} bytes of JSON are more than {MAX_JSON}")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            rest = b""
            if suffix == ".safetensors" and size <= MAX_HEADER:
                rest = file.read(size)
            elif suffix == ".json":
                rest = file.read()
    except OSError as e:
        raise Error(f"weights {path} cannot be read: {e.strerror}") from None
    if suffix == ".safetensors":
        check_header(rest, size, info.st_size, path)
    elif re.match(rb"\x80[\x02-\x05]", start):
        raise Error(f"weights {path} are a pickle under another name", hint=CONVERT)
    elif suffix == ".json":
        _check_config(path, start + rest)


def _check_config(path: Path, data: bytes) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        config = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise Error(f"weights {path} cannot be read as JSON: {e}") from None
    vocabulary = path.name in ("vocab.json", "tokenizer.json")  # there a key may be any word, its value a number
    waiting = [config]
    while waiting:
        value = waiting.pop()
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        for key, inner in value.items() if isinstance(value, dict) else ():
            plain = re.sub(r"[^a-z]", "", key.lower())
            if (plain in CODE_KEYS or key == "_target_") and not (vocabulary and type(inner) is int):
                raise Error(f"weights {path}: {key[:80]!r} names code", hint="remove the key if the model needs none")
            if plain in ("attnimplementation", "attentionimplementation") and inner not in (None, *ATTENTION):
                raise Error(f"weights {path}: {key[:80]} = {str(inner)[:80]!r} may name a kernel to be fetched")
            if key == "_class_name":
                _check_class(path, inner)
    if path.name == "model_index.json":
        _check_pipeline(path, config)
    if path.name.endswith(".index.json") and isinstance(config, dict):
        shards = config.get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
                raise Error(f"weights {path}: shard {str(shard)[:80]!r} is not a safetensors file of this folder")


@cache
def _classes() -> frozenset[str]:
    """The names that diffusers has; listing them takes milliseconds, and a configuration may name a class often."""
    import diffusers

    return frozenset(dir(diffusers))


def _check_class(path: Path, name: Any) -> None:
    import diffusers

    if not isinstance(name, str) or name not in _classes():
        raise Error(
            f"weights {path}: _class_name {str(name)[:80]!r} is not a class of diffusers {diffusers.__version__}",
            hint="a class that a repository brings along is code, and is refused",
        )


def _check_pipeline(path: Path, config: Any) -> None:
    """Components are [library, class]; besides diffusers and transformers, diffusers' own pipeline modules count."""
    import diffusers

    if not isinstance(config, dict):
        raise Error(f"weights {path} must be a JSON object")
    pipelines = Path(diffusers.__file__).parent / "pipelines"
    for name, value in config.items():
        if not isinstance(value, list) or not any(isinstance(part, (str, list, dict)) for part in value):
            continue
        library, cls = value if len(value) == 2 else (None, None)
        if not (isinstance(library, str) and isinstance(cls, str) and re.fullmatch(r"[A-Za-z]\w*", cls)):
            raise Error(f"weights {path}: component {name[:80]!r} must be [library, class]")
        own = re.fullmatch(r"[a-z][a-z0-9_]*", library) and (pipelines / library).is_dir()
        if library not in ("diffusers", "transformers") and not own:
            raise Error(
                f"weights {path}: component {name[:80]!r} comes from the library {library[:80]!r}",
                hint="components of diffusers and transformers are loaded, others are code",
            )


if __name__ == "__main__":
    sys.exit(_unpickle(*sys.argv[1:3]))
