// TensorRT or TensorRT-RTX, whichever has the headers: its library, its types, and an engine with what it must outlive.
#pragma once

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "deploycc/bundle.hpp"
#include "library.hpp"

namespace deploycc {

#ifdef TRT_MAJOR_RTX
inline constexpr const char* TENSORRT_NAME = "tensorrt-rtx";
#else
inline constexpr const char* TENSORRT_NAME = "tensorrt";
#endif

const Library& tensorrt_library();
// Of the library on this machine, e.g. 10.16.1.11; and of the headers that this runner was built with.
std::string tensorrt_version();
std::string tensorrt_header_version();

// Whether a library of that version has the interface of the headers: TensorRT-RTX changes it between minor releases, TensorRT between major ones.
bool speaks_to(const std::string& version);

// Throws Refusal for a type that no protocol transports.
DataType datatype_of(nvinfer1::DataType type, const std::string& name);
nvinfer1::Dims dims_of(const Shape& shape);
Shape shape_of(const nvinfer1::Dims& dims);

// Keeps what TensorRT last complained about, for error messages.
class TensorRtLogger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override;
    std::string take();

private:
    std::mutex mutex_;
    std::string text_;
};

// A file in memory with a path, so that a library is loaded from the very bytes whose hash was checked.
class MemoryFile {
public:
    explicit MemoryFile(const Bytes& data);
    MemoryFile(MemoryFile&& other) noexcept;
    ~MemoryFile();
    std::string path() const;

private:
    int descriptor_ = -1;
};

// Destroyed from the last to the first: the engine before the runtime, and plugins after both.
struct LoadedEngine {
    TensorRtLogger logger;
    std::vector<MemoryFile> plugins;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

// Load the plugins and the engine of `variant`, and check that its tensors are those of the bundle. Throws Refusal.
std::shared_ptr<LoadedEngine> load_engine(const Bundle& bundle, const Variant& variant);

}  // namespace deploycc
