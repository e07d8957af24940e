"""The README.md of an export: a model card with the header that the Hugging Face Hub reads.

This module stands after model_card.py, whose facts it prints, and loading_code.py. No files here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dinoray.models.commands import command
from dinoray.models.schedules import scaled_lr
from dinoray.pipeline.export.loading_code import loading_code

MIN_TIMM = "1.0.26"
"""The first version of timm whose `local-dir:` reads safetensors."""

_LIBRARIES = {
    "timm": "timm",
    "state_dict": "timm",
    "transformers": "transformers",
    "onnx": "onnx",
    "onnx_preprocessing": "onnx",
    "official": "pytorch",
}
_RUNTIME = "`pip install onnxruntime pillow numpy`"
_CITATION = """\
@inproceedings{caron2021emerging,
  title     = {Emerging Properties in Self-Supervised Vision Transformers},
  author    = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\\'e}gou, Herv{\\'e} and Mairal, Julien and
               Bojanowski, Piotr and Joulin, Armand},
  booktitle = {ICCV},
  year      = {2021}
}"""


def readme(card: Mapping[str, Any], form: str) -> str:
    """Return the README.md of the export `form` of a `model_card`; `files` holds the facts on each format."""
    sections = {
        "Model": _model(card, form),
        "Training": _training(card),
        "Scores": _scores(card),
        "Preprocessing": _preprocessing(card),
        "How to load": _loading(card, form),
        "Licence": _licence(card),
        "Versions": (f"- {name} {version}" for name, version in card["versions"].items()),
        "Citation": ("DINO is by Caron et al.", "", "```bibtex", _CITATION, "```"),
    }
    title = f"{card['run'] or card['network']}: {card['model']} pretrained with DINO"
    parts = [f"---\n{_header(card, form)}---", f"# {title}", _summary(card)]
    for heading, lines in sections.items():
        parts += [f"## {heading}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def position_note(card: Mapping[str, Any], form: str) -> str:
    """Return how position embeddings make features differ from the run's features; "" if they do not."""
    deviations = card["files"][form].get("deviations") or {}
    if deviations:
        worst = max(deviations, key=lambda size: deviations[size])
        exact = card["input"]["size"]
        where = "" if str(exact) in map(str, deviations) else f"exact at {exact} px; "
        library = "transformers" if form == "transformers" else "timm"
        return (
            f"{where}{library} resizes position embeddings differently from this run: features differ by up to "
            f"{deviations[worst]:.0e} of the largest one at {worst} px; --format onnx has no such difference"
        )
    if form == "official" and card["pos_embed"] == "timm":
        return (
            "the published code resizes position embeddings differently from this run: features differ at sizes other "
            f"than {card['create_model_kwargs'].get('img_size', card['input']['size'])} px"
        )
    return ""


def _header(card: Mapping[str, Any], form: str) -> str:
    fields: dict[str, Any] = {
        "license": card["license"],
        "library_name": _LIBRARIES[form],
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dino", "self-supervised-learning", "image-feature-extraction", "dinoray"],
    }
    source = (card["training"]["initial_weights"] or {}).get("timm", "")
    if "/" in source:  # an address on the hub
        fields["base_model"] = source
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def _summary(card: Mapping[str, Any]) -> str:
    return (
        f"A vision backbone, pretrained with DINO (self-distillation with no labels) on "
        f"{card['training']['num_images']:,} images. "
        f"It maps {_image(card)} to a vector of {card['embed_dim']} features."
    )


def _image(card: Mapping[str, Any]) -> str:
    channels = len(card["input"]["mean"])
    return "an RGB image" if channels == 3 else f"an image of {channels} channels"


def _scale(card: Mapping[str, Any]) -> str:
    """What becomes of deeper samples, for networks that were trained on such."""
    value_range = card["training"]["config"].get("data", {}).get("value_range")
    return "" if value_range is None else ": samples from {:g} to {:g} become 0 to 255".format(*value_range)


def _model(card: Mapping[str, Any], form: str) -> Iterator[str]:
    common = ("num_classes", "img_size", "dynamic_img_size")
    own = ", ".join(f"{k}={v!r}" for k, v in card["create_model_kwargs"].items() if k not in common)
    yield f"- **Backbone:** {_code(card['model'])} of timm{f' with {_code(own)}' if own else ''}, without a classifier"
    yield f"- **Parameters:** {card['num_parameters']:,}"
    yield f"- **Features:** {card['embed_dim']}"
    yield f"- **Network:** {card['network']} of DINO, at step {card['training']['step']:,}"
    if form == "official":
        yield "- **Also in the file:** the other network, both heads, the centre and the optimizer"
    if card["pos_embed"]:
        rule = "as timm does" if card["pos_embed"] == "timm" else "as the published code of DINO does"
        yield f"- **Position embeddings:** resized in training {rule}"


def _training(card: Mapping[str, Any]) -> Iterator[str]:
    facts, config = card["training"], card["training"]["config"]
    train, crops, optim = config["train"], config["crops"], config["optim"]
    epochs = facts["epochs"] * facts["step"] / facts["total_steps"]
    rate = scaled_lr(optim["base_lr"], train["global_batch_size"])
    run = f"run {_code(card['run'])}, recipe {_code(card['recipe'])}" if card["run"] else "not known"
    yield f"- **Run:** {run}, by dinoray"
    where = _code(facts["data"]) if facts["data"] else "a data set that the export does not know"
    yield f"- **Data:** {facts['num_images']:,} images of {where}"
    yield "- **Labels:** not used in training; evaluations may use them to score the features"
    yield f"- **Initial weights:** {_initial_weights(facts['initial_weights'])}"
    yield (
        f"- **Length:** step {facts['step']:,} of {facts['total_steps']:,}, "
        f"epoch {epochs:.4g} of {facts['epochs']:g}, batch {train['global_batch_size']}"
    )
    yield (
        f"- **Crops per image:** {crops['num_global_crops']} of {crops['global_crop_size']} px, "
        f"{crops['num_local_crops']} of {crops['local_crop_size']} px"
    )
    yield (
        f"- **Optimizer:** {optim['name']}, peak learning rate {rate:.3g}, "
        f"weight decay {optim['weight_decay']:g} to {optim['final_weight_decay']:g}, "
        f"warm-up epochs {optim['warmup_epochs']:g}, {train['schedule']} schedule"
    )
    yield (
        f"- **Loss:** {config['head']['out_dim']} prototypes, teacher temperature {config['loss']['teacher_temp']}, "
        f"teacher momentum {config['teacher']['teacher_momentum']}"
    )


def _initial_weights(source: Mapping[str, Any] | None) -> str:
    if source is None:
        return "not known"
    if "path" in source:
        return f"{_code(source['path'])} (`init.load={source['load']}`)"
    if "timm" in source:
        return f"{_code(source['timm'])}, published by timm (licence: {source['license'] or 'not stated'})"
    return f"random, seed {source['seed']}"


def _scores(card: Mapping[str, Any]) -> Iterator[str]:
    kinds = {
        "evaluation": "evaluation after training, step {step:,}",
        "during_training": "evaluation during training, step {step:,}",
    }
    rows = [
        (*_score(key, value), text.format(step=card["scores"][kind]["step"]))
        for kind, text in kinds.items()
        for key, value in card["scores"].get(kind, {}).items()
        if key not in ("step", "linear_lr", "linear_dim", "linear_features", "linear_holdout")
    ]
    if not rows:
        yield f"None was measured for this network up to step {card['training']['step']:,}."
        return
    yield "| score | value | measured by |"
    yield "|---|---|---|"
    for name, value, source in rows:
        yield f"| {name} | {value} | {source} |"
    features = card["scores"].get("evaluation", {}).get("linear_features")
    if features:
        yield f"\nThe linear probe classifies the {features}."


def _score(key: str, value: Any) -> tuple[str, str]:
    names = {
        "majority": "accuracy of guessing the largest class",
        "linear": "linear probe accuracy",
        "rankme": "RankMe (effective rank of the features)",
        "lidar": "LiDAR (effective rank between images)",
        "cluster_learnability": "cluster learnability (half of CLID)",
        "intrinsic_dim": "intrinsic dimension (half of CLID)",
    }
    name = f"k-NN accuracy, k={key.removeprefix('knn_')}" if key.startswith("knn_") else names.get(key, key)
    is_share = key.startswith(("knn_", "majority", "linear"))
    if not isinstance(value, (int, float)):
        return name, str(value)
    return name, f"{value:.1%}" if is_share else f"{value:.4g}"


def _preprocessing(card: Mapping[str, Any]) -> Iterator[str]:
    values = card["input"]
    as_what = "convert it to RGB" if len(values["mean"]) == 3 else f"take its {len(values['mean'])} channels"
    yield f"1. Turn the image upright (EXIF) and {as_what} with 8 bits per channel{_scale(card)}."
    yield f"2. Resize the shorter side to {values['shorter_side']} px: bicubic, antialiased."
    yield f"3. Cut the central square of {values['size']} px."
    yield "4. Divide by 255, then normalise each channel:"
    yield f"   mean {values['mean']}, standard deviation {values['std']}."
    yield ""
    yield "The code below does all of it. The evaluations during training use the same preprocessing."


def _loading(card: Mapping[str, Any], form: str) -> Iterator[str]:
    photo = "photo.jpg" if len(card["input"]["mean"]) == 3 else "photo.npy"
    needs = {
        "timm": f"`pip install 'timm>={MIN_TIMM}'`",
        "transformers": "`pip install 'transformers>=5' torchvision pillow`",
        "onnx": _RUNTIME,
        "onnx_preprocessing": _RUNTIME,
    }.get(form, "`pip install timm`")
    yield f"Install what the code needs with {needs}. Run the code in the folder of this file, on any `{photo}`:"
    yield f"\n```python\n{loading_code(card, form)}```\n"
    if form == "timm":
        yield "From another folder, write its path after `local-dir:`. For a classifier of 10 classes on top:"
        yield '\n```python\nclassifier = timm.create_model("local-dir:.", pretrained=True, num_classes=10)\n```\n'
    if form == "official":
        yield (
            "The published `main_dino.py` resumes the training from `checkpoint.pth` in its `--output_dir`. "
            "The settings are in `args` of the file, under the names of its options."
        )
    if form == "onnx":
        multiple = card["files"]["onnx"]["multiple_of"]
        channels = len(card["input"]["mean"])
        yield (
            f"Input `images`: float32 [batch, {channels}, height, width]. {_onnx_sizes(card, multiple)} "
            f"Output `features`: float32 [batch, {card['embed_dim']}]. Any batch size is accepted."
        )
    if form == "onnx_preprocessing":
        yield (
            "Input `images`: uint8 [batch, height, width, 3], RGB and upright, of any height and width; images of one "
            "batch have the same. All other steps of the preprocessing are inside the graph. "
            f"Output `features`: float32 [batch, {card['embed_dim']}]. Any batch size is accepted."
        )
    if form == "transformers":
        model = card["files"][form]["model"]
        yield f"`AutoModel` returns a `{model}`. Its features are those of the training run within rounding."
        yield (
            "Where the margin around the central square is odd, the image processor may cut it one pixel nearer to the "
            "top or the left than the evaluations."
        )
        if model == "ViTModel":
            yield (
                "Images of another size need `interpolate_pos_encoding=True`. The pooling layer of this model passes "
                "on the class token unchanged."
            )
    note = position_note(card, form)
    if note:
        yield f"\n**Note:** {note}."


def _onnx_sizes(card: Mapping[str, Any], multiple: int | None) -> str:
    if multiple is None:
        return f"Height and width are fixed to {card['files']['onnx']['checked_sizes'][0][0]} px."
    if multiple == 1:
        return "Any height and width is accepted."
    return f"Height and width must be multiples of {multiple}; the model refuses other sizes."


def _licence(card: Mapping[str, Any]) -> Iterator[str]:
    if card["license"] == "unknown":
        yield "No licence has been chosen for these weights: `license: unknown`."
        line = command("export", "RUN", "--license", "apache-2.0")
        yield f"Whoever publishes them chooses one: `{line}` writes it here."
    else:
        yield f"`{card['license']}`, chosen by whoever exported the weights."
    yield "The licences of the training images and of the initial weights may restrict their use."


def _code(text: str) -> str:
    return f"`{str(text).replace('`', chr(39))}`"
