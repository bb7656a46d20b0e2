"""Actuators: who starts and ends executor processes for the autoscaler."""
