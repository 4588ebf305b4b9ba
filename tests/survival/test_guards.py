"""The tests tested: where a guard is taken out of the harness, one of them must turn red.

Each mutant changes one line in a copy of the tree and runs the tests that should catch it. The copy as it is passes
them first; a line that is no longer there fails the test, so that no guard is lost from this list unseen.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("bench", "suites", "tests", "data_manifests", "reports", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Guard:
    """A line of a file, what stands there without the guard, and the tests that should see it."""

    file: str
    line: str
    without: str
    tests: tuple[str, ...]


STORE, OUTPUT, TEXT = "tests/test_store.py", "tests/survival/test_output.py", "tests/test_text.py"
GUARDS = {
    "an append is made durable": Guard(
        "bench/door.py",
        "                write_all(self.fd, data)\n                os.fsync(self.fd)\n",
        "                write_all(self.fd, data)\n",
        (f"{STORE}::test_a_failed_append_stops_leaves_what_was_there_and_is_not_tried_again",),
    ),
    "a replaced file is made durable": Guard(
        "bench/door.py",
        "                write_all(fd, data)\n                os.fsync(fd)\n",
        "                write_all(fd, data)\n",
        (f"{STORE}::test_a_failed_replace_leaves_the_old_file_and_no_litter",),
    ),
    "a name in a folder is made durable": Guard(
        "bench/door.py",
        "    try:\n        os.fsync(fd)\n    finally:\n",
        "    try:\n        pass\n    finally:\n",
        (f"{STORE}::test_the_name_of_a_new_file_is_made_durable",),
    ),
    "a short write is continued": Guard(
        "bench/door.py",
        "        view = view[os.write(fd, view) :]\n",
        "        view = view[max(len(view), os.write(fd, view)) :]\n",
        (f"{STORE}::test_a_short_write_is_continued",),
    ),
    "a log is not opened through a link": Guard(
        "bench/door.py",
        "os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW",
        "os.O_APPEND | os.O_CLOEXEC",
        (f"{STORE}::test_the_log_is_not_followed_through_a_link",),
    ),
    "a shard has one writer": Guard(
        "bench/door.py",
        "                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                pass\n",
        (f"{STORE}::test_the_second_writer_is_told_host_and_pid_and_the_next_one_starts_after_a_death",),
    ),
    "a line has the checksum that it names": Guard(
        "bench/records.py",
        'b"%08x" % zlib.crc32(raw[:-18]) == raw[-10:-2]',
        "len(raw) > 18",
        (f"{STORE}::test_a_damaged_middle_line_is_set_aside_once_and_nothing_after_it_is_dropped",),
    ),
    "a blob is what was kept": Guard(
        "bench/store.py",
        "        if digest(data) != address[:64]:\n",
        "        if not data:\n",
        (f"{STORE}::test_a_blob_that_is_missing_cut_or_wrong_is_refused_by_name_and_mended_by_putting_it_again",),
    ),
    "a picture has a limit": Guard(
        "bench/images.py",
        "    if image.width * image.height > limit:\n",
        "    if image.width * image.height > 100 * limit:\n",
        ("tests/survival/test_hostile_images.py::test_few_bytes_that_are_many_pixels_stay_within_a_gigabyte",),
    ),
    "a picture is not opened through a link": Guard(
        "bench/images.py",
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK",
        "os.O_RDONLY | os.O_NONBLOCK",
        ("tests/survival/test_hostile_images.py::test_what_is_no_regular_file_is_refused_at_once",),
    ),
    "templates escape": Guard(
        "bench/report/html.py",
        "        autoescape=True,\n",
        "        autoescape=False,\n",
        (f"{OUTPUT}::test_every_text_through_every_sink[text of a page]",),
    ),
    "cells start no formula": Guard(
        "bench/text.py",
        """    return "'" + text if text.startswith((*FORMULA, "'")) else text\n""",
        "    return text\n",
        (f"{TEXT}::test_formulas_are_neutral", f"{OUTPUT}::test_every_text_through_every_sink[scores.csv]"),
    ),
    "secrets are masked": Guard(
        "bench/text.py",
        "            text = self._pattern.sub(MASK, text)\n",
        "            pass\n",
        (f"{TEXT}::test_secrets_are_masked_wherever_they_appear", f"{OUTPUT}::test_no_secret_is_written_or_printed"),
    ),
    "controls are shown, not sent": Guard(
        "bench/text.py",
        "    return UNSAFE.sub(lambda m:",
        "    return text or UNSAFE.sub(lambda m:",
        (f"{TEXT}::test_plain_shows_what_was_there", f"{OUTPUT}::test_every_text_through_every_sink[message]"),
    ),
    "weights run nothing": Guard(
        "bench/weights.py",
        '        found = torch.load(BytesIO(data), map_location="cpu", weights_only=True)\n',
        '        found = torch.load(BytesIO(data), map_location="cpu", weights_only=False)\n',
        ("tests/survival/test_hostile_weights.py::test_no_payload_runs",),
    ),
    "states run nothing": Guard(
        "bench/train.py",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        ("tests/survival/test_resumes.py::test_a_damaged_state_is_passed_over_and_said[a pickle that runs]",),
    ),
    "a header names a tensor once": Guard(
        "bench/weights.py",
        '        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)\n',
        '        entries = json.loads(header.decode("utf-8"))\n',
        ("tests/test_weights.py::test_the_library_reads_a_key_given_twice_and_we_do_not",),
    ),
    "a download has the hash that was expected": Guard(
        "bench/fetch.py",
        "        if sha256 and found != sha256:\n",
        "        if sha256 and not found:\n",
        ("tests/test_data_fetch.py::test_a_wrong_hash_leaves_nothing",),
    ),
    "outputs are finite": Guard(
        "bench/worker.py",
        "            if bad:\n",
        "            if bad and not ids:\n",
        ("tests/test_core.py::test_a_bad_output_fails_its_unit_by_name",),
    ),
    "batches are measured in memory of their own": Guard(
        "bench/worker.py",
        "with ahead(owned(self.suite.run(unit, self.model, ctx))) as batches:",
        "with ahead(self.suite.run(unit, self.model, ctx)) as batches:",
        ("tests/survival/test_numbers.py::test_a_model_that_writes_into_its_last_output_changes_no_number",),
    ),
}


def run(folder, tests):
    """pytest on some tests of the copy: (exit code, its last lines)."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-x", "-q", *tests]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.full
def test_no_guard_is_missed_by_all_tests(tmp_path, tally):
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / part, tmp_path / part)
    where = "import bench, pathlib; print(pathlib.Path(bench.__file__).resolve().parents[1])"
    here = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert here == str(tmp_path.resolve())  # the copy is what is tested
    code, said = run(tmp_path, sorted({test for guard in GUARDS.values() for test in guard.tests}))
    assert code == 0, said
    missed = {}
    for name, guard in GUARDS.items():
        path = tmp_path / guard.file
        whole = path.read_text(encoding="utf-8")
        if whole.count(guard.line) != 1:
            missed[name] = f"{guard.file} has the line {whole.count(guard.line)} times"
            continue
        path.write_text(whole.replace(guard.line, guard.without), encoding="utf-8")
        code, said = run(tmp_path, guard.tests)
        path.write_text(whole, encoding="utf-8")
        if code != 1 or not re.search(r"^(E  |FAILED)|\d+ failed", said, re.M):
            missed[name] = said[-600:]
    tally("guards", len(GUARDS) - len(missed), len(GUARDS))
    assert not missed, "\n".join(f"{name}: {why}" for name, why in missed.items())
