"""Llama: Llama 2 and 3, Mistral 7B, SmolLM2, TinyLlama and other files whose architecture is `llama`.

Roles are the tensors' GGUF names without `blk.N.` and `.weight`; a bias ends in `_bias`.
"""

from eldric.engine.families.base import Family, Place, TensorRole

_ROLES = (
    TensorRole("token_embd", "token_embd.weight", ("hidden", "vocab"), Place.HEAD),
    TensorRole("rope_freqs", "rope_freqs.weight", ("half_rope",), Place.EVERY, group="freq_factors"),
    TensorRole("attn_norm", "blk.{layer}.attn_norm.weight", ("hidden",), Place.BLOCK),
    TensorRole("attn_q", "blk.{layer}.attn_q.weight", ("hidden", "q"), Place.BLOCK),
    TensorRole("attn_k", "blk.{layer}.attn_k.weight", ("hidden", "kv"), Place.BLOCK),
    TensorRole("attn_v", "blk.{layer}.attn_v.weight", ("hidden", "kv"), Place.BLOCK),
    TensorRole("attn_q_bias", "blk.{layer}.attn_q.bias", ("q",), Place.BLOCK, group="qkv_bias"),
    TensorRole("attn_k_bias", "blk.{layer}.attn_k.bias", ("kv",), Place.BLOCK, group="qkv_bias"),
    TensorRole("attn_v_bias", "blk.{layer}.attn_v.bias", ("kv",), Place.BLOCK, group="qkv_bias"),
    TensorRole("attn_output", "blk.{layer}.attn_output.weight", ("q", "hidden"), Place.BLOCK),
    TensorRole("attn_output_bias", "blk.{layer}.attn_output.bias", ("hidden",), Place.BLOCK, group="attn_output_bias"),
    TensorRole("ffn_norm", "blk.{layer}.ffn_norm.weight", ("hidden",), Place.BLOCK),
    TensorRole("ffn_gate", "blk.{layer}.ffn_gate.weight", ("hidden", "ffn"), Place.BLOCK),
    TensorRole("ffn_up", "blk.{layer}.ffn_up.weight", ("hidden", "ffn"), Place.BLOCK),
    TensorRole("ffn_down", "blk.{layer}.ffn_down.weight", ("ffn", "hidden"), Place.BLOCK),
    TensorRole("ffn_gate_bias", "blk.{layer}.ffn_gate.bias", ("ffn",), Place.BLOCK, group="ffn_bias"),
    TensorRole("ffn_up_bias", "blk.{layer}.ffn_up.bias", ("ffn",), Place.BLOCK, group="ffn_bias"),
    TensorRole("ffn_down_bias", "blk.{layer}.ffn_down.bias", ("hidden",), Place.BLOCK, group="ffn_bias"),
    TensorRole("output_norm", "output_norm.weight", ("hidden",), Place.TAIL),
    TensorRole("output", "output.weight", ("hidden", "vocab"), Place.TAIL, group="output"),
)

LLAMA = Family("llama", rope="norm", activation="silu", tensors={role.role: role for role in _ROLES})
