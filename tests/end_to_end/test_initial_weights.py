"""Initial weights of a run: what is printed of them before Ray starts, and files that hold none."""

import json
from pathlib import Path

import published
import pytest
from no_ray import RayStarted
from published import ViT
from wrong_inputs import CONFIG, DATA, TINY, Job, runner_in

from dinoray.jobs import pretrain
from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.runs.run_files import write_environment
from dinoray.pipeline.storage.files import Directory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    return runner_in(tmp_path, monkeypatch, capsys)


def test_a_wrong_file_of_weights_once_mended_does_not_hold_the_name(run: Job, tmp_path: Path) -> None:
    again = [*TINY, "name=start", "storage_path=WORLD/runs", "data.path=WORLD/images"]
    run(pretrain.main, *again, "--init-from", str(tmp_path / "none.pth")).check(
        DATA, [f"{tmp_path}/none.pth"]
    )
    with pytest.raises(RayStarted):
        run(pretrain.main, *again)


def test_lines_on_initial_weights_are_printed_before_ray_starts(
    run: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def backbone() -> ViT:
        return ViT(size=32, patch=8, dim=16, depth=1)

    state = published.Run(backbone=backbone, size=32, out_dim=64).train().state() | {
        "[/b]": {},
        "\x1b[2J": {},
    }
    (tmp_path / "checkpoint.pth").write_bytes(published.saved(state))
    again = [*TINY, "name=init", "storage_path=WORLD/runs", "data.path=WORLD/images", "train.epochs=9"]
    again += ["head.hidden_dim=48", "head.bottleneck_dim=16", "init.load=run"]
    with pytest.raises(RayStarted):
        run(pretrain.main, *again, "--init-from", f"{tmp_path}/checkpoint.pth")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("init: ")]
    file = f"{tmp_path}/checkpoint.pth"
    assert [line.partition("; training continues")[0] for line in lines] == [
        f"init: student from 'student.module.backbone' of {file}: backbone (18 tensors), head (8 tensors)",
        f"init: teacher from 'teacher.backbone' of {file}: backbone (18 tensors), head (8 tensors)",
        f"init: centre from 'dino_loss.center' of {file}",
        "init: optimizer state of 25 of 25 parameters",
        "init: skipped: fp16_scaler, [/b]",
        "init: new: nothing",
    ]
    directory = Directory(f"{tmp_path}/runs/init")
    for reasons in (None, []):  # as the run began, and as it is resumed
        if reasons is not None:
            write_environment(directory, load_run_config(directory), reasons)
        assert json.loads(directory.read("environment.json"))["automatic"][-len(lines) :] == lines


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("x.onnx", b"\x08\x08", CONFIG, ["init.from=", "x.onnx is not a file of weights", "pass the .pth"]),
        ("x.ckpt", b"no weights", DATA, ["x.ckpt was not written by torch.save", "save or download it anew"]),
        ("x.pth", b"", DATA, ["x.pth is empty"]),
        (
            "y.pth",
            b"\x80\x02}q",
            DATA,
            ["y.pth is not a file of weights, or damaged: ", "save or download it anew"],
        ),
        ("folder/x.png", b"", CONFIG, ["folder is a folder but no dinoray run", "pass a file of weights"]),
    ],
)
def test_initial_weights_of_a_wrong_kind(
    run: Job, tmp_path: Path, name: str, content: bytes, code: int, words: list[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    again = [*TINY, "name=init", "storage_path=WORLD/runs", "data.path=WORLD/images"]
    path = name.removesuffix("/x.png")
    run(pretrain.main, *again, f"--init-from=WORLD/{path}").check(code, words)
    with pytest.raises(RayStarted):
        run(pretrain.main, *again)
