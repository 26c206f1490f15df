// Converts latents, as a cache stores them, to float32: plain ones, or codes in 8, 6, 5 or 4 bits or fp8. cache/format.py
// says how codes are laid out; after the codes of a row follows one scale per plane of 128 elements.
#pragma once

#include <numeric>

#include "vectors.h"

namespace latent {

constexpr int64_t PLANE = 128;

template <class T>
struct Plain {
  using Rotary = T;
  int64_t c;
  int64_t bytes() const { return c * sizeof(T); }
  void read(const char* row, float* to) const { widen_row(reinterpret_cast<const T*>(row), c, to); }
};

struct Integers {
  using Rotary = c10::BFloat16;
  int64_t c, bits, shared, byte_planes, code_plane;

  Integers(int64_t c, int64_t bits)
      : c(c), bits(bits), shared(std::gcd(bits, int64_t(8))), byte_planes(bits / shared),
        code_plane(ceil_div(c * shared, 8)) {}
  int64_t first_scale() const { return ceil_div(code_plane * byte_planes, 4) * 4; }
  int64_t bytes() const { return first_scale() + ceil_div(c, PLANE) * sizeof(c10::BFloat16); }

  // element i of code plane p, or sixteen elements from i on; byte(k) gives the byte, or the bytes, at i in byte plane k
  template <class Code, class Byte>
  Code code(int64_t p, Byte byte) const {
    if (p < byte_planes) return byte(p) & ((1 << bits) - 1);
    const int64_t above = bits + shared * (p - byte_planes);
    Code whole = (byte(0) >> above) & ((1 << shared) - 1);
    for (int64_t k = 1; k < byte_planes; k++) whole |= ((byte(k) >> above) & ((1 << shared) - 1)) << (shared * k);
    return whole;
  }

  void read(const char* row, float* to) const {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(row);
    // a row may begin at any byte
    const auto scale_of = [&](int64_t i) {
      c10::BFloat16 scale;
      std::memcpy(&scale, row + first_scale() + i / PLANE * sizeof scale, sizeof scale);
      return static_cast<float>(scale);
    };
    const float middle = 0.5f - (1 << (bits - 1));
    // if sixteen elements from the start of a code plane on may have two scales, elements are scaled after all are there
    const bool scales_at_once = code_plane % LANES == 0 || c <= PLANE;
    for (int64_t p = 0; p * code_plane < c; p++) {
      const int64_t start = p * code_plane, count = std::min(code_plane, c - start);
      const int64_t whole = count / LANES * LANES;
      for (int64_t i = 0; i < whole; i += LANES) {
        const auto byte = [&](int64_t k) { return widen_words(load<UnsignedBytes>(codes + k * code_plane + i)); };
        const Floats x = __builtin_convertvector(code<Ints>(p, byte), Floats);
        store(to + start + i, (x + middle) * (scales_at_once ? scale_of(start + i) : 1.0f));
      }
      for (int64_t i = whole; i < count; i++) {
        const auto byte = [&](int64_t k) { return int(codes[k * code_plane + i]); };
        to[start + i] = (code<int>(p, byte) + middle) * (scales_at_once ? scale_of(start + i) : 1.0f);
      }
    }
    for (int64_t plane = scales_at_once ? c : 0; plane < c; plane += PLANE) {
      const float scale = scale_of(plane);
      for (int64_t i = plane; i < std::min(plane + PLANE, c); i++) to[i] *= scale;
    }
  }
};

struct Float8 {
  using Rotary = c10::BFloat16;
  int64_t c;
  int64_t first_scale() const { return ceil_div(c, 4) * 4; }
  int64_t bytes() const { return first_scale() + ceil_div(c, PLANE) * sizeof(float); }

  // shifted into a float32, the bits of an e4m3 have an exponent that is 120 too small
  static Floats decode(UnsignedBytes codes) {
    const Words words = (Words)widen_words(codes);
    return (Floats)((words & 0x80) << 24 | (words & 0x7f) << 20) * 0x1p120f;
  }

  void read(const char* row, float* to) const {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(row);
    for (int64_t plane = 0; plane < c; plane += PLANE) {
      float scale;
      std::memcpy(&scale, row + first_scale() + plane / PLANE * sizeof scale, sizeof scale);
      const int64_t end = std::min(plane + PLANE, c);
      int64_t i = plane;
      for (; i + LANES <= end; i += LANES) store(to + i, decode(load<UnsignedBytes>(codes + i)) * scale);
      if (i < end) {
        UnsignedBytes last{};
        std::memcpy(&last, codes + i, end - i);
        const Floats x = decode(last) * scale;
        std::memcpy(to + i, &x, (end - i) * sizeof(float));
      }
    }
  }
};

}  // namespace latent
