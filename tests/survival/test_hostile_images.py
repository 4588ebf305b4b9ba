"""Picture files made to do harm: read exactly as the rules say or refused by name and reason, within a gigabyte and
five seconds, and without harm to their neighbours in a run."""

import contextlib
import hashlib
import io
import os
import random
import re
import warnings

import numpy as np
import pytest
from corpus import (
    COLOUR,
    PICTURES_LARGE,
    RAMP,
    encoded,
    frames,
    limited,
    picture_mutants,
    pictures_read,
    pictures_refused,
    sixteen_bit,
)
from PIL import Image
from toys import command

from bench import Store, images
from bench.types import Error

SEED = 20
MEMORY = 2**30  # bytes above the idle process
SECONDS = 5  # of the processor


def fate(source, name=""):
    """("read", shape, SHA-256 of the pixels) or ("refused", message, hint): what `limited` runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing but the Error may reach the user
        try:
            pixels = images.read(source, name=name)
        except Error as e:
            return "refused", str(e), e.hint
    assert pixels.dtype == np.uint8
    return "read", pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()


def as_read(pixels):
    return "read", pixels.shape, hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def plain_pixels(data):
    """The pixels as Pillow alone gives them; None where it fails, or where the rules say more than Pillow does."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode in ("L", "RGB", "P") and "transparency" not in picture.info:
                return np.asarray(picture.convert("RGB"))
    return None


def refused_well(found, name, reason=""):
    kind, message, hint = found
    return kind == "refused" and name in message and reason in message and bool(hint) and len(message) < 600


def judge(tally, trials):
    """Counts (name, outcome, was it right?) and asserts that all of them were, within the limits."""
    bad = {}
    for name, outcome, right in trials:
        if outcome.died or not right or outcome.seconds > SECONDS or outcome.peak > MEMORY:
            bad[name] = outcome
    tally("hostile files", len(trials) - len(bad), len(trials))
    assert not bad, bad


def test_every_kind_of_file_is_read_as_the_rules_say_or_refused(tally, tmp_path):
    trials = []
    for name, (data, expected) in pictures_read().items():
        outcome = limited(lambda data=data: fate(data), MEMORY, SECONDS)
        trials.append((name, outcome, outcome.value == as_read(expected)))
    for name, (data, reason) in pictures_refused().items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(data)
        outcome = limited(lambda path=path: fate(path), MEMORY, SECONDS)
        trials.append((name, outcome, not outcome.died and refused_well(outcome.value, str(path), reason)))
    judge(tally, trials)


def test_what_is_no_regular_file_is_refused_at_once(tally, tmp_path):
    real = tmp_path / "a.png"
    real.write_bytes(encoded(COLOUR))
    assert np.array_equal(images.read(real), COLOUR) and np.array_equal(images.read(str(real)), COLOUR)
    link, pipe, folder, big = (tmp_path / f"{name}.png" for name in ("link", "pipe", "folder", "big"))
    link.symlink_to(real)
    os.mkfifo(pipe)
    folder.mkdir()
    big.touch()
    os.truncate(big, images.MAX_BYTES + 1)
    reasons = {
        link: "link",
        pipe: "regular",
        folder: "regular",
        big: "67,108,865 bytes",
        tmp_path / "no.png": "No such",
    }
    reasons |= {"nul\0.png": "null", "/dev/zero": "regular", tmp_path / ("x" * 300): "too long"}
    trials = []
    for path, reason in reasons.items():
        outcome = limited(lambda path=path: fate(path), MEMORY, SECONDS, patience=20)
        trials.append((str(path), outcome, not outcome.died and refused_well(outcome.value, str(path), reason)))
    judge(tally, trials)


def test_few_bytes_that_are_many_pixels_stay_within_a_gigabyte(tally, size, tmp_path):
    path = tmp_path / "large.png"
    trials = []
    for name, (make, reason) in list(PICTURES_LARGE.items())[: size(None, 2)]:
        assert not limited(lambda make=make: path.write_bytes(make()), 8 * 2**30, 60).died
        assert path.stat().st_size < 5_000_000, name
        outcome = limited(lambda: fate(path), MEMORY, SECONDS)
        right = (
            refused_well(outcome.value, str(path), reason) if reason else outcome.value[:2] == ("read", (8000, 8000, 3))
        )
        trials.append((name, outcome, not outcome.died and right))
    judge(tally, trials)


def test_mutants_are_read_as_pillow_reads_them_or_refused(tally, size):
    print("seed", SEED)
    trials, compared = [], 0
    for i, (kind, good, mutant) in enumerate(picture_mutants(size(170, 60), random.Random(SEED))):
        assert mutant != good
        outcome = limited(lambda mutant=mutant: fate(mutant, "mutant.png"), MEMORY, SECONDS)
        right = not outcome.died and (outcome.value[0] == "read" or refused_well(outcome.value, "mutant.png"))
        if right and outcome.value[0] == "read" and (pixels := plain_pixels(mutant)) is not None:
            right = outcome.value == as_read(pixels)
            compared += 1
        trials.append((f"{kind} {i}", outcome, right))
    refused = sum(not o.died and o.value[0] == "refused" for _, o, _ in trials)
    assert refused > len(trials) / 4 and compared > len(trials) / 20  # both ways were taken
    judge(tally, trials)


def test_good_neighbours_are_scored_and_each_bad_one_is_named_with_its_reason(tally, size, tmp_path):
    """A picture a unit: those that cannot be read are failed units, in words, and no process dies of them."""
    folder = tmp_path / "set"
    folder.mkdir()
    pixels = np.random.default_rng(7).integers(0, 256, (72, 80, 3), dtype=np.uint8)
    good = {f"good-{kind}.png": encoded(pixels, kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF", "JPEG2000")}
    good |= {"good-16-bit.png": sixteen_bit(pixels.astype(np.uint16) << 8)}
    bad = dict(list(pictures_refused().items())[:: size(1, 3)])
    for name, data in good.items():
        (folder / name).write_bytes(data)
    for name, (data, _) in bad.items():
        (folder / f"bad-{name}.png").write_bytes(data)
    flags = ["-p", f"data=image-folder:{folder}", "-p", "size=64", "-p", "chunk=1", "--max-failures", "1"]
    done = command(tmp_path, "score", "reconstruction", "--model", "toy", *flags, "--keep", "none")
    assert done.code == 3 and "Traceback" not in done.err, done.err
    (run,) = Store(tmp_path / ".bench").runs()
    table, failed = run.table(), {r.unit: r for r in run.failures()}
    assert {row["item"] for row in table.rows} == set(good)
    assert all(row["psnr"] is not None for row in table.rows)
    said = {}
    for record in failed.values():
        (name,) = re.findall(r"bad-(.+?)\.png", record.error["message"])[:1]
        said[name] = record.error
    right = [n for n, (_, reason) in bad.items() if n in said and reason in said[n]["message"] and said[n].get("hint")]
    assert all(error["kind"] == "Error" for error in said.values())  # refused, not crashed
    tally("bad pictures in a run", len(right), len(bad))
    assert sorted(right) == sorted(bad) and len(failed) == len(bad)
    psnr = next(s for s in run.scores() if s.metric == "psnr" and s.slice == "all")
    assert (psnr.n, psnr.expected, psnr.complete) == (len(good), len(good) + len(bad), False)


@pytest.mark.parametrize("kind", ["link", "pipe", "control", "gone"])
def test_what_a_folder_must_not_hold_is_refused_before_a_run_begins(tmp_path, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(COLOUR))
    if kind == "link":
        (folder / "b.png").symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(folder / "b.png")
    elif kind == "control":
        (folder / "b\x1b[2J\n\u202e.png").write_bytes(encoded(COLOUR))
    else:
        (folder / "a.png").unlink()
    done = command(tmp_path, "score", "reconstruction", "--model", "toy", "-p", f"data=image-folder:{folder}")
    assert done.code == 1 and "Traceback" not in done.err and len(done.err.splitlines()) <= 12, done.err
    assert {"link": "b.png is a link", "pipe": "b.png is not a regular", "control": "\\x1b", "gone": "no pictures"}[
        kind
    ] in done.err
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", done.err) and "hint:" in done.err
    assert not list((tmp_path / ".bench").glob("runs/*"))


def test_cmyk_follows_its_formula_within_one_level():
    ink = np.dstack([COLOUR, RAMP[::-1]])
    data = encoded(Image.fromarray(ink, "CMYK"), "TIFF")
    left = 255.0 - ink.astype(float)
    expected = left[..., :3] * left[..., 3:] / 255
    assert np.abs(images.read(data) - expected).max() <= 1


def test_a_multi_picture_jpeg_is_its_first_picture():
    data = frames("MPO", quality=95)
    assert np.array_equal(images.read(data), np.asarray(Image.open(io.BytesIO(encoded(COLOUR, "JPEG", quality=95)))))


def test_a_large_picture_is_converted_strip_by_strip_as_a_small_one(monkeypatch):
    """Of each mode that the rules know, whole and in strips of three rows."""
    files = {name: data for name, (data, _) in pictures_read().items()}
    files["CMYK"] = encoded(Image.fromarray(np.dstack([COLOUR, RAMP[::-1]]), "CMYK"), "TIFF")
    whole = {name: images.read(data) for name, data in files.items()}
    monkeypatch.setattr(images, "STRIP", 100)
    for name, data in files.items():
        assert np.array_equal(images.read(data), whole[name]), name
    for name, (data, reason) in pictures_refused().items():
        if "transparent" in reason:
            with pytest.raises(Error, match="transparent"):
                images.read(data, name=name)
