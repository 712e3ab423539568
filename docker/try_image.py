"""Build an image without a Docker engine, look into it, run it and ask it a question.

    python3 docker/try_image.py [--base DIR_OR_IMAGE] [--file docker/Dockerfile.cpu] [--work DIR]

Needs root, buildah and bubblewrap; and debootstrap, where no base is given. `--base` is a directory with a
Debian root, or the name of an image. Everything is made under `--work` (default: a temporary directory,
several GB) and removed at the end. pip is configured inside as outside: its settings go in as build
arguments, and local folders that they name are mounted; all that this leaves in the result are empty mount
points. Prints one JSON object: what was measured.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
BASE, IMAGE = "localhost/loramux-base", "localhost/loramux-trial"
DEBIAN = "bookworm"
#: An id that the image does not know, in the root group as on OpenShift.
USER = ["--uid", "54321", "--gid", "0"]
PIP = ("index-url", "extra-index-url", "find-links", "constraint", "trusted-host")
CERT = "/run/pip-cert.pem"
BUILD_TOOLS = ("gcc", "g++", "cc", "c++", "make", "pip", "pip3", "git", "ld")
QUESTION = "What is the total number of wins when the team is Arsenal?"


class Buildah:
    """buildah with a storage of its own; no daemon, no user namespaces, no overlay file system."""

    def __init__(self, work: Path) -> None:
        store = ["--root", str(work / "storage"), "--runroot", str(work / "run"), "--storage-driver", "vfs"]
        self._command = ["buildah", *store]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True
        )
        return done.stdout.strip()

    def build(self, file: Path, base: str, extra: list[str]) -> None:
        """The image of a Dockerfile; its log goes to stderr."""
        subprocess.run(
            [
                *self._command,
                *("bud", "--isolation", "chroot", "--format", "docker", "--file", str(file), "--tag", IMAGE),
                *("--build-arg", f"BASE={base}", *extra, str(ROOT)),
            ],
            stdout=sys.stderr,
            check=True,
        )

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """The file system of a container of an image."""
        container = self("from", "--pull-never", image)
        try:
            yield Path(self("mount", container))
        finally:
            self("rm", container)


def pip_arguments(without: list[str]) -> list[str]:
    """pip's configuration, as build arguments and mounts, less the settings of these names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = {}
    for line in listed.splitlines():  # global, then the user's, then the environment's: the last one wins
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = value.strip("'")
    arguments: list[str] = []
    if (cert := found.pop("cert", None)) is not None:  # its own place is ca-certificates' inside
        arguments += ["--volume", f"{cert}:{CERT}:ro", "--build-arg", f"PIP_CERT={CERT}"]
    for key in found.keys() & set(PIP) - set(without):
        arguments += ["--build-arg", f"PIP_{key.replace('-', '_').upper()}={found[key]}"]
        for word in found[key].split():
            path = Path(unquote(urlsplit(word).path)) if word.startswith(("/", "file:")) else None
            if path is not None and path.exists():
                path = path.parent if "index" in key else path  # its files lie beside the index
                arguments += ["--volume", f"{path}:{path}:ro"]
    return arguments


def import_base(buildah: Buildah, base: str | None, work: Path) -> str:
    """The name of the base image, made from a directory or by debootstrap where it is none yet."""
    root = Path(base) if base is not None else work / "debian"
    if base is None:
        command = ["debootstrap", "--variant=minbase", DEBIAN, str(root)]
        subprocess.run(command, stdout=sys.stderr, check=True)
    elif not root.is_dir():
        return base
    container = buildah("from", "scratch")
    place = buildah("mount", container)
    subprocess.run(["cp", "-a", f"{root}/.", place], check=True)
    buildah("commit", "--rm", container, BASE)
    return BASE


def inside(root: Path, config: dict[str, object], port: int) -> list[str]:
    """A command that runs another one as a container would be run with `--read-only --tmpfs /tmp`."""
    environment = dict(item.split("=", 1) for item in config["Env"])  # type: ignore[attr-defined]
    environment["LORAMUX_PORT"] = str(port)
    sandbox = ["bwrap", "--ro-bind", str(root), "/", "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    sandbox += ["--unshare-user", "--unshare-pid", *USER, "--die-with-parent", "--clearenv"]
    sandbox += ["--chdir", str(config["WorkingDir"])]
    for name, value in environment.items():
        sandbox += ["--setenv", name, value]
    return sandbox


def ask(url: str) -> dict[str, object]:
    """One answer of the chat route."""
    message = {"role": "user", "content": QUESTION}
    body = json.dumps({"model": "auto", "messages": [message], "max_tokens": 24, "temperature": 0})
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, object] = json.load(response)
    return answer


def first_answer(url: str, server: "subprocess.Popen[bytes]", limit: float = 120.0) -> dict[str, object]:
    """Ask until there is an answer."""
    deadline = time.monotonic() + limit
    while True:
        try:
            return ask(url)
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None:
                sys.exit(f"the server ended with {server.returncode}")
            if time.monotonic() > deadline:
                sys.exit(f"no answer within {limit:.0f} s")
            time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def examine(root: Path, config: dict[str, object]) -> dict[str, object]:
    """What can be said without running it.

    Ends the program where a rule is broken: root, no health check, build tools, missing kernels, traces of
    pip's configuration.
    """
    if str(config.get("User", "")) in ("", "0", "root"):
        sys.exit("the image runs as root")
    if "Healthcheck" not in config:
        sys.exit("the image has no health check")
    places = [root / place for place in ("usr/bin", "usr/local/bin", "bin", "opt/venv/bin")]
    if tools := [str(place / name) for place in places for name in BUILD_TOOLS if (place / name).exists()]:
        sys.exit(f"build tools in the image: {tools}")
    kernels = sorted(
        path.parent.name
        for path in root.glob("opt/venv/lib/python*/site-packages/loramux/kernels/*/_native*.so")
    )
    if len(kernels) != len(list(ROOT.glob("kernels/*/native.cpp"))):
        sys.exit(f"compiled kernels in the image: {kernels}")
    if any(name.startswith("PIP_") and "INDEX" in name for name in config["Env"]):  # type: ignore[attr-defined]
        sys.exit("an index is named in the image's environment")
    used = subprocess.run(
        ["du", "-sm", "--one-file-system", root], capture_output=True, text=True, check=True
    )
    return {"megabytes": int(used.stdout.split()[0]), "kernels": kernels}


def run(root: Path, config: dict[str, object]) -> dict[str, object]:
    """Start the server, ask it, check its health, and stop it."""
    port = free_port()
    sandbox = inside(root, config, port)
    command = [*config["Entrypoint"], *config["Cmd"]]  # type: ignore[misc]
    started = time.monotonic()
    server = subprocess.Popen([*sandbox, *command], stdout=sys.stderr)
    try:
        answer = first_answer(f"http://127.0.0.1:{port}", server)
        seconds = time.monotonic() - started
        check = config["Healthcheck"]["Test"][1:]  # type: ignore[index]
        healthy = subprocess.run([*sandbox, *check], stdout=sys.stderr, check=False).returncode == 0
    finally:
        server.terminate()
        server.wait(60)
    choice = answer["choices"][0]["message"]["content"]  # type: ignore[index]
    experts = [one["id"] for one in answer["loramux"]["route"]["experts"]]  # type: ignore[index]
    return {
        "first_answer_seconds": round(seconds, 2),
        "healthy": healthy,
        "answer": choice,
        "experts": experts,
    }


def main() -> None:
    """Build, examine, run, print."""
    parser = argparse.ArgumentParser(description="Build an image without a Docker engine and try it.")
    parser.add_argument("--base", help="a Debian root, or the name of an image; default: by debootstrap")
    parser.add_argument("--file", type=Path, default=ROOT / "docker" / "Dockerfile.cpu")
    parser.add_argument("--work", type=Path, help="a folder with room for several GB")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        help="a setting of pip that stays outside: find-links, where it leads to a torch for another device",
    )
    parser.add_argument("--no-run", action="store_true", help="build and examine only")
    given = parser.parse_args()
    if missing := [tool for tool in ("buildah", "bwrap") if shutil.which(tool) is None]:
        sys.exit(f"missing: {', '.join(missing)} (Debian: buildah, bubblewrap)")
    work = Path(tempfile.mkdtemp(prefix="loramux-image-", dir=given.work))
    os.chmod(work, 0o755)  # the trial's user has to reach the image in it
    buildah = Buildah(work)
    try:
        began = time.monotonic()
        base = import_base(buildah, given.base, work)
        buildah.build(given.file, base, pip_arguments(given.without))
        result: dict[str, object] = {"build_seconds": round(time.monotonic() - began)}
        config = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        with buildah.mounted(IMAGE) as root:
            result |= examine(root, config)
            if not given.no_run:
                result |= run(root, config)
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
