"""The crops of a run's steps, made in this process, and which of them are not those that the run had."""

import json
import os
from collections.abc import Mapping
from typing import Any

from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.multicrop import prepare_kernel
from dinoray.pipeline.data.reading.source import Source, Status
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.rank_shares import RankShares


class RunBatches:
    """Makes batches as the stream of the run did; the rows of a batch are in the order of `shares`."""

    def __init__(
        self,
        source: Source,
        algorithm: DINOConfig,
        shares: RankShares,
        replaced: Mapping[int, Mapping[str, Any]],
    ) -> None:
        """`replaced`: images that the run could not use, by position."""
        seed = algorithm.train.seed
        self._source, self._order, self._shares, self._replaced = source, source.order(seed), shares, replaced
        prepare_kernel(algorithm.crops)
        threads = os.cpu_count() or 1
        self._augmenter = Augmenter(source, self._order, algorithm.crops, seed=seed, num_threads=threads)
        self.lost: list[str] = []
        """Images that the run used and that cannot be used now, with the reason."""
        self.regained: list[str] = []
        """Images that the run replaced and that can be used now."""

    def batch(self, step: int) -> dict[str, Any]:
        """Return the columns of a step, counted from 1, as `Augmenter.block` does, with the `key` of each image."""
        batch: dict[str, Any] = dict(self._augmenter.block(self._shares.positions(step - 1)))
        batch["key"] = self.keys(batch["position"])
        for position, key, status, note in zip(
            batch["position"].tolist(), batch["key"], batch["status"], batch["note"], strict=True
        ):
            was_replaced = position in self._replaced
            if status != Status.OK and not was_replaced:
                self.lost.append(f"{key} ({json.loads(note)['reason']})")
            elif status == Status.OK and was_replaced:
                self.regained.append(key)
        return batch

    def keys(self, positions: Any) -> list[str]:
        """Return the keys of the images at `positions`."""
        return [self._source.key(image) for image in self._order.locate(positions)[1].tolist()]

    def differ_from(self, capture: Mapping[str, Any]) -> bool:
        """Return True if a capture names other images than the manifest does at the same positions."""
        return "keys" in capture and capture["keys"] != self.keys(range(*capture["positions"]))
