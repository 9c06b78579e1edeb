"""A scheduler over a tiny pool, and a runner whose next token is a hash of the whole sequence (so a lost token shows)."""

import zlib
from array import array
from collections.abc import Sequence
from typing import Any

from turbotriton.backend.scheduling.block_manager import BlockManager
from turbotriton.backend.scheduling.plan import StepPlan, StepResult
from turbotriton.backend.scheduling.scheduler import OwnedDelta, Scheduler
from turbotriton.contract.ini import EngineConfig, ModelConfig, RopeConfig
from turbotriton.contract.wire import GenerateRequest, SamplingParams

VOCAB_SIZE = 1000


def model_config(eos_token_ids: tuple[int, ...] = (VOCAB_SIZE - 1,)) -> ModelConfig:
    return ModelConfig(
        model_name="fake", num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, head_dim=8, inter_size=8,
        vocab_size=VOCAB_SIZE, norm_eps=1e-5, attn_bias=False, weight_type="fp32", group_size=0, tp=1,
        rope=RopeConfig(dim=8, theta=10000.0), bos_token_id=1, eos_token_ids=eos_token_ids, tie_word_embeddings=False,
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
    """Follows plans as plan.py orders them and asserts that each is possible for a real device."""

    device = "cpu"
    compute_dtype = "fp32"

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.slots: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for slot in plan.left:
            del self.slots[slot], self.tables[slot]
        for joined in plan.joined:
            assert joined.slot not in self.slots, f"slot {joined.slot} is taken"
            self.slots[joined.slot], self.tables[joined.slot] = list(joined.token_ids), list(joined.block_ids)
        for added in plan.new_blocks:
            self.tables[added.slot] += added.block_ids
        drawn = []
        for row in plan.rows:
            known, end = self.slots[row.slot], row.start + row.num_tokens
            assert end <= len(known)
            assert end <= len(self.tables[row.slot]) * self.block_size, "a row writes outside its blocks"
            if row.samples:
                assert end == len(known)
                known.append(next_token(known))
                drawn.append(known[-1])
        return StepResult(tuple(drawn))

    def close(self) -> None:
        pass


class Bench:
    def __init__(
        self, num_blocks: int = 8, block_size: int = 4, budget: int = 16, eos: tuple[int, ...] = (VOCAB_SIZE - 1,), **config: Any
    ):
        self.now = 0.0
        self.runner = FakeRunner(num_blocks, block_size)
        self.config = EngineConfig(**{"session_len": 64, "max_batch_size": 4, **config})
        blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=self.config.enable_prefix_caching)
        self.scheduler = Scheduler(model_config(eos), self.config, blocks, budget, lambda: self.now, lambda: 7)
        self.deltas: list[OwnedDelta] = []
        self.plans: list[StepPlan] = []

    def add(self, request_id: int, prompt: Sequence[int], max_new_tokens: int | None = 4, **fields: Any) -> None:
        request = {k: fields.pop(k) for k in ("priority", "deadline_ms") if k in fields}
        sampling = SamplingParams(max_new_tokens=max_new_tokens, **fields)
        self.scheduler.add("test", GenerateRequest(request_id, tuple(prompt), sampling, **request))

    def step(self) -> StepPlan:
        self.deltas += self.scheduler.expire()
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        self.deltas += self.scheduler.update(plan, self.runner.execute(plan))
        return plan

    def run(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler never came to an end")

    def tokens(self, request_id: int) -> list[int]:
        return [token for _, delta in self.deltas if delta.request_id == request_id for token in delta.token_ids]

    def reasons(self, request_id: int) -> list[str]:
        ends = [delta.finish_reason for _, delta in self.deltas if delta.request_id == request_id]
        return [reason.value for reason in ends if reason is not None]
