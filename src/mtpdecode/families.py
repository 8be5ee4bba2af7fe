"""The table of native MTP heads: one row a family. Adding a family is adding a row (`docs/families.md` says how)."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import UnsupportedModelError
from .spec import MTPSpec

DEEPSEEK_NAMES = (("enorm", "norm_embed"), ("hnorm", "norm_hidden"), ("eh_proj", "proj"), ("shared_head.norm", "norm_out"))
MIMO_NAMES = (
    ("token_layernorm", "norm_embed"),
    ("hidden_layernorm", "norm_hidden"),
    ("input_proj", "proj"),
    ("final_layernorm", "norm_out"),
)
MIMO_V2_NAMES = (*DEEPSEEK_NAMES[:3], ("final_layernorm", "norm_out"))
QWEN_NAMES = (
    ("pre_fc_norm_embedding", "norm_embed"),
    ("pre_fc_norm_hidden", "norm_hidden"),
    ("fc", "proj"),
    ("norm", "norm_out"),
    ("layers.{i}", "block"),
)
INKLING_NAMES = (
    ("layers.{i}.embed_norm", "norm_embed"),
    ("layers.{i}.hidden_norm", "norm_hidden"),
    ("layers.{i}.input_proj", "proj"),
    ("chain_norm", "norm_out"),
    ("layers.{i}.transformer_block", "block"),
)
INKLING_RENAMES = (
    ("attn_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("attn_sconv", "attn_sconv.conv1d"),
    ("mlp_sconv", "mlp_sconv.conv1d"),
    ("k_sconv", "k_sconv.conv1d"),
    ("v_sconv", "v_sconv.conv1d"),
    ("wq_du", "q_proj"),
    ("wk_dv", "k_proj"),
    ("wv_dv", "v_proj"),
    ("wr_du", "r_proj"),
    ("wo_ud", "o_proj"),
    ("attn", "self_attn"),
    ("w2_md", "down_proj"),
)
STEP_NAMES = (
    *DEEPSEEK_NAMES[:3],
    ("transformer.shared_head.norm", "norm_out"),
    ("transformer.shared_head.output", "lm_head"),
)
SHARED_COPIES = ("embed_tokens.weight", "shared_head.head.weight")

FAMILIES: tuple[MTPSpec, ...] = (
    MTPSpec(
        family="deepseek_v3",
        model_types=("deepseek_v3",),
        prefix="model.layers.{n}.",
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        examples=("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"),
        verified="greedy parity; head logits against transformers' MtpModel",
        source="DeepSeek-V3 report (2412.19437, section 2.2); vLLM and transformers agree on the normed hidden state",
    ),
    MTPSpec(
        family="glm4_moe",
        model_types=("glm4_moe",),
        prefix="model.layers.{n}.",
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        examples=("zai-org/GLM-4.5", "zai-org/GLM-4.5-Air", "zai-org/GLM-4.6"),
        verified="greedy parity; head logits against transformers' MtpModel",
        source="SGLang and transformers recycle the normed state, vLLM the raw one: spec.replace(recycle='raw')",
    ),
    MTPSpec(
        family="mimo",
        model_types=("mimo",),
        prefix="model.mtp_layers.{i}.",
        names=MIMO_NAMES,
        combine="hidden_embed",
        hidden="pre_norm",
        base_model_type="qwen2",
        examples=("XiaomiMiMo/MiMo-7B-Base", "XiaomiMiMo/MiMo-7B-RL"),
        verified="greedy parity; head logits against transformers' MtpModel with hidden states first",
        source="vLLM feeds the state before the final norm; SGLang and FastMTP after it: spec.replace(hidden='post_norm')",
    ),
    MTPSpec(
        family="glm4_moe_lite",
        model_types=("glm4_moe_lite",),
        prefix="model.layers.{n}.",
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        examples=("zai-org/GLM-4.7-Flash",),
        verified="greedy parity; head logits against transformers' MtpModel",
        source="as glm4_moe, around latent attention; vLLM recycles the raw state: spec.replace(recycle='raw')",
    ),
    MTPSpec(
        family="glm_ocr",
        model_types=("glm_ocr", "glm_ocr_text"),
        prefix="model.language_model.layers.{n}.",
        other_prefixes=("model.layers.{n}.",),
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        angles="three_axes",
        examples=("zai-org/GLM-OCR",),
        verified="greedy parity, with images too; head logits against a twin in plain torch",
        source="vLLM recycles the raw state, we the normed one as for all GLM heads: spec.replace(recycle='raw')",
    ),
    MTPSpec(
        family="ernie4_5_moe",
        model_types=("ernie4_5_moe",),
        prefix="model.mtp_",
        names=(
            ("emb_norm.{i}", "norm_embed"),
            ("hidden_norm.{i}", "norm_hidden"),
            ("linear_proj.{i}", "proj"),
            ("block.{i}", "block"),
        ),
        block_config=(("moe_layer_end_index", -1),),  # no layer is a mixture: the block is dense
        proj_bias="use_bias",
        norm_out="target",
        recycle="raw",
        examples=("baidu/ERNIE-4.5-21B-A3B-PT", "baidu/ERNIE-4.5-300B-A47B-PT"),
        verified="greedy parity; head logits against a twin in plain torch",
        source="the base's final norm and rotation, found best in a public comparison of eight readings; vLLM takes no norm "
        "(spec.replace(norm_out='none')) and both engines zero the first embedding: spec.replace(zero_first_embedding=True)",
    ),
    MTPSpec(
        family="hy_v3",
        model_types=("hy_v3",),
        prefix="model.layers.{n}.",
        names=(*DEEPSEEK_NAMES[:3], ("final_layernorm", "norm_out")),
        renames=(
            ("mlp.router.gate", "mlp.gate"),
            ("mlp.expert_bias", "mlp.e_score_correction_bias"),
            ("mlp.shared_mlp", "mlp.shared_experts"),
        ),
        ignored=SHARED_COPIES,
        examples=("tencent/Hy3-preview",),
        verified="greedy parity; head logits against transformers' MtpModel",
        source="vLLM and SGLang agree; both zero the first embedding: spec.replace(zero_first_embedding=True)",
    ),
    MTPSpec(
        family="inkling",
        model_types=("inkling_mm_model", "inkling_text"),
        prefix="model.mtp.",
        names=INKLING_NAMES,
        renames=INKLING_RENAMES,
        interleaved=(("w13_dn", ("gate_proj", "up_proj")),),
        optional=("mlp.global_scale",),
        num_layers_keys=("mtp_config.num_nextn_predict_layers", "num_mtp_layers"),
        depth_types=(("layer_types", "mtp_layer_types"),),
        block_config=(("mlp_layer_types", "dense"), ("log_scaling_n_floor", None)),
        combine="hidden_embed",
        norm_out_if="chain_hidden_post_norm",
        logits_divisor="logits_mup_width_multiplier",
        vocab_key="unpadded_vocab_size",
        beyond="cycle",
        examples=("thinkingmachines/Inkling",),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM: the embedding as the base norms it (transformers strips that norm, and lets the head's scores grow with "
        "the position as the base's do: spec.replace(block_config=(('mlp_layer_types', 'dense'),)))",
    ),
    MTPSpec(
        family="mellum",
        model_types=("mellum",),
        prefix="mtp.",
        names=QWEN_NAMES,
        block_layer_type="sliding_attention",
        block_config=(("mlp_layer_types", "sparse"),),
        depth_types=(("layer_types", "mtp_layer_types"), ("mlp_layer_types", "mtp_mlp_layer_types")),
        examples=("JetBrains/Mellum2-12B-A2.5B-Base",),
        verified="greedy parity; head logits against transformers' MtpModel",
        source="transformers, the only engine that has it",
    ),
    MTPSpec(
        family="step3p7",
        model_types=("step3p7", "step3p5"),
        prefix="model.layers.{n}.",
        names=STEP_NAMES,
        ignored=("embed_tokens.weight",),
        block_layer_type="sliding_attention",
        depth_types=(("layer_types", "mtp_layer_types"), ("mlp_layer_types", "mtp_mlp_layer_types")),
        block_config=(("mlp_layer_types", "dense"), ("swiglu_limits", None), ("swiglu_limits_shared", None)),
        hidden="pre_norm",
        recycle="raw",
        lm_head="own",
        beyond="cycle",
        base_model_type="step3p7",
        text_alone=(("width", 16), ("heads", 2), ("layers", 0), ("image_size", 28), ("patch_size", 14)),
        examples=("stepfun-ai/Step-3.5-Flash", "stepfun-ai/Step-3.7-Flash"),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM: state before the final norm, an output layer a depth, layer k mod D at step k, unlike transformers",
    ),
    MTPSpec(
        family="nemotron_h",
        model_types=("nemotron_h",),
        prefix="mtp.",
        other_prefixes=("language_model.mtp.",),
        names=(("layers.0.enorm", "norm_embed"), ("layers.0.hnorm", "norm_hidden"), ("layers.0.eh_proj", "proj")),
        experts=("up_proj", "down_proj"),
        sublayers="mtp_layers_block_type",
        counted_by="tensors",  # one layer, which configs count as often as it was repeated in training
        norm_out="none",  # the last sub-layer carries it
        examples=("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16"),
        verified="greedy parity; head logits against a twin in plain torch; states after ragged commits against transformers",
        source="vLLM; mtp_hybrid_override_pattern in config.json lists the sub-layers; the tensors' numbers run over its letters",
    ),
    MTPSpec(
        family="bailing_hybrid",
        model_types=("bailing_hybrid",),
        prefix="model.layers.{n}.",
        names=(*DEEPSEEK_NAMES[:3], ("final_layernorm", "norm_out")),
        renames=(
            ("attention.dense", "self_attn.o_proj"),
            ("attention", "self_attn"),
            ("mlp.gate.expert_bias", "mlp.gate.e_score_correction_bias"),
        ),
        ignored=SHARED_COPIES,
        block_layer_type="full_attention",
        strangers=("BailingMoeV2_5ForCausalLM",),
        examples=("inclusionAI/Ling-3.0-Flash",),
        verified="greedy parity; head logits against a twin in plain torch; states after ragged commits against transformers",
        source="vLLM's reading of version 3",
    ),
    MTPSpec(
        family="glm5_next",
        model_types=("glm5_next", "glm5_next_text"),
        prefix="model.language_model.layers.{n}.",
        other_prefixes=("model.layers.{n}.",),
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        block_layer_type="indexed_attention",
        block_config=(("indexer_types", "full"),),
        block="plain_layer",
        examples=("zai-org/GLM-5.3-Flash",),
        verified="greedy parity, with images; head logits against a plain-torch twin; states after commits against transformers",
        source="vLLM, whose indexer chooses at the first draft step where the config has index_share_for_mtp_iteration; ours at "
        "each. It zeroes the first embedding: spec.replace(zero_first_embedding=True)",
    ),
    MTPSpec(
        family="deepseek_v32",
        model_types=("deepseek_v32",),
        prefix="model.layers.{n}.",
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        index_choice="config",
        examples=("deepseek-ai/DeepSeek-V3.2", "deepseek-ai/DeepSeek-V3.2-Exp"),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM; DeepSeek-V3's head with an indexer in its block",
    ),
    MTPSpec(
        family="glm_moe_dsa",
        model_types=("glm_moe_dsa",),
        prefix="model.layers.{n}.",
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        block_config=(("indexer_types", "full"),),  # the MTP layer has an indexer even where the target's last layer borrows
        index_choice="config",
        examples=("zai-org/GLM-5", "zai-org/GLM-5.2"),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM; GLM-5.2's config has all draft steps read the first one's keys: spec.replace(index_choice='each_step')",
    ),
    MTPSpec(
        family="exaone_moe",
        model_types=("exaone_moe",),
        prefix="mtp.",
        names=QWEN_NAMES,
        counted_by="tensors",  # the config of K-EXAONE-2 counts how often its one layer is used
        block_layer_type="sliding_attention",
        depth_types=(("layer_types", "mtp_layer_types"),),
        depth_windows="mtp_sliding_windows",
        block_config=(("mlp_layer_types", "dense"),),
        block_attributes=(("self_attn.sliding_window", None),),  # rotary positions even where it sees everything
        examples=("LGAI-EXAONE/K-EXAONE-236B-A23B",),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM 0.33 turns queries and keys in every MTP block; SGLang not in one that sees everything: "
        "spec.replace(block_attributes=())",
    ),
    MTPSpec(
        family="exaone4_5",
        model_types=("exaone4_5",),
        prefix="mtp.",
        names=QWEN_NAMES,
        block_layer_type="sliding_attention",
        examples=("LGAI-EXAONE/EXAONE-4.5-33B",),
        verified="greedy parity, with images too; head logits against a twin in plain torch",
        source="vLLM; the count stands at the top of the config, the head at the top of the checkpoint",
    ),
    MTPSpec(
        family="mimo_v2_flash",
        model_types=("mimo_v2_flash",),
        prefix="model.mtp.layers.{i}.",
        names=MIMO_V2_NAMES,
        renames=(("pre_mlp_layernorm", "post_attention_layernorm"), ("self_attn.attention_sink_bias", "self_attn.sinks")),
        fused=(("qkv_proj", ("q_proj", "k_proj", "v_proj")),),
        block_layer_type="sliding_attention",
        block_config=(("mlp_layer_types", "dense"),),
        deeper="target",
        num_layers_keys=(),
        examples=("XiaomiMiMo/MiMo-V2-Flash",),
        verified="greedy parity; head logits against a twin in plain torch",
        source="SGLang, which Xiaomi deploys with, feeds the target's states to all three layers; vLLM repeats the first: "
        "spec.replace(used_layers=1)",
    ),
    MTPSpec(
        family="longcat_flash",
        model_types=("longcat_flash",),
        prefix="model.mtp.",
        names=(
            ("layers.{i}.enorm.m", "norm_embed"),
            ("layers.{i}.hnorm.m", "norm_hidden"),
            ("layers.{i}.eh_proj", "proj"),
            ("norm", "norm_out"),
            ("layers.{i}", "block"),
        ),
        renames=(("transformer_layer.mlp", "mlp"),),
        ignored=("embed_tokens.weight",),
        block="half_layer",
        block_config=(("num_layers", 1),),  # from which transformers 5.23 derives the number of attentions
        num_layers_keys=(),
        examples=("meituan-longcat/LongCat-Flash-Chat", "meituan-longcat/LongCat-Flash-Thinking"),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM and SGLang agree",
    ),
    MTPSpec(
        family="mimo_v2",
        model_types=("mimo_v2",),
        prefix="model.mtp.layers.{i}.",
        names=MIMO_V2_NAMES,
        renames=(("pre_mlp_layernorm", "post_attention_layernorm"),),
        fused=(("qkv_proj", ("q_proj", "k_proj", "v_proj")),),
        block_config=(("layer_types", "sliding_attention"), ("hybrid_layer_pattern", 1), ("moe_layer_freq", 0)),  # a plain MLP
        deeper="target",
        examples=("XiaomiMiMo/MiMo-V2.5", "XiaomiMiMo/MiMo-V2.5-Pro"),
        verified="greedy parity and head logits with a tiny model in remote code",
        source="as mimo_v2_flash; transformers has no such base: trust_remote_code=True",
    ),
    MTPSpec(
        family="step5",
        model_types=("step5", "step5_vl"),
        prefix="model.layers.{n}.",
        names=STEP_NAMES,
        ignored=("embed_tokens.weight",),
        hidden="pre_norm",
        recycle="raw",
        lm_head="own",
        beyond="cycle",
        examples=("stepfun-ai/Step-5-Preview-BF16",),
        verified="greedy parity and head logits with a tiny model in remote code",
        source="vLLM; as step3p7; transformers has no such base: trust_remote_code=True",
    ),
    MTPSpec(
        family="kimi_k3",
        model_types=("kimi_k3",),
        prefix="model.layers.{n}.",
        other_prefixes=("language_model.model.layers.{n}.",),
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        block_config=(("linear_attn_config", None), ("attn_res_block_size", None)),  # latent attention, no residual by blocks
        hidden="pre_norm",
        recycle="raw",
        examples=("moonshotai/Kimi-K3",),
        verified="greedy parity and head logits with a tiny model in remote code",
        source="vLLM; transformers has no such base: trust_remote_code=True. Layers that keep a recurrent state are refused",
    ),
    MTPSpec(
        family="pangu_ultra_moe",
        model_types=("pangu_ultra_moe",),
        prefix="model.layers.{n}.",
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        examples=("FreedomIntelligence/openPangu-Ultra-MoE-718B-V1.1",),
        verified="greedy parity and head logits with a tiny model in remote code",
        source="DeepSeek-V3's head; vLLM reads it so; transformers has no such base: trust_remote_code=True",
    ),
    MTPSpec(
        family="deepseek_v4",
        model_types=("deepseek_v4",),
        prefix="mtp.{i}.",
        other_prefixes=("model.mtp.{i}.",),
        names=(
            ("enorm", "norm_embed"),
            ("hnorm", "norm_hidden"),
            ("e_proj", "proj_embed"),
            ("h_proj", "proj_hidden"),
            ("hc_head_fn", "mixer.hc_fn"),
            ("hc_head_base", "mixer.hc_base"),
            ("hc_head_scale", "mixer.hc_scale"),
            ("norm", "norm_out"),
        ),
        renames=(
            ("attn.wq_a", "self_attn.q_a_proj"),
            ("attn.q_norm", "self_attn.q_a_norm"),
            ("attn.wq_b", "self_attn.q_b_proj"),
            ("attn.wkv", "self_attn.kv_proj"),
            ("attn.wo_a", "self_attn.o_a_proj"),
            ("attn.wo_b", "self_attn.o_b_proj"),
            ("attn.attn_sink", "self_attn.sinks"),
            ("attn", "self_attn"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
            ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
            ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
            ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
            ("ffn", "mlp"),
            *((f"hc_{site}_{name}", f"{site}_hc.{name}") for site in ("attn", "ffn") for name in ("fn", "base", "scale")),
        ),
        experts=("w1", "w3", "w2"),
        ignored=("emb.tok_emb.weight", "head.weight"),
        block_config=(("layer_types", "sliding_attention"), ("mlp_layer_types", "moe")),
        combine="sum",
        hidden="streams",
        recycle="raw",
        streams="hc_mult",
        stream_axis=True,
        angles="all_types",
        examples=("deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Pro"),
        verified="greedy parity; head logits against a twin in plain torch; windows after ragged commits against the model alone",
        source="vLLM; the last entry of compress_ratios, 0, is the head's: a sliding window, nothing compressed",
    ),
    MTPSpec(
        family="qwen3_next",
        model_types=("qwen3_next",),
        prefix="mtp.",
        names=QWEN_NAMES,
        num_layers_keys=(),
        block_layer_type="full_attention",
        examples=("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-Next-80B-A3B-Thinking"),
        verified="greedy parity; head logits against a twin in plain torch; states after ragged commits against transformers",
        source="vLLM and SGLang agree; published configs count nothing, and every checkpoint has one layer",
    ),
    MTPSpec(
        family="qwen3_5",
        model_types=("qwen3_5", "qwen3_5_text"),
        prefix="mtp.",
        other_prefixes=("model.mtp.", "language_model.mtp.", "model.language_model.mtp."),
        names=QWEN_NAMES,
        num_layers_keys=("mtp_num_hidden_layers",),
        block_layer_type="full_attention",
        angles="three_axes",
        examples=("Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-27B"),
        verified="greedy parity, with images; head logits against a twin in plain torch; committed states",
        source="vLLM and SGLang agree: the state behind the final norm, a gated full-attention block over a hybrid base",
    ),
    MTPSpec(
        family="qwen3_5_moe",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        prefix="mtp.",
        other_prefixes=("model.mtp.", "language_model.mtp.", "model.language_model.mtp."),
        names=QWEN_NAMES,
        num_layers_keys=("mtp_num_hidden_layers",),
        block_layer_type="full_attention",
        angles="three_axes",
        examples=("Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-122B-A10B", "Qwen/Qwen3.6-35B-A3B"),
        verified="greedy parity, with images; head logits against a twin in plain torch; committed states",
        source="as qwen3_5; experts are published stacked or one by one",
    ),
    MTPSpec(
        family="qwen4_exp",
        model_types=("qwen4_exp", "qwen4_exp_text"),
        prefix="mtp.",
        other_prefixes=("language_model.mtp.", "model.language_model.mtp.", "model.mtp."),
        names=(
            ("pre_fc_norm_embedding", "norm_embed"),
            ("pre_fc_norm_hidden", "norm_hidden"),
            ("fc_embedding", "proj_embed"),
            ("fc_hidden", "proj_hidden"),
            ("hyper_connection_mixer", "mixer"),
            ("layers.{i}", "block"),
        ),
        num_layers_keys=("mtp_num_hidden_layers",),
        ignored=("hyper_connection_mixer.block_inject_weight.weight", "shared_head.head.weight"),
        block_config=(("ple_layer_ids", 0),),  # layers count from 1 there: none has n-grams
        combine="sum",
        hidden="streams",
        recycle="raw",
        norm_out="none",
        streams="hc_count",
        stream_norm="joint",
        angles="all_slots",
        index_choice="config",
        examples=("Qwen/Qwen4-Exp",),
        verified="greedy parity; head logits against a twin in plain torch; windows after ragged commits against the model alone",
        source="vLLM norms all streams together; others one by one: spec.replace(stream_norm='grouped')",
    ),
    MTPSpec(
        family="hy_v4",
        model_types=("hy_v4",),
        prefix="model.mtp_layers.{i}.",
        names=(*DEEPSEEK_NAMES[:3], ("final_layernorm", "norm_out")),
        renames=(
            ("self_attn.linear_gate", "self_attn.gate_proj"),
            ("self_attn.learnable_sink_param", "self_attn.sinks"),
        ),
        counted_by="tensors",
        ignored=SHARED_COPIES,
        block="plain_layer",
        block_config=(("indexer_types", "full"),),
        index_choice="config",
        examples=("tencent/Hy4-preview",),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM: no hyper-connections in the head; exporters count its one layer as 1 or 2. vLLM zeroes the first "
        "embedding: spec.replace(zero_first_embedding=True)",
    ),
    MTPSpec(
        family="dots3_note",
        model_types=("dots3_note", "dots3_note_text"),
        prefix="model.layers.{n}.",
        other_prefixes=("model.language_model.layers.{n}.",),
        names=(*DEEPSEEK_NAMES, ("../../mtp.embed_tokens", "embedding")),
        ignored=SHARED_COPIES,
        block_layer_type="sliding_attention",
        block_config=(("mlp_layer_types", "dense"),),
        embedding="own",
        examples=("dots-studio/dots3-note-prev",),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM and SGLang agree",
    ),
    MTPSpec(
        family="minimax_m3_vl",
        model_types=("minimax_m3_vl", "minimax_m3_vl_text"),
        prefix="language_model.model.mtp.layers.{i}.",
        other_prefixes=("model.mtp.layers.{i}.",),
        names=(*DEEPSEEK_NAMES[:3], ("final_layernorm", "norm_out"), ("transformer_layer", "block")),
        renames=(
            ("block_sparse_moe.e_score_correction_bias", "mlp.gate.e_score_correction_bias"),
            ("block_sparse_moe", "mlp"),
            ("index_q_proj", "indexer.q_proj"),
            ("index_k_proj", "indexer.k_proj"),
            ("index_q_norm", "indexer.q_norm"),
            ("index_k_norm", "indexer.k_norm"),
        ),
        experts=("w1", "w3", "w2"),
        num_layers_keys=("num_mtp_modules", "num_nextn_predict_layers"),
        block_layer_type="minimax_m3_sparse",
        block_config=(("mlp_layer_types", "sparse"),),
        recycle="raw",
        examples=("MiniMaxAI/MiniMax-M3",),
        verified="greedy parity, with images; head logits against a twin in plain torch",
        source="vLLM, which of several modules drafts with the first alone: spec.replace(used_layers=1); here they are a chain",
    ),
    MTPSpec(
        family="llama",
        model_types=("llama", "qwen2"),
        prefix="model.layers.{n}.",
        names=DEEPSEEK_NAMES,
        ignored=SHARED_COPIES,
        examples=("smollm2-135m-instruct (shipped with mtpdecode)",),
        verified="greedy parity; head logits against transformers' MtpModel; the real model",
        source="DeepSeek's layout around the target's own layer; heads trained with mtpdecode.train are written so",
    ),
    MTPSpec(
        family="gemma4",
        model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
        assistants=("gemma4_assistant", "gemma4_unified_assistant"),
        prefix="",
        names=(("pre_projection", "proj"), ("post_projection", "recycled"), ("model.norm", "norm_out")),
        num_layers_keys=("text_config.num_hidden_layers",),
        recycle="projected",
        kv="target",
        positions="frozen",
        lm_head="own",
        examples=(
            "google/gemma-4-E2B-it-assistant",
            "google/gemma-4-E4B-it-assistant",
            "google/gemma-4-26B-A4B-it-assistant",
            "google/gemma-4-31B-it-assistant",
        ),
        verified="greedy parity, with images too; assistant's logits against a twin in plain torch and transformers' own class",
        source="vLLM: all steps at the last position written; transformers one further, where it reads a refused draft's key",
    ),
)


def families() -> list[dict[str, object]]:
    """The table of supported native heads: one dictionary a row, with model types, example checkpoints, the config field that
    counts layers, where the tensors lie and what is verified."""
    return [
        {
            "family": row.family,
            "model_types": list(row.model_types),
            "examples": list(row.examples),
            "config_field": _counted_by(row),
            "tensors": row.prefix + "*",
            "hidden": row.hidden,
            "combine": row.combine,
            "recycle": row.recycle,
            "kv": row.kv,
            "positions": row.positions,
            "assistants": list(row.assistants),
            "verified": row.verified,
            "source": row.source,
        }
        for row in FAMILIES
    ]


def families_table() -> str:
    """The table as Markdown, sorted: `docs/families.md` holds it."""
    titles = ("family", "model types", "checkpoints", "config field", "tensors", "fed, order, recycled", "verified, against what")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in sorted(FAMILIES, key=lambda row: row.family):
        how = f"{row.hidden}, {row.combine}, {row.recycle}" + "; reads the target's keys" * (row.kv == "target")
        types, examples = ", ".join(f"`{name}`" for name in row.model_types), ", ".join(row.examples)
        cells = (f"`{row.family}`", types, examples, f"`{_counted_by(row)}`", f"`{row.prefix}*`", how, row.verified)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _counted_by(row: MTPSpec) -> str:
    """The config field that counts a family's layers; where there is none, the tensors that are counted."""
    return (*row.num_layers_keys, row.pattern("block") + "*")[0]


def spec_for(model_type: str, class_name: str, tensor_names: Iterable[str] = ()) -> MTPSpec:
    """The row that goes with a model type. Where several do, the one whose tensors the checkpoint has.

    Raises UnsupportedModelError, naming the known families, where none does.
    """
    rows = [row for row in FAMILIES if model_type in (*row.model_types, row.base_model_type)]
    names = list(tensor_names)
    marked = [row for row in rows if row.located(names).places(row.entry, names)]
    if not rows:
        raise UnsupportedModelError(
            f"{class_name} (model_type={model_type!r}) has no native MTP head that mtpdecode knows. "
            f"Known families: {', '.join(sorted(known_model_types()))}. If this model has one, pass spec=MTPSpec(...); "
            "to speculate without a head, pass proposer=NGramProposer()."
        )
    return (marked or [row for row in rows if model_type in row.model_types] or rows)[0]


def known_model_types() -> set[str]:
    """Every model type in the table."""
    return {model_type for row in FAMILIES for model_type in row.model_types}
