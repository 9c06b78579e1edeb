"""Makes smaller weights: calibration, AWQ, SmoothQuant, FP8 and KV scales. Read `docs/quantisation.md` first, then in this order:

model.py        a checkpoint as layers of seven matrices, whatever its architecture packs; and back to its own names
datasets.py     texts to calibrate on, cut into windows of tokens
calibration.py  the decoder run layer by layer, one resident, with statistics of what each linear layer sees
awq.py          which scales and clipping make 4 bit hurt least; smoothquant.py: the same for 8 bit activations
kv_scales.py    static scales of keys and values
export.py       a checkpoint folder, whole or not at all
commands.py     what each `turbotriton lite` command does, from these parts
report.py       a quantised model against the original
"""
