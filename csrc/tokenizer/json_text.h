/// \file
/// Finds the string under a key in a line of JSON, without parsing the values into objects.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace chatflow {

/// Reads lines that are objects with a string under one key.
///
/// If it returns a string, it has checked the whole line, including UTF-8. In doubtful cases (a
/// malformed line, a missing key, an escaped key, an unpaired surrogate, deep nesting, a huge
/// exponent) it returns false, and the caller uses a full parser.
class JsonText {
 public:
  explicit JsonText(std::string key) : key_(std::move(key)) {}

  /// Finds the text.
  /// \param line The line, without its line ending.
  /// \param text Output. A view of the line or of this reader's buffer, valid until the next call.
  /// \return Whether the line was parsed and has a string under the key.
  bool find(std::string_view line, std::string_view* text);

 private:
  /// A string of the line with its escapes, between the quotes.
  struct Raw {
    const uint8_t* begin = nullptr;
    const uint8_t* end = nullptr;
    bool has_escapes = false;
  };

  bool value(int depth);
  bool object(int depth, Raw* text);
  bool array(int depth);
  bool string(Raw* raw);
  bool number();
  bool literal(std::string_view word);
  bool multi_byte();
  void space();
  bool take(uint8_t byte);
  bool unescape(const Raw& raw);

  std::string key_;
  std::string unescaped_;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
};

}  // namespace chatflow
