"""What PyTorch's profiler says of memory."""

import torch
from torch.profiler import ProfilerActivity, profile


def allocations(function):
    """The result of `function`, the sizes of all tensors that it allocates, the names of the ops it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    on = "device" if torch.get_default_device().type == "cuda" else "cpu"
    sizes = [getattr(event, f"self_{on}_memory_usage") for event in profiler.events()]
    return result, [size for size in sizes if size > 0], [e.name for e in profiler.events()]


def total_allocated(function):
    """The result of `function`, and all bytes that it asks for, also those that one op gives back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    return result, sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")
