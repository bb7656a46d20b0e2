"""The autoscaler: observes the load, forecasts it, decides how many executors there should be, and sees to it."""
