"""The hybrid cache: transformers' DynamicCache, with room to grow.

transformers' DynamicLayer concatenates all keys and values with the new ones at every step, which at long
contexts costs more than attending to them (``benchmarks/generate.py`` has the same model with both). Attention
layers here write into a buffer that is now and then enlarged by an eighth.

Letters: B batch, G key-value heads, T positions so far, L new positions, P head dim.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from mamtra_ray.models.mamba import MixerState


class GrowingLayer(DynamicLayer):
    """Keys and values (B, G, T, P) of one attention layer, the used part of a larger buffer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, G, L, P) keys and values; returns all of them as views of the buffer."""
        past, total = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if self._buffers is None or total > self._buffers[0].shape[2]:
            self._buffers = (
                self._enlarged(self.keys, key_states, total),
                self._enlarged(self.values, value_states, total),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:total] = new
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffers)
        return self.keys, self.values

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these batch rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self._buffers = None

    @staticmethod
    def _enlarged(old: Tensor | None, new: Tensor, total: int) -> Tensor:
        batch, heads, _, width = new.shape
        buffer = new.new_empty(batch, heads, total + max(64, total // 8), width)
        if old is not None and old.numel():
            buffer[:, :, : old.shape[2]] = old
        return buffer


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a GraniteMoeHybrid config: growing keys and values, and Mamba states."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def past_length(cache: Cache | None) -> int | None:
    """Positions in the cache; None if it has Mamba layers only, which do not count them (nor need to)."""
    if cache is None:
        return 0
    lengths = [layer.get_seq_length() for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return lengths[0] if lengths else None


def drop_rows(cache: Cache, kept_rows: Tensor) -> None:
    """Keep only the batch rows ``kept_rows`` (int64 indices) in every layer."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.select_rows(kept_rows)
        else:
            layer.reorder_cache(cast(torch.LongTensor, kept_rows))


def mixer_state(cache: Cache, layer: int) -> MixerState | None:
    """The state of a Mamba layer; None before its first positions."""
    conv_BCK, ssm_BHPN = cache.get_conv_state(layer), cache.get_recurrent_state(layer)
    return None if conv_BCK is None or ssm_BHPN is None else MixerState(conv_BCK, ssm_BHPN)


def store_mixer_state(cache: Cache, layer: int, state: MixerState) -> None:
    """Replace the state of a Mamba layer (``update_recurrent_state`` would copy the new one over the old one)."""
    slot: Any = cache.layers[layer]
    slot.conv_states[0], slot.recurrent_states[0] = state.conv_BCK, state.ssm_BHPN
    slot.is_conv_states_initialized[0] = slot.is_recurrent_states_initialized[0] = slot.has_previous_state[0] = True
    slot.dtype, slot.device = state.conv_BCK.dtype, state.conv_BCK.device


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys, values and states in use (not of the buffers' spare room)."""
    tensors: list[Tensor | None] = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            tensors += [*layer.conv_states.values(), *layer.recurrent_states.values()]
        elif isinstance(layer, DynamicLayer):
            tensors += [layer.keys, layer.values]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
