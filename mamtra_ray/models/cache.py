"""What a decoder remembers while it generates: keys and values of attention layers, states of Mamba layers.

Keys and values are written into buffers that are now and then enlarged by an eighth; concatenating them with the new
ones at every step, as the obvious cache does, costs more at long contexts than attending to them
(``benchmarks/generate.py`` has both). Letters: see :mod:`mamtra_ray.models`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mamtra_ray.models.mamba import MixerState


class DecoderCache:
    """The past of every layer; empty when made.

    Attributes:
        length: positions so far (T), padding included. The decoder raises it at the end of a pass.
    """

    in_place = False
    """Whether layers write their new state into the old one."""

    def __init__(self) -> None:
        self.length = 0
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, MixerState] = {}

    def append(self, layer: int, k_BGLP: Tensor, v_BGLP: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new positions' keys and values of an attention layer; all so far, [B, G, T, P], as views."""
        past, total = self.length, self.length + k_BGLP.shape[2]
        buffers = self._buffers.get(layer)
        if buffers is None or total > buffers[0].shape[2]:
            old = buffers or (None, None)
            buffers = (_enlarged(old[0], k_BGLP, past, total), _enlarged(old[1], v_BGLP, past, total))
            self._buffers[layer] = buffers
        for buffer_BGTP, new_BGLP in zip(buffers, (k_BGLP, v_BGLP), strict=True):
            buffer_BGTP[:, :, past:total] = new_BGLP
        return buffers[0][:, :, :total], buffers[1][:, :, :total]

    def state(self, layer: int) -> MixerState | None:
        """The state of a Mamba layer; None before its first position."""
        return self._states.get(layer)

    def set_state(self, layer: int, state: MixerState) -> None:
        """Replace the state of a Mamba layer."""
        self._states[layer] = state

    def keep_rows(self, row_B: Tensor) -> None:
        """Keep only these batch rows (int64 indices), in this order."""
        for layer, (keys, values) in self._buffers.items():
            # With their spare room, or the next position would have them copied once more.
            self._buffers[layer] = (keys.index_select(0, row_B), values.index_select(0, row_B))
        for layer, state in self._states.items():
            self._states[layer] = state.rows(row_B)

    def advance(self, positions: int) -> None:
        """The end of a pass over new positions."""
        self.length += positions

    def take(self) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, MixerState]]:
        """Buffers of keys and values [B, G, T and spare room, P] and states, by layer; the cache is empty after it."""
        buffers, states = self._buffers, self._states
        self.length, self._buffers, self._states = 0, {}, {}
        return buffers, states

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and states in use (not of the buffers' spare room)."""
        return bytes_in_use(self._buffers, self._states, self.length)


def bytes_in_use(buffers: Mapping[int, tuple[Tensor, Tensor]], states: Mapping[int, MixerState], length: int) -> int:
    """Of the first ``length`` positions of keys and values, and of states."""
    used = [buffer[:, :, :length] for pair in buffers.values() for buffer in pair]
    used += [tensor for state in states.values() for tensor in (state.conv_BCK, state.ssm_BHPN)]
    return sum(tensor.numel() * tensor.element_size() for tensor in used)


def _enlarged(old_BGTP: Tensor | None, new_BGLP: Tensor, past: int, total: int) -> Tensor:
    batch, groups, _, width = new_BGLP.shape
    buffer_BGTP = new_BGLP.new_empty(batch, groups, total + max(64, total // 8), width)
    if old_BGTP is not None:
        buffer_BGTP[:, :, :past] = old_BGTP[:, :, :past]
    return buffer_BGTP
