"""Where a process computes: on the GPUs that Ray gave it, which is what ``resources.gpus_per_worker`` asked for."""

from __future__ import annotations

import sys

import torch


def device_of_this_process() -> torch.device:
    """``cuda`` for a worker that has a GPU from Ray, ``cpu`` for one that has none, whatever the machine has.

    A process without Ray takes the machine's GPU if there is one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return torch.device("cuda")
    return torch.device("cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu")
