"""One place decides about GPUs: a worker uses those that Ray gave it, and none where it asked for none."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from mamtra_ray.runtime.device import device_of_this_process

PACKAGE = Path(__file__).parents[1] / "mamtra_ray"


@pytest.mark.parametrize(
    ("machine", "given", "expected"),
    [(False, ["0"], "cpu"), (True, ["0"], "cuda"), (True, [], "cpu"), (True, None, "cuda")],
)
def test_a_worker_computes_on_what_it_was_given(monkeypatch, machine, given, expected):
    """``given``: GPUs of this worker; None: a process without Ray."""
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": given})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine)
    monkeypatch.setattr(ray, "is_initialized", lambda: given is not None)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert device_of_this_process().type == expected


def test_no_other_module_asks_whether_there_is_a_gpu():
    """But for CosyVoice's own process, which has no Ray."""
    asking = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda.is_available"
    }
    assert asking - {"models/ssd_cuda.py"} == {"runtime/device.py", "teachers/cosyvoice2_drop_in.py"}
