"""The chunked state-space scan on the CPU, with its backward written by hand.

The sequence is cut into chunks of Q positions. Inside a chunk the recurrence is a masked matrix product, between
chunks a state is carried (Dao and Gu 2024, arXiv 2405.21060, section 6). A chunk is worked on from start to end while
it is in the processor's cache; nothing of size Q x Q outlives it, and the backward computes it again.

Heads that share x and B are stacked on the rows of one matrix product instead of repeating x and B for them.

Letters: B batch, L length, G key-value groups (heads that share x and B), E decay heads of a group (each has its own
dt, A and state), J query heads of a decay head, so that there are G E J heads; P head dim, N state size, Q positions
of a chunk, K chunks. Inside a tile: z pairs of (batch row, group); q positions, seen as t (query) or s (key).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Floats of one Q x Q block of all heads of a tile. With its companions a tile should fit the L2 cache (measured:
# 14 heads and Q = 64 at once are best with 512 KiB), and be large enough to hide the cost of a call.
_TILE_FLOATS = 14 * 64 * 64


@dataclass(frozen=True)
class _Decays:
    """What the decay does inside the chunks. With l the running sum of dt A from the chunk's start, l = hi + lo.

    A difference of two running sums must keep its relative precision after strong decay too (at l = -5000 a float32
    step is 5e-4), so l is summed in float64 and split: hi_t - hi_s is exact enough, exp(lo) is a factor near 1.
    """

    hi_BGEKQ: Tensor  # l rounded to the compute type
    row_BGEKQ: Tensor  # exp(lo_t)
    column_BGEKQ: Tensor  # exp(-lo_s) dt_s
    start_BGEKQ: Tensor  # exp(hi_t); times row: the decay from the chunk's start
    end_BGEKQ: Tensor  # exp(l_end - l_s): the decay to the chunk's end
    total_BGEK: Tensor  # exp(l_end)

    @staticmethod
    def of(dt_BGEKQ: Tensor, A_GE: Tensor) -> _Decays:
        dtype = dt_BGEKQ.dtype
        l_BGEKQ = (dt_BGEKQ.double() * A_GE.double()[:, :, None, None]).cumsum(-1)
        hi_BGEKQ = l_BGEKQ.to(dtype)
        lo_BGEKQ = l_BGEKQ - hi_BGEKQ
        return _Decays(
            hi_BGEKQ=hi_BGEKQ,
            row_BGEKQ=lo_BGEKQ.exp().to(dtype),
            column_BGEKQ=((-lo_BGEKQ).exp() * dt_BGEKQ).to(dtype),
            start_BGEKQ=hi_BGEKQ.exp(),
            end_BGEKQ=(l_BGEKQ[..., -1:] - l_BGEKQ).exp().to(dtype),
            total_BGEK=l_BGEKQ[..., -1].exp().to(dtype),
        )


@dataclass(frozen=True)
class _Chunk:
    """One chunk of one tile: its place in the tensors, and its decay vectors."""

    rows: slice
    groups: slice
    k: int
    span: slice
    decays: _Decays

    @property
    def vectors(self) -> tuple[slice, slice, slice, int, slice]:
        return self.rows, self.groups, slice(None), self.k, slice(0, self.span.stop - self.span.start)

    def stacked(self, t_BGLX: Tensor, dtype: torch.dtype) -> Tensor:
        """[z, q, X] of x or B."""
        return t_BGLX[self.rows, self.groups, self.span].to(dtype).flatten(0, 1)

    def heads(self, t_BGELJX: Tensor) -> Tensor:
        return t_BGELJX[self.rows, self.groups, :, self.span]

    def inflow(self, dt_BGEKQ: Tensor) -> Tensor:
        """exp(l_end - l_s) dt_s, [z, e, q]."""
        return (self.decays.end_BGEKQ[self.vectors] * dt_BGEKQ[self.vectors]).flatten(0, 1)

    def total(self) -> Tensor:
        """exp(l_end), [z, e, 1, 1]."""
        return self.decays.total_BGEK[self.rows, self.groups, :, self.k].flatten(0, 1)[..., None, None]

    def decay_matrix(self, future_QQ: Tensor) -> Tensor:
        """exp(l_t - l_s - lo_t) dt_s where s <= t, else 0: [z, e, t, s]."""
        hi_zeq = self.decays.hi_BGEKQ[self.vectors].flatten(0, 1)
        q = hi_zeq.shape[-1]
        W_zets = hi_zeq[..., None] - hi_zeq[..., None, :]
        W_zets += future_QQ[:q, :q]
        return W_zets.exp_().mul_(self.decays.column_BGEKQ[self.vectors].flatten(0, 1)[:, :, None])


@dataclass(frozen=True)
class _Plan:
    """Sizes, and the order of work: tile by tile, each chunk by chunk."""

    B: int
    L: int
    G: int
    E: int
    J: int
    P: int
    N: int
    Q: int

    @staticmethod
    def of(x_BGLP: Tensor, B_BGLN: Tensor, C_BGELJN: Tensor, chunk_size: int) -> _Plan:
        B, G, E, L, J, N = C_BGELJN.shape
        return _Plan(B, L, G, E, J, x_BGLP.shape[-1], N, min(chunk_size, L))

    @property
    def K(self) -> int:
        return -(-self.L // self.Q)

    def chunked(self, dt_BGEL: Tensor) -> Tensor:
        """dt cut into chunks; the missing end of the last one is dt = 0, which leaves the state as it is."""
        padded_BGEL = torch.nn.functional.pad(dt_BGEL, (0, self.K * self.Q - self.L))
        return padded_BGEL.unflatten(-1, (self.K, self.Q))

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of (batch rows, groups) that are worked on together, sized for the cache."""
        pairs = max(1, _TILE_FLOATS // (self.Q * max(self.Q, self.P, self.N) * self.E * self.J))
        rows, groups = max(1, pairs // self.G), min(self.G, pairs)
        for b in range(0, self.B, rows):
            for g in range(0, self.G, groups):
                yield slice(b, min(b + rows, self.B)), slice(g, min(g + groups, self.G))

    def chunks(self, rows: slice, groups: slice, decays: _Decays) -> list[_Chunk]:
        starts = range(0, self.L, self.Q)
        return [
            _Chunk(rows, groups, k, slice(start, min(start + self.Q, self.L)), decays) for k, start in enumerate(starts)
        ]


def _scaled_queries(C_bgeqjN: Tensor, row_bgeq: Tensor) -> Tensor:
    """C exp(lo_t), contiguous [h, r, N] with h = z e and r = q j: one pass that also gathers the chunk's heads."""
    out_bgeqjN = row_bgeq.new_empty(C_bgeqjN.shape)
    torch.mul(C_bgeqjN, row_bgeq[..., None, None], out=out_bgeqjN)
    return out_bgeqjN.flatten(0, 2).flatten(1, 2)


def _diagonal(M_zetjs: Tensor) -> Tensor:
    """M[t, t] of every head, [z, e, j, q]. D x is added there: it costs nothing."""
    return M_zetjs.diagonal(dim1=2, dim2=4)


def _tile_rows(D_GEJ: Tensor, rows: slice, groups: slice) -> Tensor:
    """D for each z of a tile, [z, e, j, 1]."""
    return D_GEJ[groups].repeat(rows.stop - rows.start, 1, 1)[..., None]


def _future(Q: int, dtype: torch.dtype) -> Tensor:
    """-inf where s > t, else 0: [t, s]."""
    return torch.full((Q, Q), -torch.inf, dtype=dtype).triu_(1)


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
    @torch.autocast("cpu", enabled=False)
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
        plan = _Plan.of(x_BGLP, B_BGLN, C_BGELJN, chunk_size)
        B, L, G, E, J, P, N = plan.B, plan.L, plan.G, plan.E, plan.J, plan.P, plan.N
        dtype = dt_BGEL.dtype
        dt_BGEKQ = plan.chunked(dt_BGEL)
        decays = _Decays.of(dt_BGEKQ, A_GE)
        future_QQ = _future(plan.Q, dtype)
        y_BGELJP = x_BGLP.new_empty(B, L, G, E, J, P).permute(0, 2, 3, 1, 4, 5)
        final_BGEPN = dt_BGEL.new_empty(B, G, E, P, N) if want_state else None
        # The state that enters each chunk, for the backward.
        states_KBGEPN = dt_BGEL.new_empty(plan.K if any(ctx.needs_input_grad) else 0, B, G, E, P, N)
        for rows, groups in plan.tiles():
            state_zePN = None if state_BGEPN is None else state_BGEPN[rows, groups].to(dtype).flatten(0, 1)
            for chunk in plan.chunks(rows, groups, decays):
                x_zqP, B_zqN = chunk.stacked(x_BGLP, dtype), chunk.stacked(B_BGLN, dtype)
                z, q, _ = x_zqP.shape
                C_hrN = _scaled_queries(chunk.heads(C_BGELJN), decays.row_BGEKQ[chunk.vectors])
                M_zRs = torch.bmm(C_hrN.view(z, -1, N), B_zqN.mT)
                M_zetjs = M_zRs.view(z, E, q, J, q).mul_(chunk.decay_matrix(future_QQ)[:, :, :, None])
                if D_GEJ is not None:
                    _diagonal(M_zetjs).add_(_tile_rows(D_GEJ, rows, groups))
                y_hqjP = torch.bmm(M_zRs, x_zqP).view(z * E, q, J, P)
                if state_zePN is not None:
                    start_hq = decays.start_BGEKQ[chunk.vectors].flatten(0, 2)
                    from_state_hrP = torch.bmm(C_hrN, state_zePN.flatten(0, 1).mT)
                    y_hqjP.addcmul_(from_state_hrP.view(z * E, q, J, P), start_hq[..., None, None])
                    if len(states_KBGEPN):
                        _store(state_zePN, states_KBGEPN[chunk.k, rows, groups])
                _store(y_hqjP, chunk.heads(y_BGELJP))
                if want_state or chunk.k + 1 < plan.K:
                    inflow_zqe = chunk.inflow(dt_BGEKQ).mT
                    weighted_zqr = (x_zqP[:, :, None] * inflow_zqe[..., None]).flatten(2)
                    leaving_zePN = torch.bmm(weighted_zqr.mT, B_zqN).view(z, E, P, N)
                    if state_zePN is not None:
                        leaving_zePN.addcmul_(state_zePN, chunk.total())
                    state_zePN = leaving_zePN
            if final_BGEPN is not None:
                _store(state_zePN, final_BGEPN[rows, groups])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_BGLP, dt_BGEL, A_GE, B_BGLN, C_BGELJN, D_GEJ, states_KBGEPN)
        ctx.chunk_size, ctx.has_initial_state = chunk_size, state_BGEPN is not None
        return y_BGELJP, final_BGEPN

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, dy_BGELJP: Tensor | None, dfinal_BGEPN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BGLP, dt_BGEL, A_GE, B_BGLN, C_BGELJN, D_GEJ, states_KBGEPN = ctx.saved_tensors
        plan = _Plan.of(x_BGLP, B_BGLN, C_BGELJN, ctx.chunk_size)
        B, L, G, E, J, P, N = plan.B, plan.L, plan.G, plan.E, plan.J, plan.P, plan.N
        dtype = dt_BGEL.dtype
        dt_BGEKQ = plan.chunked(dt_BGEL)
        decays = _Decays.of(dt_BGEKQ, A_GE)
        future_QQ = _future(plan.Q, dtype)
        before_QQ = torch.ones(plan.Q, plan.Q, dtype=dtype).triu_(1)
        if dy_BGELJP is None:
            dy_BGELJP = dt_BGEL.new_zeros(()).expand(B, G, E, L, J, P)
        dx_BGLP = x_BGLP.new_empty(B, L, G, P).transpose(1, 2)
        dB_BGLN = B_BGLN.new_empty(B, L, G, N).transpose(1, 2)
        dC_BGELJN = C_BGELJN.new_empty(B, L, G, E, J, N).permute(0, 2, 3, 1, 4, 5)
        dD_BGEJ = None if D_GEJ is None else D_GEJ.new_zeros(B, G, E, J)
        dstate_BGEPN = dt_BGEL.new_empty(B, G, E, P, N) if ctx.has_initial_state else None
        sums = _DecaySums.zeros(dt_BGEKQ)
        for rows, groups in plan.tiles():
            # The gradient of the state that leaves the chunk; None is zero.
            dstate_zePN = None if dfinal_BGEPN is None else dfinal_BGEPN[rows, groups].to(dtype).flatten(0, 1)
            for chunk in reversed(plan.chunks(rows, groups, decays)):
                x_zqP, B_zqN = chunk.stacked(x_BGLP, dtype), chunk.stacked(B_BGLN, dtype)
                z, q, _ = x_zqP.shape
                row_bgeq = decays.row_BGEKQ[chunk.vectors]
                C_hrN = _scaled_queries(chunk.heads(C_BGELJN), row_bgeq)
                C_zRN = C_hrN.view(z, -1, N)
                dy_bgeqjP = chunk.heads(dy_BGELJP)
                dy_hrP = dt_BGEL.new_empty(dy_bgeqjP.shape).copy_(dy_bgeqjP).view(z * E, q * J, P)
                dy_zRP = dy_hrP.view(z, -1, P)

                W_zet1s = chunk.decay_matrix(future_QQ)[:, :, :, None]
                M_zetjs = torch.bmm(C_zRN, B_zqN.mT).view(z, E, q, J, q).mul_(W_zet1s)
                dM_zRs = torch.bmm(dy_zRP, x_zqP.mT)
                dM_zetjs = dM_zRs.view(z, E, q, J, q)
                sums.add_chunk((dM_zetjs * M_zetjs).sum(3), chunk, before_QQ, future_QQ)
                if D_GEJ is not None:
                    _diagonal(M_zetjs).add_(_tile_rows(D_GEJ, rows, groups))
                    dD_BGEJ[rows, groups] += _diagonal(dM_zetjs).sum(-1).view(dD_BGEJ[rows, groups].shape)
                dx_zqP = torch.bmm(M_zetjs.view(z, -1, q).mT, dy_zRP)
                dM_zetjs.mul_(W_zet1s)
                dC_hqjN = torch.bmm(dM_zRs, B_zqN).view(z * E, q, J, N)
                dB_zqN = torch.bmm(dM_zRs.mT, C_zRN)

                state_zePN = None
                if chunk.k or ctx.has_initial_state:
                    state_zePN = states_KBGEPN[chunk.k, rows, groups].flatten(0, 1)
                    start_hq11 = decays.start_BGEKQ[chunk.vectors].flatten(0, 2)[..., None, None]
                    from_state_hqjN = torch.bmm(dy_hrP, state_zePN.flatten(0, 1)).view(z * E, q, J, N).mul_(start_hq11)
                    C_hqjN = C_hrN.view(z * E, q, J, N)
                    _store((from_state_hqjN * C_hqjN).sum((2, 3)), sums.start_BGEKQ[chunk.vectors])
                    dC_hqjN += from_state_hqjN
                    scaled_hrN = C_hqjN.mul_(start_hq11).flatten(1, 2)
                    dentering_zePN = torch.bmm(dy_hrP.mT, scaled_hrN).view(z, E, P, N)
                dC_bgeqjN = dC_hqjN.view(chunk.heads(dC_BGELJN).shape)
                torch.mul(dC_bgeqjN, row_bgeq[..., None, None], out=chunk.heads(dC_BGELJN)) if dtype == dC_BGELJN.dtype else _store(dC_bgeqjN.mul_(row_bgeq[..., None, None]), chunk.heads(dC_BGELJN))

                if dstate_zePN is not None:
                    dstate_zrN = dstate_zePN.flatten(1, 2)
                    inflow_zqe1 = chunk.inflow(dt_BGEKQ).mT[..., None]
                    dweighted_zqeP = torch.bmm(B_zqN, dstate_zrN.mT).view(z, q, E, P)
                    dinflow_zqe = (dweighted_zqeP * x_zqP[:, :, None]).sum(-1)
                    place = sums.inflow_BGEKQ[chunk.vectors]
                    place.copy_(dinflow_zqe.mT.reshape(place.shape))
                    dx_zqP += dweighted_zqeP.mul_(inflow_zqe1).sum(2)
                    dB_zqN.baddbmm_((x_zqP[:, :, None] * inflow_zqe1).flatten(2), dstate_zrN)
                    if state_zePN is not None:
                        carried_zePN = dstate_zePN * chunk.total()
                        _store((carried_zePN * state_zePN).sum((2, 3)), sums.total_BGEK[rows, groups, :, chunk.k])
                        dentering_zePN += carried_zePN
                _store(dx_zqP, dx_BGLP[rows, groups, chunk.span])
                _store(dB_zqN, dB_BGLN[rows, groups, chunk.span])
                dstate_zePN = None if state_zePN is None else dentering_zePN
            if dstate_BGEPN is not None:
                _store(dstate_zePN, dstate_BGEPN[rows, groups])
        ddt_BGEL, dA_GE = sums.gradients(dt_BGEKQ, A_GE, decays)
        dD_GEJ = None if dD_BGEJ is None else dD_BGEJ.sum(0)
        return dx_BGLP, ddt_BGEL[..., :L], dA_GE, dB_BGLN, dC_BGELJN, dD_GEJ, dstate_BGEPN, None, None


@dataclass(frozen=True)
class _DecaySums:
    """What the chunks leave for the gradients of dt and A.

    a_i = dt_i A enters every decay that spans step i. The spanning terms are summed as such, never as a difference of
    two larger sums: after strong decay the gradient is tiny beside the terms that do not decay.
    """

    direct_BGEKQ: Tensor  # sum over t >= s of T_ts, with T = dM o M: dt_s times its gradient outside the decay
    inside_BGEKQ: Tensor  # sum over t >= i > s of T_ts
    start_BGEKQ: Tensor  # exp(l_t) times its gradient (the state that entered)
    inflow_BGEKQ: Tensor  # gradient of exp(l_end - l_s) dt_s (the state that leaves)
    total_BGEK: Tensor  # exp(l_end) times its gradient (from state to state)

    @staticmethod
    def zeros(dt_BGEKQ: Tensor) -> _DecaySums:
        return _DecaySums(*(torch.zeros_like(dt_BGEKQ) for _ in range(4)), dt_BGEKQ.new_zeros(dt_BGEKQ.shape[:-1]))

    def add_chunk(self, T_zets: Tensor, chunk: _Chunk, before_QQ: Tensor, future_QQ: Tensor) -> None:
        q = T_zets.shape[-1]
        _store(T_zets.sum(2), self.direct_BGEKQ[chunk.vectors])
        earlier_zeti = torch.matmul(T_zets, before_QQ[:q, :q])  # sum over s < i
        earlier_zeti.masked_fill_(future_QQ[:q, :q] < 0, 0)
        _store(earlier_zeti.sum(2), self.inside_BGEKQ[chunk.vectors])

    def gradients(self, dt_BGEKQ: Tensor, A_GE: Tensor, decays: _Decays) -> tuple[Tensor, Tensor]:
        """Gradients of dt [B, G, E, K Q] and of A."""
        spans_start_BGEKQ = self.start_BGEKQ.double().flip(-1).cumsum(-1).flip(-1)
        spans_end_BGEKQ = (self.inflow_BGEKQ * decays.end_BGEKQ * dt_BGEKQ).double().cumsum(-1).roll(1, -1)
        spans_end_BGEKQ[..., 0] = 0
        da_BGEKQ = self.inside_BGEKQ + spans_start_BGEKQ + spans_end_BGEKQ + self.total_BGEK[..., None]
        # Where dt is 0 (padding, or underflow of the softplus) the derivative of the softplus is 0 as well.
        direct_BGEKQ = self.direct_BGEKQ / dt_BGEKQ.clamp_min(torch.finfo(dt_BGEKQ.dtype).tiny)
        ddt_BGEKQ = da_BGEKQ * A_GE.double()[:, :, None, None] + direct_BGEKQ + self.inflow_BGEKQ * decays.end_BGEKQ
        dA_GE = (da_BGEKQ * dt_BGEKQ).sum((0, 3, 4))
        return ddt_BGEKQ.to(dt_BGEKQ.dtype).flatten(3), dA_GE.to(dt_BGEKQ.dtype)
