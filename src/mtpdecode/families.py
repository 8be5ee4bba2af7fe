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
QWEN_NAMES = (
    ("pre_fc_norm_embedding", "norm_embed"),
    ("pre_fc_norm_hidden", "norm_hidden"),
    ("fc", "proj"),
    ("norm", "norm_out"),
    ("layers.{i}", "block"),
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
        examples=("zai-org/GLM-OCR",),
        verified="greedy parity on text; head logits against transformers' MtpModel",
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
        family="step3p7",
        model_types=("step3p7", "step3p5"),
        prefix="model.layers.{n}.",
        names=STEP_NAMES,
        ignored=("embed_tokens.weight",),
        block_layer_type="sliding_attention",
        block_config=(("mlp_layer_types", "dense"), ("swiglu_limits", None), ("swiglu_limits_shared", None)),
        hidden="pre_norm",
        recycle="raw",
        lm_head="own",
        beyond="cycle",
        examples=("stepfun-ai/Step-3.5-Flash", "stepfun-ai/Step-3.7-Flash"),
        verified="greedy parity; head logits against a twin in plain torch",
        source="vLLM: state before the final norm, an output layer a depth, step k takes layer k mod D; transformers takes the base's",
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
)


def families() -> list[dict[str, object]]:
    """The table of supported native heads: one dictionary a row, with model types, example checkpoints, the config field that
    counts layers, where the tensors lie and what is verified."""
    return [
        {
            "family": row.family,
            "model_types": list(row.model_types),
            "examples": list(row.examples),
            "config_field": row.num_layers_keys[0],
            "tensors": row.prefix + "*",
            "hidden": row.hidden,
            "combine": row.combine,
            "recycle": row.recycle,
            "verified": row.verified,
            "source": row.source,
        }
        for row in FAMILIES
    ]


def families_table() -> str:
    """The table as Markdown: `docs/families.md` holds it."""
    titles = ("family", "model types", "checkpoints", "counted by", "tensors", "fed, order, recycled", "held to")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in FAMILIES:
        how = f"{row.hidden}, {row.combine}, {row.recycle}"
        types, examples = ", ".join(f"`{name}`" for name in row.model_types), ", ".join(row.examples)
        cells = (f"`{row.family}`", types, examples, f"`{row.num_layers_keys[0]}`", f"`{row.prefix}*`", how, row.verified)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spec_for(model_type: str, class_name: str, tensor_names: Iterable[str] = ()) -> MTPSpec:
    """The row that goes with a model type. Where several do, the one whose tensors the checkpoint has.

    Raises UnsupportedModelError, naming the known families, where none does.
    """
    rows = [row for row in FAMILIES if model_type in (*row.model_types, row.base_model_type)]
    names = list(tensor_names)
    marked = [row for row in rows if row.located(names).places("proj", names)]
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
