"""A CUDA graph on the CPU: the operations of a region, done again on the same tensors.

Like a real capture it leaves no trace of its own run, refuses what makes the host wait for the device or copies from
it, and a replay reads and writes the addresses of the capture only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique")
FROM_HOST = ("lift_fresh", "lift_fresh_copy", "scalar_tensor")


class RecordedGraph:
    """Takes the place of ``torch.cuda.CUDAGraph``."""

    made = 0
    replays = 0

    def __init__(self) -> None:
        RecordedGraph.made += 1
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def replay(self) -> None:
        RecordedGraph.replays += 1
        for function, args, kwargs, outputs in self.calls:
            found = [t for t in tree_flatten(function(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
            for old, new in zip(outputs, found, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in WAITS or name in FROM_HOST or (name == "_to_copy" and kwargs.get("device") is not None):
            raise AssertionError(f"a CUDA graph cannot capture {name}")
        for argument, schema in zip(args, function._schema.arguments, strict=False):
            if schema.alias_info is not None and schema.alias_info.is_write:
                # The whole storage, once: views of it share what is to be put back.
                storage = argument.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (argument, storage.clone()))
        result = function(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self.graph.calls.append((function, args, kwargs, outputs))
        return result


@contextlib.contextmanager
def recorded(graph: RecordedGraph, capture_error_mode: str = "global") -> Iterator[None]:
    """Takes the place of ``torch.cuda.graph``."""
    recorder = _Recorder(graph)
    with recorder:
        yield
    for tensor, content in recorder.before.values():
        tensor.untyped_storage().copy_(content)
