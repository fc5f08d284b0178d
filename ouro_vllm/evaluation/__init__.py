"""Quality of answers by depth, for `ouro-vllm bench --exit`.

`data` has text and arithmetic a checkpoint has not seen, `forward` runs it over whole batches, `policies` are ways of
choosing a depth, `exits` measures them and `curve` shows what came out.
"""
