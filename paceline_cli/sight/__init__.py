"""Pictures of a running service for the terminal: messages in, lines of text out, and nothing else."""
