// A bundle, as `deploycc bundle` writes it: bundle.json parsed and checked before anything else is opened.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "deploycc/tensor.hpp"

namespace deploycc {

struct TensorSpec {
    std::string name;
    DataType type = DataType::FP32;
    Shape shape;  // -1 where a dimension is dynamic
};

struct InputSpec : TensorSpec {
    Shape minimum, optimum, maximum;
};

// The range of the first dimension, which all inputs and outputs share, and along which requests may be joined.
struct BatchRange {
    std::int64_t minimum = 1, optimum = 1, maximum = 1;
};

struct Requirement {
    std::string version;             // of the library that built the engine; empty: any
    std::vector<std::string> archs;  // such as sm_89; empty: any
    std::vector<std::string> plugins;
    // "version": also later releases of the same major version; "ampere-plus": also any GPU from sm_80 on; "same-arch": nothing more to check.
    std::vector<std::string> compatible;

    bool is_compatible(const std::string& mode) const;
};

struct GoldenOutput {
    std::string output, path;
    double minimum_sqnr_db = 0.0;
};

struct Variant {
    std::string kind, path;
    Requirement requires_;
    std::vector<GoldenOutput> golden;
};

struct FileRecord {
    std::string sha256;
    std::uint64_t bytes = 0;
};

struct Bundle {
    std::filesystem::path root;
    std::string name;
    std::vector<InputSpec> inputs;
    std::vector<TensorSpec> outputs;
    std::optional<BatchRange> batch;
    std::vector<Variant> variants;
    std::map<std::string, std::string> golden_inputs;  // file by input
    std::string labels;                                // file, or empty
    std::map<std::string, FileRecord> files;

    // The bytes of a listed file. Throws Refusal when its hash is not the recorded one.
    Bytes read(const std::string& path) const;
};

// Parse and check the text of bundle.json: types, names, shapes, and that every file named is listed and inside.
Bundle parse_bundle(std::string_view text);

// Open the directory `root`. Throws Refusal saying which part of bundle.json is wrong; reads no other file.
Bundle open_bundle(const std::filesystem::path& root);

// The golden inputs, in the model's order, and the golden outputs of `variant`.
Tensors golden_inputs(const Bundle& bundle);
Tensors golden_outputs(const Bundle& bundle, const Variant& variant);

// Check names, types and shapes of a request against the model and its profiles; return the tensors in the model's order.
Tensors checked_inputs(const Bundle& bundle, Tensors given);

}  // namespace deploycc
