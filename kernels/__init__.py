"""Triton kernels for looped models, installed as `ouro_vllm.kernels`: one folder per kernel, its reference beside it."""
