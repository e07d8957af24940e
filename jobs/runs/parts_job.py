"""A job that writes a table in parts: it continues what was begun, leaves what is finished, and accounts for each row.

Shared by the commands embed and pack. The files of the table are those of pipeline/export/parquet_parts.py.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from rich.console import Console

from dinoray.jobs.cli.main import start_ray
from dinoray.models.errors import ConfigError
from dinoray.pipeline.cluster.lost_ray import leave_ray
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.manifests.manifest import DataConfig, load_or_build
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.actors import EmbedTask, Work, embed_on_actors
from dinoray.pipeline.export.parquet_parts import (
    LEFT_OUT,
    SUMMARY,
    PartFooter,
    PartFormat,
    check_bad,
    check_settings,
    collect,
    missing_parts,
    remove_table,
)
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.worker.config import Config

if TYPE_CHECKING:
    from dinoray.pipeline.training.checkpoint import FrozenBackbone

_NOT_IN_ROWS = {
    *("fetch_concurrency", "fetch_buffer_bytes"),
    *("row_group_cache_bytes", "max_bad_fraction", "if_overwritten", "manifest", "mix"),
    *(
        "include",
        "exclude",
        "image_list",
        "label_level",
    ),  # they decide the manifest, whose digest is a setting
}
"""Settings of `data` that do not change what is written."""


class Earlier(NamedTuple):
    """What became of the images in an earlier pass, whose output this pass takes."""

    num_images: int
    quarantined: Sequence[Mapping[str, Any]] = ()
    counts: Mapping[str, int] = {}
    """Counts of the summary that stand in place of this pass's own."""


class PartsJob:
    """One table in `out`: `list_images`, then `begin`, then `write`."""

    def __init__(
        self,
        out: Directory,
        kind: PartFormat,
        config: Config,
        console: Console,
        *,
        argument: str,
        verbose: bool,
    ) -> None:
        """`argument` is the name of the command's argument that gave the path of the images."""
        self.out = out
        self._argument = f"argument {argument}"
        self._kind, self._console, self._verbose = kind, console, verbose
        self._data, self._storage, self._resources = config.data, config.storage, config.resources
        self._settings: dict[str, Any] = {}
        """All that decides the rows, as far as it is known."""

    def list_images(self, settings: Mapping[str, Any]) -> Source:
        """Return the images, which are listed once for a table.

        Raises ConfigError if `out` was begun with other `settings` or other settings of `data`.
        """
        self._settings = {**settings, **_settings_of(self._data)}
        check_settings(self.out, self._settings, self._kind)
        manifest = load_or_build(
            self._data,
            self.out,
            self._kind.manifest,
            storage=self._storage,
            begun=self._kind.settings,
            setting=self._argument,
        )
        source = Source(self._data, manifest, self._storage)
        digest = hashlib.blake2b(self.out.read(self._kind.manifest), digest_size=16).hexdigest()
        self._settings |= _settings_of(source.config) | {"manifest": digest}
        return source

    @property
    def manifest_digest(self) -> str:
        """Return what identifies the list of images."""
        return str(self._settings["manifest"])

    def begin(
        self,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Record all settings that decide the rows, and `about`; `check` runs first, for a new table only.

        Raises ConfigError if `out` was begun with other settings.
        """
        self.settle(settings)
        if not self.is_begun():
            check()
            text = json.dumps({**about, **self._settings}, indent=1)
            self.out.write(self._kind.settings, text.encode())

    def into(self, out: Directory) -> "PartsJob":
        """Return the job of a first pass with the same settings, for `begin` and `write`."""
        other = copy(self)
        other.out = out
        other.settle({"first_pass_of": self.out.uri})
        return other

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Add settings that decide the rows."""
        self._settings = {**self._settings, **settings}  # not in place, because `into` shares it

    def lacks(self, setting: str) -> bool:
        """Return True if `out` was begun before there was this setting."""
        try:
            return setting not in json.loads(self.out.read(self._kind.settings))
        except MissingObject:
            return False

    def is_begun(self) -> bool:
        """Return True if `out` was begun with these settings. Raises ConfigError if it was with others."""
        return check_settings(self.out, self._settings, self._kind)

    def remove(self) -> None:
        """Remove the table if it was begun with these settings."""
        with contextlib.suppress(ConfigError):  # it is somebody else's
            if self.is_begun():
                remove_table(self.out, self._kind)

    def is_finished(self, num_parts: int | None, describe: Callable[[Mapping[str, Any]], str]) -> bool:
        """Return True, and print what `describe` makes of the summary, if nothing is left to write.

        The number of parts is that in the summary, if it is None.
        """
        try:
            summary = json.loads(self.out.read(SUMMARY))
        except MissingObject:
            return False
        if missing_parts(self.out, summary["num_parts"] if num_parts is None else num_parts):
            return False
        self.tell(f"{self.out.uri} is finished: {describe(summary)}")
        return True

    def write(
        self,
        work: Work,
        network: "FrozenBackbone | None",
        source: Source,
        rows: Sequence[range],
        *,
        identity: Mapping[str, Any],
        about: str,
        describe: Callable[[Mapping[str, Any]], str],
        earlier: Earlier | None = None,
        with_facts: bool = False,
        finish: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda summary: {},
    ) -> None:
        """Write the missing parts, then summary.json. `rows` are the manifest's rows of each part.

        `work(backbone of the network or None, source, part)` returns a PartResult; the note of each part holds
        `identity`. Prints `about` before, and at the end what `describe` makes of the summary. If `with_facts`, `work`
        writes facts about each part as well. `finish` is called with the summary once all parts are there, and returns
        what is added to it.
        Raises DataError for more unusable images than `data.max_bad_fraction` allows.
        """
        if self.is_finished(len(rows), describe):
            return
        missing = missing_parts(self.out, len(rows), with_facts=with_facts)
        earlier = earlier or Earlier(source.num_images)
        longest = max(map(len, rows))
        self.tell(
            f"{about}\nparts of up to {longest} {self._kind.rows} in {self.out.uri}: "
            f"{len(missing)} of {len(rows)} to do"
        )

        def account(parts: Sequence[int]) -> tuple[list[PartFooter], int]:
            chosen = {part: rows[part] for part in parts}
            footers, bad = collect(self.out, chosen, self._kind, identity, earlier.quarantined)
            limit = self._data.max_bad_fraction
            check_bad(len(bad), earlier.num_images, limit=limit, out=self.out, kind=self._kind)
            return footers, len(bad)

        if missing:
            self._write_missing(
                work, network, source, missing, num_parts=len(rows), account=lambda parts: account(parts)[1]
            )
        footers, num_bad = account(range(len(rows)))
        num_rows = sum(footer.num_rows for footer in footers)
        summary = {"rows_in": earlier.num_images, self._kind.rows_out: num_rows, "quarantined": num_bad}
        summary |= {name: sum(footer.note[name] for footer in footers) for name in self._kind.counts}
        if left_out := earlier.num_images - num_rows - num_bad:
            summary[LEFT_OUT] = left_out
        summary |= {**earlier.counts, "num_parts": len(rows)}
        summary |= finish(summary)
        self.out.write(SUMMARY, json.dumps(summary).encode())
        self.tell(f"{self.out.uri}: {describe(summary)}")

    def _write_missing(
        self,
        work: Work,
        network: "FrozenBackbone | None",
        source: Source,
        missing: Sequence[int],
        *,
        num_parts: int,
        account: Callable[[Sequence[int]], int],
    ) -> None:
        """Write the parts `missing` on a pool of actors.

        `account` returns the number of unusable images in the given parts, or raises where they are too many. It
        is called at the start, and again once they are.
        """
        done = sorted(set(range(num_parts)) - set(missing))
        num_bad = account(done)
        no_training: dict[str, Any] = {"train_workers": 1, "cpus_per_train_worker": 0}
        if network is None:
            no_training["use_gpu"] = False
        use_gpu, (_, actors) = start_ray(
            self._resources.model_copy(update=no_training), verbose=self._verbose
        )
        num_images, num_new = 0, 0
        started = shown = time.monotonic()
        try:
            task = EmbedTask(work, source, missing)
            for _, written in embed_on_actors(
                ray.put(network), [task], actors=actors, use_gpu=use_gpu, in_order=False
            ):
                done.append(written.part)
                num_new += 1
                num_images += written.num_rows + written.num_bad
                num_bad += written.num_bad
                if num_bad / source.num_images > self._data.max_bad_fraction:
                    account(sorted(done))
                now = time.monotonic()
                if now - shown > 5 or num_new == len(missing):
                    shown = now
                    self.tell(
                        f"{num_new}/{len(missing)} parts  {num_images} images  {num_bad} unreadable  "
                        f"{num_images / (now - started):.0f} images/s"
                    )
        finally:
            leave_ray()

    def tell(self, text: str) -> None:
        """Print a line for a person."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _settings_of(data: DataConfig) -> dict[str, Any]:
    """Return the settings of `data` that decide what is written, by dotted key; none that is still to be detected."""
    plain = data.model_dump(mode="json", exclude=_NOT_IN_ROWS) | {"path": Directory(data.path).uri}
    return {f"data.{name}": value for name, value in plain.items() if value != AUTO}
