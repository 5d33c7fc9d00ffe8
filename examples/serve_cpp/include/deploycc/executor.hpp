// What runs a model: a backend opens a variant of a bundle as a model, and a model gives each worker an executor.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "deploycc/bundle.hpp"

namespace deploycc {

// Runs batches one after another; belongs to one thread.
class Executor {
public:
    virtual ~Executor() = default;
    // Inputs in the model's order, within the profiles; outputs in the model's order.
    virtual Tensors run(const Tensors& inputs) = 0;
};

// A loaded model; may be shared by threads.
class Model {
public:
    virtual ~Model() = default;
    virtual std::unique_ptr<Executor> new_executor() = 0;
};

class Backend {
public:
    virtual ~Backend() = default;
    virtual std::string name() const = 0;
    // The kind of variants that it runs, e.g. "onnx".
    virtual std::string kind() const = 0;
    // Why it does not run `variant` here, or nothing. Decided from bundle.json and this machine; no file has been opened yet.
    virtual std::string refusal(const Variant& variant) const = 0;
    // Load a variant that it did not refuse. Throws Refusal.
    virtual std::unique_ptr<Model> load(const Bundle& bundle, const Variant& variant) const = 0;
};

// The backends of this build of the runner, best first.
std::vector<std::unique_ptr<Backend>> backends();

// Why an engine that needs `needs` does not run with the library and the GPU given, or nothing.
// `version` is like 10.16.1, `arch` like sm_89.
std::string mismatch(const Requirement& needs, const std::string& library, const std::string& version, const std::string& arch);

struct Choice {
    const Backend* backend = nullptr;
    const Variant* variant = nullptr;
};

// The first backend (of that name, unless it is "auto") with a variant that it does not refuse.
// Throws Refusal with the reason for each variant when there is none.
Choice choose(const Bundle& bundle, const std::vector<std::unique_ptr<Backend>>& from, const std::string& name);

}  // namespace deploycc
