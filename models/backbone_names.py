"""Find timm's name for a backbone named as in torch.hub, the published scripts, Hugging Face or
torchvision."""

import difflib
import re

import timm

_SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large", "g": "giant", "h": "huge"}
_VIT = re.compile(
    r"(?P<family>dino|dinov2|dinov3)[_-](?:with[_-]registers[_-])?(?:vit_?)?"
    r"(?P<size>tiny|small|base|large|giant|huge|7b|[tsblgh])(?P<plus>[_-]?plus(?=\d|$))?(?P<patch>\d+)?(?P<more>plus)?"
    r"(?P<reg>[_-]reg4?)?(?:[_-].*)?"
)
_PATCHES = {"dino": "16", "dinov2": "14", "dinov3": "16"}
_TAGS = {"dino": "dino", "dinov2": "lvd142m", "dinov3": "lvd1689m"}


def name_hint(name: str) -> str:
    """Return `; ` and a suggested setting in place of a name that timm does not have."""
    plain = re.sub(r"^(hf[-_]hub:)?(timm|facebook|facebookresearch)/", "", name.strip()).lower()
    for other in (plain, plain.replace("-", "_")):
        if other != name and timm.is_model(other.split(".")[0]):
            return f"; set backbone.name={other}"
    if plain_vit := _plain(plain):
        return f"; set backbone.name={plain_vit}"
    if known := _published(plain.split(".")[0]):
        model, has_weights = known
        if has_weights:
            return f"; timm has it under another name: set backbone.name={model} backbone.pretrained=true"
        return (
            f"; timm has this network without these weights: set backbone.name={model}, download the published file, "
            "and pass --init-from FILE"
        )
    near = difflib.get_close_matches(plain.split(".")[0], timm.list_models(), n=3, cutoff=0.7)
    if near:
        return f"; did you mean {', '.join(near)}?"
    return "; set backbone.name=vit_small_patch16_224, or another name of timm.list_models()"


def _plain(name: str) -> str | None:
    """Return timm's name for an architecture of the published scripts or of torchvision, else None."""
    if match := re.fullmatch(
        r"(?:vit|deit)_?(tiny|small|base|large|huge|[tsblh])(?:_?(?:patch)?(8|14|16|32))?", name
    ):
        model = f"vit_{_SIZES.get(match[1], match[1])}_patch{match[2] or 16}_224"
    elif match := re.fullmatch(r"swin_(tiny|small|base|[tsb])", name):
        model = f"swin_{_SIZES.get(match[1], match[1])}_patch4_window7_224"
    else:
        return None
    return model if timm.is_model(model) else None


def _published(name: str) -> tuple[str, bool] | None:
    """Return timm's name for a network of the DINO family, and True if timm has its weights; else None."""
    if match := re.fullmatch(r"dinov3[_-]convnext[_-](tiny|small|base|large)(?:[_-].*)?", name):
        return f"convnext_{match[1]}.dinov3_lvd1689m", True
    if match := re.fullmatch(r"dino[_-](resnet50|xcit_(?:small_12|medium_24)_p(?:8|16))", name):
        return match[1] if match[1] == "resnet50" else f"{match[1]}_224", False
    match = _VIT.fullmatch(name)
    if match is None:
        return None
    family, size = match["family"], _SIZES.get(match["size"], match["size"])
    patch = match["patch"] or _PATCHES[family]
    plus = "_plus" if match["plus"] or match["more"] else ""
    middle = {
        "dino": f"patch{patch}_224",
        "dinov2": f"patch{patch}_dinov2",
        "dinov3": f"patch{patch}_dinov3",
    }[family]
    if family == "dinov2" and (match["reg"] or "registers" in name):
        middle = f"patch{patch}_reg4_dinov2"
    model = f"vit_{size}{plus}_{middle}"
    full = f"{model}.{_TAGS[family]}"
    if not timm.is_model(model):
        return None
    return (full, True) if full in timm.list_pretrained(f"{model}.*") else (model, False)
