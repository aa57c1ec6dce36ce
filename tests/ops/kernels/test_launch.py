"""Launches: Triton's own way where its compiled kernels are not known to take what `Launch` passes by position."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton

from peft_lrqat.ops.kernels import launch


class Known:
    """A compiled kernel's launcher, as Triton 3.7 to 3.9 have it."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(
        self,
        gridX,
        gridY,
        gridZ,
        stream,
        function,
        kernel_metadata,
        launch_metadata,
        launch_enter_hook,
        launch_exit_hook,
        *args,
    ):
        self.calls.append((gridX, gridY, gridZ, stream, function, kernel_metadata, *args))


class Older(Known):
    """As Triton 3.6 has it."""

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        kernel_metadata, *hooks, t, n, size = args
        assert hooks == [None, None, None]
        self.calls.append((gridX, gridY, gridZ, stream, function, kernel_metadata, t, n, size))


class Reordered(Known):
    """As another version might."""

    def __call__(self, stream, gridX, gridY, gridZ, function, *args):
        raise AssertionError("a pointer would have been taken for a size")


class Jitted:
    """What `triton.jit` returns, as far as a launch needs it: records how it is called."""

    arg_names = ["tensor", "n", "SIZE"]  # noqa: RUF012  # as Triton has it

    def __init__(self, launcher: Known) -> None:
        self.calls: list[tuple] = []
        self.compiled = SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")

    def __getitem__(self, grid):
        def call(*args, **options):
            self.calls.append((grid, args, options))
            return self.compiled

        return call


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """Launch something three times as if on a GPU; returns Triton's ordinary calls and those of the launcher."""
    monkeypatch.setattr(launch, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    launch.takes_known_order.cache_clear()
    tensor = torch.zeros(4)

    def run(launcher: Known) -> tuple[list[tuple], list[tuple]]:
        kernel = Jitted(launcher)
        made = launch.launched(kernel).launch((2, 3), 5, SIZE=16)
        for _ in range(3):
            made(tensor)
        ordinary = ((2, 3), (tensor, 5), {"SIZE": 16, "num_warps": 4, "enable_fp_fusion": True})
        assert all(call == ordinary for call in kernel.calls)
        direct = (2, 3, 1, "stream", "function", "metadata", tensor.data_ptr(), 5, 16)
        assert all(call == direct for call in launcher.calls)
        return kernel.calls, launcher.calls

    yield run
    launch.takes_known_order.cache_clear()


@pytest.mark.parametrize(("version", "launcher"), [("3.6.0", Older), ("3.7.1", Known), ("3.9.0+git1234", Known)])
def test_a_known_launcher_is_called_by_position(monkeypatch, launched, version, launcher):
    monkeypatch.setattr(triton, "__version__", version)
    ordinary, direct = launched(launcher())
    assert (len(ordinary), len(direct)) == (1, 2)


@pytest.mark.parametrize(
    ("version", "launcher"), [("3.5.1", Older), ("3.10.0", Known), ("4.0.0", Known), ("3.9.0", Reordered)]
)
def test_any_other_is_left_to_triton(monkeypatch, launched, version, launcher):
    monkeypatch.setattr(triton, "__version__", version)
    ordinary, direct = launched(launcher())
    assert (len(ordinary), len(direct)) == (3, 0)


def test_a_launcher_without_a_signature_is_not_known():
    assert not launch.takes_known_order(type(len))


def test_the_installed_tritons_launcher_is_as_read():
    """Fails with a new version of Triton: read its launcher, then add it to `launch.py`."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    assert launch.takes_known_order(driver.CudaLauncher)


def test_constants_out_of_order_are_refused():
    kernel = Jitted(Known())
    kernel.arg_names = ["tensor", "SIZE", "LOOP"]
    with pytest.raises(AssertionError, match="LOOP"):
        launch.launched(kernel).launch((1,), LOOP=2, SIZE=16)
