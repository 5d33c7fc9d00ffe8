// The plugin class and its creators without TensorRT: shapes through an expression builder of the test's own, format combinations,
// clone, serialisation, refusals, and a whole enqueue, whose launch computes on the CPU (launch_cpu.cpp).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <set>
#include <thread>

#include "../dcnv3_plugin.h"

using namespace nvinfer1;
using deploycc::Dcnv3Creator;
using deploycc::Dcnv3Plugin;
using deploycc::Form;

namespace deploycc {
static std::vector<std::string> logged;
void log_error(const std::string& text) noexcept { logged.push_back(text); }
}  // namespace deploycc

namespace {

int failures = 0;

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);        \
            ++failures;                                                        \
        }                                                                      \
    } while (false)

// Expressions over known dimensions.
class Expression final : public IDimensionExpr, public apiv::VDimensionExpr {
public:
    explicit Expression(std::int64_t value) : value_(value) { mImpl = this; }
    ~Expression() noexcept override = default;
    bool isConstant() const noexcept override { return true; }
    std::int64_t getConstantValue() const noexcept override { return value_; }
    bool isSizeTensor() const noexcept override { return false; }

private:
    std::int64_t value_;
};

class Builder final : public IExprBuilder, public apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }
    ~Builder() noexcept override = default;
    const IDimensionExpr* constant(std::int64_t value) noexcept override { return &made_.emplace_back(value); }
    const IDimensionExpr* operation(DimensionOperation operation, const IDimensionExpr& a, const IDimensionExpr& b) noexcept override {
        const std::int64_t x = a.getConstantValue(), y = b.getConstantValue();
        switch (operation) {
            case DimensionOperation::kSUM: return constant(x + y);
            case DimensionOperation::kSUB: return constant(x - y);
            case DimensionOperation::kPROD: return constant(x * y);
            case DimensionOperation::kFLOOR_DIV: return constant(x / y);
            default: return nullptr;
        }
    }
    const IDimensionExpr* declareSizeTensor(std::int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }

private:
    std::deque<Expression> made_;
};

// The fields of a creator, as the ONNX parser makes them of the attributes of a node.
struct Fields {
    std::deque<std::int32_t> whole;
    std::deque<std::int64_t> wide;
    std::deque<float> real;
    std::vector<PluginField> list;
    PluginFieldCollection collection{};

    Fields& add(const char* name, int value) {
        list.emplace_back(name, &whole.emplace_back(value), PluginFieldType::kINT32, 1);
        return *this;
    }
    Fields& add_wide(const char* name, std::int64_t value) {
        list.emplace_back(name, &wide.emplace_back(value), PluginFieldType::kINT64, 1);
        return *this;
    }
    Fields& add(const char* name, float value) {
        list.emplace_back(name, &real.emplace_back(value), PluginFieldType::kFLOAT32, 1);
        return *this;
    }
    const PluginFieldCollection* get() {
        collection = {static_cast<std::int32_t>(list.size()), list.data()};
        return &collection;
    }
};

std::unique_ptr<Dcnv3Plugin> create(Fields& fields, Form form = Form::kPlain, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    Dcnv3Creator creator(form);
    return std::unique_ptr<Dcnv3Plugin>(static_cast<Dcnv3Plugin*>(creator.createPlugin("test", fields.get(), phase)));
}

DynamicPluginTensorDesc described(std::initializer_list<std::int64_t> shape, DataType type) {
    DynamicPluginTensorDesc made{};
    made.desc.type = type;
    made.desc.format = TensorFormat::kLINEAR;
    made.desc.dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), made.desc.dims.d);
    return made;
}

void output_shapes() {
    struct Row {
        int kernel, stride, pad, dilation;
    };
    for (const Row& row : {Row{3, 1, 1, 1}, {3, 2, 1, 1}, {3, 3, 0, 2}, {2, 2, 0, 1}, {4, 1, 2, 2}, {5, 2, 2, 1}}) {
        Fields fields;
        fields.add("group", 4).add("kernel_h", row.kernel).add("kernel_w", row.kernel).add("stride_h", row.stride).add("stride_w", row.stride);
        fields.add("pad_h", row.pad).add("pad_w", row.pad).add("dilation_h", row.dilation).add("dilation_w", row.dilation);
        auto plugin = create(fields);
        CHECK(plugin);
        Builder builder;
        DimsExprs in[3], out[1];
        for (auto& each : in) {
            each.nbDims = 4;
            const std::int64_t sizes[] = {7, 56, 55, 64};
            for (int i = 0; i < 4; ++i) {
                each.d[i] = builder.constant(sizes[i]);
            }
        }
        CHECK(plugin->getOutputShapes(in, 3, nullptr, 0, out, 1, builder) == 0);
        CHECK(out[0].nbDims == 4 && out[0].d[0]->getConstantValue() == 7 && out[0].d[3]->getConstantValue() == 64);
        // Slide the window and count: the formula under test is not repeated here.
        const auto places = [&row](int size) {
            int count = 0;
            for (int start = -row.pad; start + row.dilation * (row.kernel - 1) < size + row.pad; start += row.stride) {
                ++count;
            }
            return count;
        };
        CHECK(out[0].d[1]->getConstantValue() == places(56));
        CHECK(out[0].d[2]->getConstantValue() == places(55));
        CHECK(plugin->getOutputShapes(in, 2, nullptr, 0, out, 1, builder) != 0);
    }
}

bool accepted(Dcnv3Plugin& plugin, std::initializer_list<DataType> types) {
    std::vector<DynamicPluginTensorDesc> all;
    for (DataType type : types) {
        all.push_back(described({1, 8, 8, 64}, type));
    }
    const auto inputs = static_cast<std::int32_t>(types.size()) - 1;
    for (std::int32_t position = 0; position <= inputs; ++position) {
        if (!plugin.supportsFormatCombination(position, all.data(), inputs, 1)) {
            return false;
        }
    }
    return true;
}

void format_combinations() {
    constexpr auto F = DataType::kFLOAT, H = DataType::kHALF, B = DataType::kBF16, I = DataType::kINT8;
    Fields plain, record;
    auto plugin = create(plain.add("group", 4));
    CHECK(accepted(*plugin, {F, F, F, F}));
    CHECK(accepted(*plugin, {H, H, H, H}));
    CHECK(accepted(*plugin, {H, F, H, H}));
    CHECK(accepted(*plugin, {B, H, B, B}));
    CHECK(accepted(*plugin, {B, F, B, B}));
    CHECK(!accepted(*plugin, {B, B, B, B}));  // offsets are never BF16
    CHECK(!accepted(*plugin, {F, H, F, F}));
    CHECK(!accepted(*plugin, {H, H, H, F}));
    CHECK(!accepted(*plugin, {I, H, H, H}));  // the plain form has no scale for INT8
    CHECK(!accepted(*plugin, {DataType::kFP8, H, H, H}));
    CHECK(!accepted(*plugin, {DataType::kINT32, H, H, H}));
    auto recorded = create(record.add("group", 4).add("record", 1));
    CHECK(accepted(*recorded, {H, H, H, H}));
    CHECK(accepted(*recorded, {B, F, F, B}));
    CHECK(!accepted(*recorded, {B, H, B, B}));  // one tensor has one type
    auto dequantized = create(plain, Form::kDequantized), requantized = create(plain, Form::kRequantized);
    CHECK(accepted(*dequantized, {I, H, H, H}));
    CHECK(!accepted(*dequantized, {I, H, H, I}));
    CHECK(!accepted(*dequantized, {H, H, H, H}));
    CHECK(!accepted(*dequantized, {I, I, H, H}));  // offsets are never INT8
    CHECK(accepted(*requantized, {I, H, H, I}));
    CHECK(!accepted(*requantized, {I, H, H, H}));
    auto center = create(plain, Form::kCenter);
    CHECK(accepted(*center, {H, H, H, H, H}));
    CHECK(!accepted(*center, {H, H, H, F, H}));
    auto other = described({1, 8, 8, 64}, H);
    other.desc.format = TensorFormat::kCHW4;
    CHECK(!plugin->supportsFormatCombination(0, &other, 3, 1));
    DataType in[] = {I, H, H, H}, out[1];
    CHECK(requantized->getOutputDataTypes(out, 1, in, 3) == 0 && out[0] == I);
    CHECK(dequantized->getOutputDataTypes(out, 1, in, 3) == 0 && out[0] == H);
    in[0] = B;
    CHECK(plugin->getOutputDataTypes(out, 1, in, 3) == 0 && out[0] == B);
}

void configuration_and_tactics() {
    Fields fields;
    auto plugin = create(fields.add("group", 4));
    const auto configure = [&plugin](DataType type, std::int64_t channels, std::int64_t offsets) {
        const DynamicPluginTensorDesc in[] = {described({-1, -1, -1, channels}, type), described({-1, -1, -1, offsets}, DataType::kHALF),
                                              described({-1, -1, -1, 36}, type)};
        const auto out = described({-1, -1, -1, channels}, type);
        return plugin->configurePlugin(in, 3, &out, 1);
    };
    const auto tactics = [&plugin] {
        std::vector<std::int32_t> found(plugin->getNbTactics());
        CHECK(plugin->getValidTactics(found.data(), plugin->getNbTactics()) == 0);
        CHECK(std::set<std::int32_t>(found.begin(), found.end()).size() == found.size());
        CHECK(std::find(found.begin(), found.end(), 0) == found.end());
        return found.size();
    };
    CHECK(configure(DataType::kHALF, 64, 72) == 0);
    CHECK(tactics() == 9);  // 16 channels per group: five widths in FP32, four in pairs
    CHECK(configure(DataType::kBF16, 64, 72) == 0);
    CHECK(tactics() == 5);
    CHECK(configure(DataType::kHALF, 24, 72) == 0);
    CHECK(tactics() == 3);  // 6 channels: 1 and 2, and 2 in pairs
    deploycc::logged.clear();
    CHECK(configure(DataType::kHALF, -1, 72) != 0);
    CHECK(configure(DataType::kHALF, 62, 72) != 0);
    CHECK(configure(DataType::kHALF, 64, 64) != 0);
    CHECK(deploycc::logged.size() == 3 && deploycc::logged[2].find("offset must be [N, Ho, Wo, 72]") != std::string::npos);
}

void creation() {
    Fields wide;
    auto plugin = create(wide.add_wide("group", 8).add("offset_scale", 2.0f).add("plugin_version", 1));
    CHECK(plugin && plugin->attributes().group == 8 && plugin->attributes().offset_scale == 2.0f && plugin->attributes().kernel_h == 3);
    const auto refuses = [](const char* word, auto fill, TensorRTPhase phase = TensorRTPhase::kBUILD) {
        Fields fields;
        fill(fields);
        deploycc::logged.clear();
        CHECK(!create(fields, Form::kPlain, phase));
        CHECK(deploycc::logged.size() == 1 && deploycc::logged[0].find(word) != std::string::npos);
    };
    refuses("group is 0", [](Fields&) {});
    refuses("kernel_w is -3", [](Fields& f) { f.add("group", 4).add("kernel_w", -3); });
    refuses("stride_h is 0", [](Fields& f) { f.add("group", 4).add("stride_h", 0); });
    refuses("pad_w is -1", [](Fields& f) { f.add("group", 4).add("pad_w", -1); });
    refuses("remove_center is 2", [](Fields& f) { f.add("group", 4).add("remove_center", 2); });
    refuses("odd square kernel", [](Fields& f) { f.add("group", 4).add("remove_center", 1).add("kernel_h", 2); });
    refuses("must be positive", [](Fields& f) { f.add("group", 4).add("offset_scale", std::nanf("")); });
    refuses("must be positive", [](Fields& f) { f.add("group", 4).add("y_scale", 0.0f); });
    refuses("group has the wrong type", [](Fields& f) { f.add("group", 4.0f); });
    refuses("group is too large", [](Fields& f) { f.add_wide("group", std::int64_t{1} << 40); });
    refuses("no attribute im2col_step", [](Fields& f) { f.add("group", 4).add("im2col_step", 256); });
    Fields later;
    CHECK(create(later.add("group", 4).add("of_a_later_version", 1), Form::kPlain, TensorRTPhase::kRUNTIME));
    Dcnv3Creator creator(Form::kCenter);
    deploycc::logged.clear();
    CHECK(creator.createPlugin("none", nullptr, TensorRTPhase::kBUILD) == nullptr && deploycc::logged.size() == 1);
    CHECK(std::strcmp(creator.getPluginName(), "DCNv3Center") == 0 && creator.getFieldNames()->nbFields == 15);
}

void serialisation_and_clone() {
    Fields fields;
    fields.add("group", 4).add("kernel_h", 5).add("kernel_w", 5).add("stride_h", 2).add("pad_w", 3).add("dilation_w", 2);
    fields.add("offset_scale", 0.75f).add("remove_center", 1).add("softmax", 1).add("x_scale", 0.125f).add("y_scale", 0.5f);
    for (Form form : {Form::kPlain, Form::kCenter, Form::kDequantized, Form::kRequantized}) {
        auto plugin = create(fields, form);
        Dcnv3Creator creator(form);
        std::unique_ptr<Dcnv3Plugin> again(
            static_cast<Dcnv3Plugin*>(creator.createPlugin("again", plugin->getFieldsToSerialize(), TensorRTPhase::kRUNTIME)));
        std::unique_ptr<Dcnv3Plugin> copy(static_cast<Dcnv3Plugin*>(plugin->clone()));
        CHECK(plugin->setTactic(40) == 0);
        std::unique_ptr<Dcnv3Plugin> attached(static_cast<Dcnv3Plugin*>(plugin->attachToContext(nullptr)));
        CHECK(attached->tactic() == 40 && copy->tactic() == 0);
        for (Dcnv3Plugin* other : {again.get(), copy.get(), attached.get()}) {
            CHECK(std::strcmp(other->getPluginName(), plugin->getPluginName()) == 0);
            // The key of the timing cache names every attribute.
            CHECK(std::strcmp(other->getTimingCacheID(), plugin->getTimingCacheID()) == 0);
            CHECK(std::memcmp(&other->attributes(), &plugin->attributes(), sizeof(deploycc::Attributes)) == 0);
        }
        for (auto type : {PluginCapabilityType::kCORE, PluginCapabilityType::kBUILD, PluginCapabilityType::kRUNTIME}) {
            CHECK(plugin->getCapabilityInterface(type) != nullptr);
        }
    }
    Fields changed;
    CHECK(std::strcmp(create(changed.add("group", 4))->getTimingCacheID(), create(fields)->getTimingCacheID()) != 0);
}

// Zero offsets and a mask of one point copy the image: every tactic, and several contexts at once.
void enqueue() {
    constexpr int kHeight = 6, kWidth = 5, kChannels = 32, kGroup = 2, kPoint = 4;
    constexpr int kPixels = 2 * kHeight * kWidth;
    std::vector<float> x(kPixels * kChannels), offset(kPixels * kGroup * 18, 0.0f), mask(kPixels * kGroup * 9, 0.0f);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i % 1009) - 504.0f;
    }
    for (int i = 0; i < kPixels * kGroup; ++i) {
        mask[i * 9 + kPoint] = 1.0f;
    }
    Fields fields;
    auto plugin = create(fields.add("group", kGroup));
    const PluginTensorDesc in[] = {described({2, kHeight, kWidth, kChannels}, DataType::kFLOAT).desc,
                                   described({2, kHeight, kWidth, kGroup * 18}, DataType::kFLOAT).desc,
                                   described({2, kHeight, kWidth, kGroup * 9}, DataType::kFLOAT).desc};
    const PluginTensorDesc out[] = {in[0]};
    const void* data[] = {x.data(), offset.data(), mask.data()};
    for (std::int32_t tactic : {0, 1, 2, 4, 8, 16}) {
        CHECK(plugin->setTactic(tactic) == 0);
        CHECK(plugin->onShapeChange(in, 3, out, 1) == 0);
        std::vector<std::vector<float>> results(3, std::vector<float>(x.size(), -1.0f));
        std::vector<std::unique_ptr<Dcnv3Plugin>> contexts;
        std::vector<std::thread> threads;
        for (auto& result : results) {
            contexts.emplace_back(static_cast<Dcnv3Plugin*>(plugin->attachToContext(nullptr)));
            threads.emplace_back([&, context = contexts.back().get(), to = result.data()] {
                void* outputs[] = {to};
                CHECK(context->enqueue(in, out, data, outputs, nullptr, nullptr) == 0);
            });
        }
        for (auto& thread : threads) {
            thread.join();
        }
        for (const auto& result : results) {
            CHECK(result == x);
        }
    }
    deploycc::logged.clear();
    CHECK(plugin->setTactic(32 + 16) == 0);  // FP16 pairs do not fit FP32 values
    void* outputs[] = {x.data()};
    CHECK(plugin->onShapeChange(in, 3, out, 1) != 0);
    CHECK(plugin->enqueue(in, out, data, outputs, nullptr, nullptr) != 0);
    CHECK(deploycc::logged.size() == 2 && deploycc::logged[1].find("enqueue: tactic 48 does not fit") != std::string::npos);
    PluginTensorDesc wrong[] = {in[0], in[1], in[2]};
    wrong[1].dims.d[1] = kHeight - 1;
    CHECK(plugin->setTactic(1) == 0);
    CHECK(plugin->onShapeChange(wrong, 3, out, 1) != 0);
}

}  // namespace

int main() {
    output_shapes();
    format_combinations();
    configuration_and_tactics();
    creation();
    serialisation_and_clone();
    enqueue();
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures ? 1 : 0;
}
