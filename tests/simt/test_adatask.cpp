// The kernels of the `adatask` stem, host's and emulated device's, against plain loops in long double. For the
// sanitizers: every array is a heap block of exactly its size, workspaces start as NaN, and threads run in three orders,
// which must not change a bit.
#include <cuda_bf16.h>

#include <limits>
#include <numeric>
#include <random>

#include "cuda_emu.h"
#include "kernels.h"
#include "math/adatask.h"

using namespace mtlgrad;
using Real = long double;
using Bf16 = __nv_bfloat16;

using emu::kRacesAlone;

static int failures = 0, passed = 0;
static int64_t decided = 0, undecided = 0;  // roundings whose result the bound on the error leaves open, and not
static std::mt19937 rng(1);

static void expect(bool good, const char* name, int64_t p, int64_t t, int64_t i, Real got, Real want, Real error) {
  if (good)
    ++passed;
  else if (++failures < 20)
    std::printf("FAIL %s[%d, %d, %d]: got %.9Lg, want %.9Lg +- %.3Lg\n", name, int(p), int(t), int(i), got, want,
                error);
}

template <typename T>
constexpr DType dtype_of = std::is_same_v<T, float>    ? DType::f32
                           : std::is_same_v<T, double> ? DType::f64
                                                       : DType::bf16;
static double value(double v) { return v; }
static double value(float v) { return v; }
static double value(Bf16 v) { return __bfloat162float(v); }

// As a kernel stores it.
template <typename T>
T rounded(Real v, bool stochastic, uint32_t bits) {
  if constexpr (!std::is_same_v<T, Bf16>)
    return static_cast<T>(v);
  else if (stochastic)
    return Bf16(__ushort_as_bfloat16(math::round_stochastically(static_cast<float>(v), bits)));
  else
    return __float2bfloat16_rn(static_cast<float>(v));
}

// Rounding is monotone: what is right lies between what the ends of [want - error, want + error] are rounded to.
template <typename T>
void check(const char* name, int64_t p, int64_t t, int64_t i, T stored, Real want, Real error, bool stochastic = false,
           uint32_t bits = 0) {
  const double got = value(stored);
  if (!std::isfinite(want))
    return expect(std::isnan(want) ? std::isnan(got) : got == want, name, p, t, i, got, want, 0);
  if (!std::isfinite(error)) return;
  const double low = value(rounded<T>(want - error, stochastic, bits));
  const double high = value(rounded<T>(want + error, stochastic, bits));
  expect(low <= got && got <= high, name, p, t, i, got, want, error);
  if (sizeof(T) == 2) ++(low == high ? decided : undecided);
}

// One array, `skip` elements behind a boundary of 16 bytes.
template <typename T>
struct Array {
  std::unique_ptr<T[]> memory;
  int64_t size, skip;
  Array(int64_t size, int64_t skip) : memory(new T[size + skip]()), size(size), skip(skip) {}
  Array(const Array& other) : Array(other.size, other.skip) { std::copy_n(other.data(), size, data()); }
  T* data() const { return memory.get() + skip; }
  double operator[](int64_t i) const { return value(data()[i]); }
  bool operator==(const Array& other) const {
    return size == 0 || std::memcmp(data(), other.data(), size * sizeof(T)) == 0;
  }
};

enum class Rule { adam, rmsprop, adagrad };

struct Case {
  Rule rule = Rule::adam;
  bool extra = false, buffered = false, decoupled = false, maximize = false, stochastic = false, squares = false,
       lr_tensor = false;
  double weight_decay = 0.0;
  int64_t tasks = 3;
  int absent = 0;  // 1: every third task, from the second on; 2: all
  int shift = 0;   // of all arrays; -1: another one for each
  double special = 0.0;
  std::vector<int64_t> sizes = {1, 33, 257};
};

// What a step reads and writes. Copies have memory of their own.
template <typename S, typename M>
struct State {
  std::vector<Array<S>> parameters, gradients;
  std::vector<Array<M>> first, second, largest, buffers;
  std::vector<Array<double>> squares;
  std::vector<Array<float>> steps;

  explicit State(const Case& c) {
    std::normal_distribution<double> normal;
    int arrays = 0;
    const auto add = [&](auto& list, int64_t size, double scale, bool square) {
      using T = std::decay_t<decltype(*list[0].data())>;
      list.emplace_back(size, c.shift < 0 ? arrays++ % 3 : c.shift);
      for (int64_t i = 0; i < size; ++i) {
        const double x = i % 17 == 3 && scale < 1 ? 0.0 : scale * normal(rng);
        list.back().data()[i] = T(static_cast<float>(square ? x * x + 0.05 * (x != 0.0) : x));
      }
    };
    for (size_t p = 0; p < c.sizes.size(); ++p) {
      const int64_t size = c.sizes[p];
      add(parameters, size, 1.0, false);
      if (c.buffered) add(buffers, size, 0.5, false);
      for (int64_t t = 0; t < c.tasks; ++t) {
        add(gradients, size, 0.3, false), add(second, size, 0.2, true);
        if (c.rule == Rule::adam || (c.rule == Rule::rmsprop && c.extra)) add(first, size, 0.1, false);
        if (c.rule == Rule::adam && c.extra) add(largest, size, 0.25, true);
      }
      if (c.squares) squares.emplace_back(c.tasks, 0);
      steps.emplace_back(c.tasks, 0);
      for (int64_t t = 0; t < c.tasks; ++t) {
        if (c.squares) squares.back().data()[t] = 0.1 * static_cast<double>(t);
        steps.back().data()[t] = static_cast<float>(c.absent && t % 3 == 1 ? 0 : 1 + (7 * p + 3 * t) % 5 + t % 2 * 900);
      }
    }
    if (c.special != 0.0) gradients.back().data()[c.sizes.back() / 2] = S(static_cast<float>(c.special));
  }

  bool operator==(const State& o) const {
    return parameters == o.parameters && gradients == o.gradients && first == o.first && second == o.second &&
           largest == o.largest && buffers == o.buffers && squares == o.squares && steps == o.steps;
  }
};

template <typename Pointer, typename T>
std::vector<Pointer> pointers(const std::vector<Array<T>>& arrays) {
  std::vector<Pointer> result;
  for (const auto& array : arrays) result.push_back(array.data());
  result.shrink_to_fit();
  return result;
}

// Of all rules: beta1 or momentum, beta2 or alpha.
constexpr double kLr = 0.03, kFirst = 0.85, kSecond = 0.97, kEps = 1e-6, kLrDecay = 0.02, kSquareDecay = 0.9;

template <typename S, typename M>
struct Runner {
  const Case& c;
  std::vector<int64_t> keys;
  std::vector<double> weights;
  std::unique_ptr<bool[]> present;

  explicit Runner(const Case& c) : c(c), present(c.absent ? new bool[c.tasks] : nullptr) {
    for (size_t p = 0; p < c.sizes.size(); ++p) keys.push_back(int64_t(p + 1) * 0x123456789ABLL);
    for (int64_t t = 0; t < c.tasks; ++t) weights.push_back(t % 4 == 3 ? -0.5 : 1.0 - 0.01 * static_cast<double>(t));
    for (int64_t t = 0; c.absent && t < c.tasks; ++t) present[t] = c.absent == 1 && t % 3 != 1;
  }
  bool takes_part(int64_t t) const { return !present || present[t]; }

  void step(bool device, State<S, M>& s) const {
    const auto parameters = pointers<void*>(s.parameters), first = pointers<void*>(s.first);
    const auto second = pointers<void*>(s.second), largest = pointers<void*>(s.largest);
    const auto buffers = pointers<void*>(s.buffers);
    const auto gradients = pointers<const void*>(s.gradients);
    const auto steps = pointers<const float*>(s.steps);
    const auto squares = pointers<double*>(s.squares);
    const auto table = [](const auto& list) { return list.empty() ? nullptr : list.data(); };
    const auto tensors = static_cast<int64_t>(c.sizes.size());
    const Rows rows{gradients.data(), c.sizes.data(), c.tasks, tensors};
    const StepTensors own{parameters.data(), steps.data(), table(squares), keys.data()};
    std::unique_ptr<double> lr(new double(kLr));
    const StepSettings by{c.lr_tensor ? std::nan("") : kLr,
                          c.lr_tensor ? lr.get() : nullptr,
                          kEps,
                          c.weight_decay,
                          c.maximize,
                          c.stochastic,
                          kSquareDecay,
                          weights.data(),
                          present.get()};
    std::unique_ptr<double[]> workspace;
    if (c.squares) {
      const int64_t size = (device ? cuda::adatask_workspace : cpu::adatask_workspace)(
          c.tasks, tensors, std::accumulate(c.sizes.begin(), c.sizes.end(), int64_t(0)));
      workspace.reset(new double[size]);
      std::fill_n(workspace.get(), size, std::nan(""));
    }
    const auto run = [&](auto* host, auto* emulated, const auto& moments, const auto& rule) {
      (device ? emulated : host)(dtype_of<S>, dtype_of<M>, rows, own, moments, rule, by, workspace.get(), {});
    };
    if (c.rule == Rule::adam)
      return run(cpu::adam, cuda::adam, AdamMoments{first.data(), second.data(), table(largest)},
                 Adam{kFirst, kSecond, c.decoupled});
    if (c.rule == Rule::rmsprop)
      return run(cpu::rmsprop, cuda::rmsprop, RMSpropMoments{second.data(), table(first), table(buffers)},
                 RMSprop{kSecond, c.buffered ? kFirst : 0.0});
    run(cpu::adagrad, cuda::adagrad, AdagradMoments{second.data()}, Adagrad{kLrDecay});
  }

  void compare(const State<S, M>& was, const State<S, M>& is) const {
    const Real e = sizeof(S) == 8 ? 1.2e-16L : 6e-8L;  // of the arithmetic
    const auto square_error = sizeof(S) == 8 ? 1e-13L : 1e-5L;
    const bool coupled = !c.decoupled && c.weight_decay != 0.0, adam = c.rule == Rule::adam;
    std::vector<Real> sums(c.tasks), sum_errors(c.tasks);
    for (int64_t p = 0; p < static_cast<int64_t>(c.sizes.size()); ++p) {
      std::fill(sums.begin(), sums.end(), 0), std::fill(sum_errors.begin(), sum_errors.end(), 0);
      const auto stream = [&](int64_t t, double count) { return math::random_stream(keys[p], t, count); };
      double counts = 0.0;
      for (int64_t t = 0; t < c.tasks; ++t) counts += was.steps[p][t];
      for (int64_t i = 0; i < c.sizes[p]; ++i) {
        const Real theta = was.parameters[p][i];
        Real delta = 0, delta_error = 0;
        for (int64_t t = 0; t < c.tasks; ++t) {
          const int64_t at = p * c.tasks + t;
          if (!takes_part(t)) continue;
          const Real count = was.steps[p][t], decay = coupled ? c.weight_decay * theta : 0.0L;
          const Real g = (c.maximize ? -1 : 1) * was.gradients[at][i] + decay, size = std::fabs(g) + std::fabs(decay);
          const uint32_t bits = math::random_bits(stream(t, double(count)), static_cast<uint32_t>(i));
          Real x = g, x_error = 2 * e * size, m = 0, m_error = 0;
          if (!is.first.empty()) {
            const Real b = adam ? kFirst : kSecond, old = was.first[at][i];
            m = b * old + (1 - b) * g, m_error = 4 * e * (std::fabs(old) + size);
            if (adam) x = m, x_error = m_error;
            check("first", p, t, i, is.first[at].data()[i], m, m_error, c.stochastic, bits);
          }
          const Real keep = c.rule == Rule::adagrad ? 1 : kSecond, add = keep == 1 ? 1 : 1 - keep;
          const Real v = keep * was.second[at][i] + add * g * g;
          const Real v_error = 6 * e * v + add * 4 * e * size * std::fabs(g) + 1e-40L;
          check("second", p, t, i, is.second[at].data()[i], v, v_error, c.stochastic, bits >> 16);
          Real s = v, s_error = v_error;
          if (!is.largest.empty()) {
            s = std::isnan(v) ? v : std::max<Real>(v, was.largest[at][i]);
            check("largest", p, t, i, is.largest[at].data()[i], s, v_error, c.stochastic, bits >> 16);
          }
          if (c.rule == Rule::rmsprop && c.extra) {
            s = v - m * m, s = s < 0 ? 0 : s;
            s_error = v_error + 2 * std::fabs(m) * m_error + m_error * m_error + 2 * e * m * m;
          }
          const Real scale = adam ? 1 / std::sqrt(1 - std::pow(Real(kSecond), count)) : 1;
          const Real direction = x / (scale * std::sqrt(s) + kEps), d = std::fabs(direction);
          const Real most = scale * std::sqrt(s + s_error) + kEps;
          const Real least = scale * std::sqrt(std::max(s - s_error, Real(0))) + kEps;
          const Real error = 8 * e * d + std::max((std::fabs(x) + x_error) / least - d,
                                                  d - std::max(std::fabs(x) - x_error, Real(0)) / most);
          const Real correction = adam                      ? 1 / (1 - std::pow(Real(kFirst), count))
                                  : c.rule == Rule::adagrad ? 1 / (1 + (count - 1) * kLrDecay)
                                                            : 1;
          const Real length = -kLr * weights[t] * correction, step = c.buffered ? Real(weights[t]) : length;
          delta += step * direction;
          delta_error += std::fabs(step) * (error + Real(c.tasks + 2) * e * d);
          sums[t] += length * length * direction * direction;
          sum_errors[t] += length * length * (2 * d * error + error * error + square_error * d * d);
        }
        if (c.buffered) {
          const Real old = was.buffers[p][i], b = kFirst * old + delta;
          delta_error += 3 * e * (std::fabs(old) + std::fabs(delta));
          const uint32_t bits = math::random_bits(stream(c.tasks, counts), static_cast<uint32_t>(i));
          check("buffer", p, 0, i, is.buffers[p].data()[i], b, delta_error, c.stochastic, bits);
          delta = -kLr * b, delta_error = kLr * delta_error + 2 * e * std::fabs(delta);
        }
        const Real want = theta * (c.decoupled ? 1 - kLr * c.weight_decay : 1) + delta;
        check("parameter", p, 0, i, is.parameters[p].data()[i], want,
              delta_error + 3 * e * (std::fabs(theta) + std::fabs(delta)));
      }
      for (int64_t t = 0; t < c.tasks; ++t) {
        const int64_t at = p * c.tasks + t;
        if (!takes_part(t))
          expect((is.first.empty() || is.first[at] == was.first[at]) && is.second[at] == was.second[at] &&
                     (is.largest.empty() || is.largest[at] == was.largest[at]),
                 "absent", p, t, 0, 0, 0, 0);
        if (c.squares)
          check("squares", p, t, 0, is.squares[p].data()[t], kSquareDecay * Real(was.squares[p][t]) + 0.1L * sums[t],
                0.1L * sum_errors[t] + 1e-15L * was.squares[p][t]);
      }
    }
    expect(was.gradients == is.gradients && was.steps == is.steps, "read-only", 0, 0, 0, 0, 0, 0);
  }
};

template <typename S, typename M>
void run(bool device, const Case& c, bool orders = false) {
  const Runner<S, M> runner(c);
  const State<S, M> was(c);
  State<S, M> is(was);
  runner.step(device, is);
  runner.compare(was, is);
  for (const auto order : emu::kOrders) {
    if (!device || !orders || order == emu::Order::forward) continue;
    emu::options.order = order;
    State<S, M> again(was);
    runner.step(device, again);
    expect(again == is, "order", 0, 0, 0, 0, 0, 0);
  }
  emu::options.order = emu::Order::forward;
}

static std::vector<Case> kinds() {
  std::vector<Case> result;
  for (const Rule rule : {Rule::adam, Rule::rmsprop, Rule::adagrad})
    for (const bool extra : {false, true})
      for (const bool buffered : {false, true}) {
        if ((buffered && rule != Rule::rmsprop) || (extra && rule == Rule::adagrad)) continue;
        result.emplace_back();
        result.back().rule = rule, result.back().extra = extra, result.back().buffered = buffered;
      }
  return result;
}

template <typename S, typename M>
void all(bool device) {
  int turn = 0;
  for (const bool stochastic : {false, true})
    for (Case c : kinds()) {
      if (stochastic && sizeof(M) != 2) continue;
      c.stochastic = stochastic;
      for (const int flags : {0, 1, 2, 3, 4, 5, 6, 7}) {
        if (kRacesAlone && flags != 2) continue;
        c.decoupled = (flags & 1) && c.rule == Rule::adam, c.maximize = flags & 2,
        c.weight_decay = flags & 4 ? 0.1 : 0.0;
        c.lr_tensor = flags == 5, c.squares = flags == 2 || flags == 4;
        run<S, M>(device, c);
      }
      c.weight_decay = 0.0, c.decoupled = false;
      for (const int64_t tasks : {1, 2, 5, 8, 20}) {
        if (kRacesAlone && tasks % 5) continue;
        Case sized = c;
        sized.tasks = tasks, sized.squares = tasks != 2, sized.shift = ++turn % 3 - 1;
        sized.absent = tasks == 5 || tasks == 2;
        sized.sizes = {0, 1, 31, 32, 33, 255, 257, 1000, 0};
        if (tasks == 1) sized.sizes = {turn % 5 ? 700 : 4096, turn % 7 ? 1030 : 8195, 0};
        if (tasks > 2 && turn % 4) sized.sizes = {0, turn % 40, tasks == 20 ? 130 : 1030};
        if (tasks == 20 && turn % 4 == 0) sized.sizes = {31, 0, 33, 257};
        run<S, M>(device, sized, tasks == 5);
      }
      c.squares = true, c.absent = 2;
      run<S, M>(device, c);
      if (kRacesAlone) continue;
      c.absent = 0, c.sizes = {40, 300};
      for (const double special : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
        c.special = special;
        run<S, M>(device, c);
      }
    }
}

// More than a table holds, of segments, then of pointers; the largest number of tasks; parameters of several pieces.
static void full_tables(bool device) {
  Case c;
  c.squares = true, c.tasks = 2;
  c.sizes.resize(260);
  for (size_t p = 0; p < c.sizes.size(); ++p) c.sizes[p] = static_cast<int64_t>(p % 7);
  c.sizes[20] = 3002;
  run<float, float>(device, c);
  c.tasks = 64, c.extra = true, c.sizes.resize(18);
  run<float, Bf16>(device, c);
  c.tasks = 1, c.extra = false, c.stochastic = true, c.sizes = {3, 65536 + 1003, 65537};
  run<Bf16, Bf16>(device, c);
}

// More work items than blocks, so that a block goes from one to the next and from one parameter to the next; and more
// pieces than a table holds.
static void long_walks() {
  Case c;
  c.rule = Rule::adagrad, c.squares = true, c.tasks = 1, c.sizes.clear();
  for (int64_t p = 0; p < 15; ++p) c.sizes.push_back(1025 + 37 * p);
  c.sizes.push_back(9001);
  run<double, double>(true, c, true);
}

template <typename Body>
void throws(const char* name, const Body& body) {
  try {
    body();
    expect(false, name, 0, 0, 0, 0, 0, 0);
  } catch (const std::invalid_argument&) {
    ++passed;
  }
}

template <typename Moments, typename Of, typename Step>
void refuses(const Step& step) {
  const auto call = [&](DType parameters, DType moments, const Rows& rows) {
    step(parameters, moments, rows, StepTensors{}, Moments{}, Of{}, StepSettings{}, nullptr, Place{});
  };
  call(DType::f32, DType::f32, {});
  throws("f16", [&] { call(DType::f16, DType::f16, {}); });
  throws("f64 with f32", [&] { call(DType::f64, DType::f32, {}); });
  throws("f32 with f64", [&] { call(DType::f32, DType::f64, {}); });
}

static void refusals() {
  for (const auto step : {cpu::adam, cuda::adam}) refuses<AdamMoments, Adam>(step);
  for (const auto step : {cpu::rmsprop, cuda::rmsprop}) refuses<RMSpropMoments, RMSprop>(step);
  for (const auto step : {cpu::adagrad, cuda::adagrad}) refuses<AdagradMoments, Adagrad>(step);
  const Rows many{nullptr, nullptr, 65, 0};
  throws("tasks", [&] { cuda::adam(DType::f32, DType::f32, many, {}, {}, {}, {}, nullptr, {}); });
}

int main() {
  try {
    refusals();
    for (const bool device : {false, true}) {
      if (kRacesAlone && !device) continue;
      all<float, float>(device);
      all<float, Bf16>(device);
      all<Bf16, float>(device);
      all<Bf16, Bf16>(device);
      all<double, double>(device);
      if (!kRacesAlone) full_tables(device);
    }
    long_walks();
  } catch (const std::exception& e) {
    std::printf("EMULATOR ERROR %s\n", e.what());
    ++failures;
  }
  expect(undecided * 20 < decided, "roundings left open", 0, 0, 0, Real(undecided), Real(decided), 0);
  std::printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
