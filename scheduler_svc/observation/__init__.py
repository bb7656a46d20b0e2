"""What the scheduler remembers of requests and steps, and how people see it: traces, metrics, an overview."""
