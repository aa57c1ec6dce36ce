"""The notebook, cell by cell in this process: it runs offline, and what it shows is true. So are its kept outputs."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.models import tiny
from tests.processes import run_clean
from tests.tokenizers import VOCAB, bytewise

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "train_on_the_grid.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def served(command: list, **options) -> SimpleNamespace:
    """`subprocess.run` of a script of examples/, in a process that starts quickly and cannot import the package."""
    code = """
    import runpy
    script = sys.argv.pop(1)
    sys.path.insert(0, script.rpartition("/")[0])
    runpy.run_path(script, run_name="__main__")
    """
    printed = run_clean(code, str(EXAMPLES / command[1]), *map(str, command[2:]))
    return SimpleNamespace(returncode=0, stdout=printed, stderr="")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs all cells after the parameters are set, in an empty folder; returns the names that they have made."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("subprocess.run", served)

    def execute(**parameters):
        names: dict = {}
        for number, cell in enumerate(CELLS, 1):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}
        pyplot.close("all")
        return names

    return execute


def test_what_is_trained_is_better_than_rounded_and_is_what_is_served(run, monkeypatch):
    """With a fifth of its steps and a quarter of its stories: it is what CI runs."""
    import small_world

    small, stories = small_world.small_model, small_world.stories
    monkeypatch.setattr(small_world, "small_model", lambda *args: small(*args, steps=120))
    fewer = [part.select(range(0, len(part), 4)) for part in stories()]
    monkeypatch.setattr(small_world, "stories", lambda: fewer)
    results = run(STEPS=20)["results"]
    perplexity = dict(results.loc["perplexity"])
    assert perplexity["loaded elsewhere"] == perplexity["trained"]
    assert perplexity["float"] < perplexity["rounded"]
    assert perplexity["trained"] < perplexity["rounded"]
    shown = results.iloc[-6:]
    assert (shown["loaded elsewhere"] == shown["trained"]).all()


def test_a_model_of_the_hub_takes_the_same_way(run, tmp_path):
    tokenizer = bytewise("gpt-2")
    tiny(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=VOCAB).save_pretrained(tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    ask, answer = ({"role": role, "content": "one and one are two"} for role in ("user", "assistant"))
    chats = [[ask, answer]] * 60
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    names = run(
        MODEL=str(tmp_path / "hub"), DATASET=str(data), BITS=4, GROUP_SIZE=16, STEPS=2, BATCH_SIZE=2, LENGTH=16
    )  # fmt: skip
    perplexity = dict(names["results"].loc["perplexity"])
    assert perplexity["loaded elsewhere"] == perplexity["trained"] != perplexity["rounded"]


def test_the_kept_outputs_are_of_one_run_and_say_so():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or "/home/" in json.dumps(output) for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    table = "".join(CELLS[-1]["outputs"][-1]["data"]["text/html"])
    right = [float(share) for share in re.findall(r">([\d.]+)%<", table)]  # float, rounded, trained
    assert min(right[0], right[2]) > 90 > 50 > right[1]
    _, _, trained, loaded = re.findall(r">([\d.]+)</td>", table)[:4]
    assert trained == loaded
