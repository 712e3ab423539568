"""What a process of the server logs, and how a line looks."""

import logging

_NOISY = ("httpx", "transformers", "sentence_transformers", "faiss.loader", "ContinuousBatchingLogger")


def configure_logs(level: str, process: str = "") -> None:
    """Log to stderr from `level` on; `process` stands in each line where several log to one place."""
    named = f"{process} " if process else ""
    logging.basicConfig(level=level.upper(), format=f"%(asctime)s %(levelname)s {named}%(name)s: %(message)s")
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
