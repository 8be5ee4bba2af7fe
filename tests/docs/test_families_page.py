"""docs/families.md holds the table that the code has. Run as a module, this file writes it."""

from pathlib import Path

from mtpdecode.families import FAMILIES, families_table
from tests.families.test_remote import FAMILIES_THERE
from tests.families.zoo import cases

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def with_table(page):
    before, rest = page.split(BEGIN)
    return before + BEGIN + families_table() + END + rest.split(END)[1]


def test_the_page_holds_the_table():
    page = PAGE.read_text()
    assert page == with_table(page), "docs/families.md is stale: run `python -m tests.docs.test_families_page`"


def test_every_row_is_shown():
    """A row without a case would be a promise that nothing holds the code to."""
    elsewhere = {"gemma4": "test_gemma4.py", **dict.fromkeys(FAMILIES_THERE, "test_remote.py")}
    shown = {case.family for case in cases()}
    assert shown.isdisjoint(elsewhere)
    assert sorted(row.family for row in FAMILIES) == sorted(shown | elsewhere.keys())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
