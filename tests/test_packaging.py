"""What an installed wheel needs is in it, and the pins agree with the bounds."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}


def requirements() -> list[str]:
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [line for line in lines if not line.startswith("ernie-train")]


@pytest.mark.parametrize("package", ["ernie_model", "data", "train", "configs", "vllm_plugin"])
def test_every_data_file_matches_a_package_data_pattern(package):
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["*"]
    assert package in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    for path in (ROOT / package).rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert any(fnmatch(path.name, pattern) for pattern in patterns), path


@pytest.mark.parametrize("line", requirements())
def test_every_dependency_has_a_lower_bound_and_a_pin_inside_its_bounds(line):
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    assert any(part.operator == ">=" for part in requirement.specifier), line
    pin = PINS[requirement.name.lower().replace("_", "-")]
    assert requirement.specifier.contains(pin), f"constraints.txt pins {requirement.name}=={pin}"


def test_the_pins_name_no_place():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and "@" not in text and "/" not in text
    assert "+" not in PINS["torch"]  # a local build does not exist elsewhere
