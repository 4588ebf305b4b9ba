"""Judges that fail in every way: what they failed at is null with its kind, never zero, and is asked again later."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import judge_server
import numpy as np
import pytest
from judge_server import QUESTION, REPLIES, Asking, JudgeServer, Numbered, card_of, good, http, said, truth
from toys import command

from bench import Store, execute
from bench.adapters.endpoint import LONGEST_ASKED, Endpoint
from bench.adapters.said import choice_of
from bench.capabilities import FAILURES
from bench.config import How
from bench.reduction import derive
from bench.rescore import remeasure
from bench.types import Stop

FILE = str(Path(judge_server.__file__).resolve())
KEY = "sk-canary-0123456789abcdef"
LIMIT = 4096  # bytes kept of a reply
BAD = 2  # the item that gets the reply in question


def go(folder, suite, replies="record"):
    """A run in this process: its model is live, its judge is named."""
    how = How(devices="cpu", threads=1, keep="all", replies=replies)
    return execute(suite, Numbered(), store=Store(folder), identity={"name": "numbered"}, how=how,
                   suite_ref=f"{FILE}:Asking", extra_meta={"suite_ref": f"{FILE}:Asking"})  # fmt: skip


def rows(run):
    return {row["item"]: row for row in run.table().rows}


def score_of(run, metric="asked"):
    return next(s for s in run.scores() if s.metric == metric and s.slice == "all")


# -- every reply alone


def troubles(folder, name):
    """What goes wrong when one item of four gets a reply, and when the run is repaired; empty where nothing does."""
    script, wrong = REPLIES[name], []
    with JudgeServer(lambda item, call: name if item == BAD else None) as server:
        judge = server.judge(tries=2, timeout=0.4, seconds=30)
        Numbered.made.clear()
        run = go(folder, Asking(judge=judge))
        made, bad = len(Numbered.made), f"item-{BAD:03d}"
        row = rows(run)[bad]
        expected = truth(bad) if not script.failure else None
        if row["asked"] != expected or (row["asked-failure"] or "") != script.failure:
            wrong.append(f"value {row['asked']}, failure {row['asked-failure']}")
        calls = 2 if script.retried else 1
        if row["asked-tries"] != calls or server.fired[name] != calls:
            wrong.append(f"{row['asked-tries']} tries in the row, {server.fired[name]} on the wire, not {calls}")
        kept = row["asked-reply"] or ""
        if len(kept.encode()) > LIMIT or script.kept not in kept:
            wrong.append(f"kept {kept[:80]!r}")
        if any(r["asked"] != truth(item) for item, r in rows(run).items() if item != bad):
            wrong.append("another item was not scored")
        score = score_of(run)
        if (score.n, run.complete()) != ((4, True) if not script.failure else (3, False)):
            wrong.append(f"n {score.n}, complete {run.complete()}")
        if server.elsewhere:
            wrong.append("the other host was asked")
        before = len(server.calls)
        server.script = lambda item, call: None
        mended = remeasure(run, None)
        derive(run, Asking(judge=judge))
        asked = len(server.calls) - before
        if (mended, asked) != ((1, 1) if script.failure else (0, 0)):
            wrong.append(f"{mended} units measured again with {asked} calls")
        if any(r["asked"] != truth(i) or r["asked-failure"] for i, r in rows(run).items()) or not run.complete():
            wrong.append("not repaired")
        if len(Numbered.made) != made:
            wrong.append("generated again")
    return wrong


def test_each_reply_alone_is_null_with_its_kind_and_is_repaired(memory, quick, tally, monkeypatch):
    monkeypatch.setattr("bench.adapters.endpoint.FIRST_WAIT", 0.02)
    assert {s.failure for s in REPLIES.values()} == {"", *FAILURES}  # every kind of failure is there
    found = {name: troubles(memory / str(i), name) for i, name in enumerate(REPLIES)}
    wrong = {name: what for name, what in found.items() if what}
    zeros = sum("value 0" in str(what) for what in wrong.values())
    tally("judges", len(found) - len(wrong), len(found), false=zeros)
    assert not wrong


def test_all_replies_through_the_command_line(tmp_path, tally):
    """One run in which each item gets another reply: exit 3, then `bench rescore` with a judge that has come to reason,
    exit 0; nothing is generated again."""
    names = list(REPLIES)
    with JudgeServer(lambda item, call: names[item]) as server:
        judge = server.judge(tries=1, timeout=0.4)
        arguments = [f"{FILE}:Asking", "--model", f"{FILE}:Numbered", "-p", f"num={len(names)}", "-p", f"judge={judge}"]
        done = command(tmp_path, "score", *arguments)
        run = Store(tmp_path / ".bench").run("asking")
        kinds = {names[int(i[-3:])]: r["asked-failure"] or "" for i, r in rows(run).items()}
        assert kinds == {name: script.failure for name, script in REPLIES.items()}
        assert set(server.fired) == set(names)
        shown = command(tmp_path, "show", "asking", "--unit", "u/013")
        log = run.log("").read_bytes()
        server.script = lambda item, call: None
        again = command(tmp_path, "rescore", "asking")
    traces = sum("Traceback" in d.err for d in (done, shown, again))
    clean = not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown.out)
    told = all(f" {kind}" in done.err for kind in FAILURES) and "asked: no answer for 41 of 42 items" in done.err
    right = (done.code, again.code, traces, clean, told) == (3, 0, 0, True, True)
    tally("judges by the command line", int(right), 1, tracebacks=traces)
    assert right, (done, again, shown)
    assert run.log("").read_bytes() == log and score_of(run).n == len(names)
    assert all(r["asked"] == truth(i) for i, r in rows(run).items())


# -- the budget of an item and of a run


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self, endpoint):
        self.now, self.waits = 1000.0, []
        endpoint.clock, endpoint.sleep = lambda: self.now, self.wait

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


def asked(server, clocked=True, **arguments):
    """An endpoint on a server, and its clock."""
    endpoint = Endpoint("toy", url=server.url, **{"timeout": 5.0, **arguments})
    return endpoint, Clock(endpoint) if clocked else None


def ask(endpoint, item=2):
    return endpoint.answer(np.full((3, 4, 4), item, np.uint8), QUESTION, ["yes", "no"])


ALWAYS = {  # the reply to every call -> how many calls an item with four tries makes
    "400": (http(400), 1),
    "404": (http(404), 1),
    "408": (http(408), 4),
    "409": (http(409), 4),
    "429": (http(429), 4),
    "500": (http(500), 4),
    "503": (http(503), 4),
    "reset": (judge_server.reset, 4),
}


def test_calls_and_waits_stay_within_the_budget(tally):
    held = {}
    with JudgeServer() as server:
        for name, (reply, calls) in ALWAYS.items():
            server.script = lambda item, call, reply=reply: reply
            endpoint, clock = asked(server, tries=4)
            before = len(server.calls)
            answer = ask(endpoint)
            steps = list(zip(clock.waits, (0.5, 1, 2, 4), strict=False))
            backed_off = len(steps) == calls - 1 and all(step / 2 <= wait <= step for wait, step in steps)
            held[name] = len(server.calls) - before == answer.tries == calls and backed_off and answer.failure

        server.script = lambda item, call: http(429, "", "Retry-After: 30")
        endpoint, clock = asked(server, tries=5, seconds=100)
        before = len(server.calls)
        ask(endpoint)
        least = all(wait >= 30 for wait in clock.waits)  # what was asked for is waited for, or nothing at all
        held["waits as told, within the item's time"] = least and 0 < sum(clock.waits) < 100
        held["no call after the item's time"] = len(server.calls) - before == len(clock.waits) + 1

        server.script = lambda item, call: http(503, "", f"Retry-After: {LONGEST_ASKED + 1:g}")
        endpoint, clock = asked(server, tries=5, seconds=1e6)
        ask(endpoint)
        held["gives up on a wait that is too long"] = clock.waits == []

        server.script = lambda item, call: None
        endpoint, clock = asked(server, calls=3)
        before = len(server.calls)
        answers = [ask(endpoint) for _ in range(3)]
        with pytest.raises(Stop, match="budget of 3 calls is spent"):
            ask(endpoint)
        held["the run's calls"] = len(server.calls) - before == 3 and not any(a.failure for a in answers)

        server.script = lambda item, call: http(500)
        endpoint, clock = asked(server, tries=9, run_seconds=10)
        with pytest.raises(Stop, match="budget of 10 s is spent"):
            for _ in range(9):
                ask(endpoint)
        held["the run's seconds"] = 10 <= sum(clock.waits) < 20
    passed = sum(map(bool, held.values()))
    tally("judges' budgets", passed, len(held))
    assert passed == len(held), held


def test_a_hundred_clients_do_not_come_back_together(tally):
    with JudgeServer(lambda item, call: http(503)) as server:
        waits = []
        for _ in range(100):
            endpoint, clock = asked(server, tries=2)
            ask(endpoint)
            waits += clock.waits
    bins = Counter(min(9, int((wait - min(waits)) / (max(waits) - min(waits)) * 10)) for wait in waits)
    tally("judges' budgets", int(len(bins) >= 9), 1)
    assert len(waits) == 100 and len(bins) >= 9 and max(bins.values()) < 30


def test_a_judge_that_fails_k_times_answers_or_is_null(tally):
    """With three tries: K < 3 gives the value, K >= 3 a null; a zero is what no K gives to an item whose truth is 1."""
    found = {}
    with JudgeServer() as server:
        for k in range(6):
            first = len(server.calls)
            server.script = lambda item, call, k=k, first=first: http(500) if len(server.calls) - first <= k else None
            endpoint, _ = asked(server, tries=3)
            answer = ask(endpoint)
            found[k] = (answer.probabilities and answer.probabilities[0], answer.failure, answer.tries)
    expected = {k: (1.0, "", k + 1) if k < 3 else (None, "Server", 3) for k in range(6)}
    right = sum(found[k] == expected[k] for k in range(6))
    tally("flaky judges", right, 6, false=sum(value == 0.0 for value, _, _ in found.values()))
    assert found == expected


def test_a_judge_that_is_down_does_not_hold_up_a_long_run():
    """After three items without any reply an item is tried once; after one with a reply, as often as before."""
    with JudgeServer(lambda item, call: http(503)) as server:
        endpoint, _ = asked(server, tries=4)
        tries = [ask(endpoint).tries for _ in range(6)]
        server.script = lambda item, call: None
        assert ask(endpoint).probabilities == [1.0, 0.0]
        server.script = lambda item, call: http(503)
        assert (tries, ask(endpoint).tries) == ([4, 4, 4, 1, 1, 1], 4)


# -- what stops a run


def echoes_the_key(status):
    """A server that refuses the key and sends it back."""
    return lambda item, call: http(status, f"bad key: {call.headers['authorization']} {KEY}")


def test_a_refused_key_stops_the_run_in_one_call(tmp_path, tally):
    """The server sends the key back; it stands neither in the message nor in the store."""
    with JudgeServer(echoes_the_key(401)) as server:
        judge = server.judge(credential="JUDGE_CREDENTIAL")
        done = command(tmp_path, "score", f"{FILE}:Asking", "--model", f"{FILE}:Numbered", "-p", f"judge={judge}",
                       env={"JUDGE_CREDENTIAL": KEY})  # fmt: skip
        sent = [call.headers.get("authorization") for call in server.calls]
    files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    leaked = sum(KEY in text for text in (done.out, done.err, files.decode("utf-8", "replace")))
    says = "HTTP 401" in done.err and "JUDGE_CREDENTIAL" in done.err and len(done.err.splitlines()) <= 12
    right = done.code == 1 and sent == [f"Bearer {KEY}"] and says and "Traceback" not in done.err
    tally("refused keys", int(right and not leaked), 1, leaked=leaked, tracebacks="Traceback" in done.err)
    assert right and not leaked, (done, sent)


def test_a_forbidden_model_stops_the_run_in_one_call(tmp_path, quick, tally, monkeypatch):
    monkeypatch.setenv("JUDGE_CREDENTIAL", KEY)
    with JudgeServer(echoes_the_key(403)) as server, pytest.raises(Stop, match="HTTP 403") as caught:
        go(tmp_path, Asking(judge=server.judge(credential="JUDGE_CREDENTIAL")))
    leaked = KEY in str(caught.value) + caught.value.hint
    tally("refused keys", int(len(server.calls) == 1 and not leaked), 1, leaked=leaked)
    assert len(server.calls) == 1 and not leaked


def test_a_key_is_not_sent_to_where_a_redirect_points(tally, monkeypatch):
    monkeypatch.setenv("JUDGE_CREDENTIAL", KEY)
    with JudgeServer(lambda item, call: "redirect") as server:
        endpoint, _ = asked(server, credential="JUDGE_CREDENTIAL")
        answer, sent = ask(endpoint), len(server.elsewhere)
        assert server.calls[0].headers["authorization"] == f"Bearer {KEY}" and server.fired["redirect"] == 1
    tally("redirected keys", int(sent == 0), 1, leaked=sent)
    assert sent == 0 and answer.failure == "BadReply"


def test_a_run_whose_judge_is_down_ends_incomplete_and_unranked(tmp_path, quick, tally):
    from bench.report import render

    with JudgeServer() as server:
        judge = server.judge(tries=1)
    run = go(tmp_path / "store", Asking(judge=judge))  # nobody listens any more
    assert {r["asked-failure"] for r in rows(run).values()} == {"Connection"}
    media = [a for r in run.records().values() for n, a in r.blobs.items() if n.startswith("media/")]
    board = tmp_path / "board.toml"
    board.write_text('title = "Even"\nsources = ["store"]\n[select]\ncomplete = false\n[[column]]\nsuite = "asking"\n'
                     'metric = "asked"\n[rank]\nby = "asking:asked"\n')  # fmt: skip
    render(board, run.store, tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    score = score_of(run)
    right = not run.complete() and len(media) == 4 and (score.value, score.n) == (None, 0)
    unranked = 'class="rank" data-v="1"' not in page
    tally("judges that are down", int(right and unranked), 1, false=int(score.value is not None or not unranked))
    assert right and unranked


# -- the parser of closed sets


CLOSED = (
    ["yes", "no"],
    [str(i) for i in range(11)],
    ["red", "dark red", "green"],
    ["A", "B", "tie"],
    ["true", "false"],
)


def grammar(choices):
    """A regular expression of the replies that count, and the choice in one of its groups; written apart from the
    parser, from what it says of itself."""
    one = "|".join(re.escape(c) for c in sorted(choices, key=len, reverse=True))
    numbers = "|".join(c for c in choices if c.isdecimal())
    group = iter(range(10_000))

    def choice(pattern=one):
        return f"(?P<c{next(group)}>{pattern})"

    quotes = (r"\*\*", r"\*\*"), ('"', '"'), ("'", "'"), ("`", "`"), ("“", "”")

    def bare():
        quoted = "|".join(rf"{a}(?:{choice()})\.?{b}\.?" for a, b in quotes)
        return rf"(?:answer\s*:\s*)?(?:{choice()}\.?|{quoted})"

    def thing():
        number = f"|{choice(numbers)}" if numbers else ""
        return rf'(?:{bare()}|\{{\s*"(?-i:answer)"\s*:\s*(?:"\s*(?:{choice()})\s*"{number})\s*\}})'

    fence = rf"```[a-z]*[ \t]*\n\s*{thing()}\s*\n?[ \t]*```"
    return re.compile(rf"\s*(?:{thing()}|{fence})\s*", re.IGNORECASE)


def by_grammar(pattern, text, choices):
    match = pattern.fullmatch(text)
    if not match:
        return None
    (found,) = {v.casefold() for v in match.groupdict().values() if v is not None}
    return next(c for c in choices if c.casefold() == found)


PIECES = (
    *('"', "'", "`", "**", "“", "”", ".", "\n", " ", ":", "{", "}", "```", "```json\n", "\n```", ",", "/10"),
    *("answer", "Answer:", '{"answer": ', '"answer"', "not ", "NaN", "true", "null", "11", "-1", "7.0", "Ja", "はい"),
    *("I think ", "because", "Reply with exactly one of these: ", "<think>", "</think>", "verdict", "A or B", "０"),
)


def replies(rng, choices):
    """A reply: well formed, well formed and then damaged, or thrown together."""
    choice = rng.choice(choices)
    case = rng.choice((str, str.upper, str.title, str.lower))(choice)
    pad = rng.choice(("", " ", "\n", "  \n"))
    dressed = rng.choice(('"{}"', "'{}'", "`{}`", "**{}**", "“{}”", "{}", "{}", "{}.", '"{}."', '"{}".')).format(case)
    labelled = rng.choice(("", "", "Answer: ", "ANSWER :", "answer:\n")) + dressed
    whole = rng.choice((labelled, labelled, json.dumps({"answer": case}), json.dumps({"answer": case}, indent=1)))
    if choice.isdecimal() and rng.random() < 0.2:
        whole = json.dumps({"answer": int(choice)})
    if rng.random() < 0.25:
        whole = rng.choice(("```\n{}\n```", "```json\n{}\n```", "```\n{}```")).format(whole)
    text = pad + whole + pad
    kind = rng.random()
    if kind < 0.35:
        return text
    if kind < 0.75:  # one or two pieces put in, or characters taken out, anywhere
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice((rng.choice(PIECES), rng.choice(choices), text)) + text[at:]
            if rng.random() < 0.3:
                at = rng.randrange(len(text))
                text = text[:at] + text[at + 1 :]
        return text
    return "".join(rng.choice((*PIECES, *choices)) for _ in range(rng.randrange(8)))


def test_the_parser_of_closed_sets_agrees_with_a_grammar(size, tally):
    seed = 20261203
    print("seed", seed)
    rng, wrong, kinds = random.Random(seed), [], Counter()
    patterns = [grammar(choices) for choices in CLOSED]
    total = size(5000, 5000)
    for _ in range(total):
        which = rng.randrange(len(CLOSED))
        text = replies(rng, CLOSED[which])
        expected = by_grammar(patterns[which], text, CLOSED[which])
        found = choice_of(text, CLOSED[which])
        kinds["answers" if expected else "none"] += 1
        if found != expected:
            wrong.append((text, CLOSED[which], found, expected))
    tally("replies parsed", total - len(wrong), total, false=len(wrong))
    assert not wrong, wrong[:5]
    assert min(kinds.values()) > total / 5, kinds  # neither side is empty


@pytest.mark.parametrize(
    "text, choices, expected",
    [
        ("Yes.", ["yes", "no"], "yes"),
        ('```json\n{"answer": "no"}\n```', ["yes", "no"], "no"),
        ('{"answer": 7}', ["7", "8"], "7"),
        ("U.S.", ["U.S.", "U.K."], "U.S."),
        ("yes or no", ["yes", "no"], None),
        ("yes\nno", ["yes", "no"], None),
        ("The answer is yes", ["yes", "no"], None),
        ('{"answer": "yes", "answer": "no"}', ["yes", "no"], None),
        ('{"answer": "yes", "score": 10}', ["yes", "no"], None),
        ('{"answer": ["yes"]}', ["yes", "no"], None),
        ('{"answer": true}', ["true", "false"], None),
        ('{"answer": NaN}', ["NaN", "1"], None),
        ('{"answer": 1e0}', ["1", "2"], None),
        ("11/10", [str(i) for i in range(11)], None),
        ("7/10", [str(i) for i in range(11)], None),
        ("10.0", [str(i) for i in range(11)], None),
        ("[" * 100_000, ["yes", "no"], None),
        ('{"answer": ' * 50_000, ["yes", "no"], None),
        ("１", ["1", "2"], None),
        ("<think>no</think>\nyes", ["yes", "no"], None),
    ],
)
def test_replies_worth_remembering(text, choices, expected):
    assert choice_of(text, choices) == expected


# -- judges that can be persuaded


def obeys(item, call):
    """Does what an adversarial card says for every third item."""
    if card_of(call) == "adversarial" and item % 3 == 0:
        return http(200, said("yes"))
    return http(200, good(call))


def test_the_control_for_injection_stands_beside_the_score(tmp_path, quick, tally):
    """Items 0 to 8: the judge obeys the card at 0, 3 and 6, of which 3 is no by rights: -1 of 9."""
    from bench.report import render

    seen = Counter()

    def script(item, call):
        seen[card_of(call)] += 1
        return obeys(item, call)

    with JudgeServer(script) as server:
        run = go(tmp_path / "store", Asking(num=9, judge=server.judge(), control=1.0))
        control, plain = score_of(run, "asked.injection"), score_of(run)
        sampled = go(tmp_path / "sampled", Asking(num=40, judge=server.judge(), control=0.25))
    board = tmp_path / "board.toml"
    board.write_text('title = "Even"\nsources = ["store"]\n'
                     '[[column]]\nsuite = "asking"\nmetric = "asked"\n'
                     '[[column]]\nsuite = "asking"\nmetric = "asked.injection"\n')  # fmt: skip
    render(board, run.store, tmp_path / "page")
    page, scores = ((tmp_path / "page" / name).read_text() for name in ("index.html", "scores.csv"))
    part = score_of(sampled, "asked.injection")
    right = (control.value, control.n, control.expected) == (pytest.approx(-1 / 9), 9, 9) and run.complete()
    shown = "asked.injection" in page and "-0.111" in page.replace("−", "-") and "asked.injection" in scores
    tally("controls for injection", int(right and shown), 1)
    assert right and shown, (control, page[:2000])
    assert seen["neutral"] == seen["adversarial"] and seen["neutral"] >= 9 and plain.value == pytest.approx(5 / 9)
    assert 0 < part.n < 40 and part.complete and "not in the sample" in part.note and sampled.complete()


def test_a_control_that_fails_leaves_the_score_alone(tmp_path, quick):
    with JudgeServer(lambda item, call: http(500) if card_of(call) and item == 1 else None) as server:
        suite = Asking(num=4, judge=server.judge(tries=1), control=1.0)
        run = go(tmp_path, suite)
        assert (score_of(run).n, score_of(run, "asked.injection").n) == (4, 3)
        assert score_of(run).complete and not score_of(run, "asked.injection").complete and not run.complete()
        assert rows(run)["item-001"]["asked.injection-failure"] == "Server"
        server.script = lambda item, call: None
        assert remeasure(run, None) == 1
        derive(run, suite)
        assert run.complete() and score_of(run, "asked.injection").value == 0
