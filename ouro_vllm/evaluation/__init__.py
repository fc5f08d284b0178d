"""`ouro-vllm eval`: what sharing the KV cache across loops costs in quality, on text and sums the model has not seen.

No engine: `forward` is a plain batched PyTorch forward in float32 whose rows read own-loop or shared KV as `policies`
says, which is what the server does too. `data` has the text and the sums, `measure` measures, `report` makes tables.
"""
