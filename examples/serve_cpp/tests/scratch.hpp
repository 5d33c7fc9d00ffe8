// What the tests share: a small bundle as JSON, tensors from numbers, temporary folders.
#pragma once

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "deploycc/files.hpp"
#include "deploycc/npy.hpp"
#include "deploycc/refusal.hpp"
#include "deploycc/tensor.hpp"

inline deploycc::Tensor floats(const std::string& name, deploycc::Shape shape, const std::vector<float>& values) {
    deploycc::Tensor tensor = deploycc::make_tensor(name, deploycc::DataType::FP32, std::move(shape));
    std::memcpy(tensor.data.data(), values.data(), values.size() * sizeof(float));
    return tensor;
}

// The text of the refusal that `action` throws, or nothing.
template <class Action>
std::string refusal_of(Action action) {
    try {
        action();
    } catch (const deploycc::Refusal& refusal) {
        return refusal.what();
    }
    return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A bundle of one FP32 input x [-1, 2] served for batches of 1 to 4, and one output y [-1, 1].
inline nlohmann::json small_bundle() {
    const std::string hash(64, '0');
    return nlohmann::json::parse(R"({
      "schema": "deploycc.bundle/1", "name": "net",
      "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2], "minimum": [1, 2], "optimum": [2, 2], "maximum": [4, 2]}],
      "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
      "batch": {"minimum": 1, "optimum": 2, "maximum": 4},
      "variants": [
        {"kind": "tensorrt", "path": "engines/a.engine", "requires": {"version": "10.16.1.11", "archs": ["sm_89", "sm_90"], "plugins": []},
         "golden": [{"output": "y", "path": "golden/y.npy", "minimum_sqnr_db": 30.0}]},
        {"kind": "onnx", "path": "model.onnx", "golden": [{"output": "y", "path": "golden/y.npy", "minimum_sqnr_db": 60.0}]}],
      "golden": {"inputs": {"x": "golden/x.npy"}, "samples": 2, "source": "synthetic"},
      "labels": null, "preprocessing": null, "files": {}})");
}

// The same with every file that it names listed.
inline nlohmann::json listed_bundle() {
    nlohmann::json json = small_bundle();
    for (const char* path : {"engines/a.engine", "model.onnx", "golden/x.npy", "golden/y.npy"}) {
        json["files"][path] = {{"sha256", std::string(64, '0')}, {"bytes", 1}};
    }
    return json;
}

// A folder that goes away with the object.
class Folder {
public:
    Folder() {
        std::string name = (std::filesystem::temp_directory_path() / "serve-test-XXXXXX").string();
        path_ = mkdtemp(name.data());
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    const std::filesystem::path& path() const { return path_; }

    void write(const std::string& name, const deploycc::Bytes& data) const {
        std::filesystem::create_directories((path_ / name).parent_path());
        std::ofstream(path_ / name, std::ios::binary).write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
    }
    void write(const std::string& name, const std::string& text) const { write(name, deploycc::Bytes(text.begin(), text.end())); }

private:
    std::filesystem::path path_;
};
