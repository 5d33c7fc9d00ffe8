// ONNX Runtime on the CPU, through its C API; the library is opened when it is needed.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "backends.hpp"
#include "deploycc/refusal.hpp"
#include "library.hpp"

#ifndef SERVE_ONNXRUNTIME_LIBRARY
#define SERVE_ONNXRUNTIME_LIBRARY ""
#endif

namespace deploycc {
namespace {

struct TypePair {
    DataType type;
    ONNXTensorElementDataType element;
};

constexpr TypePair TYPES[]{{DataType::FP16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}, {DataType::BF16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
                           {DataType::FP32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},   {DataType::FP64, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
                           {DataType::INT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},    {DataType::INT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},
                           {DataType::INT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},  {DataType::INT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                           {DataType::UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},  {DataType::UINT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16},
                           {DataType::UINT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32}, {DataType::UINT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64},
                           {DataType::BOOL, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL}};

const Library& library() {
    static const char* given = std::getenv("ONNXRUNTIME_LIBRARY");
    static const Library opened({given ? given : "", SERVE_ONNXRUNTIME_LIBRARY, "libonnxruntime.so.1", "libonnxruntime.so"});
    return opened;
}

// The API table of the headers' version, or null when the library is older than the headers.
const OrtApi* api_or_null() {
    static const OrtApi* table = library().is_open() ? library().find<const OrtApiBase*()>("OrtGetApiBase")()->GetApi(ORT_API_VERSION) : nullptr;
    return table;
}

const OrtApi& api() { return *api_or_null(); }

void check(OrtStatus* status, const char* at) {
    if (!status) return;
    const std::string message = api().GetErrorMessage(status);
    api().ReleaseStatus(status);
    throw Refusal(Kind::backend, "ONNX Runtime refuses: " + message, at, "check the bundle with deploycc-serve verify");
}

// One deleter for all objects of the C API.
struct Release {
    void operator()(OrtEnv* p) const { api().ReleaseEnv(p); }
    void operator()(OrtSession* p) const { api().ReleaseSession(p); }
    void operator()(OrtSessionOptions* p) const { api().ReleaseSessionOptions(p); }
    void operator()(OrtMemoryInfo* p) const { api().ReleaseMemoryInfo(p); }
    void operator()(OrtValue* p) const { api().ReleaseValue(p); }
    void operator()(OrtTensorTypeAndShapeInfo* p) const { api().ReleaseTensorTypeAndShapeInfo(p); }
};
template <class T>
using Owned = std::unique_ptr<T, Release>;

// Let a C function create an object, and own it.
template <class T, class Create>
Owned<T> created(Create create, const char* at) {
    T* object = nullptr;
    check(create(&object), at);
    return Owned<T>(object);
}

OrtEnv* environment() {
    static const Owned<OrtEnv> env = created<OrtEnv>([](OrtEnv** out) { return api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "deploycc-serve", out); }, "start");
    static const bool quiet = (check(api().DisableTelemetryEvents(env.get()), "start"), true);
    return quiet ? env.get() : nullptr;
}

struct Session {
    Owned<OrtSession> session;
    Owned<OrtMemoryInfo> memory;
    std::vector<std::string> inputs, outputs;
};

class OnnxRuntimeExecutor : public Executor {
public:
    explicit OnnxRuntimeExecutor(std::shared_ptr<Session> session) : session_(std::move(session)) {}

    Tensors run(const Tensors& inputs) override {
        std::vector<Owned<OrtValue>> held;
        std::vector<const OrtValue*> given;
        for (const Tensor& input : inputs) {
            held.push_back(wrapped(input));
            given.push_back(held.back().get());
        }
        std::vector<const char*> input_names, output_names;
        for (const std::string& name : session_->inputs) input_names.push_back(name.c_str());
        for (const std::string& name : session_->outputs) output_names.push_back(name.c_str());
        std::vector<OrtValue*> raw(output_names.size(), nullptr);
        OrtStatus* status = api().Run(session_->session.get(), nullptr, input_names.data(), given.data(), given.size(), output_names.data(), output_names.size(), raw.data());
        std::vector<Owned<OrtValue>> found;
        for (OrtValue* value : raw) found.emplace_back(value);
        check(status, "inference");
        Tensors outputs;
        for (std::size_t i = 0; i < found.size(); ++i) outputs.push_back(copied(found[i].get(), session_->outputs[i]));
        return outputs;
    }

private:
    // A value over the caller's bytes, which ONNX Runtime only reads.
    Owned<OrtValue> wrapped(const Tensor& input) const {
        const auto pair = std::find_if(std::begin(TYPES), std::end(TYPES), [&](const TypePair& p) { return p.type == input.type; });
        void* data = const_cast<std::uint8_t*>(input.data.data());
        return created<OrtValue>(
            [&](OrtValue** out) {
                return api().CreateTensorWithDataAsOrtValue(session_->memory.get(), data, input.data.size(), input.shape.data(), input.shape.size(), pair->element, out);
            },
            "an input");
    }

    static Tensor copied(OrtValue* value, const std::string& name) {
        const auto info = created<OrtTensorTypeAndShapeInfo>([&](OrtTensorTypeAndShapeInfo** out) { return api().GetTensorTypeAndShape(value, out); }, "an output");
        ONNXTensorElementDataType element{};
        std::size_t rank = 0;
        check(api().GetTensorElementType(info.get(), &element), "an output");
        check(api().GetDimensionsCount(info.get(), &rank), "an output");
        Shape shape(rank);
        check(api().GetDimensions(info.get(), shape.data(), rank), "an output");
        const auto pair = std::find_if(std::begin(TYPES), std::end(TYPES), [&](const TypePair& p) { return p.element == element; });
        if (pair == std::end(TYPES)) throw Refusal(Kind::backend, "the output '" + name + "' is of a type that is not transported", "", "cast it in the model");
        Tensor tensor = make_tensor(name, pair->type, std::move(shape));
        void* data = nullptr;
        check(api().GetTensorMutableData(value, &data), "an output");
        std::memcpy(tensor.data.data(), data, tensor.data.size());
        return tensor;
    }

    std::shared_ptr<Session> session_;
};

class OnnxRuntimeModel : public Model {
public:
    explicit OnnxRuntimeModel(std::shared_ptr<Session> session) : session_(std::move(session)) {}
    std::unique_ptr<Executor> new_executor() override { return std::make_unique<OnnxRuntimeExecutor>(session_); }

private:
    std::shared_ptr<Session> session_;
};

// The same settings with which deploycc made the golden outputs: Q/DQ stays where the file has it.
Owned<OrtSessionOptions> session_options() {
    auto options = created<OrtSessionOptions>([](OrtSessionOptions** out) { return api().CreateSessionOptions(out); }, "options");
    for (const auto& [key, value] : {std::pair("session.disable_quant_qdq", "1"), std::pair("optimization.disable_specified_optimizers", "ReluQuantRewrite")}) {
        check(api().AddSessionConfigEntry(options.get(), key, value), "options");
    }
    return options;
}

class OnnxRuntimeBackend : public Backend {
public:
    std::string name() const override { return "onnxruntime"; }
    std::string kind() const override { return "onnx"; }

    std::string refusal(const Variant&) const override {
        if (!library().is_open()) return "ONNX Runtime is not installed (" + library().error() + "); set ONNXRUNTIME_LIBRARY to its path";
        if (!api_or_null()) return "the installed ONNX Runtime is older than 1." + std::to_string(ORT_API_VERSION) + ", whose headers this runner was built with";
        return "";
    }

    std::unique_ptr<Model> load(const Bundle& bundle, const Variant& variant) const override {
        const Bytes file = bundle.read(variant.path);
        const Owned<OrtSessionOptions> options = session_options();
        // Weights beside the model come from memory, too: their hash has been checked, and no path is followed.
        const std::string beside = variant.path + ".data";
        Bytes weights = bundle.files.count(beside) ? bundle.read(beside) : Bytes();
        if (!weights.empty()) {
            const std::string location = std::filesystem::path(beside).filename().string();
            const char* names[] = {location.c_str()};
            char* buffers[] = {reinterpret_cast<char*>(weights.data())};
            const std::size_t lengths[] = {weights.size()};
            check(api().AddExternalInitializersFromFilesInMemory(options.get(), names, buffers, lengths, 1), "weights");
        }
        auto session = std::make_shared<Session>();
        session->session = created<OrtSession>(
            [&](OrtSession** out) { return api().CreateSessionFromArray(environment(), file.data(), file.size(), options.get(), out); }, "loading");
        session->memory = created<OrtMemoryInfo>([](OrtMemoryInfo** out) { return api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, out); }, "loading");
        for (const InputSpec& input : bundle.inputs) session->inputs.push_back(input.name);
        for (const TensorSpec& output : bundle.outputs) session->outputs.push_back(output.name);
        return std::make_unique<OnnxRuntimeModel>(std::move(session));
    }
};

}  // namespace

std::unique_ptr<Backend> onnxruntime_backend() { return std::make_unique<OnnxRuntimeBackend>(); }

}  // namespace deploycc
