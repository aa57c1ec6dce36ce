"""onnxruntime-genai: its builder makes an ONNX model of a GPTQ folder, its generator runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import job
import numpy as np
import onnxruntime
import onnxruntime_genai as genai
import torch


class Onnx:
    def __init__(self, folder: Path) -> None:
        self.model = genai.Model(str(folder))
        self.sizes = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
        generator = genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return list(map(int, generator.get_sequence(0)[len(ids) :]))

    def logits(self, ids: list[int]) -> torch.Tensor:
        feeds: dict[str, Any] = {}
        for wanted in self.session.get_inputs():
            if wanted.name == "input_ids":
                feeds[wanted.name] = np.array([ids], dtype=np.int64)
            elif wanted.name == "attention_mask":
                feeds[wanted.name] = np.ones((1, len(ids)), dtype=np.int64)
            elif wanted.name == "position_ids":
                feeds[wanted.name] = np.arange(len(ids), dtype=np.int64)[None]
            else:  # an empty cache: (batch, heads, 0, width)
                kind = np.float16 if "float16" in wanted.type else np.float32
                shape = (1, self.sizes["num_key_value_heads"], 0, self.sizes["head_size"])
                feeds[wanted.name] = np.zeros(shape, dtype=kind)
        return torch.from_numpy(self.session.run(["logits"], feeds)[0][0]).float()


def open_engine(wanted: dict[str, Any]) -> job.Engine:
    folder = Path(wanted["folder"])
    built = folder.with_name(folder.name + "-onnx")
    shutil.rmtree(built, ignore_errors=True)
    # accuracy_level 1: float activations. Output layer and embedding stay float; by default the builder rounds them
    options = ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(built)]
    command = [*builder, "-p", "int4", "-e", "cpu", "-c", str(built / "cache"), "--extra_options", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"the builder failed:\n{done.stdout[-2000:]}")
    return Onnx(built)


if __name__ == "__main__":
    job.answer(open_engine, ["onnxruntime-genai", "onnxruntime"])
