"""The wavefront: one pass carries rows at different depths, early loops draft and the last one decides.

`flight` and `waves` hold the scheduling logic and import neither torch nor vLLM; `pacing` chooses how eager to be from
measured figures; `tensors` runs the passes.
"""
