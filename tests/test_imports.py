"""Rules that a parser can hold: who imports whom, one door for writes, no global random state, no pickles."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for top in ("bench", "suites") for p in (ROOT / top).rglob("*.py"))
HEAVY = {
    "torch",
    "torchvision",
    "pandas",
    "scipy",
    "matplotlib",
    "transformers",
    "diffusers",
    "ray",
    "sklearn",
    "skimage",
}
CONTRACTS = {f"bench.{name}" for name in ("types", "capabilities", "identity", "suite", "recipe")}
LEARNT = CONTRACTS | {"bench.stats", "bench.weights", "bench.images"}  # what metrics and adapters may use
LEARNT |= {"bench.pictures", "bench.text"}  # pictures as a model sees them; secrets to be masked
GLUE = ("suite.py", "recipes.py", "recipes_judges.py")

# call -> where it may stand, and why it does not go through bench/door.py
WRITERS = {
    "bench/fetch.py: open": "unpacks into the empty folder that door.replace_folder puts in place",
    "bench/train.py: write_text": "as above",
    "bench/train.py: write_bytes": "as above",
    "bench/train.py: savefig": "as above",
    "bench/weights.py: save_file": "a child process converts into a temporary folder",
    "suites/reconstruction/recipes.py: save_pretrained": "export fills the empty folder of door.replace_folder",
    "suites/reconstruction/recipes.py: save_file": "as above",
    "suites/generation/recipes.py: save_pretrained": "as above",
    "suites/generation/recipes.py: write_text": "as above",
    "suites/generation/tokenizer.py: write_text": "as above, or into a temporary folder",
    "suites/generation/recipes_judges.py: save_file": "as above",
    "suites/generation/recipes_judges.py: save_pretrained": "as above",
    "suites/scaling/recipes.py: save_file": "as above",
    "suites/scaling/recipes.py: write_text": "as above",
}
BROAD = {
    "bench/ahead.py": "raised again in the thread that asked",
    "bench/checks/report.py": "a model under test may fail in any way, and that is a finding",
    "bench/config.py": "resolving a foreign annotation runs foreign code",
    "bench/ray_engine.py": "Ray's start raises what it likes, a bare Exception too",
    "bench/registry.py": "a plugin may fail in any way",
    "bench/models.py": "a foreign constructor may fail in any way: the model cannot be opened",
    "bench/train.py": "torch promises nothing for a damaged state that it did not write",
    "bench/worker.py": "around a unit: the failure is recorded",
}


def name(path):
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p) for p in FILES}


def parse(path):
    return ast.parse(path.read_text(), str(path))


def walk(tree):
    """Every node but those below `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from walk(node)


def imports(path):
    """The modules that a file imports, at any depth: `from bench import stats` is bench.stats."""
    found = set()
    for node in walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {i if i in MODULES else node.module for i in inner}
    return found


def ours(modules, top):
    return {m for m in modules if m == top or m.startswith(top + ".")}


def inside(modules, *roots):
    return {m for m in modules if any(m == r or m.startswith(r + ".") for r in roots)}


def calls(path):
    """(called expression as text, its node) of every call."""
    return [(ast.unparse(node.func), node) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]


def test_there_is_something_to_check():
    assert {"bench/types.py", "suites/reconstruction/suite.py"} <= {name(p) for p in FILES}
    assert "bench.types" in imports(ROOT / "bench/stats.py") and "scipy.special" in imports(ROOT / "bench/stats.py")


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-3:-2] == ("suites",) and p.name not in GLUE], ids=name)
def test_suite_libraries_know_no_harness(path):
    found = imports(path)
    own = f"suites.{path.parent.name}"
    assert not ours(found, "bench")
    assert inside(ours(found, "suites"), own, "suites.shared") == ours(found, "suites")
    assert not {m for m in found if m.endswith((".suite", ".recipes"))}


@pytest.mark.parametrize("path", [p for p in FILES if p.name in GLUE and p.parts[-3:-2] == ("suites",)], ids=name)
def test_suites_use_contracts_metrics_and_their_own_library(path):
    found = imports(path)
    allowed = inside(found, *LEARNT, "bench.metrics", "bench.mini") | {"bench"}
    assert ours(found, "bench") <= allowed
    own = f"suites.{path.parent.name}"
    assert inside(ours(found, "suites"), own, "suites.shared") == ours(found, "suites")


@pytest.mark.parametrize("path", [p for p in FILES if name(p).startswith("bench/")], ids=name)
def test_the_harness_knows_no_suite_and_no_adapter(path):
    found = imports(path)
    assert not ours(found, "suites")
    if path.parent.name != "adapters":
        assert not ours(found, "bench.adapters")


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in ("metrics", "adapters")], ids=name)
def test_metrics_and_adapters_know_the_contracts_only(path):
    found = ours(imports(path), "bench")
    assert found - inside(found, f"bench.{path.parent.name}", "bench.mini") - LEARNT - {"bench"} == set()


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p) in CONTRACTS], ids=name)
def test_contracts_know_contracts_only(path):
    assert ours(imports(path), "bench") <= CONTRACTS


def test_light_modules_load_nothing_heavy():
    """The package, the harness and every suite.py and recipes.py, imported in a process of their own."""
    harness = {module_of(p) for p in FILES if p.parent == ROOT / "bench"} - {"bench.__main__"}
    glue = {module_of(p) for p in FILES if p.name in GLUE and p.parts[-3:-2] == ("suites",)}
    names = sorted(harness | glue | {"bench.metrics", "bench.adapters", "bench.mini", "suites.noise"})
    code = (
        "import importlib, json, sys\n"
        f"heavy = {sorted(HEAVY)}\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    found = [h for h in heavy if h in sys.modules]\n"
        "    if found: print(json.dumps([name, found])); break\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bench_list_loads_nothing_heavy(tmp_path):
    code = (
        "import json, sys\nfrom bench.cli import main\n"
        "try:\n    main(['list'])\nexcept SystemExit as e:\n    assert not e.code\n"
        f"print(json.dumps(sorted(set({sorted(HEAVY)}) & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "reconstruction" in done.stdout


def buffers(path):
    """For each call node, is its file argument a name that the same function bound to BytesIO or StringIO?"""
    found = set()
    for scope in ast.walk(parse(path)):
        if not isinstance(scope, ast.FunctionDef | ast.Module):
            continue
        pairs = [(a.targets[0], a.value) for a in ast.walk(scope) if isinstance(a, ast.Assign)]
        for target, value in list(pairs):
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=True)
        memory = {
            ast.unparse(t)
            for t, v in pairs
            if ast.unparse(v).endswith(("BytesIO()", "StringIO()", "StringIO(newline='')"))
        }
        if isinstance(scope, ast.Module):
            continue
        for node in ast.walk(scope):
            if isinstance(node, ast.Call) and any(ast.unparse(a) in memory for a in node.args):
                found.add((node.lineno, node.col_offset))
    return found


def writers(path):
    """The name of each call that writes to a path, as `file: call`."""
    in_memory = buffers(path)
    for text, node in calls(path):
        last = text.rpartition(".")[2]
        mode = next((k.value for k in node.keywords if k.arg == "mode"), node.args[1] if len(node.args) > 1 else None)
        mode = mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) else "r"
        opens = text == "open" and set(mode) & set("wax+")
        opens = opens or (
            text.endswith(".open") and text.split(".")[0] in ("gzip", "io", "zipfile") and set(mode) & set("wax")
        )
        saves = last in SAVERS and (node.lineno, node.col_offset) not in in_memory and node.args
        if opens or saves:
            yield f"{name(path)}: {last}"


SAVERS = {
    *("write_text", "write_bytes", "savefig", "imsave", "save", "savez", "savez_compressed", "savetxt", "tofile"),
    *("save_file", "save_pretrained", "to_csv", "to_json", "to_parquet", "to_html", "to_excel"),
}


def test_one_door_for_writes():
    found = {w for path in FILES if name(path) != "bench/door.py" for w in writers(path)}
    assert found == set(WRITERS), "write through bench.door, or say here why not; drop what is no longer there"


def test_the_writer_check_sees_writers(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "x.py"
    for line in ("open(p, 'w')", "open(p, mode='ab')", "p.write_text(t)", "np.save(p, a)", "f.savefig('a.png')"):
        path.write_text(f"def f(p):\n    {line}\n")
        assert list(writers(path)), line
    for line in ("open(p)", "open(p, 'rb')", "b = io.BytesIO(); np.save(b, a)"):
        path.write_text(f"def f(p):\n    {line}\n")
        assert not list(writers(path)), line


GLOBAL_STATE = {
    *("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.set_rng_state"),
    *("torch.random.manual_seed", "random.seed", "np.random.seed", "numpy.random.seed", "seed_everything", "set_seed"),
}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_global_random_state(path):
    """No seeding of it and no draw from it: torch's draws need generator=, NumPy's a Generator."""
    for text, node in calls(path):
        where = f"{name(path)}:{node.lineno} {text}"
        parts = text.split(".")
        if text in ("np.random.get_state", "random.getstate"):  # read, to see whether a model touched it
            continue
        assert text not in GLOBAL_STATE and parts[-1] not in ("seed_everything", "set_seed"), where
        if parts[0] == "torch" and len(parts) == 2 and parts[1] in TORCH_DRAWS:
            assert any(k.arg == "generator" for k in node.keywords), where
        if parts[:-1] in (["np", "random"], ["numpy", "random"]):
            assert parts[-1] in ("Generator", "Philox", "PCG64", "SeedSequence", "default_rng", "RandomState"), where
            assert node.args or node.keywords, where
        assert not (parts[0] == "random" and len(parts) == 2 and parts[1] != "Random"), where


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_unpickles(path):
    assert not imports(path) & {"dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for text, node in calls(path):
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{name(path)}:{node.lineno} {text}"
        if text in ("torch.load", "torch.jit.load", "torch.hub.load"):
            assert text == "torch.load" and keywords.get("weights_only") == "True", where
        assert keywords.get("allow_pickle", "False") == "False", where
        assert keywords.get("trust_remote_code", "False") == "False", where
        assert not text.endswith("read_pickle") and text not in ("eval", "exec"), where
        assert not text.lower().startswith(("pickle.load", "pickle.unpickler")), where


def test_broad_excepts_are_the_known_ones():
    found = {
        name(path)
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or "Exception" in ast.unparse(node.type).split("."))
    }
    assert found <= set(BROAD), "catch what can happen by name"
