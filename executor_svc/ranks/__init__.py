"""Ranks: the processes, one for each GPU, that share one model too large for one of them."""
