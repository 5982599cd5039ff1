"""Tests that the image of examples/llama2_7b has what the project requires, in fixed versions."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "examples" / "llama2_7b" / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Built for the image's CUDA and for each other.
OF_THE_IMAGE = {"torch", "numpy"}


def installed() -> dict[str, str]:
    """Returns the version of each package that the Dockerfile installs from an index."""
    commands = DOCKERFILE.replace("\\\n", " ").splitlines()
    pins = {}
    for command in commands:
        for call in re.findall(r"pip install ([^&|]*)", command):
            for word in call.split():
                if not word.startswith("-") and word != ".":
                    name, version = word.strip("'").split("==")
                    pins[canonicalize_name(name)] = version
    return pins


@pytest.mark.parametrize(
    "requirement",
    [
        *PROJECT["build-system"]["requires"],
        *PROJECT["project"]["dependencies"],
        PROJECT["project"]["optional-dependencies"]["hf"][0],  # transformers
    ],
)
def test_each_requirement_has_a_version_in_its_range(requirement: str) -> None:
    wanted = Requirement(requirement)
    name = canonicalize_name(wanted.name)
    if name in OF_THE_IMAGE:
        assert name not in installed() and name in DOCKERFILE
    else:
        assert wanted.specifier.contains(installed()[name]), f"{wanted} in the Dockerfile"


def test_the_image_gets_no_files_of_a_checkout_beside_its_sources() -> None:
    ignored = (ROOT / "examples/llama2_7b/Dockerfile.dockerignore").read_text().split()
    of_git = (ROOT / ".gitignore").read_text().split()
    missing = {line.strip("/") for line in of_git} - {line.removeprefix("**/") for line in ignored}
    assert not missing and ".git" in ignored
