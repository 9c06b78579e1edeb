"""`turbotriton serve api_server` as a process."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from turbotriton.cli.running_server import held_ports


@contextmanager
def api_server(target: str, *options: str, scheme: str = "http", timeout_s: float = 90.0) -> Iterator[str]:
    """Its base URL, without /v1, once it answers; checks that SIGTERM ends it cleanly."""
    with held_ports(1) as (port,), tempfile.TemporaryFile() as log:  # a pipe that nobody reads would hold up a talkative server
        command = [sys.executable, "-m", "turbotriton", "serve", "api_server", target, "--server-port", str(port), *options]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdout=log, stderr=subprocess.STDOUT)
        url = f"{scheme}://127.0.0.1:{port}"
        try:
            end = time.monotonic() + timeout_s
            while not _answers(url):
                assert process.poll() is None, f"the server ended with code {process.returncode}"
                assert time.monotonic() < end, "the server did not come up"
                time.sleep(0.1)
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            log.seek(0)
            print(log.read().decode(errors="replace"))


def _answers(url: str) -> bool:
    """Any HTTP answer counts, also a refusal."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{url}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (urllib.error.URLError, OSError) as error:
        return "CERTIFICATE" in str(error)
    return True
