"""The README and the guides tell the truth: their commands run, their tree is the tree, their errors are the code's."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import ROOT
from PIL import Image

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.recipes import RECIPE_NAMES
from dinoray.jobs.studies.config import StudyArguments, first_points, objective_of, space_of, study_config
from dinoray.models.errors import DinorayError, ResourceError
from dinoray.pipeline.training.verdict import Verdict

README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "jobs" / "README.md").read_text()
ADAPT = (ROOT / "jobs" / "ADAPT.md").read_text()
CODE = (ROOT / "pipeline" / "README.md").read_text()


def commands() -> list[str]:
    """Every command of every bash block, of the README and of the guides; one is a line, or several joined by \\."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README + GUIDE + ADAPT, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").strip().splitlines()]


def pretrain_commands() -> list[list[str]]:
    """The arguments of each `python -m jobs.pretrain` or `dinoray pretrain` in them."""
    found = [re.split(r"python -m jobs\.pretrain|dinoray pretrain", line, maxsplit=1) for line in commands()]
    return [shlex.split(parts[1]) for parts in found if len(parts) == 2]


def test_the_two_set_up_commands_are_one_line_each() -> None:
    assert "pip install -e . && python -m jobs.pretrain" in commands()
    assert "pip install -e '.[test]' && python -m pytest -n auto" in commands()


@pytest.mark.parametrize("arguments", pretrain_commands(), ids=" ".join)
def test_each_pretrain_command_is_a_valid_config(arguments: list[str], tmp_path: Path) -> None:
    recipe = arguments[arguments.index("--recipe") + 1] if "--recipe" in arguments else None
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    file = None
    if "--config" in arguments:  # which the page writes
        file = tmp_path / arguments[arguments.index("--config") + 1]
        (text,) = re.findall(rf'"{file.name}"\)\.write_text\("""(.*?)"""\)', ADAPT, flags=re.DOTALL)
        file.write_text(text)
    config = load_config(recipe, file, overrides)
    assert config.recipe == (recipe or "demo")
    for override in overrides:  # and each override is in force
        key, value = override.split("=", 1)
        found = config.model_dump(mode="json")
        for part in key.split("."):
            found = found[part]
        assert found == yaml.safe_load(value) or str(found).replace(" ", "").lower() == value.lower()


def other_job_commands() -> list[list[str]]:
    """The words of each `python -m jobs.<name>` that is not pretrain; so those of a `dinoray <name>`, too."""
    lines = [re.sub(r"^dinoray ", "python -m jobs.", line) for line in commands()]
    found = [shlex.split(line) for line in lines if line.startswith("python -m jobs.")]
    return [words for words in found if words[2] not in ("jobs.pretrain", "jobs.tune", "jobs.plan")]


def takes_a_run(words: list[str]) -> bool:
    return words[2] not in ("jobs.submit", "jobs.doctor")


@pytest.mark.parametrize("words", [*filter(takes_a_run, other_job_commands())], ids=" ".join)
def test_each_other_command_is_understood_and_wants_nothing_but_the_run_or_the_photos(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no runs
    with pytest.raises(DinorayError, match=r"runs/(demo|adapted)|PHOTOS") as error:
        importlib.import_module(words[2]).main(words[3:])
    assert "--help" not in str(error.value)


@pytest.mark.parametrize(
    "words", [words for words in other_job_commands() if not takes_a_run(words)], ids=" ".join
)
def test_each_command_for_a_cluster_is_understood_and_wants_nothing_but_the_cluster(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # where nothing is
    monkeypatch.chdir(ROOT)
    with pytest.raises((ResourceError, SystemExit)) as ended:
        importlib.import_module(words[2]).main(words[3:])
    assert "127.0.0.1:9 does not answer" in f"{capsys.readouterr().out}{ended.value}"


def test_the_python_in_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 200), (200, 90, 30)).save("cat.jpg")
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["crops"].global_crops.shape == (2, 224, 224, 3)
    assert names["crops"].local_crops.shape == (8, 96, 96, 3)


def tune_commands() -> list[list[str]]:
    """The arguments of each `python -m jobs.tune`."""
    return [shlex.split(line)[3:] for line in commands() if line.startswith("python -m jobs.tune")]


@pytest.mark.parametrize("arguments", tune_commands(), ids=" ".join)
def test_each_study_in_it_can_be_run(arguments: list[str]) -> None:
    parsed = StudyArguments().parse_args(arguments)
    config = study_config(parsed)
    space = space_of(config)
    assert first_points(config, space)
    assert objective_of(config, space).metric == "knn_20"
    assert f"runs/{config.name}" in GUIDE


def test_the_plan_in_it_is_what_its_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where it writes a file
    (command,) = [line for line in commands() if line.startswith("python -m jobs.plan")]
    importlib.import_module("jobs.plan").main(shlex.split(command)[3:])
    shown = README.split(command)[1].split("```")[2].strip().splitlines()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line != "..." and line not in printed] == []
    assert (tmp_path / "cluster.filled.yaml").exists()
    assert printed[-1] in commands()  # step 4 is that command, word for word


def test_every_job_has_a_command() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py") if "run_main(main)" in path.read_text()}
    assert jobs == {words[2].removeprefix("jobs.") for words in other_job_commands()} | {
        "pretrain",
        "tune",
        "plan",
    }


def test_every_recipe_has_a_row() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", README.split("## Recipes")[1].split("## ")[0], flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(RECIPE_NAMES)


def test_the_tree_names_every_module_and_nothing_else() -> None:
    tree = CODE.rpartition("```\nmodels/")[2]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {p.name for d in ("models", "pipeline", "jobs", "dinoray") for p in (ROOT / d).rglob("*.py")} - {
        "__init__.py"
    }
    assert named == there


def test_the_run_directory_is_drawn_as_it_is() -> None:
    from dinoray.pipeline.storage import run_dir
    from dinoray.pipeline.training import checkpoint

    drawn = GUIDE.split("## What a run leaves behind")[1].split("## Crops from Python")[0]
    for name in re.findall(r"[\w.]+\.(?:json|jsonl|yaml|png|parquet|pt)\b", checkpoint.__doc__ or ""):
        if name != run_dir.SNAPSHOT:
            assert name in drawn, name


def test_the_readme_is_read_in_one_go() -> None:
    assert len(README.splitlines()) < 200


def test_what_is_linked_and_shown_is_there() -> None:
    for page, text in ((ROOT, README), (ROOT / "jobs", GUIDE + ADAPT), (ROOT / "pipeline", CODE)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page / target).exists(), target


def sentences() -> list[str]:
    """All text in the code, with … for what is filled in."""
    found = []
    for path in (p for d in ("models", "pipeline", "jobs", "dinoray") for p in (ROOT / d).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(parts))
    return found


def messages() -> list[str]:
    """What the README explains: the first column of its table of messages."""
    return re.findall(r"^\| `([^`]+)` \|", README.split("## Messages")[1], flags=re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_each_message_that_is_explained_is_one_that_the_code_has(message: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    for verdict in Verdict:  # the code fills its name in
        if message.startswith(verdict.value):
            pattern = f"…{message.removeprefix(verdict.value).replace(' …', '')}"
    assert any(re.search(pattern, text, flags=re.DOTALL) for text in sentences())


def test_there_are_messages_to_explain() -> None:
    assert len(messages()) >= 6
