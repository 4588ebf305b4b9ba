"""What models said, recorded and replayed: keys, modes, damage, several writers, no secrets."""

import json
import threading

import numpy as np
import pytest
from judge_server import Asking, JudgeServer, Numbered, http

from bench import Answer, Completion, Error, Store, execute
from bench.adapters.endpoint import Endpoint
from bench.adapters.mini_vqa import MiniVQA
from bench.config import How
from bench.records import line
from bench.replies import MODES, Replies
from bench.text import secrets
from bench.types import Stop

PICTURE = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
MESSAGE = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Well?"}]}]


class Talker:
    """Says something else every time."""

    colour = "grey"

    def __init__(self, failure=""):
        self.failure, self.said = failure, 0

    def complete(self, messages, *, schema=None, choices=None, seed=0, max_tokens=512):
        self.said += 1
        return Completion(f"word {self.said}", failure=self.failure, served={"model": "talker"})

    def answer(self, image, question, choices):
        self.said += 1
        return Answer(np.array([0.25, 0.75], np.float32) + 0 * self.said, failure=self.failure)


def around(folder, model=None, mode="record", identity=("talker", {})):
    return Replies(folder, mode).around(model or Talker(), lambda: list(identity))


def test_the_same_question_is_asked_once(tmp_path):
    first = around(tmp_path)
    said = first.complete(MESSAGE, seed=1)
    again = around(tmp_path)
    assert again.complete(MESSAGE, seed=1) == first.complete(MESSAGE, seed=1) == said and len(said.key) == 64
    assert again.answer(PICTURE, "Well?", ("a", "b")).probabilities == pytest.approx([0.25, 0.75])
    assert again.answer(PICTURE, "Well?", ["a", "b"]).key == again.answer(PICTURE, "Well?", ("a", "b")).key
    assert (first.said, again.said) == (1, 1) and again.colour == "grey"
    with pytest.raises(AttributeError):
        _ = again.flavour


def test_what_decides_a_reply_is_in_its_key_and_nothing_else(tmp_path):
    one = around(tmp_path)
    other = PICTURE.copy()
    other[0, 0, 0] += 1
    message = [{"role": "user", "content": [{"type": "image", "image": other}, {"type": "text", "text": "Well?"}]}]
    keys = [
        one.complete(MESSAGE).key,
        one.complete(message).key,
        one.complete(MESSAGE, seed=1).key,
        one.complete(MESSAGE, max_tokens=3).key,
        one.complete(MESSAGE, sample_index=1).key,
        one.complete(MESSAGE, choices=["a", "b"]).key,
        one.complete(MESSAGE, choices=["b", "a"]).key,
        one.complete(MESSAGE, schema={"type": "object"}).key,
        one.complete([{"role": "system", "content": "Well?"}]).key,
        around(tmp_path, identity=("talker", {"temperature": 1.0})).complete(MESSAGE).key,
        one.answer(PICTURE, "Well?", ["a", "b"]).key,
        one.answer(PICTURE, "Well?", ["b", "a"]).key,
        one.answer(other, "Well?", ["a", "b"]).key,
        one.answer(PICTURE.reshape(3, 2, 8), "Well?", ["a", "b"]).key,
        one.answer(PICTURE, "Well?", ["a", "b"], sample_index=1).key,
    ]
    assert len(set(keys)) == len(keys)
    floats = PICTURE.astype(np.float32) / 255
    assert one.answer(floats, "Well?", ["a", "b"]).key == one.answer(PICTURE, "Well?", ["a", "b"]).key
    with JudgeServer() as server, JudgeServer() as elsewhere:
        urls = [(server, {"timeout": 3.0}), (elsewhere, {"tries": 2, "seconds": 9.0})]
        models = [around(tmp_path, Endpoint("toy", url=s.url, **how), identity=("endpoint", {})) for s, how in urls]
        found = [m.answer(PICTURE, "Well?", ["a", "b"]) for m in models]
        assert found[0] == found[1] and (len(server.calls), len(elsewhere.calls)) == (1, 0)


def test_modes(tmp_path):
    talker = Talker()
    assert around(tmp_path, talker, "replay").complete(MESSAGE).text == "word 1"
    assert around(tmp_path, talker, "off").complete(MESSAGE, sample_index=3).text == "word 2"
    assert not list(tmp_path.iterdir())  # neither records
    assert around(tmp_path, talker, "record").complete(MESSAGE).text == "word 3"
    for mode in ("record", "replay", "replay-strict"):
        assert around(tmp_path, talker, mode).complete(MESSAGE).text == "word 3"
    assert around(tmp_path, talker, "off").complete(MESSAGE).text == "word 4"
    assert around(tmp_path, talker, "refresh").complete(MESSAGE).text == "word 5"
    assert around(tmp_path, talker, "replay-strict").complete(MESSAGE).text == "word 5"
    assert set(MODES) == {"record", "replay", "replay-strict", "refresh", "off"}
    with pytest.raises(Error, match="replies is 'both'"):
        Replies(tmp_path, "both")


def test_what_is_not_recorded_stops_a_strict_replay_and_says_how_it_differs(tmp_path):
    with pytest.raises(Stop, match="holds none"):
        around(tmp_path, mode="replay-strict").complete(MESSAGE)
    around(tmp_path).complete(MESSAGE, seed=1)
    around(tmp_path).answer(PICTURE, "Well?", ["a", "b"])
    talker = Talker()
    with pytest.raises(Stop, match=r"differs from the nearest in seed is 2, not 1\Z") as caught:
        around(tmp_path, talker, "replay-strict").complete(MESSAGE, seed=2)
    assert talker.said == 0 and "--replies record" in caught.value.hint


def test_failures_are_asked_again(tmp_path):
    failing = Talker("Timeout")
    one = around(tmp_path, failing)
    assert one.answer(PICTURE, "Well?", ["a", "b"]).failure == "Timeout"
    assert one.complete(MESSAGE).failure == "Timeout" and not list(tmp_path.iterdir())
    failing.failure = ""
    assert not one.complete(MESSAGE).failure and failing.said == 3


def test_damage_costs_the_reply_that_it_hits(tmp_path):
    talker = Talker()
    one = around(tmp_path, talker)
    for seed in range(4):
        one.complete(MESSAGE, seed=seed)
    del one  # lets go of its file
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"word 2", b"word 9")
    path.write_bytes(b"".join(lines)[:-20])
    again = around(tmp_path, talker)
    found = [again.complete(MESSAGE, seed=seed).text for seed in range(4)]
    assert found == ["word 1", "word 5", "word 3", "word 6"]
    assert [around(tmp_path, talker).complete(MESSAGE, seed=s).text for s in range(4)] == found and talker.said == 6


def test_whole_lines_that_hold_no_reply_are_passed_over(tmp_path):
    one = around(tmp_path)
    one.complete(MESSAGE)
    del one
    (path,) = tmp_path.glob("*.jsonl")
    known = json.loads(path.read_bytes())
    for odd in ({"reply": None}, {"request": 1}, {"request": []}):
        with open(path, "ab") as file:
            file.write(line({"key": known["key"], "date": "9", **{k: known[k] for k in ("request", "reply")}, **odd}))
    reader = around(tmp_path, mode="replay-strict")
    assert reader.complete(MESSAGE).text == "word 1"
    with pytest.raises(Stop, match="no reply is recorded"):
        reader.complete(MESSAGE, seed=1)


def test_several_writers_have_a_file_each_and_lines_may_move(tmp_path):
    a, b = around(tmp_path), around(tmp_path)
    for seed in range(3):
        a.complete(MESSAGE, seed=seed)
        b.complete(MESSAGE, seed=10 + seed)
    assert len(list(tmp_path.glob("replies.*.jsonl"))) == 2
    reader = around(tmp_path, mode="replay-strict")
    assert reader.complete(MESSAGE, seed=2).text == "word 3"
    path = tmp_path / "replies.0.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))  # as if its writer had healed it
    assert [reader.complete(MESSAGE, seed=s).text for s in (2, 1, 12)] == ["word 3", "word 2", "word 3"]
    with pytest.raises(Stop):
        reader.complete(MESSAGE, seed=0)


def test_threads_share_a_store(tmp_path):
    one = around(tmp_path)
    threads = [
        threading.Thread(target=lambda i=i: [one.complete(MESSAGE, seed=s) for s in range(i, i + 10)]) for i in range(4)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    (path,) = tmp_path.glob("*.jsonl")
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(set(keys)) == 13


def test_no_secret_and_no_picture_is_stored(tmp_path):
    secrets().add("canary-of-replies")
    one = around(tmp_path)
    message = [{"role": "user", "content": 'say canary-of-replies \\ "http://x?a=b\\'}]
    one.complete(message)
    one.complete(MESSAGE)
    (path,) = tmp_path.glob("*.jsonl")
    text = path.read_text()
    assert "canary-of-replies" not in text and "***" in text
    request = json.loads(text.splitlines()[1])["request"]["messages"][0]["content"][0]
    assert request.keys() == {"type", "image"} and request["image"]["size"] == [4, 4]
    assert around(tmp_path, mode="replay-strict").complete(message).text == "word 1"


def test_a_model_of_ours_is_known_by_its_weights():
    identity = MiniVQA().identity()
    assert len(identity) == 2 and all(len(digest) == 64 for digest in identity)


def test_a_model_that_does_not_talk_is_as_it_was(tmp_path):
    model = Numbered()
    assert Replies(tmp_path).around(model, lambda: 1 / 0) is model


def test_a_run_replays_what_another_recorded_without_its_judge(tmp_path):
    """Another model on the same pictures: nothing is asked, though the judge is gone."""
    with JudgeServer() as server:
        suite = Asking(judge=server.judge(tries=1, timeout=2.0))
    how = How(devices="cpu", threads=1, replies="replay-strict")

    def run(name, how):
        return execute(suite, Numbered(), store=Store(tmp_path), identity={"name": name}, how=how)

    with pytest.raises(Stop, match="no reply is recorded"):
        run("a", how)
    with JudgeServer() as server:
        suite = Asking(judge=server.judge(timeout=2.0))
        first = run("a", How(devices="cpu", threads=1))
        assert len(server.calls) == 4
        server.script = lambda item, call: http(500)
        second = run("b", how)
        assert len(server.calls) == 4 and second.complete()
    assert [s.value for s in first.scores()] == [s.value for s in second.scores()] == [0.5]
