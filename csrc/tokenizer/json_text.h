/// \file
/// Finds the text in a line of JSON, without building anything else of it.
///
/// In: one line and a key. Out: where the key's string lies, or that a full parser should look.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace chatflow {

/// Reads lines that are objects with a string under one key.
///
/// Strict where it answers: the whole line is checked, UTF-8 included. Where it is in doubt (a
/// malformed line, a missing key, an escaped key, half a surrogate pair, deep nesting, a huge
/// exponent) it says so, and the caller asks a full parser.
class JsonText {
 public:
  explicit JsonText(std::string key) : key_(std::move(key)) {}

  /// Finds the text.
  /// \param line Without its line end.
  /// \param text Receives the text, which lies in the line or in this reader, until the next call.
  /// \return Whether the line was understood and has one.
  bool find(std::string_view line, std::string_view* text);

 private:
  /// A string as it stands in the line, between its quotes.
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
