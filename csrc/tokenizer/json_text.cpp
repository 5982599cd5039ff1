#include "json_text.h"

#include <cstring>

namespace chatflow {
namespace {

constexpr int kMaxDepth = 64;
constexpr ptrdiff_t kMaxDigits = 200;  // so that no number overflows a double
constexpr uint64_t kOnes = 0x0101010101010101u;
constexpr uint64_t kHighBits = 0x8080808080808080u;

bool is_digit(uint8_t byte) { return byte >= '0' && byte <= '9'; }

/// High bits of the bytes of a word that equal a given byte. Bytes above such a byte may be set
/// too.
uint64_t equal(uint64_t word, uint8_t byte) {
  const uint64_t difference = word ^ (kOnes * byte);
  return (difference - kOnes) & ~difference & kHighBits;
}

/// Whether eight bytes are printable ASCII without quotes and backslashes.
bool is_plain(uint64_t word) {
  const uint64_t below_space = (word - kOnes * 0x20) & ~word & kHighBits;
  return ((word & kHighBits) | below_space | equal(word, '"') | equal(word, '\\')) == 0;
}

int hex_value(uint8_t byte) {
  if (is_digit(byte)) return byte - '0';
  const int letter = byte | 0x20;
  return letter >= 'a' && letter <= 'f' ? letter - 'a' + 10 : -1;
}

/// The value of four hexadecimal digits, or -1.
int32_t hex_unit(const uint8_t* at) {
  int32_t unit = 0;
  for (int k = 0; k < 4; ++k) {
    const int digit = hex_value(at[k]);
    if (digit < 0) return -1;
    unit = unit << 4 | digit;
  }
  return unit;
}

void append_utf8(uint32_t code_point, std::string* text) {
  if (code_point < 0x80) {
    text->push_back(static_cast<char>(code_point));
    return;
  }
  const int num_following = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  const uint32_t lead = num_following == 1 ? 0xC0 : num_following == 2 ? 0xE0 : 0xF0;
  text->push_back(static_cast<char>(lead | code_point >> (6 * num_following)));
  for (int k = num_following - 1; k >= 0; --k) {
    text->push_back(static_cast<char>(0x80 | (code_point >> (6 * k) & 0x3F)));
  }
}

}  // namespace

bool JsonText::find(std::string_view line, std::string_view* text) {
  at_ = reinterpret_cast<const uint8_t*>(line.data());
  end_ = at_ + line.size();
  Raw raw;
  space();
  if (!take('{') || !object(1, &raw)) return false;
  space();
  if (at_ != end_ || raw.begin == nullptr) return false;
  if (raw.has_escapes) {
    if (!unescape(raw)) return false;
    *text = unescaped_;
  } else {
    *text = {reinterpret_cast<const char*>(raw.begin), static_cast<size_t>(raw.end - raw.begin)};
  }
  return true;
}

void JsonText::space() {
  while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) ++at_;
}

bool JsonText::take(uint8_t byte) {
  if (at_ == end_ || *at_ != byte) return false;
  ++at_;
  return true;
}

/// Skips a value of any kind.
bool JsonText::value(int depth) {
  if (at_ == end_) return false;
  switch (*at_) {
    case '"': {
      Raw raw;
      // Escapes are checked by `unescape`, which also checks surrogate pairs.
      return string(&raw) && (!raw.has_escapes || unescape(raw));
    }
    case '{':
      ++at_;
      return depth < kMaxDepth && object(depth + 1, nullptr);
    case '[':
      ++at_;
      return depth < kMaxDepth && array(depth + 1);
    case 't':
      return literal("true");
    case 'f':
      return literal("false");
    case 'n':
      return literal("null");
    default:
      return number();
  }
}

/// Reads an object after its opening brace. If a key is repeated, the last one counts.
bool JsonText::object(int depth, Raw* text) {
  space();
  if (take('}')) return true;
  do {
    Raw name;
    space();
    if (!string(&name) || name.has_escapes) return false;
    space();
    if (!take(':')) return false;
    space();
    const auto num_bytes = static_cast<size_t>(name.end - name.begin);
    if (text != nullptr && num_bytes == key_.size() &&
        std::memcmp(name.begin, key_.data(), num_bytes) == 0) {
      if (!string(text)) return false;
    } else if (!value(depth)) {
      return false;
    }
    space();
  } while (take(','));
  return take('}');
}

/// Skips an array after its opening bracket.
bool JsonText::array(int depth) {
  space();
  if (take(']')) return true;
  do {
    space();
    if (!value(depth)) return false;
    space();
  } while (take(','));
  return take(']');
}

bool JsonText::string(Raw* raw) {
  if (!take('"')) return false;
  *raw = {at_, nullptr, false};
  while (true) {
    while (end_ - at_ >= 8) {
      uint64_t word;
      std::memcpy(&word, at_, 8);
      if (!is_plain(word)) break;
      at_ += 8;
    }
    if (at_ == end_) return false;
    const uint8_t byte = *at_;
    if (byte == '"') {
      raw->end = at_++;
      return true;
    }
    if (byte == '\\') {
      raw->has_escapes = true;
      if (end_ - at_ < 2) return false;
      at_ += 2;
    } else if (byte >= 0x80) {
      if (!multi_byte()) return false;
    } else if (byte < 0x20) {
      return false;
    } else {
      ++at_;
    }
  }
}

/// Skips consecutive characters of two or more bytes.
bool JsonText::multi_byte() {
  do {
    const uint8_t first = *at_;
    const ptrdiff_t num_bytes = first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (num_bytes == 0 || first > 0xF4 || end_ - at_ < num_bytes) return false;
    for (ptrdiff_t k = 1; k < num_bytes; ++k) {
      if ((at_[k] & 0xC0) != 0x80) return false;
    }
    const uint8_t second = at_[1];
    if ((first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) ||
        (first == 0xF0 && second < 0x90) || (first == 0xF4 && second > 0x8F)) {
      return false;  // overlong, a surrogate, or beyond U+10FFFF
    }
    at_ += num_bytes;
  } while (at_ < end_ && *at_ >= 0x80);
  return true;
}

bool JsonText::number() {
  const uint8_t* const begin = at_;
  take('-');
  if (at_ == end_ || !is_digit(*at_)) return false;
  if (*at_ == '0') {
    ++at_;
  } else {
    while (at_ < end_ && is_digit(*at_)) ++at_;
  }
  if (take('.')) {
    if (at_ == end_ || !is_digit(*at_)) return false;
    while (at_ < end_ && is_digit(*at_)) ++at_;
  }
  if (at_ - begin > kMaxDigits) return false;
  if (at_ < end_ && (*at_ | 0x20) == 'e') {
    ++at_;
    if (!take('-')) take('+');
    const uint8_t* const exponent = at_;
    while (at_ < end_ && is_digit(*at_)) ++at_;
    return at_ - exponent >= 1 && at_ - exponent <= 2;
  }
  return true;
}

bool JsonText::literal(std::string_view word) {
  if (static_cast<size_t>(end_ - at_) < word.size() ||
      std::memcmp(at_, word.data(), word.size()) != 0) {
    return false;
  }
  at_ += word.size();
  return true;
}

/// Writes a string with its escapes resolved; returns false for an unknown escape or an unpaired
/// surrogate.
bool JsonText::unescape(const Raw& raw) {
  unescaped_.clear();
  for (const uint8_t* at = raw.begin; at < raw.end;) {
    const void* const found = std::memchr(at, '\\', static_cast<size_t>(raw.end - at));
    const uint8_t* const escape = found == nullptr ? raw.end : static_cast<const uint8_t*>(found);
    unescaped_.append(reinterpret_cast<const char*>(at), static_cast<size_t>(escape - at));
    if (escape == raw.end) break;
    at = escape + 2;
    static constexpr std::string_view kLetters = "\"\\/bfnrt";
    static constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const size_t letter = kLetters.find(static_cast<char>(escape[1]));
    if (letter != std::string_view::npos) {
      unescaped_.push_back(kMeanings[letter]);
      continue;
    }
    if (escape[1] != 'u' || raw.end - at < 4) return false;
    const int32_t unit = hex_unit(at);
    at += 4;
    if (unit < 0 || (unit >= 0xDC00 && unit < 0xE000)) return false;
    auto code_point = static_cast<uint32_t>(unit);
    if (unit >= 0xD800 && unit < 0xDC00) {
      if (raw.end - at < 6 || at[0] != '\\' || at[1] != 'u') return false;
      const int32_t low = hex_unit(at + 2);
      if (low < 0xDC00 || low >= 0xE000) return false;
      code_point = 0x10000 + ((code_point - 0xD800) << 10) + static_cast<uint32_t>(low - 0xDC00);
      at += 6;
    }
    append_utf8(code_point, &unescaped_);
  }
  return true;
}

}  // namespace chatflow
