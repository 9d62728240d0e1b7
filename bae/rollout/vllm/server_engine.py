"""Sample at a vLLM server on other devices than the policy's: `rollout=vllm_server`.

Every rank sends its own prompts, one request for each completion. Whenever the weights have changed, rank 0 sends them
to the server before anyone samples (bae.rollout.vllm.transfer).
"""

from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from bae.batch import SampledTokens
from bae.rollout.interface import SamplingRequest
from bae.rollout.vllm.completions import Finished, check_lengths, check_truncation, seeds, to_samples
from bae.rollout.vllm.http import Server
from bae.rollout.vllm.process import require_vllm
from bae.rollout.vllm.transfer import NCCL, Transport, connect
from bae.rollout.vllm.weights import Fingerprint, fingerprint
from bae.training.causal_lm import CausalLM

SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""The parts of a configuration that must be the same at both ends."""


class VllmServerEngine:
    """Sample at a server that has been started for it; docs/rollout.md has the command.

    Args:
        url: the address of the server.
        served_model: the name by which the server serves the model; None if it serves only one.
        top_p, top_k: truncation of the distribution; 1 and 0 for none.
        concurrency: requests that a rank has open at a time.
        timeout: seconds that one of them may take.
        address: of this machine, as the server reaches it; None for its address on the network that leads to the
            server.
        transport: how weights travel to the server.

    Raises:
        ImportError: if vLLM is not installed.
        ConnectionError: if no such server answers.
        ValueError: for values that cannot work, or if the server was started without an option that it needs.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        served_model: str | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        concurrency: int = 256,
        timeout: float = 600.0,
        address: str | None = None,
        transport: Transport = NCCL,
    ) -> None:
        check_truncation(top_p, top_k)
        if concurrency < 1:
            raise ValueError(f"rollout.concurrency={concurrency}: must be 1 or more")
        if timeout <= 0:
            raise ValueError(f"rollout.timeout={timeout}: must be above 0")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"rollout.url={url}: must begin with http:// or https://")
        require_vllm()
        self.top_p, self.top_k = top_p, top_k
        self.concurrency = concurrency
        self.address, self.transport = address, transport
        self.server = Server(url, concurrency, timeout)
        self.served = _served_model(self.server, served_model)
        _check_options(self.server, transport)
        self.sender: Any = None
        self.loaded: Fingerprint | None = None  # of the weights that the server has

    def sample(self, model: CausalLM, request: SamplingRequest) -> SampledTokens:
        """Sample the requested completions; see RolloutEngine.

        `log_probs` of the samples is None at temperature 0, where nothing is drawn.
        """
        check_lengths(request, self.served["max_model_len"])
        self._update_weights(model)
        return to_samples(request, self._complete(request))

    def _bodies(self, request: SamplingRequest) -> list[dict[str, Any]]:
        """Return the body of the HTTP request of each completion."""
        shared = {
            "model": self.served["id"],
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,  # the server takes what is not given from the model's generation_config.json
            "repetition_penalty": 1.0,
            "ignore_eos": True,  # the caller says which token ends a completion
            "stop_token_ids": [request.eos_token_id],
            "return_token_ids": True,
            "logprobs": 0 if request.temperature > 0 else None,  # 0: of the sampled token alone
        }
        return [
            shared | {"prompt": list(prompt), "seed": seed}
            for prompt, key in zip(request.prompts, request.keys, strict=True)
            for seed in seeds(key, request.group_size)
        ]

    def _complete(self, request: SamplingRequest) -> list[Finished]:
        """Let the server sample, and report each completion as soon as it is done."""
        bodies = self._bodies(request)
        done: dict[int, Finished] = {}
        threads = ThreadPoolExecutor(min(self.concurrency, len(bodies)))
        try:
            waiting = {threads.submit(self.server.post, "v1/completions", body): n for n, body in enumerate(bodies)}
            for answer in as_completed(waiting):
                n = waiting[answer]
                done[n] = _finished(answer.result()["choices"][0])
                if request.on_finished:
                    request.on_finished(n, done[n].ids, done[n].ended)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return [done[n] for n in range(len(bodies))]

    def _update_weights(self, model: CausalLM) -> None:
        """See that the server has the policy's weights as they are now.

        Weights change on all ranks alike, so either all ranks return at once or none does. No weight changes while
        another rank still samples, because ranks step together.
        """
        now = fingerprint(model)
        if now == self.loaded:
            return
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        failure: list[str | None] = [None]
        if ranks == 1 or torch.distributed.get_rank() == 0:
            try:
                self._send(model)
            except Exception as error:  # the other ranks wait, and have to learn of it
                if ranks == 1:
                    raise
                failure = [f"{error}"]
        if ranks > 1:
            torch.distributed.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise ConnectionError(failure[0])
        self.loaded = now

    def _send(self, model: CausalLM) -> None:
        """Send the weights, and let the server forget what it computed with the old ones."""
        if self.sender is None:
            _check_same_model(self.served["root"], model, self.server.url)
            self.sender = connect(self.server, model, self.transport, self.address)
        try:
            self.sender.send_weights()
        except RuntimeError as error:  # from the transport: the other end is gone
            raise ConnectionError(
                f"rollout.url={self.server.url}: the vLLM server did not take the weights "
                f"({str(error).splitlines()[0]}); see its log, and start it again"
            ) from error
        if not self.server.post("reset_prefix_cache")["success"]:
            raise ConnectionError(
                f"rollout.url={self.server.url}: the vLLM server did not clear its prefix cache, so samples would mix "
                "old weights and new; does someone else use it?"
            )


def _served_model(server: Server, name: str | None) -> dict[str, Any]:
    """Return the server's entry of the model: its `id`, `root` and `max_model_len`."""
    models: dict[str, dict[str, Any]] = {model["id"]: model for model in server.get("v1/models")["data"]}
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    if name is None or name not in models:
        raise ValueError(f"rollout.served_model={name}: the server at {server.url} serves {', '.join(models)}")
    return models[name]


def _check_options(server: Server, transport: Transport) -> None:
    """Raise ValueError if the server was started without an option that it needs."""
    config = server.get("server_info", config_format="json")["vllm_config"]
    mode, transfer = config["model_config"]["logprobs_mode"], config["weight_transfer_config"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"rollout.url={server.url}: start the server with --logprobs-mode processed_logprobs, not {mode}"
        )
    if not transfer or transfer["backend"] != transport.backend:
        raise ValueError(
            f"rollout.url={server.url}: the server takes no weights over {transport.backend}; start it with "
            f'--weight-transfer-config \'{{"backend": "{transport.backend}"}}\', as docs/rollout.md says'
        )


def _check_same_model(root: str, model: CausalLM, url: str) -> None:
    """Raise ValueError if the server's model has another shape, as far as its configuration can be read here."""
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(root)
    except (OSError, ValueError):
        return  # a folder of the server's machine; weights of other shapes are refused when they arrive
    for name in SHAPE:
        ours, other = getattr(model.config, name, None), getattr(theirs, name, None)
        if ours != other:
            raise ValueError(
                f"rollout.url={url}: the server has another model than the policy, {root}, whose {name} is {other} "
                f"instead of {ours}"
            )


def _finished(choice: dict[str, Any]) -> Finished:
    """Read one completion of an answer. Raise RuntimeError if the server gave it up."""
    if choice["finish_reason"] not in ("stop", "length"):
        raise RuntimeError(f"the vLLM server gave up on a completion: {choice['finish_reason']}")
    log_probs = choice["logprobs"] and choice["logprobs"]["token_logprobs"]
    return Finished(choice["token_ids"], choice["finish_reason"] == "stop", log_probs)
