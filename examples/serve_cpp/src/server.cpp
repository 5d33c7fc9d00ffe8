#include "server.hpp"

#include <httplib.h>

#include <atomic>
#include <csignal>
#include <cstring>

#include "deploycc/protocol.hpp"
#include "deploycc/refusal.hpp"

namespace deploycc {
namespace {

constexpr const char* JSON = "application/json";
constexpr const char* JSON_LENGTH = "Inference-Header-Content-Length";

void answer(httplib::Response& response, int status, const std::string& body) {
    response.status = status;
    response.set_content(body, JSON);
}

std::optional<std::size_t> json_length(const httplib::Request& request) {
    if (!request.has_header(JSON_LENGTH)) return std::nullopt;
    const std::string text = request.get_header_value(JSON_LENGTH);
    if (text.empty() || text.size() > 12 || !std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); })) {
        throw Refusal(Kind::usage, std::string(JSON_LENGTH) + " is no number", "", "send the length of the JSON part");
    }
    return std::stoull(text);
}

void infer(Engine& engine, const httplib::Request& http, httplib::Response& response) {
    try {
        InferRequest request = parse_request(http.body, json_length(http), engine.bundle());
        const Tensors outputs = engine.infer(std::move(request.inputs));
        const Body body = write_response(request, outputs, engine.bundle());
        response.status = 200;
        response.set_content(body.text, body.json_length ? "application/octet-stream" : JSON);
        if (body.json_length) response.set_header(JSON_LENGTH, std::to_string(*body.json_length));
    } catch (const Busy& busy) {
        answer(response, 503, error_body(busy.what()));
    } catch (const Refusal& refusal) {
        answer(response, refusal.kind() == Kind::usage ? 400 : 500, error_body(refusal.what()));
    } catch (const std::exception& error) {
        answer(response, 500, error_body(std::string("unforeseen: ") + error.what()));
    }
}

// The paths of httplib are regular expressions; a model's name has no other special character than the dot.
std::string escaped(const std::string& name) {
    std::string text;
    for (const char c : name) text += c == '.' ? std::string("\\.") : std::string(1, c);
    return text;
}

std::string explained(int status, const std::string& path) {
    if (status == 404) return "there is no " + path.substr(0, 200);
    if (status == 413) return "the body is larger than any request for this model, or was not sent as application/json";
    return "HTTP status " + std::to_string(status);
}

// Before a body is read: only plain bodies of a declared length, since the library bounds no others.
httplib::Server::HandlerResponse check_framing(const httplib::Request& request, httplib::Response& response) {
    const auto refuse = [&](int status, const char* why) {
        answer(response, status, error_body(why));
        return httplib::Server::HandlerResponse::Handled;
    };
    if (request.method == "GET" || request.method == "HEAD") return httplib::Server::HandlerResponse::Unhandled;
    if (request.has_header("Content-Encoding")) return refuse(415, "compressed bodies are not read");
    if (request.has_header("Transfer-Encoding") || !request.has_header("Content-Length")) return refuse(411, "the body needs a Content-Length");
    return httplib::Server::HandlerResponse::Unhandled;
}

void add_routes(httplib::Server& server, Engine& engine) {
    const auto fixed = [](std::string body) {
        return [body = std::move(body)](const httplib::Request&, httplib::Response& response) { answer(response, 200, body); };
    };
    const std::string platform = engine.description().substr(0, engine.description().find(':'));
    server.Get("/v2", fixed(server_metadata()));
    server.Get("/v2/health/live", fixed("{}"));
    server.Get("/v2/health/ready", fixed("{}"));
    for (const std::string& version : {std::string(), std::string("/versions/1")}) {
        const std::string model = "/v2/models/" + escaped(engine.bundle().name) + version;
        server.Get(model, fixed(model_metadata(engine.bundle(), platform)));
        server.Get(model + "/ready", fixed("{}"));
        server.Post(model + "/infer", [&engine](const httplib::Request& request, httplib::Response& response) { infer(engine, request, response); });
    }
    server.set_error_handler([](const httplib::Request& request, httplib::Response& response) {
        if (response.body.empty()) response.set_content(error_body(explained(response.status, request.path)), JSON);
    });
}

void configure(httplib::Server& server, const Engine& engine, const ServerOptions& options) {
    server.new_task_queue = [connections = options.connections] { return new httplib::ThreadPool(connections); };
    server.set_payload_max_length(largest_body(engine.bundle()));
    server.set_pre_routing_handler(check_framing);
    server.set_tcp_nodelay(true);
    server.set_keep_alive_timeout(2);
    server.set_keep_alive_max_count(1u << 30);
    // Without SO_REUSEPORT, which would let a second server take half of the requests unnoticed.
    server.set_socket_options([](socket_t socket) {
        const int yes = 1;
        setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
}

sigset_t stop_signals() {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    return signals;
}

}  // namespace

void block_stop_signals() {
    const sigset_t signals = stop_signals();
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

void serve(Engine& engine, const ServerOptions& options, const std::function<void(int)>& ready) {
    httplib::Server server;
    configure(server, engine, options);
    add_routes(server, engine);
    const bool bound = options.port == 0 || server.bind_to_port(options.host, options.port);
    const int port = options.port == 0 ? server.bind_to_any_port(options.host) : options.port;
    if (!bound || port < 0) {
        throw Refusal(Kind::usage, std::string("the address cannot be used (") + std::strerror(errno) + ")", options.host + ":" + std::to_string(options.port), "choose another --port or --host");
    }
    std::atomic<bool> is_finished{false};
    std::thread stopper([&server, &is_finished] {
        const sigset_t signals = stop_signals();
        int number = 0;
        sigwait(&signals, &number);
        // A signal may come before the server runs, and stopping a server that does not run yet does nothing.
        while (!server.is_running() && !is_finished) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        server.stop();
    });
    ready(port);
    server.listen_after_bind();
    is_finished = true;
    pthread_kill(stopper.native_handle(), SIGTERM);
    stopper.join();
}

}  // namespace deploycc
