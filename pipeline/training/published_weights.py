"""Download the weights that timm publishes before a run starts, in bounded time, with or without a network.

The weights are stored in this machine's cache, where the train workers of a local Ray find them. No Ray here.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import huggingface_hub
import timm

from dinoray.models.backbone import build_backbone
from dinoray.models.backbone_names import name_hint
from dinoray.models.config import TIMM, BackboneConfig, timm_name
from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.models.published.checkpoint import Weights
from dinoray.pipeline.training.config import DINOConfig, InitConfig

_ANSWER_SECONDS = 10.0
"""Time limit for the hub's first response, and for the next bytes of a download."""


def fetch_published_weights(config: DINOConfig, *, init_path: str | None = None) -> None:
    """Download the weights of `backbone.pretrained=true` or `init.from=timm:NAME`, unless they are in the cache.

    Nothing is done for other starts. Raises
    DataError if the weights cannot be downloaded, ConfigError if they do not exist, do not fit, or if
    `init_path` names other weights.
    """
    if not config.backbone.pretrained:
        if init_path is not None and timm_name(init_path) is not None:
            timm_weights(init_path)
        return
    if init_path is not None:
        raise ConfigError(
            f"backbone.pretrained=true and init.from={init_path} both give the initial weights; set "
            "backbone.pretrained=false, or leave init.from (--init-from) out"
        )
    backbone = config.backbone
    with _bounded():
        build_backbone(
            backbone,
            crop_sizes=config.crops.crop_sizes,
            drop_path_rate=backbone.drop_path_rate,
            pretrained=True,
            in_chans=config.crops.channels,
        )


def check_start(init: InitConfig, backbone: BackboneConfig) -> None:
    """Raise ConfigError for `init.from=timm:NAME` without such weights, and for a frozen stage without any weights."""
    if (name := timm_name(init.path)) is not None:
        _check_published(name)
    if init.freeze_steps != 0 and init.path is None and not backbone.pretrained:
        raise ConfigError(
            f"init.freeze_steps={init.freeze_steps} freezes a backbone of random weights; set init.from=timm:NAME or "
            "a file, or init.freeze_steps=0"
        )


def timm_weights(start: str) -> Weights:
    """Return the weights that timm publishes for `start`, timm:NAME; downloaded, or from this machine's cache.

    Raises ConfigError if there are no such weights, DataError if they cannot be downloaded.
    """
    name = start.removeprefix(TIMM)
    _check_published(name)
    try:
        with _bounded():
            network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as failure:  # a download may raise anything
        raise DataError(
            f"init.from={start}: the weights cannot be had: {one_line(failure)}; connect this machine to the network, "
            f"or name a local file of them: init.from=FILE backbone.name={name}"
        ) from failure
    state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    return Weights(
        student=state,
        teacher=state,
        center=None,
        optimizer=None,
        epoch=None,
        args={"arch": name.partition(".")[0]},
        official=False,
        name=start,
    )


def _check_published(name: str) -> None:
    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        near = name_hint(name)
        if "--init-from" not in near:  # which names a file, and a backbone for it
            near = near.replace(" backbone.pretrained=true", "").replace(
                "backbone.name=", f"init.from={TIMM}"
            )
        raise ConfigError(f"init.from={TIMM}{name}: timm has no such model{near}")
    published = timm.list_pretrained(f"{arch}.*") + timm.list_pretrained(arch)
    if not published:
        raise ConfigError(
            f"init.from={TIMM}{name}: timm publishes no weights of this model; set init.from=FILE "
            f"backbone.name={arch}, or another model"
        )
    if name != arch and name not in published:
        raise ConfigError(
            f"init.from={TIMM}{name}: timm publishes no such weights, but {', '.join(published)}; set "
            f"init.from={TIMM}{published[0]}, or another of these"
        )


def _hub_answers() -> bool:
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_ANSWER_SECONDS)
    except Exception:  # of httpx or requests, depending on the version
        return False
    return True


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Set a time limit for sockets and silence the hub's own warnings inside the block.

    If the hub does not respond, this process and its children make no further requests to it.
    """
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not _hub_answers():
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # its own retries take minutes
        os.environ["HF_HUB_OFFLINE"] = "1"
    logger = logging.getLogger("huggingface_hub")
    limit, level = socket.getdefaulttimeout(), logger.level
    socket.setdefaulttimeout(_ANSWER_SECONDS)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        socket.setdefaulttimeout(limit)
        logger.setLevel(level)
