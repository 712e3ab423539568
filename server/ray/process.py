"""What a process that Ray started does first."""

import os

from loramux.server.logs import configure_logs
from loramux.server.torch_memory import arrange_memory


def prepare(log_level: str, name: str) -> None:
    """Log, and import what everything stands on; before any other module of ours does."""
    arrange_memory()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched
    configure_logs(log_level, name)
    from loramux.server.light_imports import import_for_serving

    import_for_serving()
