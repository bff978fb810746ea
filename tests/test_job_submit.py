"""The cluster way: a head with Ray's default token authentication, a submitted job, our metrics on its endpoint."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tiny_search import write_search_space

REPOSITORY = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_submitted_search_runs_on_a_head_with_token_authentication(tmp_path):
    (tmp_path / "mine").mkdir()
    write_search_space(tmp_path / "mine", search__trials=3)
    run = tmp_path / "runs" / "mine"
    dashboard, metrics = free_port(), free_port()
    environment = {
        **os.environ,
        # The guide's `ray` and `python` are those of this environment.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    (tmp_path / "token").write_text("0123456789abcdef0123456789abcdef")
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}", "--num-cpus=2",
         f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={free_port()}",
         f"--temp-dir=/tmp/ray-{os.getpid()}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", "0123456789abcdef0123456789abcdef")
        wait_for(f"http://127.0.0.1:{metrics}/metrics", "0123456789abcdef0123456789abcdef")
        command = ["bash", "-c", command_of_the_guide("/shared/mine/space.yaml").replace("/shared", str(tmp_path))]
        without_token = {**environment, "RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "wrong" * 8}
        refused = subprocess.run(command, env=without_token, cwd=REPOSITORY, capture_output=True, text=True)
        assert refused.returncode != 0, "a wrong token must not start a job"
        deadline = time.monotonic() + 120
        job = submit(command, environment)
        seen = set()
        while job.poll() is None or time.monotonic() < deadline:
            if job.poll() is not None:
                if (run / "config.yaml").exists():
                    break
                job = submit(command, environment)  # the node's agent was not up yet
            time.sleep(1)
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics") as answer:
                lines = answer.read().decode().splitlines()
            seen |= {line.split("{")[0] for line in lines if line.startswith("ray_mamtra_") and 'run="mine"' in line}
        output = job.communicate()[0]
        assert job.returncode == 0, output
        assert (run / "best" / "config.json").exists() and "checkpoint" in output
        # Ray appends _total to counters.
        assert {name.removesuffix("_total") for name in seen} >= {
            "ray_mamtra_trials_finished",
            "ray_mamtra_best_ce",
            "ray_mamtra_tokens_per_second",
            "ray_mamtra_cache_bytes",
        }
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def command_of_the_guide(part: str) -> str:
    """The one block of docs/cluster.md that holds ``part``, word for word."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "docs" / "cluster.md").read_text(), re.S)
    (block,) = [block for block in blocks if part in block]
    return block


def submit(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(url: str, token: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
            urllib.request.urlopen(request, timeout=5)
            return
        except OSError:
            assert time.monotonic() < deadline, f"{url} did not answer"
            time.sleep(1)
