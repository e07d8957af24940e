"""`python -m jobs` lists every command."""

from fresh_python import run_python
from paths import ROOT

from dinoray.jobs.__main__ import ORDER, describe_commands

JOBS = ROOT / "jobs"


def test_every_command_is_listed_with_its_purpose_and_usage() -> None:
    commands = {file.stem for file in JOBS.glob("*.py") if "run_main(main)" in file.read_text()}
    assert set(ORDER) == commands
    lines = describe_commands().splitlines()[1:]
    for name, purpose, usage in zip(ORDER, lines[::2], lines[1::2], strict=True):
        assert purpose.split()[0] == name
        assert len(purpose.split()) > 3
        assert usage.strip().startswith(f"dinoray {name} ")


def test_the_list_imports_no_command() -> None:
    code = "import runpy, sys; runpy.run_module('jobs', run_name='__main__'); print('ray' in sys.modules)"
    assert run_python(code).splitlines()[-1] == "False"
