"""Which torchtitan is installed, told by what its files are; its version number is a hint.

main and forks keep the number of the last release, so the number alone tells nothing. Nothing is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchtitan_tp_validate.locate import KNOWN_RELEASES, package_folder, torchtitan_version
from torchtitan_tp_validate.release_files import BLOBS


@dataclass(frozen=True)
class Mark:
    """A line of source that main has got at some time and kept: a tree that has it is no older.

    Attributes:
        since: year and month in which main got it.
        after: the newest release of that day.
        file: that it is in, below the package.
        text: the line, or a part of it that stands nowhere else in the file.
    """

    since: str
    after: str
    file: str
    text: str

    def is_in(self, folder: Path) -> bool:
        """Return whether a package has it."""
        file = folder / self.file
        return file.is_file() and self.text in file.read_text(encoding="utf-8")


_JOB, _CONFIGS = "config/job_config.py", "config/configs.py"
MARKS = (
    Mark("2025-10", "0.2.0", _JOB, "save_config_file:"),
    Mark("2025-11", "0.2.0", _JOB, '"local_tensor"'),
    Mark("2025-12", "0.2.0", _JOB, "pipeline_parallel_expert_parallel_overlap:"),
    Mark("2026-01", "0.2.1", _JOB, "context_parallel_load_balancer:"),
    Mark("2026-02", "0.2.2", _CONFIGS, "class TrainingConfig:"),
    Mark("2026-03", "0.2.2", _CONFIGS, "enable_sequence_parallel:"),
    Mark("2026-04", "0.2.2", _CONFIGS, "batch_invariant:"),
    Mark("2026-05", "0.2.2", _CONFIGS, "enable_structured_logging:"),
    Mark("2026-06", "0.2.2", _CONFIGS, "spmd_typechecking:"),
    Mark("2026-07", "0.2.2", _CONFIGS, "context_parallel_ptrr_mask_key:"),
    Mark("2026-08", "0.2.2", _CONFIGS, "disable_cuda_graphs:"),
    Mark("2026-08", "0.3.0", _CONFIGS, "num_tokens_per_microbatch_per_dp_rank:"),
)
"""In the order of time. Source: the history of torchtitan's main; 0.3.0 was cut from it in August 2026."""


@dataclass(frozen=True)
class Identity:
    """Which torchtitan is installed.

    Attributes:
        version: the declared version, or None when none is declared.
        release: the tested release whose files these are, or None.
        patched: whether these are its files with this project's patch.
        like: where they are no release's, the one that most of them are from, or whose number is declared.
        changed: the files that are not that release's.
        mark: the newest mark of main that a tree has which is newer than `like`, or like none.
    """

    version: str | None
    release: str | None = None
    patched: bool = False
    like: str | None = None
    changed: tuple[str, ...] = ()
    mark: Mark | None = None

    @property
    def name(self) -> str:
        """Return a release, or ``main``, or the declared version, or ``none``: what it is to be run as."""
        if self.release is None and self.mark is not None:
            return "main"
        return self.release or self.like or self.version or "none"

    @property
    def problem(self) -> str | None:
        """Why this is no release that the guards were tested with, to follow "torchtitan"; None if it is."""
        if self.release is not None:
            return None
        if self.mark is not None:
            return f"main (newer than {self.mark.after}, like {self.mark.since})"
        if self.like is not None:
            shown, more = self.changed[:2], len(self.changed) - 2
            files = f"{', '.join(shown)}{f' and {more} more' if more > 0 else ''}"
            return f"{self.like} with local changes: {files}"
        name, tested = self.version or "of unknown version", ", ".join(sorted(KNOWN_RELEASES))
        return f"{name} is not a release that the guards were tested with ({tested})"

    def __str__(self) -> str:
        """Return what it is, to follow "torchtitan"."""
        if self.release is None:
            known = self.mark is not None or self.like is not None
            return (known and self.problem) or self.version or "of unknown version"
        patch = " with the patch of torchtitan-tp-validate" if self.patched else ""
        if self.version == self.release:
            return f"{self.release}{patch}"
        return f"{self.version or 'of unknown version'}, with the files of {self.release}{patch}"


def torchtitan_identity(source: Path | None = None) -> Identity:
    """Tell a torchtitan by the files that hold what is guarded, and, where they are no release's, by marks.

    A release counts as itself with all of its files as released, or all as our own patch leaves them. Files
    that are no part of what is guarded, such as a registry with a flavor more, are not looked at.

    Args:
        source: the root of a checkout, instead of the installed torchtitan.
    """
    version = torchtitan_version() if source is None else None
    folder = package_folder("torchtitan", source)
    if folder is None:
        return Identity(version)
    blobs = {file: _blob(folder.parent / file) for table in BLOBS.values() for file in table}
    # The number first: some releases have files in common.
    for release in sorted(BLOBS, key=lambda release: release != version):
        for patched in (False, True):
            if all(blobs[file] == known[patched] for file, known in BLOBS[release].items()):
                return Identity(version, release, patched)
    like = _most_alike(blobs, version)
    mark = next((mark for mark in reversed(MARKS) if mark.is_in(folder)), None)
    if mark is not None and (like is None or _number(mark.after) >= _number(like)):
        return Identity(version, mark=mark)
    if like is None:
        return Identity(version)
    changed = tuple(file for file, known in BLOBS[like].items() if blobs[file] not in known)
    # Some as released, some patched: each is known, and together they are neither.
    return Identity(version, like=like, changed=changed or tuple(BLOBS[like]))


def _most_alike(blobs: Mapping[str, str | None], version: str | None) -> str | None:
    """Return the release that at least half of the files are from, or the tested one that is declared."""
    shares = {
        release: sum(blobs[file] in known for file, known in table.items()) / len(table)
        for release, table in BLOBS.items()
    }
    # Of releases that share files, the declared one.
    nearest = max(shares, key=lambda release: (shares[release], release == version))
    if shares[nearest] >= 1 / 2:
        return nearest
    return version if version in BLOBS else None


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _blob(file: Path) -> str | None:
    """Return what git calls the content of a file; None where there is none."""
    if not file.is_file():
        return None
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
