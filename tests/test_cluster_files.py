"""The files in cluster/ against the schemas of what reads them."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.util.metrics import Counter

from mamtra_ray.config import load_config
from mamtra_ray.search.metrics import SearchMetrics

CLUSTER = Path(__file__).parent.parent / "cluster"


def _object(properties: dict, required: tuple[str, ...] = ()) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


ANY_OBJECT = {"type": "object"}
INTEGER, STRING, BOOLEAN = {"type": "integer"}, {"type": "string"}, {"type": "boolean"}
POD = _object({"metadata": ANY_OBJECT, "spec": {"type": "object", "required": ["containers"]}}, ("spec",))
START_PARAMS = {"type": "object", "additionalProperties": STRING}
# Fields of the ray.io/v1 RayJob resource (KubeRay 1.x); whole, the definition is 1.4 MB.
RAY_JOB = _object(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": _object(
            {
                "entrypoint": STRING,
                "shutdownAfterJobFinishes": BOOLEAN,
                "ttlSecondsAfterFinished": INTEGER,
                "backoffLimit": INTEGER,
                "runtimeEnvYAML": STRING,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "rayClusterSpec": _object(
                    {
                        "rayVersion": STRING,
                        "authOptions": _object({"mode": {"enum": ["disabled", "token"]}, "secretName": STRING}),
                        "headGroupSpec": _object({"rayStartParams": START_PARAMS, "template": POD}, ("template",)),
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": _object(
                                {
                                    "groupName": STRING,
                                    "replicas": INTEGER,
                                    "minReplicas": INTEGER,
                                    "maxReplicas": INTEGER,
                                    "rayStartParams": START_PARAMS,
                                    "template": POD,
                                },
                                ("groupName", "maxReplicas", "minReplicas", "template"),
                            ),
                        },
                    },
                    ("headGroupSpec",),
                ),
            },
            ("entrypoint", "rayClusterSpec"),
        ),
    },
    ("apiVersion", "kind", "metadata", "spec"),
)


def test_ray_up_file_meets_rays_own_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text()), schema)


def test_every_way_to_a_cluster_uses_one_token():
    ray_up = yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text())
    assert ray_up["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [c for role in ("head", "worker") for c in ray_up[f"{role}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"


def test_a_cluster_opens_its_dashboard_to_nobody():
    """`ray dashboard` and `kubectl port-forward` tunnel to it; in a pod the service must reach it."""
    ray_up = yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text())
    assert not any("dashboard-host" in command for command in ray_up["head_start_ray_commands"])


@pytest.mark.parametrize("file", ["ray_cluster.yaml", "rayjob.yaml"])
def test_the_searches_of_the_cluster_files_are_what_the_verb_takes(file, monkeypatch, tmp_path):
    """Also from another folder: a job's working directory is a copy of some other one."""
    monkeypatch.chdir(tmp_path)
    text = (CLUSTER / file).read_text()
    words = re.sub(r"[#\\\n]", " ", text).split()
    start = words.index("mamtra_ray.search") + 1
    space, overrides = words[start + words[start:].index("--space") + 1], []
    for word in words[start + 4 :]:
        if not re.match(r"[a-z_]+\.[a-z_]+=", word):
            break
        overrides.append(word)
    config = load_config(space, overrides)
    paths = [config.teacher.path, config.corpus.path, config.evaluate.corpus, config.evaluate.recognizer.split(":")[1]]
    assert len(overrides) == 4 and all(path.startswith("/shared/") for path in paths)


def test_ray_job_has_only_fields_of_the_resource():
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    jsonschema.validate(job, RAY_JOB)
    job["spec"]["entryPoint"] = "typo"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAY_JOB)


def test_runtime_environments_are_accepted_by_ray():
    runtime_env = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    ray.runtime_env.RuntimeEnv(working_dir=".", **runtime_env)
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    ray.runtime_env.RuntimeEnv(**yaml.safe_load(job["spec"]["runtimeEnvYAML"]))


def test_grafana_shows_every_metric_that_a_search_exports():
    # Ray appends _total to the names of counters.
    exported = {
        metric.info["name"] + ("_total" if isinstance(metric, Counter) else "")
        for metric in vars(SearchMetrics("a run")).values()
    }
    dashboard = json.loads((CLUSTER / "grafana_dashboard.json").read_text())
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(mamtra_\w+)", target["expr"])
    }
    assert exported and shown == exported
    # Every series says of which run and phase it is, and can be told apart by them.
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert all('{run=~"$run", phase=~"$phase"}' in expression for expression in expressions)
    assert all(metric.info["tag_keys"] == ("run", "phase") for metric in vars(SearchMetrics("a run")).values())
