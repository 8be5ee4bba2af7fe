"""docs/families.md holds the table that the code has. Run as a module, this file writes it."""

from pathlib import Path

from mtpdecode.families import families_table

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def with_table(page):
    before, rest = page.split(BEGIN)
    return before + BEGIN + families_table() + END + rest.split(END)[1]


def test_the_page_holds_the_table():
    page = PAGE.read_text()
    assert page == with_table(page), "docs/families.md is stale: run `python -m tests.docs.test_families_page`"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
