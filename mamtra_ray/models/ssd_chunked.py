"""The chunked state-space scan in PyTorch, tuned for a CPU, with its backward written by hand.

The sequence is cut into chunks of Q positions. Inside a chunk the recurrence is a masked matrix product, between
chunks a state is carried (Dao and Gu 2024, arXiv 2405.21060, section 6); ``ssd_minimal`` has the same four steps in
twenty-five lines. A few chunks at a time, a *tile*, go through
all operations while they are in the processor's cache; nothing of size Q x Q outlives its tile, and the backward
computes it again. Heads that share x and B are stacked on the rows of one matrix product, so x and B are not repeated.

Letters: B batch, L length, G key-value groups (heads that share x and B), E decay heads of a group (each has its own
dt, A and state), J query heads of a decay head, so that there are G E J heads; P head dim, N state size; K chunks, Q
positions of a chunk, seen as t (query) or s (key). In a tile z runs over its (chunk, batch row, group).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Floats of one [positions, heads, head dim] block of a tile. Measured on 512 KiB of L2 (with 32 MiB behind it): larger
# tiles run out of the cache, smaller ones spend their time on calls.
_TILE_FLOATS = 3 * 14 * 64 * 64


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Types in ``function`` are those of its arguments, on the CPU and on CUDA."""
    return torch.autocast("cpu", enabled=False)(torch.autocast("cuda", enabled=False)(function))


@dataclass(frozen=True)
class _Segment:
    """Chunks of equal length: the full ones, or the shorter one at the end of the sequence."""

    start: int
    chunks: int
    chunk_size: int

    @staticmethod
    def cut(length: int, chunk_size: int) -> list[_Segment]:
        full, rest = divmod(length, chunk_size)
        segments = [_Segment(0, full, chunk_size), _Segment(full * chunk_size, 1, rest)]
        return [segment for segment in segments if segment.chunks and segment.chunk_size]

    def of(self, t: Tensor, dim: int) -> Tensor:
        """This segment of axis ``dim``, as a view with the chunks in front: [K, ..., Q, ...]."""
        part = t.narrow(dim, self.start, self.chunks * self.chunk_size)
        return part.unflatten(dim, (self.chunks, self.chunk_size)).movedim(dim, 0)

    def tiles(self, B: int, G: int, heads: int, width: int) -> Iterator[tuple[slice, slice, slice]]:
        """(chunks, batch rows, groups) of every tile, in the order of time."""
        pairs = max(1, _TILE_FLOATS // (self.chunk_size * max(self.chunk_size, width) * heads))
        groups = min(G, pairs)
        rows = max(1, min(B, pairs // groups))  # 1 also for an empty batch
        chunks = min(self.chunks, pairs // (groups * rows))
        for k in range(0, self.chunks, chunks):
            for b in range(0, B, rows):
                for g in range(0, G, groups):
                    yield (
                        slice(k, min(k + chunks, self.chunks)),
                        slice(b, min(b + rows, B)),
                        slice(g, min(g + groups, G)),
                    )


@dataclass(frozen=True)
class _Decays:
    """What the decay does inside the chunks. With l the running sum of dt A from the chunk's start, l = hi + lo.

    A difference of two running sums must keep its relative precision after strong decay too (at l = -5000 a float32
    step is 5e-4), so l is summed in float64 and split: hi_t - hi_s is exact enough, exp(lo) is a factor near 1.
    """

    hi_KBGEQ: Tensor  # l rounded to the compute type
    row_KBGEQ: Tensor  # exp(lo_t)
    column_KBGEQ: Tensor  # exp(-lo_s) dt_s
    start_KBGEQ: Tensor  # exp(hi_t); times row: the decay from the chunk's start
    end_KBGEQ: Tensor  # exp(l_end - l_s): the decay to the chunk's end
    total_KBGE: Tensor  # exp(l_end)

    @staticmethod
    def of(dt_KBGEQ: Tensor, A_GE: Tensor) -> _Decays:
        dtype = dt_KBGEQ.dtype
        l_KBGEQ = (dt_KBGEQ.double() * A_GE.double()[..., None]).cumsum(-1)
        hi_KBGEQ = l_KBGEQ.to(dtype)
        lo_KBGEQ = l_KBGEQ - hi_KBGEQ
        return _Decays(
            hi_KBGEQ=hi_KBGEQ,
            row_KBGEQ=lo_KBGEQ.exp().to(dtype),
            column_KBGEQ=((-lo_KBGEQ).exp() * dt_KBGEQ).to(dtype),
            start_KBGEQ=hi_KBGEQ.exp(),
            end_KBGEQ=(l_KBGEQ[..., -1:] - l_KBGEQ).exp().to(dtype),
            total_KBGE=l_KBGEQ[..., -1].exp().to(dtype),
        )

    def matrix(self, tile: tuple[slice, slice, slice]) -> Tensor:
        """exp(l_t - l_s - lo_t) dt_s where s <= t, else 0: [z, e, t, s]."""
        hi_zeq = self.hi_KBGEQ[tile].flatten(0, 2)
        W_zets = hi_zeq[..., None] - hi_zeq[..., None, :]
        return W_zets.exp_().mul_(self.column_KBGEQ[tile].flatten(0, 2)[:, :, None]).tril_()


@dataclass(frozen=True)
class _DecaySums:
    """What the tiles leave for the gradients of dt and A, and what becomes of it.

    a_i = dt_i A enters every decay that spans step i. The spanning terms are summed as such, never as a difference of
    two larger sums: after strong decay the gradient is tiny beside the terms that do not decay.
    """

    direct_KBGEQ: Tensor  # sum over t >= s of T_ts, with T = dM o M: dt_s times its gradient outside the decay
    inside_KBGEQ: Tensor  # sum over t >= i > s of T_ts
    start_KBGEQ: Tensor  # exp(l_t) times its gradient (the state that entered)
    inflow_KBGEQ: Tensor  # gradient of exp(l_end - l_s) dt_s (the state that leaves)
    total_KBGE: Tensor  # exp(l_end) times its gradient (from state to state)

    @staticmethod
    def zeros(dt_KBGEQ: Tensor) -> _DecaySums:
        direct, inside, start, inflow = (torch.zeros_like(dt_KBGEQ) for _ in range(4))
        return _DecaySums(direct, inside, start, inflow, dt_KBGEQ.new_zeros(dt_KBGEQ.shape[:-1]))

    def add_inside(self, T_zets: Tensor, tile: tuple[slice, slice, slice]) -> None:
        _store(T_zets.sum(2), self.direct_KBGEQ[tile])
        q = T_zets.shape[-1]
        earlier_zeti = torch.matmul(T_zets, T_zets.new_ones(q, q).triu_(1))  # sum over s < i
        _store(earlier_zeti.tril_().sum(2), self.inside_KBGEQ[tile])

    def gradients(self, dt_KBGEQ: Tensor, A_GE: Tensor, decays: _Decays) -> tuple[Tensor, Tensor]:
        """Gradients of dt [K, B, G, E, Q] and of A, in float64."""
        spans_start_KBGEQ = self.start_KBGEQ.double().flip(-1).cumsum(-1).flip(-1)
        spans_end_KBGEQ = (self.inflow_KBGEQ * decays.end_KBGEQ * dt_KBGEQ).double().cumsum(-1).roll(1, -1)
        spans_end_KBGEQ[..., 0] = 0
        da_KBGEQ = self.inside_KBGEQ + spans_start_KBGEQ + spans_end_KBGEQ + self.total_KBGE[..., None]
        # Where dt is 0 (padding, or underflow of the softplus) the derivative of the softplus is 0 as well.
        direct_KBGEQ = self.direct_KBGEQ / dt_KBGEQ.clamp_min(torch.finfo(dt_KBGEQ.dtype).tiny)
        ddt_KBGEQ = da_KBGEQ * A_GE.double()[..., None] + direct_KBGEQ + self.inflow_KBGEQ * decays.end_KBGEQ
        return ddt_KBGEQ, (da_KBGEQ * dt_KBGEQ).sum((0, 1, 4))


def _scaled_queries(C_kbgeqjN: Tensor, row_kbgeq: Tensor) -> Tensor:
    """C exp(lo_t), contiguous [h, r, N] with h = z e and r = q j: one pass that also gathers the tile's heads."""
    out_kbgeqjN = row_kbgeq.new_empty(C_kbgeqjN.shape)
    torch.mul(C_kbgeqjN, row_kbgeq[..., None, None], out=out_kbgeqjN)
    return out_kbgeqjN.flatten(0, 3).flatten(1, 2)


def _diagonal(M_zetjs: Tensor) -> Tensor:
    """M[t, t] of every head, [z, e, j, q]. D x is added there: it costs nothing."""
    return M_zetjs.diagonal(dim1=2, dim2=4)


def _store(values: Tensor, place: Tensor) -> None:
    place.copy_(values.view(place.shape))


class ChunkedScan(torch.autograd.Function):
    """y, final state = scan(x, dt, A, B, C, D, initial state, chunk_size, want_state).

    Shapes: x [B, G, L, P], dt [B, G, E, L], A [G, E], B [B, G, L, N], C [B, G, E, L, J, N], D [G, E, J] or None, state
    [B, G, E, P, N] or None (zeros); all may be strided views. y has the shape [B, G, E, L, J, P], the type of x and
    memory in the order [B, L, G, E, J, P]. dt is after softplus and mask; dt, A, D and the state are in the compute
    type (float32; float64 for a float64 x), x, B and C may be narrower.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x_BGLP: Tensor,
        dt_BGEL: Tensor,
        A_GE: Tensor,
        B_BGLN: Tensor,
        C_BGELJN: Tensor,
        D_GEJ: Tensor | None,
        state_BGEPN: Tensor | None,
        chunk_size: int,
        want_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        B, G, E, L, J, N = C_BGELJN.shape
        P, dtype = x_BGLP.shape[-1], dt_BGEL.dtype
        y_BGELJP = x_BGLP.new_empty(B, L, G, E, J, P).permute(0, 2, 3, 1, 4, 5)
        # The state where the work stands; the first chunk has none if no initial one is given.
        running_BGEPN = dt_BGEL.new_zeros(B, G, E, P, N) if state_BGEPN is None else state_BGEPN.to(dtype, copy=True)
        entering: list[Tensor] = []  # of each tile, the states that enter its chunks, for the backward
        for segment in _Segment.cut(L, chunk_size):
            x_KBGQP, B_KBGQN = segment.of(x_BGLP, 2), segment.of(B_BGLN, 2)
            C_KBGEQJN, y_KBGEQJP = segment.of(C_BGELJN, 3), segment.of(y_BGELJP, 3)
            dt_KBGEQ = segment.of(dt_BGEL, 3)
            decays = _Decays.of(dt_KBGEQ, A_GE)
            inflow_KBGEQ = decays.end_KBGEQ * dt_KBGEQ
            for tile in segment.tiles(B, G, E * J, max(P, N)):
                x_zqP, B_zqN = (t[tile].to(dtype).flatten(0, 2) for t in (x_KBGQP, B_KBGQN))
                z, q, _ = x_zqP.shape
                # 1. Inside the chunks: the recurrence as a masked matrix product (with D on its diagonal).
                C_hrN = _scaled_queries(C_KBGEQJN[tile], decays.row_KBGEQ[tile])
                M_zRs = torch.bmm(C_hrN.view(z, -1, N), B_zqN.mT)
                M_zetjs = M_zRs.view(z, E, q, J, q).mul_(decays.matrix(tile)[:, :, :, None])
                if D_GEJ is not None:
                    _diagonal(M_zetjs).add_(_of_tile(D_GEJ, tile))
                y_hqjP = torch.bmm(M_zRs, x_zqP).view(z * E, q, J, P)

                chunks, rows, groups = tile
                m = chunks.stop - chunks.start
                states_kbgEPN = running_BGEPN.new_empty(m + 1, *running_BGEPN[rows, groups].shape)
                has_state = segment.start > 0 or chunks.start > 0 or state_BGEPN is not None
                if has_state:
                    states_kbgEPN[0] = running_BGEPN[rows, groups]
                # 2. What each chunk adds to the state: its inputs, decayed to the chunk's end.
                inflow_zqe1 = inflow_KBGEQ[tile].flatten(0, 2).mT.contiguous()[..., None]
                weighted_zqr = (x_zqP[:, :, None] * inflow_zqe1).view(z, q, E * P)
                torch.bmm(weighted_zqr.mT, B_zqN, out=states_kbgEPN[1:].view(z, E * P, N))
                # 3. From chunk to chunk: the state that enters each one.
                for k in range(0 if has_state else 1, m):
                    total_bgE11 = decays.total_KBGE[chunks.start + k, rows, groups, :, None, None]
                    states_kbgEPN[k + 1].addcmul_(states_kbgEPN[k], total_bgE11)
                running_BGEPN[rows, groups] = states_kbgEPN[m]

                # 4. What the entering state says at every position, decayed from the chunk's start. Without an initial
                # state the sequence's first chunk takes nothing from before.
                first = 0 if has_state else z // m * E
                if first < z * E:
                    from_state_hrP = torch.bmm(C_hrN[first:], states_kbgEPN[:m].view(z * E, P, N)[first:].mT)
                    start_hq11 = decays.start_KBGEQ[tile].flatten(0, 3)[first:, :, None, None]
                    y_hqjP[first:].addcmul_(from_state_hrP.view(-1, q, J, P), start_hq11)
                _store(y_hqjP, y_KBGEQJP[tile])
                entering.append(states_kbgEPN)
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x_BGLP, dt_BGEL, A_GE, B_BGLN, C_BGELJN, D_GEJ, *entering)
            ctx.chunk_size, ctx.has_initial_state = chunk_size, state_BGEPN is not None
        return y_BGELJP, running_BGEPN if want_state else None

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(  # type: ignore[override]
        ctx: Any, dy_BGELJP: Tensor | None, dfinal_BGEPN: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_BGLP, dt_BGEL, A_GE, B_BGLN, C_BGELJN, D_GEJ, *entering = ctx.saved_tensors
        B, G, E, L, J, N = C_BGELJN.shape
        P, dtype = x_BGLP.shape[-1], dt_BGEL.dtype
        if dy_BGELJP is None:
            dy_BGELJP = dt_BGEL.new_zeros(()).expand(B, G, E, L, J, P)
        dx_BGLP = x_BGLP.new_empty(B, L, G, P).transpose(1, 2)
        dB_BGLN = B_BGLN.new_empty(B, L, G, N).transpose(1, 2)
        dC_BGELJN = C_BGELJN.new_empty(B, L, G, E, J, N).permute(0, 2, 3, 1, 4, 5)
        ddt_BGEL, dA_GE = torch.empty_like(dt_BGEL), torch.zeros_like(A_GE, dtype=torch.float64)
        dD_BGEJ = None if D_GEJ is None else D_GEJ.new_zeros(B, G, E, J)
        # The gradient of the state where the work stands, which is the end of the sequence at first.
        running_BGEPN = dt_BGEL.new_zeros(B, G, E, P, N) if dfinal_BGEPN is None else dfinal_BGEPN.to(dtype, copy=True)
        for segment in reversed(_Segment.cut(L, ctx.chunk_size)):
            x_KBGQP, B_KBGQN = segment.of(x_BGLP, 2), segment.of(B_BGLN, 2)
            C_KBGEQJN, dy_KBGEQJP = segment.of(C_BGELJN, 3), segment.of(dy_BGELJP, 3)
            dx_KBGQP, dB_KBGQN, dC_KBGEQJN = segment.of(dx_BGLP, 2), segment.of(dB_BGLN, 2), segment.of(dC_BGELJN, 3)
            dt_KBGEQ = segment.of(dt_BGEL, 3).contiguous()
            decays = _Decays.of(dt_KBGEQ, A_GE)
            inflow_KBGEQ = decays.end_KBGEQ * dt_KBGEQ
            sums = _DecaySums.zeros(dt_KBGEQ)
            for tile in reversed(list(segment.tiles(B, G, E * J, max(P, N)))):
                x_zqP, B_zqN = (t[tile].to(dtype).flatten(0, 2) for t in (x_KBGQP, B_KBGQN))
                z, q, _ = x_zqP.shape
                row_kbgeq = decays.row_KBGEQ[tile]
                C_hrN = _scaled_queries(C_KBGEQJN[tile], row_kbgeq)
                C_zRN = C_hrN.view(z, -1, N)
                dy_kbgeqjP = dy_KBGEQJP[tile]
                dy_hrP = dt_BGEL.new_empty(dy_kbgeqjP.shape).copy_(dy_kbgeqjP).view(z * E, q * J, P)
                dy_zRP = dy_hrP.view(z, -1, P)

                W_zet1s = decays.matrix(tile)[:, :, :, None]
                M_zetjs = torch.bmm(C_zRN, B_zqN.mT).view(z, E, q, J, q).mul_(W_zet1s)
                dM_zRs = torch.bmm(dy_zRP, x_zqP.mT)
                dM_zetjs = dM_zRs.view(z, E, q, J, q)
                T_zetjs = dM_zetjs * M_zetjs
                sums.add_inside(T_zetjs.squeeze(3) if J == 1 else T_zetjs.sum(3), tile)
                if dD_BGEJ is not None:
                    _diagonal(M_zetjs).add_(_of_tile(D_GEJ, tile))
                    dD_BGEJ[tile[1:]] += _diagonal(dM_zetjs).sum(-1).view(-1, *dD_BGEJ[tile[1:]].shape).sum(0)
                dx_zqP = torch.bmm(M_zetjs.view(z, -1, q).mT, dy_zRP)
                dM_zetjs.mul_(W_zet1s)
                dC_hrN = torch.bmm(dM_zRs, B_zqN).view(z * E, q * J, N)
                dB_zqN = torch.bmm(dM_zRs.mT, C_zRN)

                # States that entered the chunks, and the gradients of those that left them.
                chunks, rows, groups = tile
                m = chunks.stop - chunks.start
                states_kbgEPN = entering.pop()
                dstates_kbgEPN = torch.empty_like(states_kbgEPN)
                dstates_kbgEPN[m] = running_BGEPN[rows, groups]
                has_state = segment.start > 0 or chunks.start > 0 or ctx.has_initial_state
                first = 0 if has_state else z // m * E
                if first < z * E:
                    states_hPN = states_kbgEPN[:m].view(z * E, P, N)[first:]
                    start_hq11 = decays.start_KBGEQ[tile].flatten(0, 3)[first:, :, None, None]
                    scaled_dy_hrP = (dy_hrP[first:].view(-1, q, J, P) * start_hq11).flatten(1, 2)
                    from_state_hrN = torch.bmm(scaled_dy_hrP, states_hPN)
                    start_sums_hr = (from_state_hrN * C_hrN[first:]).sum(-1)
                    sums.start_KBGEQ[tile].view(z * E, q)[first:] = start_sums_hr.unflatten(1, (q, J)).sum(-1)
                    dC_hrN[first:] += from_state_hrN
                    dentering_hPN = dstates_kbgEPN[:m].view(z * E, P, N)[first:]
                    torch.bmm(scaled_dy_hrP.mT, C_hrN[first:], out=dentering_hPN)
                for k in range(m - 1, -1 if has_state else 0, -1):
                    total_bgE11 = decays.total_KBGE[chunks.start + k, rows, groups, :, None, None]
                    dstates_kbgEPN[k].addcmul_(dstates_kbgEPN[k + 1], total_bgE11)
                if has_state:
                    running_BGEPN[rows, groups] = dstates_kbgEPN[0]
                dC_KBGEQJN[tile] = dC_hrN.view(dy_kbgeqjP.shape[:-1] + (N,)).mul_(row_kbgeq[..., None, None])

                dleaving_zrN = dstates_kbgEPN[1:].view(z, E * P, N)
                inflow_zqe1 = inflow_KBGEQ[tile].flatten(0, 2).mT.contiguous()[..., None]
                dweighted_zqeP = torch.bmm(B_zqN, dleaving_zrN.mT).view(z, q, E, P)
                x_zq1P = x_zqP[:, :, None]
                sums.inflow_KBGEQ[tile] = (dweighted_zqeP * x_zq1P).sum(-1).mT.reshape(row_kbgeq.shape)
                dx_zqP += dweighted_zqeP.mul_(inflow_zqe1).sum(2)
                dB_zqN.baddbmm_((x_zq1P * inflow_zqe1).view(z, q, E * P), dleaving_zrN)
                first_k = 0 if has_state else 1
                carried_kbgE = (dstates_kbgEPN[first_k + 1 :] * states_kbgEPN[first_k:m]).sum((-1, -2))
                total_kbgE = sums.total_KBGE[tile]
                total_kbgE[first_k:] = carried_kbgE * decays.total_KBGE[tile][first_k:]
                _store(dx_zqP, dx_KBGQP[tile])
                _store(dB_zqN, dB_KBGQN[tile])
            ddt_KBGEQ, dA_segment_GE = sums.gradients(dt_KBGEQ, A_GE, decays)
            segment.of(ddt_BGEL, 3).copy_(ddt_KBGEQ)
            dA_GE += dA_segment_GE
        dD_GEJ = None if dD_BGEJ is None else dD_BGEJ.sum(0)
        dstate_BGEPN = running_BGEPN if ctx.has_initial_state else None
        return dx_BGLP, ddt_BGEL, dA_GE.to(dtype), dB_BGLN, dC_BGELJN, dD_GEJ, dstate_BGEPN, None, None


def _of_tile(D_GEJ: Tensor, tile: tuple[slice, slice, slice]) -> Tensor:
    """D for each z of a tile, [z, e, j, 1]."""
    chunks, rows, groups = tile
    return D_GEJ[groups].repeat((chunks.stop - chunks.start) * (rows.stop - rows.start), 1, 1)[..., None]
