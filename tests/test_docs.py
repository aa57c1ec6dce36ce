"""The Python of README and docs runs as it is shown, page by page, offline and on a tiny model."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftConfig, get_peft_model

import peft_lrqat
from peft_lrqat import LRQATConfig, export
from peft_lrqat.tuners.lrqat.config import _REFUSED
from tests import pages
from tests.models import adapted, tiny
from tests.tokenizers import VOCAB, bytewise

ROOT = Path(__file__).parents[1]

#: Page -> the names that its snippets take from the text around them; what else they use, they make or import.
PAGES = {
    "README.md": ["dataset"],
    "docs/index.md": ["dataset"],
    "docs/get-started/first-model.md": [],
    "docs/get-started/from-lora.md": [],
    "docs/guides/autoload.md": [],
    "docs/guides/best-accuracy.md": ["dataset", "texts"],
    "docs/guides/export.md": ["model", "tokenizer"],
    "docs/guides/from-quantized.md": ["texts", "tokenizer"],
    "docs/guides/gguf.md": ["model", "tokenizer"],
    "docs/guides/low-bit-sr.md": ["dataset", "texts", "tokenizer"],
    "docs/guides/monitoring.md": ["dataset"],
    "docs/guides/recipes.md": ["dataset", "preferences"],
    "docs/guides/serving.md": ["model", "tokenizer"],
    "docs/guides/troubleshooting.md": ["model", "torch"],
}

#: What pages call a model -> a folder of `folders`.
NAMES = {
    "Qwen": "Qwen",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "Qwen/Qwen3-0.6B",
    "meta-llama/Llama-3.1-70B": "Qwen/Qwen3-0.6B",
    "path/or/repo": "quantized",
    "path/or/repo-GPTQ": "gptq",
}
CHAT = [{"role": "user", "content": "What is our return policy?"}, {"role": "assistant", "content": "30 days."}]

#: All that a reader may open.
PROSE = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md")),
]


def snippets(page: str) -> list[str]:
    """Its blocks of Python, less those that only show some lines of another (they are indented)."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if not block.startswith(" ")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """What the pages name, as folders: a float model, quantized ones, an adapter, each with a tokenizer."""
    work, tokenizer = tmp_path_factory.mktemp("docs"), bytewise("gpt-2")
    base = tiny(hidden_size=128, intermediate_size=128, num_hidden_layers=1, vocab_size=VOCAB)
    base.save_pretrained(work / "Qwen/Qwen3-0.6B")
    base.name_or_path = str(work / "Qwen/Qwen3-0.6B")
    model = adapted(base, range_method="minmax")
    model.merge_and_unload().save_pretrained(work / "quantized")
    for name in ("Qwen/Qwen3-0.6B", "quantized"):
        tokenizer.save_pretrained(work / name)
    export(work / "quantized", work / "gptq", "gptq", progress=False)
    return work


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_python_runs(page: str, folders: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pushed: list[str] = []
    for kind in (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, name, *args, **kwargs: pushed.append(name))
    for name, folder in NAMES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(folders / folder)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    if page in ("docs/guides/autoload.md", "docs/guides/from-quantized.md"):
        _save_adapter(tmp_path, of_quantized=page == "docs/guides/from-quantized.md")
    given = {name: _given(name, folders, page) for name in PAGES[page]}
    for block in snippets(page):
        if "import preprocess_" in block:
            given["model"] = _float_model(folders)
        # as README says of machines without a GPU
        block = re.sub(r'Config\((\s*)"(adapter[\w-]*)"', r'Config(\1"\2", use_cpu=True', block)
        exec(compile(block, page, "exec"), given)
    if page == "docs/guides/best-accuracy.md":
        assert PeftConfig.from_pretrained("adapter").base_model_name_or_path == "base"
    assert pushed == re.findall(r'push_to_hub\("(.*?)"\)', "".join(snippets(page)))


def _save_adapter(work: Path, of_quantized: bool) -> None:
    from peft_lrqat import load_quantized

    if of_quantized:
        config = LRQATConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(load_quantized("path/or/repo"), config).save_pretrained("adapter")
    else:
        (work / "path/or/repo").unlink()
        adapted(_float_model(work), range_method="minmax").save_pretrained("path/or/repo")


def _float_model(work: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(work / "Qwen/Qwen3-0.6B")


def _given(name: str, folders: Path, page: str) -> Any:
    if name == "torch":
        return torch
    texts = ["The quick brown fox jumps over the lazy dog, again and again."] * 4
    if name == "texts":
        return [text * 40 for text in texts]  # two windows of calibration
    if name == "dataset":
        return Dataset.from_dict({"text": texts[:2]})
    if name == "preferences":
        return Dataset.from_list([{"prompt": "The quick ", "chosen": "brown fox", "rejected": "lazy dog"}] * 2)
    if name == "tokenizer":
        return bytewise("gpt-2")
    model = _float_model(folders)
    return model if page == "docs/guides/troubleshooting.md" else adapted(model, range_method="minmax")


@pytest.mark.parametrize("page", PROSE)
def test_all_snippets_are_python(page: str):
    """Of the other pages too, whose snippets want a GPU, several processes, or an hour."""
    for block in snippets(page):
        compile(block, page, "exec")


def _prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^\s*```.*?^\s*```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: str) -> set[str]:
    """What a link may name in it: headings, as GitHub and the site make anchors of them, `<a id>`, docstrings."""
    headings = re.findall(r"^#+ (.*)", _prose(page), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs.union(*re.findall(r'<a id="(.*?)"|^::: (\S+)', _prose(page), re.MULTILINE))


@pytest.mark.parametrize("page", PROSE)
def test_links_lead_somewhere(page: str):
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), f"{link}: there is no such file"
        assert not anchor or anchor in _anchors(target.resolve().relative_to(ROOT).as_posix()), (
            f"{link}: no such heading"
        )
        if page.startswith("docs/"):
            assert target.resolve().is_relative_to(ROOT / "docs"), f"{link} is outside of docs/, and so not on the site"
        else:
            assert page == "README.md", (
                "the site includes this page where relative links of the repository lead nowhere"
            )


def test_the_site_has_all_pages():
    _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")
    found = {page.removeprefix("docs/") for page in PROSE if page.startswith("docs/")}
    assert set(re.findall(r"[\w/-]+\.md", nav)) == found, "name the page under `nav` of mkdocs.yml"


def test_the_reference_has_all_public_names():
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/reference/*.md"))
    missing = {name for name in peft_lrqat.__all__ if not re.search(rf"^::: peft_lrqat\.{name}$", text, re.MULTILINE)}
    assert missing == {"__version__"}


def test_the_page_of_refusals_has_all_refused_options():
    text = (ROOT / "docs/reference/refused.md").read_text(encoding="utf-8")
    assert {name for name in _REFUSED if f"`{name}`" not in text} == set()


def test_the_page_of_the_command_is_its_help():
    assert pages.CLI.read_text(encoding="utf-8") == pages.cli(), "run `python -m tests.pages`"


def test_pages_that_the_package_names_exist():
    """In messages, help and docstrings."""
    for path in [
        *ROOT.glob("peft_lrqat/**/*.py"),
        *ROOT.glob("[eb]*/*.py"),
        *ROOT.glob("tests/**/*.py"),
        ROOT / "Makefile",
    ]:
        for name, anchor in re.findall(
            r"(docs/[\w/-]+\.(?:md|png|svg))(?:#([\w-]+))?", path.read_text(encoding="utf-8")
        ):
            assert (ROOT / name).is_file(), f"{path} names {name}"
            assert not anchor or anchor in _anchors(name), f"{path} names {name}#{anchor}"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def test_tables_hold_the_figures_of_the_results(tables, capsys):
    assert any("<!-- table: " in page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs/results").glob("*.md")))
def test_no_figure_of_the_results_is_typed_by_hand(page: str):
    """A cell that is a number with a fraction stands below a comment that says where it comes from."""
    text = (ROOT / "docs/results" / page).read_text(encoding="utf-8")
    typed = re.sub(r"<!-- .*?<!-- end -->", "", text, flags=re.DOTALL)
    rows = re.findall(r"^\|(.*)\|$", typed, re.MULTILINE)
    assert not [row for row in rows if any(re.fullmatch(r"[\s*]*\d+\.\d+[\s*%]*", cell) for cell in row.split("|"))]


def test_drawings_hold_the_figures_of_the_results(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module("diagrams").main(["--check"]) == 0, capsys.readouterr().out


def test_versions_that_were_run_are_those_of_the_constraints():
    """The page's columns are the two files."""

    def pinned(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))

    page = (ROOT / "docs/get-started/install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z-]+) \| ([\d.]+) \| ([\d.]+) ", page, re.MULTILINE)
    newest, lowest = pinned("constraints.txt"), pinned("constraints-lowest.txt")
    assert len(rows) > 5
    assert rows == [(name, newest[name], lowest[name]) for name, *_ in rows]


_PAGE = """
<!-- table: a.json; runs; size=7B lean
| method | commit | s |
|---|---|---:|
| commit | steps.seconds .2f min |
LoRA = method="LoRA bf16"
**ours**, lean = method=ours lean=true
-->
| old |
<!-- end -->
"""


_FIGURES = """
<!-- figures
| | ms | to a | loss |
|---|---:|---:|---:|
| one: by/{}/s as * 1000 .0f min | one: by/{}/s as % of one: by/a/s | two: runs/[name={} {1}]/loss as .2f |
**a** = a; lean=true
b = b; lean
-->
<!-- end -->
"""


def test_a_table_is_made_of_the_places_that_its_columns_name(tables, tmp_path: Path, monkeypatch):
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (results / "one.json").write_text(json.dumps({"by": {"a": {"s": 0.2}, "b": {"s": 0.3}}}))
    runs = [{"name": "a", "lean": True, "loss": 1.234}, {"name": "b", "loss": 5}, {"name": "b", "lean": True}]
    (results / "two.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    made = tables.made(_FIGURES)
    rows = ["| **a** | **200** | | 1.23 |", "| b | 300 | +50.0 % | 5.00 |"]
    assert "\n".join(["-->", "| | ms | to a | loss |", "|---|---:|---:|---:|", *rows, "<!-- end -->"]) in made
    assert tables.made(made) == made
    with pytest.raises(ValueError, match=r"The column 'two: runs/\[name=c\]/loss as .2f' has no figure"):
        tables.made(_FIGURES.replace("name={} {1}", "name=c"))
    with pytest.raises(ValueError, match=r"The row 'b = c; lean' has no figure"):
        tables.made(_FIGURES.replace("b = b", "b = c"))


def test_a_zero_is_a_number_and_no_absence(tables):
    runs = [{"name": "a", "draw": 0}, {"name": "b", "draw": None}, {"name": "c", "draw": False}, {"name": "d"}]
    met = [run["name"] for run in runs if tables.meets(run, tables.conditions("draw=0"))]
    assert met == ["a"]
    for absent in ("draw", "draw=null", "draw=false"):
        assert [run["name"] for run in runs if tables.meets(run, tables.conditions(absent))] == ["b", "c", "d"]


def test_a_table_is_made_of_the_runs_that_its_rows_name(tables, tmp_path: Path, monkeypatch):
    runs = [
        {"method": "LoRA bf16", "size": "7B", "lean": False, "commit": "abc", "steps": {"seconds": 0.688}},
        {"method": "LoRA bf16", "size": "7B", "lean": True, "steps": {"seconds": 0.1}},
        {"method": "ours", "size": "7B", "lean": True, "steps": {"seconds": 0.407}},
    ]
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/a.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    made = tables.made(_PAGE)
    assert (
        "-->\n| method | commit | s |\n|---|---|---:|\n| LoRA | abc | 0.69 |\n| **ours**, lean | | **0.41** |\n<!-- end"
        in made
    )
    assert tables.made(made) == made
    for page, found in ((_PAGE.replace("method=ours", "method=other"), 0), (_PAGE.replace("7B lean", "7B"), 2)):
        with pytest.raises(ValueError, match=rf"{found} runs of a\.json meet"):
            tables.made(page)
