"""What is written about the release: its name, its versions, its locked packages."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mamtra_ray import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_package_of_every_extra_is_locked_to_a_version_that_it_allows():
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    locked = {canonicalize_name(name): version for name, version in lines}
    extras = PROJECT["optional-dependencies"]
    asked = [
        Requirement(text) for text in (*PROJECT["dependencies"], *(text for one in extras.values() for text in one))
    ]
    for requirement in asked:
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= set(extras)
        else:
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), requirement


def test_every_extra_that_a_page_or_a_message_names_is_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "mamtra_ray").rglob("*.py"), ROOT / "Makefile"]
    named = {
        name
        for page in pages
        for names in re.findall(r"(?:mamtra-ray|'\.|whl)\[([\w,-]+)\]", page.read_text())
        for name in names.split(",")
    }
    assert {"demo", "gguf", "quality"} <= named <= set(PROJECT["optional-dependencies"])


def test_names_and_versions_agree():
    assert f"mamtra_ray-{__version__}-py3-none-any.whl" in (ROOT / "README.md").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    named = [entry.rpartition(":: ")[2] for entry in PROJECT["classifiers"] if ":: Python :: 3." in entry]
    assert (
        named
        == [f"3.{minor}" for minor in range(20) if f"3.{minor}.0" in SpecifierSet(PROJECT["requires-python"])][
            : len(named)
        ]
    )
    assert f"Python {named[0]} to {named[-1]}" in (ROOT / "README.md").read_text()
    said = subprocess.run([sys.executable, "-m", "mamtra_ray", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"mamtra_ray {__version__}\n"
