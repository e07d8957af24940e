"""The attention job's animation: a frame for each evaluation of a run, from the figures that these left."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from attention_runs import EVALUATED, Run, attention_job, evaluate_run, make_run, noise
from PIL import Image

from dinoray.pipeline.figures.drawing import png_bytes
from dinoray.pipeline.storage.run_dir import checkpoint_name


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return attention_job(monkeypatch, capsys)


def test_an_animation_has_a_frame_for_each_evaluation_whatever_checkpoints_are_kept(
    tmp_path: Path, run: Run
) -> None:
    folder = evaluate_run(tmp_path / "first")
    code, output, errors = run(folder, "--animate")
    assert (code, errors) == (0, [])
    gif = folder / "attention" / "attention.gif"
    assert output == [f"{gif}  (3 evaluations, steps 0 to 8: the teacher on the run's own images)"]
    film, frames, durations = Image.open(gif), [], []
    assert (film.format, film.n_frames, film.info["loop"]) == ("GIF", len(EVALUATED), 0)
    for number, step in enumerate(EVALUATED):
        film.seek(number)
        durations.append(film.info["duration"])
        frames.append(np.asarray(film.convert("RGB"), int))
        sheet = np.asarray(Image.open(folder / "attention" / f"step_{step:08d}.png"), int)
        assert abs(frames[-1][: len(sheet)] - sheet).mean() < 6
    assert durations == [1000, 1000, 3000]
    below = len(sheet)
    for earlier, later in itertools.pairwise(frames):
        heads = slice(200, below), slice(360, None)
        assert (abs(earlier - later)[heads].max(axis=2) > 30).mean() > 0.01  # it looks elsewhere
        assert (earlier[below:, 24:170] != later[below:, 24:170]).any()  # the step, in words
    sheets = [np.asarray(Image.open(folder / "attention" / f"step_{s:08d}.png")) for s in EVALUATED]
    same = (sheets[0] == sheets[1]).all(axis=2)
    assert (frames[0][:below][same] == frames[1][:below][same]).all()  # what is still does not flicker


def test_an_animation_comes_beside_the_sheet_of_other_images(tmp_path: Path, run: Run) -> None:
    folder = make_run(evaluate_run(tmp_path / "first"))
    (tmp_path / "a.png").write_bytes(noise())
    for address in (folder, folder / "checkpoints" / checkpoint_name(1)):
        code, output, _ = run(address, tmp_path / "a.png", "--animate", f"--out={tmp_path}/out")
        assert code == 0
        assert len(output) == 3
        assert output[-1].startswith(f"{tmp_path}/out/attention.gif  (3 evaluations")


def test_figures_of_other_sizes_and_damaged_ones_spoil_no_animation(tmp_path: Path, run: Run) -> None:
    folder = evaluate_run(tmp_path / "first")
    (folder / "attention" / "step_00000012.png").write_bytes(png_bytes(Image.new("RGB", (300, 1000))))
    data = (folder / "attention" / "step_00000004.png").read_bytes()
    (folder / "attention" / "step_00000004.png").write_bytes(data[: len(data) // 2])
    code, output, errors = run(folder, "--animate")
    assert (code, len(output)) == (0, 1)
    assert errors == [f"skipped {folder}/attention/step_00000004.png: it cannot be read as PNG"]
    film = Image.open(folder / "attention" / "attention.gif")
    assert film.n_frames == 3
    assert film.height > 1000


def test_an_animation_of_one_evaluation_is_a_picture(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "first"
    (folder / "attention").mkdir(parents=True)
    (folder / "attention" / "step_00000000.png").write_bytes(png_bytes(Image.new("RGB", (400, 300))))
    code, output, _ = run(folder, "--animate")
    assert code == 0
    assert "(1 evaluation, step 0:" in output[0]
    assert Image.open(folder / "attention" / "attention.gif").n_frames == 1
