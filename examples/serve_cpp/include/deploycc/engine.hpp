// The library's front door: open a bundle, check it against its golden outputs, infer.
#pragma once

#include <filesystem>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "deploycc/batcher.hpp"
#include "deploycc/bundle.hpp"
#include "deploycc/executor.hpp"

namespace deploycc {

struct EngineOptions {
    std::string executor = "auto";  // or tensorrt, tensorrt-rtx, onnxruntime, opencv
    std::size_t workers = 1;        // each has an execution context of its own
    std::chrono::microseconds batch_delay{500};
    std::size_t queue = 1024;
    bool golden_check = true;
};

// How one output compares with its golden output.
struct GoldenResult {
    std::string output;
    double sqnr_db = 0.0, minimum_sqnr_db = 0.0;
    bool passed() const { return sqnr_db >= minimum_sqnr_db; }
};

class Engine {
public:
    // Throws Refusal: a damaged bundle, nothing that runs here, or (with golden_check) wrong outputs.
    explicit Engine(const std::filesystem::path& bundle, const EngineOptions& options = {});
    ~Engine();

    // Run one request; waits for its batch. Safe to call from any thread. Throws Refusal for inputs that do not fit.
    Tensors infer(Tensors inputs);
    std::future<Tensors> infer_async(Tensors inputs);

    const Bundle& bundle() const { return *bundle_; }
    // The backend and the file that were chosen, e.g. "opencv: portable.onnx".
    std::string description() const;
    // Of the golden check at start; empty without one.
    const std::vector<GoldenResult>& golden() const { return golden_; }

private:
    void check_golden(const std::vector<std::unique_ptr<Executor>>& executors);

    std::unique_ptr<Bundle> bundle_;
    std::vector<std::unique_ptr<Backend>> backends_;
    Choice choice_;
    std::unique_ptr<Model> model_;
    std::vector<std::unique_ptr<Executor>> executors_;
    std::vector<GoldenResult> golden_;
    std::unique_ptr<Batcher> batcher_;  // last, so that it stops before what it uses goes away
};

}  // namespace deploycc
