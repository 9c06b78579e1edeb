"""The CUDA column on a CPU, in triton's interpreter: its op cases, and a whole model run, against the reference.

In a process of its own: triton decides at import whether it interprets, and other tests compile.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

OP_CASES = """
import torch
from tests.backend.ops.test_table import CASES, Setting
from turbotriton.backend.ops.table import reference_ops
from turbotriton.backend.ops.deterministic_column import DETERMINISTIC
from turbotriton.backend.ops.triton_column import TRITON

for name in sorted(set(CASES) - set(reference_ops(TRITON))):
    for column in (TRITON, DETERMINISTIC):
        CASES[name](Setting(column, torch.device("cpu"), torch.float32, torch.Generator().manual_seed(11)))
    print(name)
"""

WHOLE_MODEL = """
import tempfile
from pathlib import Path
from unittest import mock

from tests.backend.plans import generate, greedy
from tests.backend.runner.test_weights import HF
from tests.backend.workspace import hf_workspace_config, write_workspace
from tests.checkpoints import make_tensors
from turbotriton.backend.ops.table import REFERENCE
from turbotriton.backend.ops.deterministic_column import DETERMINISTIC
from turbotriton.backend.ops.triton_column import TRITON
from turbotriton.backend.runner import model_runner

config = hf_workspace_config(HF, attn_bias=1, session_len=32, sliding_window=9)
options = {"cache_block_seq_len": "8", "cache_max_entry_count": "16", "max_batch_size": "4", "device": "cpu"}
with tempfile.TemporaryDirectory() as folder:
    write_workspace(Path(folder), config, make_tensors(HF.to_dict(), seed=5))
    outputs = []
    for column in (REFERENCE, TRITON, DETERMINISTIC):
        with mock.patch.object(model_runner, "ops_for", lambda device, deterministic: column):
            runner = model_runner.ModelRunner(config.model_config(), config.engine_config(options.get), Path(folder))
        prompts = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32, 33, 34]]
        outputs.append(generate(runner, config.model_config(), prompts, greedy(8), num_new=8, chunk=4, num_slots=4).token_ids)
assert outputs[0] == outputs[1] == outputs[2], outputs
print(len({token for ids in outputs[0] for token in ids}), "distinct tokens")
"""


def interpret(code: str) -> str:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


OPS_WITH_KERNELS = {
    "advance_decode", "attention", "down_projection", "lm_head", "norm_gate_up_silu", "norm_qkv_rotary_store", "output_projection",
    "sample", "stage_decode",
}  # fmt: skip


def test_ops_with_kernels_agree_with_float64():
    found = interpret(OP_CASES).split()
    assert found == sorted(found)
    assert set(found) == OPS_WITH_KERNELS


def test_a_model_gives_the_same_tokens_in_both_columns():
    assert "distinct tokens" in interpret(WHOLE_MODEL)
