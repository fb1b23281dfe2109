"""A local HTTP server with the chat-completions API. The test supplies its answers."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any] | int]
"""Returns a message (with an optional `finish_reason`) or an HTTP status for the body of a request."""


class ChatServer:
    """Record all requests and how many ran at once. `answer` may be replaced while the server runs."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.busy, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self.url = ""

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.requests.append(body)
            self.busy += 1
            self.most_at_once = max(self.most_at_once, self.busy)
        answer = self.answer(body)
        with self.lock:
            self.busy -= 1
        if isinstance(answer, int):
            return answer, {"error": {"message": f"status {answer}"}}
        finish = answer.pop("finish_reason", "stop")
        words = sum(len(str(text).split()) for text in answer.values())
        asked = sum(len(message["content"].split()) for message in body["messages"])
        return 200, {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", **answer}, "finish_reason": finish}],
            "usage": {"prompt_tokens": asked, "completion_tokens": words, "total_tokens": asked + words},
        }


@contextmanager
def chat_server(answer: Answer) -> Iterator[ChatServer]:
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = server.reply(body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def asked(body: dict[str, Any]) -> str:
    """Return the user's message of a request."""
    return body["messages"][-1]["content"]
