// TensorRT 10, TensorRT 11 and TensorRT-RTX: one context, one stream and one set of buffers per worker, one CUDA graph per shape.
#include <algorithm>
#include <cstring>
#include <map>

#include "backends.hpp"
#include "cuda.hpp"
#include "deploycc/refusal.hpp"
#include "tensorrt_runtime.hpp"

namespace deploycc {
namespace {

constexpr std::size_t MOST_GRAPHS = 64;

// A tensor's memory at its largest shape, so that addresses never change and graphs stay valid.
struct Buffer {
    TensorSpec spec;
    std::size_t capacity = 0;
    Pinned host;
    OnDevice device;
};

class TensorRtExecutor : public Executor {
public:
    TensorRtExecutor(std::shared_ptr<LoadedEngine> loaded, const Bundle& bundle)
        : loaded_(std::move(loaded)), stream_(make_stream()), context_(loaded_->engine->createExecutionContext()) {
        if (!context_) fail("no execution context");
        if (loaded_->engine->getNbOptimizationProfiles() > 0 && !context_->setOptimizationProfileAsync(0, stream_.get())) fail("the profile cannot be selected");
        for (const InputSpec& input : bundle.inputs) {
            add_buffer(inputs_, input, input.maximum);
            set_shape(input.name, input.maximum);
        }
        for (const TensorSpec& output : bundle.outputs) add_buffer(outputs_, output, output_shape(output.name));
    }

    Tensors run(const Tensors& inputs) override {
        std::vector<Shape> shapes;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            if (inputs[i].data.size() > inputs_[i].capacity) throw Refusal(Kind::usage, "a batch is larger than the profile", inputs[i].name, "send fewer samples");
            std::memcpy(inputs_[i].host.get(), inputs[i].data.data(), inputs[i].data.size());
            shapes.push_back(inputs[i].shape);
        }
        Plan& plan = plans_[shapes];
        if (plan.graph.get()) {
            check_cuda(cudaGraphLaunch(plan.graph.get(), stream_.get()), "a CUDA graph");
        } else {
            prepare(inputs, plan);
            enqueue(plan);
        }
        check_cuda(cudaStreamSynchronize(stream_.get()), "inference");
        // The second run of a shape shows that it comes back; a capture needs a run of the same shape just before it.
        if (++plan.runs == 2) plan.graph = captured(plan);
        return taken(plan);
    }

private:
    // What one combination of input shapes needs.
    struct Plan {
        std::vector<std::size_t> input_bytes;
        std::vector<Shape> output_shapes;
        int runs = 0;
        GraphExec graph;
    };

    [[noreturn]] void fail(const std::string& what) const {
        throw Refusal(Kind::backend, what + ": " + loaded_->logger.take(), TENSORRT_NAME, "check the request against the profiles in bundle.json");
    }

    void add_buffer(std::vector<Buffer>& buffers, const TensorSpec& spec, const Shape& largest) {
        const std::size_t bytes = count(largest) * size_of(spec.type);
        buffers.push_back(Buffer{spec, bytes, make_pinned(bytes), make_on_device(bytes)});
        if (!context_->setTensorAddress(spec.name.c_str(), buffers.back().device.get())) fail("the address of '" + spec.name + "' is refused");
    }

    void set_shape(const std::string& name, const Shape& shape) {
        if (!context_->setInputShape(name.c_str(), dims_of(shape))) fail("the shape " + to_string(shape) + " of '" + name + "' is refused");
    }

    // The shape of an output for the input shapes that are set.
    Shape output_shape(const std::string& name) const {
        const Shape shape = shape_of(context_->getTensorShape(name.c_str()));
        if (std::any_of(shape.begin(), shape.end(), [](std::int64_t d) { return d < 0; })) fail("the shape of the output '" + name + "' depends on the data, which is not served");
        return shape;
    }

    void prepare(const Tensors& inputs, Plan& plan) {
        plan.input_bytes.clear();
        plan.output_shapes.clear();
        for (const Tensor& input : inputs) {
            set_shape(input.name, input.shape);
            plan.input_bytes.push_back(input.data.size());
        }
        for (const Buffer& output : outputs_) plan.output_shapes.push_back(output_shape(output.spec.name));
    }

    // Copy in, compute, copy out: all of it on the stream, so that a graph can hold it.
    void enqueue(const Plan& plan) {
        for (std::size_t i = 0; i < inputs_.size(); ++i) {
            check_cuda(cudaMemcpyAsync(inputs_[i].device.get(), inputs_[i].host.get(), plan.input_bytes[i], cudaMemcpyHostToDevice, stream_.get()), "copying an input");
        }
        if (!context_->enqueueV3(stream_.get())) fail("inference fails");
        for (std::size_t i = 0; i < outputs_.size(); ++i) {
            const std::size_t bytes = count(plan.output_shapes[i]) * size_of(outputs_[i].spec.type);
            check_cuda(cudaMemcpyAsync(outputs_[i].host.get(), outputs_[i].device.get(), bytes, cudaMemcpyDeviceToHost, stream_.get()), "copying an output");
        }
    }

    // A graph of one run, or nothing where the engine cannot be captured (it then runs without).
    GraphExec captured(const Plan& plan) {
        if (std::count_if(plans_.begin(), plans_.end(), [](const auto& p) { return p.second.graph.get() != nullptr; }) >= static_cast<std::ptrdiff_t>(MOST_GRAPHS)) return {};
        cudaGraph_t raw = nullptr;
        cudaGraphExec_t exec = nullptr;
        check_cuda(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "capturing");
        bool is_enqueued = true;
        try {
            enqueue(plan);
        } catch (const Refusal&) {
            is_enqueued = false;
        }
        const bool is_captured = cudaStreamEndCapture(stream_.get(), &raw) == cudaSuccess && is_enqueued;
        const Graph graph(raw);
        if (!is_captured || cudaGraphInstantiateWithFlags(&exec, raw, 0) != cudaSuccess) cudaGetLastError();
        return GraphExec(exec);
    }

    Tensors taken(const Plan& plan) const {
        Tensors found;
        for (std::size_t i = 0; i < outputs_.size(); ++i) {
            Tensor tensor = make_tensor(outputs_[i].spec.name, outputs_[i].spec.type, plan.output_shapes[i]);
            std::memcpy(tensor.data.data(), outputs_[i].host.get(), tensor.data.size());
            found.push_back(std::move(tensor));
        }
        return found;
    }

    std::shared_ptr<LoadedEngine> loaded_;
    Stream stream_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::vector<Buffer> inputs_, outputs_;
    std::map<std::vector<Shape>, Plan> plans_;
};

class TensorRtModel : public Model {
public:
    TensorRtModel(std::shared_ptr<LoadedEngine> loaded, const Bundle& bundle) : loaded_(std::move(loaded)), bundle_(bundle) {}
    std::unique_ptr<Executor> new_executor() override { return std::make_unique<TensorRtExecutor>(loaded_, bundle_); }

private:
    std::shared_ptr<LoadedEngine> loaded_;
    const Bundle& bundle_;
};

class TensorRtBackend : public Backend {
public:
    std::string name() const override { return TENSORRT_NAME; }
    std::string kind() const override { return TENSORRT_NAME; }

    std::string refusal(const Variant& variant) const override {
        if (!tensorrt_library().is_open()) return "its library is not installed (" + tensorrt_library().error() + "); set TENSORRT_LIBRARY to its path";
        const std::string version = tensorrt_version(), arch = gpu_arch();
        if (!speaks_to(version)) return "this runner was built with the headers of " + tensorrt_header_version() + ", the library here is " + version;
        if (const std::string why = mismatch(variant.requires_, name(), version, arch); !why.empty()) return why;
        return arch.empty() ? "this machine has no GPU with a driver" : "";
    }

    std::unique_ptr<Model> load(const Bundle& bundle, const Variant& variant) const override {
        return std::make_unique<TensorRtModel>(load_engine(bundle, variant), bundle);
    }
};

}  // namespace

std::unique_ptr<Backend> tensorrt_backend() { return std::make_unique<TensorRtBackend>(); }

}  // namespace deploycc
