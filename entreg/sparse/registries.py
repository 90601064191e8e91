"""What a plan may choose among by name. Each thing registers itself, in the package or outside it.

The modules that fill these registries are loaded with :mod:`entreg.sparse`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from entreg.names import Registry

if TYPE_CHECKING:
    from entreg.sparse.decoder.selection import BlockSelection
    from entreg.sparse.scores.score import Score
    from entreg.sparse.tokens.plans import Reduction

SCORES: Registry[Score] = Registry("selection score")
"""How keys and tokens are ranked, see :mod:`entreg.sparse.scores`."""

REDUCTIONS: Registry[Reduction] = Registry("reduction")
"""How tokens are made fewer, see :mod:`entreg.sparse.tokens.plans`."""

SELECTIONS: Registry[BlockSelection] = Registry("selection")
"""How a decoder's blocks of keys are chosen, see :mod:`entreg.sparse.decoder.selection`."""
