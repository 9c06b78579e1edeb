"""What `serve tritonserver` refuses before it starts the server."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbotriton.cli.preflight import check_passed_on, check_ports
from turbotriton.cli.running_server import held_ports
from turbotriton.cli.server_runtime import ServerRuntime
from turbotriton.contract.errors import InvalidInputError


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        yield listening.getsockname()[1]


@pytest.fixture
def ports() -> Iterator[dict[str, int]]:
    """Free ones."""
    with held_ports(3) as held:
        yield dict(zip(("http", "grpc", "metrics"), held, strict=True))


def test_free_ports_pass(ports: dict[str, int]) -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        check_ports(host, ports, ())


def test_held_ports_are_for_their_servers_alone() -> None:
    """A server that sets SO_REUSEADDR listens there; whoever does not, as one that takes any free port, is refused."""
    with held_ports(2) as (first, second):
        assert first != second
        with socket.create_server(("127.0.0.1", first)):
            socket.create_connection(("127.0.0.1", first)).close()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", second))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", second))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_taken_port_is_named_with_its_option(name: str, host: str, taken: int, ports: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=f"^--{name}-port is {taken} on {host}: another program listens there"):
        check_ports(host, ports | {name: taken}, ())


@pytest.mark.parametrize("flag", ["--allow-http=false", "--http-address=127.0.0.9", "--reuse-http-port=1"])
def test_a_port_that_tritonservers_own_flags_speak_of_is_left_to_it(flag: str, taken: int, ports: dict[str, int]) -> None:
    check_ports("127.0.0.1", ports | {"http": taken}, (flag,))


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_no_port_outside_the_range_is_cut_to_another(port: int, ports: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=f"^--grpc-port is {port}; it must be from 1 to 65535"):
        check_ports("127.0.0.1", ports | {"grpc": port}, ())


def test_the_same_port_twice() -> None:
    with pytest.raises(InvalidInputError, match="http and metrics are both"):
        check_ports("127.0.0.1", {"http": 9, "grpc": 8, "metrics": 9}, ())


@pytest.mark.parametrize(
    ("host", "words"), [("203.0.113.7", "none of this machine's"), ("nobody.invalid", "no address and no name")]
)
def test_an_address_of_somebody_else(host: str, words: str, ports: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=words):
        check_ports(host, ports, ())


@pytest.fixture
def runtime(tmp_path: Path) -> ServerRuntime:
    """A server that knows --known, and says of others what getopt does."""
    binary = tmp_path / "tritonserver"
    binary.write_text(
        "#!/bin/sh\nfor flag; do case $flag in --known*) ;; --help) echo usage; exit 1;;\n"
        "-*) echo \"$0: unrecognized option '$flag'\" >&2; exit 1;; esac; done\n"
    )
    binary.chmod(0o755)
    return ServerRuntime(binary, (), {"PATH": "/usr/bin:/bin"})


def test_flags_that_the_server_knows_pass(runtime: ServerRuntime) -> None:
    check_passed_on(runtime, ())
    check_passed_on(runtime, ("--known=1", "--known", "value"))


def test_a_misspelt_flag_is_named(runtime: ServerRuntime) -> None:
    with pytest.raises(InvalidInputError, match=r"^--sesion-len=5 is an option neither of turbotriton .* nor of tritonserver"):
        check_passed_on(runtime, ("--known=1", "--sesion-len=5"))


def test_a_stray_word_is_named(runtime: ServerRuntime) -> None:
    with pytest.raises(InvalidInputError, match=r"^'extra' is one argument too many"):
        check_passed_on(runtime, ("extra",))


def test_a_server_that_cannot_be_asked_is_asked_at_its_start(tmp_path: Path) -> None:
    check_passed_on(ServerRuntime(tmp_path / "nothing", (), {}), ("--unknown",))
