#include "deploycc/batcher.hpp"

#include <algorithm>

#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

std::int64_t rows_of(const Tensors& request) { return request.at(0).shape.at(0); }

bool is_compatible(const Tensors& one, const Tensors& other) {
    return std::equal(one.begin(), one.end(), other.begin(), other.end(), [](const Tensor& a, const Tensor& b) {
        return a.shape.size() == b.shape.size() && std::equal(a.shape.begin() + 1, a.shape.end(), b.shape.begin() + 1);
    });
}

}  // namespace

Tensors join(const std::vector<const Tensors*>& requests) {
    Tensors joined;
    for (std::size_t i = 0; i < requests.at(0)->size(); ++i) {
        std::vector<const Tensor*> parts;
        for (const Tensors* request : requests) parts.push_back(&(*request)[i]);
        joined.push_back(stack(parts));
    }
    return joined;
}

std::vector<Tensors> split(const Tensors& outputs, const std::vector<std::int64_t>& counts) {
    std::vector<Tensors> found(counts.size());
    for (const Tensor& output : outputs) {
        std::int64_t begin = 0;
        for (std::size_t i = 0; i < counts.size(); ++i) {
            found[i].push_back(rows(output, begin, begin + counts[i]));
            begin += counts[i];
        }
    }
    return found;
}

Batcher::Batcher(BatchOptions options, std::vector<Run> workers) : options_(options) {
    for (Run& run : workers) threads_.emplace_back([this, run = std::move(run)] { work(run); });
}

Batcher::~Batcher() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    arrived_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

std::future<Tensors> Batcher::submit(Tensors inputs) {
    std::future<Tensors> future;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (closing_ || queue_.size() >= options_.capacity) {
            throw Busy(Kind::backend, "too many requests wait", "", "try again later, or start the server with more workers");
        }
        queue_.push_back(Request{std::move(inputs), {}, Clock::now()});
        future = queue_.back().promise.get_future();
    }
    arrived_.notify_all();
    return future;
}

void Batcher::work(const Run& run) {
    for (std::vector<Request> batch = next_batch(); !batch.empty(); batch = next_batch()) serve(std::move(batch), run);
}

// Wait for a request, then for others until the batch is full or the first has waited for the delay. Empty when closing.
std::vector<Batcher::Request> Batcher::next_batch() {
    std::unique_lock<std::mutex> lock(mutex_);
    arrived_.wait(lock, [this] { return closing_ || !queue_.empty(); });
    std::vector<Request> batch;
    if (queue_.empty()) return batch;
    batch.push_back(std::move(queue_.front()));
    queue_.pop_front();
    if (!options_.range) return batch;
    std::int64_t rows = rows_of(batch.front().inputs);
    const Clock::time_point deadline = batch.front().arrival + options_.delay;
    for (;;) {
        const std::size_t waiting = take_compatible(batch, rows);
        if (rows >= options_.range->maximum || closing_) break;
        if (!arrived_.wait_until(lock, deadline, [&] { return closing_ || queue_.size() > waiting; })) break;
    }
    return batch;
}

// Move from the queue, in order, what fits into `batch`; return how many requests remain there.
std::size_t Batcher::take_compatible(std::vector<Request>& batch, std::int64_t& rows) {
    for (auto each = queue_.begin(); each != queue_.end();) {
        const std::int64_t more = rows_of(each->inputs);
        if (rows + more > options_.range->maximum || !is_compatible(batch.front().inputs, each->inputs)) {
            ++each;
            continue;
        }
        rows += more;
        batch.push_back(std::move(*each));
        each = queue_.erase(each);
    }
    return queue_.size();
}

void Batcher::serve(std::vector<Request> batch, const Run& run) const {
    std::vector<const Tensors*> inputs;
    std::vector<std::int64_t> counts;
    for (const Request& request : batch) {
        inputs.push_back(&request.inputs);
        counts.push_back(options_.range ? rows_of(request.inputs) : 0);
    }
    try {
        if (batch.size() == 1) {
            batch.front().promise.set_value(run_padded(batch.front().inputs, run));
            return;
        }
        std::vector<Tensors> results = split(run_padded(join(inputs), run), counts);
        for (std::size_t i = 0; i < batch.size(); ++i) batch[i].promise.set_value(std::move(results[i]));
    } catch (...) {
        if (batch.size() == 1) {
            batch.front().promise.set_exception(std::current_exception());
            return;
        }
        // One request may be at fault: the others must not suffer for it.
        for (Request& request : batch) {
            std::vector<Request> alone;
            alone.push_back(std::move(request));
            serve(std::move(alone), run);
        }
    }
}

// Run a batch; one below the smallest that the model takes is filled up with its last row, which is then cut off.
Tensors Batcher::run_padded(const Tensors& inputs, const Run& run) const {
    if (!options_.range || rows_of(inputs) >= options_.range->minimum) return run(inputs);
    const std::int64_t count = rows_of(inputs);
    Tensors padded;
    for (const Tensor& input : inputs) {
        const Tensor last = rows(input, count - 1, count);
        std::vector<const Tensor*> parts(static_cast<std::size_t>(options_.range->minimum - count) + 1, &last);
        parts[0] = &input;
        padded.push_back(stack(parts));
    }
    return split(run(padded), {count}).front();
}

}  // namespace deploycc
