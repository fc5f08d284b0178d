"""Names and versions that several modules share. Imports nothing."""

PLUGIN = "ouro"  # entry point, key of --additional-config
EXITS = f"{PLUGIN}_exits"  # attribute of ModelRunnerOutput: request id -> the loops its new tokens were read after
MODEL_TYPE = "ouro"  # of config.json
ARCHITECTURE = "OuroForCausalLM"
TOKENIZER_MODE = "ouro"
OLDEST_VLLM = (0, 32)
SPECULATOR = "ouro_vllm.SelfSpeculator"
SPECULATIVE_CONFIG = f'{{"method": "custom_class", "model": "{SPECULATOR}", "num_speculative_tokens": 8}}'
