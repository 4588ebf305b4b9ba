"""A judge's answers as a metric: rates and means, abstentions, questions that cannot be asked, cards."""

import numpy as np
import pytest
import torch

from bench import Answer, Error, Table, UsageError
from bench.metrics import Asked
from bench.metrics.asked import CARD_WIDTH, LINE, NEUTRAL, with_card
from bench.stats import mean, proportion


class Judge:
    """Says what it is told to, one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def answer(self, image, question, choices):
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        return self.answers.pop(0)


class Context:
    def __init__(self, judge):
        self._judge = judge

    def judge(self, name):
        return self._judge


def measured(metric, *answers):
    """The table of one picture an answer."""
    columns = metric.measure({"picture": np.zeros((len(answers), 3, 4, 4))}, Context(Judge(*answers)))
    return Table([{"item": str(i), **{k: v[i] for k, v in columns.items()}} for i in range(len(answers))])


def said(*probabilities):
    return [Answer(None if p is None else [p, 1 - p]) for p in probabilities]


ASKED = Asked("Is it red?")


def test_probabilities_give_a_mean_and_certain_answers_a_rate():
    assert ASKED.reduce(measured(ASKED, *said(0.5, 0.75, 1.0)))[""] == mean([0.5, 0.75, 1.0])
    assert ASKED.reduce(measured(ASKED, *said(1, 1, 0)))[""] == proportion(2, 3)
    other = Asked("Is it red?", wanted="no")
    assert other.reduce(measured(other, *said(1, 1, 0)))[""] == proportion(1, 3)
    clustered = Table([{**row, "cluster": "one"} for row in measured(ASKED, *said(1, 1, 0)).rows])
    assert ASKED.reduce(clustered)[""].method == "none"  # rows of one cluster are no independent trials


def test_an_abstention_is_counted_and_a_failure_is_missing():
    table = measured(ASKED, *said(1, None), Answer([1.0, 0.0]))
    found = ASKED.reduce(table)[""]
    assert (found.n, found.note) == (2, "1 abstained") and table.column("asked") == [1.0, None, 1.0]
    table = measured(ASKED, *said(1), Answer(None, failure="Timeout", reply="late", tries=3))
    found = ASKED.reduce(table)[""]
    assert (found.value, found.n, found.note) == (1.0, 1, "")
    last = {k.removeprefix("asked"): v for k, v in table.rows[1].items() if k != "item"}
    assert last == {"": None, "-withheld": None, "-failure": "Timeout", "-reply": "late", "-tries": 3}


def test_the_difference_between_the_cards():
    metric = Asked("Is it red?", control=1.0)
    judge = Judge(
        *said(0.0, 0.25, 1.0), *said(1.0, None, 0.5), *said(1.0, 0.5), Answer(None, failure="Server", tries=2)
    )
    columns = metric.measure({"picture": np.zeros((3, 3, 4, 4))}, Context(judge))
    assert columns["asked"] == [0.0, 1.0, 1.0] and columns["asked.injection"] == [-0.75, None, None]
    assert columns["asked.injection-withheld"] == [None, "abstained", None]
    assert columns["asked.injection-failure"] == [None, None, "Server"] and columns["asked.injection-tries"] == [
        2,
        2,
        3,
    ]


def test_cards_have_one_form_and_leave_the_picture_as_it_is():
    picture = np.random.default_rng(0).integers(0, 256, (3, 50, 70), dtype=np.uint8)
    cards = [with_card(picture, text) for text in (NEUTRAL, Asked("?", control=1.0).adversarial)]
    for card in cards:
        assert card.shape == (3, 50 + 4 * LINE, CARD_WIDTH) and card.dtype == np.uint8
        assert np.array_equal(card[:, :50, :70], picture) and (card[:, :50, 70:] == 255).all()
        assert card[:, 50:].min() < 64 and card[:, 50:].mean() < 253  # something is written
    assert not np.array_equal(*cards) and with_card(np.zeros((3, 4, 400), np.uint8), "x").shape[2] == 400


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"question": "Is it?", "wanted": "maybe"}, "'maybe' is not one of yes, no"),
        ({"question": ""}, "needs a question"),
        ({"question": "Is it?", "control": 1.5}, "control is a share"),
    ],
)
def test_what_cannot_be_asked(arguments, says):
    with pytest.raises(UsageError, match=says):
        Asked(**arguments)


def test_a_judge_must_answer_questions():
    with pytest.raises(Error, match="does not answer questions"):
        ASKED.prepare(Context(object()))
    ASKED.prepare(Context(Judge()))


def test_signatures_tell_questions_apart():
    table = Table([])
    assert ASKED.signature(table) != Asked("Is it blue?").signature(table)
    assert ASKED.signature(table) != Asked("Is it red?", choices=("no", "yes")).signature(table)
    assert ASKED.signature(table) != Asked("Is it red?", control=0.5).signature(table)
