"""Quality of service: groups of users by priority, fair shares inside a group, for the `_qos` endpoints.

The file is LMDeploy's: enable_user_qos, user_groups (most important first), user_group_map {group: [{id, quota_pct}]}; the id
"default" stands for users that are not listed. At most `max_running` requests run; whenever one ends, the next is taken from the
first group that waits, and in it from the user whose use in the last WINDOW_S is smallest against the quota.
"""

import asyncio
import contextlib
import itertools
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from turbotriton.contract.errors import ConfigError

from .errors import ApiError

__all__ = ["QosGate", "read_qos_config"]

WINDOW_S = 15.0
MAX_WAITING = 4096


@dataclass(slots=True)
class _User:
    group: int
    quota: float
    spent: deque[tuple[float, float]] = field(default_factory=deque)  # (end, seconds) of each answer in the window
    running: dict[int, float] = field(default_factory=dict)  # number -> beginning

    def order(self, now: float) -> tuple[int, float, float]:
        """Smallest goes first: group, seconds of answers in the window over the quota, answers under way over the quota."""
        while self.spent and self.spent[0][0] < now - WINDOW_S:
            self.spent.popleft()
        seconds = sum(one for _, one in self.spent) + sum(now - began for began in self.running.values())
        return self.group, seconds / self.quota, len(self.running) / self.quota


def read_qos_config(path: Path) -> dict[str, _User]:
    """user id -> group and quota; empty where enable_user_qos is false. Raises ConfigError naming what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_enabled = content.get("enable_user_qos", True)
        groups = list(content["user_groups"])
        users = {
            str(entry["id"]): _User(groups.index(group), float(entry["quota_pct"]))
            for group, entries in content["user_group_map"].items()
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--qos-config-path {path}: expected user_groups and user_group_map, found a fault: {error!r}"
        ) from None
    if not isinstance(is_enabled, bool):
        raise ConfigError(f"--qos-config-path {path}: enable_user_qos is {is_enabled!r}; it must be true or false")
    if any(user.quota <= 0 for user in users.values()):
        raise ConfigError(f"--qos-config-path {path}: every quota_pct must be above 0")
    if "default" not in users:
        raise ConfigError(f"--qos-config-path {path}: one group must list the id 'default', for users that are not named")
    return users if is_enabled else {}


class QosGate:
    """Lets requests through in their order; without users all of them at once. Belongs to one event loop."""

    def __init__(self, users: dict[str, _User], max_running: int) -> None:
        self._users = users
        self._free = max_running
        self._waiting: dict[int, tuple[_User, asyncio.Future[None]]] = {}
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def turn(self, user_id: str | None) -> AsyncIterator[None]:
        """Waits for this user's turn; the block is the answer. Raises ApiError 429 when too many wait."""
        if not self._users:
            yield
            return
        user = self._users[user_id if user_id in self._users else "default"]
        number = next(self._numbers)
        await self._wait(number, user)
        try:
            yield
        finally:
            self._leave(number, user)

    async def _wait(self, number: int, user: _User) -> None:
        if len(self._waiting) >= MAX_WAITING:
            raise ApiError(429, f"the queue is full: {len(self._waiting)} requests wait for their turn", code="queue_full")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (user, turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            self._waiting.pop(number, None)
            if number in user.running:  # its turn came in the same moment
                self._leave(number, user)
            raise

    def _leave(self, number: int, user: _User) -> None:
        now = time.monotonic()
        user.spent.append((now, now - user.running.pop(number)))
        self._free += 1
        self._admit()

    def _admit(self) -> None:
        now = time.monotonic()
        while self._free and self._waiting:
            number = min(self._waiting, key=lambda one: (self._waiting[one][0].order(now), one))
            user, turn = self._waiting.pop(number)
            if turn.done():
                continue  # cancelled just now
            user.running[number] = now
            self._free -= 1
            turn.set_result(None)
