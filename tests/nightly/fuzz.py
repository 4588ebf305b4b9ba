"""Coverage-guided fuzzing of everything that reads what others wrote: one target for each kind of file or text.

    python tests/nightly/fuzz.py TARGET [options of libFuzzer] [folder that keeps inputs of new coverage]

A target is a function of bytes that asserts what is promised of them. A finding is whatever it raises, more than a
second of the processor, or 2 GB of memory; libFuzzer then writes the input to ./crash-*, and takes its name in place of
the folder to try it again. Needs atheris (PyPI, Python 3.11 to 3.13), which only a run of this file itself imports.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import tempfile
import time
import tomllib
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
instrumented = contextlib.nullcontext()
if __name__ == "__main__":
    import atheris

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "survival")]
    instrumented = atheris.instrument_imports(include=["bench", "suites"])

with instrumented:
    import corpus
    import test_hostile_archives as archived
    import test_hostile_judges as judges
    import test_hostile_tables as tabled
    import test_hostile_text as texts
    from test_hostile_weights import strictly_valid

    from bench import door, images, store, train, weights
    from bench import records as log
    from bench.adapters import endpoint, folder_of_images, said, server
    from bench.adapters.endpoint import Endpoint
    from bench.fetch import unpack
    from bench.identity import digest
    from bench.replies import Replies
    from bench.report import collect
    from bench.scores import COLUMNS
    from bench.types import Error, Stop
    from suites.generation import geneval
    from suites.scaling import columns, isoflop, table

SECONDS = 1.0  # of the processor, for one input
LONGEST = 8192  # bytes of an input: enough to nest deeper than Python does, and for longer numbers
PLACE = Path("place")  # below the working folder, which is the target's own


@dataclasses.dataclass(frozen=True)
class Target:
    check: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]  # good files
    words: Sequence[str | bytes]  # of the format
    form: tuple[Callable, Callable] | None  # reads and writes a tree, in which half of the mutants are changed
    seconds: float


TARGETS: dict[str, Target] = {}


def target(seeds, words=(), form=None, seconds=SECONDS):
    def add(check):
        TARGETS[check.__name__] = Target(check, seeds, words, form, seconds)
        return check

    return add


def from_toml(data):
    return tomllib.loads(data.decode())


def to_toml(tree):
    return corpus.toml_file(tree).encode("utf-8", "surrogatepass")


def to_json(tree):
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


TOML, JSON = (from_toml, to_toml), (json.loads, to_json)


# -- records


SEAL = b',"crc":"????????"}'
WHOLE = re.compile(rb'(.*),"crc":"([0-9a-f]{8})"\}', re.DOTALL)
RECORDS = [
    {"key": "a", "unit": "u/1", "status": "ok", "rows": [{"item": "i", "x": 0.5}], "blobs": {"media/p": "0" * 64}},
    {"key": "b", "unit": "u/2", "status": "failed", "error": {"kind": "Timeout", "message": "m", "trace": "t"}},
    {"key": "a", "columns": {"y": [1.5]}, "blobs": {}, "metric": "m"},  # what was measured later
]
MARKS = [SEAL, SEAL + b"\n", b"\n", b"}{", b'"key":', b'"rows":[', b'"status":"ok"', b"\xff", b"\\ud800", b"NaN"]


def sealed(data: bytes) -> bytes:
    """The same with the right checksum wherever SEAL stands for it, which no mutation would hit."""

    def whole(raw):
        *bodies, rest = raw.split(SEAL)
        return b"".join(body + b',"crc":"%08x"}' % zlib.crc32(body) for body in bodies) + rest

    return b"\n".join(map(whole, data.split(b"\n")))


def unsealed(*values) -> bytes:
    """Lines of a log with SEAL in place of their checksums."""
    return b"".join(log.line(value)[:-19] + SEAL + b"\n" for value in values)


def is_good(raw: bytes) -> bool:
    match = WHOLE.fullmatch(raw)
    return match is not None and int(match[2], 16) == zlib.crc32(match[1])


def good_and_bad(data: bytes) -> tuple[list[bytes], list[bytes], int]:
    """(good lines in order, damaged lines, bytes of an unfinished end): the rules, written down a second time."""
    lines = data.split(b"\n")
    good, bad, torn = [], [], 0
    for number, raw in enumerate(lines, 1):
        if is_good(raw):
            good.append(raw)
            continue
        inside, at = [], 0
        for end in (i + 2 for i in range(len(raw)) if raw[i : i + 2] == b'"}'):
            if not WHOLE.fullmatch(raw[at:end]):
                continue
            starts = [i for i in range(at, end) if raw[i] == ord("{")][: log.STARTS]
            inside += [raw[i:end] for i in starts if is_good(raw[i:end])][:1]
            at = end
        good += inside
        if raw and (inside or number < len(lines)):
            bad.append(raw)
        elif raw:
            torn = len(raw)
    return good, bad, torn


def objects(lines: Iterable[bytes]) -> Iterable[dict]:
    for raw in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(raw)
            if isinstance(value, dict):
                del value["crc"]
                yield value


@cache
def a_run() -> store.Run:
    spec = {"suite": "s", "suite_version": 1, "fields": {}, "seed": 0}
    return store.Store(PLACE).open(spec, {"model": "m", "units": 1, "items": 1, "manifests": []})


def record_seeds():
    whole = unsealed(*RECORDS)
    none = b"".join(body + SEAL + b"\n" for body in (b'{"a":1},{"b":2', b'{"x":[{"y":1', b'{"z":1}]'))
    return [whole, whole[:-40], whole.replace(b"\n", b""), none]


@target(record_seeds, MARKS)
def records(data):
    """A log of records: those are read that are good, and no others, before and after it is healed."""
    run, data = a_run(), sealed(data)
    path = run.log()
    aside = path.with_name(path.name + ".bad")
    aside.unlink(missing_ok=True)
    path.write_bytes(data)
    good, bad, torn = good_and_bad(data)
    lines = log.Lines(path)
    assert list(lines) == good
    assert (lines.damage.torn, list(lines.damage.bad)) == (torn, bad), lines.damage
    values, _ = log.read_lines(path)
    if max(data.count(b"["), data.count(b"{")) < 200:  # how deep Python reads depends on who calls
        assert repr(values) == repr(list(objects(good)))
    before = repr(run.records())
    log.heal(path)
    healed = path.read_bytes()
    assert [raw for raw in healed.split(b"\n") if raw] == good and healed[-1:] in (b"", b"\n")
    assert (aside.read_bytes() if aside.exists() else b"") == b"".join(raw + b"\n" for raw in dict.fromkeys(bad))
    assert repr(run.records()) == before
    assert log.heal(path) == log.Damage() and path.read_bytes() == healed
    (run.path / "extra").mkdir(exist_ok=True)
    (run.path / "extra" / "later.jsonl").write_bytes(data)
    assert all(row["unit"] for row in run.table().rows)


REQUEST = {"v": 1, "role": "chat", "messages": [{"role": "user", "content": "c"}], "sample_index": 0}
REPLY = {"key": digest(REQUEST), "request": REQUEST, "reply": {"text": "yes"}, "date": "2026"}


@target(lambda: [unsealed(REPLY), unsealed(REPLY, {**REPLY, "key": "other"}), unsealed(REPLY)[:-30]], MARKS)
def recorded(data):
    """A log of what models said: a request is answered by what was said to it, or it is told that there is nothing."""
    (PLACE / "replies").mkdir(exist_ok=True)
    (PLACE / "replies" / "replies.0.jsonl").write_bytes(sealed(data))
    for request in (REQUEST, {**REQUEST, "sample_index": 1}):
        replies = Replies(PLACE / "replies", "replay-strict")
        try:
            found = replies.recall(request)
            assert isinstance(found, dict)
        except Stop:
            pass


@target(lambda: [unsealed({"rows": [{"x": 1}], "blobs": {}}), unsealed({"THIS": [0, 0, 0, 0, "0" * 64]})], MARKS)
def caches(data):
    """What may be deleted at any time: it is used where it is whole, and otherwise made again."""
    kept, address = store.Store(PLACE / "caches"), "0" * 64
    path = kept._shared(address)
    door.make_folder(path.parent)
    for file in (path, kept.root / "fingerprints.json"):
        file.write_bytes(sealed(data.replace(b"THIS", str(path.resolve()).encode())))
    found = kept.recall(address)
    assert found is None or isinstance(found["rows"], list)
    with kept.digests() as digests:
        for name in (*digests.entries, str(path)):
            with contextlib.suppress(OSError, ValueError):
                digests.of(Path(name))
        digests.changed = False


RUN_WORDS = ["format", "spec", "model", "units", "items", "manifests", "suite", "suite_version", "fields", "seed"]
RUN_WORDS += ["digest", "name", "sensitive", "redistribute", "limit", "data", "adapter", "adapter_args", "machine"]
MANIFEST = {"name": "d", "digest": "sha256:0", "sensitive": False, "redistribute": True}


def run_seeds():
    meta = json.loads((a_run().path / "run.json").read_bytes())
    return [to_json({**meta, "manifests": [MANIFEST], "sensitive": False, "git": {}, "packages": {"numpy": "2"}})]


@target(run_seeds, RUN_WORDS, JSON)
def runs(data):
    """run.json: a run that a page can speak of, or an Error."""
    folder = PLACE / "other" / "runs" / "r"
    door.make_folder(folder)
    (folder / "run.json").write_bytes(data)
    kept, broken = store.Store(PLACE / "other"), []
    for run in kept.runs(broken=lambda name, e: broken.append(e)):
        facts = collect.facts_of(run, failures=True)
        assert facts.protocol and facts.entity and not (facts.redistribute and run.meta["redistribute"] is not True)
        assert not run.records() and not run.scores() and not run.complete()
    for e in broken:
        assert "run.json" in str(e) and e.hint and len(str(e)) < 2000


# -- manifests, plans, boards, scores: what the tests of survival do with mutants of them


def use(read, path: Path, data: bytes) -> None:
    """Accepted, and then the same when written and read again; or refused with the file and the place."""
    path.write_bytes(data)
    try:
        read(path, Path("data_manifests/again.toml").resolve())
    except Error as e:
        told = f"{e}\n{e.hint}"
        text = data.decode("utf-8", "replace")
        own = {
            "nested too deeply",
            *re.findall(r"[\w.-]{2,}", text),
            *(q for q in re.findall("'[^']+'", told) if q[1:-1] in text),
        }
        placed = texts.located(told, path, texts.WORDS) or (path.name in told and any(word in told for word in own))
        placed = placed or "cannot be read: " in told or " needs " in told  # what a board or a plan names
        assert len(told) <= 2000 and placed, told


def tomls(*trees, shipped=""):
    files = sorted(TESTS.parent.glob(shipped)) if shipped else []
    return lambda: [*map(to_toml, trees), *(p.read_bytes() for p in files if p.stat().st_size <= LONGEST)]


@target(tomls(*texts.MANIFESTS, shipped="data_manifests/*.toml"), texts.HEADER_WORDS, TOML)
def manifest(data):
    use(texts.use_manifest, Path("data_manifests/fuzz.toml").resolve(), data)


@target(tomls(texts.OF_WEIGHTS, shipped="data_manifests/weights/*.toml"), texts.WEIGHTS_WORDS, TOML)
def weights_manifest(data):
    use(texts.use_weights, Path("data_manifests/weights/fuzz.toml").resolve(), data)


@target(lambda: [texts.ITEMS], ["id", "path", "sha256", "width", "height", "cluster", "label", '""', "\r", "\n", ","])
def items(data):
    for name in ("rows", "words"):  # of pictures in parts, and whole
        use(texts.use_items, Path(f"data_manifests/{name}.items.csv").resolve(), data)


@target(tomls(texts.PLAN, shipped="bench/*.toml"), texts.PLAN_WORDS, TOML)
def plan(data):
    use(texts.use_plan, Path("plan.toml").resolve(), data)


@target(tomls(texts.BOARD, shipped="reports/*.toml"), texts.BOARD_WORDS, TOML)
def board(data):
    use(texts.use_board, Path("board.toml").resolve(), data)


@target(lambda: [texts.SCORES, texts.SCORES[:-40]], [*COLUMNS, "inf", "nan", "-0.0", "1e999", '""', "\r", ",,"])
def scores(data):
    use(texts.use_scores, Path("scores.csv").resolve(), data)


# -- weights


HEADER_WORDS = [*weights.DTYPE_BITS, "__metadata__", "dtype", "shape", "data_offsets"]
HEADER_WORDS += ['"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},']


def of_header(data: bytes) -> bytes:
    """A whole file of what an input stands for: the header, a zero byte, the tensors; or any bytes."""
    header, zero, body = data.partition(b"\0")
    return len(header).to_bytes(8, "little") + header + body if zero and data[:1] == b"{" else data


def read_header(data):
    header, _, body = data.partition(b"\0")
    return {"header": json.loads(header), "body": body}


def write_header(tree):
    return to_json(tree.get("header")) + b"\0" + (body if isinstance(body := tree.get("body"), bytes) else b"")


def header_seeds():
    from safetensors.torch import save

    whole = save(corpus.TENSORS, metadata={"format": "pt"})
    size = int.from_bytes(whole[:8], "little")
    return [
        whole,
        whole[8 : 8 + size] + b"\0" + whole[8 + size :],
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}\0x',
    ]


@target(header_seeds, HEADER_WORDS, (read_header, write_header))
def headers(data):
    """safetensors: what our check lets through is valid by the strict rules, and the library reads the same."""
    from safetensors.torch import load

    data = of_header(data)
    size, path = int.from_bytes(data[:8], "little"), Path("fuzz.safetensors")
    try:
        weights.check_header(data[8 : 8 + size], size, len(data), path)
    except Error as e:
        assert "fuzz.safetensors are not valid safetensors: " in str(e) and len(str(e)) < 400, e
        return
    assert strictly_valid(data)
    path.write_bytes(data)
    found, reference = weights.load_weights(path), load(data)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {k: (v.dtype, v.shape) for k, v in reference.items()}


CONFIGS = ("config.json", "model_index.json", "model.safetensors.index.json", "tokenizer.json")
CONFIG = {"_class_name": "AutoencoderKL", "unet": ["diffusers", "UNet2DConditionModel"], "attn_implementation": "sdpa"}
CONFIG |= {"weight_map": {"a": "model.safetensors"}, "vocab": {"automap": 1}}
CONFIG_WORDS = [*CONFIG, *corpus.CODE_KEYS, "_target_", "transformers", "stable_diffusion"]


@target(lambda: [to_json(CONFIG), to_json({"a": [{"b": {"auto_map": 1}}]})], CONFIG_WORDS, JSON)
def configs(data):
    """A configuration beside weights: none with a key that names code is let through."""
    folder, name = PLACE / "weights", CONFIGS[len(data) % len(CONFIGS)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(data)
    try:
        weights.check_folder(folder)
    except Error as e:
        assert name in str(e) and len(str(e)) < 1000, e
        return
    for key in re.findall(r'"((?:[^"\\]|\\.)*)": ', json.dumps(json.loads(data.decode("utf-8-sig")))):
        plain = re.sub("[^a-z]", "", key.lower())
        assert name == "tokenizer.json" or plain not in ("automap", "custompipeline", "trustremotecode"), key


# -- replies


CHOICES = [
    b"yes",
    b"no",
    b"Answer: ",
    b'{"answer": ',
    b'"answer": "no", ',
    b"```json\n",
    b"\n```",
    b"**",
    "“".encode(),
    b"dark red",
    b".",
]


@target(lambda: [b"\0Yes.", b'\1```json\n{"answer": 7}\n```', b"\2**dark red**", b'\3{"answer": "tie"}'], CHOICES)
def answers(data):
    """A reply to a closed question: a choice only where the whole of it is that choice."""
    choices = judges.CLOSED[data[0] % len(judges.CLOSED)] if data else judges.CLOSED[0]
    text = data[1:300].decode("utf-8", "replace")
    found = said.choice_of(text, choices)
    said.refuses(text)
    if "{" not in text and text.isascii():
        assert found == judges.by_grammar(grammar(tuple(choices)), text, choices), (found, text)
    elif found is not None:
        bare = re.sub("```[a-z]*[ \t]*\n|\\W", "", text.casefold() if "\\" not in text else "")
        assert not bare or bare.removeprefix("answer") == re.sub(r"\W", "", found.casefold()), (found, text)


grammar = cache(judges.grammar)
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer", "minimum": 0}, "why": {"type": "string"}}}
SCHEMA |= {"required": ["score"], "additionalProperties": False}
TOPS = [{"token": "yes", "logprob": -0.1}, {"token": "no", "logprob": -2.5}]


def completion(text, **more):
    choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": [{"top_logprobs": TOPS}]}}
    return to_json({"choices": [{**choice, **more}], "model": "m", "usage": {"total_tokens": 7}})


BODY_WORDS = ["choices", "message", "content", "refusal", "finish_reason", "logprobs", "top_logprobs", "token"]
BODY_WORDS += ["logprob", "usage", "length", "content_filter", "system_fingerprint", "yes", "-Infinity", "1e999"]


@target(lambda: [completion("yes"), completion('{"score": 3, "why": "w"}'), completion("no", x=1)], BODY_WORDS, JSON)
def bodies(data):
    """What a judge's server sends: an answer, or a failure of a known kind; either can be recorded."""
    judge = Endpoint("m", url="http://localhost:1/v1")
    for schema, choices in ((None, ["yes", "no"]), (SCHEMA, None), (None, None)):
        try:
            found = judge._read(endpoint._form(data), schema, choices, 1)
        except server.Fault as e:
            assert e.failure == "BadReply" and len(e.reply.encode()) <= server.KEPT
            continue
        assert not (found.failure and (found.choices or found.parsed)), found
        if found.choices is not None:
            weights = found.choices.values()
            assert all(0 <= w <= 1 for w in weights) and math.isclose(sum(weights), 1), weights
        assert log.parse_line(log.line(dataclasses.asdict(found)).rstrip(b"\n")) is not None


@target(lambda: [b"12", b"1.5", b"Wed, 21 Oct 2026 07:28:00 GMT", b"-1"], [b"Jan", b"+9999", b"GMT", b"9" * 20])
def waits(data):
    found = server.retry_after(data.decode("latin-1"))
    assert found is None or 0 <= found < math.inf


# -- tables, prompts, pictures, states, archives


HEADINGS = ["params", "tokens_B", "flops", "loss", "budget", "lr", "is_final", "condition", "warmup_tokens", "seed"]


def table_seeds():
    rows = tabled.GOOD[:8]
    yield tabled.table(rows)
    yield tabled.table(rows, delimiter=";")
    yield to_json([dict(zip(tabled.HEAD, row, strict=True)) for row in rows])
    yield to_json({name: [row[i] for row in rows] for i, name in enumerate(tabled.HEAD)})
    yield b"\n".join(to_json(dict(zip(tabled.HEAD, row, strict=True))) for row in rows)


@target(table_seeds, [*HEADINGS, "1e400", "5e-324", "nan", "1e18M", "true", '""', "\t", ";", "\ufeff"])
def tables(data):
    """A table of trainings: finite numbers above zero, or a refusal in words."""
    for name in ("t.csv", "t.json") if data.lstrip()[:1] == b"{" else ("t.csv",):
        Path(name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                runs = table.ingest(columns.read_rows(name))
                found = isoflop.profiles(runs, kappa=None)
        except (columns.TableError, Error) as e:
            assert 0 < len(str(e)) < 1000, str(e)[:300]
            continue
        for column in (runs.params, runs.tokens, runs.flops, runs.loss, runs.budget):
            assert (column > 0).all() and (column < math.inf).all()
        assert all(v.problem or (math.isfinite(v.params) and math.isfinite(v.loss)) for v in found.vertices)
        assert found.params is not None or found.warnings


@target(lambda: [b"name,prompt,seed\na.png,a cat,0\na.png,a cat,1\nb.png,dog,\n"], ["name", "prompt", "seed", "a.png"])
def prompts(data):
    """The table beside one's own pictures: the picture of each prompt and seed."""
    Path("prompts.csv").write_bytes(data)
    try:
        found = folder_of_images._read_prompts(Path("prompts.csv"), frozenset({"a.png", "b.png"}))
    except Error as e:
        assert "prompts.csv" in str(e) and e.hint and len(str(e)) < 1000, str(e)[:300]
        return
    assert {name for pictures in found.values() for name in pictures.values()} <= {"a.png", "b.png"}


TASK = {"tag": "position", "include": [{"class": "cat", "count": 1}]}
TASK["include"].append({"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]})
TASK["exclude"] = [{"class": "cat", "count": 3}]
TASK_WORDS = [*geneval.TASKS, *geneval.COLOURS, *geneval.RELATIONS, "class", "count", "color", "position"]


@target(lambda: [to_json(TASK), b'{"tag": "colors", "include": "[]"}'], TASK_WORDS, JSON)
def tasks(data):
    """GenEval's metadata, as lists and as the JSON texts of a manifest: a task that can be judged, or a ValueError."""
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
    value = value if isinstance(value, dict) else {}
    text = data.decode("utf-8", "replace")
    for include, exclude in ((value.get("include"), value.get("exclude")), (text, ""), (f"[{text}]", text)):
        try:
            task = geneval.parse(value.get("tag", "counting"), include, exclude)
        except ValueError as e:
            assert re.match("tag|include|exclude", str(e)), e
            continue
        right, why = geneval.judge(task, [])
        assert not right and why


@target(
    lambda: [data for data, _ in corpus.pictures_read().values() if len(data) <= LONGEST], ["IHDR", "IDAT"], None, 5
)
def pictures(data):
    """uint8 [H, W, 3], or an Error. Pillow's own code is not looked into."""
    try:
        found = images.read(data, name="fuzz.png")
    except Error as e:
        assert "fuzz.png" in str(e) and e.hint, e
        return
    assert found.dtype == "uint8" and found.ndim == 3 and found.shape[2] == 3 and found.size


class Recipe:
    name, version = "toy", 1


STATE = {"format": train.FORMAT, "recipe": "toy", "version": 1, "identity": "0" * 64, "step": 2, "sha256": "?" * 64}


def state_seeds():
    import torch

    file = io.BytesIO()
    losses = torch.ones(2, 1, dtype=torch.float64)
    torch.save({"parts": {"net": {"w": torch.ones(2)}}, "names": ["loss"], "losses": losses}, file)
    return [to_json(STATE) + b"\n" + file.getvalue()]


@target(state_seeds, [*STATE, b"data.pkl", b"PK\3\4", b"PK\1\2", b"PK\5\6"])
def states(data):
    """A state of a training with its right checksum: parts and losses, or one of two refusals."""
    head, _, payload = data.partition(b"\n")
    Path("1.state").write_bytes(head.replace(b"?" * 64, digest(payload).encode()) + b"\n" + payload)
    try:
        found = train.read_state(Path("1.state"), Recipe, "0" * 64)
    except (train.Damaged, Error):
        return
    assert set(found) == {"parts", "names", "losses"} and not train.not_finite(found)


def archive_seeds():
    found = archived.archives(Path("outside"))
    whole = [archived.zipped(archived.A), archived.tarred(archived.A, ("b/c.png", b"x")), gzip.compress(b"")]
    return [data for data in (*whole, *(data for _, data in found.values())) if len(data) <= 5 * LONGEST]


def right_sums(data: bytes) -> bytes:
    """A tar whose headers have their right checksums, which no mutation would hit."""
    blocks = [data[i : i + 512] for i in range(0, len(data), 512)]
    for i, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            total = sum(block) - sum(block[148:156]) + 8 * 32
            blocks[i] = block[:148] + b"%06o\0 " % total + block[156:]
    return b"".join(blocks)


@target(archive_seeds, [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"ustar", b"../", b"path=", *tarfile.SUPPORTED_TYPES])
def archives(data):
    """A zip or tar: all of it in its folder and nothing elsewhere, or the folder as it was."""
    shutil.rmtree(PLACE, ignore_errors=True)
    (PLACE / "folder").mkdir(parents=True)
    (PLACE / "folder" / "old").write_bytes(b"old")
    for content in dict.fromkeys((data, right_sums(data), gzip.compress(right_sums(data), 1))):
        (PLACE / "archive").write_bytes(content)
        before = archived.tree(PLACE)
        try:
            count = unpack(PLACE / "archive", PLACE / "folder", 20, 100_000)
        except Error as e:
            assert "archive" in str(e) and len(str(e)) < 1000, str(e)[:300]
            assert archived.tree(PLACE) == before
            continue
        found = [p for p in (PLACE / "folder").rglob("*") if not p.is_dir()]
        assert all(p.is_file() and not p.is_symlink() and p.stat().st_nlink == 1 for p in found)
        assert len(found) == count <= 20 and sum(p.stat().st_size for p in found) <= 100_000
        assert {p.name for p in PLACE.iterdir()} == {"archive", "folder"}


# -- the fuzzer


def timed(one: Target, artifacts: Path) -> Callable[[bytes], None]:
    """The check with its limit of time. It keeps what fails itself, as libFuzzer does not where Python ends slowly."""

    def run(data: bytes) -> None:
        begin = time.thread_time()
        try:
            one.check(data)
            spent = time.thread_time() - begin
            if spent > one.seconds:
                raise TimeoutError(f"{spent:.1f} s of the processor")
        except BaseException:
            (artifacts / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            raise

    return run


def mutator(one: Target) -> Callable[[bytes, int, int], bytes]:
    """Half of the mutants differ in what they mean, where they mean anything: keys, types, extreme values. A few are
    nested deeper, or hold longer numbers, than Python reads."""
    words = [str(w) for w in one.words]

    def mutate(data, most, seed):
        rng = random.Random(seed)
        if rng.random() < 0.01:
            at = rng.randrange(len(data) + 1)
            return (data[:at] + rng.choice((b"[" * 1100, b'[{"":' * 600, b"9" * 4400)) + data[at:])[:most]
        if one.form and rng.random() < 0.5:
            read, write = one.form
            with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
                other = write(corpus.tree_mutant(read(data), words, rng))
                if 0 < len(other) <= most:
                    return other
        return atheris.Mutate(data, most)

    return mutate


def lay_out(name: str) -> None:
    """An empty working folder in memory, with what targets look for; left behind, as libFuzzer ends the process."""
    root = Path(os.environ.get("TMPDIR") or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()))
    place = root / f"touchstone-fuzz-{os.getuid()}-{name}"
    shutil.rmtree(place, ignore_errors=True)
    (place / "data_manifests/weights").mkdir(parents=True)
    (place / "seeds").mkdir()
    os.chdir(place)
    PLACE.mkdir()
    Path("published.csv").write_bytes(texts.SCORES)
    Path("data_manifests/rows.toml").write_bytes(to_toml(texts.MANIFESTS[2]))
    Path("data_manifests/words.toml").write_bytes(to_toml(texts.MANIFESTS[0]))


def main(name: str, *options: str) -> None:
    one, here = TARGETS[name], Path.cwd()
    options = [str(here / o) if not o.startswith("-") else o for o in options]
    lay_out(name)
    for i, data in enumerate(one.seeds()):
        Path(f"seeds/{i}").write_bytes(data)
    words = [w.encode("utf-8", "surrogatepass") if isinstance(w, str) else w for w in one.words]
    escaped = ("".join(map("\\x{:02x}".format, word)) for word in words if word)
    Path("words").write_text("".join(f'"{word}"\n' for word in escaped))
    fixed = ["-rss_limit_mb=2048", "-timeout=20", f"-max_len={LONGEST}", "-print_final_stats=1", "-dict=words"]
    fixed += [f"-artifact_prefix={here}/"]
    single = any(Path(o).is_file() for o in options)
    arguments = [sys.argv[0], *fixed, *options, *([] if single else ["seeds"])]
    atheris.Setup(arguments, timed(one, here), custom_mutator=mutator(one))
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    main(*sys.argv[1:])
