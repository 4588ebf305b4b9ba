"""A CSV opened by LibreOffice without a window: what each cell became there."""

import csv
import io
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

# double quotes, UTF-8, from line 1; what looks like a number is one, also in quotes; spaces stay; formulas are computed
EAGER = "Text - txt - csv (StarCalc):{separator},34,76,1,,0,false,true,false,false,false,0,true"
OFFICE = "{urn:oasis:names:tc:opendocument:xmlns:office:1.0}"
TABLE = "{urn:oasis:names:tc:opendocument:xmlns:table:1.0}"
ACTIVE = {"a", "dde-source", "dde-connection-decl", "dde-link", "cell-range-source", "object", "script"}


@dataclass(frozen=True)
class Cell:
    """`kind` as the file has it: float, string, boolean, date; empty where there is nothing."""

    kind: str
    value: str
    formula: str


def missing() -> str:
    """What to install; empty where it is there."""
    return "" if shutil.which("soffice") else "apt-get install --no-install-recommends libreoffice-calc-nogui"


def opened(files: dict[str, bytes], folder: Path, separator: str = ",") -> tuple[dict[str, list[list[Cell]]], list]:
    """Rows of cells of each CSV, and all elements that do something; without a network; `folder` is for its files."""
    source, made = folder / "csv", folder / "ods"
    source.mkdir(parents=True)
    made.mkdir()
    for name, data in files.items():
        (source / f"{name}.csv").write_bytes(data)
    alone = ["unshare", "--map-root-user", "--net", "soffice", f"-env:UserInstallation=file://{folder}/profile"]
    filter = EAGER.format(separator=ord(separator))
    how = ["--headless", f"--infilter={filter}", "--convert-to", "ods", "--outdir", made]
    paths = [source / f"{name}.csv" for name in files]
    subprocess.run([*map(str, [*alone, *how, *paths])], check=True, capture_output=True, timeout=600)
    found, active = {}, []
    for name in files:
        with zipfile.ZipFile(made / f"{name}.ods") as file:
            root = ElementTree.fromstring(file.read("content.xml"))
        active += [f"{name}: {tag}" for e in root.iter() if (tag := e.tag.rpartition("}")[2]) in ACTIVE]
        found[name] = list(_rows(root))
    return found, active


def _rows(root):
    for row in root.iter(f"{TABLE}table-row"):
        cells = []
        for cell in row:
            kind = cell.get(f"{OFFICE}value-type", "")
            value = cell.get(f"{OFFICE}value", "") if kind == "float" else "".join(cell.itertext())
            times = int(cell.get(f"{TABLE}number-columns-repeated", 1))
            cells += [Cell(kind, value, cell.get(f"{TABLE}formula", ""))] * min(times, 1000)
        yield from [cells] * min(int(row.get(f"{TABLE}number-rows-repeated", 1)), 1000)


def written(data: bytes) -> list[list[str]]:
    """The cells as the harness's own readers see them."""
    csv.field_size_limit(1 << 24)
    return list(csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline="")))
