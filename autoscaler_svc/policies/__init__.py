"""Policies: how many executors there should be, by one rule each."""
