"""Quantized hidden states: what the tokens tell of them is predicted, the rest is rounded and entropy coded.

The decoder of a training sequence knows the speech token at a position and the one that follows. These two
explain most of the teacher's final hidden state. So the quantizer

1. subtracts a prediction, the sum of a row per input token and a row per next token,
2. rotates the residual into its PCA basis, and
3. rounds every coordinate with one and the same step. That makes the squared error equal in all dimensions
   (reverse water-filling), and an entropy coder, Parquet's zstd, charges each dimension what its variance costs.

Tensor letters: N labeled positions, D model width, V speech vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mamtra_ray.errors import InputError

QUANTIZER_FILE = "quantizer.safetensors"
# Calibration looks at no more positions than about this.
CALIBRATION_TOKENS = 40_000
# A token's own row counts like the calibration's evidence for it against this many positions of none.
_SHRINKAGE = 30.0


@dataclass(frozen=True)
class HiddenQuantizer:
    """See the module docstring. The last rows of the tables are for the separator before and the end after speech.

    Attributes:
        input_table: (V + 1, D), float16; row of the input token of a position.
        label_table: (V + 1, D), float16; row of the next token.
        basis_DD: orthonormal columns, by falling variance of the residual.
        step: distance of neighboring code points, in the units of the hidden states.
    """

    input_table: Tensor
    label_table: Tensor
    basis_DD: Tensor
    step: float

    @property
    def hidden_size(self) -> int:
        return len(self.basis_DD)

    def to(self, device: torch.device) -> HiddenQuantizer:
        """The same quantizer with its tensors on ``device``."""
        return HiddenQuantizer(
            self.input_table.to(device), self.label_table.to(device), self.basis_DD.to(device), self.step
        )

    def codes(self, hidden_ND: Tensor, inputs_N: Tensor, labels_N: Tensor) -> Tensor:
        """Codes of hidden states, int16 (N, D)."""
        residual_ND = hidden_ND.float() - self._prediction(inputs_N, labels_N)
        return (residual_ND @ (self.basis_DD / self.step)).round().clamp(-32767, 32767).short()

    def reconstruct(self, codes_ND: Tensor, inputs_N: Tensor, labels_N: Tensor) -> Tensor:
        """Hidden states of codes, float32 (N, D)."""
        return torch.addmm(self._prediction(inputs_N, labels_N), codes_ND.float(), self.basis_DD.T, alpha=self.step)

    def _prediction(self, inputs_N: Tensor, labels_N: Tensor) -> Tensor:
        return self.input_table[inputs_N].float() + self.label_table[labels_N].float()


def token_context(speech_tokens: Sequence[np.ndarray], speech_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Input and next token of every labeled position, int64 (N,); ``speech_size`` stands for separator and end."""
    edge = np.array([speech_size])
    inputs = np.concatenate([part for tokens in speech_tokens for part in (edge, tokens)])
    labels = np.concatenate([part for tokens in speech_tokens for part in (tokens, edge)])
    return inputs.astype(np.int64), labels.astype(np.int64)


def calibrate(
    hidden_ND: Tensor,
    inputs_N: Tensor,
    labels_N: Tensor,
    embedding: Tensor,
    head_weight: Tensor,
    bits: float,
) -> HiddenQuantizer:
    """Learn the quantizer whose codes have an entropy of ``bits`` per dimension on these rows.

    The tables are a linear regression on the token's embedding and the next token's head row, which holds for
    tokens never seen here too, plus each token's mean remainder, shrunk by how seldom it was seen.

    Args:
        hidden_ND: the teacher's rows, at least 4 D of them.
        inputs_N, labels_N: of :func:`token_context`.
        embedding: (V + 1, D), the input embeddings of the speech ids and the separator's last token.
        head_weight: (V + 1, D), the head's rows of the speech ids and the end's.
        bits: mean over the dimensions of the entropy of a dimension's codes.

    Raises:
        InputError: too few rows.
    """
    num_rows, width = hidden_ND.shape
    if num_rows < 4 * width:
        raise InputError(
            f"quantizing {width} dimensions needs at least {4 * width:,} positions to learn from, the training split "
            f"has {num_rows:,}: use cache.format=hidden"
        )
    hidden_ND = hidden_ND.double()
    embedding, head_weight = _standardised(embedding.double()), _standardised(head_weight.double())
    features_NF = torch.cat([embedding[inputs_N], head_weight[labels_N], hidden_ND.new_ones(num_rows, 1)], 1)
    gram_FF = features_NF.T @ features_NF
    gram_FF += 1e-3 * num_rows * torch.eye(len(gram_FF), dtype=gram_FF.dtype)
    weights_FD = torch.linalg.solve(gram_FF, features_NF.T @ hidden_ND)
    remainder_ND = hidden_ND - features_NF @ weights_FD
    input_means = torch.zeros_like(embedding)
    label_means = torch.zeros_like(head_weight)
    for _ in range(2):
        label_means = _shrunken_means(remainder_ND - input_means[inputs_N], labels_N, len(head_weight))
        input_means = _shrunken_means(remainder_ND - label_means[labels_N], inputs_N, len(embedding))
    # The constant is a part of one table; both are kept in half precision, so what that rounds off is coded.
    input_table = (embedding @ weights_FD[:width] + input_means).half()
    label_table = (head_weight @ weights_FD[width:-1] + label_means + weights_FD[-1]).half()
    residual_ND = hidden_ND - input_table[inputs_N].double() - label_table[labels_N].double()
    _, basis_DD = torch.linalg.eigh(residual_ND.T @ residual_ND)
    basis_DD = basis_DD.flip(1)
    # An eigenvector's sign is arbitrary; fixed, so that a repeated calibration gives the same bytes.
    basis_DD = basis_DD * basis_DD.gather(0, basis_DD.abs().argmax(0, keepdim=True)).sign()
    step = _step_of_entropy((residual_ND @ basis_DD).numpy(), bits)
    return HiddenQuantizer(input_table, label_table, basis_DD.float(), step)


def quantizer_bytes(quantizer: HiddenQuantizer) -> bytes:
    """Content of :data:`QUANTIZER_FILE`."""
    return save_safetensors(
        {
            "input_table": quantizer.input_table.contiguous(),
            "label_table": quantizer.label_table.contiguous(),
            "basis": quantizer.basis_DD.contiguous(),
            "step": torch.tensor(quantizer.step, dtype=torch.float64),
        }
    )


def read_quantizer(content: bytes) -> HiddenQuantizer:
    """The quantizer of :func:`quantizer_bytes`.

    Raises:
        InputError: the content is damaged.
    """
    try:
        tensors = load_safetensors(content)
        step = tensors["step"].item()
        return HiddenQuantizer(tensors["input_table"], tensors["label_table"], tensors["basis"], step)
    except Exception as error:  # safetensors has an exception type of its own for every kind of damage
        raise InputError(f"{QUANTIZER_FILE} of the teacher cache is damaged: {error}") from None


def _standardised(table: Tensor) -> Tensor:
    """Mean square 1, so that one ridge suits every teacher."""
    return table / table.square().mean().sqrt().clamp_min(1e-12)


def _shrunken_means(values_ND: Tensor, ids_N: Tensor, size: int) -> Tensor:
    sums = values_ND.new_zeros(size, values_ND.shape[1]).index_add_(0, ids_N, values_ND)
    counts = torch.bincount(ids_N, minlength=size)
    return sums / (counts + _SHRINKAGE)[:, None]


def _step_of_entropy(coefficients_ND: np.ndarray, bits: float) -> float:
    """The step at which the rounded coefficients have this entropy, by bisection."""
    high = float(np.abs(coefficients_ND).max())
    low = 1e-5 * high
    for _ in range(24):
        step = float(np.sqrt(low * high))
        if entropy(np.rint(coefficients_ND / step).astype(np.int64)) > bits:
            low = step
        else:
            high = step
    return high


def entropy(codes_ND: np.ndarray) -> float:
    """Mean over dimensions of the empirical entropy of a dimension's codes, bits."""
    bits = 0.0
    for column in codes_ND.T:
        counts = np.bincount(column - column.min())
        shares = counts[counts > 0] / len(column)
        bits -= float((shares * np.log2(shares)).sum())
    return bits / codes_ND.shape[1]
