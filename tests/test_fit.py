"""`bench fit` as a user meets it: what it prints, writes and refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench.cli import main
from suites.scaling.fit import Surface

TRUTH = Surface(1.69, 406.4, 410.7, 0.34, 0.28)


def write(path: Path, sigma: float = 0.003, budgets: int = 5) -> Path:
    rng = np.random.default_rng(0)
    lines = ["N,D,C,loss"]
    for c in np.geomspace(6e18, 6e20, budgets):
        for w in np.linspace(-math.log(4), math.log(4), 7):
            n = TRUTH.optimum(c)[0] * math.exp(w)
            d = c / 6 / n
            lines.append(f"{n:.6g},{d:.6g},{c:.6g},{TRUTH.loss(n, d) * math.exp(sigma * rng.standard_normal()):.6f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*words) -> int:
    return main(["fit", *map(str, words)])


def test_it_prints_estimates_and_writes_a_page(tmp_path, capsys):
    source = write(tmp_path / "runs.csv")
    assert run(source, "--out", tmp_path / "out", "--resamples", 200, "--at", 1e22, "--propose-grid") == 0
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.startswith("surface: a "))
    value, low, _, high = row.split()[2:]
    assert float(low) < TRUTH.a < float(high) and float(low) < float(value) < float(high)
    assert "the next budget, centred on the predicted N*" in out and "surface: N*(1e+22)" in out
    assert str(tmp_path / "out" / "index.html") in err
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<svg") >= 7 and "http" not in page.replace("http-equiv", "")
    record = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert record["surface"]["converged"] and len(record["rows"]["used"]) == 35
    with np.load(tmp_path / "out" / "resamples.npz") as file:
        assert file["surfaces"].shape == (200, 5)
    assert (tmp_path / "out" / "figures" / "isoflop.csv").read_text().startswith('"budget"')


def test_the_same_table_gives_the_same_bytes(tmp_path):
    source = write(tmp_path / "runs.csv")
    for name in "ab":
        run(source, "--out", tmp_path / name, "--resamples", 60)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 15
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_json_is_one_object_on_stdout(tmp_path, capsys):
    run(write(tmp_path / "runs.csv"), "--out", tmp_path / "out", "--resamples", 50, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "fit" and found["rows"][0]["surface"]["objective"] == "huber_log_auto"


def test_one_budget_is_said_and_nothing_clean_is_drawn_from_it(tmp_path, capsys):
    assert run(write(tmp_path / "one.csv", budgets=1), "--out", tmp_path / "out", "--resamples", 50) == 0
    err = capsys.readouterr().err
    assert "one budget alone" in err and "no law can be drawn" in err
    assert "E is not identified" in err or "nearly collinear" in err


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--objective", "l2"], 2, "objective 'l2' is unknown"),
        (["--form", "half"], 2, "form 'half' is unknown"),
        (["--loss", "valid"], 1, "there is no column 'valid'"),
        (["--where", "loss"], 2, "is not COLUMN=TEXT"),
        (["--where", "C=7"], 1, "no row has C = '7'"),
        (["--resamples", "1"], 2, "must be 2 or more"),
        (["--at", "-1"], 2, "more than 0 FLOPs"),
        (["--resampling", "jackknife"], 1, "resampling 'jackknife' is not one of"),
        (["--kapa", "6"], 2, "did you mean"),
        (["--law", "gravity"], 2, "gravity"),
    ],
)
def test_what_is_typed_wrong_is_refused_by_name(tmp_path, capsys, words, code, message):
    source = write(tmp_path / "runs.csv", budgets=3)
    assert run(source, "--out", tmp_path / "out", *words) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_tables_that_are_none(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    assert run(tmp_path / "t.csv", "--out", tmp_path / "out") == 1
    assert "no column is a loss" in capsys.readouterr().err
    assert run(tmp_path / "absent.csv") == 1
    assert run("no-such-run", "--store", tmp_path) == 1
    assert "no-such-run" in capsys.readouterr().err


def test_upside_down_curves_are_named(tmp_path, capsys):
    source = write(tmp_path / "runs.csv")
    lines = source.read_text().splitlines()
    flipped = [f"{','.join(r.split(',')[:3])},{7 - float(r.split(',')[3]):.6f}" for r in lines[1:]]
    source.write_text("\n".join([lines[0], *flipped]) + "\n")
    assert run(source, "--out", tmp_path / "out", "--resamples", 50) == 0
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "the curve opens downwards" in line]
    assert line.startswith("warning: budgets ") and line.count(",") == 4 and "no law can be drawn" in err


def sampled(path: Path, runs: int = 12, **other) -> Path:
    """Checkpoints whose FID follows the loss at guidance 1 and chance at 5."""
    rng = np.random.default_rng(0)
    lines = ["run,cfg,val_loss,flops,fid,n_gen,extractor"]
    for r in range(runs):
        loss = 1 + 0.1 * r + 0.01 * rng.standard_normal()
        for w, noise in ((1.0, 0.01), (2.0, 0.05), (3.0, 0.5), (5.0, 5.0)):
            fid = math.exp(2 + loss + noise * rng.standard_normal() + 0.1 * math.log(w / 2) ** 2)
            lines.append(f"r{r},{w},{loss},{1e18 / loss**8:.6g},{fid},10000,{other.get('extractor', 'inception')}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_loss_and_fid_by_guidance(tmp_path, capsys):
    from scipy.stats import spearmanr

    source = sampled(tmp_path / "sampled.csv")
    assert run(source, "--law", "loss-fid", "--resamples", 500, "--out", tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)["rows"][0]
    rows = [line.split(",") for line in source.read_text().splitlines()[1:]]
    for w in (1.0, 5.0):
        own = [(float(r[2]), float(r[4])) for r in rows if float(r[1]) == w]
        expected = spearmanr(*zip(*own, strict=True)).statistic
        assert found["estimates"][f"guidance {w:g}: spearman"]["value"] == pytest.approx(expected, abs=1e-12)
    assert found["estimates"]["guidance 1: spearman"]["low"] > 0.9
    assert found["estimates"]["largest guidance at which the loss is a guide"]["value"] < 5
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<svg") == 2 and "above guidance" in page


def test_a_table_of_sampled_checkpoints_that_cannot_be_used(tmp_path, capsys):
    source = sampled(tmp_path / "sampled.csv")
    text = source.read_text()
    for broken, says in (
        (text.replace("cfg,", "how,"), "no column is guidance"),
        (text.replace("inception", "clip", 3), "several networks"),
        (text.replace(",10000,", ",5000,", 1), "not comparable"),
        (text + text.splitlines()[1] + "\n", "one checkpoint"),
    ):
        source.write_text(broken)
        assert run(source, "--law", "loss-fid", "--out", tmp_path / "out") == 1
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
