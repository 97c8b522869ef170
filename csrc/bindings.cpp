#include <pybind11/pybind11.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace mtlgrad;

namespace {

// How an argument of a kernel comes from Python. A wire is made and ends with the GIL held, and lives as long as the
// call; value() is what the kernel gets; fits() tells whether its tables have the entries that go with Rows beside it.
// Numbers and enums are themselves, a pointer is an address.
template <typename T>
class Wire {
 public:
  explicit Wire(py::handle from) : value_(convert(from)) {}
  T value() const { return value_; }
  bool fits(const Rows&) const { return true; }

 private:
  static T convert(py::handle from);

  T value_;
};

template <typename E>
constexpr E kLast{};
template <>
constexpr DType kLast<DType> = DType::f64;
template <>
constexpr Structure kLast<Structure> = Structure::kron;
template <>
constexpr Likelihood kLast<Likelihood> = Likelihood::multiclass;
template <>
constexpr Scale kLast<Scale> = Scale::rmse;

template <typename T>
T Wire<T>::convert(py::handle from) {
  if constexpr (std::is_same_v<T, py::handle>) {
    return from;
  } else if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(from.cast<std::uintptr_t>());
  } else if constexpr (std::is_enum_v<T>) {
    const int code = from.cast<int>();
    if (code < 0 || code > static_cast<int>(kLast<T>))
      throw std::invalid_argument("unknown code " + std::to_string(code));
    return static_cast<T>(code);
  } else {
    return from.cast<T>();
  }
}

// What a table has an entry for; an entry is a parameter and a task.
enum class Per { tensor, task, entry };
enum class Need { required, optional };

// A table in host memory is an object with a buffer, or None for null.
template <typename T, Per kPer, Need kNeed = Need::required>
struct Table;

template <typename T, Per kPer, Need kNeed>
class Wire<Table<T, kPer, kNeed>> {
 public:
  static_assert(sizeof(T) == 8, "Python makes tables of 64-bit integers and floats");

  explicit Wire(py::handle from) {
    if (!from.is_none() && PyObject_GetBuffer(from.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Wire() {
    if (view_.obj) PyBuffer_Release(&view_);
  }
  Wire(const Wire&) = delete;
  Wire& operator=(const Wire&) = delete;

  T* value() const { return static_cast<T*>(view_.buf); }
  int64_t size() const { return view_.len / 8; }
  bool fits(const Rows& rows) const {
    if (kNeed == Need::optional && !view_.obj) return true;
    return has((kPer == Per::task ? 1 : rows.tensors) * (kPer == Per::tensor ? 1 : rows.tasks));
  }
  bool has(int64_t entries) const { return view_.len == 8 * entries; }

 private:
  Py_buffer view_{};
};

// By themselves, tables of pointers go with the rows' tensors.
template <>
class Wire<void* const*> : public Wire<Table<void* const, Per::tensor>> {
  using Wire<Table<void* const, Per::tensor>>::Wire;
};
template <>
class Wire<const void* const*> : public Wire<Table<const void* const, Per::tensor>> {
  using Wire<Table<const void* const, Per::tensor>>::Wire;
};

template <typename... Fields>
class Tuple {
 public:
  explicit Tuple(py::handle from) : Tuple(from.cast<py::tuple>(), std::index_sequence_for<Fields...>{}) {}
  bool fits(const Rows& rows) const {
    return std::apply([&](const auto&... field) { return (field.fits(rows) && ...); }, fields_);
  }

 protected:
  auto values() const {
    return std::apply([](const auto&... field) { return std::make_tuple(field.value()...); }, fields_);
  }

  std::tuple<Wire<Fields>...> fields_;

 private:
  template <size_t... kIndices>
  Tuple(const py::tuple& from, std::index_sequence<kIndices...>) : fields_(checked(from)[kIndices]...) {}

  static const py::tuple& checked(const py::tuple& from) {
    if (from.size() != sizeof...(Fields))
      throw std::invalid_argument("expected a tuple of " + std::to_string(sizeof...(Fields)) + ", found one of " +
                                  std::to_string(from.size()));
    return from;
  }
};

// A struct is a tuple of its members, in their order.
template <typename T, typename... Fields>
class Struct : public Tuple<Fields...> {
 public:
  using Tuple<Fields...>::Tuple;
  T value() const {
    return std::apply([](auto... values) { return T{values...}; }, this->values());
  }
};

#define MTLGRAD_STRUCT(name, ...)                       \
  template <>                                           \
  class Wire<name> : public Struct<name, __VA_ARGS__> { \
    using Struct<name, __VA_ARGS__>::Struct;            \
  };

MTLGRAD_STRUCT(Features, const void*, int64_t, int64_t, int64_t)
MTLGRAD_STRUCT(Place, int, void*, int)
MTLGRAD_STRUCT(OutputsPosterior, const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t)
MTLGRAD_STRUCT(MulticlassPosterior, Structure, const void*, const void*, const void*, const void*, int64_t)
MTLGRAD_STRUCT(Alignment, double*, double*, int64_t*, double*, double*)
MTLGRAD_STRUCT(Adam, double, double, bool)
MTLGRAD_STRUCT(RMSprop, double, double)
MTLGRAD_STRUCT(Adagrad, double)
MTLGRAD_STRUCT(StepSettings, double, const double*, double, double, bool, bool, double, Table<const double, Per::task>,
               const bool*)
MTLGRAD_STRUCT(StepTensors, Table<void* const, Per::tensor>, Table<const float* const, Per::tensor>,
               Table<double* const, Per::tensor, Need::optional>, Table<const int64_t, Per::tensor, Need::optional>)
using Moments = Table<void* const, Per::entry>;
using OptionalMoments = Table<void* const, Per::entry, Need::optional>;
MTLGRAD_STRUCT(AdamMoments, Moments, Moments, OptionalMoments)
MTLGRAD_STRUCT(RMSpropMoments, Moments, OptionalMoments, Table<void* const, Per::tensor, Need::optional>)
MTLGRAD_STRUCT(AdagradMoments, Moments)
#undef MTLGRAD_STRUCT

// Two pointers, to mean and variance; with powers and scales, to numerator and denominator.
template <>
class Wire<Output> : public Tuple<void*, void*, const double*, const double*> {
 public:
  using Tuple::Tuple;
  Output value() const {
    const auto [first, second, power, scale] = values();
    if (power) return {nullptr, nullptr, first, second, power, scale};
    return {first, second, nullptr, nullptr, nullptr};
  }
};

// (bases, apart, sizes, tasks): without `apart` the addresses of all entries; else those of each tensor's first row, and
// how many bytes lie between its rows; or an element's bytes where the rows are packed, and then `sizes` are those of all
// T of them.
template <>
class Wire<Rows>
    : public Tuple<Table<const void* const, Per::tensor>, py::handle, Table<const int64_t, Per::tensor>, int64_t> {
 public:
  explicit Wire(py::handle from) : Tuple(from) {
    const auto& [bases, apart, sizes, count] = fields_;
    const int64_t tensors = sizes.size(), tasks = count.value();
    rows_ = {bases.value(), sizes.value(), tasks, tensors};
    const bool listed = apart.value().is_none(), packed = py::isinstance<py::int_>(apart.value());
    const Wire<Table<const int64_t, Per::tensor>> table(listed || packed ? py::handle(Py_None) : apart.value());
    if (tasks < 0 || !sizes.has(tensors) || !bases.has(listed ? tensors * tasks : tensors) ||
        (table.value() && !table.has(tensors)))
      throw std::invalid_argument("rows: tables disagree");
    if (listed) return;
    const int64_t element = packed ? apart.value().cast<int64_t>() : 0;
    if (packed) {
      sizes_.assign(sizes.value(), sizes.value() + tensors);
      for (int64_t& size : sizes_) size /= std::max<int64_t>(tasks, 1);
      rows_.sizes = sizes_.data();
    }
    entries_.reserve(tensors * tasks);
    for (int64_t p = 0; p < tensors; ++p) {
      const int64_t bytes = packed ? element * sizes_[p] : table.value()[p];
      for (int64_t t = 0; t < tasks; ++t) entries_.push_back(static_cast<const char*>(bases.value()[p]) + t * bytes);
    }
    rows_.data = entries_.data();
  }
  const Rows& value() const { return rows_; }
  bool fits(const Rows&) const { return true; }

 private:
  Rows rows_;
  std::vector<const void*> entries_;
  std::vector<int64_t> sizes_;
};

template <typename T>
using Handle = py::handle;

template <typename Result, typename... Arguments>
void bind(py::module_& m, const char* name, Result (*kernel)(Arguments...)) {
  m.def(name, [name, kernel](Handle<Arguments>... arguments) {
    using Wires = std::tuple<Wire<std::decay_t<Arguments>>...>;
    const Wires wires(arguments...);
    if constexpr ((std::is_same_v<std::decay_t<Arguments>, Rows> || ...)) {
      const Rows& rows = std::get<Wire<Rows>>(wires).value();
      if (!std::apply([&](const auto&... wire) { return (wire.fits(rows) && ...); }, wires))
        throw std::invalid_argument(std::string(name) + ": tables disagree");
    }
    py::gil_scoped_release nogil;
    return std::apply([&](const auto&... wire) { return kernel(wire.value()...); }, wires);
  });
}

}  // namespace

// Free-threaded Python needs no GIL here: kernels, which run without it, have no state outside their arguments; and a
// table's buffer is held as long as the call reads it.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "mtlgrad kernels on raw pointers; mtlgrad.ops is the checked tensor API";

#ifdef __clang__
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
#ifdef _OPENMP
  m.attr("openmp") = _OPENMP;  // the OpenMP standard's date, e.g. 201511
#else
  m.attr("openmp") = 0;
#endif
#ifndef MTLGRAD_EMULATE  // where the CUDA kernels are alone
  bind(m, "multiclass_workspace", multiclass_workspace);
  bind(m, "condition_on_batch", cpu::condition_on_batch);
  bind(m, "condition_by_precision", cpu::condition_by_precision);
  bind(m, "add_curvature", cpu::add_curvature);
  bind(m, "count_steps", cpu::count_steps);

  py::module_ on_cpu = m.def_submodule("cpu");
  on_cpu.attr("adatask_max_tasks") = std::numeric_limits<int64_t>::max();
#define MTLGRAD_BIND(name) bind(on_cpu, #name, cpu::name);
  MTLGRAD_KERNELS(MTLGRAD_BIND)
#undef MTLGRAD_BIND
#endif

#ifdef MTLGRAD_WITH_CUDA
  m.attr("cuda_compiled") = true;
  m.attr("cuda_archs") = MTLGRAD_CUDA_ARCHS;
  m.attr("nvcc") = MTLGRAD_NVCC;
  m.def("cuda_device_count", &cuda::device_count);
  m.def("cuda_device_error", &cuda::device_error);
  m.def("cuda_runtime_version", &cuda::runtime_version);
  py::module_ on_cuda = m.def_submodule("cuda");
  on_cuda.attr("adatask_max_tasks") = kMaxStepTasks;
#define MTLGRAD_BIND(name) bind(on_cuda, #name, cuda::name);
  MTLGRAD_KERNELS(MTLGRAD_BIND)
#undef MTLGRAD_BIND
#else
  m.attr("cuda_compiled") = false;
  m.attr("cuda_archs") = "";
  m.attr("nvcc") = "";
#endif
}
