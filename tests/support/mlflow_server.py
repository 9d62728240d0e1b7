"""A tiny MLflow server in memory, which can be told to fail in the ways in which servers do."""

import json
import threading
import uuid
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class TinyServer(ThreadingHTTPServer):
    """Keep experiments and runs as an MLflow server does: a metric with the same key, step, time and value once.

    fault: None; "error" answers 500; "abort" does what it is asked and gives no answer; "freeze" never answers.
    """

    daemon_threads = True

    def __init__(self, artifacts, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.artifacts, self.fault, self.requests = artifacts, None, 0
        self.experiments, self.runs, self.released = {}, {}, threading.Event()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def history(self, run_id):
        """{metric: [(step, value as text), …]}, in the order of steps."""
        return {key: sorted((m["step"], repr(m["value"])) for m in found.values())
                for key, found in self.runs[run_id]["metrics"].items()}  # fmt: skip

    def get_by_name(self, name):
        found = self.experiments.get(name)
        return found and {"experiment": found}

    def create_experiment(self, name, **_):
        self.experiments[name] = {
            "experiment_id": str(len(self.experiments)),
            "name": name,
            "lifecycle_stage": "active",
        }
        return {"experiment_id": self.experiments[name]["experiment_id"]}

    def create_run(self, experiment_id, start_time, tags=(), run_name=None, **_):
        run_id = uuid.uuid4().hex
        info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": experiment_id, "status": "RUNNING",
                "start_time": start_time, "artifact_uri": f"file://{self.artifacts}/{run_id}",
                "lifecycle_stage": "active", "run_name": run_name or ""}  # fmt: skip
        self.runs[run_id] = {"info": info, "tags": {t["key"]: t["value"] for t in tags}, "params": {},
                             "metrics": defaultdict(dict)}  # fmt: skip
        return self.get_run(run_id)

    def get_run(self, run_id, **_):
        if run_id not in self.runs:
            return None
        run = self.runs[run_id]
        pairs = {kind: [{"key": k, "value": v} for k, v in run[kind].items()] for kind in ("tags", "params")}
        return {"run": {"info": run["info"], "data": {**pairs, "metrics": []}}}

    def search(self, filter="", **_):
        wanted = filter.rpartition("=")[2].strip(" '")
        return {"runs": [self.get_run(run_id)["run"] for run_id, run in self.runs.items()
                         if run["tags"].get("log_id") == wanted]}  # fmt: skip

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        for m in metrics:
            m = {**m, "step": int(m.get("step", 0))}
            self.runs[run_id]["metrics"][m["key"]][m["step"], m["timestamp"], str(m["value"])] = m
        self.runs[run_id]["params"] |= {p["key"]: p["value"] for p in params}
        self.runs[run_id]["tags"] |= {t["key"]: t["value"] for t in tags}
        return {}

    def set_tag(self, run_id, key, value, **_):
        self.runs[run_id]["tags"][key] = value
        return {}

    def update(self, run_id, status=None, **_):
        self.runs[run_id]["info"]["status"] = status
        return {"run_info": self.runs[run_id]["info"]}

    def does(self, path):
        return {
            "experiments/get-by-name": lambda experiment_name: self.get_by_name(experiment_name),
            "experiments/create": self.create_experiment, "runs/create": self.create_run, "runs/get": self.get_run,
            "runs/search": self.search, "runs/log-batch": self.log_batch, "runs/set-tag": self.set_tag,
            "runs/update": self.update,
        }.get(path.partition("/mlflow/")[2])  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, split = self.server, urlsplit(self.path)
        server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server.fault == "freeze":
            server.released.wait(60)
        if server.fault == "error":
            return self.answer(500, {"error_code": "INTERNAL_ERROR", "message": "told to fail"})
        query = {key: value[-1] for key, value in parse_qs(split.query).items()}
        action = server.does(split.path)
        if action is None:
            return self.answer(404, {"error_code": "ENDPOINT_NOT_FOUND", "message": split.path})
        found = action(**{**query, **json.loads(body or b"{}")})
        if server.fault == "abort":
            self.close_connection = True
            return None
        missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"}
        return self.answer(200, found) if found is not None else self.answer(404, missing)

    do_GET = do_PATCH = do_POST

    def answer(self, code, content):
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextmanager
def serving(artifacts, port=0):
    """Give a running server, at an address of its own."""
    server = TinyServer(artifacts, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.fault = None
        server.released.set()
        server.shutdown()
        server.server_close()
