#include "deploycc/protocol.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "json_reader.hpp"

namespace deploycc {
namespace {

using Json = nlohmann::json;

constexpr int DEEPEST = 20;
constexpr std::size_t LONGEST_NUMBER = 32;  // as text, with its comma

[[noreturn]] void refuse(const std::string& what, const std::string& at) { throw Refusal(Kind::usage, what, at, "see the KServe v2 inference protocol"); }

Json parse_json(std::string_view text) {
    const auto shallow = [](int depth, Json::parse_event_t, Json&) {
        if (depth > DEEPEST) refuse("the JSON is nested too deeply", "the request");
        return true;
    };
    try {
        return Json::parse(text, shallow);
    } catch (const Json::exception& error) {
        refuse(std::string("this is no JSON (") + error.what() + ")", "the request");
    }
}

template <class T>
T narrowed(const Json& value, const std::string& at) {
    if constexpr (std::is_floating_point_v<T>) {
        if (!value.is_number()) refuse("an element is not a number", at);
        return static_cast<T>(value.get<double>());
    } else {
        if (value.is_boolean()) return static_cast<T>(value.get<bool>());
        if (!value.is_number_integer()) refuse("an element is not an integer", at);
        if (value.is_number_unsigned()) {
            if (value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<T>::max())) refuse("an element is out of range", at);
            return static_cast<T>(value.get<std::uint64_t>());
        }
        const std::int64_t number = value.get<std::int64_t>();
        if (number < 0 && (std::is_unsigned_v<T> || number < static_cast<std::int64_t>(std::numeric_limits<T>::min()))) refuse("an element is out of range", at);
        return static_cast<T>(number);
    }
}

// Copy the numbers of nested lists, in order.
template <class T>
void flatten(const Json& value, T*& next, const T* end, const std::string& at) {
    for (const Json& each : value) {
        if (each.is_array()) {
            flatten(each, next, end, at);
        } else {
            if (next == end) refuse("there are more elements than the shape has", at);
            *next++ = narrowed<T>(each, at);
        }
    }
}

template <class T>
void fill(Tensor& tensor, const Json& data, const std::string& at) {
    T* next = tensor.as<T>();
    const T* end = next + tensor.data.size() / sizeof(T);
    flatten<T>(data, next, end, at);
    if (next != end) refuse("there are fewer elements than the shape has", at);
}

void fill_from_json(Tensor& tensor, const Json& data, const std::string& at) {
    if (!data.is_array()) refuse("'data' is not a list", at);
    switch (tensor.type) {
        case DataType::FP32: return fill<float>(tensor, data, at);
        case DataType::FP64: return fill<double>(tensor, data, at);
        case DataType::INT8: return fill<std::int8_t>(tensor, data, at);
        case DataType::INT16: return fill<std::int16_t>(tensor, data, at);
        case DataType::INT32: return fill<std::int32_t>(tensor, data, at);
        case DataType::INT64: return fill<std::int64_t>(tensor, data, at);
        case DataType::UINT8: return fill<std::uint8_t>(tensor, data, at);
        case DataType::UINT16: return fill<std::uint16_t>(tensor, data, at);
        case DataType::UINT32: return fill<std::uint32_t>(tensor, data, at);
        case DataType::UINT64: return fill<std::uint64_t>(tensor, data, at);
        case DataType::BOOL:
            fill<std::uint8_t>(tensor, data, at);
            if (std::any_of(tensor.data.begin(), tensor.data.end(), [](std::uint8_t b) { return b > 1; })) refuse("an element is neither true nor false", at);
            return;
        case DataType::FP16:
        case DataType::BF16: refuse("tensors of 16-bit floats travel as raw bytes only", at);
    }
}

Tensor read_input(const JsonReader& json, std::string_view& raw) {
    const DataType type = parse_datatype(json["datatype"].text(16));
    Tensor tensor{json["name"].text(), type, json["shape"].shape(0), {}};
    const std::string at = "input '" + tensor.name + "'";
    const std::size_t bytes = count(tensor.shape) * size_of(type);
    const bool is_raw = json.has("parameters") && json["parameters"].has("binary_data_size");
    if (is_raw) {
        if (static_cast<std::size_t>(json["parameters"]["binary_data_size"].integer(0)) != bytes || raw.size() < bytes) {
            refuse("the raw data is not as long as the shape needs (" + std::to_string(bytes) + " bytes)", at);
        }
        tensor.data.assign(raw.begin(), raw.begin() + static_cast<std::ptrdiff_t>(bytes));
        raw.remove_prefix(bytes);
        return tensor;
    }
    // An element takes two characters at least, so that a small body cannot ask for much memory.
    const Json& data = json["data"].raw();
    if (bytes / size_of(type) > data.size() && !(data.is_array() && !data.empty() && data[0].is_array())) refuse("there are fewer elements than the shape has", at);
    tensor.data.resize(bytes);
    fill_from_json(tensor, data, at);
    return tensor;
}

bool wants_raw(const JsonReader& json, const char* key, bool otherwise) {
    return json.has("parameters") && json["parameters"].has(key) ? json["parameters"][key].boolean() : otherwise;
}

void read_outputs(const JsonReader& json, InferRequest& request, const Bundle& bundle) {
    const bool raw = wants_raw(json, "binary_data_output", false);
    if (!json.has("outputs")) {
        for (const TensorSpec& output : bundle.outputs) {
            request.outputs.push_back(output.name);
            if (raw) request.raw_outputs.insert(output.name);
        }
        return;
    }
    for (const JsonReader& each : json["outputs"].items()) {
        const std::string name = each["name"].text();
        const auto same = [&](const TensorSpec& output) { return output.name == name; };
        if (std::none_of(bundle.outputs.begin(), bundle.outputs.end(), same)) refuse("the model has no output '" + name.substr(0, 200) + "'", "outputs");
        if (each.has("parameters") && each["parameters"].has("classification")) refuse("the classification extension is not offered", "output '" + name + "'");
        request.outputs.push_back(name);
        if (wants_raw(each, "binary_data", raw)) request.raw_outputs.insert(name);
    }
}

template <class T>
void append_numbers(std::string& text, const Tensor& tensor) {
    char buffer[LONGEST_NUMBER];
    const std::size_t size = tensor.data.size() / sizeof(T);
    for (std::size_t i = 0; i < size; ++i) {
        T value;
        std::memcpy(&value, tensor.data.data() + i * sizeof(T), sizeof(T));
        if constexpr (std::is_floating_point_v<T>) {
            if (!std::isfinite(value)) throw Refusal(Kind::backend, "an output is not finite, and JSON has no such numbers", "output '" + tensor.name + "'", "ask for binary data");
        }
        if (i) text += ',';
        text.append(buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr);
    }
}

void append_data(std::string& text, const Tensor& tensor) {
    switch (tensor.type) {
        case DataType::FP32: return append_numbers<float>(text, tensor);
        case DataType::FP64: return append_numbers<double>(text, tensor);
        case DataType::INT8: return append_numbers<std::int8_t>(text, tensor);
        case DataType::INT16: return append_numbers<std::int16_t>(text, tensor);
        case DataType::INT32: return append_numbers<std::int32_t>(text, tensor);
        case DataType::INT64: return append_numbers<std::int64_t>(text, tensor);
        case DataType::UINT8: return append_numbers<std::uint8_t>(text, tensor);
        case DataType::UINT16: return append_numbers<std::uint16_t>(text, tensor);
        case DataType::UINT32: return append_numbers<std::uint32_t>(text, tensor);
        case DataType::UINT64: return append_numbers<std::uint64_t>(text, tensor);
        case DataType::BOOL:
            for (std::size_t i = 0; i < tensor.data.size(); ++i) text += std::string(i ? "," : "") + (tensor.data[i] ? "true" : "false");
            return;
        case DataType::FP16:
        case DataType::BF16: refuse("tensors of 16-bit floats travel as raw bytes only", "output '" + tensor.name + "'");
    }
}

Json tensor_metadata(const TensorSpec& spec) { return {{"name", spec.name}, {"datatype", name_of(spec.type)}, {"shape", spec.shape}}; }

}  // namespace

InferRequest parse_request(std::string_view body, std::optional<std::size_t> json_length, const Bundle& bundle) {
    if (json_length && *json_length > body.size()) refuse("Inference-Header-Content-Length is longer than the body", "the request");
    std::string_view raw = json_length ? body.substr(*json_length) : std::string_view();
    const Json document = parse_json(body.substr(0, json_length.value_or(body.size())));
    const JsonReader json(document, "", Kind::usage);
    InferRequest request;
    if (json.has("id")) request.id = json["id"].text();
    for (const JsonReader& each : json["inputs"].items()) {
        if (request.inputs.size() == bundle.inputs.size()) refuse("there are more inputs than the model has", "inputs");
        request.inputs.push_back(read_input(each, raw));
    }
    if (!raw.empty()) refuse(std::to_string(raw.size()) + " raw bytes belong to no input", "the request");
    read_outputs(json, request, bundle);
    return request;
}

Body write_response(const InferRequest& request, const Tensors& outputs, const Bundle& bundle) {
    std::string text = "{\"model_name\":" + Json(bundle.name).dump() + ",\"model_version\":\"1\",\"id\":" + Json(request.id).dump(-1, ' ', false, Json::error_handler_t::replace) + ",\"outputs\":[";
    std::string raw;
    for (std::size_t i = 0; i < request.outputs.size(); ++i) {
        const auto found = std::find_if(outputs.begin(), outputs.end(), [&](const Tensor& t) { return t.name == request.outputs[i]; });
        if (found == outputs.end()) throw Refusal(Kind::backend, "the model did not give an output", "output '" + request.outputs[i] + "'", "bundle the build again");
        std::string head = Json{{"name", found->name}, {"datatype", name_of(found->type)}, {"shape", found->shape}}.dump();
        head.pop_back();
        text += (i ? "," : "") + head;
        if (request.raw_outputs.count(found->name)) {
            text += ",\"parameters\":{\"binary_data_size\":" + std::to_string(found->data.size()) + "}}";
            raw.append(reinterpret_cast<const char*>(found->data.data()), found->data.size());
        } else {
            text += ",\"data\":[";
            append_data(text, *found);
            text += "]}";
        }
    }
    text += "]}";
    const std::optional<std::size_t> length = request.raw_outputs.empty() ? std::nullopt : std::optional(text.size());
    return Body{text + raw, length};
}

std::size_t largest_body(const Bundle& bundle) {
    std::size_t elements = 0;
    for (const InputSpec& input : bundle.inputs) elements += count(input.maximum);
    return std::min<std::size_t>(elements * LONGEST_NUMBER + (std::size_t{1} << 20), std::size_t{1} << 30);
}

std::string server_metadata() {
    return Json{{"name", "deploycc-serve"}, {"version", "1"}, {"extensions", {"binary_tensor_data"}}}.dump();
}

std::string model_metadata(const Bundle& bundle, const std::string& platform) {
    Json json{{"name", bundle.name}, {"versions", {"1"}}, {"platform", platform}, {"inputs", Json::array()}, {"outputs", Json::array()}};
    for (const InputSpec& input : bundle.inputs) json["inputs"].push_back(tensor_metadata(input));
    for (const TensorSpec& output : bundle.outputs) json["outputs"].push_back(tensor_metadata(output));
    return json.dump();
}

std::string error_body(const std::string& message) { return Json{{"error", message}}.dump(-1, ' ', false, Json::error_handler_t::replace); }

}  // namespace deploycc
