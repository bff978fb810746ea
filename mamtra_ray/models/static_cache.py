"""A cache whose tensors stay where they are: what a decoding step needs to be captured as a CUDA graph.

Every step then runs the same kernels on the same addresses. The position is a tensor, attention looks at all columns of
its buffers and a mask hides those that are not written yet, and Mamba states are overwritten. Only :meth:`enlarge`
and :meth:`keep_rows` replace tensors; a graph captured before is useless after them. Letters: see
:mod:`mamtra_ray.models`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamtra_ray.models.cache import DecoderCache, bytes_in_use
from mamtra_ray.models.mamba import MixerState
from mamtra_ray.models.rope import Rope

COLUMNS = 256
"""Buffers have a multiple of so many positions."""


class StaticCache:
    """The past of every layer after :func:`~mamtra_ray.speech_lm.generate.prefill`, for steps of one position.

    Attributes:
        length: positions so far (T), padding included.
        capacity: positions that the buffers hold.
    """

    in_place = True

    def __init__(self, past: DecoderCache, rope: Rope, mask_BT: Tensor | None, rows: int, like: Tensor) -> None:
        """Take over ``past``, which is used up.

        Args:
            past: a filled cache.
            rope: rotary embeddings of the model.
            mask_BT: true for real positions of ``past``; None if none is padded.
            rows: B.
            like: a tensor of the type and on the device of the hidden states.
        """
        self.length, self.capacity = past.length, 0
        self._rope, self._like = rope, like
        self._buffers, self._states = past.take()
        counts_B = torch.full((rows,), self.length, device=like.device) if mask_BT is None else mask_BT.sum(1)
        # Of the next token: its column in the buffers, and its position among a row's real ones.
        self._column_1 = torch.full((1,), self.length, device=like.device)
        self._position_B = counts_B
        self._real_BT = torch.ones(rows, self.length, dtype=torch.bool, device=like.device)
        if mask_BT is not None:
            self._real_BT = mask_BT.bool()
        self.enlarge()

    def enlarge(self) -> None:
        """Make room for at least one more position: an eighth more, in multiples of ``COLUMNS``."""
        wanted = self.length + max(1, self.length // 8)
        self.capacity = -(-wanted // COLUMNS) * COLUMNS
        for layer, buffers in self._buffers.items():
            keys, values = (_with_columns(buffer, self.length, self.capacity) for buffer in buffers)
            self._buffers[layer] = (keys, values)
        real_BT = self._real_BT.new_ones(len(self._real_BT), self.capacity)
        real_BT[:, : self.length] = self._real_BT[:, : self.length]
        self._real_BT = real_BT
        self._column_T = torch.arange(self.capacity, device=self._like.device)
        # Angles are looked up: computing them copies the frequencies from the host, which no graph may do.
        position_1T = self._column_T[None]
        if self._rope.depends_on_length:
            position_1T = position_1T.clamp_max(self._rope.max_position_embeddings - 1)
        cos_1TP, sin_1TP = self._rope.cos_sin(position_1T, self._like.dtype)
        self._cos_TP, self._sin_TP = cos_1TP[0], sin_1TP[0]

    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """Of the angles of every row's next position, [B, 1, P]."""
        return self._cos_TP[self._position_B][:, None], self._sin_TP[self._position_B][:, None]

    def seen(self) -> Tensor:
        """True where the next position sees a column, [B, 1, 1, T]: the real ones, and itself."""
        return (self._real_BT & (self._column_T <= self._column_1))[:, None, None]

    def append(self, layer: int, k_BG1P: Tensor, v_BG1P: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position's keys and values of an attention layer; whole buffers, [B, G, T, P]."""
        buffers = self._buffers[layer]
        for buffer_BGTP, new_BG1P in zip(buffers, (k_BG1P, v_BG1P), strict=True):
            buffer_BGTP.index_copy_(2, self._column_1, new_BG1P)
        return buffers

    def state(self, layer: int) -> MixerState:
        """The state of a Mamba layer, which the layer overwrites."""
        return self._states[layer]

    def set_state(self, layer: int, state: MixerState) -> None:
        """Nothing to keep: the layer wrote into the state it was given."""
        if state is not self._states[layer]:
            raise ValueError(f"layer {layer} made a new state; a step on a static cache works in place")

    def advance(self, positions: int) -> None:
        """The end of a step, on the host and on the device. A replayed graph does the device's part itself."""
        self.length += positions
        self._column_1 += positions
        self._position_B += positions

    def keep_rows(self, row_B: Tensor) -> None:
        """Keep only these batch rows (int64 indices), in this order."""
        self._buffers = {
            layer: (keys.index_select(0, row_B), values.index_select(0, row_B))
            for layer, (keys, values) in self._buffers.items()
        }
        self._states = {layer: state.rows(row_B) for layer, state in self._states.items()}
        self._real_BT, self._position_B = self._real_BT[row_B], self._position_B[row_B]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and states in use (not of columns that hold nothing yet)."""
        return bytes_in_use(self._buffers, self._states, self.length)


def _with_columns(buffer_BGTP: Tensor, used: int, columns: int) -> Tensor:
    batch, groups, _, width = buffer_BGTP.shape
    # Zeros: a column that no query sees still meets its weight, 0, and 0 times what memory held before may be NaN.
    enlarged_BGTP = buffer_BGTP.new_zeros(batch, groups, columns, width)
    enlarged_BGTP[:, :, :used] = buffer_BGTP[:, :, :used]
    return enlarged_BGTP
