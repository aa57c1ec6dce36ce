"""Models that Python files of their own define: the files travel along, and are run only if that is asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_lrqat import can_export, export, load_quantized
from peft_lrqat.checkpoint.code import code_files
from peft_lrqat.checkpoint.inspect import inspect
from peft_lrqat.checkpoint.verify import verify
from tests.models import adapted, logits, run_clean, tiny, tokens, train

CODE = {
    "configuration_tiny.py": (
        "from transformers import LlamaConfig\n\n\nclass TinyConfig(LlamaConfig):\n    model_type = 'tiny_custom'\n"
    ),
    "modeling_tiny.py": (
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import TinyConfig\n\n\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    ),
}
MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The float model, an adapter, and the merged checkpoint."""
    work = tmp_path_factory.mktemp("code")
    found = {name: work / name for name in ("float", "adapter", "merged")}
    tiny(num_hidden_layers=1).save_pretrained(found["float"])
    for name, text in CODE.items():
        (found["float"] / name).write_text(text)
    path = found["float"] / "config.json"
    described = json.loads(path.read_text())
    described |= {"model_type": "tiny_custom", "architectures": ["TinyForCausalLM"], "auto_map": MAP}
    path.write_text(json.dumps(described))
    model = adapted(AutoModelForCausalLM.from_pretrained(found["float"], trust_remote_code=True))
    train(model, tokens(), steps=1)
    model.save_pretrained(found["adapter"])
    model.merge_and_unload().save_pretrained(found["merged"])
    return found


@pytest.fixture
def nobody(monkeypatch):
    """Whoever asks on the terminal fails."""

    def ask(*args: Any) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.parametrize("source", ["adapter", "merged"])
def test_exports_load_in_plain_transformers(folders: dict[str, Path], source: str, tmp_path: Path):
    report = export(folders[source], tmp_path / "out", progress=False, trust_remote_code=True)
    assert sorted(path.name for path in code_files(report.folder)) == sorted(CODE)
    assert verify(tmp_path / "out", folders[source], trust_remote_code=True)
    expected = logits(load_quantized(folders["merged"], trust_remote_code=True), tokens())
    found = load_quantized(tmp_path / "out", trust_remote_code=True)
    assert type(found).__name__ == "TinyForCausalLM"
    assert torch.equal(logits(found, tokens()), expected)
    code = """
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    torch.save(model(input_ids=torch.load(sys.argv[2])).logits, sys.argv[2])
    """
    torch.save(tokens(), tmp_path / "tensor.pt")
    run_clean(code, str(tmp_path / "out"), str(tmp_path / "tensor.pt"))
    assert torch.equal(torch.load(tmp_path / "tensor.pt"), expected)


def test_an_exported_model_in_memory_brings_its_files(folders: dict[str, Path], tmp_path: Path):
    model = load_quantized(folders["merged"], trust_remote_code=True)
    export(model, tmp_path / "out", format="torchao", progress=False)
    assert {path.name for path in code_files(tmp_path / "out")} == CODE.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == MAP


@pytest.mark.parametrize(
    ("do", "source"),
    [(do, "merged") for do in (can_export, inspect, verify, load_quantized)]
    + [(do, "adapter") for do in (can_export, inspect)],
)
@pytest.mark.usefixtures("nobody")
def test_without_leave_nothing_runs_and_nobody_is_asked(folders: dict[str, Path], source: str, do: Any):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        do(folders[source])


def test_which_files_count(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "here.A", "AutoConfig": "me/far--b.C"}})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["words.T", None]}}))
    (tmp_path / "here.py").write_text("from .deeper import x\n")
    (tmp_path / "deeper.py").write_text("from .gone import y\n")
    (tmp_path / "words.py").write_text("")
    (tmp_path / "train.py").write_text("")
    assert sorted(os.path.basename(path) for path in code_files(tmp_path)) == ["deeper.py", "here.py", "words.py"]
