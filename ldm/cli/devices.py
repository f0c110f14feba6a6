"""Devices by name, and this process's shard of the work where several do it together."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

from ldm.io.sharding import Shard, job_shard


def parse_devices(text: str | None) -> list[torch.device]:
    """Return the devices in such as '0,1', 'cuda:0' or 'cpu'; for None CUDA if there is one, else the CPU.

    Raises ValueError for anything else, and for a CUDA device that is not here.
    """
    if text is None:
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    return [_parse_device(piece.strip()) for piece in text.split(",")]


def _parse_device(text: str) -> torch.device:
    try:
        device = torch.device(f"cuda:{text}" if text.isdigit() else text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"'{text}' is no device: give cpu, or cuda:0 or 0 for the first GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device '{text}' needs CUDA device {device.index or 0}, and this machine has "
            f"{torch.cuda.device_count()}: use cpu"
        )
    return device


def require_cpu(text: str | None, what: str) -> None:
    """Raise ValueError where a device is named that is not the CPU, on which alone `what` runs."""
    if text is not None and parse_devices(text)[0].type != "cpu":
        raise ValueError(f"`device` {text}: {what} runs on the CPU alone: give cpu, or leave it out")


def fabric_device(text: str | None) -> dict[str, Any]:
    """Return what Lightning's Fabric calls the one device that `text` names."""
    device = parse_devices(text)[0]
    return {"accelerator": device.type, "devices": 1 if device.index is None else [device.index]}


def init_distributed(device: torch.device) -> tuple[torch.device, Shard]:
    """Return this process's device, and its shard of the work.

    Work is shared out among the processes that torchrun or SLURM has started together, one for each device, and among
    the tasks of a SLURM job array. Raises ValueError where several processes are told to take the same GPU.
    """
    if not any(name.startswith(("TORCHELASTIC_", "SLURM_")) for name in os.environ):
        return device, Shard()  # without Lightning, whose import takes half a second
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="The `srun` command")
    rank, size = 0, 1
    try:
        environments = [kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()]
    except RuntimeError as error:  # Lightning's, which names the flag of sbatch to use instead
        raise ValueError(str(error)) from error
    environment = environments[0] if environments else None
    if environment and environment.world_size() > 1:
        rank, size, device = _launch(environment, device)
    return device, job_shard(rank, size)


def _launch(environment, device: torch.device) -> tuple[int, int, torch.device]:
    """Join the other processes by Lightning's Fabric, and return rank, number of processes and device."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import SLURMEnvironment

    world_size = environment.world_size()
    if isinstance(environment, SLURMEnvironment):
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
    else:
        nodes = world_size // int(os.environ["LOCAL_WORLD_SIZE"])
    if device.index is not None:
        raise ValueError(
            f"device {device} would be that of all {world_size} processes: leave the flag out, so that each "
            "takes its own, or give cpu"
        )
    fabric = Fabric(accelerator=device.type, devices=world_size // nodes, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    return fabric.global_rank, fabric.world_size, fabric.device
