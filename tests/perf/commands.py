"""What a command costs: help, list, a score that is finished, a board of 1,000 runs."""

import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import QUICK, Row, processes, write
from overhead import make_crops

BOARD = """title = "A thousand"
about = "Runs that differ by noise."
sources = ["store"]
[select]
suite = ["noise"]
[[column]]
suite = "noise"
metric = "psnr"
[rank]
by = "noise:psnr"
"""


def main(count: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        (place / "crops").mkdir()
        make_crops(place / "crops", 32)
        found = [*waiting(place), *boards(place, count)]
    write("commands", "What a command costs", found)


def waiting(place: Path) -> list[Row]:
    """CPU seconds of whole processes, against what importing torch alone costs."""

    def command(*arguments: str):
        def call() -> None:
            subprocess.run([sys.executable, *arguments], cwd=place, check=True, capture_output=True)

        return call

    score = ("-m", "bench", "score", "noise", "--model", "codec", "-m", "quality=50", "-p", "data=image-folder:crops")
    fresh = processes(command(*score, "--fresh"), 1)
    torch = processes(command("-c", "import torch"), 3)
    again = processes(command(*score), 3)
    return [
        Row("bench --help", "import torch", processes(command("-m", "bench", "--help"), 5), torch, "CPU s"),
        Row("bench list", "import torch", processes(command("-m", "bench", "list"), 5), torch, "CPU s", most=1),
        Row("bench score, finished before", "with --fresh", again, fresh, "CPU s", "", "32 pictures, noise suite"),
    ]


def boards(place: Path, count: int) -> list[Row]:
    """A board of many runs against one of a tenth of them: time that grows in proportion gives 0.1."""
    from bench.report import page
    from bench.store import Store

    board = place / "noise.toml"
    board.write_text(BOARD)
    spent = {}
    for size in (count // 10, count):
        store = Store(place / f"store-{size}")
        multiply(store, place / "crops", size)
        begin = time.process_time()
        summary = page.render(board, store, place / f"page-{size}")
        spent[size] = time.process_time() - begin
        print(summary, file=sys.stderr)
    return [
        Row(f"board of {count:,} runs", f"{count // 10:,} runs", spent[count], spent[count // 10], "CPU s", most=10)
    ]


def multiply(store, crops: Path, count: int) -> None:
    """One run that was measured, and copies of it whose PSNR is moved by a quality of the model and by noise."""
    from bench.adapters.codecs import Codec
    from bench.config import How
    from bench.execution import Observer, execute
    from bench.identity import digest, unit_key
    from bench.records import record_line
    from bench.reduction import derive
    from suites.noise import Noise

    suite = Noise(data=f"image-folder:{crops}")
    observer = Observer()
    observer.say = lambda text: None
    how = How(store=str(store.root), devices="cpu", keep="none", threads=1)
    codec = Codec(format="jpeg", quality=50)
    first = execute(suite, codec, identity={"name": "codec-0"}, store=store, how=how, observer=observer)
    records = list(first.records().values())
    units = {u.id: u for u in suite.units(manifest(suite))}
    rng = np.random.default_rng(0)
    for i in range(1, count):
        spec = {**first.spec, "adapter_args": {"name": f"codec-{i}"}}
        meta = {k: v for k, v in first.meta.items() if k not in ("format", "spec")} | {"model": f"codec-{i}"}
        run = store.open(spec, meta)
        quality = rng.normal(0, 2)
        with run.writer("", observer.say) as log:
            for record in records:
                rows = tuple({**r, "psnr": r["psnr"] + quality + rng.normal(0, 0.3)} for r in record.rows)
                unit = units[record.unit]
                key = unit_key(digest(spec), unit.id, unit.items, unit.params)
                log.append(record_line(dataclasses.replace(record, key=key, rows=rows)))
        derive(run, suite)


def manifest(suite):
    from bench.manifest import load

    return load(suite.data)


if __name__ == "__main__":
    main(20 if QUICK else 1000)
