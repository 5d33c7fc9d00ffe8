// Dynamic batching: requests that arrive within a short delay are joined along the first dimension and run as one batch.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "deploycc/bundle.hpp"
#include "deploycc/tensor.hpp"

namespace deploycc {

struct BatchOptions {
    std::optional<BatchRange> range;  // without one, every request runs alone
    std::chrono::microseconds delay{500};
    std::size_t capacity = 1024;  // requests that may wait
};

// Joined inputs of several requests, and how many rows each of them brought.
Tensors join(const std::vector<const Tensors*>& requests);
// The rows of each request, from the outputs of a joined batch.
std::vector<Tensors> split(const Tensors& outputs, const std::vector<std::int64_t>& rows);

class Batcher {
public:
    using Run = std::function<Tensors(const Tensors&)>;

    // One thread per function; each function is called by its own thread only.
    Batcher(BatchOptions options, std::vector<Run> workers);
    // Finishes what waits.
    ~Batcher();

    // Throws Refusal when too many requests wait. The future throws what the worker threw.
    std::future<Tensors> submit(Tensors inputs);

private:
    using Clock = std::chrono::steady_clock;
    struct Request {
        Tensors inputs;
        std::promise<Tensors> promise;
        Clock::time_point arrival;
    };

    void work(const Run& run);
    std::vector<Request> next_batch();
    std::size_t take_compatible(std::vector<Request>& batch, std::int64_t& rows);
    void serve(std::vector<Request> batch, const Run& run) const;
    Tensors run_padded(const Tensors& inputs, const Run& run) const;

    BatchOptions options_;
    std::mutex mutex_;
    std::condition_variable arrived_;
    std::deque<Request> queue_;
    bool closing_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace deploycc
