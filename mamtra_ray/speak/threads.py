"""How many CPU threads the verb ``speak`` computes with.

A sentence is spoken one token at a time. The matrices of a small model are done before the threads of one product have
found each other, and on a busy machine each product waits for the slowest of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

SMALL_MODEL = 50_000_000
"""Parameters of the teacher below which one thread speaks: the demos' have 2 and 4 million, CosyVoice 2's 360."""
_OWN_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def use_threads(parameters: int, threads: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Set this process's threads: ``threads``; without, what the environment says; without that, one for a small model.

    Args:
        parameters: of the teacher.
        threads: asked for, if any.
        environment: where torch has looked for OMP_NUM_THREADS and MKL_NUM_THREADS when it was imported.
    """
    if threads is None and parameters < SMALL_MODEL and not any(environment.get(name) for name in _OWN_SETTINGS):
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
