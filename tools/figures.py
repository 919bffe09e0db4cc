"""Figures that were measured, and the pages that quote them.

A benchmark keeps its figures with `--write` in docs/figures/NAME.json: a text for each key, `table` (lines of Markdown) and
`conditions`. Pages quote one as a link to it, `[1.54](figures/training.json#ratio)`, and the table between
`<!-- figures NAME -->` and `<!-- end -->`. `python -m figures` (of `make generate`) puts in what the files say, so a figure
stands once, and a test fails where a page says another.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUOTE = re.compile(r"\[([^\]\n]*)\]\(([^)\s]*figures/(\w+)\.json)#([\w.-]+)\)")
TABLE = re.compile(r"(<!-- figures (\w+) -->\n).*?(<!-- end -->)", re.S)


def write(name: str, figures: Mapping[str, str], table: Sequence[str] = ()) -> None:
    """Keep the figures of the benchmark `name`."""
    conditions = f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
    file = ROOT / "docs" / "figures" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**figures, "conditions": conditions, "table": list(table)}, indent=2) + "\n")


def quoted(text: str) -> str:
    """A page with every quoted figure and table as its file has it."""
    text = QUOTE.sub(lambda found: f"[{_read(found[3])[found[4]]}]({found[2]}#{found[4]})", text)
    return TABLE.sub(
        lambda found: found[1] + "".join(f"{line}\n" for line in _read(found[2])["table"]) + found[3], text
    )


def _read(name: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((ROOT / "docs" / "figures" / f"{name}.json").read_text())
    return figures


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(quoted(page.read_text()))
