"""Conformance of models that talk."""

from __future__ import annotations

from typing import Any

from bench.capabilities import Answer, Completion
from bench.checks.report import Report


def chat_model(model: Any, report: Report) -> None:
    messages = [{"role": "user", "content": "Answer with one word: is snow white?"}]
    reply = report.call("complete", model.complete, messages, seed=report.seed, max_tokens=16)
    if reply is not None:
        good = isinstance(reply, Completion) and isinstance(reply.text, str)
        report.judge("complete", good, f"{type(reply).__name__} instead of a Completion with text")
        again = report.call("same seed twice", model.complete, messages, seed=report.seed, max_tokens=16)
        if good and isinstance(again, Completion):
            report.judge("same seed twice", again.text == reply.text, "two replies differ", "warn")
    chosen = report.call("choices", model.complete, messages, choices=("yes", "no"), seed=report.seed, max_tokens=16)
    if not isinstance(chosen, Completion):
        return
    if chosen.choices is None:
        report.add("choices", "warn", "no probabilities; answers count as certain")
    else:
        good = set(chosen.choices) <= {"yes", "no"} and _probable(chosen.choices.values())
        report.judge("choices", good, f"{dict(chosen.choices)}: want probabilities of yes and no")


def vqa_model(model: Any, report: Report) -> None:
    image = (report.pictures(1, size=getattr(model, "size", None))[0] + 1) / 2  # float32 [3, H, W] in [0, 1]
    choices = ("red", "green", "blue")
    answer = report.call("answer", model.answer, image, "Which colour is it?", choices)
    if answer is None:
        return
    if not isinstance(answer, Answer):
        report.add("answer", "fail", f"{type(answer).__name__} instead of an Answer")
    elif answer.probabilities is None:
        report.add("answer", "ok", "abstains")
    else:
        p = [float(v) for v in answer.probabilities]
        report.judge("answer", len(p) == len(choices) and _probable(p), f"{p}: want {len(choices)} probabilities")
        again = report.call("twice", model.answer, image, "Which colour is it?", choices)
        if isinstance(again, Answer):
            same = again.probabilities is not None and list(map(float, again.probabilities)) == p
            report.judge("twice", same, "two answers differ", "warn")


def _probable(values: Any) -> bool:
    values = [float(v) for v in values]
    return all(0 <= v <= 1 for v in values) and sum(values) <= 1 + 1e-3
