// The half-precision storage types on the host, with branch-free conversions that vectorise on any machine.
#pragma once
#include "math/scalar.h"

namespace mtlgrad::cpu {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

MTLGRAD_INLINE float widen(float x) { return x; }
MTLGRAD_INLINE double widen(double x) { return x; }

MTLGRAD_INLINE float widen(bfloat16 x) { return math::float_from_bits(static_cast<int32_t>(uint32_t{x.bits} << 16)); }

// Exponent and mantissa in place, under the largest exponents: infinity and NaN are that already, a normal number is 2^112
// times itself, a subnormal one 2^111 times itself and 2^97 more. The smaller of the two answers is right, and no float on
// the way is subnormal: torch.set_flush_denormal would make zero of it.
MTLGRAD_INLINE float widen(float16 x) {
  const uint32_t magnitude = uint32_t{x.bits} & 0x7FFF, sign = (uint32_t{x.bits} & 0x8000) << 16;
  const float scaled = math::float_from_bits(static_cast<int32_t>((magnitude << 13) + 0x70000000));
  const float normal = scaled * 0x1p-112f, subnormal = scaled * 0x1p-111f - 0x1p-14f;
  const int32_t bits = math::bits_from_float(normal < subnormal ? normal : subnormal);
  return math::float_from_bits(static_cast<int32_t>(static_cast<uint32_t>(bits) | sign));
}

// Round to nearest, ties to even; NaN stays NaN.
template <typename S>
MTLGRAD_INLINE S narrow(float x);

template <>
MTLGRAD_INLINE float narrow<float>(float x) {
  return x;
}

template <>
MTLGRAD_INLINE bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = static_cast<uint32_t>(math::bits_from_float(x));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded)};
}

// Normal: drop 13 bits of mantissa. Subnormal: the addition of 0.5 rounds at 2^-24, the last place of float16.
template <>
MTLGRAD_INLINE float16 narrow<float16>(float x) {
  const uint32_t all = static_cast<uint32_t>(math::bits_from_float(x)), bits = all & 0x7FFFFFFF;
  const uint32_t normal = (bits - 0x38000000 + 0x0FFF + ((bits >> 13) & 1)) >> 13;
  const float shifted = math::float_from_bits(static_cast<int32_t>(bits)) + 0.5f;
  const uint32_t subnormal = static_cast<uint32_t>(math::bits_from_float(shifted)) - 0x3F000000;
  uint32_t result = bits < 0x38800000 ? subnormal : normal;
  result = bits >= 0x477FF000 ? 0x7C00 : result;  // 65520 and above round to infinity
  result = bits > 0x7F800000 ? 0x7E00 : result;
  return {static_cast<uint16_t>(result | ((all >> 16) & 0x8000))};
}

}  // namespace mtlgrad::cpu
