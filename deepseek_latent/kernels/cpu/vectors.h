// Vectors of sixteen float32 numbers. GCC and Clang compile these types to whatever the CPU has: AVX-512, AVX2, NEON or plain
// loops. Weights are read as they are stored, row by row, and widened to float32 in registers.
#pragma once

#include <c10/util/BFloat16.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace latent {

constexpr int64_t LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint8_t UnsignedBytes __attribute__((vector_size(16)));

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Vector>
inline Vector load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class Vector>
inline void store(void* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

// n numbers, initially zero, aligned so that each vector is one cache line: a load across two lines takes twice as long
class Aligned {
  std::vector<Floats> vectors_;

 public:
  explicit Aligned(int64_t n = 0) : vectors_(ceil_div(n, LANES)) {}
  float* data() { return reinterpret_cast<float*>(vectors_.data()); }
  const float* data() const { return reinterpret_cast<const float*>(vectors_.data()); }
};

inline Floats splat(float x) { return x - Floats{}; }

// 16 elements as float32

inline Floats widen(const float* from) { return load<Floats>(from); }

#ifdef __AVX512F__
// one instruction, which GCC does not find by itself
inline Words widen_words(Halves x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
inline Ints widen_words(Bytes x) { return (Ints)_mm512_cvtepi8_epi32((__m128i)x); }
inline Ints widen_words(UnsignedBytes x) { return (Ints)_mm512_cvtepu8_epi32((__m128i)x); }
#else
inline Words widen_words(Halves x) { return __builtin_convertvector(x, Words); }
inline Ints widen_words(Bytes x) { return __builtin_convertvector(x, Ints); }
inline Ints widen_words(UnsignedBytes x) { return __builtin_convertvector(x, Ints); }
#endif

inline Floats widen(const c10::BFloat16* from) { return (Floats)(widen_words(load<Halves>(from)) << 16); }

// 32 elements as the 16 even ones, from the lower halves of words, and the 16 odd ones, from the upper halves
struct Pairs {
  Floats even, odd;
};

inline Pairs widen_pairs(const c10::BFloat16* from) {
  const Words words = load<Words>(from);
  return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}

inline Floats widen(const int8_t* from) { return __builtin_convertvector(widen_words(load<Bytes>(from)), Floats); }

// `widen` of the last n < 16 elements of a row, with zeros after them
template <class T>
inline Floats widen_some(const T* from, int64_t n) {
  T padded[LANES] = {};
  std::memcpy(padded, from, n * sizeof(T));
  return widen(padded);
}

template <class T>
inline void widen_row(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, widen(from + i));
  for (; i < n; i++) to[i] = static_cast<float>(from[i]);
}

inline float sum(Floats x) {
  float parts[LANES];
  store(parts, x);
  for (int64_t width = LANES / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; i++) parts[i] += parts[i + width];
  return parts[0];
}

// lanes of a (numbered 0 to 15) and b (16 to 31) in the given order
#ifdef __clang__
#define LATENT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LATENT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

inline Floats halves_added(Floats a, Floats b) {
  return LATENT_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         LATENT_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

inline Floats quarters_added(Floats a, Floats b) {
  return LATENT_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         LATENT_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

inline Floats pairs_added(Floats a, Floats b) {
  return LATENT_SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         LATENT_SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}

// the sums over the lanes of each of eight vectors, in the first eight lanes
inline Floats sums_of_eight(const Floats* x) {
  const Floats first = quarters_added(halves_added(x[0], x[1]), halves_added(x[2], x[3]));
  const Floats second = quarters_added(halves_added(x[4], x[5]), halves_added(x[6], x[7]));
  const Floats pairs = pairs_added(first, second);
  return LATENT_SHUFFLE(pairs, pairs, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14) +
         LATENT_SHUFFLE(pairs, pairs, 1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15);
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x <= 0, within 2 units in the last place; zero below -87, where float32 has no normal numbers
inline Floats exp_of_negative(Floats x) {
  const Ints is_zero = x < -87.0f;
  x = is_zero ? splat(-87.0f) : x;
  // adding 1.5 * 2^23 leaves an integer in the low bits
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats whole = shifted - 12582912.0f;
  const Floats rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
  Floats series = rest * 1.98412698e-4f + 1.38888889e-3f;
  series = series * rest + 8.33333333e-3f;
  series = series * rest + 4.16666667e-2f;
  series = series * rest + 1.66666667e-1f;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  // 2^whole: the integer is the exponent
  const Floats power = (Floats)(((Words)shifted << 23) + 0x3f800000u);
  return is_zero ? Floats{} : series * power;
}

// G * LANES results for each of R rows: to[r][lane] += sum over i < k of a(r, i) x[i][lane]. The element a(r, i) is at
// a[r * row_step + i * k_step]. Always inlined, because GCC keeps the sums in memory otherwise.
template <int R, int G>
__attribute__((always_inline)) inline void multiply_lanes(
    const float* a, int64_t row_step, int64_t k_step, int64_t k, const float* x, int64_t x_step, float* to,
    int64_t to_step) {
  Floats sums[R][G];
  for (int r = 0; r < R; r++)
    for (int g = 0; g < G; g++) sums[r][g] = load<Floats>(to + r * to_step + g * LANES);
  // four rows share a pointer, because an address can be a register plus one, two or three times another
  const int64_t three = 3 * row_step;
  const float* fours[R / 4 + 1];
  for (int r = 0; r < R; r += 4) fours[r / 4] = a + r * row_step;
  for (int64_t i = 0; i < k; i++) {
    Floats lanes[G];
    for (int g = 0; g < G; g++) lanes[g] = load<Floats>(x + i * x_step + g * LANES);
    for (int r = 0; r < R; r++) {
      const float* row = fours[r / 4] + (r % 4 == 3 ? three : r % 4 * row_step);
      for (int g = 0; g < G; g++) sums[r][g] += *row * lanes[g];
    }
    for (int r = 0; r < R; r += 4) {
      fours[r / 4] += k_step;
      asm("" : "+r"(fours[r / 4]));
    }
  }
  for (int r = 0; r < R; r++)
    for (int g = 0; g < G; g++) store(to + r * to_step + g * LANES, sums[r][g]);
}

}  // namespace latent
