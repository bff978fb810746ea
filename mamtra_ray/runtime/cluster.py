"""Connecting to Ray, and refusing before anything starts what the cluster cannot run."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from mamtra_ray.errors import InputError, end_before_last_words, explain_also
from mamtra_ray.runtime.local_processes import end_with_this_process

# Worker output and Ray's own notices stay in its logs, which the dashboard shows.
_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process has joined."""

    resources: dict[str, float]
    """Amounts by name: CPU, GPU, memory in bytes, and others that nodes announce."""
    dashboard: str
    """Where its dashboard answers, such as ``127.0.0.1:8265``; ``off`` without one."""


def connect(address: str | None = None) -> Cluster:
    """Join a Ray cluster, or start one in this process; one that is joined already stays.

    Args:
        address: as for ``ray.init``: ``auto``, ``host:port``, ``ray://...``; none means ``$RAY_ADDRESS`` (which
            ``ray job submit`` sets), and where that is not set a new local cluster of this machine.

    Raises:
        InputError: no cluster answers at ``address``, or a local one does not start.
    """
    explain_also(lost_by_ray)
    # Ray sends no usage statistics unless the user asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # One thread per process: measured faster than several workers fighting over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray Train's trials hang on being stopped without the dashboard's agent, so it stays on.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # All workers are on this machine; its other interfaces may not route to themselves.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        _keep_token_private()
    _check_reachable(address)
    is_ours = address == "local" and not ray.is_initialized()
    try:
        context = ray.init(
            address=address,
            include_dashboard=True if address == "local" else None,
            ignore_reinit_error=True,
            **_QUIET,
        )
    except Exception as error:  # Ray has no class for what keeps its processes or its dashboard from starting
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        if address == "local":
            raise InputError(f"Ray does not start on this machine; try again when it is less busy: {reason}") from None
        raise InputError(f"no Ray cluster answers at {address!r}: {reason}") from None
    if is_ours:
        # Until then Ray tells of every process that dies.
        end_before_last_words(ray.shutdown)
        # Ray's annotation names the base class, which has none: that is a client's, not of a local cluster.
        end_with_this_process(context.address_info["session_dir"])  # type: ignore[attr-defined]
    return Cluster(ray.cluster_resources(), context.dashboard_url or "off")


def _keep_token_private() -> None:
    """Whoever can read the token of a local cluster can run code in it; Ray would write it readable by everybody."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return  # the user has seen to it
    path = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # no home that can be written to: Ray says so itself
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            handle, new = tempfile.mkstemp(dir=path.parent)  # readable by its owner only
            os.write(handle, secrets.token_hex(32).encode())
            os.close(handle)
            with contextlib.suppress(FileExistsError):  # another search was faster
                os.link(new, path)
            Path(new).unlink()
        path.chmod(0o600)


def lost_by_ray(error: Exception) -> str | None:
    """Processes and nodes are replaced where they die; what remains an error after that, in one sentence."""
    if not isinstance(error, ray.exceptions.RayError) and isinstance(error.__cause__, ray.exceptions.RayError):
        # Ray's libraries put errors of Ray that they do not expect into their own.
        return lost_by_ray(error.__cause__)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        reason = str(error).partition("\n")[0][:200]
        return (
            f"a node ran out of memory, and Ray ended processes that this run needs ({reason}); give every worker more "
            "with a higher resources.cpus_per_worker, or end what else needs memory there; the same command goes on "
            "where it stopped"
        )
    # A RayTaskError is an error of our own, wherever it happened.
    if not isinstance(error, ray.exceptions.RayError) or isinstance(error, ray.exceptions.RayTaskError):
        return None
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return f"Ray lost a process or a node that this run needs ({reason}); the same command goes on where it stopped"


def _check_reachable(address: str) -> None:
    """Refuse a ``host:port`` where nothing listens; Ray itself would try for many minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not (separator and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {error}") from None
