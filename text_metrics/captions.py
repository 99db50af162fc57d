"""Tokens of the caption metrics: ROUGE-L, CIDEr and METEOR see words, without punctuation.

MS COCO's evaluation, which the E2E script takes over, has a text split by the Stanford tokenizer (Penn Treebank's
conventions, in lower case) and then drops punctuation. That tokenizer is a program in Java. These are its conventions
for English prose, without Java; `docs/text_metrics.md` has how often both say the same.
"""

import re

# What MS COCO's evaluation drops. Brackets are not among it, as their tokens are lower case by then.
_PUNCTUATION = {*"'`.?!,:;-", "''", "``", "--", "..."}
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u00a0": " "})
_PLAIN |= str.maketrans({"\u2013": " -- ", "\u2014": " -- "})
_ENTITIES = (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SIGNS = _BRACKETS | {"\u00a3": "#", "\u20ac": "$", "\u00a2": "cents", '"': "''"}
_HALVES = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3, "'tis": 2, "'twas": 2}
# Words that keep the full stop after them; and those that do before a number.
_TITLES = "mr|mrs|ms|dr|prof|rev|hon|gen|col|capt|lt|sgt|maj|gov|sen|rep|pres|st|mt|sr|jr|messrs"
_MONTHS = "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
_SHORT = r"inc|ltd|co|corp|bros|dept|est|etc|vs|esp|al|approx|ave|blvd|rd|hwy|ph\.d"
_ABBREVIATIONS = f"{_TITLES}|{_MONTHS}|{_SHORT}"
_NUMBERED = "no|nos|art|fig|figs|pp|vol|sec|ch"
_WORD = r"(?:[^\W_]|[\u0300-\u036f])+"  # letters, digits, accents that are signs of their own
_SUFFIX = r"'(?:s|m|re|ve|ll|d)(?!\w)"
_TOKEN = re.compile(
    rf"""
    https?://[^\s"<>()]*[^\s"<>().,;:!?'] | [\w.+-]+@\w[\w.-]*\w  # addresses
  | \.{{3,}} | \.\s\.\s\. | -{{2,}} | [!?]+  # dots, dashes, marks
  | </?[a-z][^<>\s]*>  # <tag>
  | (?<![\w']) (?: [a-z](?:\.[a-z])++\.?+(?!\w) | (?!i)[a-z]\.(?=\s\S) )  # u.k., e.g., initials
  | (?<![\w']) (?: (?:{_ABBREVIATIONS})\.(?!\w) | (?:{_NUMBERED})\.(?=\s?\d) | [^\W\d_]+\.(?=,) )
  | (?<![\w)]) [-+]? \d++ (?: (?:[.,:/-]\d+)*+ (?![\w/-]*[^\W\d]) | (?:[.,:]\d+)++ ) | (?<!\S) \.\d+  # numbers
  | (?:ne|e|o)'er(?!\w) | (?:ta|e)'en(?!\w) | ma'am(?!\w)  # whole
  | [^\W_]+? (?=n't(?!\w)) | n't(?!\w) | {_SUFFIX} | '(?:n|em|til|cause|tis|twas|\d\ds)(?!\w)  # contractions
  | (?:[dlo]'(?=[^\W\d_]{{2}})(?!(?:re|ve|ll)(?!\w)))?{_WORD}(?:[-./&]{_WORD})*  # words, joined ones too
  | \S
    """,
    re.VERBOSE,
)


def caption_tokens(text: str) -> list[str]:
    """The words of a text as MS COCO's evaluation has them: in lower case, without punctuation."""
    text = text.translate(_PLAIN).lower()
    for entity, sign in _ENTITIES:
        text = text.replace(entity, sign)
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        half = _HALVES.get(token, 0)
        found += [token[:half], token[half:]] if half else [_SIGNS.get(token, token)]
    return [token for token in found if token not in _PUNCTUATION]
