"""Weights that strangers wrote: nothing in them runs, and what is damaged is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as library_load
from safetensors.torch import save, save_file

from bench import weights
from bench.types import Error, UsageError
from bench.weights import check_folder, check_header, load_weights, open_folder, resolve

TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}


@pytest.fixture
def good(tmp_path) -> Path:
    """A folder as diffusers writes it."""
    folder = tmp_path / "good"
    folder.mkdir()
    save_file(TENSORS, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [32, 64]}))
    return folder


# --- safetensors


def test_tensors_come_back_as_they_were_saved(good):
    for named in (good, good / "diffusion_pytorch_model.safetensors", str(good)):
        loaded = load_weights(named)
        assert set(loaded) == {"a", "b"}
        assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in TENSORS.items())


def test_the_bytes_read_must_have_the_expected_digest(good):
    path = good / "diffusion_pytorch_model.safetensors"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(load_weights(path, expected=found)) == set(load_weights(path, expected="sha256:" + found)) == {"a", "b"}
    with pytest.raises(Error, match="SHA-256"):
        load_weights(path, expected="0" * 64)


def strictly_valid(data: bytes) -> bool:
    """The format's rules, written down a second time."""

    def pairs(items):
        keys = [k for k, _ in items]
        if sorted(set(keys)) != sorted(keys):
            raise ValueError
        return dict(items)

    sizes = dict(F64=8, I64=8, U64=8, C64=8, F32=4, I32=4, U32=4, F16=2, BF16=2, I16=2, U16=2, I8=1, U8=1, BOOL=1)
    sizes |= dict(F8_E4M3=1, F8_E5M2=1, F8_E4M3FNUZ=1, F8_E5M2FNUZ=1)
    n = int.from_bytes(data[:8], "little")
    if len(data) < 8 or n > 100_000_000 or 8 + n > len(data) or data[8:9] != b"{":
        return False
    try:
        header = json.loads(data[8 : 8 + n].decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return False
    covered = []
    for name, entry in header.items():
        if name == "__metadata__":
            if type(entry) is not dict or any(type(v) is not str for v in entry.values()):
                return False
            continue
        if type(entry) is not dict or sorted(entry) != ["data_offsets", "dtype", "shape"]:
            return False
        shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        if type(dtype) is not str or dtype not in sizes or type(shape) is not list or type(offsets) is not list:
            return False
        if len(offsets) != 2 or any(type(i) is not int or i < 0 for i in [*shape, *offsets]):
            return False
        if offsets[1] - offsets[0] != math.prod(shape) * sizes[dtype]:
            return False
        covered += range(*offsets)
    return sorted(covered) == list(range(len(data) - 8 - n))


def mutant(data: bytes, rng: random.Random) -> bytes:
    """One damage to a good file: to its bytes, its length, or its header's meaning."""
    n = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + n], data[8 + n :]
    kind = rng.randrange(9)
    if kind == 0:
        i = rng.randrange(8 + n)
        return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]
    if kind == 1:
        return data[: rng.randrange(len(data))]
    if kind == 2:
        return data + bytes(rng.randrange(1, 40))
    if kind == 3:
        return rng.choice([0, 1, n - 1, n + 1, 10**8 + 1, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    entries = json.loads(header)
    name = rng.choice(["a", "b"])
    entry = entries[name]
    if kind == 4:
        entry["shape"] = rng.choice([[2**62, 4], [-2, -3], [6], [3, 2], [2, 3, 0], [], "23", [2.0, 3], [True, 6], None])
    elif kind == 5:
        begin, end = entry["data_offsets"]
        shift = rng.choice([-8, -1, 1, 8, 16])
        entry["data_offsets"] = rng.choice(
            [[begin + shift, end + shift], [begin, end + shift], [end, begin], [begin], 3, [begin, True], [0, 24]]
        )
    elif kind == 6:
        entry["dtype"] = rng.choice(["F64", "U8", "F4", "f32", "", None, "I32", "U64", "C64", 32])
    elif kind == 7:
        twin = rng.choice(['"a"', '"b"', '"\\u0061"', '"__metadata__"', '"c"'])
        text = header.decode().rstrip()[:-1] + f",{twin}:{json.dumps(entry)}}}"
        return len(text).to_bytes(8, "little") + text.encode() + body
    else:
        rng.choice(
            [
                lambda: entries.update(__metadata__=rng.choice([{"x": 1}, [], None, {"x": "y"}])),
                lambda: entry.update(extra=1),
                lambda: entry.pop(rng.choice(["dtype", "shape", "data_offsets"])),
                lambda: entries.update(empty={"dtype": "F32", "shape": [0], "data_offsets": [24, 24]}),
                lambda: entries.pop(name),
            ]
        )()
    text = json.dumps(entries, indent=rng.choice([None, 1]))
    return len(text).to_bytes(8, "little") + text.encode() + body


def test_a_damaged_header_is_refused_and_a_sound_one_is_read(tmp_path):
    rng = random.Random(5)
    original = save(TENSORS, metadata={"format": "pt"})
    path = tmp_path / "mutant.safetensors"
    accepted = refused = 0
    for _ in range(800):
        data = mutant(original, rng)
        size = int.from_bytes(data[:8], "little")
        try:
            check_header(data[8 : 8 + size], size, len(data), path)  # ours alone, before the library's own checks
        except Error as e:
            refused += 1
            assert "mutant.safetensors" in str(e) and len(str(e)) < 400
        else:
            accepted += 1
            assert strictly_valid(data)
            path.write_bytes(data)
            loaded = load_weights(path)
            reference = library_load(data)
            assert all(loaded[k].dtype == v.dtype and loaded[k].shape == v.shape for k, v in reference.items())
    assert accepted > 20 and refused > 500  # both sides were tried


def test_the_library_reads_a_key_given_twice_and_we_do_not(tmp_path):
    twin = '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}'
    data = len(twin).to_bytes(8, "little") + twin.encode() + b"\x01\xff"
    (tmp_path / "twin.safetensors").write_bytes(data)
    assert library_load(data)["a"].tolist() == [1, -1]  # the last one won, so two readers may disagree
    with pytest.raises(Error, match="occurs twice"):
        load_weights(tmp_path / "twin.safetensors")


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, b"\x02" + b"\x00" * 7 + b"[]", b"\xff" * 300])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(Error, match=r"x\.safetensors are not valid safetensors"):
        load_weights(tmp_path / "x.safetensors")


def test_a_header_nested_to_the_ground_is_refused(tmp_path):
    text = b'{"a":' + b"[" * 200_000
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(Error, match="not JSON"):
        load_weights(tmp_path / "x.safetensors")


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(Error, match=r"nothing\.safetensors"):
        load_weights(tmp_path / "nothing.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(Error, match=r"\.gguf"):
        load_weights(tmp_path / "model.gguf")
    with pytest.raises(Error, match="0 safetensors files"):
        load_weights(tmp_path)


# --- pickles


class Mkdir:
    """Harmless, but it shows that it ran."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Exec(Mkdir):
    def __reduce__(self):
        return exec, (f"import os; os.mkdir({self.marker!r})",)


def carriers(folder: Path, marker: Path) -> dict[str, Path]:
    """Eight ways to bring the payload along, each a file or folder."""
    raw = pickle.dumps(Mkdir(marker))
    torch.save(Mkdir(marker), folder / "zip.pt")
    torch.save(Mkdir(marker), folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    with tarfile.open(folder / "tar.pth", "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    (folder / "renamed.safetensors").write_bytes(raw)
    indirect = f"cpkgutil\nresolve_name\n(S'os:mkdir'\ntR(S{str(marker)!r}\ntR."
    (folder / "indirect.pt").write_bytes(indirect.encode())
    (folder / "exec.bin").write_bytes(pickle.dumps(Exec(marker)))
    torch.save({"a": torch.zeros(3), "z": [1, {"deep": Mkdir(marker)}]}, folder / "late.pt")
    side = folder / "sidecar"
    side.mkdir()
    save_file(TENSORS, side / "model.safetensors")
    (side / "scheduler.PKL").write_bytes(raw)
    return {p.stem: p for p in folder.iterdir()}


def fire(path: Path) -> None:
    """Reads a carrier as a careless program would."""
    if path.is_dir():
        path = path / "scheduler.PKL"
    if zipfile.is_zipfile(path):
        torch.load(path, weights_only=False)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            pickle.load(tar.extractfile("pickle"))
    elif path.name == "legacy.ckpt":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())


def test_no_payload_runs(tmp_path):
    folder, marker = tmp_path / "payloads", tmp_path / "marker"
    folder.mkdir()
    found = carriers(folder, marker)
    assert len(found) == 8
    for name, path in found.items():
        fire(path)
        assert marker.is_dir(), f"{name} is not live, so refusing it proves nothing"
        marker.rmdir()

        alone = tmp_path / f"with-{name}"
        alone.mkdir()
        os.link(path, alone / path.name) if path.is_file() else path.rename(alone / path.name)
        with pytest.raises(Error):
            check_folder(alone)
        if path.is_file():
            with pytest.raises(Error):
                load_weights(path)
        assert not marker.exists()


def test_an_allowed_pickle_still_runs_nothing(tmp_path):
    folder, marker = tmp_path / "payloads", tmp_path / "marker"
    folder.mkdir()
    found = carriers(folder, marker)
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "honest.pt")
    bomb, size = tmp_path / "bomb.pt", 700_000_000
    torch.save({"a": torch.zeros(70_000, dtype=torch.uint8)}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as small, zipfile.ZipFile(bomb, "w", 8, compresslevel=1) as big:
        for entry in small.namelist():
            with big.open(entry, "w") as out:
                if entry.endswith("data/0"):
                    for _ in range(size // 10_000_000):
                        out.write(bytes(10_000_000))
                else:
                    old, new = (b"J" + n.to_bytes(4, "little") for n in (70_000, size))
                    out.write(small.read(entry).replace(old, new))
    assert bomb.stat().st_size < 4_000_000

    def read(path: Path):
        try:
            return load_weights(path, pickle="allow")
        except Error as e:
            return e

    with ThreadPoolExecutor(2) as pool:
        honest, late, big = pool.map(read, [tmp_path / "honest.pt", found["late"], bomb])
    assert isinstance(honest, dict), honest
    assert all(torch.equal(honest[k], v) for k, v in TENSORS.items()) and set(honest) == set(TENSORS)
    assert isinstance(late, Error) and "mkdir" in str(late), late
    assert "weights_only" not in str(late) + late.hint  # never an invitation to load it unsafely
    assert isinstance(big, Error) and "memory" in str(big), big
    assert not marker.exists()


def test_an_old_torch_is_refused_before_it_reads_a_pickle(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(Error, match="CVE-2025-32434"):
        load_weights(tmp_path / "x.pt", pickle="allow")


def test_a_pickle_is_refused_unless_allowed(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    with pytest.raises(Error, match="pickle") as caught:
        load_weights(tmp_path / "x.pt")
    assert "-m pickle=allow" in caught.value.hint and "safetensors" in caught.value.hint


# --- folders


def test_an_honest_folder_passes(good):
    check_folder(good)
    (good / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                "image_encoder": [None, None],
                "force_zeros_for_empty_prompt": True,
            }
        )
    )
    (good / "vocab.json").write_text(json.dumps({"auto_map": 17, "target": 18}))
    check_folder(good)


SPELLINGS = [
    "auto_map",
    "autoMap",
    "AUTO_MAP",
    "auto-map",
    "custom_pipeline",
    "customPipeline",
    "Custom-Pipelines",
    "trust_remote_code",
    "trustRemoteCode",
    "code_revision",
    "custom_generate",
    "_target_",
]


@pytest.mark.parametrize("key", SPELLINGS)
@pytest.mark.parametrize("deep", [False, True])
def test_a_key_that_names_code_is_refused(good, key, deep):
    value = {key: {"AutoModel": "evil.Model"}}
    inside = good / "text_encoder" / "config.json"
    inside.parent.mkdir()
    inside.write_text(json.dumps({"a": [1, {"b": value}]} if deep else value))
    with pytest.raises(Error, match="names code"):
        check_folder(good)


@pytest.mark.parametrize(
    "name, content, cause",
    [
        ("config.json", {"_class_name": ["evil", "Model"]}, "_class_name"),
        ("config.json", {"_class_name": "os.system"}, "_class_name"),
        ("config.json", {"_class_name": "MyVAE"}, "_class_name"),
        ("config.json", {"a": {"_class_name": "MyVAE"}}, "_class_name"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "kernel"),
        ("model_index.json", {"vae": ["evil", "VAE"]}, "evil"),
        ("model_index.json", {"vae": ["../evil", "VAE"]}, "evil"),
        ("model_index.json", {"vae": [["a"], "VAE"]}, "library, class"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL", "x"]}, "library, class"),
        ("model_index.json", {"vae": ["diffusers", "os.system"]}, "library, class"),
        ("model_index.json", [], "object"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}}, "shard"),
        ("model.safetensors.index.json", {"weight_map": {"a": "x.bin"}}, "shard"),
    ],
)
def test_a_configuration_that_leads_elsewhere_is_refused(good, name, content, cause):
    (good / name).write_text(json.dumps(content))
    with pytest.raises(Error, match=cause):
        check_folder(good)


def test_json_that_two_readers_may_read_differently_is_refused(good):
    (good / "config.json").write_text('{"_class_name": "AutoencoderKL", "_class_name": "AutoencoderTiny"}')
    with pytest.raises(Error, match="twice"):
        check_folder(good)
    (good / "config.json").write_text("[" * 100_000)
    with pytest.raises(Error, match="JSON"):
        check_folder(good)


@pytest.mark.parametrize("name", ["modeling.py", "x.SO", "model.bin", "MODEL.PT", "deep/er/x.ckpt", "a.pkl"])
def test_files_that_carry_code_are_refused_by_name(good, name):
    (good / name).parent.mkdir(parents=True, exist_ok=True)
    (good / name).write_bytes(b"x")
    with pytest.raises(Error, match=Path(name).name):
        check_folder(good)


def test_a_pickle_of_any_name_is_refused(good):
    (good / "readme.txt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(Error, match="another name"):
        check_folder(good)


def test_links_that_lead_out_are_refused(good, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    (good / "extra.json").symlink_to(outside)
    with pytest.raises(Error, match="leads out"):
        check_folder(good)
    check_folder(good, within=tmp_path)
    (good / "extra.json").unlink()
    (good / "more").symlink_to(tmp_path)
    with pytest.raises(Error, match="link to a folder"):
        check_folder(good)
    (good / "more").unlink()
    os.mkfifo(good / "pipe")
    with pytest.raises(Error, match="regular"):
        check_folder(good)


def test_a_damaged_header_is_found_in_a_folder(good):
    path = good / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Error, match="diffusion_pytorch_model"):
        check_folder(good)


# --- names


def test_a_bare_name_is_an_embedded_checkpoint_unless_a_path_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path / "embedded")
    (tmp_path / "embedded" / "mini-x").mkdir(parents=True)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert resolve("mini-x") == str(tmp_path / "embedded" / "mini-x")
    assert open_folder("mini-x") == tmp_path / "embedded" / "mini-x"
    for unchanged in ("mini-y", "./mini-x", "../embedded/mini-x", "hf:a/b@1234567", str(tmp_path)):
        assert resolve(unchanged) == unchanged
    (work / "mini-x").mkdir()
    assert resolve("mini-x") == "mini-x"
    with pytest.raises(Error, match="mini-z") as caught:
        open_folder("mini-z")
    assert "mini-x" in caught.value.hint


def test_a_hub_id_is_found_where_it_was_fetched(tmp_path, monkeypatch, good):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    name = "hf:owner/name@" + "ab" * 20
    with pytest.raises(Error, match="not on this machine") as caught:
        open_folder(name)
    assert caught.value.hint == f"bench data fetch {name}"
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("ab" * 20)
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "vae").mkdir(parents=True)
    for file in good.iterdir():
        file.rename(repository / "blobs" / file.name)
        (snapshot / "vae" / file.name).symlink_to(f"../../../blobs/{file.name}")
    assert open_folder(name + ":vae") == snapshot / "vae"
    assert open_folder("hf:owner/name@abababab:vae") == snapshot / "vae"
    for elsewhere in (":../../..", ":/etc", ":nothing"):
        with pytest.raises(Error, match="not on this machine"):
            open_folder(name + elsewhere)
    with pytest.raises(UsageError, match="commit"):
        open_folder("hf:owner/name@main")
