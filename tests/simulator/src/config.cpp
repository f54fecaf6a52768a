#include "config.h"

#include <cctype>
#include <cstdlib>

#include "errors.h"

namespace sim {
namespace {

bool parse_bool(const std::string& name, const std::string& value) {
    if (value == "1" || value == "true" || value == "on") {
        return true;
    }
    if (value == "0" || value == "false" || value == "off") {
        return false;
    }
    throw SimError(ErrorKind::kInvalidValue, name + ": '" + value + "' is neither true nor false");
}

uint64_t parse_number(const std::string& name, const std::string& value) {
    char* end = nullptr;
    const uint64_t number = std::strtoull(value.c_str(), &end, 0);
    if (value.empty() || *end != '\0') {
        throw SimError(ErrorKind::kInvalidValue, name + ": '" + value + "' is no number");
    }
    return number;
}

const char* const kNames[] = {"seed",
                              "async",
                              "quantum",
                              "threads",
                              "multiprocessors",
                              "stall_limit",
                              "check_memory",
                              "check_uninitialized",
                              "check_uninitialized_global",
                              "check_wgmma",
                              "check_races",
                              "checks",
                              "cp_async_fence",
                              "exact_16bit",
                              "exact_8bit",
                              "strict_global",
                              "timeline",
                              "watch"};

// A flat JSON object of strings, numbers and booleans.
class FlatJson {
  public:
    explicit FlatJson(const std::string& text) : text_(text) {}

    template <class F>
    void each(F visit) {
        expect('{');
        while (!accept('}')) {
            const std::string name = string();
            expect(':');
            visit(name, value());
            accept(',');
        }
    }

  private:
    void blank() {
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) {
            ++at_;
        }
    }
    bool accept(char c) {
        blank();
        if (at_ < text_.size() && text_[at_] == c) {
            ++at_;
            return true;
        }
        return false;
    }
    void expect(char c) {
        if (!accept(c)) {
            throw SimError(ErrorKind::kInvalidValue,
                           format("configuration: expected '%c' at character %zu", c, at_));
        }
    }
    std::string string() {
        expect('"');
        std::string result;
        while (at_ < text_.size() && text_[at_] != '"') {
            result += text_[at_++];
        }
        expect('"');
        return result;
    }
    std::string value() {
        blank();
        if (at_ < text_.size() && text_[at_] == '"') {
            return string();
        }
        std::string result;
        while (at_ < text_.size() && text_[at_] != ',' && text_[at_] != '}' &&
               !std::isspace(static_cast<unsigned char>(text_[at_]))) {
            result += text_[at_++];
        }
        return result;
    }

    const std::string& text_;
    size_t at_ = 0;
};

}  // namespace

void Config::set(const std::string& name, const std::string& value) {
    if (name == "seed") {
        seed = parse_number(name, value);
    } else if (name == "async") {
        async_set = value != "seed";
        if (value != "early" && value != "late" && value != "random" && value != "seed") {
            throw SimError(ErrorKind::kInvalidValue,
                           "async: '" + value + "' is none of early, late, random, seed");
        }
        async = value == "late"     ? AsyncPolicy::kLate
                : value == "random" ? AsyncPolicy::kRandom
                                    : AsyncPolicy::kEarly;
    } else if (name == "quantum") {
        quantum = static_cast<uint32_t>(parse_number(name, value));
    } else if (name == "threads") {
        threads = static_cast<uint32_t>(parse_number(name, value));
    } else if (name == "multiprocessors") {
        multiprocessors = static_cast<uint32_t>(parse_number(name, value));
        if (multiprocessors == 0) {
            throw SimError(ErrorKind::kInvalidValue, "multiprocessors: must be at least 1");
        }
    } else if (name == "stall_limit") {
        stall_limit = parse_number(name, value);
    } else if (name == "check_memory" || name == "strict_global") {
        strict_global = parse_bool(name, value);
    } else if (name == "check_uninitialized") {
        check_uninitialized = parse_bool(name, value);
    } else if (name == "check_uninitialized_global") {
        check_uninitialized_global = parse_bool(name, value);
    } else if (name == "check_wgmma") {
        check_wgmma = parse_bool(name, value);
    } else if (name == "check_races") {
        check_races = parse_bool(name, value);
    } else if (name == "checks") {
        check_uninitialized = check_uninitialized_global = check_wgmma = check_races =
            parse_bool(name, value);
    } else if (name == "cp_async_fence") {
        cp_async_fence = parse_bool(name, value);
    } else if (name == "exact_16bit") {
        exact_16bit = parse_bool(name, value);
    } else if (name == "exact_8bit") {
        exact_8bit = parse_bool(name, value);
    } else if (name == "timeline") {
        timeline = parse_bool(name, value);
    } else if (name == "watch") {
        watch = value;
    } else {
        throw SimError(ErrorKind::kInvalidValue, "unknown configuration '" + name + "'");
    }
}

void Config::set_json(const std::string& json) {
    FlatJson(json).each([this](const std::string& name, const std::string& value) { set(name, value); });
}

void Config::set_from_environment() {
    for (const char* name : kNames) {
        std::string variable = "FLASH8_SIM_";
        for (const char* c = name; *c != '\0'; ++c) {
            variable += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
        }
        const char* value = std::getenv(variable.c_str());
        if (value != nullptr) {
            set(name, value);
        }
    }
}

Config& global_config() {
    static Config config = [] {
        Config fresh;
        fresh.set_from_environment();
        return fresh;
    }();
    return config;
}

}  // namespace sim
