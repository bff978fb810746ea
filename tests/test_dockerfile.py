"""cluster/Dockerfile, read as docker reads it: nothing here builds an image."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from mamtra_ray import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
KNOWN = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest) with continued lines joined; comments may stand between them."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = [line.strip() for line in re.sub(r"\\\n", " ", lines).splitlines() if line.strip()]
    assert not any(line.endswith("\\") for line in joined)
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in joined]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    found = instructions((ROOT / "cluster" / "Dockerfile").read_text())
    assert {name for name, _ in found} <= KNOWN
    return found


def stages(dockerfile):
    """Base image and instructions by stage, in order; the last one has no name. Global ARGs have their defaults."""
    arguments = {}
    for name, rest in dockerfile[: next(i for i, (name, _) in enumerate(dockerfile) if name == "FROM")]:
        assert name == "ARG"
        arguments |= [rest.split("=", 1)]
    found = {}
    for name, rest in dockerfile:
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            found[stage] = [re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], image)]
        elif found:
            found[list(found)[-1]].append((name, rest))
    return found, arguments


def test_both_variants_are_stages_and_every_image_has_a_version(dockerfile):
    found, arguments = stages(dockerfile)
    assert list(found) == ["kernels", "base", "cpu", "cuda", ""] and arguments["VARIANT"] == "cpu"
    assert found["cpu"][0] == found["cuda"][0] == "base" and found[""][0] == "cpu"
    for stage in ("kernels", "base"):
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", found[stage][0])
    python = re.search(r"python:(\d+\.\d+)", found["base"][0])[1]
    assert python in SpecifierSet(PROJECT["requires-python"])
    assert any(entry.endswith(f":: {python}") for entry in PROJECT["classifiers"])
    cuda = re.search(r":(\d+\.\d+)\.", found["kernels"][0])[1]
    assert VERSIONS["cuda-toolkit"].startswith(f"{cuda}."), "kernels are built for the CUDA of torch"


def test_what_is_copied_is_there(dockerfile):
    found, _ = stages(dockerfile)
    copied = []
    for name, rest in dockerfile:
        if name == "COPY":
            words = shlex.split(rest)
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in found
            else:
                copied += words[:-1]
                assert len(words) == 2 or words[-1].endswith("/")
    missing = [path for path in copied if not (ROOT / path).exists()]
    assert copied and not missing
    # What setuptools reads to build the package.
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "mamtra_ray", "search_spaces"}
    assert needed <= set(copied)


def test_extras_are_the_packages_and_versions_are_the_locked_ones(dockerfile):
    found, _ = stages(dockerfile)
    for stage in ("cpu", "cuda"):
        (default,) = [rest.split("=")[1] for name, rest in found[stage][1:] if name == "ARG"]
        (install,) = [rest for name, rest in found[stage][1:] if name == "RUN" and ".[" in rest]
        extras = re.search(r'"\.\[(.+)\]"', install)[1].replace("${EXTRAS}", default).split(",")
        assert set(extras) <= set(PROJECT["optional-dependencies"]) and {"demo", "evaluation"} <= set(extras)
        assert ("cuda" in extras) == (stage == "cuda")
    for name, rest in dockerfile:
        for install in re.findall(r"\bpip (?:install|wheel) [^&]*", rest) if name == "RUN" else []:
            assert "--constraint constraints.txt" in install and "--no-cache-dir" in install
    assert "ray" in VERSIONS and "mamba-ssm" in VERSIONS


def test_commands_are_shell_and_clean_up(dockerfile):
    for name, rest in dockerfile:
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest
            if "apt-get" in rest:
                assert "apt-get update" in rest and "rm -rf /var/lib/apt/lists/*" in rest
                assert "--yes --no-install-recommends" in rest


def test_the_image_is_nobodys_root_and_fits_the_cluster_files(dockerfile):
    users = [rest for name, rest in dockerfile if name == "USER"]
    assert users == ["1000"], "a number: Kubernetes' runAsNonRoot cannot read a name"
    last = stages(dockerfile)[0][""][1:]
    assert last.index(("USER", "1000")) < last.index(("RUN", "mamtra search --space demo --run check --dry-run"))
    assert last[-1] == ("CMD", '["mamtra"]')
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    cluster = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == VERSIONS["ray"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert images == {f"registry.example.org/mamtra-ray:{__version__}"}
    assert text.count(f"--tag {images.pop()} .") == 2
