"""The opt-in autoload, in processes of their own: the environment that runs the tests is never touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_lrqat import autoload
from tests.models import adapted, tiny
from tests.processes import run_clean

# `sitecustomize` runs at start-up, right after site-packages were read: the nearest thing to a `.pth` file in there.
_SITE = "import os, site\nsite.addsitedir(os.path.dirname(__file__))\n"


@pytest.fixture
def site_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE)
    return folder


def _python(site_dir: Path, code: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site_dir), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env, cwd=site_dir
    )


_AT_START = "peft", "peft_lrqat", "torch", "transformers"

_USE = f"""
import sys
loaded = [name for name in {_AT_START} if name in sys.modules]
assert not loaded, loaded
assert "_peft_lrqat_autoload" in sys.modules

# transformers probes for peft long before it imports it
import importlib.util
assert importlib.util.find_spec("peft").origin.endswith("__init__.py")
assert "peft" not in sys.modules

from peft import AutoPeftModelForCausalLM, PeftConfig
config = PeftConfig.from_pretrained(sys.argv[1])
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
print(type(config).__name__, type(model.base_model).__name__)

import peft
hooks = [type(finder).__module__ for finder in sys.meta_path]
assert "_peft_lrqat_autoload" not in hooks, hooks
assert type(peft.__loader__).__module__ != "_peft_lrqat_autoload"
assert peft.__spec__.loader is peft.__loader__
"""


def test_an_adapter_loads_in_a_process_that_never_names_the_plugin(site_dir: Path, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    model = adapted(type(tiny()).from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")

    with pytest.raises(AssertionError, match="KeyError: 'LRQAT'"):
        run_clean("import peft; peft.PeftConfig.from_pretrained(sys.argv[1])", str(tmp_path / "adapter"))

    autoload.enable(site_dir)
    done = _python(site_dir, _USE, tmp_path / "adapter")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LRQATConfig", "LRQATModel"]


def test_a_program_that_imports_the_plugin_itself_is_not_disturbed(site_dir: Path) -> None:
    autoload.enable(site_dir)
    (site_dir / "peft.py").write_text("print('peft')\n")
    (site_dir / "peft_lrqat.py").write_text("print('plugin in'); import peft; print('plugin out')\n")
    done = _python(site_dir, "import peft_lrqat, peft")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["plugin in", "peft", "plugin out"]
    assert done.stderr == ""


def test_a_broken_plugin_does_not_take_peft_with_it(site_dir: Path) -> None:
    autoload.enable(site_dir)
    (site_dir / "peft_lrqat.py").write_text("raise OSError('disk on fire')\n")
    (site_dir / "peft.py").write_text("answer = 42\n")
    done = _python(site_dir, "import peft; print(peft.answer)")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "42\n"
    assert "disk on fire" in done.stderr
    assert "autoload disable" in done.stderr


def test_start_up_is_silent_after_the_package_was_uninstalled(site_dir: Path) -> None:
    autoload.enable(site_dir)
    # -S leaves site-packages out, and with it `_peft_lrqat_autoload`
    code = f"import site; site.addsitedir({str(site_dir)!r}); import sys; print(len(sys.meta_path))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=site_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_enable_disable_status(site_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["--directory", str(site_dir)]
    assert autoload.main(["status", *there]) == 1
    for _ in range(2):  # twice is once
        assert autoload.main(["enable", *there]) == 0
    assert [p.name for p in site_dir.glob("*autoload*")] == [autoload.FILE_NAME]
    assert autoload.path(site_dir).read_text().count("\n") == 1
    assert autoload.main(["status", *there]) == 0
    for _ in range(2):
        assert autoload.main(["disable", *there]) == 0
    assert autoload.main(["status", *there]) == 1
    assert sorted(p.name for p in site_dir.iterdir()) == ["sitecustomize.py"]
    assert "disabled" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_an_error_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PermissionError, match="import peft_lrqat"):
        autoload.enable(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as stop:
        autoload.main(["enable", "--directory", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "virtual environment" in capsys.readouterr().err
