"""A vLLM server on loopback, and the few requests that are made of its OpenAI-compatible API."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from environment import clean_environment

_HOST = "127.0.0.1"
_ERROR = re.compile(r"\bERROR\b.*?\] ((?:\w+\.)*\w+Error: .*)")


class Server:
    """`with Server(...) as server:` serves `model` until the block ends.

    Args:
        python: of the environment that has vLLM.
        model: checkpoint folder.
        dtype: what vLLM computes in.
        log: file for the server's output.
        deadline: seconds until it must answer /health.

    Raises:
        RuntimeError: the server ended, or was not ready in time; the message has the end of its log. Later: a request
            failed; the message has the first error in the log.
    """

    def __init__(self, python: Path, model: Path, dtype: str, log: Path, deadline: float = 900) -> None:
        self.python, self.model, self.dtype, self.log, self.deadline = python, model, dtype, log, deadline
        self.port = _free_port()

    @property
    def command(self) -> list[str]:
        module = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        address = ["--served-model-name", "model", "--host", _HOST, "--port", str(self.port)]
        small = ["--dtype", self.dtype, "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
        return [str(self.python), *module, *address, *small]

    def __enter__(self) -> Server:
        environment = clean_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        # vLLM looks for tools such as ninja on the path, and starts workers: a group of their own, ended together
        environment["PATH"] = f"{self.python.parent}{os.pathsep}{environment['PATH']}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.deadline
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://{_HOST}:{self.port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            try:
                code = self.process.wait(0.5)  # also the pause between two looks
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"the server of {self.model.name} ended with code {code}:\n{self._log_end()}")
        raise RuntimeError(f"no answer from {self.model.name} after {self.deadline:.0f} s:\n{self._log_end()}")

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def complete(self, prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
        """Greedy /v1/completions of a text or of token ids: {"prompt": ids, "tokens": ids, "text", "seconds"}."""
        answer, seconds = self._post("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens})
        choice = answer["choices"][0]
        return _result(choice["prompt_token_ids"], choice["token_ids"], choice["text"], seconds)

    def nll(self, ids: list[int]) -> float:
        """Mean negative log-likelihood of ids[1:], nats."""
        answer, _ = self._post("/v1/completions", {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0})
        given = answer["choices"][0]["prompt_logprobs"][1:]
        return -sum(entry[str(token)]["logprob"] for entry, token in zip(given, ids[1:], strict=True)) / len(given)

    def chat(self, content: str, max_tokens: int) -> dict[str, Any]:
        """Greedy /v1/chat/completions of one user message; as `complete`."""
        messages = [{"role": "user", "content": content}]
        answer, seconds = self._post("/v1/chat/completions", {"messages": messages, "max_tokens": max_tokens})
        choice = answer["choices"][0]
        return _result(answer["prompt_token_ids"], choice["token_ids"], choice["message"]["content"], seconds)

    def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        body = body | {"model": "model", "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"http://{_HOST}:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer), time.perf_counter() - start
        except urllib.error.HTTPError as error:
            # the first error of a worker is the reason; what follows it are the processes that it takes along
            reasons = [line for line in self.log.read_text(errors="replace").splitlines() if _ERROR.search(line)]
            raise RuntimeError(
                f"{path} answered {error.code}: {_ERROR.search(reasons[0])[1] if reasons else ''}"
            ) from error


def _result(prompt: list[int], tokens: list[int], text: str, seconds: float) -> dict[str, Any]:
    return {"prompt": prompt, "tokens": tokens, "text": text, "seconds": seconds}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return probe.getsockname()[1]
