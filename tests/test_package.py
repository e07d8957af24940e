"""The installed package, the `dinoray` command, and what README shows for a notebook."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from cluster_lints import RAY
from jobs_processes import TINY
from paths import ROOT
from PIL import Image
from ray_head import RayHead
from test_dependencies import tomllib
from tiny_run import STEP, write_images, write_run

import dinoray
from dinoray.__main__ import console, main
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import embed_source
from dinoray.pipeline.training.checkpoint import read_frozen

FOLDERS = ("models", "pipeline", "jobs")


def python(*arguments: str, cwd: Path, env: dict[str, str] | None = None, code: int = 0) -> str:
    """Run this Python in `cwd`, where it finds only what `env` and `cwd` let it find; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env={"PATH": "/usr/bin:/bin", **(env or {})}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


def test_all_packages_are_installed() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inits = [path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    there = {f"dinoray.{folder.relative_to(ROOT).as_posix().replace('/', '.')}" for folder in inits}
    assert set(told["packages"]) == there | {"dinoray"}
    assert told["package-dir"] == {"dinoray": "dinoray"} | {f"dinoray.{name}": name for name in FOLDERS}


def test_types_are_checked_in_all_files() -> None:
    links = ROOT / ".ci" / "mypy" / "dinoray"
    ours = [ROOT / name for name in FOLDERS] + list((ROOT / "dinoray").glob("*.py"))
    assert {link.name: link.resolve() for link in links.iterdir()} == {path.name: path for path in ours}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as pip installs it, without its dependencies."""
    folder, source = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "dinoray"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # a copy: pip leaves its build in the tree
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_it_works_in_a_project_with_modules_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    env = {"PYTHONPATH": str(installed)}
    assert str(installed) in python("-m", "dinoray", "--version", cwd=tmp_path, env=env)
    assert "usage: dinoray pretrain" in python("-m", "dinoray", "pretrain", "--help", cwd=tmp_path, env=env)
    code = "import dinoray, dinoray.notebook; print(dinoray.notebook.__file__, dinoray.load_teacher.__name__)"
    assert python("-c", code, cwd=tmp_path, env=env).split() == [
        str(installed / "dinoray" / "notebook.py"),
        "load_teacher",
    ]


@pytest.mark.slow
def test_the_code_in_the_current_folder_comes_before_an_installation(installed: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(installed)}
    for command in (["-m", "dinoray"], [str(installed / "bin" / "dinoray")]):
        assert python(*command, "--version", cwd=ROOT, env=env).split()[-1] == str(ROOT / "dinoray")
        assert python(*command, "--version", cwd=tmp_path, env=env).split()[-1] == str(installed / "dinoray")
    code = "import dinoray.models.errors as errors; print(errors.__file__)"
    assert python("-c", code, cwd=ROOT, env=env).strip() == str(ROOT / "models" / "errors.py")


@pytest.mark.slow
def test_the_doctor_of_an_installation_refuses_a_ray_below_the_bound(installed: Path, tmp_path: Path) -> None:
    code = "from dinoray.jobs.cluster.machine_checks import check_packages; print(*check_packages())"
    found = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert f"ray {ray.__version__}," in found
    (tmp_path / "ray-2.57.1.dist-info").mkdir()
    (tmp_path / "ray-2.57.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ray\nVersion: 2.57.1\n"
    )
    found = python("-c", code, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{installed}"})
    assert re.search(
        rf"ray is 2\.57\.1, wanted {re.escape(str(RAY))}: pip install 'ray\[[\w,]+\]{re.escape(str(RAY))}'",
        found,
    )


def test_a_command_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: pretrian is not a command; did you mean pretrain?; dinoray --help lists the commands"
    )
    assert main(["report"]) == 2
    assert "; pretrain writes report.html into the run directory, " in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "\n  pretrain " in capsys.readouterr().out


def test_a_command_runs_as_its_module_does(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "dinoray", "pretrain", "optim.base_lr=fast"],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: optim.base_lr='fast': must be a number")


def test_the_console_command_is_the_module_in_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr("os.execv", lambda *arguments: called.extend(arguments))
    monkeypatch.setattr(sys, "argv", ["/bin/dinoray", "plan", "--help"])
    console()
    assert called == [sys.executable, [sys.executable, "-m", "dinoray", "plan", "--help"]]


# Notebooks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "tiny")


def test_a_teacher_is_a_timm_model_whose_features_are_those_of_the_evaluations(
    run: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path / "images", "val", labels=tuple(PATTERNS)[:2], per_label=3)
    files = sorted(images.rglob("*.jpg"))
    model, transform = dinoray.load_teacher(run)
    with torch.inference_mode():
        features = model(torch.stack([transform(Image.open(file)) for file in files])).numpy()
    np.testing.assert_array_equal(dinoray.embed(run, files, batch_size=4), features)
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    source = Source(config := DataConfig(path=str(images)), build_manifest(config))
    frozen = read_frozen(checkpoint)
    ours = embed_source(
        frozen.backbone(),
        source,
        np.arange(len(files)),
        frozen.config.crops,
        EvalConfig(),
        precision="fp32",
        labelled=False,
    )
    np.testing.assert_allclose(features, ours.features, rtol=1e-3, atol=1e-3)
    student = dinoray.load_teacher(checkpoint, which="student")[0]
    with torch.inference_mode():
        assert not np.allclose(student(torch.zeros(1, 3, 32, 32)), model(torch.zeros(1, 3, 32, 32)))


def test_images_that_cannot_be_read_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.jpg cannot be decoded: .*; leave it out"):
        dinoray.embed(run, [tmp_path / "bad.jpg"])
    with pytest.raises(DataError, match=r"there is no such file"):
        dinoray.embed(run, [tmp_path / "none.jpg"])
    assert dinoray.embed(run, []).shape == (0, dinoray.load_teacher(run)[0].num_features)
    with pytest.raises(ConfigError, match=rf"step={STEP + 1} is not among"):
        dinoray.load_teacher(run, step=STEP + 1)


def test_metrics_are_a_table_with_one_row_per_step(tmp_path: Path) -> None:
    lines = [
        '{"step": 4, "loss": 2.0}',
        '{"step": 0, "knn_5": 0.5}',
        '{"step": 4, "knn_5": 0.7}',
        '{"step": 4,',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    table = dinoray.read_metrics(tmp_path)
    assert table.index.tolist() == [0, 4]
    assert table["knn_5"].tolist() == [0.5, 0.7]
    assert table["loss"].isna().tolist() == [True, False]
    with pytest.raises(DataError, match=r"holds no metrics; give the directory that a run printed"):
        dinoray.read_metrics(tmp_path / "elsewhere")


@pytest.mark.nightly  # beside what is above, and the run of a job that it starts
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_notebook_trains_and_reads_what_came_of_it(cluster: RayHead, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "train", labels=tuple(PATTERNS)[:2], per_label=8)
    settings = [*TINY, "name=note", f"data.path={images}", f"storage_path={tmp_path}", "train.epochs=1"]
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    code = block.replace('"data.path=PHOTOS", "name=first"', f"*{settings!r}")
    code = code.replace('["a.jpg", "b.jpg"]', repr([str(file) for file in sorted(images.rglob("*.jpg"))[:2]]))
    code += "print(run, dinoray.read_metrics(run)['loss'].iloc[-1] > 0, len(features), model.num_features)"
    env = cluster.env | {"RAY_ADDRESS": cluster.gcs, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    *_, last = python("-c", code, cwd=tmp_path, env=env).splitlines()
    where, has_loss, num_features, _ = last.split()
    assert (where, has_loss, num_features) == (str(tmp_path / "note"), "True", "2")
