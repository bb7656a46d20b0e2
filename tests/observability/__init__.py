"""Traces, metrics and pages, read by what others would read them with."""
