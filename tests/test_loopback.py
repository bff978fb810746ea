"""What a verb's own Ray cluster opens to others: no port, and no file with its token."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mamtra_ray.config.command_line import verb_parser

IN_A_VERB = """
import json, sys, urllib.request
from mamtra_ray.config.command_line import verb_parser
verb_parser("search", "").parse_intermixed_args(sys.argv[1:])
from mamtra_ray.runtime.cluster import connect
dashboard = connect(None).dashboard
import psutil, ray, time
from mamtra_ray.layouts import Layout
from mamtra_ray.run.rows import FinalistRow
from mamtra_ray.runtime.progress import repeatedly
from mamtra_ray.search.metrics import SECONDS_BETWEEN_EXPORTS, SearchMetrics
from mamtra_ray.speech.error_rate import ErrorRate

@ray.remote
class Worker:
    def __init__(self, run, ce):
        metrics = SearchMetrics(run)
        metrics.note_progress("align", 0.25, 1000.0)
        metrics.best_trial(ce, 4096.0)
        heard = {"wer": 0.25, "wer_low": 0.125, "wer_high": 0.5, "token_error_rate": 0.75}
        metrics.trial_scored({"tokens_per_second": 500.0, **heard})
        metrics.trial_scored({"tokens_per_second": 700.0})  # did not speak
        metrics.trial_ended(failed=False)
        metrics.trial_ended(failed=True)
        costs = {"cache_bytes": 2048.0, "decode_flops": 1.0, "parameters": 1.0}
        scores = {"ce": ce - 1, "kl": 0.1, "ce_start": 3.0, "kl_start": 2.0, "wer": ErrorRate(0.0625, 0.0, 0.1)}
        finalist = FinalistRow(Layout("AM"), origin="probe", tokens=1, steps=1, seconds=1.0, **scores, **costs)
        metrics.finalists_distilled([finalist])
        metrics.finalists_heard([finalist])
        self.exporting = repeatedly(metrics.set_again, SECONDS_BETWEEN_EXPORTS)
        self.exporting.__enter__()

    def ready(self):
        pass

workers = [Worker.options(num_cpus=0).remote(f"/{user}/runs/demo", ce) for user, ce in (("a", 1.5), ("b", 2.5))]
ray.get([worker.ready.remote() for worker in workers])
us = psutil.Process()
listening = [
    (connection.laddr.ip, process.name())
    for process in (us, *us.children(recursive=True))
    for connection in process.net_connections("inet")
    if connection.status == psutil.CONN_LISTEN
]
port = ray.nodes()[0]["MetricsExportPort"]
begin = time.monotonic()
metrics = []
# Ray exports every ten seconds: a value that was set once is gone from the second scrape on.
while time.monotonic() < begin + 45 or (len(metrics) < 4 and time.monotonic() < begin + 200):
    time.sleep(2)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    metrics = [line for line in text.splitlines() if line.startswith("ray_mamtra_best_ce{")]
print("FOUND", json.dumps({"dashboard": dashboard, "listening": listening, "text": text}))
"""


@pytest.mark.slow
def test_a_local_cluster_listens_on_loopback_only_and_its_metrics_tell_runs_apart(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.run(
        [sys.executable, "-c", IN_A_VERB],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**environment, "HOME": str(tmp_path), "RAY_worker_niceness": "0"},
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.split("FOUND ")[1])
    assert found["dashboard"].startswith("127.0.0.1:")
    assert {"gcs_server", "raylet"} <= {name for _, name in found["listening"]}
    for ip, name in found["listening"]:
        assert ip.removeprefix("::ffff:") in ("127.0.0.1", "::1"), f"{name} listens on {ip}"
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
    values = {}  # read as Prometheus reads them
    for family in text_string_to_metric_families(found["text"]):
        for sample in family.samples:
            if sample.name.startswith("ray_mamtra_") and not sample.name.endswith("_created"):
                series = values.setdefault(sample.name.removeprefix("ray_mamtra_"), {})
                series[sample.labels["run"], sample.labels["phase"]] = sample.value
    grafana = (Path(__file__).parent.parent / "cluster" / "grafana_dashboard.json").read_text()
    assert set(values) == set(re.findall(r"ray_mamtra_(\w+)", grafana))
    a, b = "/a/runs/demo", "/b/runs/demo"
    assert values["best_ce"] == {(a, "trials"): 1.5, (a, "finalists"): 0.5, (b, "trials"): 2.5, (b, "finalists"): 1.5}
    of_a = {name: {key[1]: value for key, value in series.items() if key[0] == a} for name, series in values.items()}
    assert of_a == {
        "best_ce": {"trials": 1.5, "finalists": 0.5},
        "best_wer": {"trials": 0.25, "speech": 0.0625},
        "cache_bytes": {"trials": 4096, "finalists": 2048},
        "phase_progress": {"align": 0.25},
        "tokens_per_second": {"align": 1000, "trials": 700},
        "trial_token_error_rate": {"trials": 0.75},
        "trial_wer": {"trials": 0.25},
        "trial_wer_high": {"trials": 0.5},
        "trial_wer_low": {"trials": 0.125},
        "trials_failed_total": {"trials": 1},
        "trials_finished_total": {"trials": 2},
    }


@pytest.mark.parametrize(
    ("arguments", "set_before", "is_local"),
    [
        ([], {}, True),
        (["--address", "local"], {"RAY_ADDRESS": "x:1"}, True),
        (["--address", "auto"], {}, False),
        ([], {"RAY_ADDRESS": "x:1"}, False),
    ],
)
def test_a_cluster_of_several_machines_is_not_kept_to_this_one(monkeypatch, arguments, set_before, is_local):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "")
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    verb_parser("search", "").parse_intermixed_args(arguments)
    assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == ("0" if is_local else None)


def test_a_token_that_others_can_read_is_made_private(tmp_path, monkeypatch):
    from mamtra_ray.runtime import cluster

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.init", lambda **_: (_ for _ in ()).throw(Exception("not in this test")))
    token = tmp_path / ".ray" / "auth_token"
    for _ in range(2):
        with pytest.raises(Exception, match="not in this test"):
            cluster.connect("local")
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert [path.name for path in token.parent.iterdir()] == ["auth_token"]
        content = token.read_text()
        token.chmod(0o644)
    with pytest.raises(Exception, match="not in this test"):
        cluster.connect("local")
    assert token.read_text() == content and stat.S_IMODE(token.stat().st_mode) == 0o600
