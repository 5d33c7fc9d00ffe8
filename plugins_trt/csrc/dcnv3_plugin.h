// DCNv3 as a TensorRT plugin (IPluginV3: core, build and runtime in one class) and its creators, one per form of the operator.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "dcnv3_problem.h"

namespace deploycc {

// The forms of the operator, as in deploycc/core/dcnv3.py.
enum class Form : std::int32_t { kPlain, kCenter, kDequantized, kRequantized };

constexpr const char* kNames[] = {"DCNv3", "DCNv3Center", "DCNv3DQ", "DCNv3DQQ"};
constexpr const char* kVersion = "1";
// Part of the timing cache's key; raise it whenever a kernel changes its speed.
constexpr int kKernelRevision = 1;

class Dcnv3Plugin final : public nvinfer1::IPluginV3,
                          public nvinfer1::IPluginV3OneCore,
                          public nvinfer1::IPluginV3OneBuild,
                          public nvinfer1::IPluginV3OneRuntime {
public:
    Dcnv3Plugin(Form form, const Attributes& attributes);
    Dcnv3Plugin(const Dcnv3Plugin& other);
    Dcnv3Plugin& operator=(const Dcnv3Plugin&) = delete;

    const Attributes& attributes() const { return attributes_; }
    std::int32_t tactic() const { return tactic_; }

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    const char* getPluginName() const noexcept override { return kNames[static_cast<int>(form_)]; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return ""; }

    // IPluginV3OneBuild
    std::int32_t getNbOutputs() const noexcept override { return 1; }
    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, std::int32_t inputs, const nvinfer1::DynamicPluginTensorDesc* out,
                                 std::int32_t outputs) noexcept override;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* out, std::int32_t outputs, const nvinfer1::DataType* in,
                                    std::int32_t inputs) const noexcept override;
    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* in, std::int32_t inputs, const nvinfer1::DimsExprs* shapes, std::int32_t shapeInputs,
                                 nvinfer1::DimsExprs* out, std::int32_t outputs, nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* all, std::int32_t inputs,
                                   std::int32_t outputs) noexcept override;
    std::int32_t getNbTactics() noexcept override { return static_cast<std::int32_t>(tactics_.size()); }
    std::int32_t getValidTactics(std::int32_t* tactics, std::int32_t count) noexcept override;
    const char* getTimingCacheID() noexcept override { return cache_key_.c_str(); }
    std::int32_t getFormatCombinationLimit() noexcept override { return 8; }

    // IPluginV3OneRuntime
    std::int32_t setTactic(std::int32_t tactic) noexcept override;
    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, std::int32_t inputs, const nvinfer1::PluginTensorDesc* out,
                               std::int32_t outputs) noexcept override;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out, const void* const* inputs,
                         void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    std::int32_t inputs() const { return form_ == Form::kCenter ? 4 : 3; }
    Tactic tactic_for(const nvinfer1::PluginTensorDesc& x, const nvinfer1::PluginTensorDesc& y) const;
    std::string problem_of(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc& out, const void* const* inputs, void* output,
                           Tactic& tactic, Problem& problem) const;

    Form form_;
    Attributes attributes_;
    std::int32_t tactic_ = 0;
    std::vector<std::int32_t> tactics_;
    std::string cache_key_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

class Dcnv3Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Dcnv3Creator(Form form);

    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return kNames[static_cast<int>(form_)]; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return ""; }

private:
    Form form_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

// Report an error through TensorRT's logger, or on standard error where there is none.
void log_error(const std::string& text) noexcept;

}  // namespace deploycc
