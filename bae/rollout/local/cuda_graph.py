"""Repeat the same operations on a GPU without launching each of them every time."""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraphRunner:
    """Call a function of one tensor again and again, on a GPU as a CUDA graph.

    The function may read other tensors. Between calls the values of all tensors may change, but their addresses and
    sizes must not. On a GPU the first call is a plain one, the second records a graph, and the second and all later
    calls replay it: each call overwrites what the one before returned. On a CPU every call is a plain one.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `function(x)`.

        Raises:
            ValueError: if the function cannot be recorded, for example because it waits for the GPU.
        """
        self._calls += 1
        if x.device.type != "cuda" or self._calls == 1:  # in the first call libraries take the memory that they want
            return function(x)
        if self._graph is None:
            self._record(function, x)
        assert self._graph is not None
        self._input.copy_(x)
        self._graph.replay()
        return self._output

    def _record(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Record a graph that reads `_input` and writes `_output`."""
        self._input, graph = x.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may watch the GPU
                self._output = function(self._input)
        except RuntimeError as error:
            raise ValueError(
                f"rollout: this model's forward pass cannot be recorded as a CUDA graph ({error}); "
                "set rollout.cuda_graphs=false"
            ) from error
        self._graph = graph
