"""Tests, a mirror of ``entreg/``."""

import entreg  # noqa: F401 - before any of them imports timm, torchvision or transformers
