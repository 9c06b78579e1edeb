"""Units of the CUDA column over quantised operands on a CPU, in triton's interpreter, against the reference. In a process of its own."""

from tests.backend.ops.test_triton_column import interpret

UNITS = """
import torch
from tests.backend.ops.test_quantized import *
from turbotriton.backend.ops.triton_column import TRITON
from turbotriton.backend.ops.table import REFERENCE
from turbotriton.backend.ops.operands import *
torch.manual_seed(0)
H,NH,KV,D=32,4,2,16
def pages(bits, parts=1, offset=None):
    return QuantizedPages(torch.zeros(4,KV,4,D*bits//8,dtype=torch.uint8),torch.zeros(4,KV,4,2*parts),bits,offset)
offset=torch.randn(KV,D)
batch=AttentionBatch(cos=torch.ones(4,D//2),sin=torch.zeros(4,D//2),q_scale=None,slot_mapping=torch.tensor([5,8,9,-1]),
 block_tables=torch.tensor([[1,0],[2,0]],dtype=torch.int32),context_lens=torch.tensor([2,3],dtype=torch.int32),num_decodes=1,max_decode_context=2,
 cu_seqlens_q=torch.tensor([0,3],dtype=torch.int32),prefills=((3,3),))
w4=W4A16Weight(torch.randint(0,256,(H//2,(NH+2*KV)*D),dtype=torch.uint8),torch.rand(1,(NH+2*KV)*D).half()*.02,torch.full((1,(NH+2*KV)*D),8,dtype=torch.uint8))
w8=W8A8Weight(torch.randint(-127,128,(NH*D,H),dtype=torch.int8),torch.rand(H)*.01)
x=torch.randn(4,H)
for bits in (4,8):
    outs=[]
    for ops in (REFERENCE,TRITON):
        k,v=pages(4,2,offset) if bits==4 else pages(8),pages(bits)
        q,r=ops.norm_qkv_rotary_store(x,None,QkvWeights(NormWeight(torch.ones(H),1e-5),w4),batch,k,v)
        a=ops.attention(q,k,v,batch,0.25,0)
        outs.append((q,a,ops.output_projection(a,w8)))
    for a, b in zip(*outs):
        assert float((a - b).abs().max()) < 1e-5 * float(a.abs().max())
gate_up=W8A8Weight(torch.randint(-127,128,(H,96),dtype=torch.int8),torch.rand(96)*.01)
down=W8A8Weight(torch.randint(-127,128,(48,H),dtype=torch.int8),torch.rand(H)*.01)
outs=[]
for ops in (REFERENCE,TRITON):
    activated,r=ops.norm_gate_up_silu(x,x.flip(0),NormWeight(torch.linspace(.5,2,H),1e-5),gate_up)
    outs.append((ops.down_projection(activated,down),r))
assert isinstance(activated,QuantizedRows)
for a, b in zip(*outs):
    assert float((a - b).abs().max()) < 1e-2 * float(a.abs().max())
print("the same")
"""


def test_units_over_quantised_operands_agree_in_both_columns() -> None:
    assert "the same" in interpret(UNITS)
