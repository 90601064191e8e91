"""Fully sharded training, torch's FSDP2: each process keeps its part of weights, gradients and optimiser state.

It is the launcher's choice, as is the number of processes: ``accelerate launch --config_file
configs/accelerate/fsdp.yaml`` or ``--use_fsdp``, or ``ACCELERATE_USE_FSDP=true torchrun ...``. Checkpoints are the same
as without: whole, and read by any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entreg import distributed
from entreg.errors import ConfigError
from entreg.training.settings import TrainingSettings


def sharding_wanted() -> bool:
    """Whether the launcher asks for it, and there is more than one process to share between.

    Raises:
        ConfigError: it asks for something of FSDP that is not supported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or distributed.num_processes() == 1:
        return False
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise ConfigError(
            "fully sharded training is FSDP version 2: set fsdp_version: 2 in the configuration of accelerate"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ConfigError("fully sharded training keeps its part on the device: set fsdp_offload_params: false")
    return True


def check_sharding(
    model: nn.Module, extra_parameters: Sequence[nn.Parameter], settings: TrainingSettings, evaluates: bool
) -> None:
    """Refuse what cannot be trained sharded.

    Args:
        model: not sharded yet.
        extra_parameters: trained besides the model's.
        settings: of the training.
        evaluates: whether the model is to be evaluated while it is trained.

    Raises:
        ConfigError: the sentence says what to do instead.
    """
    reason = None
    if not getattr(model, "_no_split_modules", None):
        reason = f"{type(model).__name__} is no decoder of transformers"
    elif not all(parameter.requires_grad for parameter in model.parameters()):
        reason = "some weights are frozen, and low-rank training is small enough without"
    elif len({parameter.dtype for parameter in model.parameters()}) > 1:
        reason = "its weights are of several dtypes"
    elif extra_parameters:
        reason = "parameters are trained that are not the model's, such as anchors"
    elif settings.ema_decay is not None:
        reason = "the weights are averaged, set ema_decay: null"
    elif evaluates:
        reason = "the model is evaluated while it is trained"
    if reason is not None:
        raise ConfigError(
            f"fully sharded training is not possible here: {reason}; or use configs/accelerate/multi_gpu.yaml"
        )


def shard(model: nn.Module, device: torch.device) -> None:
    """Keep this process's part of every weight only, on its device; in place, and there is no way back.

    A decoder's layers are the units whose weights are put together when they are needed, as transformers names them.
    """
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.num_processes(),))
    units = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in [*units, model]:
        fully_shard(module, mesh=mesh)
    # What is no parameter is not moved by sharding.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def whole(value: Any) -> Any:
    """Nested dictionaries, lists and tuples with every sharded tensor put together; every process must call it.

    Only the first process gets the tensors, on the CPU; what is not sharded is as it was.
    """
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    if not is_sharded(value):
        return value
    full = value.detach().full_tensor()
    return full.cpu() if distributed.is_first() else None


def is_sharded(value: Any) -> bool:
    """Whether a process has only a part of this tensor."""
    return hasattr(value, "full_tensor")


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as another of its shape; the tensor itself if that is whole."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
