"""Repositories of the Hub where a folder is taken, through huggingface_hub's own code on a cache that is made here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from peft_lrqat import can_export, export
from peft_lrqat.checkpoint import hub
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.merge import merge
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.checkpoint.places import check_apart
from peft_lrqat.checkpoint.verify import verify
from peft_lrqat.grid import Grid
from tests.grids import on_grid
from tests.hub import COMMIT, Cache, offline_cache
from tests.models import adapted, tiny


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "merged"
    on_grid(Grid(3, 32), family="qwen2", container_bits=4).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    monkeypatch.chdir(tmp_path)
    return offline_cache(tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize(("place", "parts"), [
    ("owner/name", ("owner/name", None, "")),
    ("owner/name@v1.0", ("owner/name", "v1.0", "")),
    ("hf://owner/na.me@refs/pr/3/sub/folder/", ("owner/na.me", "refs/pr/3", "sub/folder")),
    ("owner/name/file.gguf", ("owner/name", None, "file.gguf")),
    ("name", None), ("./owner/name", None), ("/owner/name", None), ("../name", None), ("owner/name/../x", None),
    ("", None), ("~/a/b", None), (r"C:\a\b", None), (None, None), (Path("owner/name"), None),
])  # fmt: skip
def test_what_names_a_repository(place, parts):
    assert hub.repository(place) == parts


def test_each_function_takes_one(merged, cache):
    cache.put("owner/merged", merged)
    cache.put("owner/merged", merged, "sub", revision="v1", commit="1" * 40)
    assert can_export("owner/merged", "gptq")
    report = export("owner/merged", "out", progress=False)
    assert "base_model: owner/merged\n" in Path("out/README.md").read_text()
    assert "exact: " in str(report)
    assert inspect("owner/merged@v1/sub").folder == "owner/merged/sub"
    found = verify("owner/merged", "hf://owner/merged@v1/sub", engine=False)
    assert found
    assert (found.checkpoint, found.against) == ("owner/merged (compressed-tensors)", "hf://owner/merged@v1/sub")


def test_a_folder_that_is_here_comes_first(merged, cache, tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "merged").symlink_to(merged)
    assert hub.fetched("owner/merged") == Path("owner/merged")


def test_an_adapter_and_its_base_with_the_bases_tokenizer(cache, tmp_path):
    base = tiny("qwen2", num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    base.name_or_path = "owner/base"
    adapted(base, bits=4, group_size=8, range_method="minmax").save_pretrained(tmp_path / "adapter")
    cache.put("owner/base", tmp_path / "base")
    cache.put("owner/adapter", tmp_path / "adapter")
    source = open_source("owner/adapter")
    assert (source.origin, source.tokenizer) == ("owner/base", "owner/base@main")


def test_only_what_is_read_is_fetched(merged, cache, monkeypatch):
    wanted = {}

    def download(name, **kwargs):
        wanted.update(kwargs, name=name)
        return str(cache.put(name, merged))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.fetched("owner/name@v1")
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "modeling.py",
             "consolidated.safetensors", "original/params.json", "checkpoint-5/model.safetensors", "a.gguf", "b.pth",
             "optimizer.pt", "README.md"]  # fmt: skip
    patterns = {key: wanted[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:5]
    assert (wanted["name"], wanted["revision"]) == ("owner/name", "v1")
    with pytest.raises(FileNotFoundError, match=r"no 'a\.gguf' to read"):
        hub.fetched("owner/name/a.gguf")
    assert (wanted["allow_patterns"], wanted["ignore_patterns"]) == (["a.gguf"], [])


@pytest.mark.parametrize(("error", "kind", "said"), [
    (RepositoryNotFoundError, FileNotFoundError, "no folder 'a/b' here, and no repository 'a/b' on the Hub that"),
    (GatedRepoError, PermissionError, "is gated. Ask for access"),
    (RevisionNotFoundError, FileNotFoundError, "'a/b' of the Hub has no revision"),
    (lambda *args, **kwargs: RuntimeError("no route\nto host"), OSError, r"\(RuntimeError: no route\)\."),
])  # fmt: skip
def test_what_the_hub_refuses(error, kind, said, cache, monkeypatch):
    def download(*args, **kwargs):
        raise error("no", response=SimpleNamespace(headers={}, request=None, status_code=404))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(kind, match=said):
        hub.fetched("a/b")


def test_what_is_not_in_the_cache_and_cannot_be_fetched(cache):
    with pytest.raises(OSError, match="There is no folder 'owner/none' here, and 'owner/none' could not be fetched"):
        open_source("owner/none")
    with pytest.raises(FileNotFoundError, match="a repository of the Hub is called 'OWNER/NAME'"):
        open_source("none")


def test_the_cache_of_what_is_read_is_not_written_in(merged, cache):
    place = cache.put("owner/merged", merged)
    for out in (place, place / "new", place.parents[1]):
        with pytest.raises(FileExistsError, match="lost"):
            check_apart(out, "owner/merged")
    assert json.loads((place / "config.json").read_text())


@pytest.mark.parametrize("write", [export, merge])
def test_the_base_that_a_fetched_adapter_names_is_not_replaced(write, cache, tmp_path):
    base = tiny("qwen2", num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted(base, group_size=8, range_method="minmax").save_pretrained(tmp_path / "adapter")
    cache.put("owner/adapter", tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="lost"):
        write("owner/adapter", "base", overwrite=True)
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_a_folder_of_the_cache_has_its_repositorys_name(merged, cache):
    place = cache.put("owner/merged", merged, "sub")
    assert place.parent.name == COMMIT
    assert hub.called(place) == "owner/merged/sub"
    assert hub.called(merged) is None
