#include <doctest/doctest.h>

#include <atomic>
#include <thread>

#include "deploycc/batcher.hpp"
#include "scratch.hpp"

using namespace deploycc;
using namespace std::chrono_literals;

namespace {

// The number of rows of every batch that ran, and a model that doubles its input; 13 is a number it cannot bear.
struct Recorder {
    std::mutex mutex;
    std::vector<std::int64_t> batches;

    Tensors operator()(const Tensors& inputs) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            batches.push_back(inputs[0].shape[0]);
        }
        Tensor output = inputs[0];
        output.name = "y";
        for (std::size_t i = 0; i < output.data.size() / sizeof(float); ++i) {
            if (output.as<float>()[i] == 13) throw Refusal(Kind::backend, "unlucky", "", "");
            output.as<float>()[i] *= 2;
        }
        return {output};
    }
};

Tensors request(float value, std::int64_t rows = 1, std::int64_t width = 2) {
    return {floats("x", {rows, width}, std::vector<float>(static_cast<std::size_t>(rows * width), value))};
}

Batcher make(Recorder& recorder, BatchRange range, std::chrono::microseconds delay = 200ms) {
    return Batcher(BatchOptions{range, delay, 100}, {std::ref(recorder)});
}

}  // namespace

TEST_CASE("joining and splitting are inverse") {
    const Tensors one = request(1, 2), two = request(5, 3);
    const Tensors joined = join({&one, &two});
    CHECK(joined[0].shape == Shape{5, 2});
    const std::vector<Tensors> parts = split(joined, {2, 3});
    CHECK(parts[0][0].data == one[0].data);
    CHECK(parts[1][0].data == two[0].data);
}

TEST_CASE("requests that arrive together run as one batch, and each gets its own rows") {
    Recorder recorder;
    std::vector<std::future<Tensors>> futures;
    {
        Batcher batcher = make(recorder, {1, 2, 6});
        for (int i = 0; i < 6; ++i) futures.push_back(batcher.submit(request(static_cast<float>(i))));
        for (int i = 0; i < 6; ++i) {
            const Tensors found = futures[static_cast<std::size_t>(i)].get();
            CHECK(found[0].shape == Shape{1, 2});
            CHECK(found[0].as<float>()[1] == 2.0F * static_cast<float>(i));
        }
    }
    // The full batch does not wait for the delay; the first request may have been taken before the others came.
    CHECK(recorder.batches == std::vector<std::int64_t>{6});
}

TEST_CASE("a batch never exceeds the largest of the profile") {
    Recorder recorder;
    {
        Batcher batcher = make(recorder, {1, 2, 4}, 50ms);
        std::vector<std::future<Tensors>> futures;
        for (int i = 0; i < 3; ++i) futures.push_back(batcher.submit(request(1, 3)));
        for (auto& future : futures) CHECK(future.get()[0].shape == Shape{3, 2});
    }
    CHECK(recorder.batches == std::vector<std::int64_t>{3, 3, 3});
}

TEST_CASE("only requests of one shape are joined") {
    Recorder recorder;
    {
        Batcher batcher = make(recorder, {1, 2, 8}, 50ms);
        auto first = batcher.submit(request(1, 1, 2)), other = batcher.submit(request(2, 1, 3)), third = batcher.submit(request(3, 1, 2));
        CHECK(first.get()[0].shape == Shape{1, 2});
        CHECK(third.get()[0].shape == Shape{1, 2});
        CHECK(other.get()[0].shape == Shape{1, 3});
    }
    CHECK(recorder.batches == std::vector<std::int64_t>{2, 1});
}

TEST_CASE("a lone request waits no longer than the delay") {
    Recorder recorder;
    Batcher batcher = make(recorder, {1, 2, 8}, 20ms);
    const auto start = std::chrono::steady_clock::now();
    batcher.submit(request(1)).get();
    const auto waited = std::chrono::steady_clock::now() - start;
    CHECK(waited >= 20ms);
    CHECK(waited < 5s);
}

TEST_CASE("a batch below the smallest of the profile is filled up and cut again") {
    Recorder recorder;
    Batcher batcher = make(recorder, {4, 4, 8}, 1ms);
    const Tensors found = batcher.submit(request(3, 2)).get();
    CHECK(found[0].shape == Shape{2, 2});
    CHECK(found[0].as<float>()[3] == 6.0F);
    CHECK(recorder.batches == std::vector<std::int64_t>{4});
}

TEST_CASE("one bad request does not harm those of its batch") {
    Recorder recorder;
    Batcher batcher = make(recorder, {1, 2, 3});
    auto good = batcher.submit(request(1)), bad = batcher.submit(request(13)), fine = batcher.submit(request(2));
    CHECK(good.get()[0].as<float>()[0] == 2.0F);
    CHECK(contains(refusal_of([&] { bad.get(); }), "unlucky"));
    CHECK(fine.get()[0].as<float>()[0] == 4.0F);
}

TEST_CASE("too many waiting requests are refused at once, and what waits is finished at the end") {
    Recorder recorder;
    std::vector<std::future<Tensors>> futures;
    {
        std::promise<void> gate;
        std::shared_future<void> open = gate.get_future().share();
        Batcher batcher(BatchOptions{std::nullopt, 0us, 2}, {[&recorder, open](const Tensors& inputs) {
                            open.wait();
                            return recorder(inputs);
                        }});
        futures.push_back(batcher.submit(request(1)));
        // Until the worker has taken the first, it counts as waiting.
        while (futures.size() < 3) {
            try {
                futures.push_back(batcher.submit(request(1)));
            } catch (const Busy&) {
                std::this_thread::yield();
            }
        }
        CHECK_THROWS_AS(
            for (int i = 0; i < 2; ++i) futures.push_back(batcher.submit(request(1)));, Busy);
        gate.set_value();
    }
    for (auto& future : futures) CHECK(future.get()[0].as<float>()[0] == 2.0F);
}

TEST_CASE("many clients and several workers: every answer belongs to its question") {
    std::atomic<int> rows{0};
    const auto twice = [&rows](const Tensors& inputs) {
        rows += static_cast<int>(inputs[0].shape[0]);
        Recorder recorder;
        return recorder(inputs);
    };
    std::atomic<int> wrong{0};
    {
        Batcher batcher(BatchOptions{BatchRange{1, 2, 8}, 100us, 1000}, {twice, twice, twice});
        std::vector<std::thread> clients;
        for (int client = 0; client < 8; ++client) {
            clients.emplace_back([&, client] {
                for (int i = 0; i < 50; ++i) {
                    const float value = static_cast<float>(client * 1000 + i + 14);
                    if (batcher.submit(request(value, 1 + i % 3)).get()[0].as<float>()[0] != 2 * value) ++wrong;
                }
            });
        }
        for (std::thread& each : clients) each.join();
    }
    CHECK(wrong == 0);
    CHECK(rows == 8 * (17 * 1 + 17 * 2 + 16 * 3));
}
