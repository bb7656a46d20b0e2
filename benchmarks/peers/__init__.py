"""Other servers under the same work: one script for each, which runs in that server's own environment."""
