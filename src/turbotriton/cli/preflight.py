"""What can be known to be wrong before tritonserver starts: it takes seconds to load, and says why it ended amid a hundred lines."""

import errno
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence

from turbotriton.contract.errors import InvalidInputError

from .server_runtime import ServerRuntime

__all__ = ["check_passed_on", "check_ports"]

HELP_TIMEOUT_S = 20.0
_UNKNOWN_OPTION = re.compile(r"(?:unrecognized|unknown|invalid) option '?([^\s']+)'?|option '([^']+)' is ambiguous")


def check_ports(host: str, ports: Mapping[str, int], passed_on: Sequence[str]) -> None:
    """ports: "http", "grpc", "metrics" -> number. Raises InvalidInputError for one that tritonserver could not listen on.

    passed_on: flags of tritonserver's own, which may switch a port off, move its address or let servers share it.
    """
    owners: dict[int, str] = {}
    for name, port in ports.items():
        if not 0 < port < 65536:
            raise InvalidInputError(f"--{name}-port is {port}; it must be from 1 to 65535")
        if port in owners:
            raise InvalidInputError(f"the ports must differ: {owners[port]} and {name} are both {port}")
        owners[port] = name
    given = {flag.split("=", 1)[0] for flag in passed_on}
    for name, port in ports.items():
        if not given & {f"--allow-{name}", f"--{name}-address", f"--reuse-{name}-port"}:
            _check_port(host, name, port)


def _check_port(host: str, name: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise InvalidInputError(f"--host is {host!r}, which is no address and no name that this machine knows") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: no wait for connections of the last one
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            reason = {
                errno.EADDRINUSE: "another program listens there; stop it or choose another port",
                errno.EADDRNOTAVAIL: "the address is none of this machine's; choose another --host",
                errno.EACCES: "this user may not listen there; choose a port from 1024 on",
            }.get(error.errno or 0, error.strerror)
            raise InvalidInputError(f"--{name}-port is {port} on {host}: {reason}") from None


def check_passed_on(runtime: ServerRuntime, passed_on: Sequence[str]) -> None:
    """Raises InvalidInputError for what neither we nor this tritonserver take: a misspelt option, a stray word.

    The server's own parser decides, ahead of `--help`; what it says in words that we do not know is left to the start.
    """
    if passed_on and not passed_on[0].startswith("-"):
        raise InvalidInputError(f"{passed_on[0]!r} is one argument too many; see turbotriton serve tritonserver --help")
    if not passed_on:
        return
    command = [str(runtime.binary), *passed_on, "--help"]
    try:
        done = subprocess.run(
            command,
            env=runtime.environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=HELP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    found = _UNKNOWN_OPTION.search(done.stderr.split("\n", 1)[0] or done.stdout.split("\n", 1)[0])
    if found:
        raise InvalidInputError(
            f"{found[1] or found[2]} is an option neither of turbotriton serve tritonserver nor of tritonserver; see --help"
        )
