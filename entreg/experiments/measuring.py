"""What the speed benchmarks of all families measure with: devices, memory, copies, the bound of Amdahl's law."""

from __future__ import annotations

import copy
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from entreg.errors import ConfigError
from entreg.names import require_choice


def speed_device(name: str) -> torch.device:
    """``cpu`` or ``cuda`` as a device.

    Raises:
        ConfigError: another name, or CUDA where torch sees none.
    """
    require_choice("device", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device")
    return torch.device(name)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules with the very same parameters and buffers, so that many variants need no more memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def amdahl_bound(*parts: tuple[float, float]) -> float:
    """Amdahl's law: the speed-up when parts of the work shrink and nothing else changes or is added.

    Args:
        *parts: pairs (share of the time before, fraction of that part's work that remains).

    Returns:
        1 / (1 - sum of share x (1 - remaining)); the shares are measured, so the value is capped where they sum to
        more than 1 by noise.
    """
    saved = sum(share * (1.0 - remaining) for share, remaining in parts)
    return 1.0 / max(1.0 - saved, 1e-3)


Step = Callable[[], object]


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes that ``step`` holds at most beyond what was allocated before it (see the module's text)."""
    step()  # Caches that a first call fills are no part of the cost of a step.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    # Kineto prints two lines per trace otherwise; it reads this when the first trace starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = step()
        del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    ]
    return max(itertools.accumulate(change for _, _, change in sorted(changes)), default=0)
