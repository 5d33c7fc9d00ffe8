import re

import pytest

from deploycc.backends.messages import MEANINGS, clean, explain, is_harmless
from deploycc.backends.nvinfer import failure

NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch/checkMacros.cpp:250 "
    "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
)
TYPES = (
    "IBuilder::buildSerializedNetworkToStream: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm75, sm80, "
    "because the model contains HW-specific datatypes: fp8_e4m3, b16. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)"
)
MIXED = (
    "Invalid Node - node_of_y\nITensor::getDimensions: Error Code 4: API Usage Error (node_of_y: IMatrixMultiplyLayer must have same "
    "input types. `A` is of type Float and `B` is of type Half. In validateTypes at /_src/common/matrixMultiplyNode.cpp:38)\n" + NO_DRIVER
)


def test_the_tail_of_a_missing_driver_and_source_positions_are_removed():
    assert clean(NO_DRIVER) == ""
    assert (
        clean(TYPES) == "Myelin (Cannot compile for target(s) sm75, sm80, because the model contains HW-specific datatypes: fp8_e4m3, b16)"
    )
    assert clean(MIXED) == (
        "API Usage Error (node_of_y: IMatrixMultiplyLayer must have same input types. `A` is of type Float and `B` is of type Half)"
    )


@pytest.mark.parametrize(
    ("message", "what", "node"),
    [
        (TYPES, "FP8, BF16 does not exist on sm_75, sm_80", ""),
        (MIXED, "the inputs have different types (Float and Half)", "node_of_y"),
        (
            "Usage Error (Quantized constant (table) is only allowed before DQ or PLUGIN_V2 or kPLUGIN_V3 node. If this constant is not",
            "the 8-bit constant 'table' is read by something other than DequantizeLinear",
            "table",
        ),
        (
            "Cannot compile operation 'Conv_3' for Turing (SM75): FP32 3D convolution is not supported.",
            "no FP32 3D convolution for sm_75",
            "Conv_3",
        ),
        (
            "Invalid Node - d4\n The blocking dimension must be the last or second to last dimension",
            "a blocked scale",
            "d4",
        ),
        ("Internal Error: MyelinCheckException: operand.h:524: CHECK(is_constant()) failed.", "quantized to different formats", ""),
        ("cudnn_impl.cpp:738: CHECK(opndA->type() == opndB->type()) failed. Input and filter", "quantized to different formats", ""),
        ("API Usage Error (Tensor t21 has datatype FP8 but is not produced by IPluginLayer, )", "may only come from QuantizeLinear", "t21"),
        (
            "Failed to import initializer: convertOnnxWeights(init): Failed to import initializer: c1",
            "a constant has a type",
            "c1",
        ),
        ("IConvolutionLayer `input` and `kernel` must be of same type", "the inputs of a node have different types", ""),
        (
            "The number of scales is not equal to the number of output channels. Number of output channels = 64, number of scales = 63.",
            "there are 63 scales for 64 output channels",
            "",
        ),
        ("The quantization axis must divide into whole blocks. Input dimension 1 = 104, scale dimension = 7.", "whole blocks", ""),
        ("OutOfMemory (Requested size was 14927616 bytes.)", "the workspace is too small", ""),
        ("K exceeds the maximum value allowed (3840)", "TopK with k above 3840", ""),
        ("Optimization profile 0 is missing values for shape input tensor k", "the input 'k' decides shapes", ""),
        ("Dynamic input tensor x is missing dimensions in profile 0.", "'x' has no optimization profile", ""),
        ("MyelinCheckException: graph_jit.cpp:278: CHECK(status == CUDA_SUCCESS) failed.", "needs a GPU driver", ""),
        ("node_of_y_1 has no runners that implement it In getSupportedFormats", "no kernel for it", "node_of_y_1"),
        ("node.input().size() == function.input().size()", "model-local function", ""),
        ("Network must have at least one output", "no outputs", ""),
    ],
)
def test_a_known_message_is_explained(message, what, node):
    meaning = explain(message)
    assert meaning.known
    assert what in meaning.what
    assert meaning.node == node
    assert meaning.fix
    assert "{" not in meaning.what + meaning.fix


def test_an_unknown_message_is_only_cleaned():
    meaning = explain(f"Error Code 9: Something new happened in 'x' {NO_DRIVER}")
    assert not meaning.known
    assert meaning.what == "Something new happened in 'x'"


def test_every_pattern_compiles_and_every_brace_has_a_group():
    for meaning in MEANINGS:
        groups = re.compile(meaning.pattern).groupindex
        assert set(re.findall(r"\{(\w+)\}", meaning.what + meaning.fix)) <= set(groups), meaning.pattern


def test_the_cause_is_found_in_the_log_when_there_is_no_other_word_of_it():
    error = failure([], [["WARNING", "Make sure input s has Int64 binding."], ["ERROR", NO_DRIVER], ["ERROR", TYPES]], at="m.onnx")
    assert error.what.startswith("FP8, BF16 does not exist on sm_75, sm_80 (TensorRT says: Myelin (Cannot compile")
    assert "cudaError" not in str(error)


def test_a_failure_without_any_word_says_so():
    assert "without a message" in str(failure([], [["ERROR", NO_DRIVER]], at="m.onnx"))


def test_further_refused_nodes_are_counted():
    refused = [{"text": "false", "code": "UNSUPPORTED_NODE", "node": f"n{i}", "op": "Det", "index": str(i)} for i in range(3)]
    error = failure(refused, [], at="m.onnx")
    assert error.at == "node 'n0' (Det) in m.onnx; 2 more nodes were refused"


def test_lines_of_sound_builds_are_harmless():
    assert is_harmless(" (foreignNode) Converting conv activation scales to fp32.")
    assert not is_harmless("Defaulting to INT8 instead.")
