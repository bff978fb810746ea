"""`make gpu-test`: all tests marked `gpu`, and at the end which of them ran, were skipped and why, or failed.

    python tests/gpu_run.py --card     exit code 2 and one sentence where there is no card; needs no package
    python tests/gpu_run.py [ARGS]     the tests; ARGS go to pytest

A test that is skipped is no test that passed, so a machine on which none ran ends with exit code 2, too.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import_error: ImportError | None = None
try:
    import pytest
except ImportError as error:  # --card is asked before anything is installed
    import_error = error

# Of NVIDIA's driver, and of Windows's for Linux.
DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
NOTHING_RAN = 2


def missing_card() -> str | None:
    """Why this machine can have no CUDA device, judged by the driver's device files; None if it may have one."""
    if any(Path(file).exists() for file in DEVICE_FILES):
        return None
    return "the GPU tests need a CUDA device, and this machine has none (no /dev/nvidia0): nothing was run"


def missing_device() -> str | None:
    """Why PyTorch computes on no CUDA device here; None if it does."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return (
            f"the GPU tests need a CUDA device, and this PyTorch ({torch.__version__}) is built without CUDA:"
            " nothing was run"
        )
    return "the GPU tests need a CUDA device, and PyTorch finds none on this machine: nothing was run"


class Outcomes:
    """A pytest plugin: one line for every test at the end."""

    def __init__(self) -> None:
        self.lines: dict[str, tuple[str, str]] = {}
        """Test -> (ran, skipped or failed; why)."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            where_and_why = report.longrepr
            why = where_and_why[2] if isinstance(where_and_why, tuple) else str(where_and_why)
            self.lines[report.nodeid] = ("skipped", why.removeprefix("Skipped: "))
        elif report.failed:
            last = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")][:1]
            self.lines[report.nodeid] = ("failed", last[0][1:].strip() if last else report.when or "")
        elif report.when == "call":
            self.lines.setdefault(report.nodeid, ("ran", ""))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"GPU tests on {machine()}")
        for state in ("ran", "skipped", "failed"):
            tests = {test: why for test, (found, why) in self.lines.items() if found == state}
            terminalreporter.write_line(f"{state}: {len(tests)}")
            for test, why in tests.items():
                terminalreporter.write_line(f"  {test}{f': {why}' if why else ''}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if all(state == "skipped" for state, _ in self.lines.values()) and session.exitstatus in (0, 5):
            session.exitstatus = NOTHING_RAN


def machine() -> str:
    """The card, and the kernels that are installed."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    kernels = []
    for package in ("torch", "triton", "mamba-ssm"):
        try:
            kernels.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            kernels.append(f"no {package}")
    return f"{card}, {', '.join(kernels)}"


def main(arguments: list[str]) -> int:
    problem = missing_card() if arguments == ["--card"] else missing_device()
    if problem:
        print(problem, file=sys.stderr)
        return NOTHING_RAN
    if arguments == ["--card"]:
        return 0
    if import_error is not None:
        raise import_error
    return int(pytest.main(["-m", "gpu", *arguments], plugins=[Outcomes()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
