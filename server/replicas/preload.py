"""What every replica needs, imported once in the process that all of them are forked from."""

import os

from loramux.server.torch_memory import arrange_memory

arrange_memory()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import loramux.server.build  # noqa: E402
import loramux.server.replicas.desk  # noqa: E402, F401
