"""What is installed is bounded from both sides: what was tried, up to what may break it."""

import sys

import pytest
from packaging.requirements import Requirement
from paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {"dependencies": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
LINES = [(group, line) for group, lines in GROUPS.items() for line in lines]


@pytest.mark.parametrize(("group", "line"), LINES, ids=" ".join)
def test_each_dependency_has_a_lower_and_an_upper_bound(group: str, line: str) -> None:
    required = Requirement(line)
    if required.name == PROJECT["name"]:
        assert required.extras <= set(GROUPS)
        return
    operators = {bound.operator for bound in required.specifier}
    assert operators == {">=", "<"}, f"{group}: {line}"


def test_python_has_both_too() -> None:
    assert {bound.operator for bound in Requirement(f"x{PROJECT['requires-python']}").specifier} == {
        ">=",
        "<",
    }
