"""Linear, convolution and embedding layers: no values where none are kept, and fast products for a decoding batch.

A decoder is built on the ``meta`` device and its tensors are loaded. Random values drawn there are thrown away, but the
first draw makes PyTorch load the Python code of its meta kernels, a second of every worker process's start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DECODING_ROWS = range(5, 33)
# On AVX2 the same product takes twice as long as PyTorch's own.
_WEIGHT_FIRST = torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(nn.Linear):
    """``nn.Linear``, without values on the ``meta`` device.

    One decoding step of 5 to 32 rows on a CPU with AVX-512 multiplies the other way round, weight times rows: MKL then
    reads the weights faster (float32, one thread), and reading them is what such a step spends most of its time on.
    Equal up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        is_step = _WEIGHT_FIRST and x.dim() == 3 and x.shape[1] == 1 and x.shape[0] in _DECODING_ROWS
        if is_step and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
            # Contiguous again, or the fused attention kernel would refuse what is made of it.
            y_BO = (self.weight @ x[:, 0].t().contiguous()).t().contiguous()
            return (y_BO if self.bias is None else y_BO + self.bias)[:, None]
        return super().forward(x)

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
