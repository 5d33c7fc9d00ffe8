// OpenCV's dnn module: a CPU executor from the distribution, for the portable FP32 form of a model.
#include <opencv2/core/utils/logger.hpp>
#include <opencv2/dnn.hpp>

#include "backends.hpp"
#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

[[noreturn]] void refuse(const cv::Exception& error, const std::string& at) {
    throw Refusal(Kind::backend, "OpenCV " CV_VERSION " does not run this model: " + error.err, at, "use a runner with ONNX Runtime");
}

std::vector<int> sizes(const Shape& shape) { return std::vector<int>(shape.begin(), shape.end()); }

// The shape of `mat` with the rank of `spec`: OpenCV keeps at least two dimensions.
Shape shape_of(const cv::Mat& mat, const TensorSpec& spec) {
    Shape shape(mat.size.p, mat.size.p + mat.dims);
    if (shape.size() == spec.shape.size() + 1 && shape.back() == 1) shape.pop_back();
    return shape;
}

class OpenCvExecutor : public Executor {
public:
    OpenCvExecutor(const Bytes& file, const Bundle& bundle) : outputs_(bundle.outputs) {
        try {
            net_ = cv::dnn::readNetFromONNX(reinterpret_cast<const char*>(file.data()), file.size());
        } catch (const cv::Exception& error) {
            refuse(error, "loading");
        }
        for (const TensorSpec& output : outputs_) names_.push_back(output.name);
    }

    Tensors run(const Tensors& inputs) override {
        std::vector<cv::Mat> found;
        try {
            for (const Tensor& input : inputs) {
                // The net keeps its own copy, so the caller's bytes are only read.
                const std::vector<int> shape = sizes(input.shape);
                net_.setInput(cv::Mat(static_cast<int>(shape.size()), shape.data(), CV_32F, const_cast<float*>(input.as<float>())), input.name);
            }
            net_.forward(found, names_);
        } catch (const cv::Exception& error) {
            refuse(error, "inference");
        }
        Tensors outputs;
        for (std::size_t i = 0; i < found.size(); ++i) {
            const cv::Mat mat = found[i].isContinuous() ? found[i] : found[i].clone();
            Tensor tensor = make_tensor(names_[i], DataType::FP32, shape_of(mat, outputs_[i]));
            std::copy(mat.datastart, mat.datastart + tensor.data.size(), tensor.data.begin());
            outputs.push_back(std::move(tensor));
        }
        return outputs;
    }

private:
    cv::dnn::Net net_;
    std::vector<TensorSpec> outputs_;
    std::vector<cv::String> names_;
};

class OpenCvModel : public Model {
public:
    OpenCvModel(Bytes file, const Bundle& bundle) : file_(std::move(file)), bundle_(bundle) {}
    std::unique_ptr<Executor> new_executor() override { return std::make_unique<OpenCvExecutor>(file_, bundle_); }

private:
    Bytes file_;
    const Bundle& bundle_;
};

class OpenCvBackend : public Backend {
public:
    std::string name() const override { return "opencv"; }
    std::string kind() const override { return "onnx-fp32"; }
    std::string refusal(const Variant&) const override { return ""; }

    std::unique_ptr<Model> load(const Bundle& bundle, const Variant& variant) const override {
        cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);
        for (const InputSpec& input : bundle.inputs) check(input);
        for (const TensorSpec& output : bundle.outputs) check(output);
        return std::make_unique<OpenCvModel>(bundle.read(variant.path), bundle);
    }

private:
    static void check(const TensorSpec& spec) {
        if (spec.type != DataType::FP32) {
            throw Refusal(Kind::backend, "OpenCV serves FP32 tensors only", "'" + spec.name + "' is " + std::string(name_of(spec.type)), "use a runner with ONNX Runtime");
        }
    }
};

}  // namespace

std::unique_ptr<Backend> opencv_backend() { return std::make_unique<OpenCvBackend>(); }

}  // namespace deploycc
