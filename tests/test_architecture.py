"""The layers hold: jobs -> pipeline -> models -> torch, and Ray in its few places. Sources are parsed, not run."""

import ast
import re
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("models", "pipeline", "jobs")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("**/*.py"))]
OTHER_FILES = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).glob("**/*.py"))]
RAY_MODULES = {
    f"pipeline/{name}.py"
    for name in (
        *("dataset", "shared_stream", "worker", "worker_spec", "board", "pool", "nodes", "gauges"),
        *("study/tuner", "study/tuning", "study/population"),
    )
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@lru_cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), name_of(path))


def imports(path: Path) -> set[str]:
    """Full names of all modules and names that a file imports, at any depth, under `if` or in functions."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def all_of(*layers: str) -> list[Path]:
    return [path for path in FILES if layer(path) in layers]


def test_there_is_something_to_look_at() -> None:
    assert {layer(path) for path in FILES} == set(LAYERS)
    assert len(FILES) > 25
    assert "ray" in packages(ROOT / "pipeline" / "worker.py")


@pytest.mark.parametrize("path", all_of("models"), ids=name_of)
def test_models_know_torch_and_timm_alone(path: Path) -> None:
    allowed = {"models", "torch", "timm", "pydantic", "numpy"} | sys.stdlib_module_names
    assert packages(path) <= allowed


@pytest.mark.parametrize("path", all_of("models", "pipeline"), ids=name_of)
def test_nothing_below_knows_the_jobs(path: Path) -> None:
    assert "jobs" not in packages(path)


def test_jobs_with_a_main_are_imported_by_nobody() -> None:
    roots = {
        f"jobs.{path.stem}"
        for path in all_of("jobs")
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in parse(path).body)
    }
    assert "jobs.pretrain" in roots
    for path in FILES:
        names = imports(path)
        assert not {root for root in roots for name in names if name == root or name.startswith(f"{root}.")}


@pytest.mark.parametrize("path", all_of("models", "pipeline"), ids=name_of)
def test_ray_is_known_in_few_places_alone(path: Path) -> None:
    assert ("ray" in packages(path)) is (name_of(path) in RAY_MODULES)


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        ("data", {"pipeline/dataset.py"}),
        ("train", {"pipeline/worker.py"}),
        ("tune", {"pipeline/study/tuner.py", "pipeline/study/tuning.py", "pipeline/study/population.py"}),
    ],
)
def test_each_ray_library_has_its_users_and_no_others(library: str, owners: set[str]) -> None:
    def uses(path: Path) -> bool:
        return any(
            name == f"ray.{library}" or name.startswith(f"ray.{library}.") for name in imports(path)
        ) or any(
            isinstance(node, ast.Attribute)
            and node.attr == library
            and isinstance(node.value, ast.Name)
            and node.value.id == "ray"
            for node in ast.walk(parse(path))
        )

    assert {name_of(path) for path in FILES if uses(path)} == owners


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_longer_than_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", FILES + OTHER_FILES, ids=name_of)
def test_a_file_is_named_after_what_is_in_it(path: Path) -> None:
    assert not re.search(r"(^|_)(utils?|common|helpers?|base|misc)(_|$)", path.stem)


@pytest.mark.parametrize("path", FILES + OTHER_FILES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parse(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_public_says_what_it_does(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in parse(path).body if isinstance(node, kinds) and node.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", all_of("models", "pipeline"), ids=name_of)
def test_nothing_is_left_to_do_and_nothing_is_printed(path: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id in {"print", "breakpoint"} for call in calls)


# Config


@lru_cache(maxsize=1)
def settings_classes() -> dict[str, ast.ClassDef]:
    """All config sections by name: what derives from Settings, directly or not."""
    classes = [node for path in FILES for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    found: dict[str, ast.ClassDef] = {}
    known = {"Settings"}
    while True:
        new = [c for c in classes if c.name not in known and known & {ast.unparse(b) for b in c.bases}]
        if not new:
            return found
        found |= {c.name: c for c in new}
        known |= {c.name for c in new}


def fields_of(section: str) -> list[str]:
    return [
        node.target.id
        for node in settings_classes()[section].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def sections_of_a_run(section: str = "StudyConfig") -> set[str]:
    """`StudyConfig`, what it derives from (all of a run), and the sections in it, recursively."""
    classes = settings_classes()
    named = {ast.unparse(base) for base in classes[section].bases}
    for node in classes[section].body:
        if isinstance(node, ast.AnnAssign):
            named |= {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
    return {section}.union(*(sections_of_a_run(name) for name in named & classes.keys()))


ALL_SECTIONS = sorted(sections_of_a_run() | sections_of_a_run("PlanConfig"))
ALL_FIELDS = [(section, field) for section in ALL_SECTIONS for field in fields_of(section)]


def test_the_tree_of_configs_is_found() -> None:
    assert {
        "Config",
        "StudySettings",
        "PlanSettings",
        "DINOConfig",
        "OptimConfig",
        "CropsConfig",
        "DataConfig",
        "ResourcesConfig",
    } <= set(ALL_SECTIONS)
    assert ("OptimConfig", "clip_grad") in ALL_FIELDS
    assert len(ALL_FIELDS) > 80


@lru_cache(maxsize=1)
def reads() -> dict[str, set[str]]:
    """Attribute name -> the classes in which it is read, "" standing for everywhere else."""
    found: dict[str, set[str]] = {}

    def walk(node: ast.AST, inside: str) -> None:
        if isinstance(node, ast.ClassDef):
            inside = node.name
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.setdefault(node.attr, set()).add(inside)
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    for path in FILES:
        walk(parse(path), "")
    return found


@pytest.mark.parametrize(("section", "field"), ALL_FIELDS)
def test_every_setting_is_read_by_something_else_than_its_declaration(section: str, field: str) -> None:
    assert reads().get(field, set()) - {section}


@pytest.mark.parametrize("section", ALL_SECTIONS)
def test_every_setting_explains_itself(section: str) -> None:
    body = settings_classes()[section].body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        classes = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
        if classes & settings_classes().keys():
            continue  # a section: its own class says what it is
        explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        assert explained, f"{section}.{ast.unparse(node.target)} has no docstring below it"
