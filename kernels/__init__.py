"""Triton kernels for looped models, installed as `ouro_vllm.kernels`: a folder per kernel, its reference beside it."""
