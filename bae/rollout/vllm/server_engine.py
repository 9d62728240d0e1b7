"""A vLLM server on other devices than the policy's: `rollout=vllm_server`.

Every rank sends its own prompts, one request a completion. Whenever the weights have changed, rank 0 sends them to the
server before anyone samples, by the transport that the server was started with: NCCL between GPUs, gloo on a CPU.
"""

import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.rollout.interface import OnFinished
from bae.rollout.vllm.completions import Finished, check_lengths, check_truncation, seeds, to_samples
from bae.rollout.vllm.http import Server
from bae.rollout.vllm.process import configure_environment, require_vllm
from bae.rollout.vllm.weights import Fingerprint, checkpoint, fingerprint

SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip
"""What of a configuration has to be the same at both ends."""


class VllmServerEngine:
    """Samples at a server that has been started for it; docs/rollout.md has the command.

    url: of the server. served_model: the name by which it serves the model, None for the only one.
    top_p, top_k: truncation of the distribution; 1 and 0 for none.
    concurrency: requests of a rank at a time. timeout: seconds that one of them may take.
    address: of this machine, as the server reaches it; None for that of the network on which the server is reached.

    Raises ConnectionError if no such server answers, ValueError if it was started otherwise than it must be.
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
    ):
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
        self.address = address
        self.server = Server(url, concurrency, timeout)
        self.served = _served(self.server, served_model)
        self.backend = _backend(self.server)
        self.sender: Any = None
        self.loaded: Fingerprint | None = None  # the weights that the server has

    def sample(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, ...]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int,
        pad_token_id: int,
        on_finished: OnFinished | None = None,
    ) -> SampledTokens:
        """See RolloutEngine. `log_probs` is None at temperature 0, where nothing is drawn."""
        check_lengths(prompts, max_new_tokens, self.served["max_model_len"])
        self._share(model)
        same = {
            "model": self.served["id"],
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,  # the server would take what is not said from the model's generation_config.json
            "repetition_penalty": 1.0,
            "ignore_eos": True,  # the caller says which token ends a completion
            "stop_token_ids": [eos_token_id],
            "return_token_ids": True,
            "logprobs": 0 if temperature > 0 else None,  # of the sampled token alone
        }
        bodies = [
            same | {"prompt": list(prompt), "seed": seed}
            for prompt, key in zip(prompts, keys, strict=True)
            for seed in seeds(key, group_size)
        ]
        return to_samples(prompts, self._complete(bodies, on_finished), pad_token_id)

    def _complete(self, bodies: Sequence[dict[str, Any]], on_finished: OnFinished | None) -> list[Finished]:
        done: dict[int, Finished] = {}
        threads = ThreadPoolExecutor(min(self.concurrency, len(bodies)))
        try:
            waiting = {threads.submit(self.server.post, "v1/completions", body): n for n, body in enumerate(bodies)}
            for answer in as_completed(waiting):
                n = waiting[answer]
                done[n] = _finished(answer.result()["choices"][0])
                if on_finished:
                    on_finished(n, done[n].ids, done[n].ended)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return [done[n] for n in range(len(bodies))]

    def _share(self, model: Any) -> None:
        """See to it that the server has the weights as they are.

        They change on all ranks alike, so that all go past the first line or none does; and none has changed while
        another rank still samples, for ranks step together.
        """
        now = fingerprint(model)
        if now == self.loaded:
            return
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        failure: list[str | None] = [None]
        if ranks == 1 or torch.distributed.get_rank() == 0:
            try:
                self._send(model)
            except Exception as error:  # the other ranks wait, and have to hear of it
                if ranks == 1:
                    raise
                failure = [f"{error}"]
        if ranks > 1:
            torch.distributed.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise ConnectionError(failure[0])
        self.loaded = now

    def _send(self, model: Any) -> None:
        if self.sender is None:
            _check_same_model(self.served["root"], model, self.server.url)
            self.sender = self._meet(model)
        try:
            self.sender.send_weights()
        except RuntimeError as error:  # of the transport: the other end is gone
            raise ConnectionError(
                f"rollout.url={self.server.url}: the vLLM server did not take the weights "
                f"({str(error).splitlines()[0]}); see its log, and start it again"
            ) from error
        if not self.server.post("reset_prefix_cache")["success"]:
            raise ConnectionError(
                f"rollout.url={self.server.url}: the vLLM server did not clear its prefix cache, so samples would mix "
                "old weights and new; does someone else use it?"
            )

    def _meet(self, model: Any) -> Any:
        """A connection for weights with every worker of the server."""
        configure_environment()
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.server.post("shutdown_weight_transfer_engine")  # of a trainer that was here before
        address = self.address or _own_address(self.server.url)
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        place = {"master_address": address, "master_port": port}
        world = self.server.get("get_world_size")["world_size"] + 1
        info: Any
        if self.backend == "gloo":
            from bae.rollout.vllm.gloo import GlooTrainerInitInfo

            info = GlooTrainerInitInfo(**place, world_size=world, rank=0)
        else:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            info = NCCLTrainerInitInfo(**place, world_size=world, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=self.server, source=_source(model))


def _source(model: Any) -> Any:
    """The weights, for vLLM's senders."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Weights(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in checkpoint(model)]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return checkpoint(model)

    return Weights()


def _served(server: Server, name: str | None) -> dict[str, Any]:
    """The model of the server: its `id`, `root` and `max_model_len`."""
    models = {model["id"]: model for model in server.get("v1/models")["data"]}
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    if name not in models:
        raise ValueError(f"rollout.served_model={name}: the server at {server.url} serves {', '.join(models)}")
    return models[name]


def _backend(server: Server) -> str:
    """How the server takes weights. Raises ValueError if it was started otherwise than it must be."""
    config = server.get("server_info", config_format="json")["vllm_config"]
    mode, transfer = config["model_config"]["logprobs_mode"], config["weight_transfer_config"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"rollout.url={server.url}: start the server with --logprobs-mode processed_logprobs, not {mode}"
        )
    if not transfer or transfer["backend"] not in ("nccl", "gloo"):
        raise ValueError(
            f"rollout.url={server.url}: the server takes no weights; start it with --weight-transfer-config "
            '\'{"backend": "nccl"}\', on a CPU as docs/rollout.md has it'
        )
    return str(transfer["backend"])


def _check_same_model(root: str, model: Any, url: str) -> None:
    """Raises ValueError if the server's model has another shape, as far as its configuration is at hand here."""
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(root)
    except (OSError, ValueError):
        return  # a folder of the server's machine: weights of other shapes are refused when they get there
    for name in SHAPE:
        ours, other = getattr(model.config, name, None), getattr(theirs, name, None)
        if ours != other:
            raise ValueError(
                f"rollout.url={url}: the server has another model than the policy, {root}, whose {name} is {other} "
                f"instead of {ours}"
            )


def _finished(choice: dict[str, Any]) -> Finished:
    if choice["finish_reason"] not in ("stop", "length"):
        raise RuntimeError(f"the vLLM server gave up on a completion: {choice['finish_reason']}")
    log_probs = choice["logprobs"] and choice["logprobs"]["token_logprobs"]
    return Finished(choice["token_ids"], choice["finish_reason"] == "stop", log_probs)


def _own_address(url: str) -> str:
    """The address of this machine on the network that leads to `url`."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return str(probe.getsockname()[0])
