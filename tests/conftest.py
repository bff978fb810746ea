"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Before Ray or torch are imported: nothing leaves the machine, and one thread per process.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# All processes of a test are on this machine; another interface may not route to itself.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# Ray's workers start at niceness 15 and starve on a busy machine.
os.environ.setdefault("RAY_worker_niceness", "0")


# (logger, part of the message) of what a dependency says about its own calls.
_NOT_ABOUT_US = (
    # Whisper's generate hands these on to the general one.
    ("transformers.generation.utils", "suppress_tokens"),
)


class _Refused(logging.Handler):
    """Raises where a dependency's log, not a warning, says that a call of ours will stop working."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if any(record.name == name and part in message for name, part in _NOT_ABOUT_US):
            return
        if "deprecat" in message.lower():
            raise DeprecationWarning(f"{record.name} logged: {message}")


@pytest.fixture(scope="session", autouse=True)
def _deprecations_in_logs_are_errors() -> None:
    for name in ("transformers", "ray", "optuna"):
        logging.getLogger(name).addHandler(_Refused())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`pytest -m gpu` where there is no GPU says so, instead of failing inside of torch (`make gpu-test` refuses)."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no CUDA device")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster of two CPUs for the whole test session; tests that kill things start their own."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
