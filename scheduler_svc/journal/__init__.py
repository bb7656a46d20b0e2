"""The journal: what a scheduler that was killed must still know when it is started again, in one SQLite file."""
