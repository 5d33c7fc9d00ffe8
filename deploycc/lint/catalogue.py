"""The table of all rules: which of them the lint sees, which of them insertion keeps and what shows it. ``docs/lint.md`` is made here."""

from __future__ import annotations

import inspect

from deploycc.core.rules import RULES
from deploycc.lint.findings import SEVERITIES
from deploycc.lint.linting import checks

CLEAN = "tests/lint/test_builds.py::test_our_builds_are_clean"
_INSERT, _CASTS, _REGIONS = "tests/passes/test_insert_qdq.py", "tests/passes/test_insert_casts.py", "tests/quant/test_regions.py"
_ELIGIBLE, _CONTRACT = "tests/quant/test_eligibility.py", "tests/core/test_contract.py"
# What shows that deploycc itself keeps a rule; every rule that the lint sees is shown by CLEAN besides.
INSERTION: dict[str, str] = {
    "R1": f"{_CONTRACT}::test_zero_points_are_zero",
    "R2": f"{_INSERT}::test_a_dead_channel_has_a_positive_scale",
    "R3": "tests/core/test_quantizers.py::test_int8_rounds_to_even_and_saturates",
    "R4": f"{_CONTRACT}::test_have_one_scale",
    "R5": f"{_INSERT}::test_matrix_products",
    "R7": f"{_CASTS}::test_scales_have_the_type_of_what_they_scale",
    "R9": f"{_CASTS}::test_bf16",
    "R11": "tests/backends/test_nvinfer.py::test_the_network_of_the_real_module_is_strongly_typed",
    "R12": f"{_INSERT}::test_conv",
    "R13": f"{_INSERT}::test_conv",
    "R14": f"{_INSERT}::test_one_pair_serves_all_readers_of_a_format",
    "P1": f"{_INSERT}::test_matrix_products",
    "P2": f"{_INSERT}::test_other_readers_keep_the_float_value",
    "P4": f"{_INSERT}::test_the_skip_is_quantized_and_the_branch_is_not",
    "P5": f"{_INSERT}::test_the_skip_is_quantized_and_the_branch_is_not",
    "P9": f"{_INSERT}::test_one_pair_serves_all_readers_of_a_format",
    "P11": f"{_REGIONS}::test_silu_joins_its_convolution",
    "P13": f"{_REGIONS}::test_projections_of_one_value_are_one_region",
    "P16": f"{_ELIGIBLE}::test_p16_the_classifier_of_a_transformer_is_not_fp8",
    "S1": f"{_ELIGIBLE}::test_small_products_are_left_alone",
    "S2": f"{_ELIGIBLE}::test_few_channels",
    "S3": f"{_ELIGIBLE}::test_large_kernels",
    "S4": f"{_ELIGIBLE}::test_s4_a_computed_weight_makes_no_region",
    "S5": f"{_ELIGIBLE}::test_channels_of_a_group_in_fours",
    "S6": f"{_ELIGIBLE}::test_long_sequences",
    "S7": f"{_ELIGIBLE}::test_s7_head_sizes",
    "S9": f"{_CASTS}::test_ops_that_are_not_safe_in_16_bits",
    "F1": f"{_INSERT}::test_attention",
    "F2": "tests/passes/test_canonicalize_attention.py::test_one_scale_on_the_query",
    "F3": "tests/passes/test_canonicalize_attention.py::test_three_nodes_that_turn_the_key_become_one",
    "F4": "tests/quant/test_decide.py::test_the_softmax_has_a_fixed_scale_in_fp8",
    "F5": f"{_INSERT}::test_attention",
    "F7": "tests/backends/test_listing.py::test_fused_attention_is_counted_with_its_operand_types",
    "F8": "tests/quant/test_clipping.py::test_fp8_keeps_the_maximum",
    "F9": "tests/passes/test_decompose_attention.py::test_the_result_is_an_attention_region",
    "X3": f"{_REGIONS}::test_no_node_is_in_two_regions",
    "X4": "tests/backends/test_tensorrt_rtx.py::test_a_format_that_is_missing_has_a_reason_and_a_remedy",
    "T1": f"{_ELIGIBLE}::test_t1_what_tensorrt_computes_in_floating_point",
    "T2": f"{_INSERT}::test_of_activations_are_scalars",
    "T3": "tests/passes/test_split_projections.py::test_a_joint_projection_becomes_one_product_per_part",
    "X5": f"{_CASTS}::test_one_cast_serves_all_readers",
    "D1": "tests/quant/test_islands.py::test_what_lies_between_a_weighted_op_and_an_index",
    "N1": "tests/quant/test_islands.py::test_values_near_the_largest_fp16_number",
}
# What no graph shows.
UNSEEN: dict[str, str] = {
    "R11": "flags are options of the builder; deploycc sets none",
    "F6": "a choice, and no violation either way; deploycc leaves it to the builder",
    "F7": "a fact of the engine: `deploycc build` reads it there and reports it",
    "F8": "a recipe; its parts are P13, P16, F1 and F4, and ranges are not in the graph",
    "N1": "ranges are not in the graph; `deploycc build` measures them",
}
INTRODUCTION = """# Lint

`deploycc lint MODEL.onnx` reads a Q/DQ file of any origin as it stands and says what in it TensorRT refuses, or computes slower or in
another format than the file asks for: rule, place with its ONNX and PyTorch names, cost and remedy. `--target` adds the formats that an
architecture lacks, `--json` prints every finding (schema `deploycc.lint/1`), `--fix` writes the model with the repairs that change no
number and executes it beside the original. The exit code is 1 when there are errors, 0 otherwise, 2 when the file cannot be read.
[lint_of_others.md](lint_of_others.md) says what it finds in the output of other quantizers.

This page is made by `deploycc lint --rules --markdown`."""


def listing() -> str:
    """Return one line per rule: id, severity of its findings or a dash, whether ``--fix`` helps, and the rule."""
    found = checks()
    rows = [(name, found.get(name), text) for name, text in RULES.items()]
    return "\n".join(f"{n:4} {c.severity if c else '-':8} {'fix' if c and c.repair else '   '} {text}" for n, c, text in rows)


def markdown() -> str:
    """Return the page: the severities, the table of all rules, and one paragraph per rule that the lint sees."""
    found = checks()
    severities = [f"- **{name}**: {text}." for name, text in SEVERITIES.items()]
    rows = [f"| {name} | {text} | {_seen(name)} | {_kept(name)} |" for name, text in RULES.items()]
    head = ["| rule | what it asks | lint | kept by deploycc, as shown by |", "|---|---|---|---|"]
    blocks = [INTRODUCTION, "## Severities", "\n".join(severities), "## Rules", "\n".join([*head, *rows]), "## Findings"]
    for name, check in found.items():
        summary = (inspect.getdoc(check.find) or "").replace("``", "`")
        repair = " `--fix` does it." if check.repair and "--fix" not in check.fix else ""
        blocks.append(f"**{name}** ({check.severity}). {summary} *Why it matters:* {check.why}. *Remedy:* {check.fix}.{repair}")
    return "\n\n".join(blocks) + "\n"


def _seen(name: str) -> str:
    check = checks().get(name)
    if check is None:
        return f"not in a graph: {UNSEEN.get(name, 'no check yet')}"
    return check.severity + (", repaired by `--fix`" if check.repair else "")


def _kept(name: str) -> str:
    shown = [INSERTION[name]] if name in INSERTION else []
    places = [*shown, *([CLEAN] if name in checks() else [])]
    return ", ".join(f"`{place.rpartition('::')[2]}`" for place in places) or "not applicable"
