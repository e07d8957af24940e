"""Download the weights that timm publishes before a run starts, in bounded time, with or without a network.

The weights are stored in this machine's cache, where the train workers of a local Ray find them. No Ray here.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import huggingface_hub

from dinoray.models.backbone import build_backbone
from dinoray.models.errors import ConfigError
from dinoray.pipeline.training.config import DINOConfig

_ANSWER_SECONDS = 10.0
"""Time limit for the hub's first response, and for the next bytes of a download."""


def fetch_published_weights(config: DINOConfig, *, init_path: str | None = None) -> None:
    """Download the weights of `backbone.pretrained=true`, unless they are in the cache.

    If the hub does not respond, this process and its children make no further requests to it. Raises
    DataError if the weights cannot be downloaded, ConfigError if they do not exist, do not fit, or if
    `init_path` names other weights.
    """
    if init_path is not None:
        raise ConfigError(
            f"backbone.pretrained=true and init.path={init_path} both give the initial weights; set "
            "backbone.pretrained=false, or leave init.path (--init-from) out"
        )
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not _hub_answers():
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # its own retries take minutes
        os.environ["HF_HUB_OFFLINE"] = "1"
    backbone = config.backbone
    with _bounded():
        build_backbone(
            backbone,
            crop_sizes=config.crops.crop_sizes,
            drop_path_rate=backbone.drop_path_rate,
            pretrained=True,
            in_chans=config.crops.channels,
        )


def _hub_answers() -> bool:
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except Exception:  # of httpx or requests, depending on the version
        return False
    return True


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Set a time limit for sockets and silence the hub's own warnings inside the block."""
    logger = logging.getLogger("huggingface_hub")
    limit, level = socket.getdefaulttimeout(), logger.level
    socket.setdefaulttimeout(_ANSWER_SECONDS)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        socket.setdefaulttimeout(limit)
        logger.setLevel(level)
