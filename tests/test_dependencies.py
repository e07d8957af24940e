"""What is installed is bounded from both sides: what was tried, up to what may break it."""

import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from paths import ROOT
from ray_releases import TRIED, minor

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


def test_ray_is_bounded_by_the_oldest_release_that_was_tried_and_images_have_the_newest() -> None:
    (bounds,) = [one.specifier for one in map(Requirement, PROJECT["dependencies"]) if one.name == "ray"]
    assert sorted(TRIED, key=Version) == TRIED
    assert [bound.version for bound in bounds if bound.operator == ">="] == [minor(TRIED[0])]
    assert all(release in bounds for release in TRIED)
    assert f"FROM rayproject/ray:{TRIED[-1]}-" in (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"image: rayproject/ray:{TRIED[-1]}-" in (ROOT / "cluster.yaml").read_text()


def test_python_has_both_too() -> None:
    assert {bound.operator for bound in Requirement(f"x{PROJECT['requires-python']}").specifier} == {
        ">=",
        "<",
    }
