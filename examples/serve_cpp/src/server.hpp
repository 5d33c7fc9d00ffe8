#pragma once

#include <functional>
#include <string>

#include "deploycc/engine.hpp"

namespace deploycc {

struct ServerOptions {
    std::string host = "127.0.0.1";
    int port = 8000;  // 0: any free one
    std::size_t connections = 32;
};

// Let only `serve` see SIGINT and SIGTERM. Call it before any thread is started.
void block_stop_signals();

// Serve `engine` over HTTP until SIGINT or SIGTERM; `ready` is called with the port once it listens. Throws Refusal.
void serve(Engine& engine, const ServerOptions& options, const std::function<void(int)>& ready);

}  // namespace deploycc
