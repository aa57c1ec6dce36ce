"""Every architecture goes all ways: convert, train, merge, save, reload without the plugin; export; start anew on it.

What is reloaded is judged by one process for all architectures, which cannot import the plugin.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from transformers import __version__ as transformers_version

from peft_lrqat import LowBitSRConfig, LRQATConfig, can_export, export, load_quantized
from peft_lrqat.checkpoint.inspect import inspect
from tests.architectures import ARCHITECTURES, PAGE, Architecture, page
from tests.models import run_clean

# Low-bit SR merges through the same code, so a few of each kind are enough.
LOW_BIT = ("Llama", "Mixtral", "BERT", "T5", "Llava")
CASES = [*((name, "LR-QAT") for name in ARCHITECTURES), *((name, "low-bit SR") for name in LOW_BIT)]

_JUDGE = """
import json, torch
sys.path.insert(0, sys.argv[2])
import transformers
from tests.architectures import ARCHITECTURES

torch.set_num_threads(1)
found = {}
for folder, name in json.load(open(sys.argv[1])):
    row = ARCHITECTURES[name]
    try:
        model = getattr(transformers, row.model).from_pretrained(folder).eval()
        found[folder] = row.asked_first(model), row.outputs(model)
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
torch.save(found, sys.argv[1] + ".out")
"""


@dataclass
class Run:
    """What became of one architecture.

    Attributes:
        error: what stopped it, if anything did.
        equal: step -> whether its outputs were those of the step before.
        expected: folder -> what the model that was saved there returned: `asked_first` and `outputs`.
        reloaded: the same from the judge, or an error.
        quantization: config.json's `quantization_config` of the merged checkpoint.
    """

    folder: Path
    error: Exception | None = None
    equal: dict[str, bool] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)
    reloaded: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)


def same(found: Any, expected: Any) -> bool:
    """Whether two lists of tensors, or two tensors, or two Nones are equal."""
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found is None and expected is None


def step(model: PeftModel, row: Architecture) -> None:
    """One step of training on whatever the model returns."""
    model.train()
    found = model(**row.batch()).to_tuple()
    loss = sum(t.float().square().mean() for t in found if isinstance(t, torch.Tensor) and t.requires_grad)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.SGD(parameters, lr=0.1).step()
    model.eval()


def go(row: Architecture, method: str, run: Run) -> None:
    """All steps but reloading."""

    def save(model: Any, name: str, write: Callable[[Any, Path], Any]) -> None:
        run.expected[name] = row.asked_first(model), row.outputs(model)
        write(model, run.folder / name)

    torch.manual_seed(0)
    kind = LRQATConfig if method == "LR-QAT" else LowBitSRConfig
    options = {"group_size": -1, "target_modules": "all-linear", "range_method": "minmax", **row.options}
    adapted = get_peft_model(row.build(), kind(bits=4, **options))
    step(adapted, row)
    trained = row.outputs(adapted)
    export(adapted, run.folder / "exported", progress=False)
    merged = adapted.merge_and_unload().eval()
    run.equal["merging"] = same(row.outputs(merged), trained)
    save(merged, "merged", lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"))
    run.expected["exported"] = run.expected["merged"]
    run.quantization = json.loads((run.folder / "merged" / "config.json").read_text())["quantization_config"]
    again = "exported again" if row.loads else "torchao"
    export(run.folder / "merged", run.folder / again, "compressed-tensors" if row.loads else "torchao", progress=False)
    run.expected[again] = run.expected["merged"]

    model = load_quantized(run.folder / "exported").eval()
    run.equal["load_quantized"] = type(model).__name__ == row.model and same(row.outputs(model), trained)
    fresh = get_peft_model(model, LRQATConfig(target_modules="all-linear", **row.options))
    run.equal["a new adapter"] = same(row.outputs(fresh), trained)
    step(fresh, row)
    trained = row.outputs(fresh)
    second = fresh.merge_and_unload().eval()
    run.equal["merging again"] = same(row.outputs(second), trained)
    save(second, "second", lambda model, folder: model.save_pretrained(folder))


class Runs:
    """Runs, made for all cases of one kind as soon as one is asked for."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._found: dict[tuple[str, str], Run] = {}

    def __getitem__(self, case: tuple[str, str]) -> Run:
        if case not in self._found:
            self._make([other for other in CASES if is_slow(other) == is_slow(case)])
        run = self._found[case]
        if run.error is not None:
            raise run.error
        return run

    def _make(self, cases: list[tuple[str, str]]) -> None:
        places = {}
        for name, method in cases:
            run = self._found[name, method] = Run(self._work / f"{name} {method}".replace(" ", "_"))
            try:
                go(ARCHITECTURES[name], method, run)
            except Exception as error:  # of this one; the others go on
                run.error = error
            places |= {str(run.folder / part): name for part in run.expected}
        job = self._work / f"job-{len(self._found)}.json"
        job.write_text(json.dumps(list(places.items())))
        run_clean(_JUDGE, str(job), str(PAGE.parents[1]))
        reloaded = torch.load(f"{job}.out")
        for case in cases:
            run = self._found[case]
            run.reloaded = {part: reloaded[str(run.folder / part)] for part in run.expected}


def is_slow(case: tuple[str, str]) -> bool:
    return ARCHITECTURES[case[0]].slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("architectures"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [pytest.param(c, id=" ".join(c), marks=[pytest.mark.slow] if is_slow(c) else []) for c in CASES]
)
class TestArchitecture:
    def test_every_step_is_exact(self, runs: Runs, case: tuple[str, str]):
        assert all(runs[case].equal.values()), runs[case].equal

    def test_transformers_reloads_it(self, runs: Runs, case: tuple[str, str]):
        run, row = runs[case], ARCHITECTURES[case[0]]
        if row.early and Version(transformers_version) < Version("5.23"):
            pytest.skip("transformers decompresses while loading from 5.23 on")
        wrong = {
            part: said if isinstance(said, str) else "other outputs"
            for part, said in run.reloaded.items()
            if not same(said, run.expected[part])
        }
        assert wrong.keys() == (set() if row.loads else {"merged", "exported", "second"}), wrong

    def test_config_json_says_what_the_engines_need(self, runs: Runs, case: tuple[str, str]):
        said, row = runs[case].quantization, ARCHITECTURES[case[0]]
        assert said.get("dequantize", False) == row.early
        floats = "experts" in row.floats and not ("low-bit SR" in row.floats and case[1] == "LR-QAT")
        assert ("re:.*\\.experts\\..*" in said["ignore"]) == floats

    def test_what_is_said_of_it(self, runs: Runs, case: tuple[str, str]):
        run, row = runs[case], ARCHITECTURES[case[0]]
        found = inspect(run.folder / "merged")
        assert found.engines[0].loads == row.loads
        assert can_export(run.folder / "merged", "compressed-tensors")


def test_the_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run `python -m tests.architectures`"
