#include "deploycc/engine.hpp"

#include <algorithm>
#include <cstdio>

#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

std::string decibels(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f dB", value);
    return text;
}

const Tensor& named(const Tensors& tensors, const std::string& name) {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.name == name; });
    if (found == tensors.end()) throw Refusal(Kind::backend, "the model did not give the output '" + name + "'", "", "bundle the build again");
    return *found;
}

}  // namespace

Engine::Engine(const std::filesystem::path& bundle, const EngineOptions& options)
    : bundle_(std::make_unique<Bundle>(open_bundle(bundle))), backends_(deploycc::backends()), choice_(choose(*bundle_, backends_, options.executor)) {
    model_ = choice_.backend->load(*bundle_, *choice_.variant);
    for (std::size_t i = 0; i < std::max<std::size_t>(options.workers, 1); ++i) executors_.push_back(model_->new_executor());
    if (options.golden_check) check_golden(executors_);
    std::vector<Batcher::Run> workers;
    for (const auto& executor : executors_) workers.push_back([&executor = *executor](const Tensors& inputs) { return executor.run(inputs); });
    batcher_ = std::make_unique<Batcher>(BatchOptions{bundle_->batch, options.batch_delay, options.queue}, std::move(workers));
}

Engine::~Engine() = default;

// Every worker must reproduce the golden outputs; what is kept is the worst of each output.
void Engine::check_golden(const std::vector<std::unique_ptr<Executor>>& executors) {
    const Tensors inputs = golden_inputs(*bundle_), expected = golden_outputs(*bundle_, *choice_.variant);
    for (const GoldenOutput& golden : choice_.variant->golden) golden_.push_back({golden.output, 200.0, golden.minimum_sqnr_db});
    for (const auto& executor : executors) {
        const Tensors found = executor->run(inputs);
        for (std::size_t i = 0; i < golden_.size(); ++i) {
            golden_[i].sqnr_db = std::min(golden_[i].sqnr_db, sqnr_db(expected[i], named(found, golden_[i].output)));
        }
    }
    for (const GoldenResult& result : golden_) {
        if (!result.passed()) {
            const std::string what = "the output '" + result.output + "' is at " + decibels(result.sqnr_db) + " from its golden output, " + decibels(result.minimum_sqnr_db) + " are needed";
            throw Refusal(Kind::contract, what, description(), "do not serve this; build and bundle again, and report it if that does not help");
        }
    }
}

Tensors Engine::infer(Tensors inputs) { return infer_async(std::move(inputs)).get(); }

std::future<Tensors> Engine::infer_async(Tensors inputs) { return batcher_->submit(checked_inputs(*bundle_, std::move(inputs))); }

std::string Engine::description() const { return choice_.backend->name() + ": " + choice_.variant->path; }

}  // namespace deploycc
