"""Seeds have addresses: golden values, no collision, no part of order or batch; nobody touches global generators."""

import os
import random
import re

import numpy as np
import pytest
from toys import Drawing, Painter

from bench import Error, Store, execute
from bench.config import How
from bench.identity import canonical, digest, fingerprint, hub_id, seed_for, slug
from bench.types import UsageError


@pytest.mark.parametrize(
    "address, seed",
    [
        ((0, "reconstruction", 1, "astronaut", "latent"), 4059430091006451531),
        ((1, "reconstruction", 1, "astronaut", "latent"), 4676900539612209587),
        ((0, "noise", 1, "Ünïcödé/\n", "noise"), 1807440541596566745),
    ],
)
def test_golden_seeds(address, seed):
    assert seed_for(*address) == seed


def test_a_seed_is_the_first_63_bits_of_sha256_over_the_canonical_address():
    import hashlib
    import json

    for i in range(50):
        address = [i, "suite", 2, f"item {i}", "stream"]
        text = json.dumps(address, separators=(",", ":"), ensure_ascii=False)
        expected = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        assert seed_for(*address) == expected < 2**63


def test_parts_of_an_address_do_not_run_into_each_other():
    assert seed_for(0, "a", 1, "b", "cd") != seed_for(0, "a", 1, "bc", "d")
    assert seed_for(0, "a", 11, "b", "c") != seed_for(0, "a1", 1, "b", "c")


def test_a_run_leaves_the_global_generators_as_they_were(tmp_path):
    torch = pytest.importorskip("torch")

    class Drawn(Drawing):
        def run(self, unit, model, ctx):
            for ids, media in super().run(unit, model, ctx):
                noise = [torch.rand(1, generator=ctx.generator(id, "noise")).item() for id in ids]
                yield ids, {**media, "noise": noise}

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run = execute(Drawn(), Painter(), store=Store(tmp_path), identity={}, how=How(devices="cpu", threads=1))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after and run.complete()
    noise = {row["item"]: row["noise"] for row in run.table().rows}
    seed = seed_for(0, "drawing", 1, "item-004", "noise")
    assert noise["item-004"] == torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
    assert len(set(noise.values())) == len(noise)


def test_canonical_json():
    assert canonical({"b": [1, 2.5, None, True], "a": "ü\n"}) == '{"a":"ü\\n","b":[1,2.5,null,true]}'
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) and len(digest("\ud800")) == 64
    for value in (float("nan"), float("inf"), object(), {1, 2}, {"a": b"x"}):
        with pytest.raises(Error, match="cannot be written as JSON"):
            canonical(value)


@pytest.mark.parametrize("text", ["../../etc", "a/b", ".hidden", "", "Ünï", "a" * 500, "x\x00y", "..", "C:\\x"])
def test_a_slug_is_safe_in_a_path(text):
    assert re.fullmatch(r"[a-z0-9_][a-z0-9._-]{0,39}|-", slug(text)) and slug(text) not in (".", "..")


def test_fingerprints_follow_the_bytes(tmp_path):
    file, folder = tmp_path / "w.safetensors", tmp_path / "model"
    file.write_bytes(b"abc")
    assert fingerprint(str(file)) == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "w.bin").write_bytes(b"1")
    (folder / "config.json").write_bytes(b"2")
    (folder / ".cache").write_bytes(b"ignored")
    first = fingerprint(str(folder))
    (folder / ".cache").write_bytes(b"still ignored")
    assert fingerprint(str(folder)) == first
    (folder / "unet" / "w.bin").rename(folder / "unet" / "v.bin")
    assert fingerprint(str(folder)) != first
    (tmp_path / "empty").mkdir()
    with pytest.raises(Error, match="is empty"):
        fingerprint(str(tmp_path / "empty"))
    with pytest.raises(Error, match="do not exist"):
        fingerprint(str(tmp_path / "nowhere"))


def test_a_hub_id_must_name_a_commit():
    assert fingerprint("hf:owner/name@31f26fdeee:vae") == "commit:owner/name@31f26fdeee:vae"
    assert hub_id("weights.pt") is None
    for text in ("hf:owner/name", "hf:owner/name@main", "hf:owner@31f26fdeee", "hf:owner/name@31f26f"):
        with pytest.raises(UsageError, match="must name a commit"):
            hub_id(text)


def test_a_file_that_changed_within_a_tick_of_the_clock_is_hashed_again(tmp_path):
    from bench.identity import FileDigests

    file, digests = tmp_path / "w", FileDigests()
    file.write_bytes(b"one")
    stamp = file.stat()
    first = digests.of(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time
    assert digests.of(file) != first and not digests.changed
