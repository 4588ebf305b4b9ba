"""What a model that was asked a closed question has said: a choice, an object of a schema, or nothing that counts.

A reply is data that others wrote. It counts only where all of it is the answer: nothing is searched for in prose, so
that no verdict is taken from an echo of the question, of a card in the picture, or from the first of two verdicts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bench.types import Error

ANSWER = "answer"  # the one key of an object that answers
FENCE = re.compile(r"```[A-Za-z]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
LABEL = re.compile(r"answer\s*:\s*", re.IGNORECASE)
QUOTES = (("**", "**"), ('"', '"'), ("'", "'"), ("`", "`"), ("“", "”"))
REFUSAL = re.compile(
    r"\W*(?:i['’]?\s?a?m (?:very |so )?sorry|sorry\b|i (?:can['’]?t|cannot|can not|won['’]?t|will not)\b"
    r"|i['’]?\s?a?m (?:unable|not able|not comfortable)\b|as an ai\b|i must (?:decline|refuse)|unfortunately, i)",
    re.IGNORECASE,
)
KINDS: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}
CHECKED = {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "minimum", "maximum"}
CHECKED |= {"minItems", "maxItems", "minLength", "maxLength"}
SPOKEN = {"title", "description", "$schema"}  # say something to the model, and nothing to us


def check_choices(choices: Sequence[str]) -> None:
    """Raises Error for choices that a reply could not tell apart."""
    plain = [c.strip().casefold() if isinstance(c, str) else "" for c in choices]
    if len(plain) < 2 or "" in plain or len(set(plain)) < len(plain):
        raise Error(
            f"choices {list(choices)!r} cannot be told apart", hint="two or more texts that differ, not in case"
        )


def choice_of(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a whole reply is, whatever its case; None for anything else.

    It may stand alone, behind `Answer:`, in quotes or bold, before a full stop, as {"answer": ...}, and any of these
    in one code fence. Whole numbers count as their digits: {"answer": 7}. Two verdicts are none, and 11/10 is none.
    """
    text = text.strip()
    known = {c.strip().casefold(): c for c in choices}
    found = known.get(text.casefold())  # before anything is taken off: a choice may be `U.S.`
    if found is not None:
        return found
    fenced = FENCE.fullmatch(text)
    if fenced:
        text = fenced[1].strip()
    if text.startswith("{"):
        return _choice_in_object(text, known)
    label = LABEL.match(text)
    text = text[label.end() :] if label else text
    for candidate in _undressed(text):
        if candidate.casefold() in known:
            return known[candidate.casefold()]
    return None


def _choice_in_object(text: str, known: Mapping[str, str]) -> str | None:
    try:
        value = strict_json(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or value.keys() != {ANSWER}:
        return None
    said = value[ANSWER]
    if isinstance(said, int) and not isinstance(said, bool):
        said = str(said)
    return known.get(said.strip().casefold()) if isinstance(said, str) else None


def _undressed(text: str) -> list[str]:
    """The text, and what it is without quotes around it and one full stop behind or inside them."""
    found = [text]
    for dressed in (text, text.removesuffix(".")):
        found.append(dressed)
        for opening, closing in QUOTES:
            if len(dressed) > len(opening + closing) and dressed.startswith(opening) and dressed.endswith(closing):
                inner = dressed[len(opening) : -len(closing)]
                found += [inner, inner.removesuffix(".")]
    return found


def object_of(text: str, schema: Mapping[str, Any]) -> Any:
    """The value of a reply that is JSON, alone or in one code fence, and fits the schema; raises ValueError."""
    text = text.strip()
    fenced = FENCE.fullmatch(text)
    value = strict_json(fenced[1] if fenced else text)
    fault = misfit(value, schema)
    if fault:
        raise ValueError(fault)
    return value


def strict_json(text: str) -> Any:
    """json.loads without NaN, without infinity and without a key given twice; raises ValueError, also for its depth."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError("a number is too large")
        return value

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_schema(schema: Any, where: str = "schema") -> None:
    """Raises Error for a JSON schema with a word that `misfit` could not hold a reply to."""
    if not isinstance(schema, Mapping):
        raise Error(f"{where} is {type(schema).__name__}, not an object")
    unknown = sorted(map(str, schema.keys() - CHECKED - SPOKEN))
    if unknown:
        raise Error(f"{where} has {unknown[0]!r}, which replies are not checked for", hint=f"known: {sorted(CHECKED)}")
    for name, inner in schema.get("properties", {}).items():
        check_schema(inner, f"{where}.{name}")
    if "items" in schema:
        check_schema(schema["items"], f"{where}[]")


def misfit(value: Any, schema: Mapping[str, Any], where: str = "reply") -> str:
    """What is wrong with a value, as the schema sees it; empty where it fits."""
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is_a(value, kind) for kind in kinds):
        return f"{where} is no {' or '.join(kinds)}"
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        return f"{where} is none of the values allowed"
    if "const" in schema and not _same(value, schema["const"]):
        return f"{where} is not the value asked for"
    size = value if _is_a(value, "number") else None
    bounds = [("minimum", "maximum", size)]
    bounds += [("minItems", "maxItems", len(value))] if isinstance(value, list) else []
    bounds += [("minLength", "maxLength", len(value))] if isinstance(value, str) else []
    for least, most, size in bounds:
        if size is not None and not schema.get(least, -math.inf) <= size <= schema.get(most, math.inf):
            return f"{where} is outside of {least} and {most}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            return f"{where} has no {missing[0]}"
        for name, inner in value.items():
            if name in properties:
                fault = misfit(inner, properties[name], f"{where}.{name}")
            else:
                fault = f"{where}.{name} was not asked for" if schema.get("additionalProperties") is False else ""
            if fault:
                return fault
    if isinstance(value, list) and "items" in schema:
        return next((f for i, v in enumerate(value) if (f := misfit(v, schema["items"], f"{where}[{i}]"))), "")
    return ""


def _is_a(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return isinstance(value, int | float) and not isinstance(value, bool) and (kind == "number" or whole)
    return kind in KINDS and isinstance(value, KINDS[kind])


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def refuses(text: str) -> bool:
    """Does a reply begin the way refusals do? Asked only of replies that are no answer."""
    return REFUSAL.match(text.strip()) is not None


def weigh(logprobs: Any, choices: Sequence[str], chosen: str) -> dict[str, float]:
    """Probabilities of the choices, which add up to one, from a server's log-probabilities of the first token.

    A token belongs to the choice that it is, or to the one choice that it begins. Where there are none, or where they
    do not put the choice that was said first, what was said is certain.
    """
    certain = {c: float(c == chosen) for c in choices}
    try:
        tops = logprobs["content"][0]["top_logprobs"]
        pairs = [(str(top["token"]).strip().casefold(), float(top["logprob"])) for top in tops]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return certain
    weights = dict.fromkeys(choices, 0.0)
    for token, logprob in pairs:
        begun = [c for c in choices if token == c.strip().casefold()]  # "1" is 1, though it begins 10
        begun = begun or [c for c in choices if token and c.strip().casefold().startswith(token)]
        if not logprob <= 0.0:  # NaN, too
            return certain
        if len(begun) == 1:
            weights[begun[0]] += math.exp(logprob)
    total = math.fsum(weights.values())
    if total <= 0.0 or weights[chosen] < max(weights.values()):
        return certain
    return {c: w / total for c, w in weights.items()}
