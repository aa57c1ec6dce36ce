"""The commands, as a user types them: what they print, what they write, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM
from typer.testing import CliRunner

from _peft_lrqat_cli import app
from peft_lrqat import __version__, export
from peft_lrqat.checkpoint import verify as verification
from peft_lrqat.cli import commands
from peft_lrqat.formats import FORMATS
from peft_lrqat.grid import Grid
from tests.grids import on_grid
from tests.hub import offline_cache
from tests.models import adapted, tiny, tokens, train

ROOT = Path(__file__).parents[2]


def run(*args, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "merged"
    on_grid(Grid(3, 32), family="qwen2", container_bits=4).save_pretrained(folder)
    return folder


class TestExport:
    def test_an_adapters_folder(self, tmp_path):
        base = tiny("qwen2", num_hidden_layers=1)
        base.save_pretrained(tmp_path / "base")
        base.name_or_path = str(tmp_path / "base")
        model = adapted(base, bits=4, group_size=8)
        train(model, tokens())
        model.save_pretrained(tmp_path / "adapter")
        said = run("export", tmp_path / "adapter", tmp_path / "out", "--quiet")
        assert "exact: codes and scales are the trained ones" in said
        said = run("verify", tmp_path / "out", "--against", tmp_path / "adapter")
        assert said.count("equal ") >= 4
        assert f"checkpoint: {tmp_path}/out (compressed-tensors)\ncompared with: {tmp_path}/adapter\n" in said
        assert "loaded with: transformers" in said
        assert "%|" not in said  # bars, of compressed-tensors too
        assert "NOT" not in said
        assert "compared with: the integers and scales of its own files\n" in run("verify", tmp_path / "out")
        # the folder of an adapter is no checkpoint, but can be looked at
        said = run("inspect", tmp_path / "adapter")
        assert "adapter" in said
        assert " LR-QAT (arXiv 2406.06385): rank 4, " in said  # no Markdown, which a terminal shows as it is
        assert "Export it first" in run("verify", tmp_path / "adapter", code=2)

    def test_checking_writes_nothing(self, merged, tmp_path):
        assert run("export", merged, tmp_path / "out", "-f", "gptq", "--check") == "gptq: exact.\n"
        said = run("export", merged, tmp_path / "out", "-f", "bitnet", "--check", code=1)
        assert "not possible" in said
        assert "ternary" in said
        assert list(tmp_path.iterdir()) == []

    def test_options(self, merged, tmp_path):
        args = ("export", merged, tmp_path / "out", "-f", "gptq", "-q", "--container-bits", 4)
        assert "gptq_v2, 4 bits" in run(*args, "-o", "checkpoint-format=gptq_v2")
        assert "is not empty. Name another, or use --overwrite." in run(*args, code=2)
        assert "gptq, 4 bits" in run(*args, "--overwrite")

    def test_a_loss_that_is_allowed_is_not_advised_again(self, merged, tmp_path):
        said = run("export", merged, tmp_path / "out", "-f", "bitnet", "--allow-inexact", code=2)
        assert "not possible" in said
        assert "--allow-inexact" not in said

    @pytest.mark.parametrize("no", ["False", "false"])
    def test_a_file_without_a_vocabulary(self, tmp_path, no):
        """What the message says to type is what can be typed."""
        model = on_grid(Grid(4, 32), family="llama")
        model.save_pretrained(tmp_path / "merged")
        args = ("export", tmp_path / "merged", tmp_path / "out", "-f", "gguf", "-q")
        assert "Give `--tokenizer` (or -o vocabulary=false for a file" in run(*args, code=2)
        assert "exact" in run(*args, "-o", f"vocabulary={no}")
        assert "`-o vocabulary` is 'no'" in run(*args, "--overwrite", "-o", "vocabulary=no", code=2)

    @pytest.mark.parametrize(("args", "said"), [
        (("nowhere", "out"), "There is no folder 'nowhere'"),
        (("MERGED", "out", "-f", "awq"), "'compressed-tensors', 'gptq', 'bitnet', 'torchao', 'gguf'"),
        (("MERGED", "out", "-o", "x=1"), "no option 'x'"),
        (("MERGED", "out", "-o", "x"), "NAME=VALUE"),
        (("MERGED", "out", "--container-bits", "2"), "--container-bits 2, but compressed-tensors holds"),
        (("MERGED", "out", "--container-bits", "9"), "`--container-bits` is 9; it must be"),
        (("MERGED", "out", "--tokenizer", "none"), "`--tokenizer` is 'none', no folder"),
    ])  # fmt: skip
    def test_errors_are_sentences(self, merged, tmp_path, monkeypatch, args, said):
        monkeypatch.chdir(tmp_path)
        output = run("export", *(merged if arg == "MERGED" else arg for arg in args), code=2)
        assert said in output
        assert "Traceback" not in output
        assert list(tmp_path.iterdir()) == []


class TestMerge:
    def test_an_adapter_of_the_hub(self, tmp_path, monkeypatch):
        base = tiny("qwen2", num_hidden_layers=1)
        base.save_pretrained(tmp_path / "base")
        base.name_or_path = str(tmp_path / "base")
        adapted(base, group_size=8, range_method="minmax").save_pretrained(tmp_path / "adapter")
        offline_cache(tmp_path / "cache", monkeypatch).put("me/adapter", tmp_path / "adapter")
        said = run("merge", "me/adapter", tmp_path / "out")
        assert f"{tmp_path}/out: compressed-tensors (4 bits), 7 layers on the grid 4 bits, symmetric" in said
        assert "exact: codes and scales are the trained ones" in said
        assert "NOT" not in run("verify", tmp_path / "out", "--against", "me/adapter", "--no-engine")
        assert "is not empty. Name another, or use --overwrite." in run("merge", "me/adapter", tmp_path / "out", code=2)

    def test_what_is_no_adapter(self, merged, tmp_path):
        said = run("merge", merged, tmp_path / "out", code=2)
        assert "merged already is written in other formats by `export`" in said
        assert list(tmp_path.iterdir()) == []


class TestInspect:
    def test_a_terminal(self, merged):
        said = run("inspect", merged)
        assert re.search(r" bits a weight with scales \(\d+\.\d kB\), \d+\.\d kB in all\n", said)
        for fact in (
            "compressed-tensors, 4-bit container",
            "3 bits, symmetric, groups of 32",
            "7, 30,720 weights",
            "exact in float16 and bfloat16",
            "yes transformers + compressed-tensors",
            "yes vLLM on a CPU",
            "(read in its source, not run)",
        ):
            assert fact in said, (fact, said)
        shares = [line.split() for line in said.splitlines() if line.endswith("%")]
        assert [share[0] for share in shares] == [str(code) for code in range(-4, 4)]
        assert sum(float(share[-1].rstrip("%")) for share in shares) == pytest.approx(100, abs=0.05)

    def test_a_picture_without_a_folder_is_refused_before_anything_is_read(self, tmp_path):
        said = run("inspect", "nowhere", "--plot", tmp_path / "missing" / "codes.svg", code=2)
        assert "missing" in said
        assert "Make it first" in said

    def test_a_picture_of_an_unknown_kind(self, merged, tmp_path):
        pytest.importorskip("matplotlib")
        said = run("inspect", merged, "--plot", tmp_path / "codes.foo", code=2)
        assert f"--plot {tmp_path / 'codes.foo'}: Format 'foo' is not supported" in said

    def test_json_and_plot(self, merged, tmp_path, monkeypatch):
        offline_cache(tmp_path / "cache", monkeypatch).put("me/model", merged)
        found = json.loads(run("inspect", "me/model", "--json", "--plot", tmp_path / "codes.svg"))
        assert (found["bits"], found["group_size"], found["container_bits"]) == (3, 32, 4)
        assert sum(found["histogram"].values()) == found["weights"] == 30720
        assert found["inexact_scales"] == {"float16": 0, "bfloat16": 0}
        assert 2.9 < found["entropy"] <= 3
        assert "<svg" in (tmp_path / "codes.svg").read_text()

    def test_scales_that_change(self, tmp_path):
        on_grid(Grid(8, -1), dtype=torch.float32, scale_dtype="fp32").save_pretrained(tmp_path)
        said = run("inspect", tmp_path)
        assert "exact in neither float16 nor bfloat16" in said
        assert "change in float16" in said
        assert "no  vLLM on a CPU: no kernel for 8-bit" in said
        rows = [line for line in said.splitlines() if line.endswith("%")]
        assert 16 <= len(rows) <= 24
        assert ".." in rows[0]

    @pytest.mark.parametrize("format", ["gptq", "torchao"])
    def test_other_formats(self, merged, tmp_path, format):
        export(merged, tmp_path / "out", format, container_bits=3, progress=False)
        found = json.loads(run("inspect", tmp_path / "out", "--json"))
        assert (found["format"], found["bits"]) == (format, 3)
        # in 3 bits; CPU and GPU kernels of vLLM, and onnxruntime's, are of other widths
        assert [e["loads"] for e in found["engines"]] == [True, True, False, False, False][: len(found["engines"])]

    def test_a_float_model(self, tmp_path):
        tiny().save_pretrained(tmp_path)
        assert "is float" in run("inspect", tmp_path, code=2)


class TestVerify:
    @pytest.mark.parametrize(("grid", "act", "format"), [
        (Grid(4, 32, False), None, "compressed-tensors"),
        (Grid(8, -1), "compressed-tensors", "compressed-tensors"),
        (Grid(2, 32), None, "torchao"),
    ])  # fmt: skip
    def test_an_engine_gives_what_was_trained(self, grid, act, format, tmp_path):
        model = on_grid(grid, family="llama", act=act)
        model.save_pretrained(tmp_path / "merged")
        export(model, tmp_path / "out", format, progress=False)
        said = run("verify", tmp_path / "out", "--against", tmp_path / "merged")
        assert "NOT EQUAL" not in said
        assert said.count("equal ") >= 3
        assert "largest difference 0.00e+00" in said

    def test_a_changed_code_and_a_changed_tensor_are_found(self, merged, tmp_path):
        export(merged, tmp_path / "out", progress=False)
        path = tmp_path / "out" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight_packed"][0, 0] ^= 1
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
        said = run("verify", tmp_path / "out", "--against", merged, code=1)
        assert "NOT EQUAL codes, scales, zero points: 1 of 7 layers differ: model.layers.0.mlp.up_proj" in said
        assert "NOT EQUAL other tensors: model.norm.weight differs" in said
        assert "NOT EQUAL the engine's weights: 6 of 7 layers equal" in said
        assert "NOT EQUAL logits" in said

    def test_json(self, merged):
        found = json.loads(run("verify", merged, "--against", merged, "--no-engine", "--json"))
        assert found["equal"] is True
        assert {finding["what"]: finding["equal"] for finding in found["findings"]} == {
            "codes, scales, zero points": True,
            "other tensors": True,
        }
        assert (found["checkpoint"], found["against"]) == (f"{merged} (compressed-tensors)", str(merged))

    def test_a_missing_engine_is_named(self, merged, tmp_path, monkeypatch):
        monkeypatch.setitem(verification._NEEDS, "compressed-tensors", ["no_such_engine"])
        said = run("verify", merged, "--against", merged)
        assert "loaded with: nothing" in said
        assert "not installed: no_such_engine" in said
        assert "equal     codes" in said
        assert "needs no_such_engine" in run("verify", merged, code=2)
        assert "nothing to compare" in run("verify", merged, "--no-engine", code=2)


class TestFilesOfAStranger:
    """One line and exit code 2, whatever is in them; more of them in tests/checkpoint/test_damage.py."""

    def refused(self, *args) -> str:
        said = run(*args, code=2)
        assert said.count("\n") == 1
        assert said.startswith("error: ")
        assert said[:-1].isprintable()
        return said

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_each_command(self, command, merged, tmp_path):
        folder = shutil.copytree(merged, tmp_path / "folder")
        described = json.loads((folder / "config.json").read_text())
        for change, said in (
            ({"model_type": "x"}, "model type `x`"),
            ({"model_type": "\x1b[2J"}, r"model type `\x1b[2J`"),
            ({"quantization_config": {"quant_method": "\ud800\n" * 5000}}, "..."),
            ({"num_hidden_layers": 10**9}, "`num_hidden_layers` is"),
        ):
            (folder / "config.json").write_text(json.dumps({**described, **change}))
            assert said in self.refused(command, folder)
        (folder / "config.json").write_text("[" * 10**5)
        assert "damaged" in self.refused(command, folder)
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
        assert "GGUF version" in self.refused("inspect", tmp_path / "a.gguf")

    def test_names_that_are_no_text(self, merged, tmp_path):
        strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe\x1b")
        shutil.copytree(merged, strange)
        for args in (("inspect", strange), ("export", strange, tmp_path / "out"), ("export", merged, strange + "/out")):
            assert r"\udcff\udcfe\x1b" in (said := self.refused(*args))
            assert "is not UTF-8" in said
        assert r"no folder" in self.refused("inspect", strange + "/x")

    def test_names_in_files_are_shown_not_obeyed(self, merged, tmp_path):
        folder = shutil.copytree(merged, tmp_path / "folder")
        described = json.loads((folder / "config.json").read_text())
        described["peft_lrqat"]["recipe"] = "[red]a[/red]\x1b[2J\x07"
        (folder / "config.json").write_text(json.dumps(described))
        said = run("inspect", folder)
        assert r"[red]a[/red]\x1b[2J\x07" in said
        assert "\x1b" not in said

    def test_an_engine_that_cannot_load_it(self, merged, monkeypatch):
        def load(*args, **kwargs):
            raise AttributeError("no such thing")

        monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", load)
        assert "AttributeError: no such thing" in self.refused("verify", merged)


class TestWithoutTorch:
    """What is answered at once, in a process of its own, because everything is imported in this one."""

    def at_once(self, *args: str) -> str:
        code = """
import sys, _peft_lrqat_cli
try:
    _peft_lrqat_cli.main()
finally:
    assert not {"torch", "transformers", "peft_lrqat"} & set(sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
        assert done.stderr == ""
        assert done.returncode == 0
        return done.stdout

    def test_help_and_versions(self):
        said = self.at_once("--help")
        for command in ("export", "merge", "inspect", "verify", "autoload"):
            assert f"\n  {command} " in said
            assert f"Usage: peft-lrqat {command} [OPTIONS] " in self.at_once(command, "--help")
        assert "    2    the input cannot be used" in said
        assert self.at_once("--version").startswith(f"peft-lrqat {__version__}\nwith peft ")

    def test_formats(self):
        assert f"<{'|'.join(FORMATS)}>" in run("export", "--help")


class TestExitCodes:
    @pytest.mark.parametrize(("error", "code", "said"), [
        (ValueError("use `overwrite=True`"), 2, "error: use --overwrite\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (KeyError("x"), 3, "error: KeyError, which is a fault of peft-lrqat"),
    ])  # fmt: skip
    def test_what_is_raised(self, error, code, said, merged, monkeypatch):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(commands, "inspect_folder", fail)
        printed = run("inspect", merged, code=code)
        assert said in printed
        assert ("Traceback" in printed) == (code == 3)

    def test_warnings_are_lines(self, merged, monkeypatch):
        def warn(*args, **kwargs):
            warnings.warn("use\ncontainer_bits=4", stacklevel=1)
            warnings.warn_explicit("old", FutureWarning, "another.py", 1)
            raise ValueError("stop")

        monkeypatch.setattr(commands, "inspect_folder", warn)
        assert run("inspect", merged, code=2) == "warning: use --container-bits 4\nerror: stop\n"


def test_autoload(tmp_path):
    there = ("--directory", tmp_path)
    assert run("autoload", "status", *there, code=1).startswith("disabled: ")
    assert run("autoload", "enable", *there).startswith("enabled: wrote ")
    assert run("autoload", "status", *there).startswith("enabled: ")
    assert run("autoload", "disable", *there).startswith("disabled: ")
    assert list(tmp_path.iterdir()) == []
    assert "does not exist or is not writable" in run("autoload", "enable", "--directory", tmp_path / "x", code=2)
