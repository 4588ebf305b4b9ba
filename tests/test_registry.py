"""Names meet objects: entry points, files at hand, suggestions, two owners, and plugins that are broken."""

import subprocess
import sys
from pathlib import Path

import pytest
import toys
from toys import command

from bench import Error, UsageError, registry

TOYS = str(Path(toys.__file__).resolve())


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Installs a distribution of one module with entry points, for this test alone."""

    def install(name, groups, source="", module=None):
        module = module or name.replace("-", "_")
        info = tmp_path / "site" / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        text = "".join(f"[bench.{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in groups.items())
        (info / "entry_points.txt").write_text(text)
        (tmp_path / "site" / f"{module}.py").write_text(source)
        if str(tmp_path / "site") not in sys.path:
            monkeypatch.syspath_prepend(str(tmp_path / "site"))
        registry.entries.cache_clear()

    yield install
    monkeypatch.undo()
    registry.entries.cache_clear()


SUITE = f"import sys\nsys.path.append({str(Path(TOYS).parent)!r})\nfrom toys import Drawing, Painter\n"


def test_a_plugin_is_found_by_its_name(plugin):
    plugin(
        "lab-suites", {"suites": {"lab.draw": "lab_suites:Drawing"}, "adapters": {"lab": "lab_suites:Painter"}}, SUITE
    )
    assert registry.find("suites", "lab.draw").name == "drawing"
    (entry,) = (e for e in registry.entries("adapters") if e.name == "lab")
    assert (entry.owner, entry.builtin) == ("lab-suites", False)


def test_one_name_with_two_owners_is_an_error_that_names_both(plugin):
    plugin("lab-one", {"suites": {"twin": "lab_one:Drawing"}}, SUITE)
    plugin("lab-two", {"suites": {"twin": "lab_two:Drawing"}}, SUITE)
    with pytest.raises(Error) as caught:
        registry.find("suites", "twin")
    assert str(caught.value) == "suite 'twin' is registered by lab-one and by lab-two"
    assert "path.py:name" in caught.value.hint
    wrong = [w for e, _, w in registry.describe("suites") if e.name == "twin"]
    assert wrong == ["registered by more than one package"] * 2


@pytest.mark.parametrize(
    "source, value, says",
    [
        ("import einops_that_is_missing\n", "X", "ModuleNotFoundError: No module named 'einops_that_is_missing'"),
        ("1/0\n", "X", "ZeroDivisionError"),
        ("import sys; sys.exit(3)\n", "X", "SystemExit: 3"),
        ("", "X", "AttributeError"),
        ("X = 3\n", "X", "not a class derived from bench.Suite"),
        ("def (\n", "X", "SyntaxError"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_reason_and_breaks_nothing_else(plugin, capsys, source, value, says):
    from bench.show import print_list
    from bench.store import Store

    plugin("lab-broken", {"suites": {"broken-one": f"lab_broken:{value}"}}, source)
    sys.modules.pop("lab_broken", None)
    with pytest.raises(Error, match="suite 'broken-one' is broken") as caught:
        registry.find("suites", "broken-one")
    assert says in str(caught.value) and caught.value.hint
    sys.modules.pop("lab_broken", None)
    print_list(Store("nowhere"), "suites", as_json=False)
    out = capsys.readouterr().out
    above, _, below = out.partition("\nbroken\n")
    assert "reconstruction" in above and "broken-one" in below and says in below


def test_a_foreign_adapter_is_described_without_being_imported(plugin):
    plugin("lab-heavy", {"adapters": {"heavy": "lab_heavy:Model"}}, "raise RuntimeError('imported')\n")
    found = {e.name: (obj, wrong) for e, obj, wrong in registry.describe("adapters")}
    assert found["heavy"] == (None, "") and found["toy"][0] is not None
    assert "lab_heavy" not in sys.modules


def test_an_unknown_name_has_a_suggestion_or_the_choices():
    with pytest.raises(UsageError) as caught:
        registry.find("suites", "reconstuction")
    assert str(caught.value) == "unknown suite 'reconstuction'" and caught.value.hint == "did you mean reconstruction?"
    with pytest.raises(UsageError) as caught:
        registry.find("adapters", "zzz")
    assert "toy" in caught.value.hint


def test_anything_can_be_named_in_place_and_says_so_once(capsys):
    assert registry.find("suites", f"{TOYS}:Drawing").name == "drawing"
    assert registry.find("suites", f"{TOYS}:Drawing") is registry.find("suites", f"{TOYS}:Drawing")
    assert registry.find("adapters", f"{TOYS}:Painter")().speed == 1
    assert capsys.readouterr().err.count("running ") <= 1


@pytest.mark.parametrize(
    "name, kind, says, hint",
    [
        (TOYS, "suites", "names a file but no object", ":Name"),
        ("nowhere.py:X", "suites", "nowhere.py does not exist", ""),
        ("~nobody-here/x.py:X", "suites", "~nobody-here/x.py does not exist", ""),
        ("\0.py:X", "suites", "does not exist", ""),
        (f"{'a' * 300}.py:X", "suites", "aaa... does not exist", ""),
        ("a" * 300, "suites", "aaa...'", ""),
        (f"{TOYS}:Drawnig", "suites", "has no 'Drawnig'", "did you mean Drawing"),
        (f"{TOYS}:Painter", "suites", "not a class derived from bench.Suite", "class"),
        (f"{TOYS}:Drawing", "recipes", "not a class derived from bench.Recipe", "class"),
    ],
)
def test_a_file_that_does_not_hold_what_was_named(name, kind, says, hint):
    with pytest.raises(Error) as caught:
        registry.find(kind, name)
    assert says in str(caught.value) and hint in caught.value.hint


def test_a_file_that_cannot_be_run_is_the_users_error(tmp_path, capsys):
    for i, (text, says) in enumerate(
        [("1/0", "ZeroDivisionError"), ("def (", "SyntaxError"), ("exit(2)", "SystemExit")]
    ):
        (tmp_path / f"bad{i}.py").write_text(text)
        with pytest.raises(Error, match=says) as caught:
            registry.find("adapters", f"{tmp_path}/bad{i}.py:X")
        assert "cannot be run" in str(caught.value) and f"bad{i}.py" in caught.value.hint
    (tmp_path / "chatty.py").write_text("print('hello')\ndef X(): ...\n")
    registry.find("adapters", f"{tmp_path}/chatty.py:X")
    done = capsys.readouterr()
    assert done.out == "" and "hello" in done.err


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text(f"def X(): return {value}\n")
    assert [registry.find("adapters", f"{tmp_path}/{f}/m.py:X")() for f in "ab"] == [1, 2]


DRAWING = '''
import torch
from PIL import Image

def floats(prompts, seeds):
    """Grey of the length of the prompt."""
    return torch.stack([torch.full((3, 4, 6), len(p) / 20, dtype=torch.float64) for p in prompts])

def bytes_(prompts, seeds):
    return torch.stack([torch.full((3, 4, 6), 10 * s, dtype=torch.uint8) for s in seeds])

def images(prompts, seeds, mode="L"):
    return [Image.new(mode, (6, 4), 10 * s) for s in seeds]

def uneven(prompts, seeds):
    return [Image.new("RGB", (6 + s, 4)) for s in seeds]

def arrays(prompts, seeds):
    return torch.zeros(len(seeds), 4, 6, 3).numpy()

def grey(prompts, seeds):
    return torch.zeros(len(seeds), 1, 4, 6)

def too_few(prompts, seeds):
    return torch.zeros(1, 3, 4, 6)

def make(factor: int = 2):
    return "a factory as before"
'''


def test_a_function_of_prompts_and_seeds_is_a_model(tmp_path):
    import torch

    from bench.capabilities import held

    (tmp_path / "drawing.py").write_text(DRAWING)

    def generate(name):
        model = registry.find("adapters", f"{tmp_path}/drawing.py:{name}")
        assert held(model) == ("TextToImage",) and model.__name__ == name
        return model().generate(("four", "letters"), (1, 2))

    for name, expected in (
        ("floats", (4 / 20, 7 / 20)),
        ("bytes_", (10 / 255, 20 / 255)),
        ("images", (10 / 255, 20 / 255)),
    ):
        pictures = generate(name)
        assert pictures.shape == (2, 3, 4, 6) and pictures.dtype == torch.float32
        assert torch.equal(pictures[:, 0, 0, 0], torch.tensor(expected))
    says = {
        "uneven": "several sizes",
        "arrays": r"ndarray of shape",
        "grey": r"\[2, 1, 4, 6\]",
        "too_few": "1 pictures for 2",
    }
    for name, text in says.items():
        with pytest.raises(Error, match=text):
            generate(name)
    assert registry.find("adapters", f"{tmp_path}/drawing.py:make")() == "a factory as before"
    identity = registry.identity(f"{tmp_path}/drawing.py:floats")
    (tmp_path / "drawing.py").write_text(DRAWING + "# changed")
    assert identity.startswith("drawing.py:floats@") and registry.identity(f"{tmp_path}/drawing.py:floats") != identity


def test_a_function_is_checked_from_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef draw(prompts, seeds):\n"
        "    grey = [0.3 + 0.01 * len(p) for p in prompts]\n"
        "    noise = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds]\n"
        "    return torch.stack([g + 0.1 * n for g, n in zip(grey, noise)])\n"
    )
    done = command(tmp_path, "check", "--model", "mine.py:draw")
    assert done.code == 0 and "fail" not in done.out and "TextToImage: other order" in done.out, done.out


def test_a_foreign_package_called_suites_is_reported_at_start(tmp_path):
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "__init__.py").write_text("")
    code = "import sys; from bench.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "score", "noise", "--model", "toy"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"the package `suites` found first is {tmp_path}/suites, not" in done.stderr
    assert "PYTHONPATH" in done.stderr and "Traceback" not in done.stderr


def test_the_example_of_the_readme_by_its_name(tmp_path):
    done = command(tmp_path, "score", "nose", "--model", "toy")
    assert done.code == 2 and done.err == "error: unknown suite 'nose'\n\nhint: did you mean noise?\n"


@pytest.mark.parametrize(
    "argv",
    [
        ("score", "noise", "--model", "vae", "-m", "weights=~nobody-here/x"),
        ("data", "verify", "image-folder:~nobody-here/x"),
        ("score", "images", "--model", "folder-of-images", "-m", "path=~nobody-here/x"),
    ],
)
def test_the_home_of_nobody_is_refused_in_words(tmp_path, argv):
    done = command(tmp_path, *argv)
    assert done.code in (1, 2) and "~nobody-here/x" in done.err and "Traceback" not in done.err
