"""Turns any model into a serving folder, once, in the cache.

What is slow (torch, transformers) is imported only when a folder has to be made; opening one that is there takes a
moment.
"""

from executor_svc.cache_home import default_cache_home
from executor_svc.prepare.cache import prepare
from executor_svc.prepare.default_model import DEFAULT_MODEL
from executor_svc.prepare.source import Progress

__all__ = ["DEFAULT_MODEL", "Progress", "default_cache_home", "prepare"]
