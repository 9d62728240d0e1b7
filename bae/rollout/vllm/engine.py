"""Sample with vLLM in this process, on the device of the policy: `rollout=vllm`.

vLLM has its own copy of the weights, in its own layout. Weights are copied from the policy before sampling whenever
they have changed, and not by way of the disk. Under DDP every rank has its own engine, which serves its own prompts.
"""

import copy
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from bae.batch import SampledTokens
from bae.rollout.interface import SamplingRequest
from bae.rollout.vllm.completions import Finished, check_lengths, check_truncation, seeds, to_samples
from bae.rollout.vllm.process import (
    check_architecture,
    configure_environment,
    forget_lost_groups,
    launched,
    pack_heads,
    release,
    require_vllm,
    untouched,
)
from bae.rollout.vllm.weights import Fingerprint, checkpoint, fingerprint
from bae.training.causal_lm import CausalLM

GIB = 2**30


class VllmEngine:
    """Sample with an engine that is made at the first call, from the configuration of the model given there.

    Args:
        top_p, top_k: truncation of the distribution; 1 and 0 for none.
        max_model_len: tokens of prompt and completion together; None for what the model allows.
        dtype: of vLLM's copy of the weights; None for the policy's.
        gpu_memory_utilization: share of the device's memory for vLLM's weights and cache.
        kv_cache_gib: size of the cache in GiB; None for what is left of that share, and for 1 on a CPU.
        max_num_seqs: completions that are decoded at a time; None for vLLM's choice.
        enforce_eager: whether vLLM neither compiles nor captures CUDA graphs; None for True on a CPU alone.
        sleep_level: memory that is freed between calls, on GPUs. 0: none. 1: the cache, and weights wait on the CPU.
            2: both.
        engine_args: further arguments of vllm.EngineArgs.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: for values that cannot work.
    """

    def __init__(
        self,
        top_p: float = 1.0,
        top_k: int = 0,
        max_model_len: int | None = None,
        dtype: str | None = None,
        gpu_memory_utilization: float = 0.3,
        kv_cache_gib: float | None = None,
        max_num_seqs: int | None = None,
        enforce_eager: bool | None = None,
        sleep_level: int = 0,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        check_truncation(top_p, top_k)
        for name, value in (("max_model_len", max_model_len), ("max_num_seqs", max_num_seqs)):
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name}={value}: must be 1 or more, or null")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"rollout.gpu_memory_utilization={gpu_memory_utilization}: a share, above 0 and at most 1")
        if kv_cache_gib is not None and kv_cache_gib <= 0:
            raise ValueError(f"rollout.kv_cache_gib={kv_cache_gib}: must be above 0, or null")
        if sleep_level not in (0, 1, 2):
            raise ValueError(f"rollout.sleep_level={sleep_level}: must be 0, 1 or 2")
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"rollout.dtype={dtype}: not a type of torch; use bfloat16, float16, float32 or null")
        require_vllm()
        self.top_p, self.top_k = top_p, top_k
        self.dtype = dtype
        self.kv_cache_gib = kv_cache_gib
        self.enforce_eager = enforce_eager
        self.sleep_level = sleep_level
        self.max_model_len = max_model_len
        self.engine_args: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            **(engine_args or {}),
        }
        self.engine: Any = None
        self.loaded: Fingerprint | None = None  # of the weights that vLLM has
        self.calls = 0

    def sample(self, model: CausalLM, request: SamplingRequest) -> SampledTokens:
        """Sample the requested completions; see RolloutEngine.

        `log_probs` of the samples is None at temperature 0, where nothing is drawn.
        """
        if self.engine is None:  # refuse at once what cannot fit, because making an engine takes long
            limit = self.max_model_len or getattr(model.config, "max_position_embeddings", None)
            if limit:
                check_lengths(request, limit)
        with untouched(model.device):
            self.engine = self.engine or self._make_engine(model)
            check_lengths(request, self.engine.model_config.max_model_len)
            self._wake(model)
            try:
                completions = self._generate(request)
            finally:
                if self.sleep_level:
                    self.engine.sleep(self.sleep_level)
        return to_samples(request, completions)

    def _params(self, request: SamplingRequest) -> list[Any]:
        """Return vLLM's sampling parameters of each completion."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return [
            SamplingParams(
                temperature=request.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                seed=seed,
                max_tokens=request.max_new_tokens,
                logprobs=0 if request.temperature > 0 else None,  # 0: of the sampled token alone
                ignore_eos=True,  # the caller says which token ends a completion
                stop_token_ids=[request.eos_token_id],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for key in request.keys
            for seed in seeds(key, request.group_size)
        ]

    def _generate(self, request: SamplingRequest) -> list[Finished]:
        """Let vLLM sample, and report each completion as soon as it is done."""
        from vllm.inputs import tokens_input

        self.calls += 1
        params = self._params(request)
        numbers = {f"{self.calls}-{n}": n for n in range(len(params))}
        unfinished = []
        done: dict[int, Finished] = {}
        try:
            for name, n in numbers.items():
                prompt = tokens_input(list(request.prompts[n // request.group_size]))
                unfinished.append(self.engine.add_request(name, prompt, params[n]))
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    n = numbers[output.request_id]
                    done[n] = _finished(output.outputs[0])
                    if request.on_finished:
                        request.on_finished(n, done[n].ids, done[n].ended)
        finally:
            if len(done) < len(params):  # something was raised; the next call must not find what is left
                self.engine.abort_request(unfinished, internal=True)
        return [done[n] for n in range(len(params))]

    def _wake(self, model: CausalLM) -> None:
        """Give vLLM its memory and the policy's weights, if it does not have them."""
        asleep = self.sleep_level > 0 and self.loaded is not None
        if asleep:
            self.engine.wake_up(["weights"])
        now = fingerprint(model)
        if now != self.loaded or (asleep and self.sleep_level == 2):
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint(model)})
            if model.device.type == "cpu":
                self.engine.apply_model(pack_heads)
            # What was computed with the old weights is wrong for the new ones.
            if not self.engine.reset_prefix_cache():
                raise RuntimeError("vLLM did not clear its prefix cache, so samples would mix old weights and new")
            self.loaded = now
        if asleep:
            self.engine.wake_up(["kv_cache"])

    def _make_engine(self, model: CausalLM) -> Any:
        """Make an engine for models of this configuration, with random weights."""
        if model.device.type == "cpu" and self.sleep_level:
            raise ValueError(f"rollout.sleep_level={self.sleep_level}: vLLM cannot sleep on a CPU; use 0")
        configure_environment()
        check_architecture(model)
        with launched(model.device), tempfile.TemporaryDirectory() as folder:
            from vllm import EngineArgs, LLMEngine

            forget_lost_groups()
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            engine: Any = LLMEngine.from_engine_args(EngineArgs(**self._arguments(model, folder)))
        # vLLM's own finalizer would destroy every process group of this process, the trainer's too.
        engine.engine_core._finalizer.detach()
        weakref.finalize(self, release, engine.engine_core.engine_core)
        return engine

    def _arguments(self, model: CausalLM, folder: str) -> dict[str, Any]:
        """Return the arguments of vllm.EngineArgs; `folder` holds the model's configuration."""
        on_cpu = model.device.type == "cpu"
        arguments: dict[str, Any] = {
            "model": folder,
            "load_format": "dummy",  # the weights come from memory
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # nothing but what the requests say
            "dtype": self.dtype or str(model.dtype).removeprefix("torch."),
            "enforce_eager": on_cpu if self.enforce_eager is None else self.enforce_eager,
            "enable_prefix_caching": True,  # a group shares its prompt
            # On a CPU a draw that a piece of a prompt does not need cannot be taken back, and vLLM stops.
            "enable_chunked_prefill": False if on_cpu else None,
            "enable_sleep_mode": self.sleep_level > 0,
            "logprobs_mode": "processed_logprobs",  # after temperature, top_p and top_k
            "distributed_executor_backend": "external_launcher",  # one engine a process, on its device
            "disable_log_stats": True,
            "seed": 0,  # every request brings its own
        }
        if on_cpu or self.kv_cache_gib:
            arguments["kv_cache_memory_bytes"] = int((self.kv_cache_gib or 1) * GIB)
        return arguments | self.engine_args


def _finished(output: Any) -> Finished:
    """Read one completion of vLLM. Raise RuntimeError if vLLM gave it up."""
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave up on a completion: {output.finish_reason}")
    ids = list(output.token_ids)
    log_probs = output.logprobs and [of[token].logprob for of, token in zip(output.logprobs, ids, strict=True)]
    return Finished(ids, output.finish_reason == "stop", log_probs)
