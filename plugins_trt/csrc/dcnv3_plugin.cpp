#include "dcnv3_plugin.h"

#include <algorithm>
#include <new>

#include "dcnv3_launch.h"

namespace deploycc {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr std::int32_t kSuccess = 0, kFailure = 1;

bool type_of(DataType type, Type& found) {
    switch (type) {
        case DataType::kFLOAT: return found = Type::kFloat, true;
        case DataType::kHALF: return found = Type::kHalf, true;
        case DataType::kBF16: return found = Type::kBfloat16, true;
        case DataType::kINT8: return found = Type::kInt8, true;
        default: return false;
    }
}

// Run `body`, which returns what went wrong or nothing; log and return a failure of it, exceptions included.
template <class Body>
std::int32_t guarded(const char* where, Body body) noexcept {
    try {
        const std::string error = body();
        if (error.empty()) {
            return kSuccess;
        }
        log_error(std::string(where) + ": " + error);
    } catch (const std::exception& error) {
        log_error(std::string(where) + ": " + error.what());
    }
    return kFailure;
}

std::string operand_of(const PluginTensorDesc& described, const void* data, Operand& operand) {
    if (described.dims.nbDims != 4) {
        return "operands have 4 dimensions, not " + std::to_string(described.dims.nbDims);
    }
    if (!type_of(described.type, operand.type)) {
        return "an operand has a type without a kernel";
    }
    operand.data = const_cast<void*>(data);
    std::copy_n(described.dims.d, 4, operand.shape);
    return {};
}

std::string key_of(Form form, const Attributes& attributes) {
    std::string key = std::string(kNames[static_cast<int>(form)]) + "." + std::to_string(kKernelRevision);
    Attributes::each(attributes, [&key](const char*, const auto& value) { key += "_" + std::to_string(value); });
    return key;
}

template <class Value>
constexpr PluginFieldType field_type() {
    return std::is_same_v<Value, float> ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
}

// Read a field as `value`; return what is wrong, or nothing.
template <class Value>
std::string take(const PluginField& field, Value& value) {
    if (field.length != 1 || field.data == nullptr) {
        return std::string("the field ") + field.name + " must hold one number";
    }
    switch (field.type) {
        case PluginFieldType::kINT32: value = static_cast<Value>(*static_cast<const std::int32_t*>(field.data)); return {};
        case PluginFieldType::kINT64: {
            const auto wide = *static_cast<const std::int64_t*>(field.data);
            if (wide != static_cast<std::int32_t>(wide)) {
                return std::string("the field ") + field.name + " is too large";
            }
            value = static_cast<Value>(wide);
            return {};
        }
        case PluginFieldType::kFLOAT32:
            if (std::is_same_v<Value, float>) {
                value = static_cast<Value>(*static_cast<const float*>(field.data));
                return {};
            }
            break;
        default: break;
    }
    return std::string("the field ") + field.name + " has the wrong type";
}

// Fill `attributes` from fields. While building, an unknown field is an error; a plan of a later version may hold more.
std::string attributes_of(const nvinfer1::PluginFieldCollection& given, nvinfer1::TensorRTPhase phase, Attributes& attributes) {
    for (std::int32_t i = 0; i < given.nbFields; ++i) {
        const PluginField& field = given.fields[i];
        std::string error;
        bool known = false;
        Attributes::each(attributes, [&](const char* name, auto& value) {
            if (std::string(name) == field.name) {
                known = true;
                error = take(field, value);
            }
        });
        const std::string name = field.name;
        if (!known && phase == nvinfer1::TensorRTPhase::kBUILD && name != "plugin_version" && name != "plugin_namespace") {
            return "there is no attribute " + name;
        }
        if (!error.empty()) {
            return error;
        }
    }
    return attributes.error();
}

}  // namespace

Dcnv3Plugin::Dcnv3Plugin(Form form, const Attributes& attributes) : form_(form), attributes_(attributes), cache_key_(key_of(form, attributes)) {}

Dcnv3Plugin::Dcnv3Plugin(const Dcnv3Plugin& other)
    : form_(other.form_), attributes_(other.attributes_), tactic_(other.tactic_), tactics_(other.tactics_), cache_key_(other.cache_key_) {}

nvinfer1::IPluginCapability* Dcnv3Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Dcnv3Plugin::clone() noexcept {
    Dcnv3Plugin* made = nullptr;
    guarded("clone", [&] { return made = new Dcnv3Plugin(*this), std::string{}; });
    return made;
}

std::int32_t Dcnv3Plugin::configurePlugin(const DynamicPluginTensorDesc* in, std::int32_t count, const DynamicPluginTensorDesc*,
                                          std::int32_t outputs) noexcept {
    return guarded("configurePlugin", [&]() -> std::string {
        if (count != inputs() || outputs != 1) {
            return std::string(getPluginName()) + " has " + std::to_string(inputs()) + " inputs and one output";
        }
        const auto& dims = in[0].desc.dims;
        Type type = Type::kFloat;
        if (dims.nbDims != 4 || dims.d[3] < 1 || dims.d[3] % attributes_.group || !type_of(in[0].desc.type, type)) {
            return "x must be [N, H, W, C] with a known C that is a multiple of the group";
        }
        const std::int64_t values = attributes_.group * attributes_.points();
        for (int i : {1, 2}) {
            const auto& shape = in[i].desc.dims;
            const std::int64_t least = values * (attributes_.record ? 3 : i == 1 ? 2 : 1);
            if (shape.nbDims != 4 || (attributes_.record ? shape.d[3] < least : shape.d[3] != least) || shape.d[3] % attributes_.group) {
                return std::string(i == 1 ? "offset" : "mask") + " must be [N, Ho, Wo, " + std::to_string(least) + "]";
            }
        }
        tactics_.clear();
        for (const Tactic& tactic : kTactics) {
            if (tactic.fits(type, dims.d[3] / attributes_.group)) {
                tactics_.push_back(tactic.id());
            }
        }
        return {};
    });
}

std::int32_t Dcnv3Plugin::getOutputDataTypes(DataType* out, std::int32_t outputs, const DataType* in, std::int32_t count) const noexcept {
    if (count != inputs() || outputs != 1) {
        return kFailure;
    }
    out[0] = form_ == Form::kDequantized ? in[2] : form_ == Form::kRequantized ? DataType::kINT8 : in[0];
    return kSuccess;
}

std::int32_t Dcnv3Plugin::getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t count, const nvinfer1::DimsExprs*, std::int32_t,
                                          nvinfer1::DimsExprs* out, std::int32_t outputs, nvinfer1::IExprBuilder& builder) noexcept {
    if (count != inputs() || outputs != 1 || in[0].nbDims != 4) {
        return kFailure;
    }
    // (size + 2 pad - dilation (kernel - 1) - 1) / stride + 1, which is never a division of a negative number by the plugin's checks.
    const auto reduced = [&](const nvinfer1::IDimensionExpr& size, int pad, int kernel, int dilation, int stride) {
        using nvinfer1::DimensionOperation;
        const auto* grown = builder.operation(DimensionOperation::kSUM, size, *builder.constant(2 * pad - dilation * (kernel - 1) - 1));
        const auto* steps = builder.operation(DimensionOperation::kFLOOR_DIV, *grown, *builder.constant(stride));
        return builder.operation(DimensionOperation::kSUM, *steps, *builder.constant(1));
    };
    const auto& a = attributes_;
    out[0].nbDims = 4;
    out[0].d[0] = in[0].d[0];
    out[0].d[1] = reduced(*in[0].d[1], a.pad_h, a.kernel_h, a.dilation_h, a.stride_h);
    out[0].d[2] = reduced(*in[0].d[2], a.pad_w, a.kernel_w, a.dilation_w, a.stride_w);
    out[0].d[3] = in[0].d[3];
    return kSuccess;
}

bool Dcnv3Plugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* all, std::int32_t count,
                                            std::int32_t outputs) noexcept {
    if (count != inputs() || outputs != 1 || position < 0 || position > count || all[position].desc.format != nvinfer1::TensorFormat::kLINEAR) {
        return false;
    }
    // Is there a kernel whose types agree with those up to `position`? Operands: x, offset, mask, center (if any), y.
    constexpr Type kinds[] = {Type::kFloat, Type::kHalf, Type::kBfloat16, Type::kInt8};
    Type known[5];
    for (std::int32_t i = 0; i <= position; ++i) {
        if (!type_of(all[i].desc.type, known[i])) {
            return false;
        }
    }
    const bool quantized = form_ == Form::kDequantized || form_ == Form::kRequantized;
    const auto agrees = [&](std::int32_t at, Type type) { return at > position || known[at] == type; };
    for (Type x : kinds) {
        for (Type offset : kinds) {
            for (Type mask : kinds) {
                for (Type y : kinds) {
                    const bool ours = (x == Type::kInt8) == quantized && (y == Type::kInt8) == (form_ == Form::kRequantized);
                    const bool matches = agrees(0, x) && agrees(1, offset) && agrees(2, mask) && agrees(count, y) && (count == 3 || agrees(3, x));
                    if (ours && matches && is_supported(x, offset, mask, y, attributes_.record)) {
                        return true;
                    }
                }
            }
        }
    }
    return false;
}

std::int32_t Dcnv3Plugin::getValidTactics(std::int32_t* tactics, std::int32_t count) noexcept {
    if (count != getNbTactics()) {
        return kFailure;
    }
    std::copy(tactics_.begin(), tactics_.end(), tactics);
    return kSuccess;
}

std::int32_t Dcnv3Plugin::setTactic(std::int32_t tactic) noexcept {
    tactic_ = tactic;
    return kSuccess;
}

Tactic Dcnv3Plugin::tactic_for(const PluginTensorDesc& x, const PluginTensorDesc& y) const {
    if (tactic_ != 0) {
        return Tactic::of(tactic_);
    }
    // Without a timed choice: the widest kernel that still gives a large GPU enough threads.
    Type type = Type::kFloat;
    type_of(x.type, type);
    const std::int64_t channels = x.dims.d[3] / attributes_.group;
    const std::int64_t outputs = y.dims.d[0] * y.dims.d[1] * y.dims.d[2] * y.dims.d[3];
    constexpr std::int64_t kEnough = 132 * 1024;
    Tactic chosen{1, false};
    for (const Tactic& tactic : kTactics) {
        const bool wide_enough = tactic.width <= 2 || outputs / tactic.width >= kEnough;
        if (!tactic.paired && wide_enough && tactic.fits(type, channels)) {
            chosen = tactic;
        }
    }
    return chosen;
}

std::string Dcnv3Plugin::problem_of(const PluginTensorDesc* in, const PluginTensorDesc& out, const void* const* data, void* output, Tactic& tactic,
                                    Problem& problem) const {
    Operand operands[5];
    for (std::int32_t i = 0; i < inputs(); ++i) {
        if (auto error = operand_of(in[i], data ? data[i] : nullptr, operands[i]); !error.empty()) {
            return error;
        }
    }
    if (auto error = operand_of(out, output, operands[4]); !error.empty()) {
        return error;
    }
    tactic = tactic_for(in[0], out);
    return make_problem(attributes_, operands[0], operands[1], operands[2], operands[3], operands[4], tactic, problem);
}

std::int32_t Dcnv3Plugin::onShapeChange(const PluginTensorDesc* in, std::int32_t count, const PluginTensorDesc* out,
                                        std::int32_t outputs) noexcept {
    return guarded("onShapeChange", [&]() -> std::string {
        if (count != inputs() || outputs != 1) {
            return "wrong number of operands";
        }
        Tactic tactic;
        Problem problem;
        return problem_of(in, out[0], nullptr, nullptr, tactic, problem);
    });
}

std::int32_t Dcnv3Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* data, void* const* outputs, void*,
                                  cudaStream_t stream) noexcept {
    return guarded("enqueue", [&]() -> std::string {
        Tactic tactic;
        Problem problem;
        if (auto error = problem_of(in, out[0], data, outputs[0], tactic, problem); !error.empty()) {
            return error;
        }
        Type x = Type::kFloat, offset = x, mask = x;
        type_of(in[0].type, x), type_of(in[1].type, offset), type_of(in[2].type, mask);
        return launch(problem, x, offset, mask, tactic, stream);
    });
}

const nvinfer1::PluginFieldCollection* Dcnv3Plugin::getFieldsToSerialize() noexcept {
    const auto filled = guarded("getFieldsToSerialize", [&]() -> std::string {
        fields_.clear();
        Attributes::each(attributes_, [this](const char* name, const auto& value) {
            fields_.emplace_back(name, &value, field_type<std::decay_t<decltype(value)>>(), 1);
        });
        collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
        return {};
    });
    return filled == kSuccess ? &collection_ : nullptr;
}

Dcnv3Creator::Dcnv3Creator(Form form) : form_(form) {
    Attributes defaults;
    Attributes::each(defaults, [this](const char* name, const auto& value) {
        fields_.emplace_back(name, nullptr, field_type<std::decay_t<decltype(value)>>(), 1);
    });
    collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* Dcnv3Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                                nvinfer1::TensorRTPhase phase) noexcept {
    Dcnv3Plugin* made = nullptr;
    guarded(name ? name : getPluginName(), [&]() -> std::string {
        if (given == nullptr) {
            return "no attributes were given";
        }
        Attributes attributes;
        if (auto error = attributes_of(*given, phase, attributes); !error.empty()) {
            return error;
        }
        made = new Dcnv3Plugin(form_, attributes);
        return {};
    });
    return made;
}

}  // namespace deploycc
