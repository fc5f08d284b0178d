"""Ouro for vLLM: one pass of the shared stack is the unit; plain decoding makes it R times.

Structure after arXiv 2510.25741, section 2, and the published checkpoints: sandwich norms around attention and MLP, a
final norm that ends *every* loop, whose output is the next loop's input, and an exit gate on that same output.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    extract_layer_index,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from ouro_vllm.attention import own_backend
from ouro_vllm.config import OuroConfig
from ouro_vllm.kv import LoopAttention, SharedAttention, WavefrontAttention
from ouro_vllm.options import OuroOptions
from ouro_vllm.passes import LoopCaches, layer_name
from ouro_vllm.sharing import AVERAGE
from ouro_vllm.sizes import rounded
from ouro_vllm.weights import checked, expected_shapes


class OuroAttention(nn.Module):
    """Attention of one physical layer. Its weights are one; its KV caches are one per loop."""

    def __init__(self, vllm_config: VllmConfig, stack: str, layer: int, loops: int) -> None:
        super().__init__()
        config: OuroConfig = vllm_config.model_config.hf_config
        quant, ranks = vllm_config.quant_config, get_tensor_model_parallel_world_size()
        prefix = f"{stack}.layers.{layer}.self_attn"
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        heads, kv_heads = config.num_attention_heads // ranks, max(1, config.num_key_value_heads // ranks)
        self.sizes = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
        # Loops have block tables of their own under sharing; otherwise all are in one KV group.
        options = OuroOptions.of(vllm_config)
        kinds: list[type[Attention]] = [Attention] * loops
        if vllm_config.speculative_config is not None:
            kinds = [WavefrontAttention] * loops
        if options.shares:
            own = loops if options.kv_sharing == AVERAGE else loops - 1
            kinds = [LoopAttention] * own + [SharedAttention]
        backend = own_backend(vllm_config, shares=options.shares)
        self.loops = nn.ModuleList()
        for loop, kind in enumerate(kinds, start=1):
            attention = kind(
                heads,
                config.head_dim,
                config.head_dim**-0.5,
                num_kv_heads=kv_heads,
                cache_config=vllm_config.cache_config,
                quant_config=quant,
                prefix=layer_name(stack, layer, loop, config.num_hidden_layers),
                attn_backend=backend,
            )
            if isinstance(attention, LoopAttention):
                attention.loop, attention.window = loop, options.kv_window
            self.loops.append(attention)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [N], hidden states [N, D] -> [N, D]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        # Always loop 1's layer: its name is in the graph, LoopCaches decides whose cache stands behind it.
        output, _ = self.o_proj(self.loops[0](q, k, v))
        return output


class OuroLayer(nn.Module):
    """x + norm(attention(norm(x))), then the same around the MLP."""

    def __init__(self, vllm_config: VllmConfig, stack: str, layer: int, loops: int) -> None:
        super().__init__()
        config: OuroConfig = vllm_config.model_config.hf_config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = OuroAttention(vllm_config, stack, layer, loops)
        self.mlp = LlamaMLP(
            hidden_size=size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=f"{stack}.layers.{layer}.mlp",
        )
        self.input_layernorm = RMSNorm(size, eps=eps)
        self.input_layernorm_2 = RMSNorm(size, eps=eps)
        self.post_attention_layernorm = RMSNorm(size, eps=eps)
        self.post_attention_layernorm_2 = RMSNorm(size, eps=eps)

    def forward(
        self, positions: torch.Tensor, update: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's input is residual + update, kept apart so that each sum is fused with the norm behind it.

        positions [N]; update and residual [N, D], residual None in the first layer. -> (update, residual).
        """
        if residual is None:
            hidden_states, residual = self.input_layernorm(update), update
        else:
            hidden_states, residual = self.input_layernorm(update, residual)
        update = self.input_layernorm_2(self.self_attn(positions, hidden_states))
        hidden_states, residual = self.post_attention_layernorm(update, residual)
        return self.post_attention_layernorm_2(self.mlp(hidden_states)), residual


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class OuroModel(nn.Module):
    """The published `model.` tree. Calling it is one pass: the L layers and the norm that ends a loop.

    Compiled once: which loop it is does not show in the graph. Embedding and gate are used around it.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, loops: int) -> None:
        super().__init__()
        config: OuroConfig = vllm_config.model_config.hf_config
        stack = prefix
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        # vLLM's own way of making layers, which is where its weight offloading gets hold of them.
        _, _, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: OuroLayer(vllm_config, stack, extract_layer_index(prefix), loops),
            prefix=f"{stack}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.early_exit_gate = ReplicatedLinear(
            config.hidden_size, 1, bias=True, quant_config=None, prefix=f"{prefix}.early_exit_gate"
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [N], hidden states [N, D] -> normalised hidden states [N, D]."""
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class OuroForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):
    """Ouro with vLLM's parallel layers.

    Shapes: N rows of a step (prompt chunks and decoding together), D = hidden_size, V = vocab_size.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: OuroConfig = vllm_config.model_config.hf_config
        self.config = config
        self.options = OuroOptions.of(vllm_config)
        loops, tree = self.options.max_loops, maybe_prefix(prefix, "model")
        self.model = OuroModel(vllm_config=vllm_config, prefix=tree, loops=loops)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.caches = LoopCaches(tree, config.num_hidden_layers, loops)
        # Attention layers of each loop and, where it is nobody's own, of what the loops share.
        groups = loops + (self.options.kv_sharing == AVERAGE)
        self.layer_names = [
            [layer_name(tree, layer, group, config.num_hidden_layers) for layer in range(config.num_hidden_layers)]
            for group in range(1, groups + 1)
        ]
        self.loaded = False

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [N] -> embeddings [N, D]: the input of loop 1."""
        return self.model.embed_tokens(input_ids)

    def one_pass(self, positions: torch.Tensor, hidden_states: torch.Tensor, loop: int) -> torch.Tensor:
        """Run the shared stack once: positions [N], hidden states [N, D] -> normalised hidden states [N, D].

        Every row stands at the same loop (1-based): it reads and writes that loop's KV. Call it inside vLLM's forward
        context. What it returns is the next loop's input, and what `compute_logits` and `exit_logits` read; with CUDA
        graphs it lives in memory that the next pass overwrites, so clone what is to be kept.
        """
        with self.caches.at(loop):
            return self.model(positions, hidden_states)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Plain decoding: all loops, one after the other. -> hidden states [N, D] after the last."""
        hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for loop in range(1, self.options.max_loops + 1):
            hidden_states = self.one_pass(positions, hidden_states, loop)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Readout: hidden states [N, D] after any loop -> logits [N, V] (None on ranks that do not sample)."""
        rows = hidden_states.shape[0]
        padding = rounded(rows, hidden_states.device.type) - rows
        if padding:
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, padding))
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else logits[:rows]

    def exit_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, D] after any loop -> logits [N] of lambda, the gate's chance of exiting at that loop.

        Of all ranks the first one's: they decide which rows run on, and sums over ranks may differ in the last bit.
        """
        logits, _ = self.model.early_exit_gate(hidden_states)
        return get_tp_group().broadcast(logits.squeeze(-1).contiguous())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill every parameter from a published checkpoint.

        Checkpoints that are quantised themselves have other tensors, which vLLM's loader checks as it does for any
        model. Later calls may bring a part of the weights (vLLM's weight transfer does).

        Raises:
            CheckpointError: a tensor is missing, surplus or of a wrong shape.
        """
        if getattr(self.config, "quantization_config", None) is None:
            weights = checked(weights, expected_shapes(self.config), complete=not self.loaded)
        names = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        self.loaded = True
        return names
