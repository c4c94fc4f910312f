"""Writes the tables of errors of number formats: `python docs/formats_table.py`, after `ds_quant diagnose formats`."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGES = {
    RESULTS / "2026-11-29-formats.md": RESULTS / "2026-11-29-formats-recorded.csv",
    RESULTS / "2026-11-29-formats-on-the-wire.md": RESULTS / "2026-11-29-formats-on-the-wire.csv",
}
"""Figures by page."""
BEGIN, END = "<!-- written by docs/formats_table.py -->\n", "<!-- end -->\n"


def table(figures: Path) -> str:
    """A row for each format, a column for each kind of numbers: relative errors."""
    with figures.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = list(dict.fromkeys(row["numbers"] for row in rows))
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["format"], row["scale"]), {})[row["numbers"]] = row
    heads = ["format", "a scale for each", "bits", *(kind.rpartition(": ")[2] for kind in kinds)]
    lines = [heads, ["---"] * len(heads)]
    for (name, scale), cells in found.items():
        bits = cells[kinds[0]]["bits_an_element"]
        lines.append([f"`{name}`", scale, bits, *(f"{float(cells[kind]['relative_error']):.4f}" for kind in kinds)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(text: str, figures: Path) -> str:
    """The page with the table of the figures between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"the page of {figures} has lost the mark {BEGIN}"
    assert end, f"the page of {figures} has lost the mark {END}"
    return before + BEGIN + table(figures) + END + after


if __name__ == "__main__":
    for path, figures in PAGES.items():
        path.write_text(page(path.read_text(), figures))
