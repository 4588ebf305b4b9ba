"""Weights that strangers wrote: safetensors with damaged headers, pickles that run code, folders that lead to it."""

import io
import json
import math
import random
import re
import shutil
import zipfile

import diffusers  # noqa: F401  (here once, not in every command)
import pytest
import torch
from corpus import CODE_KEYS, TENSORS, carriers, doubling, fire, header_mutant, limited, memory_bomb
from safetensors.torch import load as library_load
from safetensors.torch import save, save_file
from toys import command

from bench.types import Error
from bench.weights import check_folder, check_header, load_weights

SEED = 5
MEMORY = 50 * 2**20  # bytes above the idle process


# -- safetensors


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


def test_a_damaged_header_is_refused_and_a_sound_one_is_read(tally, trials, tmp_path):
    """What our check lets through is valid by the strict rules, and is then read as the library reads it."""
    print("seed", SEED)
    original = save(TENSORS, metadata={"format": "pt"})
    path = tmp_path / "mutant.safetensors"
    count = trials(5000, 800)

    def check_all():
        rng = random.Random(SEED)
        accepted, refused, bad = 0, 0, []
        for _ in range(count):
            data = header_mutant(original, rng)
            length = int.from_bytes(data[:8], "little")
            try:
                check_header(data[8 : 8 + length], length, len(data), path)  # ours alone, before the library's checks
            except Error as e:
                refused += 1
                if not ("mutant.safetensors are not valid safetensors: " in str(e) and len(str(e)) < 400):
                    bad.append((data, str(e)))
                continue
            accepted += 1
            path.write_bytes(data)
            loaded, reference = load_weights(path), library_load(data)
            same = all(loaded[k].dtype == v.dtype and loaded[k].shape == v.shape for k, v in reference.items())
            if not (strictly_valid(data) and same and set(loaded) == set(reference)):
                bad.append((data, "accepted"))
        return accepted, refused, bad

    outcome = limited(check_all, 2**30, 60)
    assert not outcome.died, outcome
    accepted, refused, bad = outcome.value
    tally("safetensors headers", count - len(bad), count)
    assert not bad, bad[:3]
    assert outcome.peak < MEMORY, outcome.peak
    assert accepted > count / 40 and refused > count / 2  # both sides were tried


# -- pickles and folders of weights


@pytest.fixture
def score(tmp_path):
    """Scores a model with weights of strangers; True if it was refused in words, before a run was begun."""

    def refused(*flags, model="vae", suite="reconstruction", says=""):
        place = tmp_path / "work"
        place.mkdir(exist_ok=True)
        done = command(place, "score", suite, "--model", model, *flags)
        few = len(done.err.splitlines()) <= 12 and not re.search("[\x00-\x09\x0b-\x1f\x7f]", done.err)
        begun = list((place / ".bench").glob("runs/*"))
        good = done.code == 1 and few and "error: " in done.err and says in done.err and not begun and not done.out
        tracebacks.append("Traceback" in done.err)
        if not good or tracebacks[-1]:
            print(done.code, done.err, begun)
        return good and not tracebacks[-1]

    tracebacks: list[bool] = []
    refused.tracebacks = tracebacks
    return refused


def honest(folder):
    """A folder as diffusers writes it, whose tensors are not looked at before its files were."""
    folder.mkdir(parents=True)
    save_file(TENSORS, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [32, 64]}))
    return folder


def raises(call, *args, **options):
    try:
        call(*args, **options)
    except Error as e:
        return f"{e} {e.hint}"
    return ""


def test_no_payload_runs(tally, size, tmp_path, score):
    folder, marker = tmp_path / "payloads", tmp_path / "marker"
    folder.mkdir()
    found = carriers(folder, marker)
    assert len(found) == 8
    passed = ran = 0
    for i, (name, path) in enumerate(found.items()):
        fire(path)
        assert marker.is_dir(), f"{name} is not live, so refusing it proves nothing"
        marker.rmdir()
        beside = honest(tmp_path / f"with-{name}")
        shutil.copytree(path, beside, dirs_exist_ok=True) if path.is_dir() else shutil.copy(path, beside)
        good = score("-m", f"weights={beside}", says=str(beside)) and raises(check_folder, beside)
        if path.is_file():
            good = good and raises(load_weights, path)
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt") and i < size(8, 1):
            said = raises(load_weights, path, pickle="allow")  # as a child that may read tensors, and nothing else
            good = good and said and "weights_only" not in said  # never an invitation to load it unsafely
        passed += bool(good)
        ran += marker.exists()
    tally("hostile files", passed, len(found), ran=ran, tracebacks=sum(score.tracebacks))
    assert passed == len(found) and not ran


def test_an_allowed_pickle_of_tensors_is_read_and_what_it_asks_for_besides_is_named(tmp_path):
    folder, marker = tmp_path / "payloads", tmp_path / "marker"
    folder.mkdir()
    torch.save({"state_dict": TENSORS, "epoch": 3}, tmp_path / "honest.pt")
    loaded = load_weights(tmp_path / "honest.pt", pickle="allow")
    assert all(torch.equal(loaded[k], v) for k, v in TENSORS.items()) and set(loaded) == set(TENSORS)
    said = raises(load_weights, carriers(folder, marker)["late"], pickle="allow")
    assert "mkdir" in said and not marker.exists()


def test_a_pickle_that_wants_all_memory_or_all_time_is_refused(tally, size, tmp_path, score):
    bombs = {"memory": memory_bomb(tmp_path / "memory.pt"), "time": doubling(tmp_path / "time.pt")}
    assert all(p.stat().st_size < 4_000_000 for p in bombs.values())
    with zipfile.ZipFile(bombs["memory"]) as pack:
        assert sum(entry.file_size for entry in pack.infolist()) > 500_000_000
    unlimited = limited(lambda: torch.load(io.BytesIO(bombs["time"].read_bytes()), weights_only=True), seconds=2)
    assert unlimited.died == "signal 24", unlimited  # it computes until it is stopped
    passed = 0
    chosen = list(bombs)[: size(2, 1)]
    for name in chosen:
        said = raises(load_weights, bombs[name], pickle="allow")
        flags = ("-m", f"unet={bombs[name]}", "-m", "pickle=allow")
        good = f"more {name} than" in said and str(bombs[name]) in said
        passed += good and score(*flags, model="mini-sd", suite="generation", says=f"more {name} than")
    tally("hostile files", passed, len(chosen), tracebacks=sum(score.tracebacks))
    assert passed == len(chosen)


def test_a_key_that_names_code_is_refused_wherever_it_stands(tally, size, tmp_path, score):
    """Twelve spellings at the top of a configuration; then deep in it, and in the configuration of a part."""
    value = {"AutoModel": "evil.Model"}
    cases = [("config.json", {key: value}) for key in CODE_KEYS]
    cases += [("config.json", {"a": [1, {"b": {key: value}}]}) for key in CODE_KEYS[::3]]
    cases += [("text_encoder/tokenizer_config.json", {key: value}) for key in CODE_KEYS[1::3]]
    passed, chosen = 0, cases[:: size(1, 4)]
    for i, (name, content) in enumerate(chosen):
        folder = honest(tmp_path / str(i))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"_class_name": "AutoencoderKL", **content}))
        passed += score("-m", f"weights={folder}", says=f"{folder / name}: ")
        assert "names code" in raises(check_folder, folder)
    tally("hostile files", passed, len(chosen), tracebacks=sum(score.tracebacks))
    assert passed == len(chosen)
