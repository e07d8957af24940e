"""The settings of multi-crop as a table for people: what each crop goes through, and how strong it is."""

from dinoray.pipeline.augment.config import CropKind, CropsConfig, crop_bytes, crop_kinds


def describe_crops(config: CropsConfig) -> str:
    """Format the settings in effect: one row for each run of equal crops, then the strengths."""
    kinds = crop_kinds(config)
    rows: list[tuple[str, ...]] = [("crop", "size", "scale", "flip", "jitter", "gray", "blur", "solarize")]
    first = 0
    for i, kind in enumerate(kinds):
        group = kind.name.split()[0]
        last = i + 1 == len(kinds) or kinds[i + 1][1:] != kind[1:] or not kinds[i + 1].name.startswith(group)
        if last:
            numbers = [k.name.split()[1] for k in kinds[first : i + 1]]
            name = f"{group} {numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")
            probabilities = (
                kind.flip_prob, kind.jitter_prob, kind.gray_prob, kind.blur_prob, kind.solarize_prob
            )  # fmt: skip
            scale = "{:g} to {:g}".format(*kind.scale)
            rows.append((name, f"{kind.size} px", scale, *(f"{p:g}" for p in probabilities)))
            first = i + 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    strengths: dict[tuple[str, ...], str] = {}
    for kind in kinds:
        strengths.setdefault(_describe_strengths(kind), kind.name.split()[0])
    for text, group in strengths.items():
        lines += [(f"{group} crops: " if len(strengths) > 1 else "") + line for line in text]
    more = {"vertical flip": config.vertical_flip_prob, "quarter turn": config.quarter_turn_prob}
    more |= {"HED jitter": config.hed_jitter}
    if any(more.values()):
        lines.append(", ".join(f"{name} {value:g}" for name, value in more.items() if value))
    lines[-1] += f", {crop_bytes(config):,} bytes an image"
    if config.photometric == "device":
        lines.append("jitter, gray, blur and solarize run on the device that trains")
    return "\n".join(lines)


def _describe_strengths(kind: CropKind) -> tuple[str, str]:
    return (
        f"jitter, in random order: brightness {kind.brightness:g}, contrast {kind.contrast:g}, "
        f"saturation {kind.saturation:g}, hue {kind.hue:g}",
        "aspect ratio {:.3g} to {:.3g}, ".format(*kind.aspect_ratio)
        + "blur sigma {:g} to {:g} px, ".format(*kind.blur_sigma)
        + f"solarize from {kind.solarize_threshold}",
    )
