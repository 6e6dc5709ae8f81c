"""Paired timing: several functions in turn (A B C, A B C, ...) in one process, so that drift of the machine cancels.

On a shared machine the same function is faster or slower from one second to the next. The ratio of two functions within
one round is steady, and the median over rounds shrugs off what disturbed a few of them. Every claim of speed in this
project is such a median of ratios.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

SHORTEST_S = 1e-3  # a function that is faster is called several times for one measurement
SHORTEST_CUDA_S = 1e-2  # there the first launch waits for Python, about 0.1 ms: let it be 1 %
MOST_CALLS = 2000  # calls for one measurement

Times = dict[str, list[float]]  # seconds a call, one for each round


def paired(
    functions: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = 4.0,
    min_rounds: int = 5,
    rounds: int | None = None,
    device: str = "cpu",
    warm_up: int = 2,
) -> Times:
    """Times functions in turn, after warming each up, with the garbage collector off.

    Args:
        functions: what to time, by name; called without arguments, in this order in every round.
        budget_s: rounds go on until this much time has passed (warming up not counted).
        min_rounds: but there are at least so many.
        rounds: exactly so many, whatever the time.
        device: "cpu" (the process's clock) or "cuda" (events around the calls on the current stream).
        warm_up: calls of each function before anything is measured.

    Returns:
        Seconds a call, a list with one number a round for every name; round i of all names was run together.

    Example:
        >>> times = paired({"one": lambda: sum(range(1000)), "ten": lambda: sum(range(10_000))}, rounds=3)
        >>> len(times["one"]), ratio(times, "ten", "one") > 1
        (3, True)
    """
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    measure = _measure_cuda if device == "cuda" else _measure_cpu
    calls = {name: _calibrate(function, measure, warm_up) for name, function in functions.items()}
    times: Times = {name: [] for name in functions}
    done = 0
    with _garbage_collector_off():
        start = time.perf_counter()
        while True:
            for name, function in functions.items():
                times[name].append(measure(function, calls[name]))
            done += 1
            if done >= (rounds or min_rounds) and (rounds is not None or time.perf_counter() - start >= budget_s):
                return times


def ratio(times: Times, numerator: str, denominator: str) -> float:
    """Median over rounds of one function's time by another's in the same round."""
    pairs = zip(times[numerator], times[denominator], strict=True)
    return statistics.median(above / below for above, below in pairs)


def median(times: Times, name: str) -> float:
    """Median seconds a call."""
    return statistics.median(times[name])


def spread(times: Times, name: str) -> float:
    """Half the distance between the quartiles, as a share of the median: how restless the machine was."""
    found = times[name]
    if len(found) < 2:
        return math.nan
    lower, middle, upper = statistics.quantiles(found, n=4, method="inclusive")
    return (upper - lower) / 2 / middle


def _calibrate(function: Callable[[], object], measure: Callable[..., float], warm_up: int) -> int:
    """Warms a function up, and says how many calls make one measurement long enough for the clock."""
    for _ in range(max(warm_up, 1)):
        function()
    shortest = SHORTEST_CUDA_S if measure is _measure_cuda else SHORTEST_S
    calls = 1
    while calls < MOST_CALLS:
        once = measure(function, calls)
        if once * calls >= shortest:
            break
        calls = min(MOST_CALLS, max(2 * calls, math.ceil(shortest / max(once, 1e-9))))
    return calls


def _measure_cpu(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _measure_cuda(function: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
