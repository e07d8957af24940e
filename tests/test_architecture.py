"""The layers hold: jobs -> pipeline -> models -> torch, and Ray in its few places. Sources are parsed, not run.

One test per rule, which lists the files that break it.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from paths import ROOT
from ray_files import RAY_FILES

LAYERS = ("models", "pipeline", "jobs", "dinoray")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("**/*.py"))]
OTHER_FILES = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).glob("**/*.py"))]
_TRAINING = "models published storage data augment training"
_RUN = "models storage cluster data tracking training stream"
_PAGES = "models storage data augment tracking training figures"
ROOMS = {
    "models": "",
    "models/published": "models",
    "pipeline/ray_private": "models",
    "pipeline/storage": "models ray_private",
    "pipeline/cluster": "models ray_private",
    "pipeline/data": "models storage",
    "pipeline/data/decoding": "models data",
    "pipeline/data/listing": "models storage data decoding",
    "pipeline/data/parquet": "models storage data decoding listing",
    "pipeline/data/tar": "models storage listing",
    "pipeline/data/manifests": "models storage data listing parquet tar",
    "pipeline/data/reading": "models storage data decoding listing parquet manifests",
    "pipeline/augment": "models storage data",
    "pipeline/tracking": "models storage augment",
    "pipeline/training": "models published storage data augment",
    "pipeline/stream": "models storage cluster data augment ray_private",
    "pipeline/figures": "models storage data augment tracking training",
    "pipeline/planning": "models data augment training",
    "pipeline/evaluation": _PAGES,
    "pipeline/reporting": _PAGES,
    "pipeline/worker": f"{_TRAINING} cluster tracking stream evaluation reporting ray_private",
    "pipeline/export": f"{_TRAINING} tracking evaluation",
    "pipeline/study": "models storage tracking training",
    "pipeline/study/findings": "models study tracking training",
    "pipeline/study/page": "models storage tracking figures reporting study findings",
    "pipeline/study/search": "models storage cluster training study findings ray_private",
    "jobs/cli": "models storage cluster data training worker study ray_private",
    "jobs/runs": "models storage cluster data augment tracking training stream figures planning evaluation reporting "
    "worker export study cli",
    "jobs/studies": f"{_RUN} reporting worker study findings page search cli runs",
    "jobs/cluster": "models storage cluster data augment tracking planning evaluation worker study cli runs studies "
    "ray_private",
}
"""Room -> the rooms that it imports, each of them above it in this list. The commands in jobs/, and dinoray/ for
notebooks, import any."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    """Later tests of this process do without a million nodes, which each full garbage collection visits."""
    yield
    parse.cache_clear()
    nodes.cache_clear()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), name_of(path))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(parse(path)))


@cache
def imports(path: Path) -> set[str]:
    """Full names of all modules and names that a file imports, at any depth, under `if` or in functions; ours without
    `dinoray.` before them."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("dinoray.") for name in found}


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def layer(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def all_of(*layers: str) -> list[Path]:
    return [path for path in FILES if layer(path) in layers]


def offenders(files: Iterable[Path], breaks: Callable[[Path], object]) -> dict[str, object]:
    """Name -> what is wrong there, of the files that break a rule."""
    found = {name_of(path): breaks(path) for path in files}
    return {name: what for name, what in found.items() if what}


def test_there_is_something_to_look_at() -> None:
    assert {layer(path) for path in FILES} == set(LAYERS)
    assert len(FILES) > 25
    assert "ray" in packages(ROOT / "pipeline" / "worker" / "worker.py")


def room_of(path: str) -> str:
    """The room of a file, by its path from the root; the kernels are part of augment."""
    folder = path.rpartition("/")[0]
    return "pipeline/augment" if folder == "pipeline/augment/kernels" else folder


def imported_rooms(path: Path) -> set[str]:
    """The rooms, other than its own, that a file imports something of."""
    found = set()
    for name in imports(path):
        # The longest part of the name that is a file.
        parts = name.split(".")
        files = ["/".join(parts[:n]) + ".py" for n in range(len(parts), 0, -1)]
        found |= {room_of(file) for file in files if (ROOT / file).exists()}
    if not name_of(path).startswith("pipeline/data/"):  # one room to all others
        found = {"pipeline/data" if room.startswith("pipeline/data/") else room for room in found}
    return found - {room_of(name_of(path))}


def test_each_file_is_in_a_room() -> None:
    rooms = {room_of(name_of(path)) for path in FILES if path.name != "__init__.py"}
    assert rooms == {*ROOMS, "jobs", "dinoray"}


def test_rooms_import_the_rooms_that_the_table_says() -> None:
    short = {room.rpartition("/")[2]: room for room in ROOMS if room != "jobs/cluster"}
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in FILES:
        if room_of(name_of(path)) in ROOMS:
            found[room_of(name_of(path))] |= imported_rooms(path)
    assert found == {room: {short[name] for name in names.split()} for room, names in ROOMS.items()}


def test_rooms_import_one_way() -> None:
    order = list(ROOMS)
    seen = {name_of(path): imported_rooms(path) for path in FILES if room_of(name_of(path)) in ROOMS}
    up = {
        name: above
        for name, rooms in seen.items()
        if (above := [room for room in rooms if order.index(room) >= order.index(room_of(name))])
    }
    assert up == {}


def test_models_know_torch_and_timm_alone() -> None:
    allowed = {"models", "torch", "timm", "pydantic", "numpy"} | sys.stdlib_module_names
    assert offenders(all_of("models"), lambda path: packages(path) - allowed) == {}


def test_nothing_below_knows_the_jobs() -> None:
    assert offenders(all_of("models", "pipeline"), lambda path: packages(path) & {"jobs"}) == {}


def test_jobs_with_a_main_are_imported_by_nobody() -> None:
    roots = {
        f"jobs.{path.stem}"
        for path in all_of("jobs")
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in parse(path).body)
    }
    assert "jobs.pretrain" in roots

    def imported(path: Path) -> set[str]:
        names = imports(path)
        return {root for root in roots for name in names if name == root or name.startswith(f"{root}.")}

    assert offenders(FILES, imported) == {}


def test_ray_is_known_in_few_places_alone() -> None:
    below = all_of("models", "pipeline")
    assert {name_of(path) for path in below if "ray" in packages(path)} == RAY_FILES


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        (
            "data",
            {"pipeline/stream/ray_data.py", "pipeline/evaluation/actors.py", "pipeline/ray_private/data.py"},
        ),
        (
            "train",
            {
                *(f"pipeline/worker/{name}.py" for name in ("worker", "fit", "restoring", "saving")),
                *(
                    f"pipeline/ray_private/train_{name}.py"
                    for name in ("checkpoints", "controller", "policies")
                ),
            },
        ),
        (
            "tune",
            {
                *(f"pipeline/study/search/{name}.py" for name in ("tuner", "tuning", "population")),
                "pipeline/ray_private/tune.py",
            },
        ),
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
            for node in nodes(path)
        )

    assert {name_of(path) for path in FILES if uses(path)} == owners


def test_no_file_is_longer_than_300_lines_besides_its_imports() -> None:
    def too_long(path: Path) -> int:
        top = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        lines = len(path.read_text().splitlines()) - sum(
            n.end_lineno - n.lineno + 1 for n in top if n.end_lineno
        )
        return lines if lines > 300 else 0

    assert offenders(FILES, too_long) == {}


def test_no_test_file_is_longer_than_400_lines() -> None:
    def too_long(path: Path) -> int:
        lines = len(path.read_text().splitlines())
        return lines if lines > 400 else 0

    assert offenders([path for path in OTHER_FILES if layer(path) == "tests"], too_long) == {}


def test_a_file_is_named_after_what_is_in_it() -> None:
    vague = re.compile(r"(^|_)(utils?|common|helpers?|base|misc)(_|$)")
    assert offenders(FILES + OTHER_FILES, lambda path: vague.search(path.stem)) == {}


def test_a_module_says_what_it_is() -> None:
    assert offenders(FILES + OTHER_FILES, lambda path: not ast.get_docstring(parse(path))) == {}


def test_what_is_public_says_what_it_does() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

    def silent(path: Path) -> list[str]:
        public = [node for node in parse(path).body if isinstance(node, kinds) and node.name[0] != "_"]
        return [node.name for node in public if not ast.get_docstring(node)]

    assert offenders(FILES, silent) == {}


def test_nothing_is_left_to_do_and_nothing_is_printed() -> None:
    def left(path: Path) -> set[str]:
        calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
        printing = {call.id for call in calls if isinstance(call, ast.Name)} & {"print", "breakpoint"}
        return printing | set(re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", path.read_text()))

    assert offenders(all_of("models", "pipeline"), left) == {}


# Config


@cache
def settings_classes() -> dict[str, ast.ClassDef]:
    """All config sections by name: what derives from Settings, directly or not."""
    classes = [node for path in FILES for node in nodes(path) if isinstance(node, ast.ClassDef)]
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


@cache
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


def test_every_setting_is_read_by_something_else_than_its_declaration() -> None:
    assert [one for one in ALL_FIELDS if not reads().get(one[1], set()) - {one[0]}] == []


def test_every_setting_explains_itself() -> None:
    silent = []
    for section in ALL_SECTIONS:
        body = settings_classes()[section].body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign):
                continue
            classes = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
            if classes & settings_classes().keys():
                continue  # a section: its own class says what it is
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                silent.append(f"{section}.{ast.unparse(node.target)}")
    assert silent == []


def test_private_names_of_ray_are_used_in_their_room_alone() -> None:
    public = {"_replace", "_asdict", "_fields", "_exit", "_current_frames"}  # of named tuples, os and sys

    def private(path: Path) -> set[str]:
        """Private modules of Ray that are imported, and private attributes of what is not this object or module."""
        modules = {name for name in imports(path) if name.startswith("ray.") and "._" in name}
        return modules | {
            ast.unparse(node)
            for node in nodes(path)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.endswith("_")
            and node.attr not in public
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        }

    files = [path for path in FILES if "ray" in packages(path)]
    inside = {name_of(path) for path in files if private(path)}
    assert {"pipeline/ray_private/core.py", "pipeline/ray_private/data.py"} <= inside
    assert offenders([path for path in files if path.parent.name != "ray_private"], private) == {}
