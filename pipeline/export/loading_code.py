"""Python code that loads an exported network and embeds one image, for each format of export.

The code does not import dinoray. Its preprocessing equals the evaluations': upright, shorter side resized,
centre crop.
"""

import json
from collections.abc import Mapping
from typing import Any

FILES = {
    "timm": "model.safetensors",
    "state_dict": "model.pth",
    "transformers": "model.safetensors",
    "onnx": "model.onnx",
    "onnx_preprocessing": "model.onnx",
    "official": "checkpoint.pth",
}
"""Format -> name of the weights file in the export folder."""

_OPEN = """\
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
"""
_TIMM = """\
import timm
import torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

{open}with torch.inference_mode():
    features = model(transform(image)[None])  # float32 [1, {embed_dim}]
"""
_TORCH = """\
import timm
import torch
from PIL import Image, ImageOps
from torchvision import transforms

{weights}
model = {create_model}
model.load_state_dict(weights)
model.eval()
transform = transforms.Compose(
    [
        transforms.Resize({shorter_side}, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop({size}),
        transforms.ToTensor(),
        transforms.Normalize({mean}, {std}),
    ]
)

{open}with torch.inference_mode():
    features = model(transform(image)[None])  # float32 [1, {embed_dim}]
"""
_TRANSFORMERS = """\
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(".").eval()
processor = AutoImageProcessor.from_pretrained(".")

{open}with torch.inference_mode():
    outputs = model(**processor(image, return_tensors="pt"))
features = outputs.{features}  # float32 [1, {embed_dim}]
"""
_STATE_DICT_WEIGHTS = """\
weights = torch.load("model.pth", map_location="cpu", weights_only=True)"""
_OFFICIAL_WEIGHTS = """\
checkpoint = torch.load("checkpoint.pth", map_location="cpu", weights_only=True)
weights = {
    name.split("backbone.", 1)[1]: value
    for name, value in checkpoint["NETWORK"].items()
    if "backbone." in name
}"""
_ONNX = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

{open}width, height = image.size
short, size = {shorter_side}, {size}
width, height = (short, short * height // width) if width <= height else (short * width // height, short)
left, top = round((width - size) / 2), round((height - size) / 2)
image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
mean, std = np.array({mean}, np.float32), np.array({std}, np.float32)
images = ((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
(features,) = session.run(["features"], {{"images": images}})  # float32 [1, {embed_dim}]
"""

_ONNX_PREPROCESSING = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])

{open}(features,) = session.run(["features"], {{"images": np.asarray(image)[None]}})  # float32 [1, {embed_dim}]
"""
_CODE = {
    "timm": _TIMM,
    "transformers": _TRANSFORMERS,
    "onnx": _ONNX,
    "onnx_preprocessing": _ONNX_PREPROCESSING,
}


_OTHER_CHANNELS = """\
import numpy as np
import timm
import torch

{model}
picture = np.load("photo.npy")  # uint8 [{size}, {size}, {channels}], prepared as above
mean, std = np.array({mean}, np.float32), np.array({std}, np.float32)
images = torch.tensor((picture / np.float32(255) - mean) / std).permute(2, 0, 1)[None]
with torch.inference_mode():
    features = model(images)  # float32 [1, {embed_dim}]
"""
_OTHER_CHANNELS_ONNX = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
picture = np.load("photo.npy")  # uint8 [{size}, {size}, {channels}], prepared as above
mean, std = np.array({mean}, np.float32), np.array({std}, np.float32)
images = ((picture / np.float32(255) - mean) / std).transpose(2, 0, 1)[None]
(features,) = session.run(["features"], {{"images": images}})  # float32 [1, {embed_dim}]
"""


def loading_code(card: Mapping[str, Any], form: str) -> str:
    """Return code that embeds `photo.jpg` (`photo.npy`, if it is not RGB) and runs in the export folder.

    `card` is the result of `model_card`.
    """
    values = {
        **{key: card["input"][key] for key in ("size", "shorter_side", "mean", "std")},
        "embed_dim": card["embed_dim"],
        "create_model": create_model(card),
        "open": _OPEN,
        "weights": _STATE_DICT_WEIGHTS,
    }
    if form == "official":
        values["weights"] = _OFFICIAL_WEIGHTS.replace("NETWORK", card["network"])
    channels = len(values["mean"])
    if channels != 3:
        return _of_other_channels(form, values | {"channels": channels})
    if form == "transformers":
        values["features"] = card["files"][form]["features"]
    return _CODE.get(form, _TORCH).format(**values)


def _of_other_channels(form: str, values: Mapping[str, Any]) -> str:
    """Return code that embeds an array of numpy, since Pillow opens no pictures of any channels."""
    if form == "onnx":
        return _OTHER_CHANNELS_ONNX.format(**values)
    if form == "timm":
        model = 'model = timm.create_model("local-dir:.", pretrained=True).eval()'
    else:
        model = f"{values['weights']}\nmodel = {values['create_model']}\nmodel.load_state_dict(weights)\nmodel.eval()"
    return _OTHER_CHANNELS.format(model=model, **values)


def create_model(card: Mapping[str, Any]) -> str:
    """Return the timm call that builds the network without weights."""
    arguments = [quoted(card["model"]), *(f"{k}={v!r}" for k, v in card["create_model_kwargs"].items())]
    return f"timm.create_model({', '.join(arguments)})"


def quoted(text: str) -> str:
    """Return a Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)
