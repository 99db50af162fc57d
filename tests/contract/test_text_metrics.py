"""What holds for every registered text metric."""

import math

import pytest

from cutlayer.text_metrics import TEXT_METRICS
from tests.text_metrics.samples import figure, sample

ODD = {
    "the pub is cheap": ["the pub is cheap"],
    "": ["the pub is cheap", "..."],
    "...": ["x"],
    "a ||| b\nc | d \x00 \U0001f600": ["a ||| b", "?", "c"],
}


@pytest.mark.parametrize("name", TEXT_METRICS.names())
def test_it_measures_any_texts_and_the_same_each_time(name: str) -> None:
    first, again, alone = (figure(name, list(texts), list(texts.values())) for texts in (ODD, ODD, {"": ["a"]}))
    assert first == again
    assert min(first, alone) >= 0
    assert max(first, alone) < math.inf


@pytest.mark.parametrize("name", TEXT_METRICS.names())
def test_it_is_of_the_corpus_whatever_its_order(name: str) -> None:
    hypotheses, references = sample("baseline")
    backwards = [group[::-1] for group in reversed(references)]
    assert figure(name, hypotheses, references) == figure(name, hypotheses[::-1], backwards)
