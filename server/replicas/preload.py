"""What every replica needs, imported once in the process that all of them are forked from."""

import os

from loramux.server.large_pages import ask_for_large_pages

ask_for_large_pages()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import loramux.server.build  # noqa: E402
import loramux.server.replicas.desk  # noqa: E402, F401
