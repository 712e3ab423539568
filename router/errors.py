"""Every error the router raises on purpose.

RouterError (ValueError)
├── RouterFileError      a router directory, encoder or classifier on disk is wrong: names file and field
└── RoutingOptionsError  a request or the configuration asks for something impossible: names the option
"""

from pathlib import Path


class RouterError(ValueError):
    """Base of the router's errors; the message is one line."""


class RouterFileError(RouterError):
    """Something on disk is wrong. `file` and `field` name it; an empty `field` means the whole file."""

    def __init__(self, file: Path | str, field: str, problem: str) -> None:
        self.file = str(file)
        self.field = field
        self.problem = " ".join(problem.split())
        super().__init__(f"{self.file}: {field}: {self.problem}" if field else f"{self.file}: {self.problem}")

    def __reduce__(self) -> tuple[type["RouterFileError"], tuple[str, str, str]]:
        return type(self), (self.file, self.field, self.problem)


class RoutingOptionsError(RouterError):
    """A routing option is impossible. `option` is its name as the client wrote it."""

    def __init__(self, option: str, problem: str) -> None:
        self.option = option
        self.problem = " ".join(problem.split())
        super().__init__(f"routing.{option}: {self.problem}")

    def __reduce__(self) -> tuple[type["RoutingOptionsError"], tuple[str, str]]:
        return type(self), (self.option, self.problem)
