"""Bytes that one process holds in the steps of a run: training, alignment, forward passes. Closed form, no torch.

What a forward pass keeps for its backward pass is counted tensor by tensor, as the layers of :mod:`mamtra_ray.models`
keep it in PyTorch. ``tests/test_step_memory.py`` compares the count with what autograd really keeps, and the peak with
all tensors that live in a step; ``benchmarks/step_memory.py`` with the resident set of real steps. Not counted: what a
process holds before its first step (PyTorch and Ray, 0.5 to 1 GB; the CUDA context), the allocator's waste, and the
workspaces of kernels. On a GPU mamba-ssm's kernels keep less than the scan counted here.

Letters: T tokens at once (padding included), D model width, I MLP width, Q and K channels of all query and key heads,
H query heads, C convolved channels, S states, P head dim, V classes of the head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mamtra_ray.efficiency.architectures import Architecture, attention_layer, mamba_layer
from mamtra_ray.efficiency.closed_form import total_parameters
from mamtra_ray.layouts import Layout

FLOAT32, BFLOAT16 = 4, 2
_ADAM_BYTES = 8
"""AdamW's two moments of a weight, float32."""
_LOGIT_COPIES = 8
"""Matrices of a chunk's tokens x V that the losses hold at once, float32: logits and logarithms of both models, the
mixture, and what becomes the gradient."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass."""
    working: int
    """What the largest layer needs besides in its backward pass, or forward where there is none; with activation
    checkpointing also what it computes again."""
    logits: int
    """Of a chunk of tokens, teacher's and student's; gone before the backward pass begins."""
    teacher_rows: int
    """What the batch holds of the teacher."""
    gradients_stay: bool
    """Whether gradients are there while activations are: with several micro batches, or several workers."""

    @property
    def total(self) -> int:
        """At the peak. Gradients take the place of activations where these are freed first."""
        passing = self.activations + max(self.logits, self.working)
        peak = passing + self.gradients if self.gradients_stay else max(passing, self.gradients)
        return self.parameters + self.optimizer + self.teacher_rows + peak


def distillation_memory(
    architecture: Architecture,
    layout: Layout,
    *,
    tokens: int,
    length: int,
    batch_tokens: int | None = None,
    workers: int = 1,
    fully_shard: bool = False,
    precision: str = "float32",
    activation_checkpointing: bool = False,
    loss_chunk_tokens: int = 256,
    hidden_loss: bool = True,
) -> StepMemory:
    """A distillation step of one process.

    Args:
        architecture: of the teacher and its Mamba layers.
        layout: of the student.
        tokens: padded tokens of a micro batch.
        length: of its utterances; matters for the scan's states only.
        batch_tokens: padded tokens of this process's part of the batch; ``tokens`` if None.
        workers: processes that train together.
        fully_shard: they divide weights, gradients and optimizer state; the head stays whole everywhere.
        precision: ``distill.precision``.
        activation_checkpointing: only the inputs of layers are kept.
        loss_chunk_tokens: tokens whose logits exist at a time.
        hidden_loss: whether hidden states are compared.
    """
    D, batch_tokens = architecture.hidden_size, batch_tokens or tokens
    all_weights = total_parameters(architecture, layout)
    trained = all_weights - architecture.table_parameters
    final = _final_bytes(architecture, tokens)
    kept = saved_bytes(architecture, layout, tokens, length, precision)
    working = _backward_bytes(architecture, tokens, precision)
    if activation_checkpointing:
        # Layers of two kinds, of which one at a time is computed again.
        kinds = {Layout(letter) for letter in str(layout)}
        working += max(saved_bytes(architecture, kind, tokens, length, precision) for kind in kinds) - final
        kept = layout.num_layers * FLOAT32 * D * tokens + final
    # The gradient through the head, and the difference of the embedding loss.
    kept += (2 if hidden_loss else 1) * FLOAT32 * D * tokens
    logits = logits_bytes(architecture, min(loss_chunk_tokens, tokens))
    shards = workers if fully_shard else 1
    rounded = _cast_bytes(architecture, layout) if precision != "float32" else 0
    if shards > 1:
        head = min(architecture.head_outputs * D, architecture.table_parameters)
        all_weights = head + -(-(all_weights - head) // shards)
        trained = -(-trained // shards)
        # What a layer is put together in is rounded already, and gone with it.
        kept -= 0 if activation_checkpointing else rounded
        working += gathered_bytes(architecture, layout, precision)
        # The table is put together when nothing is kept yet.
        working = max(working, 2 * FLOAT32 * (architecture.table_parameters - head) - kept)
    elif activation_checkpointing:
        # Autocast lets go of the weights' rounded copies between the two passes.
        logits += rounded
    return StepMemory(
        parameters=FLOAT32 * all_weights,
        gradients=FLOAT32 * trained,
        optimizer=_ADAM_BYTES * trained,
        activations=kept,
        working=working,
        logits=logits,
        teacher_rows=FLOAT32 * D * batch_tokens,
        gradients_stay=batch_tokens > tokens or workers > 1,
    )


def gathered_bytes(architecture: Architecture, layout: Layout, precision: str = "float32") -> int:
    """What a process of a sharded training holds of whole layers in its backward pass.

    The layer that computes and the next one, each beside the buffer that it was received in; the gradient and, in
    float32, the buffer that it is sent in.
    """
    kinds = {"A": attention_layer(architecture).parameters, "M": mamba_layer(architecture).parameters}
    layer = max(kinds[letter] for letter in str(layout))
    return layer * (5 * _bytes_of(precision) + FLOAT32)


def alignment_memory(
    architecture: Architecture,
    *,
    tokens: int,
    length: int,
    precision: str = "float32",
    workers: int = 1,
    fully_shard: bool = False,
    cpu_offload: bool = False,
) -> StepMemory:
    """A step that trains all layers' mixers: beside the teacher's forward pass one mixer at a time.

    Args:
        architecture: of the teacher and its Mamba layers.
        tokens: padded tokens of this process's part of a batch.
        length: of its utterances; matters for the scan's states only.
        precision: ``align.precision``.
        workers: processes that train together.
        fully_shard: they divide teacher, mixers and optimizer state; the teacher's head stays whole everywhere.
        cpu_offload: the teacher's layers are there one at a time.
    """
    teacher = _forward_weights(architecture, mixers=False, cpu_offload=cpu_offload)
    mixer = mixer_parameters(architecture)
    mixers = architecture.num_layers * mixer
    shards = workers if fully_shard else 1
    forward = forward_memory(architecture, tokens=tokens, logits_tokens=0)
    working = forward.working
    if shards > 1:
        head = min(architecture.head_outputs * architecture.hidden_size, architecture.table_parameters)
        # The layer that computes and the next one, each beside the buffer that it was received in; a mixer likewise,
        # its gradient, and the buffer that it is sent in.
        gathered = FLOAT32 * (4 * attention_layer(architecture).parameters + 4 * mixer)
        # The table is put together when nothing else is there yet.
        working += max(gathered, 2 * FLOAT32 * (architecture.table_parameters - head) - working)
        teacher = head + -(-(teacher - head) // shards)
    held = -(-mixers // shards)
    return StepMemory(
        parameters=FLOAT32 * (teacher + held),
        # Processes that each hold all mixers send copies of their gradients, all of which are there at the step's end.
        gradients=FLOAT32 * held * (2 if workers > shards else 1),
        optimizer=_ADAM_BYTES * held,
        activations=_mixer_bytes(architecture, tokens, length, _bytes_of(precision)),
        working=working,
        logits=0,
        teacher_rows=0,
        gradients_stay=True,
    )


def forward_memory(
    architecture: Architecture,
    *,
    tokens: int,
    logits_tokens: int,
    kept_layers: int = 0,
    mixers: bool = False,
    cpu_offload: bool = False,
) -> StepMemory:
    """A forward pass without gradients.

    Args:
        architecture: of the teacher and its Mamba layers.
        tokens: padded tokens at once.
        logits_tokens: of these, with logits at a time.
        kept_layers: layers whose outputs are kept.
        mixers: a Mamba mixer for every layer is held beside the teacher.
        cpu_offload: layers are there one at a time.
    """
    weights = _forward_weights(architecture, mixers, cpu_offload)
    D, wide = architecture.hidden_size, max(3 * architecture.intermediate_size, 6 * _inner(architecture))
    return StepMemory(
        parameters=FLOAT32 * weights,
        gradients=0,
        optimizer=0,
        activations=FLOAT32 * tokens * kept_layers * D,
        # The residual, the normed input, its float32 copy and what a layer makes of it.
        working=FLOAT32 * tokens * (3 * D + wide),
        logits=logits_bytes(architecture, logits_tokens),
        teacher_rows=0,
        gradients_stay=False,
    )


def _forward_weights(architecture: Architecture, mixers: bool, cpu_offload: bool) -> int:
    """Parameters that are there in a forward pass of the teacher."""
    teacher = total_parameters(architecture, Layout.all_attention(architecture.num_layers))
    if cpu_offload:
        attention, mamba = attention_layer(architecture).parameters, mamba_layer(architecture).parameters
        return teacher - architecture.num_layers * attention + (max(attention, mamba) if mixers else attention)
    return teacher + (architecture.num_layers * mixer_parameters(architecture) if mixers else 0)


def saved_bytes(
    architecture: Architecture, layout: Layout, tokens: int, length: int, precision: str = "float32"
) -> int:
    """What decoder and last norm keep of ``tokens`` positions for the backward pass, without activation checkpointing.

    With bfloat16 that includes the weights' rounded copies, which autocast makes once in a forward pass.
    """
    size = _bytes_of(precision)
    total = _final_bytes(architecture, tokens)
    for letter, count in (("A", layout.num_attention), ("M", layout.num_layers - layout.num_attention)):
        if count:
            mix = _attention_bytes if letter == "A" else _mixer_bytes
            total += count * (mix(architecture, tokens, length, size) + _mlp_bytes(architecture, tokens, size))
    return total + (_cast_bytes(architecture, layout) if size != FLOAT32 else 0)


def logits_bytes(architecture: Architecture, tokens: int) -> int:
    """What the losses hold of a chunk of ``tokens``."""
    return _LOGIT_COPIES * FLOAT32 * tokens * architecture.head_outputs


def mixer_parameters(architecture: Architecture) -> int:
    """Of one Mamba mixer."""
    no_mlp = dataclasses.replace(architecture, intermediate_size=0)
    norms = 2 * architecture.hidden_size
    return mamba_layer(no_mlp).parameters - norms


def _bytes_of(precision: str) -> int:
    return FLOAT32 if precision == "float32" else BFLOAT16


def _inner(architecture: Architecture) -> int:
    return architecture.num_heads * architecture.head_dim


def _norm_bytes(architecture: Architecture, tokens: int) -> int:
    """Input and normed input in float32, and one scale."""
    return FLOAT32 * tokens * (2 * architecture.hidden_size + 1)


def _final_bytes(architecture: Architecture, tokens: int) -> int:
    return _norm_bytes(architecture, tokens)


def _linear_inputs(architecture: Architecture, tokens: int, readers: int, size: int) -> int:
    """The normed input of linear layers; autocast rounds it for each of them."""
    return size * tokens * architecture.hidden_size * (1 if size == FLOAT32 else readers)


def _attention_bytes(architecture: Architecture, tokens: int, length: int, size: int) -> int:
    """Norm, then q, k, v and the output; the kernel keeps one sum for every head instead of weights."""
    Q, K = _inner(architecture), architecture.num_kv_heads * architecture.head_dim
    H, G = architecture.num_heads, architecture.num_kv_heads
    head_norms = FLOAT32 * (2 * (Q + K) + H + G) if architecture.qk_norm else 0
    heads = size * (2 * Q + 2 * K) + FLOAT32 * H
    normed = _linear_inputs(architecture, tokens, 3, size)
    return _norm_bytes(architecture, tokens) + normed + tokens * (heads + head_norms)


def _mixer_bytes(architecture: Architecture, tokens: int, length: int, size: int) -> int:
    """Norm, then the projection, the convolution's input and output, the scan, and the gated norm."""
    mamba, Q = architecture.mamba, architecture.mamba.inner_size
    C = mamba.x_channels + mamba.b_channels + mamba.c_channels
    H, S = mamba.num_output_heads, mamba.num_states
    padded = size * C * (tokens + (mamba.conv_kernel - 1) * tokens / length)
    convolved = size * tokens * 2 * C
    steps = FLOAT32 * tokens * 2 * S
    # In float32 z is a part of the projection, which is kept as a whole; bfloat16 is widened.
    z = FLOAT32 * tokens * (Q + (C + S if size == FLOAT32 else 0))
    gated = tokens * (FLOAT32 * (4 * Q + H) + size * Q)
    normed = _linear_inputs(architecture, tokens, 1, size)
    states = _state_bytes(architecture, tokens, length)
    return round(_norm_bytes(architecture, tokens) + normed + padded + convolved + steps + z + gated + states)


def _state_bytes(architecture: Architecture, tokens: int, length: int) -> float:
    """The scan keeps the state that enters every chunk, and of every run of chunks the one that leaves it."""
    mamba = architecture.mamba
    full, rest = divmod(length, mamba.chunk_size)
    states = sum(chunks + 1 for chunks in (full, 1 if rest else 0) if chunks)
    return FLOAT32 * tokens / length * states * mamba.num_states * mamba.head_dim * mamba.state_size


def _mlp_bytes(architecture: Architecture, tokens: int, size: int) -> int:
    """Norm, then gate, silu(gate), up, and their product."""
    normed = _linear_inputs(architecture, tokens, 2, size)
    return _norm_bytes(architecture, tokens) + normed + size * tokens * 4 * architecture.intermediate_size


def _cast_bytes(architecture: Architecture, layout: Layout) -> int:
    attention, mamba = attention_layer(architecture), mamba_layer(architecture)
    mambas = layout.num_layers - layout.num_attention
    return BFLOAT16 * (layout.num_attention * attention.linear_macs_per_token + mambas * mamba.linear_macs_per_token)


def _backward_bytes(architecture: Architecture, tokens: int, precision: str) -> int:
    """Gradients of activations on their way through the largest layer's MLP."""
    return tokens * (FLOAT32 * 2 * architecture.hidden_size + _bytes_of(precision) * 2 * architecture.intermediate_size)
