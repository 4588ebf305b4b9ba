"""What the README shows, runs: its adapter and its suite, as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_adapter_and_the_suite_of_the_readme(tmp_path):
    blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_model.py", "my_suite.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    command = "score my_suite.py:Mirrored --model my_model.py:Shrink -m factor=4 -p size=64 --limit 3"
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^psnr +[\d.]+ .* 3 +psnr\|range:255\|round\|v:1$", done.stdout, re.MULTILINE), done.stdout


def test_it_fits_one_screen_and_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    for path in re.findall(r"`((?:bench|suites|reports|data_manifests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    assert "http" not in text
