"""Layers that draw no values where none are kept.

A decoder is built on the ``meta`` device and its tensors are loaded. Random values drawn there are thrown away, but the
first draw makes PyTorch load the Python code of its meta kernels, a second of every worker process's start.
"""

from __future__ import annotations

from torch import nn


class Linear(nn.Linear):
    """``nn.Linear``, without values on the ``meta`` device."""

    def reset_parameters(self) -> None:
        """As PyTorch does, elsewhere."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv1d(nn.Conv1d):
    """``nn.Conv1d``, without values on the ``meta`` device."""

    def reset_parameters(self) -> None:
        """As PyTorch does, elsewhere."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """``nn.Embedding``, without values on the ``meta`` device."""

    def reset_parameters(self) -> None:
        """As PyTorch does, elsewhere."""
        if not self.weight.is_meta:
            super().reset_parameters()
