"""SECURITY.md says what the code allows."""

import re

from cutlayer.runtime import trust
from tests.places import checkout

TEXT = (checkout() / "SECURITY.md").read_text(encoding="utf-8")


def described(rule: trust.Rule) -> str:
    """A rule in the words of the table."""
    kinds = [f"numbers up to {rule.most:,.15g}"] if rule.most else []
    kinds += [trust._TEXTS[rule.text]] if rule.text is not None else []
    text = " or ".join(kinds) or "true or false"
    return f"{text}, also in a list of up to {rule.length:,}" if rule.length else text


def test_the_table_has_each_key_that_a_server_may_set_once_and_its_bound() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", TEXT.partition("other than true, false and null")[2], re.MULTILINE)
    parts = re.compile(r"^model\.\w+\.(optimizer|scheduler)\.\*$")
    rules = {**trust.RULES, **trust.part_rules()}
    wanted = {parts.sub(r"model.<part>.\1.*", key): described(rule) for key, rule in rules.items()}
    assert dict(rows) == wanted
    assert len(rows) == len(wanted)


def test_what_a_folder_may_set_beside_is_named() -> None:
    paragraph = TEXT.partition("The folder of a run may set the same, and")[2].partition("| key |")[0]
    assert set(re.findall(r"`([a-z0-9_.]+)`", paragraph)) == set(trust.FOLDER_RULES)
    for most in (f"{trust.MODEL_BYTES / 1e6:,.0f} MB", f"{trust.DATA_BYTES / 1e6:,.0f} MB"):
        assert most in TEXT
