"""A server of an OpenAI-compatible endpoint for tests."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


@contextlib.contextmanager
def serving(reply: Callable[[dict], dict]) -> Iterator[SimpleNamespace]:
    """It answers by `reply`, body of a request -> first choice; `url`, and `asked`, the bodies that it got."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            its.asked.append(body)
            text = json.dumps({"choices": [reply(body)]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    its = SimpleNamespace(asked=[], url=f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield its
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
