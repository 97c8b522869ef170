// Elementary functions that vectorise on the host and run unchanged on a device. Host and device kernels include this
// file, so a test of one is a test of the other's arithmetic. Branches are selects, so that a loop over them vectorises.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MTLGRAD_INLINE __host__ __device__ __forceinline__
#else
#define MTLGRAD_INLINE inline __attribute__((always_inline))
#endif

namespace mtlgrad::math {

template <typename T>
MTLGRAD_INLINE T infinity() {
  return static_cast<T>(HUGE_VAL);
}

template <typename T>
MTLGRAD_INLINE T not_a_number() {
  return static_cast<T>(NAN);
}

MTLGRAD_INLINE float float_from_bits(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MTLGRAD_INLINE int32_t bits_from_float(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

MTLGRAD_INLINE double double_from_bits(int64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to an integer by adding and taking away 1.5 * 2^23 (2^52): one instruction each on any machine, where a call
// of rint would stop the vectoriser on a plain x86-64. For |x| < 2^22 (2^51).
MTLGRAD_INLINE float round_small(float x) {
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

MTLGRAD_INLINE double round_small(double x) {
  const double magic = 6755399441055744.0;
  return (x + magic) - magic;
}

template <typename T>
struct ExpPair {
  T exp;    // e^x, full relative accuracy
  T expm1;  // e^x - 1, full relative accuracy near x = 0 too
};

// x = n ln 2 + f with |f| <= ln 2 / 2; e^f - 1 by its Taylor polynomial; both results from the one polynomial.
// For x <= 0 (all that the formulas here need); below -87 (-708) the results are 0 and -1, an absolute error of 1e-38.
MTLGRAD_INLINE ExpPair<float> exp_pair(float x) {
  const bool under = x < -87.0f;
  const float clamped = under ? -87.0f : x;
  const float n = round_small(clamped * 1.44269504088896341f);
  const float f = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, n * the first is exact
  float p = 1.0f / 5040.0f;
  p = p * f + 1.0f / 720.0f;
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f * f + f;
  const float scale = float_from_bits((static_cast<int32_t>(n) + 127) << 23);
  const float expm1 = scale * p + (scale - 1.0f);
  return {under ? 0.0f : scale * p + scale, under ? -1.0f : expm1};
}

MTLGRAD_INLINE ExpPair<double> exp_pair(double x) {
  const bool under = x < -708.0;
  const double clamped = under ? -708.0 : x;
  const double n = round_small(clamped * 1.4426950408889634074);
  const double f = (clamped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  double p = 1.0 / 6227020800.0;
  p = p * f + 1.0 / 479001600.0;
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * f * f + f;
  const double scale = double_from_bits((int64_t{static_cast<int32_t>(n)} + 1023) << 52);  // AVX2 knows no other way
  const double expm1 = scale * p + (scale - 1.0);
  return {under ? 0.0 : scale * p + scale, under ? -1.0 : expm1};
}

// A power as the sum of two floats: `high` has 12 bits, so that its product with an exponent of 8 bits is exact.
struct SplitPower {
  float high, low;
};

MTLGRAD_INLINE SplitPower split_power(double power) {
  const float high = float_from_bits(bits_from_float(static_cast<float>(power)) & static_cast<int32_t>(0xFFFFF000));
  return {high, static_cast<float>(power - static_cast<double>(high))};
}

// x^-power for a normal x >= 1e-8 (variances are clamped there): 2^(-power log2 x), the integer part of log2 x
// multiplied exactly, so that the relative error stays at a few eps whatever the exponent. At least 2^-126, never zero.
// NaN stays NaN.
MTLGRAD_INLINE float inverse_power(float x, SplitPower power) {
  const int32_t bits = bits_from_float(x);
  // m in [sqrt(1/2), sqrt(2)): log2 m is small, and m near 1 loses nothing
  const int32_t offset = bits - 0x3F3504F3;
  const int32_t e = offset >> 23;
  const float m = float_from_bits(bits - static_cast<int32_t>(static_cast<uint32_t>(e) << 23));
  const float s = (m - 1.0f) / (m + 1.0f);  // log m = 2 atanh s, |s| < 0.172
  const float s2 = s * s;
  float series = 2.0f / 9.0f;
  series = series * s2 + 2.0f / 7.0f;
  series = series * s2 + 2.0f / 5.0f;
  series = series * s2 + 2.0f / 3.0f;
  const float log2m = (series * s2 * s + 2.0f * s) * 1.44269504088896341f;
  const float exponent = static_cast<float>(e);
  const float whole = power.high * exponent;  // exact
  const float part = power.low * exponent + (power.high + power.low) * log2m;
  const float y = -(whole + part);
  const float bounded = y > 126.0f ? 126.0f : (y < -126.0f ? -126.0f : y);
  const float n = round_small(bounded);
  const float f = ((-whole - n) - part) * 0.693147180559945309f;
  float p = 1.0f / 5040.0f;
  p = p * f + 1.0f / 720.0f;
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f * f + f;
  const float scale = float_from_bits((static_cast<int32_t>(n) + 127) << 23);
  float result = scale * p + scale;
  result = y > 126.0f ? infinity<float>() : result;
  return x != x ? x : result;
}

MTLGRAD_INLINE double inverse_power(double x, double power) { return pow(x, -power); }

// The logistic function and its complement, both with full relative accuracy.
template <typename T>
struct Logistic {
  T p, q;  // q = 1 - p
  T x;
};

template <typename T>
MTLGRAD_INLINE Logistic<T> logistic(T x) {
  const T e = exp_pair(x < T(0) ? x : -x).exp;  // e^-|x|
  const T small = e / (T(1) + e), large = T(1) / (T(1) + e);
  return {x < T(0) ? small : large, x < T(0) ? large : small, x};
}

// Where the smaller of p and q, and the factor by which a step changes it, may leave the range of T both; the larger is
// one there.
template <typename T>
MTLGRAD_INLINE bool is_saturated(Logistic<T> at) {
  return (at.x < T(0) ? -at.x : at.x) > (sizeof(T) == 4 ? T(40) : T(400));
}

// logistic(x + delta) - logistic(x), given the logistic at x: no cancellation however small delta is.
template <bool kSaturated, typename T>
MTLGRAD_INLINE T logistic_step(Logistic<T> at, T delta) {
  const bool up = delta > T(0);
  const ExpPair<T> e = exp_pair(up ? -delta : delta);
  const T towards = up ? at.q : at.p, away = up ? at.p : at.q;
  T step = at.p * at.q * -e.expm1 / (away + towards * e.exp);
  if (kSaturated && up == (at.x < T(0)))  // back to the middle: away / (away + e) is that of a logit between the two
    step = -e.expm1 * logistic(up ? delta + at.x : -delta - at.x).p;
  return up ? step : -step;
}

// By overload: on the host an unqualified sqrt of a float would be the one of C, in double.
MTLGRAD_INLINE float square_root(float x) { return sqrtf(x); }
MTLGRAD_INLINE double square_root(double x) { return sqrt(x); }

}  // namespace mtlgrad::math
