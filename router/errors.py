"""Every error the router raises on purpose.

RouterError (ValueError)
├── RouterFileError       a router directory, encoder or classifier on disk is wrong: names file and field
├── RoutingOptionsError   a request or the configuration asks for something impossible: names the option
└── RoutingExamplesError  an expert cannot join by these example texts: names the text
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


class RoutingExamplesError(RouterError):
    """An expert cannot join a router by these texts. `number` is that of the text at fault, None for all."""

    def __init__(self, number: int | None, problem: str) -> None:
        self.number = number
        self.problem = " ".join(problem.split())
        place = "" if number is None else f"[{number}]"
        super().__init__(f"routing_examples{place}: {self.problem}")

    def __reduce__(self) -> tuple[type["RoutingExamplesError"], tuple[int | None, str]]:
        return type(self), (self.number, self.problem)
