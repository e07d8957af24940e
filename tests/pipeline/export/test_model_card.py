"""The README.md of each export is a model card: hubs read its header, and its code loads the export anywhere."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from exports import OWN_VIT, backbone, checkpoint, run_directory, run_elsewhere, trained
from huggingface_hub import ModelCard
from PIL import Image
from tiny import TINY_RESNET, tiny_config

from dinoray.jobs.export import main
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.export.loading_code import FILES
from dinoray.pipeline.export.model_card import RunFacts, model_card, read_scores
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.checkpoint import read_frozen, read_meta
from dinoray.pipeline.training.config import DINOConfig

NAME = "teacher_step_00000003"
FOLDERS = {form: f"{NAME}_{form}" for form in FILES} | {"official": "official_step_00000003"}
SECTIONS = [
    *("Model", "Training", "Scores", "Preprocessing"),
    *("How to load", "Licence", "Versions", "Citation"),
]
SCORES = {"step": 2, "knn_10": 0.5, "knn_20": 0.6, "majority": 0.1}


def export(run: Path, *arguments: str) -> Path:
    main([str(run), *arguments])
    return run / "export"


def edit_config(run: Path, section: str, **values: Any) -> None:
    config = json.loads((run / "config.yaml").read_text())
    config[section] = config.get(section, {}) | values
    (run / "config.yaml").write_text(json.dumps(config))


def photo() -> Image.Image:
    """A photo of an odd size, on its side, as telephones store it."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    return Image.fromarray(noise).resize((131, 97), Image.Resampling.BICUBIC)


CONFIGS = {
    "vit": tiny_config(),
    "vit with published position embeddings": tiny_config(backbone={"pos_embed": "official"}),
    "resnet": tiny_config(backbone=TINY_RESNET),
}
FORMS = {  # the published code knows no resnet10t; onnx takes long; of transformers test_transformers_export.py
    "vit": [form for form in FILES if form != "transformers"],
    "vit with published position embeddings": ["timm", "state_dict", "official"],
    "resnet": ["timm", "state_dict"],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of backbone -> a run with its exports; beside it, in `kept.npz`, what the code of each README computes.

    All of that code runs in one fresh process, which takes longer to start than to run.
    """
    root = tmp_path_factory.mktemp("exported")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    runs, code = {}, ["import os\nimport numpy as np"]
    for kind, config in CONFIGS.items():
        runs[kind] = run = run_directory(root / kind / "run", trained(config))
        formats = [part for form in FORMS[kind] for part in ("--format", form)]
        export(run, *formats, "--license", "Apache-2.0")
        code.append("kept = {}")
        for form in FORMS[kind]:
            here = root / kind / "elsewhere" / form
            shutil.copytree(run / "export" / FOLDERS[form], here)
            photo().save(here / "photo.jpg", exif=exif)
            blocks = re.findall(r"```python\n(.*?)```", (here / "README.md").read_text(), re.DOTALL)
            assert len(blocks) == (2 if form == "timm" else 1)
            code += [f"os.chdir({str(here)!r})", *blocks, f"kept[{form!r}] = np.asarray(features)"]
            code += ["assert classifier.num_classes == 10"] if form == "timm" else []
        code.append(f"np.savez({str(root / kind / 'kept')!r}, **kept)")
    run_elsewhere("\n".join(code), root)
    return runs


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_code_of_each_readme_embeds_an_image_as_the_run_does(
    exported: dict[str, Path], kind: str
) -> None:
    run = exported[kind]
    frozen = read_frozen(run / "checkpoints" / "step_00000003")
    image = decode((run.parent / "elsewhere" / "timm" / "photo.jpg").read_bytes(), max_pixels=10**6)
    crop = eval_crop(image, size=16)[None]
    expected = embed(frozen.backbone(), crop, CONFIGS[kind].crops, precision="fp32")
    kept = np.load(run.parent / "kept.npz")
    assert set(kept) == set(FORMS[kind])
    for form in FORMS[kind]:
        # That graph rounds pixels as we do, the others' preprocessing does not.
        share = 0.002 if form == "onnx_preprocessing" else 0.02
        np.testing.assert_allclose(kept[form], expected, atol=share * np.abs(expected).max(), err_msg=form)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_hub_reads_the_header_of_each_readme(exported: dict[str, Path], kind: str) -> None:
    libraries = {"timm": "timm", "state_dict": "timm", "official": "pytorch"}
    libraries |= dict.fromkeys(("onnx", "onnx_preprocessing"), "onnx")
    for form in FORMS[kind]:
        card = ModelCard.load(exported[kind] / "export" / FOLDERS[form] / "README.md")
        assert (card.data.license, card.data.library_name) == ("apache-2.0", libraries[form])
        assert card.data.pipeline_tag == "image-feature-extraction"
        assert "dino" in card.data.tags
        assert re.findall(r"^## (.*)$", card.text, re.MULTILINE) == SECTIONS


def test_a_licence_that_nobody_chose_is_unknown(tmp_path: Path) -> None:
    folder = export(run_directory(tmp_path / "run", trained(tiny_config())))
    text = (folder / FOLDERS["timm"] / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "unknown"
    assert "No licence has been chosen" in text
    config = json.loads((folder / FOLDERS["timm"] / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "unknown"
    assert json.loads((folder / f"{NAME}.json").read_text())["license"] == "unknown"


def test_the_readme_has_recipe_data_steps_and_scores(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()), data_path="s3://bucket/photos")
    evaluation = {"checkpoint": "step_00000003", "linear": 0.71, "rankme": 12.3456, "linear_table": []}
    (run / "evaluation_step_00000003.json").write_text(json.dumps(evaluation))
    text = (export(run) / FOLDERS["timm"] / "README.md").read_text()
    for part in (
        "run `run`, recipe `demo`",
        "40 images of `s3://bucket/photos`",
        "**Labels:** not used in training",
        "**Length:** step 3 of 20, epoch 0.3 of 2, batch 4",
        "**Initial weights:** random, seed 0",
        "adamw, peak learning rate 0.001",
        "| k-NN accuracy, k=10 | 50.0% | evaluation during training, step 2 |",
        "| linear probe accuracy | 71.0% | evaluation after training, step 3 |",
        "| RankMe (effective rank of the features) | 12.35 | evaluation after training, step 3 |",
        "Resize the shorter side to 18 px",
    ):
        assert part in text
    assert "linear_table" not in text


def test_credentials_in_paths_are_left_out(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()))
    folder = run / "checkpoints" / "step_00000003"
    frozen, meta = read_frozen(folder), read_meta(folder)
    facts = RunFacts("r", "demo", "s3://name:key@host/images", None, "https://a:secret@host/w.pth", "weights")
    card = model_card(frozen, meta, which="teacher", version="1", run=facts, scores={})
    assert "key@" not in json.dumps(card)
    assert "secret" not in json.dumps(card)


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        (
            "init",
            {"path": "/weights/dino.pth", "load": "backbone"},
            "`/weights/dino.pth` (`init.load=backbone`)",
        ),
        ("backbone", {"pretrained": False}, "random, seed 0"),
    ],
)
def test_initial_weights_are_named(
    section: str, values: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()))
    edit_config(run, section, **values)
    assert f"**Initial weights:** {expected}" in (export(run) / FOLDERS["timm"] / "README.md").read_text()


def test_weights_of_timm_are_named_as_the_base_with_their_licence(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2.lvd142m"
    state = trained(backbone(name, size=28, local_size=14, embed_dim=32, depth=2, num_heads=2))
    run = run_directory(tmp_path / "run", state)
    meta_file = run / "checkpoints" / "step_00000003" / "meta.json"
    meta = json.loads(meta_file.read_text())
    meta["config"]["backbone"]["pretrained"] = True
    meta["format"] = 2  # has no checksums
    del meta["checksums"]
    meta_file.write_text(json.dumps(meta))
    text = (export(run) / FOLDERS["timm"] / "README.md").read_text()
    licence = timm.get_pretrained_cfg(name).license
    assert f"**Initial weights:** `timm/{name}`, published by timm (licence: {licence})" in text
    assert yaml.safe_load(text.split("---")[1])["base_model"] == f"timm/{name}"


def test_several_steps_and_networks_keep_their_readmes(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()))
    export(run)
    export(run, "--which", "student")
    shutil.move(run / "checkpoints", tmp_path / "older")
    run_directory(tmp_path / "run", trained(tiny_config(), 4))
    folder = export(run)
    steps = {
        path.parent.name: re.findall(r"\*\*Network:\*\* (\w+) of DINO, at step (\d+)", path.read_text())
        for path in folder.glob("*/README.md")
    }
    assert steps == {
        "teacher_step_00000003_timm": [("teacher", "3")],
        "student_step_00000003_timm": [("student", "3")],
        "teacher_step_00000004_timm": [("teacher", "4")],
    }


def test_a_checkpoint_without_its_run_has_a_card_that_admits_it(tmp_path: Path) -> None:
    folder = checkpoint(trained(tiny_config()), tmp_path / "lone")
    main([str(folder), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / FOLDERS["timm"] / "README.md").read_text()
    assert "**Run:** not known" in text
    assert "**Initial weights:** not known" in text
    assert "None was measured for this network up to step 3." in text


def test_the_size_of_evaluations_is_that_of_the_card(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", trained(tiny_config()))
    edit_config(run, "eval", image_size=24)
    folder = export(run)
    assert "Cut the central square of 24 px" in (folder / FOLDERS["timm"] / "README.md").read_text()
    config = json.loads((folder / FOLDERS["timm"] / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 24, 24]


@pytest.mark.parametrize("form", ["timm", "state_dict", "official"])
def test_a_difference_in_position_embeddings_is_printed_and_in_the_readme(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = backbone(
        "vit_tiny_patch16_224", size=16, local_size=8, pos_embed="official", img_size=32, **OWN_VIT
    )
    run = run_directory(tmp_path / "run", trained(config))
    folder = export(run, "--format", form)
    note = "timm resizes position embeddings differently from this run: features differ by up to "
    (line,) = (line for line in capsys.readouterr().out.splitlines() if note in line)
    assert re.search(r"by up to \de-0\d of the largest one at \d+ px; --format onnx has no such", line)
    assert ("exact at 16 px; " in line) is (form == "timm")
    assert note in (folder / FOLDERS[form] / "README.md").read_text()


def test_no_difference_is_printed_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run_directory(tmp_path / "run", trained(tiny_config())))
    assert "position embeddings" not in capsys.readouterr().out


def test_scores_are_the_last_at_or_before_the_step(tmp_path: Path) -> None:
    run = Directory(str(run_directory(tmp_path, trained(tiny_config(), 1))))
    assert read_scores(run, 3, "teacher") == {"during_training": SCORES}
    assert read_scores(run, 1, "teacher")["during_training"]["step"] == 0
    assert read_scores(run, 3, "student") == {}  # only the teacher is evaluated during training
    assert read_scores(Directory(str(tmp_path / "nothing")), 3, "teacher") == {}


def test_the_facts_rebuild_the_model(tmp_path: Path) -> None:
    folder = checkpoint(trained(tiny_config()), tmp_path)
    frozen, meta = read_frozen(folder), read_meta(folder)
    card = model_card(frozen, meta, which="teacher", version="1.2", run=RunFacts(), scores={})
    card = json.loads(json.dumps(card))
    model = timm.create_model(card["model"], **card["create_model_kwargs"]).eval()
    model.load_state_dict(frozen.weights)
    x = torch.randn(2, 3, card["input"]["size"], card["input"]["size"])
    with torch.no_grad():
        assert torch.equal(model(x), frozen.backbone()(x))
        assert model(x).shape[1] == card["embed_dim"]
    assert card["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert DINOConfig.model_validate(card["training"]["config"]) == frozen.config
    assert (card["training"]["step"], card["training"]["total_steps"]) == (3, 20)
    assert card["input"]["mean"] == list(frozen.config.crops.pixel_mean)
