"""Tiny random-weight checkpoints of many transformers architectures.

Every entry of ``ARCHITECTURES`` builds, saves, loads, runs a forward pass and (where
``generates``) decodes greedily on a CPU in well under a second.  Nothing is downloaded.

All weights are moved off their initial values, biases and norm gains included, so that
a wrong, stale or missing weight shows in the logits.  These do not, with these inputs:
the mask token of xlnet and dinov2, xlnet's segment biases, fnet's pooler, an expert of
switch_transformers that no token picks, score corrections too small to change a choice,
minimax's slope_rate (decoding reads it), and the last vision layer of llava.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PretrainedConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Kind",
    "build",
    "inputs",
    "load",
    "names",
    "save_checkpoint",
]

Kind = Literal["causal", "seq2seq", "masked", "vision", "multimodal", "audio"]

VOCABULARY = 160
LARGE_VOCABULARY = 3000  # an embedding table larger than all the layers together
IMAGE = 16
PATCH = 4
FRAMES = 24
MELS = 8
IMAGE_TOKEN = 3
FIRST_TOKEN = 8  # inputs hold no id below this one: those are pad, bos, image, ...


@dataclass(frozen=True)
class Architecture:
    """One tiny model of the zoo."""

    name: str
    model_class: str
    config: Callable[[], PretrainedConfig]
    kind: Kind
    generates: bool
    # Saved tensors are not the model's own: transformers' WeightConverter merges or
    # splits them at load time (one file entry per expert -> one stacked parameter).
    converted: bool = False
    # Saved tensors carry other names than the model's (transformers' WeightRenaming).
    renamed: bool = False
    # The first forward writes to the weights.
    mutates: bool = False
    # transformers runs it in bfloat16 and float16, too.
    half: bool = True
    # Token ids are below this one.
    vocabulary: int = VOCABULARY


ARCHITECTURES: dict[str, Architecture] = {}


# With no end token, greedy decoding runs for as many tokens as it is asked for.
_NO_END: dict[str, Any] = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}


def _config(class_name: str, settings: Mapping[str, Any]) -> PretrainedConfig:
    ids: dict[str, Any] = _NO_END if "vocab_size" in settings else {}
    config: PretrainedConfig = getattr(transformers, class_name)(**{**ids, **settings})
    return config


def _add(
    name: str,
    model_class: str,
    config_class: str,
    *bases: Mapping[str, Any],
    kind: Kind = "causal",
    generates: bool | None = None,
    converted: bool = False,
    renamed: bool = False,
    mutates: bool = False,
    half: bool = True,
    **settings: Any,
) -> None:
    merged: dict[str, Any] = {}
    for base in bases:
        merged.update(base)
    merged.update(settings)
    if generates is None:
        generates = kind in ("causal", "seq2seq")
    ARCHITECTURES[name] = Architecture(
        name=name,
        model_class=model_class,
        config=functools.partial(_config, config_class, merged),
        kind=kind,
        generates=generates,
        converted=converted,
        renamed=renamed,
        mutates=mutates,
        half=half,
        vocabulary=int(merged.get("vocab_size", VOCABULARY)),
    )


# ---------------------------------------------------------------- decoders (dense)

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_HEAD12: dict[str, Any] = {**_GROUPED, "head_dim": 12}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_add("llama", "LlamaForCausalLM", "LlamaConfig", _GROUPED)
_add(
    "llama_biased",
    "LlamaForCausalLM",
    "LlamaConfig",
    _GROUPED,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    rope_parameters=_LLAMA3_ROPE,
)
_add(
    "qwen2",
    "Qwen2ForCausalLM",
    "Qwen2Config",
    _GROUPED,
    vocab_size=LARGE_VOCABULARY,
    tie_word_embeddings=True,
)
_add("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _GROUPED, head_dim=16)
_add("mistral", "MistralForCausalLM", "MistralConfig", _GROUPED, sliding_window=4)
_add("ministral", "MinistralForCausalLM", "MinistralConfig", _HEAD12, sliding_window=4)
_add("phi", "PhiForCausalLM", "PhiConfig", _GROUPED, qk_layernorm=True)
_add("phi3", "Phi3ForCausalLM", "Phi3Config", _GROUPED)
_add("gemma", "GemmaForCausalLM", "GemmaConfig", _HEAD12, vocab_size=LARGE_VOCABULARY)
_add(
    "gemma2",
    "Gemma2ForCausalLM",
    "Gemma2Config",
    _HEAD12,
    num_hidden_layers=4,
    sliding_window=4,
    query_pre_attn_scalar=12,
)
_add(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    _HEAD12,
    num_hidden_layers=4,
    sliding_window=4,
    query_pre_attn_scalar=12,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
_add(
    "gemma3n_text",
    "Gemma3nForCausalLM",
    "Gemma3nTextConfig",
    _HEAD12,
    num_hidden_layers=4,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=2,
    laurel_rank=8,
    activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
    intermediate_size=[96] * 4,
)
_add("olmo", "OlmoForCausalLM", "OlmoConfig", _GROUPED, clip_qkv=8.0)
_add("olmo2", "Olmo2ForCausalLM", "Olmo2Config", _GROUPED)
_add(
    "olmo3",
    "Olmo3ForCausalLM",
    "Olmo3Config",
    _GROUPED,
    sliding_window=4,
    num_hidden_layers=4,
)
_add(
    "granite",
    "GraniteForCausalLM",
    "GraniteConfig",
    _GROUPED,
    embedding_multiplier=3.0,
    logits_scaling=0.5,
    residual_multiplier=0.7,
    attention_multiplier=0.3,
)
_add("cohere", "CohereForCausalLM", "CohereConfig", _GROUPED, use_qk_norm=True)
_add(
    "cohere2",
    "Cohere2ForCausalLM",
    "Cohere2Config",
    _GROUPED,
    num_hidden_layers=4,
    sliding_window=4,
)
_add(
    "stablelm",
    "StableLmForCausalLM",
    "StableLmConfig",
    _GROUPED,
    use_qkv_bias=True,
    qk_layernorm=True,
    use_parallel_residual=True,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
)
_add("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED)
_add("nemotron", "NemotronForCausalLM", "NemotronConfig", _HEAD12)
_add("persimmon", "PersimmonForCausalLM", "PersimmonConfig", _DECODER)
_add("glm", "GlmForCausalLM", "GlmConfig", _HEAD12)
_add("glm4", "Glm4ForCausalLM", "Glm4Config", _HEAD12)
_add("helium", "HeliumForCausalLM", "HeliumConfig", _HEAD12)
_add(
    "smollm3",
    "SmolLM3ForCausalLM",
    "SmolLM3Config",
    _GROUPED,
    num_hidden_layers=4,
)
_add("ernie4_5", "Ernie4_5ForCausalLM", "Ernie4_5Config", _HEAD12, use_bias=True)
_add(
    "exaone4",
    "Exaone4ForCausalLM",
    "Exaone4Config",
    _GROUPED,
    num_hidden_layers=4,
    sliding_window=4,
)
_add("arcee", "ArceeForCausalLM", "ArceeConfig", _GROUPED)
_add(
    "apertus",
    "ApertusForCausalLM",
    "ApertusConfig",
    _GROUPED,
    rope_parameters=_LLAMA3_ROPE,
)
_add("seed_oss", "SeedOssForCausalLM", "SeedOssConfig", _HEAD12)
_add(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    "HunYuanDenseV1Config",
    _HEAD12,
)
_add("diffllama", "DiffLlamaForCausalLM", "DiffLlamaConfig", _GROUPED)
_add("nanochat", "NanoChatForCausalLM", "NanoChatConfig", _GROUPED)
_add(
    "modernbert_decoder",
    "ModernBertDecoderForCausalLM",
    "ModernBertDecoderConfig",
    _DECODER,
    num_hidden_layers=4,
    local_attention=8,
    cls_token_id=1,
    sep_token_id=2,
)
_add("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT)
_add("gptj", "GPTJForCausalLM", "GPTJConfig", _GPT, rotary_dim=8)
_add("codegen", "CodeGenForCausalLM", "CodeGenConfig", _GPT, n_ctx=64, rotary_dim=8)
_add("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT)
_add("openai_gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT)
_add("ctrl", "CTRLLMHeadModel", "CTRLConfig", _GPT, dff=96)
_add("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER, renamed=True)
_add(
    "gpt_neo",
    "GPTNeoForCausalLM",
    "GPTNeoConfig",
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    hidden_size=48,
    num_layers=4,
    num_heads=4,
    attention_types=[[["global", "local"], 2]],
    window_size=4,
)
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 48,
}
_add("opt", "OPTForCausalLM", "OPTConfig", _OPT)
_add(
    "opt_projected",  # the 350m layout: norms after, embeddings narrower than the rest
    "OPTForCausalLM",
    "OPTConfig",
    _OPT,
    vocab_size=LARGE_VOCABULARY,
    word_embed_proj_dim=16,
    do_layer_norm_before=False,
)
_add(
    "bloom",
    "BloomForCausalLM",
    "BloomConfig",
    vocab_size=VOCABULARY,
    hidden_size=48,
    n_layer=3,
    n_head=4,
)
_add(
    "mpt",
    "MptForCausalLM",
    "MptConfig",
    vocab_size=VOCABULARY,
    d_model=48,
    n_heads=4,
    n_layers=3,
    expansion_ratio=2,
    max_seq_len=64,
)
_FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_add("falcon", "FalconForCausalLM", "FalconConfig", _FALCON)
_add(
    "falcon_grouped",
    "FalconForCausalLM",
    "FalconConfig",
    _FALCON,
    new_decoder_architecture=True,
    num_kv_heads=2,
    tie_word_embeddings=False,
)
_add(
    "falcon_alibi",
    "FalconForCausalLM",
    "FalconConfig",
    _FALCON,
    alibi=True,
    bias=True,
    parallel_attn=False,
    multi_query=False,
)
_add("biogpt", "BioGptForCausalLM", "BioGptConfig", _DECODER)
_add(
    "xglm",
    "XGLMForCausalLM",
    "XGLMConfig",
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    d_model=48,
    ffn_dim=96,
    num_layers=3,
    attention_heads=4,
)
_add(
    "xlnet",
    "XLNetLMHeadModel",
    "XLNetConfig",
    vocab_size=VOCABULARY,
    d_model=48,
    n_layer=3,
    n_head=4,
    d_inner=96,
    half=False,
)

# ------------------------------------------------------------- mixtures of experts

_add(
    "mixtral",
    "MixtralForCausalLM",
    "MixtralConfig",
    _GROUPED,
    intermediate_size=32,
    num_local_experts=4,
    converted=True,
    renamed=True,
)
_add(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    _GROUPED,
    _EXPERTS,
    shared_expert_intermediate_size=32,
    mlp_only_layers=[1],
    converted=True,
)
_add(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    _HEAD12,
    _EXPERTS,
    converted=True,
)
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_add(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    "DeepseekV2Config",
    _DECODER,
    _MLA,
    head_dim=8,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=2,
    topk_group=1,
    topk_method="group_limited_greedy",
    converted=True,
)
_add(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Config",
    _DECODER,
    _MLA,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=2,
    topk_group=1,
    converted=True,
)
_add(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    "Glm4MoeConfig",
    _HEAD12,
    use_qk_norm=True,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    converted=True,
)
_add(
    "dots1",
    "Dots1ForCausalLM",
    "Dots1Config",
    _GROUPED,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    converted=True,
)
_add(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    "Ernie4_5_MoeConfig",
    _GROUPED,
    moe_intermediate_size=32,
    moe_k=2,
    moe_num_experts=4,
    moe_num_shared_experts=1,
    converted=True,
    renamed=True,
)
_add(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    "HunYuanMoEV1Config",
    _HEAD12,
    intermediate_size=32,
    num_experts=4,
    moe_topk=2,
    converted=True,
)
_add(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    "MiniMaxM2Config",
    _HEAD12,
    intermediate_size=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    converted=True,
    renamed=True,
)
_add(
    "olmoe",
    "OlmoeForCausalLM",
    "OlmoeConfig",
    _GROUPED,
    intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    converted=True,
)
_add(
    "phimoe",
    "PhimoeForCausalLM",
    "PhimoeConfig",
    _GROUPED,
    intermediate_size=32,
    num_local_experts=4,
    attention_bias=True,
    lm_head_bias=True,
    converted=True,
    renamed=True,
)
_add(
    "granitemoe",
    "GraniteMoeForCausalLM",
    "GraniteMoeConfig",
    _GROUPED,
    intermediate_size=32,
    num_local_experts=4,
    renamed=True,
)
_add(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    "GraniteMoeSharedConfig",
    _GROUPED,
    intermediate_size=32,
    num_local_experts=4,
    shared_intermediate_size=32,
    tie_word_embeddings=True,
    renamed=True,
)
_add(
    "gpt_oss",
    "GptOssForCausalLM",
    "GptOssConfig",
    _HEAD12,
    intermediate_size=48,
    num_hidden_layers=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=4,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
)
_add(
    "llama4_text",
    "Llama4ForCausalLM",
    "Llama4TextConfig",
    _HEAD12,
    intermediate_size=32,
    intermediate_size_mlp=96,
    num_hidden_layers=4,
    num_local_experts=4,
    interleave_moe_layer_step=2,
    attention_chunk_size=8,
)
_add(
    "dbrx",
    "DbrxForCausalLM",
    "DbrxConfig",
    vocab_size=VOCABULARY,
    d_model=48,
    n_heads=4,
    n_layers=3,
    max_seq_len=64,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ffn_config={
        "hidden_size": 48,
        "ffn_hidden_size": 32,
        "moe_num_experts": 4,
        "moe_top_k": 2,
    },
)
_add(
    "jetmoe",
    "JetMoeForCausalLM",
    "JetMoeConfig",
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_hidden_layers=3,
    num_key_value_heads=2,
    kv_channels=12,
    intermediate_size=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
)
_add(
    "longcat_flash",
    "LongcatFlashForCausalLM",
    "LongcatFlashConfig",
    _DECODER,
    _MLA,
    num_layers=2,
    ffn_hidden_size=96,
    expert_ffn_hidden_size=32,
    head_dim=8,
    moe_topk=2,
    n_routed_experts=4,
    zero_expert_num=2,
    converted=True,
)

# ------------------------------------------- state-space, recurrent, linear, hybrid

_STATE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "state_size": 8,
}
_add("mamba", "MambaForCausalLM", "MambaConfig", _STATE)
_add("falcon_mamba", "FalconMambaForCausalLM", "FalconMambaConfig", _STATE)
_add(
    "mamba2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    _STATE,
    num_heads=6,
    head_dim=16,
    n_groups=2,
    chunk_size=8,
)
_MAMBA_MIXER: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_add(
    "jamba",
    "JambaForCausalLM",
    "JambaConfig",
    _GROUPED,
    num_hidden_layers=4,
    attn_layer_period=3,
    attn_layer_offset=1,
    num_experts=4,
    mamba_d_state=8,
    converted=True,
)
_add(
    "bamba",
    "BambaForCausalLM",
    "BambaConfig",
    _GROUPED,
    _MAMBA_MIXER,
    attn_layer_indices=[1],
)
_add(
    "falcon_h1",
    "FalconH1ForCausalLM",
    "FalconH1Config",
    _GROUPED,
    _MAMBA_MIXER,
    mamba_d_ssm=96,
    mamba_rms_norm=True,
    key_multiplier=0.5,
    lm_head_multiplier=2.0,
)
_add(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeHybridConfig",
    _GROUPED,
    _MAMBA_MIXER,
    intermediate_size=32,
    num_local_experts=4,
    shared_intermediate_size=32,
    layer_types=["mamba", "attention", "mamba"],
    renamed=True,
)
_add(
    "nemotron_h",
    "NemotronHForCausalLM",
    "NemotronHConfig",
    _HEAD12,
    num_hidden_layers=4,
    layers_block_type=["mamba", "moe", "attention", "mlp"],
    ssm_state_size=8,
    mamba_num_heads=6,
    mamba_head_dim=16,
    n_groups=2,
    chunk_size=8,
    n_routed_experts=4,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
    converted=True,
    renamed=True,
)
_add(
    "zamba",  # one attention block, shared between its places among the mamba layers
    "ZambaForCausalLM",
    "ZambaConfig",
    _DECODER,
    num_hidden_layers=5,
    num_key_value_heads=4,
    attn_layer_period=2,
    attn_layer_offset=1,
    mamba_d_state=8,
    n_mamba_heads=2,
)
_add(
    "zamba2",
    "Zamba2ForCausalLM",
    "Zamba2Config",
    _DECODER,
    num_hidden_layers=5,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "hybrid"],
    mamba_d_state=8,
    n_mamba_heads=6,
    chunk_size=8,
    num_mem_blocks=2,
    adapter_rank=8,
    use_mem_rope=True,
)
_add(
    "recurrent_gemma",
    "RecurrentGemmaForCausalLM",
    "RecurrentGemmaConfig",
    _GROUPED,
    num_hidden_layers=4,
    lru_width=48,
    attention_window_size=8,
)
_add(
    "rwkv",
    "RwkvForCausalLM",
    "RwkvConfig",
    vocab_size=VOCABULARY,
    context_length=64,
    hidden_size=48,
    num_hidden_layers=4,
    intermediate_size=96,
    rescale_every=0,
)
_add(
    "rwkv_rescaled",  # halves the later blocks' weights in place on its first forward
    "RwkvForCausalLM",
    "RwkvConfig",
    vocab_size=VOCABULARY,
    context_length=64,
    hidden_size=48,
    num_hidden_layers=4,
    intermediate_size=96,
    rescale_every=2,
    mutates=True,
)
_LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
_add(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    "Qwen3NextConfig",
    _HEAD12,
    _EXPERTS,
    _LINEAR,
    head_dim=16,
    shared_expert_intermediate_size=32,
    converted=True,
)
_add(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    "Qwen3_5TextConfig",
    _HEAD12,
    _LINEAR,
    head_dim=16,
)
_add(
    "lfm2",
    "Lfm2ForCausalLM",
    "Lfm2Config",
    _GROUPED,
    block_auto_adjust_ff_dim=False,
    layer_types=["conv", "full_attention", "conv"],
)
_add(
    "lfm2_moe",
    "Lfm2MoeForCausalLM",
    "Lfm2MoeConfig",
    _GROUPED,
    _EXPERTS,
    num_hidden_layers=4,
    num_dense_layers=1,
    layer_types=["conv", "full_attention", "conv", "full_attention"],
    converted=True,
)
_add(
    "minimax",
    "MiniMaxForCausalLM",
    "MiniMaxConfig",
    _GROUPED,
    intermediate_size=32,
    num_hidden_layers=4,
    num_local_experts=4,
    block_size=8,
    layer_types=["linear_attention", "full_attention"] * 2,
    converted=True,
    renamed=True,
)
_add(
    "olmo_hybrid",
    "OlmoHybridForCausalLM",
    "OlmoHybridConfig",
    _GROUPED,
    num_key_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "linear_attention", "full_attention"],
    converted=True,
    renamed=True,
)
_add(
    "xlstm",
    "xLSTMForCausalLM",
    "xLSTMConfig",
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=3,
    num_blocks=3,
    num_heads=4,
    chunk_size=8,
    qk_dim_factor=1.0,  # its pure torch fallback needs as many values as keys
)

# ----------------------------------------------------------------- encoder-decoders

_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_SCALED: dict[str, Any] = {**_BART, "scale_embedding": True}
_S2S: Kind = "seq2seq"
_add("t5", "T5ForConditionalGeneration", "T5Config", _T5, kind=_S2S)
_add(
    "mt5",
    "MT5ForConditionalGeneration",
    "MT5Config",
    _T5,
    kind=_S2S,
    vocab_size=LARGE_VOCABULARY,
    tie_word_embeddings=False,
)
_add("umt5", "UMT5ForConditionalGeneration", "UMT5Config", _T5, kind=_S2S)
_add(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig",
    _T5,
    kind=_S2S,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    num_experts=4,
)
_add("bart", "BartForConditionalGeneration", "BartConfig", _BART, kind=_S2S)
_add("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", _SCALED, kind=_S2S)
_add("marian", "MarianMTModel", "MarianConfig", _SCALED, kind=_S2S)
_add("mbart", "MBartForConditionalGeneration", "MBartConfig", _SCALED, kind=_S2S)
_add("m2m_100", "M2M100ForConditionalGeneration", "M2M100Config", _SCALED, kind=_S2S)
_add(
    "blenderbot",
    "BlenderbotForConditionalGeneration",
    "BlenderbotConfig",
    _BART,
    kind=_S2S,
    encoder_no_repeat_ngram_size=0,
)
_add(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    _BART,
    kind="audio",
    generates=True,
    num_mel_bins=MELS,
    max_source_positions=FRAMES // 2,
    max_target_positions=64,
    begin_suppress_tokens=None,
)

# ------------------------------------------------------------------------- encoders

_ENCODER: dict[str, Any] = {**_DECODER, "type_vocab_size": 2}
_MASKED: Kind = "masked"
_add("bert", "BertForMaskedLM", "BertConfig", _ENCODER, kind=_MASKED)
_add("roberta", "RobertaForMaskedLM", "RobertaConfig", _ENCODER, kind=_MASKED)
_add("xlm_roberta", "XLMRobertaForMaskedLM", "XLMRobertaConfig", _ENCODER, kind=_MASKED)
_add(
    "distilbert",
    "DistilBertForMaskedLM",
    "DistilBertConfig",
    kind=_MASKED,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    dim=48,
    n_layers=3,
    n_heads=4,
    hidden_dim=96,
)
_add(
    "electra",
    "ElectraForMaskedLM",
    "ElectraConfig",
    _ENCODER,
    kind=_MASKED,
    embedding_size=32,
)
_add(
    "albert",  # one layer's weights, run four times
    "AlbertForMaskedLM",
    "AlbertConfig",
    _ENCODER,
    kind=_MASKED,
    embedding_size=32,
    num_hidden_layers=4,
)
_add(
    "albert_grouped",  # two groups of two layers, run three times each
    "AlbertForMaskedLM",
    "AlbertConfig",
    _ENCODER,
    kind=_MASKED,
    embedding_size=32,
    num_hidden_layers=6,
    num_hidden_groups=2,
    inner_group_num=2,
)
_DISENTANGLED: dict[str, Any] = {
    "relative_attention": True,
    "max_relative_positions": 16,
    "pos_att_type": ["p2c", "c2p"],
}
_add(
    "deberta",
    "DebertaForMaskedLM",
    "DebertaConfig",
    _ENCODER,
    _DISENTANGLED,
    kind=_MASKED,
    half=False,
)
_add(
    "deberta_v2",
    "DebertaV2ForMaskedLM",
    "DebertaV2Config",
    _ENCODER,
    _DISENTANGLED,
    kind=_MASKED,
    position_biased_input=False,
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    conv_kernel_size=3,
    conv_act="gelu",
)
_add("mpnet", "MPNetForMaskedLM", "MPNetConfig", _DECODER, kind=_MASKED)
_add(
    "mobilebert",
    "MobileBertForMaskedLM",
    "MobileBertConfig",
    _ENCODER,
    kind=_MASKED,
    embedding_size=24,
    intra_bottleneck_size=24,
    num_feedforward_networks=2,
)
_add(
    "modernbert",
    "ModernBertForMaskedLM",
    "ModernBertConfig",
    _DECODER,
    kind=_MASKED,
    num_hidden_layers=4,
    local_attention=8,
    cls_token_id=1,
    sep_token_id=2,
)
_add("fnet", "FNetForMaskedLM", "FNetConfig", _ENCODER, kind=_MASKED, half=False)
_add(
    "funnel",
    "FunnelForMaskedLM",
    "FunnelConfig",
    kind=_MASKED,
    vocab_size=VOCABULARY,
    block_sizes=[2, 2],
    num_decoder_layers=1,
    d_model=48,
    n_head=4,
    d_head=12,
    d_inner=96,
)
_add(
    "convbert",
    "ConvBertForMaskedLM",
    "ConvBertConfig",
    _ENCODER,
    kind=_MASKED,
    embedding_size=32,
    conv_kernel_size=3,
)

# ---------------------------------------------------------- vision and several kinds

_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_LABELS: dict[str, Any] = {"num_labels": 10}
_add(
    "vit",
    "ViTForImageClassification",
    "ViTConfig",
    _VISION,
    _LABELS,
    kind="vision",
    renamed=True,
)
_add(
    "dinov2",
    "Dinov2ForImageClassification",
    "Dinov2Config",
    _VISION,
    _LABELS,
    kind="vision",
    use_swiglu_ffn=True,
    converted=True,
    renamed=True,
)
_add(
    "convnext",
    "ConvNextForImageClassification",
    "ConvNextConfig",
    _LABELS,
    kind="vision",
    image_size=IMAGE,
    patch_size=2,
    num_stages=3,
    hidden_sizes=[16, 24, 32],
    depths=[1, 2, 1],
)
_add(
    "resnet",  # batch norms: running statistics are float buffers of the checkpoint
    "ResNetForImageClassification",
    "ResNetConfig",
    _LABELS,
    kind="vision",
    embedding_size=16,
    hidden_sizes=[16, 32],
    depths=[2, 2],
)
_CLIP_TEXT: dict[str, Any] = {
    **_DECODER,
    "bos_token_id": 1,
    "eos_token_id": VOCABULARY - 1,
}
_add(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    kind="multimodal",
    projection_dim=32,
    text_config=_CLIP_TEXT,
    vision_config=_VISION,
)
_add(
    "llava",
    "LlavaForConditionalGeneration",
    "LlavaConfig",
    kind="multimodal",
    generates=True,
    renamed=True,
    image_token_index=IMAGE_TOKEN,
    image_seq_length=(IMAGE // PATCH) ** 2,
    text_config={
        **_GROUPED,
        **_NO_END,
        "model_type": "llama",
    },
    vision_config={**_VISION, "model_type": "clip_vision_model"},
    vision_feature_layer=-2,
)


# ---------------------------------------------------------------------------- making


def names(kind: Kind | None = None, *, generates: bool | None = None) -> list[str]:
    """The zoo's names, of one kind and of one answer to ``generates`` where given."""
    return [
        case.name
        for case in ARCHITECTURES.values()
        if kind in (None, case.kind) and generates in (None, case.generates)
    ]


def _persistent(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each saved parameter and buffer once, however often it is tied."""
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, parameter in model.named_parameters():
        if name not in unsaved:
            yield name, parameter
    kept = set(model.state_dict(keep_vars=True)) - unsaved
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer


def build(name: str, *, seed: int = 0, noise: float = 0.15) -> Any:
    """The architecture's model, in float32 and eval mode, every weight perturbed."""
    case = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, case.model_class)(case.config())
        with torch.no_grad():
            for key, tensor in _persistent(model):
                if not tensor.is_floating_point():
                    continue
                vector = tensor.dim() < 2 or key.endswith("bias")
                scale = noise / 4 if vector else noise
                shift = scale * torch.randn(tensor.shape, dtype=torch.float32)
                if key.endswith("running_var"):
                    shift = shift.abs()
                tensor.add_(shift.to(tensor.dtype))
            if name == "funnel":  # from_pretrained zeroes it, whatever the file holds
                model.get_input_embeddings().weight[0].zero_()
    generation = getattr(model, "generation_config", None)
    if case.generates and generation is not None:
        generation.eos_token_id = None
        generation.forced_eos_token_id = None
        generation.pad_token_id = 0
        generation.bos_token_id = 1
    return model.eval()


def save_checkpoint(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: int | str = "100KB",
) -> None:
    """Write the architecture's random weights to ``folder``, in several shards."""
    model = build(name, seed=seed).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def load(name: str, folder: Path, **options: Any) -> Any:
    """``from_pretrained`` of the architecture's class, in eval mode."""
    cls = getattr(transformers, ARCHITECTURES[name].model_class)
    return cls.from_pretrained(folder, **options).eval()


def inputs(
    name: str,
    *,
    rows: int = 2,
    tokens: int = 9,
    seed: int = 0,
    ragged: bool = False,
) -> dict[str, torch.Tensor]:
    """Keyword inputs of the model's forward.

    ``ragged`` pads every row but the last, each by another amount: on the left for
    the decoders, on the right for the others.  Only where the input is text alone.
    """
    case = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(
            FIRST_TOKEN, case.vocabulary, (rows, length), generator=generator
        )

    def pixels() -> torch.Tensor:
        return torch.randn((rows, 3, IMAGE, IMAGE), generator=generator)

    if case.kind == "vision":
        return {"pixel_values": pixels()}
    if case.kind == "audio":
        features = torch.randn((rows, MELS, FRAMES), generator=generator)
        return {"input_features": features, "decoder_input_ids": ids(tokens)}
    input_ids = ids(tokens)
    mask = torch.ones_like(input_ids)
    if ragged and case.kind in ("causal", "seq2seq", "masked"):
        for row in range(rows - 1):
            pad = min(1 + row, tokens - 1)
            columns = slice(0, pad) if case.kind == "causal" else slice(-pad, None)
            mask[row, columns] = 0
            input_ids[row, columns] = 0
    found = {"input_ids": input_ids, "attention_mask": mask}
    if case.kind == "seq2seq":
        found["decoder_input_ids"] = ids(max(1, tokens // 2))
    if name == "clip":
        input_ids[:, -1] = VOCABULARY - 1  # its eos: where the text is pooled
        found["pixel_values"] = pixels()
    if name == "llava":
        patches = (IMAGE // PATCH) ** 2
        image = torch.full((rows, patches), IMAGE_TOKEN)
        found["input_ids"] = torch.cat([image, input_ids], dim=1)
        found["attention_mask"] = torch.cat([torch.ones_like(image), mask], dim=1)
        found["pixel_values"] = pixels()
    return found
