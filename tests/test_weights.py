"""Weights that strangers wrote, refused by name and cause; tests/survival fires payloads and damages headers."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as library_load
from safetensors.torch import save_file

from bench import weights
from bench.types import Error, UsageError
from bench.weights import check_folder, load_weights, open_folder, resolve

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


@pytest.mark.parametrize(
    "name, content, cause",
    [
        ("config.json", {"_class_name": ["evil", "Model"]}, "_class_name"),
        ("config.json", {"_class_name": "os.system"}, "_class_name"),
        ("config.json", {"_class_name": "MyVAE"}, "_class_name"),
        ("config.json", {"a": {"_class_name": "MyVAE"}}, "_class_name"),
        ("config.json", {"attn_implementation": "someone/kernel"}, "kernel"),
        ("config.json", {"attn_implementation" + "[" * 5000: "someone/kernel"}, r"n\[{61} = 'someone/kernel' may"),
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


def test_a_configuration_that_names_ten_thousand_classes_is_read_in_time(good):
    classes = [{"_class_name": "AutoencoderKL"}] * 10_000
    (good / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "parts": classes}))
    check_folder(good)
    begin = time.process_time()
    check_folder(good)
    assert time.process_time() - begin < 1


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
