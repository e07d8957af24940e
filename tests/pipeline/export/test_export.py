"""What is exported is what was trained: for timm, torch and the published code, and by the job."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from exports import backbone, checkpoint, frozen_of, run_directory, run_elsewhere, trained
from paths import ROOT
from published import Run, ViT, load_pretrained_weights
from safetensors.torch import load as load_bytes
from servers import S3Server
from tiny import NUM_IMAGES, tiny_config

from dinoray.jobs.export import main
from dinoray.models.errors import ConfigError, DinorayError
from dinoray.models.published.checkpoint import load, parse, read_weights
from dinoray.pipeline.export.timm_export import timm_arguments
from dinoray.pipeline.export.weights import export_official, export_state_dict, official_args
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import build_state

PUBLISHED_HEAD = {"head": {"out_dim": 32, "hidden_dim": 48, "bottleneck_dim": 16}}
PARSER = """arch patch_size out_dim norm_last_layer momentum_teacher use_bn_in_head warmup_teacher_temp teacher_temp
    warmup_teacher_temp_epochs use_fp16 weight_decay weight_decay_end clip_grad batch_size_per_gpu epochs
    freeze_last_layer lr warmup_epochs min_lr optimizer drop_path_rate global_crops_scale local_crops_number
    local_crops_scale seed"""
"""What main_dino.py's parser calls its settings."""


# torch


def test_a_state_dict_loads_with_weights_alone_and_strictly(tmp_path: Path) -> None:
    frozen = frozen_of(tiny_config())
    (tmp_path / "x.pth").write_bytes(export_state_dict(frozen))
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    model = timm.create_model(frozen.config.backbone.name, num_classes=0, **timm_arguments(frozen)).eval()
    model.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(x), frozen.backbone()(x))


def test_an_exported_backbone_starts_another_run() -> None:
    frozen, config = frozen_of(tiny_config()), tiny_config()
    state = build_state(config, num_images=NUM_IMAGES)
    load(state.dino, read_weights(export_state_dict(frozen), "x.pth"))
    for network in (state.dino.student, state.dino.teacher):
        for k, v in network.backbone.state_dict().items():
            assert torch.equal(v, frozen.weights[k])


# The published code


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_the_published_code_resumes_an_exported_checkpoint(optimizer: str, tmp_path: Path) -> None:
    config = tiny_config(backbone={"pos_embed": "official"}, optim={"name": optimizer}, **PUBLISHED_HEAD)
    state = trained(config, steps=12)  # the second epoch has begun
    run = Run(optimizer=optimizer)
    assert run.restart(export_official(checkpoint(state, tmp_path))) == 1
    x = torch.randn(3, 3, 8, 8)
    for ours, theirs in zip((state.dino.student, state.dino.teacher), run.networks, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(x), ours.eval()([x]).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(run.loss.center[0], state.dino.center)
    for k, p in run.networks[0].named_parameters():
        own = state.optimizer.state.get(state.dino.student.get_parameter(k), {})
        for name, value in run.optimizer.state.get(p, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(own[name])), (k, name)
    assert len(run.optimizer.state) == len([s for s in state.optimizer.state.values() if s])
    run.train(1)


def test_the_published_evaluation_loads_the_teacher_of_an_exported_checkpoint(tmp_path: Path) -> None:
    state = trained(tiny_config(backbone={"pos_embed": "official"}))
    vit = ViT()
    load_pretrained_weights(vit, export_official(checkpoint(state, tmp_path)))
    x = torch.randn(3, 3, 12, 8)
    with torch.no_grad():
        ours = state.dino.teacher.backbone(x)
        torch.testing.assert_close(vit(x), ours, rtol=1e-4, atol=1e-5)


def test_official_export_is_read_by_torch_alone(tmp_path: Path) -> None:
    state = trained(tiny_config(backbone={"pos_embed": "official"}))
    path = tmp_path / "official.pth"
    path.write_bytes(export_official(checkpoint(state, tmp_path)))
    program = (
        "import sys, torch; s = torch.load(sys.argv[1]); print(type(s['args']).__name__, s['args']['arch'])"
    )
    command = [sys.executable, "-I", "-W", "ignore", "-c", program, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout
    assert output.split() == ["dict", official_args(state.config)["arch"]]


def test_an_exported_checkpoint_comes_in_again_whole(tmp_path: Path) -> None:
    config = tiny_config(head={"norm_last_layer": False, "use_bn": True})
    state = trained(config)
    weights = read_weights(export_official(checkpoint(state, tmp_path)), "x.pth")
    assert (weights.epoch, weights.official) == (0, False)
    other = build_state(config, num_images=NUM_IMAGES)
    assert load(other.dino, weights) == (True, True, [])
    for k, v in state.dino.state_dict().items():
        assert torch.equal(v, other.dino.state_dict()[k])


def test_a_network_that_the_published_code_lacks_is_refused(tmp_path: Path) -> None:
    state = build_state(
        backbone("convnext_atto", size=64, local_size=32, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]),
        num_images=NUM_IMAGES,
    )
    with pytest.raises(
        ConfigError, match=r"no network with stem\S+, which convnext_atto has; take --format timm$"
    ):
        export_official(checkpoint(state, tmp_path / "lone"))
    main([str(tmp_path / "lone"), f"--out={tmp_path}/out", "--format=timm"])


def test_settings_have_the_published_parser_s_names() -> None:
    config = tiny_config(
        backbone={"name": "vit_small_patch8_224", "kwargs": {}},
        teacher={"teacher_momentum": 0.99},
        train={"epochs": 100, "global_batch_size": 64},
    )
    args = official_args(config)
    assert (args["arch"], args["patch_size"], args["epochs"]) == ("vit_small", 8, 100)
    assert (args["momentum_teacher"], args["lr"], args["batch_size_per_gpu"]) == (0.99, 0.064, 64)
    assert args.keys() - {"pos_embed"} == set(PARSER.split())


@pytest.mark.parametrize(
    ("name", "kwargs", "arch", "patch_size"),
    [
        ("vit_base_patch16_224", {"patch_size": 8}, "vit_base", 8),
        ("vit_tiny_patch16_224", {"embed_dim": 96}, "vit_tiny_patch16_224", 16),
        ("vit_small_patch16_224.dino", {}, "vit_small", 16),
        ("resnet50", {}, "resnet50", 16),
    ],
)
def test_an_architecture_has_its_published_name_where_it_has_one(
    name: str, kwargs: dict[str, Any], arch: str, patch_size: int
) -> None:
    tree = tiny_config().model_dump()
    tree["backbone"] |= {"name": name, "kwargs": kwargs}
    args = official_args(DINOConfig.model_validate(tree))
    assert (args["arch"], args["patch_size"]) == (arch, patch_size)


# The job


def test_the_job_writes_folders_and_prints_how_they_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_directory(tmp_path / "a run", state := trained(tiny_config()), data_path=str(tmp_path))
    main([str(run), "--format", "timm", "--format", "state_dict", "--format", "official"])
    export, name = run / "export", "teacher_step_00000003"
    assert {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()} == {
        f"{name}_timm/config.json", f"{name}_timm/model.safetensors", f"{name}_timm/README.md",
        f"{name}_state_dict/model.pth", f"{name}_state_dict/README.md",
        "official_step_00000003/checkpoint.pth", "official_step_00000003/README.md", f"{name}.json",
    }  # fmt: skip
    card = json.loads((export / f"{name}.json").read_text())
    assert card["scores"]["during_training"] == {"step": 2, "knn_10": 0.5, "knn_20": 0.6, "majority": 0.1}
    assert (card["network"], card["training"]["data"]) == ("teacher", str(tmp_path))
    assert card["files"].keys() == {"timm", "state_dict", "official"}
    assert all((export / file["file"]).is_file() for file in card["files"].values())
    # The lines that are printed load the exports, in a process that knows nothing of us.
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (load_timm,) = (line for line in lines if line.startswith("timm.create_model("))
    (load_state,) = (line for line in lines if line.startswith("model = timm.create_model("))
    x = torch.randn(2, 3, 16, 16)
    torch.save(x, tmp_path / "x.pt")
    code = f"import timm, torch\nother = {load_timm}\n{load_state}\nx = torch.load('x.pt')\n"
    run_elsewhere(
        code + "torch.save([m.eval()(x).detach() for m in (other, model)], 'features.pt')", tmp_path
    )
    with torch.no_grad():
        expected = state.dino.teacher.eval().backbone(x)
    for features in torch.load(tmp_path / "features.pt"):
        assert torch.equal(features, expected)
    assert "licence: unknown; choose one with --license, e.g. --license apache-2.0" in lines


def test_a_second_export_adds_to_the_card(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()))
    main([str(run)])
    main([str(run), "--format", "state_dict"])
    card = json.loads((run / "export" / "teacher_step_00000003.json").read_text())
    assert card["files"].keys() == {"timm", "state_dict"}


def test_the_student_and_a_lone_checkpoint_can_be_exported(tmp_path: Path) -> None:
    folder = checkpoint(state := trained(tiny_config()), tmp_path / "lone")
    main([str(folder), "--which", "student", "--out", str(tmp_path / "out"), "--format", "state_dict"])
    weights = torch.load(
        tmp_path / "out" / "student_step_00000003_state_dict" / "model.pth", weights_only=True
    )
    for k, v in state.dino.student.backbone.state_dict().items():
        assert torch.equal(v, weights[k])
    card = json.loads((tmp_path / "out" / "student_step_00000003.json").read_text())
    assert (card["scores"], card["training"]["data"], card["network"]) == ({}, None, "student")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{lone}"], "is a checkpoint outside a run directory; pass --out FOLDER"),
        (["{lone}", "--out", "{out}", "--step", "2"], "--step 2, but .* is of step 3"),
        (["{lone}", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["{lone}/nowhere"], "has no committed checkpoint"),
        (
            ["{lone}", "--out", "{out}", "--license", "my own"],
            "--license 'my own' is not the identifier of a licence",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    lone = checkpoint(trained(tiny_config()), tmp_path / "lone")
    filled = [a.format(lone=lone, out=tmp_path / "out") for a in arguments]
    with pytest.raises(DinorayError, match=message):
        main(filled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lone"]


def test_the_job_runs_as_a_process_and_is_quiet(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()))
    done = subprocess.run(
        [sys.executable, "-m", "jobs.export", str(run), "--format", "onnx"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 5
    card = json.loads((run / "export" / "teacher_step_00000003.json").read_text())
    assert card["files"]["onnx"]["max_deviation"] < 1e-4
    assert [8, 8] in card["files"]["onnx"]["checked_sizes"]


@pytest.mark.s3
def test_the_job_reads_and_writes_s3(
    s3: S3Server, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()))
    remote = Directory(f"s3://{bucket}/runs/one")
    for path in run.rglob("*"):
        if path.is_file():
            remote.write(path.relative_to(run).as_posix(), path.read_bytes())
    capsys.readouterr()
    main([remote.uri])
    printed = capsys.readouterr().out
    main([str(run)])
    name = "teacher_step_00000003"
    here = run / "export" / f"{name}_timm"
    for file in ("README.md", "config.json"):
        assert remote.read(f"export/{name}_timm/{file}") == (here / file).read_bytes()
    theirs = load_bytes(remote.read(f"export/{name}_timm/model.safetensors"))
    ours = load_bytes((here / "model.safetensors").read_bytes())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], v) for k, v in ours.items())
    assert remote.read(f"export/{name}.json") == (run / "export" / f"{name}.json").read_bytes()
    address = f"{remote.uri}/export/{name}_timm"
    assert f"    aws s3 cp --recursive {address} {name}_timm\n" in printed
    assert f'    timm.create_model("local-dir:{name}_timm", pretrained=True)\n' in printed


def test_published_weights_pass_through_a_run_of_ours_unchanged(tmp_path: Path) -> None:
    config = tiny_config(backbone={"pos_embed": "official"}, **PUBLISHED_HEAD)
    theirs = Run().train()
    state = build_state(config, num_images=NUM_IMAGES, official=theirs.state())
    assert parse(theirs.state()).official
    other = Run()
    other.restart(export_official(checkpoint(state, tmp_path)))
    for part in ("student", "teacher", "dino_loss"):
        for k, v in theirs.state()[part].items():
            assert torch.equal(v, other.state()[part][k]), k
