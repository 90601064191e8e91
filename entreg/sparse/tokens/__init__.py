"""Fewer tokens in the residual stream: dropping, merging, fusing, soft partition.

Modules of this package may register a reduction in :data:`entreg.sparse.registries.REDUCTIONS`; all are loaded.
"""

from entreg.names import import_modules

import_modules(__name__)
