"""The peak memory of tensors during a function, measured at torch's allocator."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function) -> int:
    """Return the peak of memory allocated and not yet freed while `function()` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
