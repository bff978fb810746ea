"""The chunked state-space scan on the CPU, with its backward written by hand.

The sequence is cut into chunks of Q positions. Inside a chunk the recurrence is a masked matrix product, between
chunks a state is carried (Dao and Gu 2024, arXiv 2405.21060, section 6). Everything a chunk needs stays in the
processor's cache; nothing of size Q x Q outlives its chunk, and the backward computes it again.

Letters: B batch, L length, G key-value groups (heads that share x and B), E decay heads of a group (each has its own
dt, A and state), J query heads of a decay head, so that H = G E J; P head dim, N state size, Q chunk, K chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Floats of one Q x Q x heads block that are worked on at once: with its companions it should fit the L2 cache.
_TILE_FLOATS = 64 * 64 * 16


@dataclass(frozen=True)
class _ChunkDecays:
    """What the decay does inside the chunks. With l the running sum of dt A inside a chunk, l = hi + lo.

    A difference of two running sums must keep its relative precision also after strong decay (l = -5000 has a float32
    step of 5e-4), so l is summed in float64 and split: hi_t - hi_s is then exact enough, exp(lo) is a factor near 1.
    """

    hi_BGKEQ: Tensor  # l rounded to the compute type
    row_BGKEQ: Tensor  # exp(lo_t)
    column_BGKEQ: Tensor  # exp(-lo_s) dt_s
    from_start_BGKEQ: Tensor  # exp(hi_t): decay of the entering state; times row it is exp(l_t)
    to_end_BGKEQ: Tensor  # exp(l_Q - l_s)
    total_BGKE: Tensor  # exp(l_Q)

    @staticmethod
    def of(dt_BGEK_Q: Tensor, A_GE: Tensor, dtype: torch.dtype) -> _ChunkDecays:
        dt_BGKEQ = dt_BGEK_Q.transpose(2, 3).double()
        l_BGKEQ = (dt_BGKEQ * A_GE.double()[None, :, None, :, None]).cumsum(-1)
        hi_BGKEQ = l_BGKEQ.to(dtype)
        lo_BGKEQ = l_BGKEQ - hi_BGKEQ
        return _ChunkDecays(
            hi_BGKEQ=hi_BGKEQ,
            row_BGKEQ=lo_BGKEQ.exp().to(dtype),
            column_BGKEQ=((-lo_BGKEQ).exp() * dt_BGKEQ).to(dtype),
            from_start_BGKEQ=hi_BGKEQ.exp(),
            to_end_BGKEQ=(l_BGKEQ[..., -1:] - l_BGKEQ).exp().to(dtype),
            total_BGKE=l_BGKEQ[..., -1].exp().to(dtype),
        )


@dataclass(frozen=True)
class _Sizes:
    B: int
    L: int
    G: int
    E: int
    J: int
    P: int
    N: int
    Q: int

    @property
    def K(self) -> int:
        return -(-self.L // self.Q)

    def tiles(self) -> list[tuple[slice, slice]]:
        """Blocks of (batch rows, groups) that are worked on together, sized for the cache."""
        groups = max(1, _TILE_FLOATS // (self.Q * max(self.Q, self.P, self.N) * self.E * self.J))
        if groups >= self.G:
            rows = min(self.B, groups // self.G)
            return [(slice(b, min(b + rows, self.B)), slice(0, self.G)) for b in range(0, self.B, rows)]
        return [
            (slice(b, b + 1), slice(g, min(g + groups, self.G)))
            for b in range(self.B)
            for g in range(0, self.G, groups)
        ]

    def span(self, k: int) -> slice:
        return slice(k * self.Q, min((k + 1) * self.Q, self.L))


def _sizes(x_BGLP: Tensor, dt_BGEL: Tensor, B_BGLN: Tensor, C_BGLRN: Tensor, chunk_size: int) -> _Sizes:
    B, G, L, P = x_BGLP.shape
    E = dt_BGEL.shape[2]
    return _Sizes(B, L, G, E, C_BGLRN.shape[3] // E, P, B_BGLN.shape[-1], min(chunk_size, L))


def _chunked_dt(dt_BGEL: Tensor, sizes: _Sizes) -> Tensor:
    """dt cut into chunks; the missing end of the last one is dt = 0, which leaves the state as it is."""
    padded_BGEL = torch.nn.functional.pad(dt_BGEL, (0, sizes.K * sizes.Q - sizes.L))
    return padded_BGEL.unflatten(-1, (sizes.K, sizes.Q))


class _Tile:
    """One block of (batch rows, groups), z of them in all, and the operands of one of its chunks."""

    def __init__(self, sizes: _Sizes, rows: slice, groups: slice, decays: _ChunkDecays, dtype: torch.dtype) -> None:
        self.sizes, self.rows, self.groups, self.decays, self.dtype = sizes, rows, groups, decays, dtype
        self.z = (rows.stop - rows.start) * (groups.stop - groups.start)
        self.future_QQ = torch.full((sizes.Q, sizes.Q), -torch.inf, dtype=dtype).triu_(1)

    def positions(self, t_BGL: Tensor, span: slice) -> Tensor:
        """[z, q, ...] in the compute type, contiguous where the tensor is cut on its batch, group and length axes."""
        return t_BGL[self.rows, self.groups, span].to(self.dtype).flatten(0, 1)

    def vector(self, t_BGKEQ: Tensor, k: int, q: int) -> Tensor:
        """[z, e, q] of one of the decay vectors."""
        return t_BGKEQ[self.rows, self.groups, k, :, :q].flatten(0, 1)

    def queries(self, C_BGLRN: Tensor, k: int, span: slice) -> tuple[Tensor, Tensor]:
        """C times exp(lo_t), [z, q, e, j, N], and that factor."""
        q = span.stop - span.start
        row_zqe11 = self.vector(self.decays.row_BGKEQ, k, q).transpose(1, 2)[..., None, None]
        C_zqejN = C_BGLRN[self.rows, self.groups, span].flatten(0, 1).unflatten(2, (self.sizes.E, self.sizes.J))
        return torch.mul(C_zqejN, row_zqe11, out=row_zqe11.new_empty(C_zqejN.shape)), row_zqe11

    def decay_matrix(self, k: int, q: int) -> Tensor:
        """exp(l_t - l_s - lo_t) dt_s where s <= t, else 0: [z, t, e, s]."""
        hi_zeq = self.vector(self.decays.hi_BGKEQ, k, q)
        W_ztes = hi_zeq.transpose(1, 2)[..., None] - hi_zeq[:, None]
        W_ztes += self.future_QQ[:q, None, :q]
        return W_ztes.exp_().mul_(self.vector(self.decays.column_BGKEQ, k, q)[:, None])


def _add_skip(M_ztrs: Tensor, D_zr: Tensor) -> None:
    """Put D x on the diagonal of the chunk's matrix: it costs nothing there."""
    M_ztrs.diagonal(dim1=1, dim2=3).add_(D_zr[..., None])


class ChunkedScan(torch.autograd.Function):
    """y, final state = scan(x_BGLP, dt_BGEL, A_GE, B_BGLN, C_BGLRN, D_GR, state_BGNEP, chunk_size); R = E J.

    dt is after softplus and mask; dt, A, D and the state are in the compute type (float32, or float64 for a float64
    x), x, B and C may be narrower. y has the type of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BGLP: Tensor,
        dt_BGEL: Tensor,
        A_GE: Tensor,
        B_BGLN: Tensor,
        C_BGLRN: Tensor,
        D_GR: Tensor | None,
        state_BGNEP: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        s = _sizes(x_BGLP, dt_BGEL, B_BGLN, C_BGLRN, chunk_size)
        dtype = dt_BGEL.dtype
        decays = _ChunkDecays.of(_chunked_dt(dt_BGEL, s), A_GE, dtype)
        weight_BGKEQ = decays.to_end_BGKEQ * _chunked_dt(dt_BGEL, s).transpose(2, 3)
        y_BGLRP = x_BGLP.new_empty(s.B, s.G, s.L, s.E * s.J, s.P)
        keep = any(ctx.needs_input_grad)
        # The state that enters each chunk; the last entry is the final state.
        states_KBGNEP = state_BGNEP.new_empty(s.K if keep else 0, *state_BGNEP.shape)
        final_BGNEP = torch.empty_like(state_BGNEP)
        for rows, groups in s.tiles():
            tile = _Tile(s, rows, groups, decays, dtype)
            state_zNep = state_BGNEP[rows, groups].flatten(0, 1).clone()
            for k in range(s.K):
                if keep:
                    states_KBGNEP[k, rows, groups] = state_zNep.view(states_KBGNEP[k, rows, groups].shape)
                span = s.span(k)
                q = span.stop - span.start
                x_zqP, B_zqN = tile.positions(x_BGLP, span), tile.positions(B_BGLN, span)
                C_zqejN, _ = tile.queries(C_BGLRN, k, span)
                M_zrs = torch.bmm(C_zqejN.view(tile.z, -1, s.N), B_zqN.transpose(1, 2))
                M_ztejs = M_zrs.view(tile.z, q, s.E, s.J, q).mul_(tile.decay_matrix(k, q)[:, :, :, None])
                if D_GR is not None:
                    _add_skip(M_ztejs.flatten(2, 3), _per_tile(D_GR, tile))
                y_zqejP = torch.bmm(M_zrs, x_zqP).view(tile.z, q, s.E, s.J, s.P)
                from_state_zqejP = _through_state(C_zqejN, state_zNep)
                start_zqe11 = tile.vector(decays.from_start_BGKEQ, k, q).transpose(1, 2)[..., None, None]
                y_zqejP.addcmul_(from_state_zqejP, start_zqe11)
                y_BGLRP[rows, groups, span] = y_zqejP.view(y_BGLRP[rows, groups, span].shape)
                weighted_zqeP = x_zqP[:, :, None] * tile.vector(weight_BGKEQ, k, q).transpose(1, 2)[..., None]
                state_zNep.mul_(decays.total_BGKE[rows, groups, k].flatten(0, 1)[:, None, :, None])
                state_zNep.flatten(2).baddbmm_(B_zqN.transpose(1, 2), weighted_zqeP.flatten(2))
            final_BGNEP[rows, groups] = state_zNep.view(final_BGNEP[rows, groups].shape)
        if keep:
            ctx.save_for_backward(x_BGLP, dt_BGEL, A_GE, B_BGLN, C_BGLRN, D_GR, states_KBGNEP)
            ctx.chunk_size = chunk_size
        return y_BGLRP, final_BGNEP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BGLRP: Tensor, dfinal_BGNEP: Tensor) -> tuple[Tensor | None, ...]:
        x_BGLP, dt_BGEL, A_GE, B_BGLN, C_BGLRN, D_GR, states_KBGNEP = ctx.saved_tensors
        s = _sizes(x_BGLP, dt_BGEL, B_BGLN, C_BGLRN, ctx.chunk_size)
        dtype = dt_BGEL.dtype
        dt_BGKEQ = _chunked_dt(dt_BGEL, s).transpose(2, 3)
        decays = _ChunkDecays.of(_chunked_dt(dt_BGEL, s), A_GE, dtype)
        weight_BGKEQ = decays.to_end_BGKEQ * dt_BGKEQ
        dx_BGLP = x_BGLP.new_empty(x_BGLP.shape)
        dB_BGLN = B_BGLN.new_empty(B_BGLN.shape)
        dC_BGLRN = C_BGLRN.new_empty(C_BGLRN.shape)
        dD_BGR = None if D_GR is None else D_GR.new_zeros(s.B, *D_GR.shape)
        dstate_BGNEP = torch.empty_like(dfinal_BGNEP)
        # Sums over t and s inside a chunk, turned into the gradients of dt and A at the end.
        column_BGKEQ = torch.zeros_like(dt_BGKEQ)  # sum over t >= s of (dM o M), to be divided by dt
        weight_grad_BGKEQ = torch.zeros_like(dt_BGKEQ)  # gradient of exp(l_Q - l_s) dt_s
        from_start_BGKEQ = torch.zeros_like(dt_BGKEQ)  # exp(l_t) times its gradient
        inside_BGKEQ = torch.zeros_like(dt_BGKEQ)  # sum over t >= i > s of (dM o M)_ts
        carried_BGKE = dt_BGKEQ.new_zeros(dt_BGKEQ.shape[:-1])  # exp(l_Q) times its gradient
        before_QQ = torch.ones(s.Q, s.Q, dtype=dtype).triu_(1)
        for rows, groups in s.tiles():
            tile = _Tile(s, rows, groups, decays, dtype)
            dstate_zNep = dfinal_BGNEP[rows, groups].flatten(0, 1).clone()
            for k in reversed(range(s.K)):
                span = s.span(k)
                q = span.stop - span.start
                here = (rows, groups, k, slice(None), slice(0, q))
                shape_BGEq = column_BGKEQ[here].shape
                state_zNep = states_KBGNEP[k, rows, groups].flatten(0, 1)
                x_zqP, B_zqN = tile.positions(x_BGLP, span), tile.positions(B_BGLN, span)
                C_zqejN, row_zqe11 = tile.queries(C_BGLRN, k, span)
                dy_zrP = tile.positions(dy_BGLRP, span).reshape(tile.z, -1, s.P)
                C_zrN = C_zqejN.view(tile.z, -1, s.N)

                W_zte1s = tile.decay_matrix(k, q)[:, :, :, None]
                M_ztejs = torch.bmm(C_zrN, B_zqN.transpose(1, 2)).view(tile.z, q, s.E, s.J, q).mul_(W_zte1s)
                dM_zrs = torch.bmm(dy_zrP, x_zqP.transpose(1, 2))
                dM_ztejs = dM_zrs.view(tile.z, q, s.E, s.J, q)

                # The decay's share: T = dM o M. Its diagonal has no decay in it and is left out before summing.
                T_ztes = (dM_ztejs * M_ztejs).sum(3)
                column_BGKEQ[here] = T_ztes.sum(1).view(shape_BGEq)
                earlier_ztei = torch.matmul(T_ztes, before_QQ[:q, :q])  # sum over s < i
                earlier_ztei.masked_fill_(tile.future_QQ[:q, None, :q] < 0, 0)
                inside_BGKEQ[here] = earlier_ztei.sum(1).view(shape_BGEq)

                if D_GR is not None:
                    _add_skip(M_ztejs.flatten(2, 3), _per_tile(D_GR, tile))
                    dD_zr = dM_ztejs.flatten(2, 3).diagonal(dim1=1, dim2=3).sum(-1)
                    dD_BGR[rows, groups] += dD_zr.view(dD_BGR[rows, groups].shape)
                dx_zqP = torch.bmm(M_ztejs.view(tile.z, -1, q).transpose(1, 2), dy_zrP)
                dM_ztejs.mul_(W_zte1s)
                dC_zqejN = torch.bmm(dM_zrs, B_zqN).view(tile.z, q, s.E, s.J, s.N)
                dB_zqN = torch.bmm(dM_zrs.transpose(1, 2), C_zrN)

                # The state that entered the chunk.
                dy_zqejP = dy_zrP.view(tile.z, q, s.E, s.J, s.P)
                start_zqe11 = tile.vector(decays.from_start_BGKEQ, k, q).transpose(1, 2)[..., None, None]
                from_state_zqejN = _through_state(dy_zqejP, state_zNep.transpose(1, 3)).mul_(start_zqe11)
                start_grad_zqe = (from_state_zqejN * C_zqejN).sum((3, 4))
                from_start_BGKEQ[here] = start_grad_zqe.transpose(1, 2).reshape(shape_BGEq)
                dC_zqejN.add_(from_state_zqejN).mul_(row_zqe11)

                # The state that left it.
                weight_zqe1 = tile.vector(weight_BGKEQ, k, q).transpose(1, 2)[..., None]
                dxw_zqeP = torch.bmm(B_zqN, dstate_zNep.flatten(2)).view(tile.z, q, s.E, s.P)
                weight_grad_zqe = (dxw_zqeP * x_zqP[:, :, None]).sum(-1)
                weight_grad_BGKEQ[here] = weight_grad_zqe.transpose(1, 2).reshape(shape_BGEq)
                dx_zqP += dxw_zqeP.mul_(weight_zqe1).sum(2)
                weighted_zqeP = x_zqP[:, :, None] * weight_zqe1
                dB_zqN.baddbmm_(weighted_zqeP.flatten(2), dstate_zNep.flatten(2).transpose(1, 2))
                dstate_zNep.mul_(decays.total_BGKE[rows, groups, k].flatten(0, 1)[:, None, :, None])
                carried_BGKE[rows, groups, k] = (
                    (dstate_zNep * state_zNep).sum((1, 3)).view(carried_BGKE[rows, groups, k].shape)
                )
                dstate_zNep += _into_state(C_zqejN * start_zqe11, dy_zqejP)

                dx_BGLP[rows, groups, span] = dx_zqP.view(dx_BGLP[rows, groups, span].shape)
                dB_BGLN[rows, groups, span] = dB_zqN.view(dB_BGLN[rows, groups, span].shape)
                dC_BGLRN[rows, groups, span] = dC_zqejN.view(dC_BGLRN[rows, groups, span].shape)
            dstate_BGNEP[rows, groups] = dstate_zNep.view(dstate_BGNEP[rows, groups].shape)

        # l_i enters every decay that spans step i; no two terms of opposite sign are ever added.
        spans_end_BGKEQ = (weight_BGKEQ * weight_grad_BGKEQ).double().cumsum(-1).roll(1, -1)
        spans_end_BGKEQ[..., 0] = 0
        spans_start_BGKEQ = from_start_BGKEQ.double().flip(-1).cumsum(-1).flip(-1)
        da_BGKEQ = inside_BGKEQ.double() + spans_start_BGKEQ + spans_end_BGKEQ + carried_BGKE.double()[..., None]
        # Where dt is 0 (padding, or softplus underflow) the derivative of softplus is 0 as well.
        direct_BGKEQ = column_BGKEQ / dt_BGKEQ.clamp_min(torch.finfo(dtype).tiny)
        ddt_BGKEQ = da_BGKEQ * A_GE.double()[None, :, None, :, None] + direct_BGKEQ
        ddt_BGKEQ += weight_grad_BGKEQ * decays.to_end_BGKEQ
        ddt_BGEL = ddt_BGKEQ.to(dtype).transpose(2, 3).flatten(3)[..., : s.L]
        dA_GE = (da_BGKEQ * dt_BGKEQ).sum((0, 2, 4)).to(dtype)
        dD_GR = None if dD_BGR is None else dD_BGR.sum(0)
        return dx_BGLP, ddt_BGEL, dA_GE, dB_BGLN, dC_BGLRN, dD_GR, dstate_BGNEP, None


def _per_tile(D_GR: Tensor, tile: _Tile) -> Tensor:
    return D_GR[tile.groups].repeat(tile.rows.stop - tile.rows.start, 1)


def _through_state(rows_zqejI: Tensor, state_zIeO: Tensor) -> Tensor:
    """rows @ state for every decay head: [z, q, e, j, O]."""
    z, q, e, j, size_in = rows_zqejI.shape
    if e == 1:
        out_zrO = torch.bmm(rows_zqejI.view(z, q * j, size_in), state_zIeO[:, :, 0])
        return out_zrO.view(z, q, e, j, -1)
    left_zerI = rows_zqejI.transpose(1, 2).reshape(z * e, q * j, size_in)
    out_zerO = torch.bmm(left_zerI, state_zIeO.transpose(1, 2).reshape(z * e, size_in, -1))
    return out_zerO.view(z, e, q, j, -1).transpose(1, 2)


def _into_state(left_zqejN: Tensor, right_zqejP: Tensor) -> Tensor:
    """Sum over q and j of the outer products: [z, N, e, P]."""
    z, q, e, j, N = left_zqejN.shape
    left_zeNr = left_zqejN.transpose(1, 2).reshape(z * e, q * j, N).transpose(1, 2)
    right_zerP = right_zqejP.transpose(1, 2).reshape(z * e, q * j, -1)
    return torch.bmm(left_zeNr, right_zerP).view(z, e, N, -1).transpose(1, 2)
