"""The scheduler: holds every request and every block table and decides, step by step, what is computed."""
