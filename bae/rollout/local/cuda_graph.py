"""Calling the same operations on a GPU over and over, without telling it each one every time."""

from collections.abc import Callable

import torch
from torch import Tensor


class RecordedStep:
    """Calls a function of one tensor and of what lay elsewhere at the first call; values may change, places and sizes
    must not. On a GPU the second call records a CUDA graph, and that and later ones replay it: what they return is
    overwritten by the next. On a CPU every call is a plain one."""

    def __init__(self) -> None:
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Raises ValueError where recording fails, as when the function waits for the GPU."""
        self._calls += 1
        if x.device.type != "cuda" or self._calls == 1:  # the first lets libraries take the memory they want
            return function(x)
        if self._graph is None:
            self._given, graph = x.clone(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may watch the GPU
                    self._made = function(self._given)
            except RuntimeError as error:
                raise ValueError(
                    f"rollout: this model's forward pass cannot be recorded as a CUDA graph ({error}); "
                    "set rollout.cuda_graphs=false"
                ) from error
            self._graph = graph
        self._given.copy_(x)
        self._graph.replay()
        return self._made
