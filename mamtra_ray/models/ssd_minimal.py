"""The chunked scan in the fewest lines: what :mod:`mamtra_ray.models.ssd_chunked` computes, without its speed.

For reading, and for tests, between the recurrence of :mod:`mamtra_ray.models.ssd` and the fast scan: the same chunks
and four steps as in the fast one (Dao and Gu 2024, arXiv 2405.21060, section 6 and listing 1), by einsum, on whole
sequences.

Letters: B batch, K chunks, Q positions of a chunk (t of a query, s of a key), H heads, P head dim, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_scan_minimal(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLHN: Tensor, C_BLHN: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """y [B, L, H, P] and the state after the last position [B, H, P, N].

    Args:
        x_BLHP, B_BLHN, C_BLHN: values, keys, queries; every head has its own.
        dt_BLH: step sizes, after bias and softplus.
        A_H: negative decay rates.
        chunk_size: must divide the length.
    """
    x_BKQHP, dt_BKQH, B_BKQHN, C_BKQHN = (
        t.unflatten(1, (-1, chunk_size)) for t in (x_BLHP * dt_BLH[..., None], dt_BLH, B_BLHN, C_BLHN)
    )
    log_decay_BKQH = (dt_BKQH * A_H).cumsum(2)  # from the chunk's start
    # 1. Inside the chunks: the recurrence as a masked matrix product, where position t sees s <= t.
    span_BKtsH = log_decay_BKQH[:, :, :, None] - log_decay_BKQH[:, :, None]
    causal_ts = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=A_H.device).tril()
    decay_BKtsH = span_BKtsH.masked_fill(~causal_ts[..., None], -torch.inf).exp()
    y_BKQHP = torch.einsum("bkthn,bkshn,bktsh,bkshp->bkthp", C_BKQHN, B_BKQHN, decay_BKtsH, x_BKQHP)
    # 2. What each chunk adds to the state: its inputs, decayed to the chunk's end.
    to_end_BKQH = (log_decay_BKQH[:, :, -1:] - log_decay_BKQH).exp()
    added_BKHPN = torch.einsum("bkshn,bksh,bkshp->bkhpn", B_BKQHN, to_end_BKQH, x_BKQHP)
    # 3. From chunk to chunk: the state that enters each one.
    state_BHPN, entering = torch.zeros_like(added_BKHPN[:, 0]), []
    for k in range(added_BKHPN.shape[1]):
        entering.append(state_BHPN)
        state_BHPN = log_decay_BKQH[:, k, -1].exp()[..., None, None] * state_BHPN + added_BKHPN[:, k]
    # 4. What the entering state says at every position, decayed from the chunk's start.
    y_BKQHP = y_BKQHP + torch.einsum("bkthn,bkth,bkhpn->bkthp", C_BKQHN, log_decay_BKQH.exp(), torch.stack(entering, 1))
    return y_BKQHP.flatten(1, 2), state_BHPN
