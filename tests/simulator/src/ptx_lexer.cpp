#include "ptx_lexer.h"

#include <cctype>

#include "errors.h"

namespace sim {
namespace {

bool is_word_char(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

class Lexer {
  public:
    explicit Lexer(const std::string& text) : text_(text) {}

    std::vector<Token> run() {
        while (skip_blank()) {
            tokens_.push_back(next());
            last_end_ = position_;
        }
        Token end;
        end.line = line_;
        tokens_.push_back(end);
        return std::move(tokens_);
    }

  private:
    char at(size_t offset = 0) const {
        return position_ + offset < text_.size() ? text_[position_ + offset] : '\0';
    }

    bool skip_blank() {
        while (position_ < text_.size() && at() != '\0') {
            if (at() == '\n') {
                ++line_;
                ++position_;
            } else if (std::isspace(static_cast<unsigned char>(at()))) {
                ++position_;
            } else if (at() == '/' && at(1) == '/') {
                while (at() != '\n' && at() != '\0') {
                    ++position_;
                }
            } else if (at() == '/' && at(1) == '*') {
                skip_block_comment();
            } else {
                return true;
            }
        }
        return false;
    }

    void skip_block_comment() {
        const int start = line_;
        position_ += 2;
        while (!(at() == '*' && at(1) == '/')) {
            if (at() == '\0') {
                throw SimError(ErrorKind::kParse, "comment is never closed", start);
            }
            if (at() == '\n') {
                ++line_;
            }
            ++position_;
        }
        position_ += 2;
    }

    Token next() {
        Token token;
        token.line = line_;
        token.glued = position_ == last_end_ && position_ > 0;
        if (at() == '"') {
            token.kind = Token::kString;
            ++position_;
            while (at() != '"') {
                if (at() == '\0' || at() == '\n') {
                    throw SimError(ErrorKind::kParse, "string is never closed", line_);
                }
                token.text += at();
                ++position_;
            }
            ++position_;
            return token;
        }
        if (is_word_char(at())) {
            token.kind = Token::kWord;
            while (is_word_char(at())) {
                token.text += at();
                ++position_;
            }
            return token;
        }
        token.kind = Token::kPunctuation;
        if (at() == ':' && at(1) == ':') {
            token.text = "::";
            position_ += 2;
            return token;
        }
        static const std::string known = ".,;:(){}[]<>@!|+-*=~&?/^";
        if (known.find(at()) == std::string::npos) {
            throw SimError(ErrorKind::kParse, format("unexpected character '%c'", at()), line_);
        }
        token.text = at();
        ++position_;
        return token;
    }

    const std::string& text_;
    std::vector<Token> tokens_;
    size_t position_ = 0;
    size_t last_end_ = 0;
    int line_ = 1;
};

}  // namespace

std::vector<Token> tokenize(const std::string& text) {
    return Lexer(text).run();
}

}  // namespace sim
