"""What a call runs, by PyTorch's profiler."""

import torch
from torch.profiler import ProfilerActivity, profile


def ops(function):
    """The ops that `function` calls, and beneath each those that it calls: [(name, [names])]."""
    function()  # what is loaded once
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()

    def beneath(event):
        names = []
        for child in event.cpu_children:
            names += [child.name] * ("::" in child.name)  # not autograd's own marks
            names += beneath(child)
        return names

    calls = [event for event in profiler.events() if event.cpu_parent is None]
    return [(event.name, beneath(event)) for event in calls]


def on_the_gpu(function):
    """The names of the kernels, copies and fills that `function` runs on the GPU."""
    function()  # what is loaded or allocated once
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        function()
        torch.cuda.synchronize()
    events = profiler.events()
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
