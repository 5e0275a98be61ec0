"""llama.cpp itself, from the wheel `xllamacpp`, as a witness of GGUF files; without the wheel its tests skip."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A model in llama.cpp's own server, in this process."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (the wheel xllamacpp) is not installed")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 512, 1, False, 0
        self._server = xllamacpp.Server(parameters)

    def tokenize(self, text: str) -> list[int]:
        return self._ask("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def greedy(self, prompt: list[int], limit: int) -> tuple[list[int], str]:
        """(the tokens after a prompt, at most `limit`, with the end token; "eos" or "limit")"""
        request = {"prompt": prompt, "n_predict": limit, "temperature": 0, "return_tokens": True}
        answer = self._ask("completion", request)
        return answer["tokens"], answer["stop_type"]

    def _ask(self, what: str, content: dict[str, Any]) -> dict[str, Any]:
        data, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._server.listening_address}/{what}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
