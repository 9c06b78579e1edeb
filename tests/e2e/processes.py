"""The processes behind a running server, found through /proc."""

from pathlib import Path

from .server import TritonServer

#: The demo model's likeliest answer has 119 tokens, whatever the conversation was before: half a minute of a throttled engine.
#: Sampled answers are no substitute, since one in thirty ends within five tokens.
LONG_STORY = "Tell me a long story."


def children(pid: int) -> dict[int, str]:
    """Every living descendant of a process: pid -> command line."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found: dict[int, str] = {}
    front = {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front and child not in found}
        found.update({child: commands[child] for child in front})
    return found


def engine_pid(server: TritonServer) -> int:
    """The one engine process that was started for this server (it may have its own process group and parent)."""
    owner = f"--owner-pid {server.pid} "
    pids = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and owner in _command(entry) + " " and "turbotriton.backend.engine" in _command(entry)
    ]
    assert len(pids) == 1, f"expected one engine process of server {server.pid}, found {pids}"
    return pids[0]


def _command(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
