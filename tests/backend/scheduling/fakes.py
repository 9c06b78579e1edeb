"""A scheduler over a tiny pool, and a runner whose next token is a hash of the whole sequence (so a lost token shows)."""

import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from turbotriton.backend.scheduling.block_manager import BlockManager
from turbotriton.backend.scheduling.plan import ScheduledRow, StepPlan, StepResult
from turbotriton.backend.scheduling.scheduler import PREFILL_BESIDE_DECODES, OwnedDelta, Scheduler
from turbotriton.contract.ini import EngineConfig, ModelConfig, RopeConfig
from turbotriton.contract.wire import GenerateRequest, SamplingParams

VOCAB_SIZE = 1000
PLAIN_ROPE = RopeConfig(dim=8, theta=10000.0)


def model_config(eos_token_ids: tuple[int, ...] = (VOCAB_SIZE - 1,), rope: RopeConfig = PLAIN_ROPE) -> ModelConfig:
    return ModelConfig(
        model_name="fake", num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8, inter_size=8,
        vocab_size=VOCAB_SIZE, norm_eps=1e-5, attn_bias=False, weight_type="fp32", group_size=0, tp=1,
        rope=rope, bos_token_id=1, eos_token_ids=eos_token_ids, tie_word_embeddings=False,
        qk_norm=False, sliding_window=0, use_logn_attn=False,
    )  # fmt: skip


def next_token(token_ids: Sequence[int]) -> int:
    return zlib.crc32(array("q", token_ids).tobytes()) % (VOCAB_SIZE - 1)


def oracle(prompt_ids: Sequence[int], count: int) -> list[int]:
    known = list(prompt_ids)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(prompt_ids) :]


class FakeRunner:
    """Follows plans as plan.py orders them and asserts that each is possible for a real device.

    The cache is modelled: a computed token leaves (its position, a hash of rotary base and all tokens up to it) in its block, and a
    row may only run when every earlier position of its sequence lies in its blocks with exactly that. A wrong prefix hit, a block
    given away too early or a position that nobody computed is caught where it happens.
    """

    device = "cpu"
    compute_dtype = "fp32"

    def __init__(self, num_blocks: int, block_size: int, max_batch_size: int = 1 << 30, budget: int = 1 << 30) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_batch_size = max_batch_size
        self.budget = budget
        self.slots: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.thetas: dict[int, float] = {}
        self.computed: dict[int, int] = {}  # slot -> tokens whose keys are there, once its first row has run
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for slot in plan.left:
            del self.slots[slot], self.tables[slot], self.thetas[slot]
            self.computed.pop(slot, None)
        for joined in plan.joined:
            assert 0 <= joined.slot < self.max_batch_size
            assert joined.slot not in self.slots, f"slot {joined.slot} is taken"
            self.slots[joined.slot], self.tables[joined.slot] = list(joined.token_ids), list(joined.block_ids)
            self.thetas[joined.slot] = joined.rope_theta
        for added in plan.new_blocks:
            self.tables[added.slot] += added.block_ids
        for table in self.tables.values():
            assert len(set(table)) == len(table)
            assert all(0 <= block < self.num_blocks for block in table)
        assert plan.num_tokens <= self.budget
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        return StepResult(tuple(token for row in plan.rows for token in self._run(row)))

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        result = self.execute(plan)
        return lambda: result

    def _run(self, row: ScheduledRow) -> list[int]:
        known, table, end = self.slots[row.slot], self.tables[row.slot], row.start + row.num_tokens
        assert row.start == self.computed.setdefault(row.slot, row.start), "rows of a slot must follow each other"
        assert row.num_tokens > 0
        assert end <= len(known)
        assert end <= len(table) * self.block_size, "a row writes outside its blocks"
        digest = zlib.crc32(repr(self.thetas[row.slot]).encode())
        for position, token in enumerate(known[:end]):
            digest = zlib.crc32(token.to_bytes(8, "little"), digest)
            cell = (table[position // self.block_size], position % self.block_size)
            if position < row.start:
                assert self.cache.get(cell) == (position, digest), f"slot {row.slot} reads position {position}: not its own"
                continue
            holders = [slot for slot, blocks in self.tables.items() if cell[0] in blocks]
            assert holders == [row.slot], f"slot {row.slot} writes block {cell[0]}, which {holders} hold"
            self.cache[cell] = (position, digest)
        self.computed[row.slot] = end
        if not row.samples:
            return []
        assert end == len(known)
        known.append(next_token(known))
        return known[-1:]

    def close(self) -> None:
        pass


class Bench:
    """`overlap`: a step is scheduled and run before the one before it is taken in."""

    def __init__(
        self,
        num_blocks: int = 8,
        block_size: int = 4,
        budget: int = 16,
        eos: tuple[int, ...] = (VOCAB_SIZE - 1,),
        rope: RopeConfig = PLAIN_ROPE,
        overlap: bool = False,
        beside_decodes: int = PREFILL_BESIDE_DECODES,
        **config: Any,
    ) -> None:
        self.now = 0.0
        self.config = EngineConfig(**{"session_len": 64, "max_batch_size": 4, **config})
        self.runner = FakeRunner(num_blocks, block_size, self.config.max_batch_size, budget)
        blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=self.config.enable_prefix_caching)
        self.scheduler = Scheduler(
            model_config(eos, rope), self.config, blocks, budget, lambda: self.now, lambda: 7, beside_decodes
        )
        self.deltas: list[OwnedDelta] = []
        self.plans: list[StepPlan] = []
        self.overlap = overlap
        self.in_flight: tuple[StepPlan, StepResult] | None = None

    def add(self, request_id: int, prompt: Sequence[int], max_new_tokens: int | None = 4, **fields: Any) -> None:
        request = {k: fields.pop(k) for k in ("priority", "deadline_ms") if k in fields}
        sampling = SamplingParams(max_new_tokens=max_new_tokens, **fields)
        self.scheduler.add("test", GenerateRequest(request_id, tuple(prompt), sampling, **request))

    def step(self) -> StepPlan:
        self.deltas += self.scheduler.expire()
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        launched = plan, self.runner.execute(plan)
        self._take_in()
        self.in_flight = launched
        if not self.overlap:
            self._take_in()
        return plan

    def _take_in(self) -> None:
        if self.in_flight is not None:
            self.deltas += self.scheduler.update(*self.in_flight)
            self.in_flight = None

    def run(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work and self.in_flight is None:
                return
            self.step() if self.scheduler.has_work else self._take_in()
        raise AssertionError("the scheduler never came to an end")

    def tokens(self, request_id: int) -> list[int]:
        return [token for _, delta in self.deltas if delta.request_id == request_id for token in delta.token_ids]

    def reasons(self, request_id: int) -> list[str]:
        ends = [delta.finish_reason for _, delta in self.deltas if delta.request_id == request_id]
        return [reason.value for reason in ends if reason is not None]
