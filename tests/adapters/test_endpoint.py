"""A model behind a server: what is sent, what is made of what comes back, what is refused at opening."""

import json
import math
import threading
import time

import judge_server
import numpy as np
import pytest
import torch
from judge_server import JudgeServer, http, said
from toys import command

from bench import Error, UsageError
from bench.adapters import said as reading
from bench.adapters.endpoint import Endpoint
from bench.adapters.server import Server, retry_after
from bench.capabilities import ChatModel, VQAModel, has

PICTURE = np.full((3, 4, 4), 2, np.uint8)


def one(server, **arguments):
    return Endpoint("toy", url=server.url, **{"tries": 3, "timeout": 5.0, **arguments})


def listed(content, logprobs):
    """A reply with log-probabilities of its first token."""
    body = json.loads(said(content))
    tops = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    body["choices"][0]["logprobs"] = {"content": [{"token": content, "logprob": 0, "top_logprobs": tops}]}
    return http(200, json.dumps(body))


def test_bench_check_passes(tmp_path):
    with JudgeServer() as server:
        done = command(tmp_path, "check", "--model", "endpoint", "-m", "model=toy", "-m", f"url={server.url}")
        assert done.code == 0 and "ChatModel" in done.out and "VQAModel" in done.out, done
        assert not [line for line in done.out.splitlines() if line.startswith(("fail", "warn"))]
        assert len(server.calls) == 5
        assert has(one(server), ChatModel) and has(one(server), VQAModel)


def test_what_is_sent():
    with JudgeServer() as server:
        image = torch.full((3, 5, 6), 0.5)
        assert one(server).answer(image, "Which colour?", ["red", "green"]).probabilities == [1.0, 0.0]
        (call,) = server.calls
        assert call.path == "/v1/chat/completions" and "authorization" not in call.headers
        assert call.picture.shape == (5, 6, 3) and (call.picture == 128).all()
        assert call.text == 'Which colour?\nReply with exactly one of these and nothing else: "red", "green"'
        body = {k: v for k, v in call.body.items() if k != "messages"}
        assert body == {"model": "toy", "temperature": 0.0, "top_p": 1.0, "max_tokens": 64, "seed": 0,
                        "logprobs": True, "top_logprobs": 20}  # fmt: skip
        one(server, temperature=None, top_p=None).complete([{"role": "user", "content": "Hello"}], seed=2**40 + 5)
        body = server.calls[-1].body
        assert "temperature" not in body and "top_p" not in body and body["seed"] == 5
        assert body["messages"] == [{"role": "user", "content": "Hello"}]


def test_probabilities_come_from_the_first_token_where_the_server_gives_them():
    cases = [
        ("yes", {"yes": math.log(0.6), " Yes": math.log(0.1), "no": math.log(0.2), "maybe": -9.0}, [7 / 9, 2 / 9]),
        ("yes", {"y": math.log(0.5), "n": math.log(0.5)}, [0.5, 0.5]),
        ("yes", {"no": math.log(0.9), "yes": math.log(0.1)}, [1.0, 0.0]),  # not what was said
        ("yes", {"the": -0.1}, [1.0, 0.0]),
        ("yes", {"yes": 0.5}, [1.0, 0.0]),  # no probability
        ("no", {}, [0.0, 1.0]),
    ]  # fmt: skip
    with JudgeServer() as server:
        for content, logprobs, expected in cases:
            server.script = lambda item, call, c=content, p=logprobs: listed(c, p)
            found = one(server).answer(PICTURE, "Is it?", ["yes", "no"])
            assert found.probabilities == pytest.approx(expected, abs=1e-12), (content, logprobs)
        server.script = lambda item, call: listed("1", {"1": math.log(0.7), "10": math.log(0.3)})
        found = one(server).answer(PICTURE, "How many?", ["1", "10", "2"])
        assert found.probabilities == pytest.approx([0.7, 0.3, 0.0])


REFUSED = {
    "logprobs": ("logprobs are not supported", lambda body: "logprobs" in body or "top_logprobs" in body),
    "max_tokens": ("use max_completion_tokens instead of max_tokens", lambda body: "max_tokens" in body),
    "seed": ("unknown field `seed`", lambda body: "seed" in body),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_server_refuses_to_take_is_left_out_from_then_on(name):
    complaint, has_it = REFUSED[name]

    def script(item, call):
        return http(400, json.dumps({"error": {"message": complaint}})) if has_it(call.body) else None

    with JudgeServer(script) as server:
        endpoint = one(server)
        first, second = (endpoint.answer(PICTURE, "Is it?", ["yes", "no"]) for _ in range(2))
        assert [first.tries, second.tries] == [2, 1] and first.probabilities == second.probabilities == [1.0, 0.0]
        assert ("max_completion_tokens" in server.calls[-1].body) == (name == "max_tokens")


def test_what_did_not_help_to_leave_out_is_sent_again():
    """A refusal that names a parameter, but is about something else."""
    with JudgeServer(lambda item, call: http(400, "picture too large; logprobs, max_tokens")) as server:
        endpoint = one(server)
        assert endpoint.answer(PICTURE, "Is it?", ["yes", "no"]).failure == "BadReply" and len(server.calls) == 3
        server.script = lambda item, call: None
        endpoint.answer(PICTURE, "Is it?", ["yes", "no"])
        assert server.calls[-1].body["logprobs"] and "max_tokens" in server.calls[-1].body


SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 10}, "why": {"type": "string"}},
    "required": ["score"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"score": 7, "why": "sharp"}', {"score": 7, "why": "sharp"}),
        ('```json\n{"score": 0}\n```', {"score": 0}),
        ('{"score": 11}', None),
        ('{"score": true}', None),
        ('{"score": "7"}', None),
        ('{"score": 7.5}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e999}', None),
        ('{"score": 1, "score": 9}', None),
        ('{"score": 7, "extra": 1}', None),
        ('{"why": "no score"}', None),
        ("[7]", None),
        ('My score: {"score": 7}', None),
        ("", None),
    ],
)
def test_an_object_counts_where_it_fits_its_schema(content, expected):
    with JudgeServer(lambda item, call: http(200, said(content))) as server:
        found = one(server).complete([{"role": "user", "content": "How good?"}], schema=SCHEMA)
        assert found.parsed == expected and found.failure == ("" if expected else "Unparsable")
        body = server.calls[0].body
        assert body["response_format"]["json_schema"]["schema"] == SCHEMA
        assert json.dumps(SCHEMA) in body["messages"][0]["content"]  # for servers that take no schema


def test_a_server_without_schemas_is_told_in_words():
    def script(item, call):
        return http(400, "response_format is not known") if "response_format" in call.body else http(200, said("[1]"))

    with JudgeServer(script) as server:
        endpoint = one(server)
        message = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Numbers?"}]
        schema = {"type": "array", "items": {"type": "number"}}
        assert [endpoint.complete(message, schema=schema).parsed for _ in range(2)] == [[1], [1]]
        assert len(server.calls) == 3


def test_what_a_server_says_of_itself_is_kept():
    with JudgeServer() as server:
        found = one(server).complete([{"role": "user", "content": "Snow?"}])
        assert found.served == {"model": "toy-judge-1", "usage": {"total_tokens": 7}} and found.text


def test_a_call_ends_in_time_though_bytes_keep_coming():
    with JudgeServer(lambda item, call: "headers without end") as server:
        begin = time.monotonic()
        found = one(server, tries=1, timeout=0.3).answer(PICTURE, "Is it?", ["yes", "no"])
        assert found.failure == "Timeout" and 0.25 < time.monotonic() - begin < 5


def test_several_threads_share_an_endpoint():
    with JudgeServer() as server:
        endpoint, found = one(server, calls=40), []

        def ask():
            found.extend(endpoint.answer(PICTURE, "Is it?", ["yes", "no"]).probabilities[0] for _ in range(10))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert found == [1.0] * 40 == [1.0] * len(server.calls)
        with pytest.raises(Error, match="budget of 40 calls"):
            endpoint.answer(PICTURE, "Is it?", ["yes", "no"])


@pytest.mark.parametrize(
    "url, credential, says",
    [
        ("localhost:8000", "", "url is not an http or https URL"),
        ("file:///etc/passwd", "", "url is not"),
        ("http://", "", "url is not"),
        ("http://[::1", "", "url is not"),
        ("http://x:99999999/", "", "url is not"),
        ("http://ex ample/", "", "url is not"),
        ("https://user:word@host/v1", "", "user name or a query"),
        ("https://host/v1?key=abcdef123", "", "user name or a query"),
        ("http://judge.example/v1", "GOOD", "in the open"),
        ("https://judge.example/v1", "sk-abcdef-123456", "not the name of an environment variable"),
        ("https://judge.example/v1", "ABCDEF123456", "is empty"),
        ("https://judge.example/v1", "file:/nowhere/at/all", "cannot be read: No such file"),
        ("https://judge.example/v1", "TWO_LINES", "no header can carry"),
    ],
)
def test_what_is_refused_at_opening(monkeypatch, url, credential, says):
    """And what was typed is not repeated: it may be the key itself."""
    monkeypatch.setenv("GOOD", "k-123456789")
    monkeypatch.setenv("TWO_LINES", "k-123456789\r\nHost: elsewhere")
    with pytest.raises(Error, match=says) as caught:
        Endpoint("toy", url=url, credential=credential)
    said = str(caught.value) + caught.value.hint
    assert not any(part in said for part in ("word@", "abcdef", "ABCDEF", "k-1234"))


def test_a_key_from_a_file_is_sent_as_it_is(tmp_path):
    path = tmp_path / "key"
    path.write_text("  k-from-a-file-123\n")
    with JudgeServer() as server:
        one(server, credential=f"file:{path}").answer(PICTURE, "Is it?", ["yes", "no"])
        assert server.calls[0].headers["authorization"] == "Bearer k-from-a-file-123"
        assert server.calls[0].headers["host"] == f"127.0.0.1:{server.port}"


def test_names_of_hosts_as_servers_expect_them():
    assert Server("https://api.example/v1/").name == "api.example" and Server("https://api.example/v1/").path == "/v1"
    assert Server("http://[::1]:8000").name == "[::1]:8000"


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"choices": ["yes"]}, "told apart"),
        ({"choices": ["Yes", "yes"]}, "told apart"),
        ({"choices": ["yes", " "]}, "told apart"),
        ({"choices": ["a", "b"], "schema": {}}, "not both"),
        ({"schema": {"type": "object", "patternProperties": {}}}, "'patternProperties', which replies are not checked"),
        ({"schema": []}, "schema is list"),
    ],
)
def test_questions_that_no_reply_could_answer(arguments, says):
    with JudgeServer() as server, pytest.raises(Error, match=says):
        one(server).complete([{"role": "user", "content": "?"}], **arguments)


@pytest.mark.parametrize(
    "image", [np.full((3, 4, 4), np.nan), np.zeros((4, 4)), np.zeros((3, 0, 4)), np.zeros((4, 4, 3))]
)
def test_pictures_that_are_none_are_not_asked_about(image):
    with JudgeServer() as server:
        with pytest.raises(Error, match="picture"):
            one(server).answer(image, "Is it?", ["yes", "no"])
        assert not server.calls


def test_arguments_out_of_range():
    for bad in ({"tries": 0}, {"seconds": 0}, {"timeout": -1}, {"calls": -1}, {"run_seconds": -1}):
        with pytest.raises(Error, match="must be above 0"):
            Endpoint("toy", url="http://localhost", **bad)


@pytest.mark.parametrize(
    "text, expected",
    [("3", 3.0), (" 2.5 ", 2.5), ("0", 0.0), (None, None), ("", None), ("-1", None), ("NaN", None), ("inf", None),
     ("1e9", None), ("soon", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("9" * 400, None), ("1\x1e", 1.0)],
)  # fmt: skip
def test_retry_after(text, expected):
    assert retry_after(text) == expected


def test_retry_after_as_a_date():
    from email.utils import formatdate

    assert 25 < retry_after(formatdate(time.time() + 30, usegmt=True)) <= 31


def test_schemas_are_held_to_every_word_that_they_may_have():
    cases = [
        ({"type": ["string", "null"]}, [None, "a"], [1]),
        ({"enum": ["a", 1]}, ["a", 1], [True, "b"]),
        ({"const": 0}, [0], [False, 1]),
        ({"type": "array", "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab"], ["a", "abcd"]),
        ({"type": "number", "minimum": 0}, [0, 0.5], [-0.1, True]),
        ({"type": "integer"}, [2, 2.0], [2.5]),
        ({"type": "unknown"}, [], [1, "a", None]),
        ({"properties": {"a": {"type": "array", "items": {"type": "null"}}}}, [{"a": [None]}], [{"a": [1]}]),
    ]  # fmt: skip
    for schema, fitting, others in cases:
        assert [reading.misfit(v, schema) for v in fitting] == [""] * len(fitting), schema
        assert all(reading.misfit(v, schema) for v in others), schema


@pytest.mark.parametrize(
    "step",
    [
        'params = { judge = "endpoint?model=m&credential=JUDGE_CREDENTIAL&url=%s" }',
        'params = { judge = ["mini-vqa", "endpoint?model=m&url=%s"] }',
        'model_args = { model = "m", url = "%s" }',
    ],
)
def test_a_plan_from_elsewhere_sends_nothing_to_a_server_that_it_names(tmp_path, step):
    """Neither pictures nor the value of a variable that it names."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    with JudgeServer() as server:
        plan = there / "plan.toml"
        plan.write_text('[[run]]\nsuite = "noise"\nmodel = "toy"\n' + step % server.url + "\n")
        done = command(here, "score", plan, env={"JUDGE_CREDENTIAL": "k-123456789"})
        assert done.code == 1 and "to which pictures or keys would go" in done.err and "--allow-code" in done.err
        assert not server.calls and "Traceback" not in done.err


def test_it_is_an_adapter_by_name():
    from bench import registry
    from bench.config import bind

    bound = bind(registry.find("adapters", "endpoint"), "endpoint", {}, {"model": "m", "url": "http://localhost/v1"})
    assert bound.what == {"model": "m", "temperature": 0.0, "top_p": 1.0} and bound.how == {
        "url": "http://localhost/v1"
    }
    with pytest.raises(UsageError, match="needs url"):
        bind(registry.find("adapters", "endpoint"), "endpoint", {}, {"model": "m"})
    assert judge_server.QUESTION
