"""Quality of answers by depth, for `ouro-vllm bench --exit`.

`evaluation.data` has text and arithmetic a checkpoint has not seen, `evaluation.forward` runs it, `policies` are ways
of choosing a depth, `measure` measures them and `curve` shows what came out.
"""
