"""Fetch the weights that timm publishes before a run starts, in bounded time, with or without a network.

The weights land in the cache of this machine, where the train workers of a local Ray find them. No Ray here.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import huggingface_hub

from models.backbone import build_backbone
from pipeline.training.config import DINOConfig

_ANSWER_SECONDS = 10.0
"""How long the hub may take for its first answer, and a download for its next bytes."""


def fetch_published_weights(config: DINOConfig) -> None:
    """Download the weights of `backbone.pretrained=true`, unless they are in the cache.

    A hub that does not answer is left alone from then on, by this process and by its children. DataError where the
    weights cannot be had, ConfigError where there are none or where they do not fit.
    """
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
        )


def _hub_answers() -> bool:
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except Exception:  # of httpx or of requests, as the version has it
        return False
    return True


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Sockets with a time limit, and without the hub's own warnings."""
    logger = logging.getLogger("huggingface_hub")
    limit, level = socket.getdefaulttimeout(), logger.level
    socket.setdefaulttimeout(_ANSWER_SECONDS)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        socket.setdefaulttimeout(limit)
        logger.setLevel(level)
