"""docs/families.md, whose table ``make families`` prints."""

from pathlib import Path

from avlm.families.door import FORMATS, TOWER_FORMATS
from tests.families.measured import HEADER

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_has_every_format_and_its_class_with_errors_within_the_tolerance():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == HEADER
    found = {row[0].strip("`"): row[1].strip("`") for row in rows}
    known = {**FORMATS, **TOWER_FORMATS}
    assert found == {format: family.CLASS or "none" for format, family in known.items()}
    for format, _, *cells in rows:
        errors = [float(cell) for cell in cells if cell not in ("", "equal")]
        assert len(errors) >= 2 and max(errors) <= 1e-5, format
