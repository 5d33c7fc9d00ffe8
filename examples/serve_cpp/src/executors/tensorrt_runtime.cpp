#include "tensorrt_runtime.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "deploycc/refusal.hpp"

#ifndef SERVE_TENSORRT_LIBRARY
#define SERVE_TENSORRT_LIBRARY ""
#endif

namespace deploycc {
namespace {

using Theirs = nvinfer1::DataType;
using nvinfer1::TensorIOMode;

constexpr std::pair<Theirs, DataType> TYPES[]{{Theirs::kFLOAT, DataType::FP32}, {Theirs::kHALF, DataType::FP16},   {Theirs::kBF16, DataType::BF16},
                                              {Theirs::kINT8, DataType::INT8},  {Theirs::kINT32, DataType::INT32}, {Theirs::kINT64, DataType::INT64},
                                              {Theirs::kUINT8, DataType::UINT8}, {Theirs::kBOOL, DataType::BOOL}};

void check_tensor(const nvinfer1::ICudaEngine& engine, const TensorSpec& spec, TensorIOMode mode) {
    const std::string at = "'" + spec.name + "' of the engine";
    if (engine.getTensorIOMode(spec.name.c_str()) != mode) throw Refusal(Kind::contract, "the engine has no such tensor", at, "bundle the build again");
    if (datatype_of(engine.getTensorDataType(spec.name.c_str()), spec.name) != spec.type) throw Refusal(Kind::contract, "the engine has another datatype than the bundle says", at, "bundle the build again");
}

void check_tensors(const nvinfer1::ICudaEngine& engine, const Bundle& bundle) {
    for (const InputSpec& input : bundle.inputs) check_tensor(engine, input, TensorIOMode::kINPUT);
    for (const TensorSpec& output : bundle.outputs) check_tensor(engine, output, TensorIOMode::kOUTPUT);
    if (static_cast<std::size_t>(engine.getNbIOTensors()) != bundle.inputs.size() + bundle.outputs.size()) {
        throw Refusal(Kind::contract, "the engine has more tensors than the bundle says", bundle.name, "bundle the build again");
    }
}

}  // namespace

const Library& tensorrt_library() {
    static const char* given = std::getenv("TENSORRT_LIBRARY");
#ifdef TRT_MAJOR_RTX
    static const Library opened({given ? given : "", SERVE_TENSORRT_LIBRARY, "libtensorrt_rtx.so." + std::to_string(NV_TENSORRT_MAJOR), "libtensorrt_rtx.so"});
#else
    static const Library opened({given ? given : "", SERVE_TENSORRT_LIBRARY, "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR)});
#endif
    return opened;
}

std::string tensorrt_version() {
    std::string text;
    for (const char* part : {"getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion", "getInferLibBuildVersion"}) {
        text += (text.empty() ? "" : ".") + std::to_string(tensorrt_library().find<std::int32_t()>(part)());
    }
    return text;
}

std::string tensorrt_header_version() { return std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." + std::to_string(NV_TENSORRT_PATCH); }

DataType datatype_of(nvinfer1::DataType type, const std::string& name) {
    for (const auto& [theirs, ours] : TYPES) {
        if (theirs == type) return ours;
    }
    throw Refusal(Kind::backend, "the tensor '" + name + "' is of a type that is not transported", "", "cast it in the model");
}

bool speaks_to(const std::string& version) {
#ifdef TRT_MAJOR_RTX
    const std::string same = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + ".";
#else
    const std::string same = std::to_string(NV_TENSORRT_MAJOR) + ".";
#endif
    return version.rfind(same, 0) == 0;
}

nvinfer1::Dims dims_of(const Shape& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    for (std::size_t i = 0; i < shape.size() && i < static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS); ++i) dims.d[i] = shape[i];
    return dims;
}

Shape shape_of(const nvinfer1::Dims& dims) { return Shape(dims.d, dims.d + (dims.nbDims > 0 ? dims.nbDims : 0)); }

void TensorRtLogger::log(Severity severity, const char* message) noexcept {
    if (severity > Severity::kERROR) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (text_.size() < 4096) text_ += (text_.empty() ? "" : "; ") + std::string(message);
}

std::string TensorRtLogger::take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return text_.empty() ? "it gives no reason" : std::exchange(text_, "");
}

MemoryFile::MemoryFile(const Bytes& data) : descriptor_(memfd_create("deploycc-plugin", MFD_CLOEXEC)) {
    std::size_t done = 0;
    while (descriptor_ >= 0 && done < data.size()) {
        const ssize_t written = write(descriptor_, data.data() + done, data.size() - done);
        if (written <= 0) break;
        done += static_cast<std::size_t>(written);
    }
    if (done != data.size()) throw Refusal(Kind::backend, "a plugin library does not fit into memory", "", "free some memory");
}

MemoryFile::MemoryFile(MemoryFile&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

MemoryFile::~MemoryFile() {
    if (descriptor_ >= 0) close(descriptor_);
}

std::string MemoryFile::path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

std::shared_ptr<LoadedEngine> load_engine(const Bundle& bundle, const Variant& variant) {
    auto loaded = std::make_shared<LoadedEngine>();
    const auto create = tensorrt_library().find<void*(void*, std::int32_t)>("createInferRuntime_INTERNAL");
    loaded->runtime.reset(static_cast<nvinfer1::IRuntime*>(create(&loaded->logger, NV_TENSORRT_VERSION)));
    if (!loaded->runtime) throw Refusal(Kind::backend, "TensorRT does not start: " + loaded->logger.take(), variant.path, "check the driver and the GPU");
    for (const std::string& plugin : variant.requires_.plugins) {
        loaded->plugins.emplace_back(bundle.read(plugin));
        if (!loaded->runtime->getPluginRegistry().loadLibrary(loaded->plugins.back().path().c_str())) {
            throw Refusal(Kind::backend, "TensorRT does not load the plugin library: " + loaded->logger.take(), plugin, "build it for this version of TensorRT and CUDA");
        }
    }
    // Such an engine brings a runtime of its own, which is code. Its hash is checked before it runs.
    if (variant.requires_.is_compatible("version")) loaded->runtime->setEngineHostCodeAllowed(true);
    const Bytes file = bundle.read(variant.path);
    loaded->engine.reset(loaded->runtime->deserializeCudaEngine(file.data(), file.size()));
    if (!loaded->engine) throw Refusal(Kind::backend, "TensorRT does not load the engine: " + loaded->logger.take(), variant.path, "build it on this machine");
    check_tensors(*loaded->engine, bundle);
    return loaded;
}

}  // namespace deploycc
