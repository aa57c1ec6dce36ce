"""A Hub without a network: repositories in a cache of their own, from which huggingface_hub takes them offline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Cache:
    """A folder as huggingface_hub keeps its cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, folder: Path, inside: str = "", revision: str = "main", commit: str = COMMIT) -> Path:
        """Make `folder` the content of a repository, or of a subfolder of it; returns where it lies."""
        repository = self.folder / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        return Path(shutil.copytree(folder, repository / "snapshots" / commit / inside, dirs_exist_ok=True))


def offline_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """The cache that is used until the test ends; nothing else can be fetched."""
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return Cache(folder)
