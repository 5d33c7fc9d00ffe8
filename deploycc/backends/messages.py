"""What TensorRT's error messages mean, as data: a pattern, an explanation, a remedy.

The patterns were collected from TensorRT-RTX 1.7; TensorRT 10 and 11 share its parser and its compiler. Named groups of a
pattern fill the braces of the explanation; a group called ``node`` becomes the place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meaning:
    """One known message: the pattern that finds it, what it means, and what to do."""

    pattern: str
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """A message in plain English; ``known`` is False when only the clean-up applied."""

    what: str
    fix: str
    node: str = ""
    known: bool = True


TYPE_NAMES = {"b16": "BF16", "fp8_e4m3": "FP8", "int4": "INT4", "fp4_e2m1": "FP4", "fp8_ue8m0": "MXFP8"}

MEANINGS = (
    Meaning(
        r"Cannot compile for target\(s\) (?P<archs>sm\d+(?:, *sm\d+)*), "
        r"because the model contains HW-specific datatypes: (?P<types>\w+(?:, *\w+)*)",
        "{types} does not exist on {archs}",
        "choose another --precision (BF16 needs sm_80 or later, FP8 sm_89 or later), or remove {archs} from the target",
    ),
    Meaning(
        r"Cannot compile operation '(?P<node>[^']+)' for Turing \(SM75\): FP32 (?P<kind>GEMM|3D convolution) is not supported",
        "TensorRT-RTX has no FP32 {kind} for sm_75",
        "use --precision fp16, or a target of sm_80 or later",
    ),
    Meaning(
        r"The blocking dimension must be the last or second to last dimension",
        "a blocked scale must run along the last or the second-last axis of the weight (convolution weights cannot be blocked)",
        "quantize this weight per tensor or per axis",
    ),
    Meaning(
        r"CHECK\(is_constant\(\)\) failed|CHECK\(opndA->type\(\) == opndB->type\(\)\) failed",
        "the two operands of a convolution or matrix product are quantized to different formats",
        "quantize the activation and the weight of each node to the same format",
    ),
    Meaning(
        r"[Tt]ensor (?P<node>\S+) has datatype (?P<kind>\w+) but is not produced by IPluginLayer",
        "{kind} values may only come from QuantizeLinear or a constant, not from Cast or another op",
        "make them with QuantizeLinear",
    ),
    Meaning(
        r"Failed to import initializer: (?:.*Failed to import initializer: )?(?P<node>\S+?)\.?\s*$",
        "a constant has a type that TensorRT does not have (UINT4, INT16, FP8 E5M2 or FNUZ), or its external data is missing",
        "quantize to INT8 or FP8 E4M3FN; check that the .data file lies beside the model",
    ),
    Meaning(
        r"Non-zero zero point is not supported",
        "a zero point is not zero: TensorRT quantizes symmetrically only",
        "quantize with zero_point 0 (for ONNX Runtime's tools: ActivationSymmetric and WeightSymmetric)",
    ),
    Meaning(
        r"specified quantization type is (?P<kind>\w+)",
        "a node quantizes to {kind}, which TensorRT does not have",
        "quantize to INT8 or FP8 E4M3FN",
    ),
    Meaning(
        r"input has type (?P<kind>\w+) but must have type FP8, FP4, Int4, Int8",
        "DequantizeLinear of {kind} (often a quantized bias) does not exist in TensorRT",
        "keep the bias in floating point (for ONNX Runtime's tools: QuantizeBias=False)",
    ),
    Meaning(
        r"(?P<node>[^\s(]+): I\w+Layer must have same input types. `A` is of type (?P<a>\w+) and `B` is of type (?P<b>\w+)",
        "the inputs have different types ({a} and {b}); TensorRT networks are strongly typed",
        "insert a Cast",
    ),
    Meaning(
        r"must have (?:the )?same input types|must be of same type|must have the same type",
        "the inputs of a node have different types; TensorRT networks are strongly typed",
        "insert a Cast before one of them",
    ),
    Meaning(
        r"Scale coefficients must all be positive", "a scale is zero, negative or not a number", "make every scale finite and above zero"
    ),
    Meaning(
        r"number of scales is not equal to the number of output channels. Number of output channels = (?P<n>\d+), "
        r"number of scales = (?P<m>\d+)",
        "there are {m} scales for {n} output channels",
        "give one scale per output channel, or one for the tensor",
    ),
    Meaning(
        r"quantization axis must divide into whole blocks",
        "the quantized axis does not divide into whole blocks",
        "choose a block size that divides the axis",
    ),
    Meaning(
        r"Quantized constant \((?P<node>[^)]*)\) is only allowed before DQ",
        "the 8-bit constant '{node}' is read by something other than DequantizeLinear",
        "store the constant as INT32 or in floating point, or put DequantizeLinear behind it",
    ),
    Meaning(r"Sub-byte quantization with odd tensor", "a 4-bit tensor has an odd number of elements", "leave it in 8 or more bits"),
    Meaning(
        r"(?P<kind>\w+) plugin (?:creator version \d+ )?was not found in (?:the )?plugin registry",
        "TensorRT does not have the op {kind} here (TensorRT-RTX ships no plugin for it, or the plugin needs a GPU driver while parsing)",
        "cut the model before this op and run the rest outside the engine",
    ),
    Meaning(
        r"(?P<node>\S+) has no runners that implement it",
        "TensorRT-RTX parses this op but has no kernel for it",
        "cut the model before this op (for NonMaxSuppression: run it outside the engine)",
    ),
    Meaning(
        r"K exceeds the maximum value allowed \((?P<limit>\d+)\)",
        "TopK with k above {limit} does not exist in TensorRT",
        "choose a smaller k",
    ),
    Meaning(
        r"UNSUPPORTED_NODE",
        "TensorRT does not have this op (or this form of it)",
        "export the model with other ops, or cut the model before it",
    ),
    Meaning(
        r"Dynamic input tensor (?P<name>\S+) is missing dimensions in profile",
        "the dynamic input '{name}' has no optimization profile",
        "give its range with --shape {name}=MIN:OPT:MAX",
    ),
    Meaning(
        r"no optimization profile has been defined",
        "a dynamic input has no optimization profile",
        "give its range with --shape NAME=MIN:OPT:MAX",
    ),
    Meaning(
        r"Optimization profile \d+ is missing values for shape input tensor (?P<name>\S+)",
        "the input '{name}' decides shapes inside the model, which needs values rather than shapes in the profile",
        "make it a constant of the model",
    ),
    Meaning(
        r"INMSLayer",
        "TensorRT-RTX has no kernel for NonMaxSuppression",
        "cut the model before this op and run it outside the engine",
    ),
    Meaning(
        r"within workspace limit|OutOfMemory \(Requested size was (?P<size>\d+)",
        "the workspace is too small for any kernel of some op",
        "raise the workspace option (it is memory of the target GPU)",
    ),
    Meaning(
        r"Attention operation was not supported by a dedicated kernel",
        "the ONNX op Attention has no fused kernel for these shapes and types",
        "export at opset 22 or lower, so that attention becomes MatMul, Softmax, MatMul",
    ),
    Meaning(
        r"Failed attempt to rename a layer .* to (?P<node>\S+) as the new name is already in use",
        "two QuantizeLinear or DequantizeLinear nodes have the same name",
        "give every node its own name, and inline functions that hold Q/DQ",
    ),
    Meaning(
        r"node.input\(\).size\(\) == function.input\(\).size\(\)",
        "a call of a model-local function leaves inputs out",
        "inline the model's functions",
    ),
    Meaning(
        r"Failed to parse the ONNX model|MODEL_DESERIALIZE_FAILED", "the file is not an ONNX model, or it is damaged", "export it again"
    ),
    Meaning(r"Network must have at least one output", "the model has no outputs", "export it again with outputs"),
    Meaning(
        r"graph_jit.cpp:\d+: CHECK\(status == CUDA_SUCCESS\)|not found in the accelerator list",
        "this build option needs a GPU driver on the building machine",
        "build without refit and without stripped weights, or on a GPU machine",
    ),
    Meaning(
        r"plugin.*could not|PLUGIN_V3|IPluginV3",
        "the model uses a plugin that is not registered",
        "load the plugin library, or lower the op to standard ONNX",
    ),
)

# Lines that appear in sound builds and call for nothing.
HARMLESS = (
    r"Converting conv \w+ scales to fp32",
    r"Make sure (?:input|output) .* has Int64 binding",
    r"Timing cache operations are no-ops",
    # The nodes of a function body have one name, however many nodes call the function.
    r"A node named \S+ already exists, the output tensors of this new instance will not be queryable",
)

# Without a driver every failure drags this tail along, whatever its cause.
_NO_DRIVER = re.compile(r"\s*\[checkMacros\.cpp::catchCudaError::\d+\] Error Code \d+: Cuda Runtime \(.*?cudaError \d+:.*?\)\)", re.DOTALL)
_SOURCE = re.compile(r"\s*(?:\.? ?In \w+ at /\S+?:\d+)(?=\)|\s|$)")
_BUILDER = re.compile(r"^(?:I\w+::\w+: )?Error Code \d+: ")
_MYELIN = re.compile(r"\[\w+\.(?:cpp|h):\d+: \w+\]\s*")
_NODE = (r"\[ONNX Layer: ([^\]]+)\]", r"Invalid Node - (\S+)", r"operation '([^']+)'", r"API Usage Error \((\S+?): ")


def clean(message: str) -> str:
    """Return ``message`` without the artefacts of a missing driver, source positions and log prefixes."""
    text = _NO_DRIVER.sub("", message)
    text = re.sub(r"^\w+\.\w+:\d+: |Invalid Node - \S+\n", "", text)
    for pattern in (_SOURCE, _BUILDER, _MYELIN):
        text = pattern.sub("", text.strip())
    text = re.sub(r"^Assertion failed: (?:.*?: )?(?=\S)", "", text)
    return " ".join(text.split())


def is_harmless(line: str) -> bool:
    """Return whether a line of the log calls for nothing."""
    return any(re.search(pattern, line) for pattern in HARMLESS)


def explain(message: str) -> Explanation:
    """Return what a message of TensorRT means, or the cleaned message when it is not a known one."""
    for meaning in MEANINGS:
        if found := re.search(meaning.pattern, message):
            groups = {name: _plain(text) for name, text in found.groupdict().items() if text}
            node = found.groupdict().get("node") or _node(message)
            return Explanation(meaning.what.format_map(groups), meaning.fix.format_map(groups), node)
    return Explanation(clean(message), "", _node(message), known=False)


def _plain(text: str) -> str:
    words = re.split(r", *", text.rstrip("."))
    return ", ".join(TYPE_NAMES.get(word, re.sub(r"^sm(\d+)$", r"sm_\1", word)) for word in words)


def _node(message: str) -> str:
    return next((found[1] for pattern in _NODE if (found := re.search(pattern, message))), "")
