"""A command that is printed for a person to copy is `dinoray NAME`, which works in a checkout and without one."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from dinoray.jobs.__main__ import ORDER
from dinoray.jobs.cluster.plan_config import PlanConfig
from dinoray.jobs.studies.config import StudyConfig
from dinoray.models.commands import command

FILES = [path for layer in ("models", "pipeline", "jobs", "dinoray") for path in (ROOT / layer).rglob("*.py")]
CHECKOUT_ONLY = re.compile(rf"python -m jobs\b|\bjobs\.(?:NAME|{'|'.join(ORDER)})\b")
ALLOWED = {
    # Says itself that the form is for a checkout.
    "jobs/__main__.py": {
        "Commands; --help of each lists its arguments; in a checkout, `python -m jobs.NAME` is `dinoray NAME`:"
    },
    # The usage line of --help repeats the form in which the command was called.
    "jobs/cli/arguments.py": {"python -m jobs."},
    # Not printed: on a cluster, it runs a module of the code that was sent, not of an older installation there.
    "jobs/doctor.py": {"jobs.doctor"},
}
"""File -> its strings with a command of a checkout."""


def texts(tree: ast.Module) -> Iterator[str]:
    """All string constants, also those within f-strings, without docstrings of any kind."""
    docs = {
        id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in docs:
            yield node.value if isinstance(node.value, str) else node.value.decode(errors="replace")


def checkout_only(source: str) -> set[str]:
    return {text for text in texts(ast.parse(source)) if CHECKOUT_ONLY.search(text)}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("say(f'run python -m jobs.pack {path}')", {"run python -m jobs.pack "}),
        ("words = ['python', '-m', 'jobs.pretrain']", {"jobs.pretrain"}),
        ("x = 'a' 'or jobs.pack --shrink'", {"aor jobs.pack --shrink"}),
        ("x: int = 0\n'''What jobs.plan says.'''", set()),
        ("self._jobs.get(f'runs/jobs.parquet')", set()),
    ],
)
def test_a_command_of_a_checkout_is_found_in_strings_but_not_in_docstrings(
    source: str, found: set[str]
) -> None:
    assert checkout_only(source) == found


def test_no_text_in_the_code_names_a_command_that_only_a_checkout_has() -> None:
    found = {path.relative_to(ROOT).as_posix(): checkout_only(path.read_text()) for path in FILES}
    assert {name: strings for name, strings in found.items() if strings} == ALLOWED


@pytest.mark.parametrize("config", [StudyConfig, PlanConfig])
def test_no_description_of_a_setting_names_a_command_that_only_a_checkout_has(
    config: type[StudyConfig] | type[PlanConfig],
) -> None:
    """These are docstrings, but --help and --print-config show them."""
    schema = json.dumps(config.model_json_schema())
    assert "dinoray evaluate" in schema
    assert CHECKOUT_ONLY.findall(schema) == []


def names_of_commands(path: Path) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if ast.unparse(call.func) in ("command", "command_words") and call.args]
    return [first.value for call in named if isinstance(first := call.args[0], ast.Constant)]


def test_each_printed_command_is_one_that_there_is() -> None:
    found = {name for path in FILES for name in names_of_commands(path)}
    assert {"pretrain", "submit", "pack", "evaluate"} <= found
    assert found <= set(ORDER)


def test_arguments_of_a_command_are_quoted_for_a_shell() -> None:
    line = command("embed", "/my runs/first", "k=[1, 2]", "--out", "s3://b/e")
    assert line == "dinoray embed '/my runs/first' 'k=[1, 2]' --out s3://b/e"
    assert shlex.split(line)[2:4] == ["/my runs/first", "k=[1, 2]"]
