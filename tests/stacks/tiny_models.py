"""Small random models of the families that moe_dist's checkpoints know, made offline from transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "num_experts_per_tok": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "head_dim": 8, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SOME_LAYERS: dict[str, Any] = {"first_k_dense_replace": 1, "n_routed_experts": 6, "n_shared_experts": 1}
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# By model type: the config's class, the model's class, and what of its config is not COMMON.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {
        **MLA, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.0}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {
        **MLA, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM", {
        **MLA, "n_group": 2, "topk_group": 1, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16}),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**SOME_LAYERS, "routed_scaling_factor": 1.5}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {**MLA, "n_group": 1, "topk_group": 1}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {
        "num_experts": 6, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 6, "decoder_sparse_step": 1}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {
        "num_experts": 6, "shared_expert_intermediate_size": 32, **LINEAR}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {
        "num_experts": 6, "shared_expert_intermediate_size": 32, **LINEAR}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", "Qwen3VLMoeTextModel", {
        "num_experts": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 6}),
    "minimax_m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {"num_local_experts": 6}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 6}),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 6, "sliding_window": 8}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", {
        "moe_num_experts": 6, "moe_k": 3, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", {
        **SOME_LAYERS, "layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 32,
        "n_group": 1, "topk_group": 1}),
}  # fmt: skip
COPIED = {"gpt_oss"}  # replace_experts lays their weights out anew; nothing takes them as they lie
BIASES = ("e_score_correction_bias", "expert_bias", "router.bias")


def tiny(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """The model, with `experts_implementation` eager; the same on every rank."""
    import transformers

    config_class, model_class, own = FAMILIES[model_type]
    config = getattr(transformers, config_class)(**{**COMMON, **own, **changes})
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # large enough for experts to matter
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            elif name.endswith(BIASES):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
        for name, buffer in model.named_buffers():
            if name.endswith(BIASES):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) / 10)
    return model


def prompts(rows: int, length: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        found = model(ids, use_cache=False)
    logits: torch.Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return logits


def experts_of(model: Any) -> dict[str, Any]:
    """Its experts modules by name, as long as they are transformers' own."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}
