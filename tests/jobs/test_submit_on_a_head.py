"""`python -m jobs.submit` on a real head: a run stopped and continued, exit codes, and the doctor on the nodes."""

import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from jobs_processes import TINY, start_job
from paths import ROOT
from ray_head import RAY, RayHead, ray_head
from submission import MARKER, submit

from dinoray.jobs.cluster.job_server import attempts_at, connect
from dinoray.jobs.cluster.upload import list_files
from dinoray.jobs.runs.commit import commit_of
from dinoray.models.errors import DinorayError
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_checkpoints
from dinoray.pipeline.tracking.records import read_mapping

STEPS = 96
"""So many that a run which is asked to stop after its first checkpoint has not ended before it hears."""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository's code with a `.env` in it, committed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in [*list_files(ROOT, []), "deploy/runtime_env.yaml"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    (folder / ".env").write_text(f"AWS_SECRET_ACCESS_KEY={MARKER}\n")
    for words in (["init", "-q"], ["add", "README.md"], ["commit", "-qm", "first"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def on_head(head: RayHead, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> RayHead:
    """This process stands in the checkout, and its Ray clients go to the head."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.dashboard)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", MARKER)
    monkeypatch.chdir(checkout)
    return head


def job(tmp_path: Path, name: str, *more: str) -> list[str]:
    """A pretraining of STEPS steps on local images."""
    for i in range(24):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{i}.jpg").write_bytes(draw_demo_image(list(PATTERNS)[i % 2], "train", i))
    arguments = [*TINY, f"name={name}", f"data.path={tmp_path}/images", f"storage_path={tmp_path}/runs"]
    arguments += ["data.label_from_parent=false", "eval.val_path=null", f"train.epochs={STEPS // 3}"]
    arguments += ["crops.kernel=torch", "checkpoint.every_steps=16", "resources.train_workers=1", *more]
    return ["--", "python", "-m", "jobs.pretrain", *arguments]


@pytest.mark.nightly  # beside tests/jobs/test_submit.py
@pytest.mark.ray
@pytest.mark.slow
def test_a_stopped_run_is_continued_by_the_same_command_and_a_finished_one_left_alone(
    on_head: RayHead, checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, run = job(tmp_path, "first"), f"{tmp_path}/runs/first"
    submit("--no-wait", *command)
    assert re.search(r"first-a1: sending 0\.\d MB in \d+ files", capsys.readouterr().out)

    variables = {**on_head.env, "PYTHONPATH": str(checkout)}
    with start_job("jobs.submit", *command, env=variables, cwd=checkout) as follower:
        committed = follower.wait_until(lambda: committed_checkpoints(Directory(run)))
        submit("--stop", *command)
        assert "first-a1 stopped" in capsys.readouterr().out
        assert follower.wait() == 1
    assert read_mapping(Directory(run), "environment.json")["git_commit"] == commit_of(checkout) is not None
    # A job that was sent a moment ago may still be starting.
    assert re.search(r"first-a1 is (pending|running) since", follower.output)
    assert f"step 1/{STEPS}" in follower.output
    assert "stopped; the same command resumes from" in follower.output
    assert "Traceback" not in follower.output

    submit(*command)
    continued = capsys.readouterr().out
    assert continued.startswith("first-a1 stopped")
    resumed = re.search(r"resuming from step (\d+)", continued)
    assert resumed
    assert int(committed[-1].removeprefix("step_")) <= int(resumed[1]) < STEPS
    assert f"step {STEPS}/{STEPS}" in continued
    assert continued.rstrip().splitlines()[-1].startswith("first-a2 succeeded")
    assert json.loads(Path(run, "result.json").read_text())["steps"] == STEPS

    submit(*command)
    assert "first is done: first-a2 succeeded" in capsys.readouterr().out
    with pytest.raises(DinorayError, match=r"first had 2 attempts, first-a2 succeeded.*--max-attempts 3"):
        submit("--max-attempts=2", *command, f"train.epochs={STEPS}")
    submit("--stop", *command)
    assert "first is not running: first-a2 succeeded" in capsys.readouterr().out
    submit("--status", "--run", "first")
    assert re.findall(r"^(first-a\d) (\w+)", capsys.readouterr().out, flags=re.MULTILINE) == [
        ("first-a1", "stopped"),
        ("first-a2", "succeeded"),
    ]

    # Neither .env nor the environment of whoever submits is anywhere to be found.
    (attempt, _) = attempts_at(connect(on_head.dashboard), "first")
    assert attempt.info.metadata["run"] == "first"
    assert MARKER not in attempt.info.model_dump_json()
    assert MARKER not in continued
    everywhere = [*on_head.temp_dir.rglob("*"), *(tmp_path / "runs").rglob("*")]
    files = [file for file in everywhere if file.is_file()]
    assert any(file.name == "pretrain.py" for file in files)
    assert [file for file in files if MARKER.encode() in file.read_bytes()] == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_exit_code_is_the_jobs_own(
    on_head: RayHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        submit(*job(tmp_path, "nothing", f"data.path={tmp_path}/none"))
    assert ended.value.code == 3
    output = capsys.readouterr().out
    assert f"error: data.path={tmp_path}/none: there is no such folder" in output
    assert output.rstrip().splitlines()[-1].startswith("nothing-a1 failed with exit code 3")


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_whose_directory_says_that_it_is_finished_is_left_alone_by_a_new_cluster(
    on_head: RayHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = job(tmp_path, "elsewhere")
    words = [word for word in command if "=" in word]
    load_config = importlib.import_module("dinoray.jobs.cli.config").load_config
    (tmp_path / "runs/elsewhere").mkdir(parents=True)
    (tmp_path / "runs/elsewhere/config.yaml").write_text(load_config(None, None, words).to_yaml())
    (tmp_path / "runs/elsewhere/result.json").write_text("{}")
    submit(*command)
    assert "elsewhere is done" in capsys.readouterr().out
    assert attempts_at(connect(on_head.dashboard), "elsewhere") == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_looks_at_the_nodes(
    on_head: RayHead, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = job(tmp_path, "looked-at")
    settings = [word for word in words if "=" in word]
    importlib.import_module("jobs.doctor").main(["--address", on_head.dashboard, *settings])
    lines = capsys.readouterr().out.splitlines()
    for beginning in (
        "ok    job server    http://127.0.0.1:",
        f"ok    data          cluster: here: {tmp_path}/images: 24 listed",
        f"ok    cluster       cluster: joined, Ray {ray.__version__}",
        "ok    nodes         cluster: 1 x head: 4 CPUs, 0 GPUs",
        "ok    CPUs          cluster: 4 CPUs, the run needs 3",
        "ok    dashboard     cluster: 127.0.0.1:",
        "ok    data          cluster: head ",
        "ok    clock         cluster: head ",
    ):
        assert any(line.startswith(beginning) for line in lines), (beginning, lines)
    assert not any(line.startswith("FAIL") for line in lines)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_s_own_command_submits_the_same_job(on_head: RayHead, checkout: Path) -> None:
    words = ["job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.pretrain", "optim.lrr=1"]
    failed = subprocess.run(
        [RAY, *words], cwd=checkout, env=on_head.env, capture_output=True, text=True, timeout=120, check=False
    )
    assert failed.returncode == 1
    assert "error: optim.lrr=1" in failed.stdout
    assert "Traceback" not in failed.stdout
