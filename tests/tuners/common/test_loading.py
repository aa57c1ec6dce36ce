"""A model that is quantized while it is loaded is, bit for bit, the one that is loaded in float and converted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from peft_lrqat import LowBitAdamW, LRQATConfig, preprocess_gptq
from peft_lrqat.tuners.common import loading, parallel
from peft_lrqat.tuners.common.frozen import FrozenWeight
from tests import lowbit_sr, lrqat
from tests.architectures import ARCHITECTURES
from tests.mixtures import mixture
from tests.models import logits, tiny, tokens, train
from tests.trainer import arguments, losses

IDS = tokens()


def load(folder: Path, config: Any = None, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A checkpoint, quantized while it is loaded where there is a configuration."""
    if config is not None:
        options["quantization_config"] = config.for_loading()
    return kind.from_pretrained(folder, **options)


def prepared(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FrozenWeight)]


def adapt(model: Any, config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, config)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model, packed ones as they are stored."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if hasattr(tensor, "packed"):
            found |= {f"{name}.packed": tensor.packed, f"{name}.scale": tensor.scale}
        else:
            found[name] = tensor
    return found


def same(one: nn.Module, other: nn.Module) -> None:
    """Assert that two models hold the same tensors."""
    ours, theirs = stored(one), stored(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def same_base(one: PeftModel, other: PeftModel) -> None:
    """Assert that two adapters were made for the same base."""
    ours, theirs = one.peft_config["default"], other.peft_config["default"]
    assert ours.base_fingerprint == theirs.base_fingerprint
    assert ours.base_checksum == theirs.base_checksum


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("qwen2", torch.float32), ("gpt2", torch.float32)]
)
def test_loaded_trained_and_merged_as_after_converting(
    method: ModuleType, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny(family).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    config = method.config(group_size=-1)
    floats = load(tmp_path / "base", dtype=dtype)
    loaded = load(tmp_path / "base", config, dtype=dtype)
    kinds = [name for name, module in floats.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    assert prepared(loaded) == [name for name in kinds if name != "lm_head"]
    assert not any(parameter.is_meta for parameter in loaded.parameters())

    converted, adopted = adapt(floats, config), adapt(loaded, config)
    same(converted, adopted)
    same_base(converted, adopted)
    kind = torch.optim.AdamW if method is lrqat else LowBitAdamW
    assert train(converted, IDS, lr=1e-3, kind=kind) == train(adopted, IDS, lr=1e-3, kind=kind)
    same(converted.merge_and_unload(), adopted.merge_and_unload())


def test_never_more_than_one_weight_is_float(
    method: ModuleType, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    quantize = loading.LoadingQuantizer.quantize

    def watched(self: Any, model: Any, name: str, weight: torch.Tensor) -> bool:
        done = quantize(self, model, name, weight)
        seen.append([n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not m.weight.is_meta])
        return done

    monkeypatch.setattr(loading.LoadingQuantizer, "quantize", watched)
    model = load(base_folder, method.config())
    assert len(seen) == len(prepared(model)) == 14
    assert all(set(names) <= {"lm_head"} for names in seen)


def test_without_an_adapter_it_is_the_rounded_model(method: ModuleType, base_folder: Path, tmp_path: Path) -> None:
    model = load(base_folder, method.config())
    rounded = method.adapt(load(base_folder), **method.GRID).unload()
    assert torch.equal(logits(model, IDS), logits(rounded, IDS))
    assert torch.equal(model.generate(IDS, max_new_tokens=3), rounded.generate(IDS, max_new_tokens=3))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path), IDS), logits(rounded, IDS))


def test_nothing_says_that_the_model_is_quantized(method: ModuleType, base_folder: Path) -> None:
    model = load(base_folder, method.config())
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    assert not any(getattr(m.config, "_is_quantized", False) for m in model.modules() if hasattr(m, "config"))


def test_adapters_load_whichever_way_the_base_was_loaded(method: ModuleType, base_folder: Path, tmp_path: Path) -> None:
    first = adapt(load(base_folder, method.config()), method.config(**method.MOVED))
    first.save_pretrained(tmp_path / "a")
    config = PeftConfig.from_pretrained(tmp_path / "a")
    expected = logits(first.eval(), IDS)
    for base in (load(base_folder), load(base_folder, config)):
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "a").eval(), IDS), expected)
    other_way = method.random_adapter(load(base_folder))
    other_way.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(load(base_folder, method.config()), tmp_path / "b").eval()
    assert torch.equal(logits(again, IDS), logits(other_way, IDS))


def test_an_adapter_loads_with_little_memory(method: ModuleType, base_folder: Path, saved: Path) -> None:
    model = load(base_folder, PeftConfig.from_pretrained(saved))
    model = PeftModel.from_pretrained(model, saved, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(model, IDS), logits(PeftModel.from_pretrained(tiny(), saved).eval(), IDS))


def test_a_base_that_is_dropped_is_not_copied(base_folder: Path) -> None:
    config = lowbit_sr.config(keep_base=False)
    loaded = load(base_folder, config)
    where = {name: loaded.get_submodule(name).base.data_ptr() for name in prepared(loaded)}
    adopted = adapt(loaded, config)
    same(adopted, adapt(load(base_folder), config))
    layers = lowbit_sr.layers(adopted.base_model.model)
    assert {name: layer.lowbitsr_weight["default"].weight.packed.data_ptr() for name, layer in layers.items()} == where


def test_transformers_own_road_to_an_adapter(method: ModuleType, base_folder: Path, tmp_path: Path) -> None:
    adapter = method.random_adapter(load(base_folder))
    adapter.save_pretrained(tmp_path)
    model = load(tmp_path, PeftConfig.from_pretrained(tmp_path))
    assert not prepared(model) or all(name.endswith(".base_layer") for name in prepared(model))
    assert torch.equal(logits(model.eval(), IDS), logits(adapter, IDS))


def test_another_grid_is_refused(method: ModuleType, base_folder: Path) -> None:
    model = load(base_folder, method.config())
    before = stored(model)
    for options in ({"group_size": 16}, {"range_method": "minmax", "signed_scales": False}, {"bits": 3}):
        with pytest.raises(ValueError, match=r"asks for .* while the model\s+was loaded.*for_loading"):
            get_peft_model(model, method.config(**options))
    with pytest.raises(ValueError, match=r"10 layers were quantized while .* 'model.layers.0.mlp.*for_loading"):
        get_peft_model(model, method.config(target_modules=method.ATTENTION))
    assert stored(model).keys() == before.keys()
    assert all(before[n] is t for n, t in stored(model).items())
    assert prepared(adapt(model, method.config()))  # and the model is as it was


def test_open_options_are_those_of_the_layers(base_folder: Path) -> None:
    model = load(base_folder, LRQATConfig(bits=3, group_size=8, downcast="int"))
    config = get_peft_model(model, LRQATConfig()).peft_config["default"]
    assert (config.bits, config.group_size, config.downcast) == (3, 8, "int")


def test_what_is_targeted_beyond_is_converted(method: ModuleType, base_folder: Path) -> None:
    loaded = load(base_folder, method.config(target_modules=method.ATTENTION))
    assert len(prepared(loaded)) == 4
    same(adapt(loaded, method.config()), adapt(load(base_folder), method.config()))


def test_what_the_checkpoint_does_not_hold_as_it_is_stays_float(base_folder: Path, tmp_path: Path) -> None:
    model = tiny("qwen2")
    state = model.state_dict()
    del state["model.layers.0.self_attn.q_proj.bias"], state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = load(tmp_path, lrqat.config())
    floats = {name for name, module in loaded.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert floats == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    assert not loaded.get_submodule("model.layers.0.self_attn.q_proj").bias.any()  # as transformers initializes it
    with pytest.raises(ValueError, match=r"down_proj.*NaN or infinite"):
        get_peft_model(loaded, lrqat.config())


def test_embeddings_are_converted_by_get_peft_model(base_folder: Path) -> None:
    config = lrqat.config(target_modules=["embed_tokens", "q_proj"])
    loaded = load(base_folder, config)
    assert len(prepared(loaded)) == 2
    same(adapt(loaded, config), adapt(load(base_folder), config))


def test_refused_before_a_weight_is_read(
    method: ModuleType, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("disk", "cpu"):
        where = {"model.embed_tokens": "meta", "model.layers": place, "model.norm": "meta", "lm_head": "meta"}
        with pytest.raises(ValueError, match=r"`device_map` leaves a part .*model.layers"):
            load(base_folder, method.config(), device_map=where)
    with pytest.raises(ValueError, match=r"does not divide|divis"):
        load(base_folder, method.config(group_size=7))
    tiny(tie=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'lm_head'.* is tied to 'model.embed_tokens'"):
        load(tmp_path, method.config(target_modules=["lm_head"]))
    monkeypatch.setattr(parallel, "_accelerate_state", lambda: None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="FSDP1"):
        load(base_folder, method.config())


def test_a_quantized_checkpoint_is_refused(method: ModuleType, base_folder: Path, tmp_path: Path) -> None:
    method.adapt(load(base_folder), **method.GRID).merge_and_unload().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized with CompressedTensorsConfig"):
        load(tmp_path, method.config())


def test_loftq_needs_the_float_weights(base_folder: Path) -> None:
    with pytest.raises(ValueError, match="'loftq', which needs the float weights"):
        lrqat.config(init_lora_weights="loftq").for_loading()
    with pytest.raises(ValueError, match="'loftq'` needs the float weight"):
        get_peft_model(load(base_folder, lrqat.config()), lrqat.config(init_lora_weights="loftq"))


def test_a_cache_that_transformers_would_not_round_is_refused(method: ModuleType, tmp_path: Path) -> None:
    ARCHITECTURES["GPT-NeoX"].build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"would not round the cache of 'gpt_neox\.layers\.0\.attention'"):
        load(tmp_path, method.config(target_modules="all-linear", kv_bits=8))


def test_the_configuration_itself_is_refused(method: ModuleType, base_folder: Path) -> None:
    with pytest.raises(
        AttributeError, match=r"`quantization_config` is of type .*`quantization_config=config\.for_loading"
    ):
        AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=method.config())


def test_another_method_is_refused(method: ModuleType, base_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"FrozenWeight.* is not supported"):
        get_peft_model(load(base_folder, method.config()), LoraConfig(target_modules=["q_proj"]))


def test_calibration_needs_the_float_weights(method: ModuleType, base_folder: Path) -> None:
    model = load(base_folder, method.config())
    with pytest.raises(ValueError, match="quantized already; GPTQ starts from the float model"):
        preprocess_gptq(model, method.config(), [{"input_ids": IDS}])


def test_a_device_map_is_made_of_packed_sizes(method: ModuleType, base_folder: Path) -> None:
    config = method.config()
    quantizer = loading.LoadingQuantizer(config.for_loading(), pre_quantized=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny().config)
    quantizer.preprocess_model(model, dtype=torch.float32)
    sizes = {name: quantizer.param_element_size(model, name, weight) for name, weight in model.named_parameters()}
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == config.bytes_per_weight
    assert sizes["lm_head.weight"] == sizes["model.norm.weight"] == 4
    assert load(base_folder, config, device_map="auto").device.type == "cpu"


def test_hooks_and_attributes_of_the_loaded_layers_are_kept(method: ModuleType, base_folder: Path) -> None:
    model = load(base_folder, method.config())
    layer: Any = model.model.layers[0].self_attn.q_proj
    calls: list[int] = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    layer.mine = "kept"
    adopted = adapt(copy.deepcopy(model), method.config())
    assert adopted.base_model.model.model.layers[0].self_attn.q_proj.mine == "kept"
    assert not hasattr(adopted.base_model.model.model.layers[0].self_attn.q_proj, "downcast")
    model = adapt(model, method.config())
    logits(model, IDS)
    with model.disable_adapter():
        logits(model, IDS)
    assert calls == [1, 1]


def test_the_configuration_survives_json(method: ModuleType, base_folder: Path) -> None:
    config = method.config(target_modules=method.ATTENTION)
    saved = json.loads(json.dumps(config.for_loading().to_dict()))
    same(load(base_folder, config), AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=saved))


ENCODER_DECODER = transformers.T5Config(
    vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
)
EXPERTS = transformers.MixtralConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=2,
)
VISION = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    ),
    text_config=tiny().config,
    image_token_index=5,
)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        (AutoModelForSeq2SeqLM, ENCODER_DECODER),
        (AutoModelForCausalLM, EXPERTS),
        (transformers.AutoModelForImageTextToText, VISION),
    ],
    ids=["t5", "mixtral", "llava"],
)
def test_other_architectures(kind: Any, architecture: Any, method: ModuleType, tmp_path: Path) -> None:
    kind.from_config(architecture).save_pretrained(tmp_path)
    config, half = method.config(group_size=-1), {"dtype": torch.float16}  # in which T5 keeps some weights in fp32
    loaded = load(tmp_path, config, kind, **half)
    assert len(prepared(loaded)) > 7
    floats = load(tmp_path, kind=kind, **half)
    converted, adopted = adapt(floats, config), adapt(loaded, config)
    same(converted, adopted)
    same_base(converted, adopted)


class TestExperts:
    """Experts of mixtures, of which transformers gathers a projection before it is quantized."""

    CONFIG = LRQATConfig(r=2, group_size=8, range_method="minmax", task_type="CAUSAL_LM")

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("mixture")
        mixture(torch.bfloat16).save_pretrained(folder)
        return folder

    def test_they_are_those_of_a_model_that_was_converted(self, folder: Path, tmp_path: Path):
        loaded = load(folder, self.CONFIG)
        assert sum(".experts." in name for name in prepared(loaded)) == 4
        assert not any(tensor.is_meta for tensor in loaded.parameters())
        rounded = adapt(load(folder), self.CONFIG).unload()
        assert torch.equal(logits(loaded, IDS), logits(rounded, IDS))
        assert torch.equal(loaded.generate(IDS, max_new_tokens=3), rounded.generate(IDS, max_new_tokens=3))
        loaded.save_pretrained(tmp_path / "rounded")
        assert torch.equal(logits(load(tmp_path / "rounded"), IDS), logits(rounded, IDS))
        converted, adopted = adapt(load(folder), self.CONFIG), adapt(loaded, self.CONFIG)
        same(converted, adopted)
        same_base(converted, adopted)
        assert train(converted, IDS, steps=2) == train(adopted, IDS, steps=2)
        adopted.save_pretrained(tmp_path / "adapter")
        config = PeftConfig.from_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(folder, config), tmp_path / "adapter")
        assert torch.equal(logits(again, IDS), logits(converted, IDS))
        same(converted.merge_and_unload(), adopted.merge_and_unload())
        assert torch.equal(logits(again.unload(), IDS), logits(rounded, IDS))

    def test_one_projection_is_float_at_a_time(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        seen = []
        quantize = loading.LoadingQuantizer.quantize

        def watched(self: Any, model: Any, name: str, weight: torch.Tensor) -> bool:
            done = quantize(self, model, name, weight)
            seen.append([n for n, p in model.named_parameters() if p.ndim == 3 and not p.is_meta])
            return done

        monkeypatch.setattr(loading.LoadingQuantizer, "quantize", watched)
        load(folder, self.CONFIG)
        assert len(seen) == 12
        assert not any(seen)

    def test_what_cannot_be_quantized_is_refused_afterwards(self, folder: Path, tmp_path: Path):
        broken = load(folder)
        broken.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = torch.nan
        broken.save_pretrained(tmp_path)
        loaded = load(tmp_path, self.CONFIG)
        assert sum(".experts." in name for name in prepared(loaded)) == 3
        with pytest.raises(ValueError, match=r"'model.layers.1.mlp.experts.down_proj'.*NaN"):
            adapt(loaded, self.CONFIG)

    def test_experts_that_are_left_out_stay_float(self, folder: Path):
        config = copy.deepcopy(self.CONFIG)
        config.exclude_modules = ["experts"]
        loaded = load(folder, config)
        assert not any("experts" in name for name in prepared(loaded))
        same(adapt(load(folder), config), adapt(loaded, config))


def test_a_new_head_stays_float(method: ModuleType, base_folder: Path) -> None:
    config = method.config(task_type="SEQ_CLS")
    model = load(base_folder, config, AutoModelForSequenceClassification, num_labels=3)
    assert isinstance(model.score, nn.Linear)
    assert len(prepared(model)) == 14
    adopted = adapt(model, config)
    assert adopted.base_model.model.score.modules_to_save["default"].weight.requires_grad


def test_an_interrupted_load_leaves_nothing_behind(
    method: ModuleType, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = method.config()
    given = config.for_loading()
    quantize = FrozenWeight._convert
    calls: list[int] = []

    def interrupted(self: Any, weight: torch.Tensor) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return quantize(self, weight)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenWeight, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=given)
    model = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=given)
    same(adapt(model, config), adapt(load(base_folder), config))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer_loads_by_name(
    method: ModuleType, base_folder: Path, text: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    config = method.config(task_type="CAUSAL_LM")

    def run(model: Any, **options: Any) -> Any:
        args = arguments(tmp_path, SFTConfig, max_length=16, max_steps=2, **options)
        trainer = SFTTrainer(model, args, train_dataset=text, processing_class=tokenizer, peft_config=config)
        trainer.train()
        return trainer

    quantized = {"model_init_kwargs": {"quantization_config": config.for_loading(), "dtype": "float32"}}
    by_name = run(str(base_folder), **quantized)
    json.dumps(by_name.args.to_dict())
    assert losses(by_name) == losses(run(load(base_folder)))
