"""A curriculum for scenes with one question per cell: attention between cells is suppressed first, then let go.

A model with a prefix token per cell of the image must discover which token is asked about which cell; trained from
scratch on whole scenes it stays on a plateau for thousands of steps. Here the attention logits between different
cells get the bias log(c): with c near 0 every cell is an image of its own, with c = 1 the model is the stock model.
c grows whenever the running loss is below a threshold. Our choice, for the offline experiments only; it changes
nothing in the trained model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entreg import distributed
from entreg.errors import ConfigError


@dataclass(frozen=True)
class CurriculumSettings:
    """When the cells are let together.

    Attributes:
        cells: cells per side; the model's prefix tokens belong to them row by row. At least 1.
        threshold: running loss in nats below which c grows.
        start: first c, in (0, 1].
        factor: by which c grows per step below ``switch``; above 1.
        switch: c from which it grows by ``increment`` per step instead.
        increment: above 0.
        smoothing: weight of the past in the running loss, in [0, 1).
        code: standard deviation of a random vector per cell that is added to the position embeddings of its tokens
            before training (by :meth:`CellCurriculum.mark`), at least 0; without it most runs stay on the plateau.
    """

    cells: int = 2
    threshold: float = 0.95
    start: float = 0.001
    factor: float = 1.1
    switch: float = 0.15
    increment: float = 0.02
    smoothing: float = 0.9
    code: float = 0.3

    def __post_init__(self) -> None:
        positive = self.cells >= 1 and 0 < self.start <= 1 and self.increment > 0 and self.threshold > 0
        if not (positive and self.factor > 1 and self.code >= 0 and 0 <= self.smoothing < 1):
            raise ConfigError(f"curriculum settings out of range: {self}")


class CellCurriculum:
    """The state of the curriculum: c and the running loss.

    Args:
        settings: see :class:`CurriculumSettings`.
        model: stock timm ViT with a square patch grid and at least one prefix token per cell.

    Raises:
        ConfigError: the model has too few prefix tokens, or the cells do not divide its grid.
    """

    def __init__(self, settings: CurriculumSettings, model: nn.Module) -> None:
        grid = model.patch_embed.grid_size
        if grid[0] % settings.cells or grid[1] % settings.cells or model.num_prefix_tokens < settings.cells**2:
            raise ConfigError(
                f"a curriculum of {settings.cells} x {settings.cells} cells needs a prefix token for each and a patch "
                f"grid that they divide, got {model.num_prefix_tokens} and {tuple(grid)}"
            )
        self.settings = settings
        rows = torch.arange(grid[0]) * settings.cells // grid[0]
        columns = torch.arange(grid[1]) * settings.cells // grid[1]
        patches = (rows[:, None] * settings.cells + columns).flatten()
        self.cell = torch.cat((torch.arange(model.num_prefix_tokens), patches))
        self.apart = self.cell[:, None] != self.cell
        self.closeness = settings.start
        self.running_loss: float | None = None
        self._last_step = -1

    @torch.no_grad()
    def mark(self, model: nn.Module, seed: int) -> None:
        """Give the tokens of each cell something in common: a vector added to their position embeddings."""
        generator = torch.Generator().manual_seed(seed)
        width = model.pos_embed.shape[-1]
        codes = self.settings.code * torch.randn(int(self.cell.max()) + 1, width, generator=generator)
        model.pos_embed += codes[self.cell].to(model.pos_embed)

    def mask(self, images: Tensor) -> Tensor | None:
        """(n, n) additive bias of the logits, in the dtype that attention runs in; None once the cells are together."""
        if self.closeness >= 1:
            return None
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
        return (self.apart * math.log(self.closeness)).to(images.device, dtype)

    def advance(self, loss: Tensor, step: int) -> None:
        """Take note of a step's task loss and let the cells together if it is low enough; waits for the loss.

        Args:
            loss: mean task loss in nats, of this process's part where there are several.
            step: number of the optimiser step, from 0. Only its first part counts when gradients are accumulated.
        """
        if self.closeness >= 1 or step <= self._last_step:
            return
        self._last_step = step
        s = self.settings
        value = distributed.mean_of_all(loss.item())
        past = value if self.running_loss is None else self.running_loss
        self.running_loss = s.smoothing * past + (1.0 - s.smoothing) * value
        if self.running_loss < s.threshold:
            grown = self.closeness * s.factor if self.closeness < s.switch else self.closeness + s.increment
            self.closeness = min(1.0, grown)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"closeness": self.closeness, "running_loss": self.running_loss, "last_step": self._last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.closeness, self.running_loss = state["closeness"], state["running_loss"]
        self._last_step = state.get("last_step", -1)
