"""A speech language model of which every process holds a part (FSDP2): a student in training, or a teacher.

A layer's weights are put together right before it computes, forward and backward, and are let go right after. Its
gradient is averaged over the processes and cut as soon as it is complete, in every micro batch: a process that waited
for the last one would hold the gradients of the whole model.

- **The embedding table** is cut as well. Only the first operation of a pass needs it.
- **The head is not.** It is frozen, so it has no gradient and no optimizer state. The loss reads all of it twice (for
  teacher and student) for every chunk of tokens, at the moment when the activations are there.
- **bfloat16** is what the matrices of linear layers are put together in, half as much to send; sums of gradients are
  float32. The rest (norms, decay and step sizes of the scan, the table) stays float32, as under autocast. So a step
  computes what an unsharded one with ``distill.precision: bfloat16`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mamtra_ray.runtime.sharding import whole
from mamtra_ray.speech_lm.speech_lm import SpeechLM


def shard_speech_lm(model: SpeechLM, precision: str, device: torch.device, world_size: int) -> None:
    """Cut the tensors of ``model`` into one part for every process, and put this process's parts onto ``device``.

    Args:
        model: on the CPU, the same in all processes. Its tensors are copied: they may be shared with a teacher. Layer
            by layer, so ``device`` never holds more than one whole layer.
        precision: what matrices are put together in, ``float32`` or ``bfloat16``.
        device: where it trains.
        world_size: processes of the process group, which must be initialized.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    rounded = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in model.body.layers:
        if precision != "float32":
            matrices: list[nn.Module] = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            fully_shard(matrices, mesh=mesh, mp_policy=rounded)
        fully_shard(layer, mesh=mesh)
    # The parameters of table and last norm; a pass begins with the method, not with forward.
    fully_shard(model.body.embed_tokens, mesh=mesh)
    model.head.to(device)
    # Also the root lets go: otherwise the last norm would be whole, another tensor than the optimizer's, after a pass
    # without gradients.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=set(model.head.parameters()))
    register_fsdp_forward_method(model, "hidden_states")


def whole_student(student: SpeechLM, rank: int) -> SpeechLM | None:
    """The student on the CPU of process 0; None in the others.

    Devices hold one whole tensor at a time. All processes must call.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in student.state_dict().items():
        complete = whole(tensor)
        if rank == 0:
            tensors[name] = complete.detach().to("cpu", copy=True)
        del complete
    return SpeechLM.from_tensors(student.config, student.vocabulary, tensors) if rank == 0 else None
