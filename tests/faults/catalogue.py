"""Rows of the table of faults: what goes wrong, what a user sees, what is left. ``docs/robustness.md`` shows the table.

Each module of this folder has ``TITLE`` and ``FAULTS``, and a test that injects every one of them. After a change
``python -m tests.faults.catalogue`` writes the table in the docs anew.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"


@dataclass(frozen=True)
class Fault:
    """One line of the table.

    Attributes:
        what: goes wrong.
        seen: the sentence that a user reads, ``…`` for what differs from case to case; None: nothing is said, because
            nothing is lost.
        left: afterwards, or how it goes on.
        inject: the test's own way of doing it.
    """

    what: str
    seen: str | None
    left: str
    inject: Callable[..., Any]

    def __str__(self) -> str:
        return self.what

    def is_said_by(self, text: str) -> bool:
        """Whether a text is the sentence, the whole of it and one line."""
        pattern = ".+".join(re.escape(part) for part in self.seen.split("…"))
        return re.fullmatch(pattern, text.removeprefix("Error: ").strip()) is not None


def markdown() -> str:
    """The table as it stands in the document."""
    parts = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.faults.{path.stem}")
        if not hasattr(module, "FAULTS"):
            continue
        lines = [f"### {module.TITLE}", "", "| What goes wrong | What you see | What is left |", "|---|---|---|"]
        for fault in module.FAULTS:
            seen = "nothing" if fault.seen is None else f"`{fault.seen}`"
            lines.append("| " + " | ".join(text.replace("|", "\\|") for text in (fault.what, seen, fault.left)) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def document_with_table(text: str) -> str:
    """The document with the table put between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    DOCUMENT.write_text(document_with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
