"""A server that crashes while it starts is started again; one that says why it ends is not."""

import sys
from pathlib import Path

import pytest

from turbotriton.cli import running_server
from turbotriton.contract.errors import ServerError

#: Ends with the first argument's codes, one a start, then serves: every path is found.
PROGRAM = """
import http.server, pathlib, sys
codes, started, port = sys.argv[1].split(","), pathlib.Path(sys.argv[2]), int(sys.argv[3])
started.write_text(started.read_text() + "x")
if len(started.read_text()) <= len(codes):
    print("no such model")
    sys.exit(int(codes[len(started.read_text()) - 1]))
handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_GET": lambda self: (self.send_response(200), self.end_headers())})
http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("codes", "num_starts", "message"),
    [
        ("6,11", 3, None),
        ("6,11,6", 3, "did not start: it crashed"),
        ("1", 1, "did not start: no such model"),
        ("6,2", 2, "did not start: no such model"),
    ],
)
def test_only_a_crash_is_tried_again(tmp_path: Path, codes: str, num_starts: int, message: str | None) -> None:
    started = tmp_path / "started"
    started.touch()
    with running_server.held_ports(1) as (port,):
        command = [sys.executable, "-c", PROGRAM, codes, str(started), str(port)]
        if message is None:
            running_server._stop(running_server._started(command, port, ["one", "two"], tmp_path / "log"))
        else:
            with pytest.raises(ServerError, match=message):
                running_server._started(command, port, ["one", "two"], tmp_path / "log")
    assert len(started.read_text()) == num_starts
