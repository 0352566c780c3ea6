"""An HTTP server that answers TRL 1.16's client as `vllm serve` does, and remembers what it was asked.

The real one needs a GPU: weights come to it through NCCL, which is the one thing of the client that is replaced here.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.engine.models import VOCAB


def _choice(prompt: list[int], index: int, body: dict[str, Any]) -> dict[str, Any]:
    ids = [3 + (7 * sum(prompt) + 31 * index + 13 * t) % (VOCAB - 3) for t in range(body["max_tokens"])]
    names = [f"token_id:{token}" for token in ids]
    logprobs = [-5.0 - (token % 7) / 10 for token in ids]
    top = [{name: value} for name, value in zip(names, logprobs, strict=True)]
    return {
        "prompt_token_ids": prompt,
        "token_ids": ids,
        "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top},
    }


@contextmanager
def serving() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Yield the server's address and what it was asked, as it comes."""
    asked: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body: Any) -> None:
            asked.append((self.path, body))
            if self.path == "/v1/models":
                answer: Any = {"data": [{"id": "the-model"}]}
            elif self.path == "/v1/completions":
                answer = {"choices": [_choice(p, i, body) for p in body["prompt"] for i in range(body["n"])]}
            elif self.path.startswith("/server_info"):
                answer = {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}
            else:
                answer = {"success": True}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._answer(json.loads(data) if data else None)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def without_nccl(sent: list[Any]) -> dict[str, Any]:
    """Replacements for the client's methods that need a GPU; the second remembers what would go through NCCL."""

    def init_communicator(self: Any, device: Any = 0) -> None:
        sent.append(("communicator", str(device)))

    def update_named_params(self: Any, metadata: Any, named_params: Any) -> None:
        tensors = [(name, tensor.detach().double().sum().item()) for name, tensor in named_params]
        sent.append((metadata, tensors))

    return {"init_communicator": init_communicator, "update_named_params": update_named_params}
