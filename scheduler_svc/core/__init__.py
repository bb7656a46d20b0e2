"""The scheduler's core: plain Python, events in, values out, time as an argument."""
