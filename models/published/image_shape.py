"""What of a checkpoint depends on the sides of its images: its position embeddings."""

from collections.abc import Mapping

from torch import Tensor

from dinoray.models.errors import ConfigError


def check_grid(state: Mapping[str, Tensor], own: Mapping[str, Tensor], reshaped: list[str]) -> None:
    """Raise ConfigError if only the position embeddings differ in shape: timm could not resize them."""
    theirs, ours = state.get("pos_embed"), own.get("pos_embed")
    if reshaped != ["pos_embed"] or theirs is None or ours is None or theirs.shape[2:] != ours.shape[2:]:
        return
    raise ConfigError(
        f"the position embeddings of the checkpoint, {theirs.shape[1]} tokens, cannot be resized to the backbone's "
        f"{ours.shape[1]}: without tokens for class and registers they are no square grid; start from weights of "
        "square images, or without init.from (--init-from)"
    )
