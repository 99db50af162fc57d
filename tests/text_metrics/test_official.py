"""Our figures are those of the E2E script, of texts that people and the challenge's baseline wrote."""

import pytest

from cutlayer.text_metrics.captions import caption_tokens
from tests.text_metrics.samples import FIGURES, FOLDER, figure, sample

TOKENS = [line.split("\t") for line in (FOLDER / "tokens.tsv").read_text(encoding="utf-8").splitlines()]
PRINTED = 5e-5
"""Half of the last of the four decimals that mteval-v13a prints."""


@pytest.mark.parametrize(("name", "metric"), [(name, metric) for name in FIGURES for metric in FIGURES[name]])
def test_a_stored_sample_has_the_official_figure(name: str, metric: str) -> None:
    tolerance = PRINTED if metric == "nist_mteval" else 1e-9
    assert figure(metric, *sample(name)) == pytest.approx(FIGURES[name][metric], abs=tolerance)


def test_the_two_forms_of_nist_can_be_told_apart() -> None:
    for figures in FIGURES.values():
        assert abs(figures["nist"] - figures["nist_mteval"]) > 100 * PRINTED


@pytest.mark.parametrize(("text", "tokens"), TOKENS)
def test_words_are_those_of_the_stanford_tokenizer(text: str, tokens: str) -> None:
    assert caption_tokens(text) == tokens.split(" ")


# What the same tokenizer makes of text that the data set has none of.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I can't, won't and cannot: it's he'll they've I'd", "i ca n't wo n't and can not it 's he 'll they 've i 'd"),
        ("gonna gimme 'tis d'you o'clock O'Neil", "gon na gim me 't is d'you o'clock o'neil"),
        ("Mr. Smith of the U.S. and St. John's Inc. at 5 p.m.", "mr. smith of the u.s. and st. john 's inc. at 5 p.m."),
        ("$5.50, €30, 10%, 1,000 and 1/2", "$ 5.50 $ 30 10 % 1,000 and 1/2"),
        ("(round) [square] {curly}", "-lrb- round -rrb- -lsb- square -rsb- -lcb- curly -rcb-"),
        ("\u201ccurly\u201d \u2018single\u2019 it\u2019s \u2013 so \u2014 and...", "curly single it 's so and"),
        ("ok!! really?! A&B &amp; a/b and/or 24/7", "ok !! really ?! a&b & a/b and/or 24/7"),
        ("see http://www.example.com/foo. No.1, #1", "see http://www.example.com/foo no. 1 # 1"),
        ("the end.The next word,word", "the end.the next word word"),
    ],
)
def test_words_of_other_prose(text: str, tokens: str) -> None:
    assert caption_tokens(text) == tokens.split(" ")
