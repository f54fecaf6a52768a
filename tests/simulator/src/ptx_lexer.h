// PTX text to tokens.
#pragma once

#include <string>
#include <vector>

namespace sim {

struct Token {
    enum Kind { kWord, kPunctuation, kString, kEnd };
    Kind kind = kEnd;
    std::string text;
    int line = 0;
    bool glued = false;  // no white space between this token and the one before
};

std::vector<Token> tokenize(const std::string& text);

}  // namespace sim
