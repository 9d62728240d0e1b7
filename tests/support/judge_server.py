"""A server that answers as OpenAI's chat completions do, with what a test's function says."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Judge:
    """Hold the address of a running server, and the requests that it had: (headers, body), oldest first."""

    def __init__(self, url, requests):
        self.url, self.requests = url, requests


@contextmanager
def judge_server(answer):
    """Run a server; answer: (text of the user's message) -> the reply, or (status, text) for another response."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((dict(self.headers), body))
            reply = answer(body["messages"][-1]["content"])
            status, text = reply if isinstance(reply, tuple) else (200, None)
            text = json.dumps({"choices": [{"message": {"content": reply}}]}) if text is None else text
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:  # whoever asked has given up
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield Judge(f"http://127.0.0.1:{server.server_port}/v1", requests)
    finally:
        server.shutdown()
        server.server_close()
