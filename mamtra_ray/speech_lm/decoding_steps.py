"""A decoding step in two ways: with a cache that grows, or with one of static shapes that a CUDA graph replays.

At small batches a step on a GPU is hundreds of short kernels, which the host must launch one by one. A captured graph
is one launch. ``torch.cuda.CUDAGraph`` and not ``torch.compile(mode="reduce-overhead")``: it replays the very kernels
of the eager step, mamba-ssm's among them, so the numbers stay the same; it needs no compiler; and a batch of another
size or a longer buffer costs one more pass through the layers, not a compilation. On a CPU there is nothing to launch,
and attention would look at columns that hold nothing yet: there the cache grows (``benchmarks/static_decoding.py``).

Tensor letters: B rows still running, R rows of the static batch, T positions so far, D model width,
S speech vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mamtra_ray.errors import InputError
from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.static_cache import StaticCache
from mamtra_ray.speech_lm.speech_lm import SpeechLM


@dataclass
class Prefilled:
    """A batch whose prompts have been read: what decoding goes on from (and uses up).

    Attributes:
        cache: keys, values and states of all layers.
        mask_BT: true for real positions of left-padded prompts; None if none is padded.
        logits_BS: scores of each row's first new token.
    """

    cache: DecoderCache | StaticCache
    mask_BT: Tensor | None
    logits_BS: Tensor


class Steps(Protocol):
    """A batch that is being decoded."""

    def logits(self) -> Tensor:
        """Scores of the running rows' next token, (B, S); the caller may change them."""

    def keep(self, kept_B: Tensor) -> None:
        """Drop running rows that have ended; at least one of their indices is kept."""

    def step(self, ids_B: Tensor) -> None:
        """Read one unified id of every running row."""


def decoding_steps(model: SpeechLM, start: Prefilled, longest: int, static: bool | None = None) -> Steps:
    """Go on from ``start``.

    Args:
        model: what made ``start``.
        start: its ``cache`` stays the one that the steps write.
        longest: tokens that may be drawn.
        static: whether shapes are static, and steps a graph where the model is on a GPU; None: on a GPU, for a model
            that can.

    Raises:
        InputError: ``static`` is asked for, but angles depend on the length of a sequence this long.
    """
    end = start.cache.length + longest
    can = not (model.body.rope.depends_on_length and end > model.body.rope.max_position_embeddings)
    if static and not can:
        raise InputError(
            f"RoPE of type 'dynamic' turns every position anew beyond {model.body.rope.max_position_embeddings}"
            f" positions, and decoding ends at {end}: there is no static cache for that"
        )
    if static is None:
        static = can and model.device.type == "cuda"
    return StaticSteps(model, start) if static else GrowingSteps(model, start)


class GrowingSteps:
    """Every tensor is as large as it must be: rows that have ended leave the batch at once."""

    def __init__(self, model: SpeechLM, start: Prefilled) -> None:
        self.model, self.start = model, start

    def logits(self) -> Tensor:
        return self.start.logits_BS

    def keep(self, kept_B: Tensor) -> None:
        start = self.start
        start.cache.keep_rows(kept_B)
        start.logits_BS = start.logits_BS[kept_B]
        start.mask_BT = None if start.mask_BT is None else start.mask_BT[kept_B]

    def step(self, ids_B: Tensor) -> None:
        start = self.start
        if start.mask_BT is not None:
            start.mask_BT = torch.cat([start.mask_BT, start.mask_BT.new_ones(len(ids_B), 1)], 1)
        hidden_B1D = self.model.hidden_states(
            inputs_embeds_BLD=self.model.embed(ids_B[:, None]),
            attention_mask_BL=start.mask_BT,
            past_key_values=start.cache,
        )
        start.logits_BS = self.model.logits(hidden_B1D[:, 0])


class StaticSteps:
    """The same kernels on the same addresses at every step.

    A row that has ended stays in the batch and reads its last token again and again, until half of the rows have ended:
    then the others move into a batch of their own.
    """

    def __init__(self, model: SpeechLM, start: Prefilled) -> None:
        assert isinstance(start.cache, DecoderCache)
        rows = len(start.logits_BS)
        self.model, self.start = model, start
        self.cache = start.cache = StaticCache(
            start.cache, model.body.rope, start.mask_BT, rows, model.body.embed_tokens.weight
        )
        start.mask_BT = None
        # Inputs and outputs of a step, where a graph reads and writes them; and which row each running one is.
        self._ids_R1 = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self._logits_RS = start.logits_BS
        self._row_B = torch.arange(rows, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures, self._is_warm = model.device.type == "cuda", False

    def logits(self) -> Tensor:
        return self._logits_RS if len(self._row_B) == len(self._logits_RS) else self._logits_RS[self._row_B]

    def keep(self, kept_B: Tensor) -> None:
        self._row_B = self._row_B[kept_B]
        if 2 * len(self._row_B) > len(self._ids_R1):
            return
        self._forget_graph()
        self.cache.keep_rows(self._row_B)
        self._ids_R1, self._logits_RS = self._ids_R1[self._row_B], self._logits_RS[self._row_B]
        self._row_B = torch.arange(len(self._row_B), device=self.model.device)

    def step(self, ids_B: Tensor) -> None:
        self._ids_R1[self._row_B, 0] = ids_B
        if self.cache.length == self.cache.capacity:
            self._forget_graph()
            self.cache.enlarge()
        if not self._captures:
            self._logits_RS = self._forward()
        elif self._graph is not None:
            self._replay(self._graph)
        elif self._is_warm:
            self._graph = self._captured()
            if self._graph is None:
                self._captures, self._logits_RS = False, self._forward()
            else:
                self._replay(self._graph)
        else:
            # The first step with new shapes is an ordinary one: kernels are compiled and workspaces made outside of a
            # graph, on a stream like the one that captures.
            with _side_stream():
                self._logits_RS = self._forward()
            self._is_warm = True

    def _forward(self) -> Tensor:
        hidden_R1D = self.model.hidden_states(
            inputs_embeds_BLD=self.model.embed(self._ids_R1), past_key_values=self.cache
        )
        return self.model.logits(hidden_R1D[:, 0])

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """A step as a graph; None, after a warning, if CUDA or a kernel refuses."""
        graph, length = torch.cuda.CUDAGraph(), self.cache.length
        try:
            # What other threads do with the device meanwhile is their own affair.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits_RS = self._forward()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"decoding runs kernel by kernel, since a step is no CUDA graph: {reason}", stacklevel=2)
            return None
        finally:
            # Capturing ran nothing on the device; the replay does, and counts.
            self.cache.length = length
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()
        self.cache.length += 1

    def _forget_graph(self) -> None:
        """Before tensors move. The logits lie in the graph's memory."""
        self._logits_RS = self._logits_RS.clone()
        self._graph, self._is_warm = None, False


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """Work on another stream that begins after the current one's and ends before what follows there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
