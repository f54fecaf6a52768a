// A cursor over tokens with the few questions a recursive-descent parser asks.
#pragma once

#include <string>
#include <vector>

#include "errors.h"
#include "ptx_lexer.h"

namespace sim {

class TokenStream {
  public:
    explicit TokenStream(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

    const Token& peek(size_t ahead = 0) const {
        const size_t at = index_ + ahead;
        return tokens_[at < tokens_.size() ? at : tokens_.size() - 1];
    }
    bool at_end() const { return peek().kind == Token::kEnd; }
    bool peek_is(const char* text, size_t ahead = 0) const {
        return peek(ahead).kind == Token::kPunctuation && peek(ahead).text == text;
    }
    const Token& advance() {
        if (at_end()) {
            fail("the text ends too early");
        }
        return tokens_[index_++];
    }
    bool accept(const char* text) {
        if (peek_is(text)) {
            ++index_;
            return true;
        }
        return false;
    }
    void expect(const char* text) {
        if (!accept(text)) {
            fail(std::string("expected '") + text + "', found '" + peek().text + "'");
        }
    }
    std::string word() {
        if (peek().kind != Token::kWord) {
            fail("expected a name, found '" + peek().text + "'");
        }
        return tokens_[index_++].text;
    }
    void skip_past(const char* text) {
        while (!accept(text)) {
            advance();
        }
    }
    int previous_line() const { return index_ > 0 ? tokens_[index_ - 1].line : 1; }

    [[noreturn]] void fail(const std::string& message) const {
        throw SimError(ErrorKind::kParse, message, peek().line);
    }

  private:
    std::vector<Token> tokens_;
    size_t index_ = 0;
};

}  // namespace sim
