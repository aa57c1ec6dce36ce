"""`export` and `can_export`: what they refuse, and what a folder looks like afterwards, or does not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from peft_lrqat import can_export, export
from peft_lrqat.checkpoint import export as exporting
from peft_lrqat.checkpoint.open import open_source
from peft_lrqat.formats.gguf.writer import TYPES
from peft_lrqat.grid import TERNARY, Grid
from tests.files import read
from tests.grids import on_grid
from tests.memory import LiveBytes
from tests.models import adapted, logits, tiny, tokens, train

GRID = Grid(4, 32)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "a": 1, "b": 2}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), unk_token="<unk>")
    made.chat_template = "{{ messages }}"
    return made


def reloaded(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder).eval(), tokens())


class TestFolder:
    def test_a_peft_model_is_exported_and_stays_as_it_is(self, tmp_path: Path):
        model = adapted(tiny("qwen2"), bits=4, group_size=8)
        train(model, tokens())
        expected, before = logits(model, tokens()), {n: t.clone() for n, t in model.state_dict().items()}
        report = export(model, tmp_path / "out", progress=False)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(logits(model, tokens()), expected)
        assert torch.equal(reloaded(tmp_path / "out"), expected)
        assert (report.layers, report.loss, report.container) == (14, None, "pack-quantized, 4 bits")
        assert report.grid == "4 bits, symmetric, groups of 8"
        sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
        assert report.total_bytes == sum(sizes.values()) - sizes["README.md"]
        packed = [t for name, t in read(tmp_path / "out").items() if ".weight_" in name]
        assert report.layer_bytes == sum(t.nbytes for t in packed)
        assert f"{report.bits_per_weight:.2f} bits a weight" in str(report)

    def test_everything_else_is_written_too(self, tmp_path: Path):
        model = on_grid(GRID)
        model.generation_config = GenerationConfig(max_new_tokens=7)
        model.name_or_path = "someone/tiny"
        export(model, tmp_path / "out", "gptq", tokenizer=tokenizer(), progress=False)
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert files >= {"model.safetensors", "config.json", "generation_config.json", "quantize_config.json"}
        assert files >= {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert json.loads((tmp_path / "out/generation_config.json").read_text())["max_new_tokens"] == 7
        card = (tmp_path / "out" / "README.md").read_text()
        for said in ("someone/tiny", "4 bits, symmetric, groups of 32", "gptq", "GPTQModel.load", "were trained"):
            assert said in card
        assert json.loads((tmp_path / "out/config.json").read_text())["peft_lrqat"]["bits"] == 4

    def test_the_tokenizer_of_the_source_folder_comes_along(self, tmp_path: Path):
        on_grid(GRID).save_pretrained(tmp_path / "merged")
        tokenizer().save_pretrained(tmp_path / "merged")
        export(tmp_path / "merged", tmp_path / "out", "gptq", progress=False)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()

    def test_shards(self, tmp_path: Path):
        model = on_grid(GRID)
        export(model, tmp_path / "whole", progress=False)
        export(model, tmp_path / "shards", max_shard_size="10KB", progress=False)
        files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
        assert len(files) > 3
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        whole, shards = read(tmp_path / "whole"), read(tmp_path / "shards")
        assert whole.keys() == shards.keys()
        assert all(torch.equal(whole[name], shards[name]) for name in whole)
        index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "shards" / file, framework="pt") as opened:
                assert name in opened.keys()  # noqa: SIM118
        assert torch.equal(reloaded(tmp_path / "shards"), logits(model, tokens()))

    def test_a_failure_leaves_nothing(self, tmp_path: Path, monkeypatch):
        model = on_grid(GRID)
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "mine.txt").write_text("kept")
        layer = model.model.layers[0].mlp.down_proj
        monkeypatch.setattr(layer, "grid_tensor", lambda: 1 / 0)
        for out, options in (("new", {}), ("old", {"overwrite": True})):
            with pytest.raises(ZeroDivisionError):
                export(model, tmp_path / out, progress=False, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["old"]
        assert (tmp_path / "old" / "mine.txt").read_text() == "kept"

    def test_a_full_folder_is_replaced_only_if_told(self, tmp_path: Path):
        model, out = on_grid(GRID), tmp_path / "out"
        out.mkdir()
        export(model, out, progress=False)  # an empty one is taken
        (out / "old.txt").write_text("")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            export(model, out, progress=False)
        export(model, out, overwrite=True, progress=False)
        assert not (out / "old.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        (tmp_path / "file").write_text("")
        with pytest.raises(FileExistsError, match="is a file"):
            export(model, tmp_path / "file", overwrite=True, progress=False)

    def test_a_bar_counts_layers(self, tmp_path: Path, capsys):
        export(on_grid(GRID), tmp_path / "a")
        shown = capsys.readouterr().err
        assert "Writing compressed-tensors" in shown
        assert "7/7" in shown
        export(on_grid(GRID), tmp_path / "b", progress=False)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_memory_does_not_grow_with_the_model(format: str, tmp_path: Path):
    def above(layers: int) -> tuple[int, int]:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers}
        model = adapted(tiny("llama", **sizes), bits=4, group_size=32, range_method="minmax")
        held = [*model.parameters(), *model.buffers()]
        with LiveBytes(held) as live:
            export(model, tmp_path / f"{format}-{layers}", format, progress=False)
        return live.peak - live.start, sum(t.nbytes for t in held)

    (few, _), (many, held) = above(1), above(6)
    assert many <= 1.1 * few
    assert many < held / 2


class TestRefusals:
    @pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
    def test_containers_that_do_not_exist(self, bits):
        with pytest.raises(ValueError, match="`container_bits` is"):
            can_export(on_grid(GRID), container_bits=bits)

    @pytest.mark.parametrize("size", ["5 apples", 0, -1, True, "GB"])
    def test_shard_sizes(self, size, tmp_path):
        with pytest.raises(ValueError, match="`max_shard_size` is"):
            export(on_grid(GRID), tmp_path / "out", max_shard_size=size)

    @pytest.mark.parametrize(("format", "grid", "settings", "said"), [
        ("compressed-tensors", Grid(4, 32), {"container_bits": 3}, "container_bits=3, but compressed-tensors holds"),
        ("gptq", Grid(5, 32), {"container_bits": 5}, r"holds codes of 5 bits in [8]"),
        ("gptq", Grid(4, 8), {}, "groups of 8; GPTQ's kernels take multiples of 16"),
        ("torchao", Grid(8, 32), {"container_bits": 4}, "codes of 8 bits in [8]"),
        ("bitnet", Grid(1.58, 0), {"container_bits": 4}, "BitNet stores 2 bits a code"),
    ])  # fmt: skip
    def test_reasons(self, format, grid, settings, said, tmp_path):
        model = on_grid(grid)
        check = can_export(model, format, **settings)
        assert not check
        assert said in str(check)
        assert "What helps: " in str(check)
        with pytest.raises(ValueError, match="not possible"):
            export(model, tmp_path / "out", format, progress=False, **settings)
        assert list(tmp_path.iterdir()) == []

    def test_a_channel_that_cannot_be_repeated(self):
        model = on_grid(Grid(4, -1), hidden_size=64, intermediate_size=100)
        assert "does not divide by 32" in str(can_export(model, "gptq"))
        check = can_export(on_grid(Grid(3, -1)), "gptq")
        assert check
        assert str(check) == "gptq: exact."

    def test_gpt2_has_no_linear_layer_to_pack(self, tmp_path):
        """A quantized format without one quantized layer would be none; what the message names does work."""
        model = adapted(tiny("gpt2"), group_size=8)
        train(model, tokens())
        for format in ("compressed-tensors", "gptq", "torchao", "bitnet"):
            said = str(can_export(model, format))
            assert "nn.Linear layers only" in said
            assert "merge and save_pretrained" in said
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
        assert torch.equal(reloaded(tmp_path), logits(merged, tokens()))

    def test_a_head_outside_of_the_blocks(self):
        model = adapted(tiny(hidden_size=64, intermediate_size=96), group_size=32, target_modules=["lm_head", "q_proj"])
        assert "outside of the model's blocks" in str(can_export(model, "gptq"))
        assert can_export(model, "compressed-tensors")


_QUESTIONS = [
    ("compressed-tensors", {}), ("torchao", {}), ("bitnet", {}),
    ("gptq", {}), ("gptq", {"checkpoint_format": "gptq_v2"}),
    *(("gguf", {"type": type, "vocabulary": False}) for type in TYPES),
]  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (TERNARY, 3, 5, 6, 7, 8))])
def test_the_question_and_the_deed_are_one_rule(bits, symmetric, tmp_path: Path):
    """`can_export` says exact if and only if `export` succeeds, for every format and every type of GGUF."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 256}
    wrong = []
    for group in (-1, 16, 64) if symmetric or bits != TERNARY else ():
        model = on_grid(Grid(bits, group, symmetric), leave_out=("_attn", "gate", "up_proj"), **sizes)
        for format, options in _QUESTIONS:
            said = bool(can_export(model, format, **options))
            try:
                export(model, tmp_path / "out", format, overwrite=True, progress=False, **options)
                done = True
            except ValueError:
                done = False
            if said != done:
                wrong.append((group, format, options, said, done))
    assert not wrong


def test_a_type_that_values_decide_about_is_asked_with_the_scales_that_would_be_written(tmp_path: Path):
    """Scales that are rounded to fp16, where that is allowed, can make or break a type that stores multiples."""
    options = {"type": "q4_0", "vocabulary": False, "allow_inexact": True}
    for grid, exact in ((Grid(2, 32, False), True), (Grid(4, 32, False), False)):
        model = on_grid(grid, scale_dtype="fp32", dtype=torch.float32)
        check = can_export(model, "gguf", **options)
        assert bool(check) is exact
        if exact:
            assert export(model, tmp_path / "out", "gguf", progress=False, **options).loss
        else:
            assert "Q4_0 cannot hold it: levels from" in str(check)
            assert "Q5_0 holds it" in str(check)


def test_embeddings_on_a_grid_become_dense(tmp_path: Path):
    model = adapted(tiny("llama"), group_size=8, target_modules=["embed_tokens", "q_proj"])
    train(model, tokens())
    expected = logits(model, tokens())
    report = export(model, tmp_path / "out", progress=False)
    assert report.dense == ("model.embed_tokens",)
    assert "as floats on the grid: model.embed_tokens" in str(report)
    table = open_source(model).layer("model.embed_tokens").dequantize(torch.float32)
    assert torch.equal(read(tmp_path / "out")["model.embed_tokens.weight"], table)
    assert torch.equal(reloaded(tmp_path / "out"), expected)


def test_what_is_wrong_with_the_place_is_found_before_the_source_is_opened(tmp_path: Path, monkeypatch):
    on_grid(GRID).save_pretrained(tmp_path / "merged")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(exporting, "open_source", lambda source: pytest.fail("opened"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out", full, tmp_path / "merged", tmp_path, Path(".")):
        with pytest.raises(OSError, match=r"file|cannot be written in|not empty|lost|working directory"):
            export(tmp_path / "merged", out, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "merged"]


@pytest.mark.parametrize("flag", ["overwrite", "allow_inexact", "trust_remote_code"])
def test_flags_are_true_or_false(flag: str, tmp_path: Path):
    """The text "no" would overwrite, round, and run a stranger's code."""
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match=f"`{flag}` is 'no'; allowed are True, False"):
        export(on_grid(GRID), tmp_path, progress=False, **{flag: "no"})
    assert (tmp_path / "mine").is_file()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"The codes alone take .* GB"):
        export(on_grid(GRID), tmp_path / "new" / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_two_exports_into_one_folder(tmp_path: Path, monkeypatch):
    """The second is refused while the first is at work, and neither is lost."""
    model, refused = on_grid(GRID), []

    def meanwhile(*args):
        monkeypatch.undo()
        with pytest.raises(BlockingIOError, match="Another export is writing"):
            export(model, tmp_path / "out", "gptq", overwrite=True, progress=False)
        refused.append(True)

    monkeypatch.setattr(exporting, "check_written", meanwhile)
    export(model, tmp_path / "out", progress=False)
    assert refused
    assert open_source(tmp_path / "out").format == "compressed-tensors"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_leads_to_what_is_written(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(on_grid(GRID), tmp_path / "link", progress=False)
    assert (tmp_path / "real" / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_activations_that_are_rounded_otherwise_are_not_called_exact(tmp_path: Path):
    report = export(on_grid(Grid(8, -1), act="compressed-tensors"), tmp_path / "out", "torchao", allow_inexact=True)
    assert "NOT exact: the model was trained with 8-bit activations" in str(report)
    assert "exact: codes" not in str(report)
