"""Talk to a vLLM server over HTTP, and turn every failure into one sentence."""

import os
from typing import Any

import requests
from requests.adapters import HTTPAdapter


class Server:
    """Send requests to the vLLM server at `url`.

    Args:
        url: where the server is.
        connections: how many are kept open at a time.
        timeout: seconds that an answer may take.

    Every method raises ConnectionError with one sentence if the server does not do what it is asked.
    """

    def __init__(self, url: str, connections: int, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy belongs between trainer and engine
        self.session.mount("http", HTTPAdapter(pool_maxsize=connections))
        # The server closes idle connections, and all are idle while the policy learns; a new one costs nothing.
        self.session.headers["Connection"] = "close"
        if key := os.environ.get("VLLM_API_KEY"):
            self.session.headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str, **params: Any) -> Any:
        """Return the JSON that a GET request answers."""
        return self._call("GET", path, params=params)

    def post(self, path: str, body: Any = None) -> Any:
        """Return the JSON that a POST request answers, None if the answer is empty."""
        return self._call("POST", path, json=body)

    def _call(self, method: str, path: str, **more: Any) -> Any:
        """Return the JSON of the answer, None if the answer is empty."""
        try:
            response = self.session.request(method, f"{self.url}/{path}", timeout=(10, self.timeout), **more)
        except requests.Timeout as error:
            raise ConnectionError(
                f"rollout.url={self.url}: the vLLM server took more than {self.timeout:g} s over {path}; see its log, "
                "or raise rollout.timeout"
            ) from error
        except requests.RequestException as error:
            raise ConnectionError(
                f"rollout.url={self.url}: no vLLM server answers there ({type(error).__name__} at {path}); if one was "
                "started, its log says why it ended; docs/rollout.md says how to start one"
            ) from error
        if not response.ok:
            raise ConnectionError(
                f"rollout.url={self.url}: the vLLM server refused {path} (status {response.status_code}: "
                f"{_reason(response)}); docs/rollout.md has the command that starts it with all that is needed"
            )
        return response.json() if response.content else None

    # vLLM's senders of weights call these.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("finish_weight_update", {"weight_version": weight_version})


def _reason(response: requests.Response) -> str:
    """Return the server's own words on one line."""
    try:
        said = response.json()
    except ValueError:
        said = response.text
    if isinstance(said, dict):
        said = said.get("error", said.get("detail", said))
        said = said.get("message", said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:300] or response.reason
