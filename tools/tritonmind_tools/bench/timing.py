"""How long a call takes: on a GPU without the host, out of cold caches; on a CPU by the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

# Inputs are taken in turn out of so much memory that none is left in the L2 cache (50 MB on an H100) when it is needed.
ROTATED_BYTES = 300 << 20
MIN_LAUNCHES, MAX_LAUNCHES = 8, 64  # of one replay: enough to make its own launch small, few enough for slow kernels
NUM_WARM_UPS = 3
NUM_REPLAYS = 11
NUM_CPU_ROUNDS = 5


def seconds_per_call(make: Callable[[], Call], num_bytes: float, device: torch.device) -> float:
    """Median time of one call. make: allocates a set of inputs of about `num_bytes` and gives the call on them."""
    if device.type == "cpu":
        return _on_cpu(make())
    num_sets = min(MAX_LAUNCHES, max(1, -(-ROTATED_BYTES // max(1, int(num_bytes)))))
    calls = [make() for _ in range(num_sets)]
    launches = [calls[i % num_sets] for i in range(max(MIN_LAUNCHES, num_sets))]
    return _on_gpu(launches) / len(launches)


def _on_cpu(call: Call) -> float:
    seconds = []
    for _ in range(NUM_WARM_UPS + NUM_CPU_ROUNDS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[NUM_WARM_UPS:])


def _on_gpu(launches: list[Call]) -> float:
    """Seconds of a CUDA graph of these launches, which leaves out what the host takes to make them."""
    for call in launches[:NUM_WARM_UPS]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in launches:
            call()
    # Small inputs do not fill ROTATED_BYTES: what the last replay left in the cache is pushed out by reading this.
    other = torch.zeros(ROTATED_BYTES // 4, dtype=torch.float32, device="cuda")
    seconds = []
    for _ in range(NUM_WARM_UPS + NUM_REPLAYS):
        other.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[NUM_WARM_UPS:])
